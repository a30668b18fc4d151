"""The documentation site builds without a warning, and has every page of docs/."""

import os
import subprocess
import sys
from pathlib import Path

import medvolume

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_with_every_page(tmp_path):
    """mkdocs is strict: a broken link, or a page that the navigation lacks, fails."""
    quiet = {**os.environ, "DISABLE_MKDOCS_2_WARNING": "true", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [path for path in ROOT.glob("docs/**/*.md") if not path.name.endswith(".in.md")]
    for page in pages:
        name = page.parent if page.stem == "README" else page.with_suffix("")
        assert (tmp_path / "site" / name.relative_to(ROOT) / "index.html").is_file(), page
    api = (tmp_path / "site" / "docs" / "api" / "index.html").read_text()
    for name in medvolume.__all__:
        assert f'id="medvolume.{name}"' in api, f"docs/api.md lacks medvolume.{name}"

"""docs/settings.md is what `python -m tools.settings_page` writes."""

import re

from cli.settings import hints_of
from tools import settings_page


def test_the_page_is_up_to_date():
    said = "docs/settings.md is stale: run `python -m tools.settings_page`"
    assert settings_page.PAGE.read_text() == settings_page.page(), said


def test_the_page_has_every_setting_and_no_broken_link(tmp_path, capsys):
    settings_page.main(["--output", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    owners = [*settings_page.PROGRAMS.values(), *settings_page.sections(), *settings_page.MODELS]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(hints_of(owner)) for owner in owners) > 120
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 and not row.endswith("|  |") for row in rows)
    headings = {line.removeprefix("## ").lower() for line in text.splitlines() if line.startswith("## ")}
    assert len(headings) == len(owners)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings

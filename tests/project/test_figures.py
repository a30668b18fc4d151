"""Every report is in the table of tools.figures, and the table can be run."""

import importlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tools.figures import __main__ as figures
from tools.figures.table import FIGURES, NEEDS, PAGES, Figure, Page

ROOT = Path(__file__).resolve().parents[2]
# Files that are no reports of a measurement, but say how a pipeline is built and sampled.
SETTINGS = ("model_index.json", "sampling.json", "config.json", "scheduler_config.json")
REPORTS = {figure.report: figure for figure in FIGURES}
THERE = [report for report in REPORTS if (ROOT / report).is_file()]


def test_every_report_is_in_the_table_and_on_a_page():
    found = {
        path.relative_to(ROOT).as_posix() for room in ("docs", "weights") for path in (ROOT / room).rglob("*.json")
    }
    assert {report for report in found if not report.endswith(SETTINGS)} == set(THERE)
    assert len(REPORTS) == len(FIGURES)
    assert {report for page in PAGES for report in page.reports} == set(REPORTS)


@pytest.mark.parametrize("report", THERE)
def test_a_report_names_commit_machine_and_date(report):
    found = list(figures.origins(json.loads((ROOT / report).read_text())))
    assert found
    for one in found:
        assert len(str(one["commit"]).rstrip("+")) == 12 and str(one["date"])[:2] == "20"
        assert isinstance(one["machine"], dict) and {"processor", "cores"} <= one["machine"].keys()


def test_what_the_table_names_is_there():
    assert [page.path for page in PAGES if not (ROOT / page.path).is_file()] == []
    assert {need for figure in FIGURES for need in figure.needs} == set(NEEDS)
    # Weights may be of a pipeline that does not have all files.
    missing = [name for figure in FIGURES for name in figure.code if not (ROOT / name).exists()]
    assert missing == []


def commands() -> list[str]:
    """The programs of the table with their words, each once, with names for what is filled in."""
    values = {"report": "r.json", "folder": "f", "work": "w", "data": "data"}
    lines = [command.format(**values) for figure in FIGURES for command in figure.commands]
    lines += [page.command for page in PAGES if page.command]
    return sorted({line[line.index("python ") :] for line in lines if not line.startswith("cp ")})


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_its_program_takes(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line)[1:]
    name = words.pop(0) if program == "-m" else Path(program).stem
    module = importlib.import_module(name)
    parse = module.make_parser().parse_args if name == "generate" else module.parse
    parse(words)
    with pytest.raises((SystemExit, ValueError)):
        parse([*words, "--no_such_option", "1"])


def test_figures_that_are_not_measured_again_say_why():
    assert [figure.report for figure in FIGURES if bool(figure.commands) == bool(figure.fixed)] == []


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A small repository with the file code.py, in which tools.figures works."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / ".gitignore").write_text("out\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(tmp_path, *words)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    """Run git as somebody."""
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def measured(name: str, **changes) -> Figure:
    """A figure whose command writes a report, and a line in out/log each time that it runs."""
    report = (
        'import json, subprocess as s, sys; open("out/log", "a").write(sys.argv[2]); json.dump({"date": "2026-01-02", '
    )
    report += '"commit": s.check_output(["git", "rev-parse", "HEAD"], text=True)[:12], "machine": {"processor": "p", '
    report += '"cores": 1}, "seconds": 9}, open(sys.argv[1], "w"))'
    command = f"python -c {shlex.quote(report.replace('{', '{{').replace('}', '}}'))} {{report}} {name}"
    return Figure(**{"report": f"docs/{name}.json", "commands": (command,), "code": ("code.py",), **changes})


def test_a_run_goes_on_and_an_error_does_not_end_it(clone, monkeypatch, capsys):
    fails = measured("b", commands=("python -c 1/0 {report}",))
    away = measured("c", needs=("{data}/hippocampus",))
    table = [measured("a"), fails, away, measured("d", fixed="gone")]
    monkeypatch.setattr(figures, "FIGURES", table)
    writes = "python -c \"open('page.md', 'w').write('new')\""
    monkeypatch.setattr(
        figures, "PAGES", [Page("page.md", ("docs/a.json",), writes), Page("x", ("docs/b.json",), "no")]
    )
    for _ in range(2):  # the second time, a is there already
        with pytest.raises(
            ValueError, match=r"2 failed:\ndocs/b\.json: .*status 1\ndocs/c\.json: needs sets/hippocampus"
        ):
            figures.main(["--stale", "--data", "sets"])
        assert (clone / "out/log").read_text() == "a" and (clone / "page.md").read_text() == "new"
        assert json.loads((clone / "docs/a.json").read_text())["commit"] == git(clone, "rev-parse", "HEAD")[:12]
    assert "docs/a.json" not in git(clone, "status", "--porcelain", "--untracked-files=no")
    with pytest.raises(ValueError, match=r"--only docs/e\.json: not in the table"):
        figures.main(["--only", "docs/e.json"])
    (clone / "code.py").write_text("x = 2\n")
    with pytest.raises(ValueError, match="has changes, and a report names the commit"):
        figures.main(["--only", "docs/a.json"])
    git(clone, "commit", "-q", "-am", "second")
    capsys.readouterr()
    figures.main(["--list"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][2:] == ["2026-01-02", "p, 1 core", "9", "1 commit behind"]
    assert [row[-1] for row in rows[1:]] == ["absent", "absent", "absent; gone"]
    figures.main(["--only", "docs/a.json"])
    assert (clone / "out/log").read_text() == "aa"
    assert figures.state(table[0]) == figures.CURRENT
    stray = {**json.loads((clone / "docs/a.json").read_text()), "commit": "0" * 12}
    (clone / "docs/a.json").write_text(json.dumps(stray))
    assert figures.state(table[0]) == "of commit 000000000000, which is not in this clone"


def test_the_seconds_of_trainings_are_summed():
    scores = {"real": [{"seconds": 1.0}], "synthetic": [{"seconds": 2.0}, {"dice": 1}]}
    assert figures.duration({"evaluation": "dice", "scores": scores}) == 3
    assert figures.duration({"seconds": {"init": 5}}) is None

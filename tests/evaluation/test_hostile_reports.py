"""Reports, ledgers, tables and configs that others wrote or that were damaged: shown without their tricks, or refused
by name at once."""

import base64
import errno
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
from jsonargparse import Namespace

from cli.command import VisibleFormatter
from evaluation.commands.arguments import COMMANDS
from evaluation.commands.common import run_command
from evaluation.commands.dice import earlier_scores
from evaluation.commands.ledger import Ledger
from evaluation.html import build_page, write_page
from evaluation.html.render import markdown, shown
from evaluation.report import only_writer_of, write_report
from files.documents import FileError, read_json, read_yaml
from files.locks import OutputInUse
from files.paths import printable
from volumes.data.tables import read_table

RESULTS = Path(__file__).resolve().parents[2] / "weights" / "hippocampus" / "results"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SECRET = "SECRET-KEY-0123456789"


def privacy_report(folder: Path, pictures: object) -> Path:
    folder.mkdir(exist_ok=True)
    report = json.loads((RESULTS / "privacy.json").read_text()) | {"pictures": pictures}
    (folder / "privacy.json").write_text(json.dumps(report))
    return folder / "privacy.json"


@pytest.mark.parametrize(
    "kind", ["absolute", "parent", "link", "linked folder", "newline", "nul", "long", "number", "empty", "backslash"]
)
def test_a_report_names_no_file_outside_of_its_folder(tmp_path, kind):
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "secret.png").write_bytes(PNG + SECRET.encode())
    home = tmp_path / "in"
    home.mkdir()
    (home / "link.png").symlink_to(tmp_path / "secret.png")
    (home / "linked").symlink_to(tmp_path)
    named = {
        "absolute": str(tmp_path / "secret.png"),
        "parent": "../secret.png",
        "link": "link.png",
        "linked folder": "linked/secret.png",
        "newline": "a\n.png",
        "nul": "a\0.png",
        "long": "a" * 300 + ".png",
        "number": 3,
        "empty": "",
        "backslash": "..\\secret.png",
    }[kind]
    path = privacy_report(home, {"image": named})
    with pytest.raises(ValueError, match="privacy.json: cannot be shown: pictures.image"):
        write_page(build_page([path]), tmp_path / "page", "t")
    assert not (tmp_path / "page" / "report.html").exists()


def test_only_pictures_are_shown(tmp_path):
    path = privacy_report(tmp_path / "in", {"image": "notes.txt"})
    (tmp_path / "in" / "notes.txt").write_text(SECRET)
    with pytest.raises(ValueError, match="'notes.txt' is not a picture"):
        build_page([path])
    os.mkfifo(tmp_path / "in" / "pipe.png")
    with pytest.raises(ValueError, match="'pipe.png' is not a file"):
        build_page([privacy_report(tmp_path / "in", {"image": "pipe.png"})])
    (tmp_path / "in" / "inner").mkdir()
    (tmp_path / "in" / "inner" / "a.png").write_bytes(PNG)
    page = build_page([privacy_report(tmp_path / "in", {"image": "inner/a.png"})])
    assert page.sections[0].pictures[0].source == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


TRICKS = (
    "<script>alert(1)</script> | [a](http://x.org) `b` *c* _d_ # e\n\n# heading ![i](x) \x1b[2J www.x.org a@x.org "
    "\u202e $x^2$"
)


def dice_report(folder: Path, name: str = "synthetic/real", **more: object) -> Path:
    results = {arm: [{"seed": n, "dice": 0.5} for n in range(3)] for arm in ("real", name.partition("/")[0])}
    ratios = {name: {"of_means": 1.0, "per_seed": {str(n): 1.0 for n in range(3)}}}
    report = {"evaluation": "dice", "scores": results, "ratios": ratios, "volumes": {"judge": 2, "real": 4}, **more}
    (folder / "dice.json").write_text(json.dumps(report))
    return folder / "dice.json"


def test_a_page_shows_text_as_text(tmp_path, capsys):
    path = dice_report(tmp_path, TRICKS, command=TRICKS, date=TRICKS, commit=TRICKS)
    write_page(build_page([path]), tmp_path / "page", TRICKS, {"privacy": TRICKS})
    html = (tmp_path / "page" / "report.html").read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html and "\x1b" not in html and "\u202e" not in html
    text = (tmp_path / "page" / "report.md").read_text()
    assert (
        "\x1b" not in text and "\u202e" not in text and r"\x1b" in text and "<script>" not in re.sub(r"\\.", "", text)
    )
    bare = re.sub(r"\\.", "", text)  # what is left of Markdown without what is escaped
    assert not re.search(r"[\[\]`<>@]|!|http://|www\.|\$", bare)
    assert [line for line in bare.splitlines() if line.startswith("# ")] == [bare.splitlines()[0]]
    assert len({line.count("|") for line in bare.splitlines() if line.startswith("|")}) <= 2
    assert all(line.count("|") in (5, 6) for line in bare.splitlines() if "|" in line)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("one\ntwo", "one two"),
        ("1. x", r"1\. x"),
        ("- x", r"\- x"),
        ("-0.5", "-0.5"),
        ("0.50", "0.50"),
        (0.5, "0.5"),
        ("x\x1b[2J", r"x\\x1b\[2J"),
        ("http://a.b", r"http:\//a.b"),
        ("plain text, 12 %", "plain text, 12 %"),
    ],
)
def test_text_means_nothing_in_markdown(text, expected):
    assert markdown(text) == expected


def test_what_reaches_a_terminal_is_seen():
    assert printable("a\x1b[2J\x07\u202eb\u200bc\x9b\n\tü") == "a\\x1b[2J\\x07\\u202eb\\u200bc\\x9b\n\tü"
    assert printable("\udcff") == "\\udcff" and shown({"a\x1b": ["b\n c", 1, None]}) == {"a\\x1b": ["b c", 1, None]}
    import logging

    record = logging.LogRecord("n", logging.WARNING, "p", 1, "%s: %s", ("a\x1b[2J", 3), None)
    assert VisibleFormatter().format(record) == "a\\x1b[2J: 3"


def test_the_report_command_prints_no_escape_sequences(tmp_path, capsys):
    path = dice_report(tmp_path, "synthetic/real", adherence={"masks": "\x1b[2J"})
    options = Namespace(reports=[str(path)], output=str(tmp_path / "page"), title="t", wait_minutes=0)
    with pytest.raises(ValueError, match="dice.json: cannot be shown"):
        run_command(COMMANDS["report"], options, None, None)
    assert "\x1b" not in capsys.readouterr().out


def every_part(value: object, place: tuple = ()) -> list[tuple]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [found for key, one in parts for found in every_part(one, (*place, key))][:400]


@pytest.mark.parametrize("wrong", [None, "x", [], {}, -1, float("nan"), 1e300, True])
def test_a_report_with_a_wrong_value_is_shown_or_named(tmp_path, wrong):
    whole = json.loads(dice_report(tmp_path).read_text())
    for place in every_part(whole):
        report = json.loads(json.dumps(whole))
        inner = report
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        (tmp_path / "dice.json").write_text(json.dumps(report))
        try:
            build_page([tmp_path / "dice.json"])
        except ValueError as refused:
            assert "dice.json" in str(refused)


def test_a_figure_of_a_million_rows_is_refused(tmp_path):
    path = tmp_path / "shapes.json"
    one = {
        "wasserstein": {
            key: {"mean": 1.0, "interval": [0, 2]} for key in ("generated_to_test", "training_to_test", "excess")
        }
    }
    figures = {f"f{n}": one for n in range(501)}
    kernel = one["wasserstein"]
    report = {
        "evaluation": "shapes",
        "shapes": {"figures": figures, "kernel": kernel, "closer_to_training": {"auc": 0.5, "interval": [0, 1]}},
    }
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="shapes.json: .*501 figures are too many"):
        build_page([path])


# Ledgers

BASE = {"evaluation": "dice", "protocol": {}, "data": {}, "synthetic": None, "judge_synthetic": None, "content": "0"}
ROW = {
    "arm": "real",
    "labels": "all",
    "seed": 0,
    "dice": 0.5,
    "per_label": [0.5],
    "per_volume": [],
    "seconds": 1,
}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"rows": 1}', "[" * 100_000, '{"rows": [], "rows": []}', "\x1b[2J", "\xff"]
    + [
        json.dumps(BASE | {"rows": rows})
        for rows in (None, 1, {}, [1], [[]], [{}], [ROW | {"seed": "0"}], [ROW | {"dice": float("nan")}])
    ]
    + [
        json.dumps(BASE | {"rows": [ROW | {key: value}]})
        for key, value in (
            ("dice", "1"),
            ("dice", True),
            ("arm", 3),
            ("labels", []),
            ("per_volume", None),
            ("per_volume", 3),
            ("per_volume", ["1"]),
            ("on_synthetic", 1),
            ("on_synthetic", {}),
            ("seconds", "1"),
            ("drawn_from", 1.5),
        )
    ],
)
def test_a_damaged_ledger_is_named(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="report.json") as refused:
        Ledger(path, dict(BASE), lambda rows: {"rows": [row.as_json() for row in rows]})
    assert type(refused.value) is ValueError and "delete it" in str(refused.value) and "\x1b" not in str(refused.value)
    assert path.read_text(encoding="latin-1") == text
    (tmp_path / ".other.json.part1").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="other.json.part1"):
        Ledger(tmp_path / "other.json", dict(BASE), lambda rows: {"rows": [row.as_json() for row in rows]})


def test_a_ledger_without_its_volumes_is_damaged_too(tmp_path):
    (tmp_path / "report.json").write_text('{"rows": 1}')
    with pytest.raises(ValueError, match="report.json: holds no trainings"):
        Ledger(tmp_path / "report.json", {"evaluation": None}, lambda rows: {"rows": [row.as_json() for row in rows]})


def test_rows_that_cannot_be_summarized_are_named(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(BASE | {"rows": [ROW]}))
    with pytest.raises(ValueError, match="report.json: holds no trainings.*IndexError: "):
        Ledger(path, dict(BASE), lambda rows: {"first": rows[0].per_volume[0]})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"protocol": {}, "data": {}, "scores": 3}', '{"protocol": {}, "data": 3}']
)
def test_a_damaged_earlier_report_is_named(tmp_path, text):
    path = tmp_path / "earlier.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="earlier.json"):
        earlier_scores(path, BASE | {"volumes": {}})
    scores = {"real": [{"seed": 0, "dice": "high"}]}
    path.write_text(json.dumps(BASE | {"scores": scores, "volumes": {"judge": 1, "real": 1}}))
    with pytest.raises(ValueError, match="earlier.json: holds no Dice of 'real'"):
        earlier_scores(path, BASE | {"volumes": {"judge": 1, "real": 1}})


# Writing


def test_a_report_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "report.json").symlink_to(tmp_path / "victim")
    write_report(tmp_path / "report.json", {"a": 1})
    assert (tmp_path / "victim").read_text() == "mine" and json.loads((tmp_path / "report.json").read_text()) == {
        "a": 1
    }
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["report.json", "victim"]


def test_a_full_disk_names_the_report(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_report(tmp_path / "report.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refused:
        write_report(tmp_path / "report.json", {"a": 2})
    from cli.command import users_message

    monkeypatch.undo()
    assert (
        users_message(refused.value)
        == f"{tmp_path / 'report.json'}: No space left on device; make room, or give a path on another disk"
    )
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def hold(path: str, begun, done) -> None:
    with only_writer_of(path, 0):
        begun.set()
        done.wait(60)


def test_two_evaluations_do_not_write_one_report(tmp_path):
    """The second is refused and touches nothing, or waits; another report of the folder is free."""
    context = multiprocessing.get_context("fork")
    begun, done, path = context.Event(), context.Event(), tmp_path / "dice.json"
    path.write_text("{}")
    process = context.Process(target=hold, args=(str(path), begun, done))
    process.start()
    try:
        assert begun.wait(60)
        before = sorted((one.name, one.stat().st_mtime_ns) for one in tmp_path.iterdir())
        with (
            pytest.raises(
                OutputInUse, match=rf"{path}: another process writes there: process {process.pid} on .*--wait_minutes"
            ),
            only_writer_of(path, 0),
        ):
            raise AssertionError
        assert sorted((one.name, one.stat().st_mtime_ns) for one in tmp_path.iterdir()) == before
        options = Namespace(output=str(path), wait_minutes=0.0, reports=[])
        with pytest.raises(OutputInUse):
            run_command(COMMANDS["realism"], options, None, None)
        with pytest.raises(OutputInUse):
            run_command(COMMANDS["dice"], options, None, None)
        with only_writer_of(tmp_path / "realism.json", 0):
            pass
        done.set()
        with only_writer_of(path, 1):
            pass
    finally:
        done.set()
        process.join()
    assert sorted(one.name for one in tmp_path.iterdir() if not one.name.startswith(".")) == ["dice.json"]


# JSON, tables, YAML


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "two values called 'a'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 10_000, "not JSON"),
        ("\x1b[2J", "not JSON"),
    ],
)
def test_json_that_is_not_read(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=f"a.json: .*{reason}"):
        read_json(tmp_path / "a.json")


def test_json_is_read_of_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(FileError, match="a.json: is a pipe, not a regular file"):
        read_json(tmp_path / "a.json")
    with (tmp_path / "b.json").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(FileError, match="b.json: is larger than 256 MiB"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", lambda: json.dumps([[1, 2]]), "entry 1 is '.1, 2.'"),
        ("a.json", lambda: json.dumps([{"a": 1}, 3]), "entry 2 is '3'"),
        ("a.json", lambda: json.dumps([{"a": {"b": 1}}]), "entry 1: a holds a dict"),
        ("a.json", lambda: json.dumps([{f"k{n}": 1} for n in range(20_000)]), "20000 columns in 20000 rows"),
        ("a.json", lambda: json.dumps([{f"k{n}": 1 for n in range(100_000)}]), "100000 columns in 1 rows"),
        ("a.json", lambda: json.dumps([{"a": n} for n in range(100_001)]), "has 100001 rows"),
        ("a.json", lambda: '{"a": [' * 50_000, "nested too deeply"),
        ("a.csv", lambda: "a,b\n" + "1,2\n" * 300_000, "more than 100000 rows"),
        ("a.csv", lambda: "\n" * 1_000_000, "more than 400000 lines"),
        ("a.csv", lambda: "\r" * 1_000_000, "more than 400000 lines"),
        ("a.csv", lambda: ",".join(f"c{n}" for n in range(20_000)) + "\n", "line 1 has 20000 columns"),
        ("a.csv", lambda: "a,b\n" + "x" * 2_000_000 + ",1\n", "a line of 2000002 characters"),
        ("a.csv", lambda: "a," * 10_000_000, "a line of 20000000 characters"),
        ("a.csv", lambda: "x" * (1 << 26) + "\n", "larger than 64 MiB"),
    ],
)
def test_a_table_that_would_take_minutes_is_refused_at_once(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text())
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
        read_table(tmp_path / name)
    assert time.perf_counter() - began < 20


def test_a_large_table_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("name,age\n" + "".join(f"v{n},{n % 90}\n" for n in range(20_000)))
    rows = read_table(tmp_path / "a.csv")
    assert len(rows) == 20_000 and rows[-1] == {"name": "v19999", "age": str(19_999 % 90)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (lambda: "a: [" + ", ".join("1" * 1 for _ in range(90_000)) + "]", "more than 20000 values"),
        (lambda: "".join(f"k{n}: {n}\n" for n in range(45_000)), "more than 20000 values"),
        (lambda: "[" * 100_000, "more than 100 deep"),
        (lambda: "".join(" " * n + "a:\n" for n in range(1000)), "more than 100 deep"),
        (lambda: "".join(f"k{n}: &a{n} [1, 2]\n" for n in range(20_000)), "more than 20000 values"),
        (lambda: "x" * (1 << 24) + "y", "larger than 16 MiB"),
        (lambda: "a: &a [*a]", "contains itself"),
        (
            lambda: "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}\n" for n in range(40)),
            "aliases repeat",
        ),
    ],
)
def test_a_config_that_would_take_minutes_is_refused_at_once(tmp_path, text, reason):
    (tmp_path / "a.yaml").write_text(text())
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f"a.yaml: .*{reason}"):
        read_yaml(tmp_path / "a.yaml")
    assert time.perf_counter() - began < 5

"""The tool that plants faults: what it counts as caught, and that every row of the table still names code that is
there."""

import subprocess
import sys

import pytest

from tools.mutants import TABLE, Mutant, load_mutants

CODE = "def double(x):\n    return 2 * x\n"
TESTS = "from code_under_test import double\n\ndef test_double():\n    assert double(2) == 4\n"


def fault(**changes) -> Mutant:
    fields = {"file": "code_under_test.py", "code": "2 * x", "replacement": "3 * x", "tests": ("test_it.py",)}
    return Mutant(room="room", **(fields | changes))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "code_under_test.py").write_text(CODE)
    (root / "test_it.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_every_row_names_code_and_tests_that_exist():
    rooms = {mutant.room for mutant in load_mutants(TABLE)}
    assert rooms >= {"volumes", "autoencoder", "diffusion", "pipelines", "training", "evaluation"}


def test_a_noticed_fault_is_caught_and_an_unnoticed_is_missed(tree, tmp_path):
    script = tmp_path / "script.py"  # in a process of its own, as each fault is tried in a fork
    script.write_text(
        "import sys; from pathlib import Path; import pytest\n"
        "from tools.mutants import *\n"
        "root = Path(sys.argv[1]); workers = Workers(root, 2, root.parent / 'copies')\n"
        "faults = [Mutant('r', 'code_under_test.py', '2 * x', new, ('test_it.py',)) for new in ('3 * x', 'x + x', "
        "'y(')]\nfound = {run.mutant.replacement: outcome for run, outcome, _ in run_all(workers, [(f, f.tests) for f "
        "in faults])}\nassert found == {'3 * x': CAUGHT, 'x + x': MISSED, 'y(': INVALID}, found\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tree)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TABLE.parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert (tree / "code_under_test.py").read_text() == CODE  # only copies were changed


@pytest.mark.parametrize(
    "row, message",
    [
        ("code: 4 * x", "occurs 0 times"),
        ("code: x", "occurs 2 times"),
        ("replacement: 2 * x", "changes nothing"),
        ("replacement: '2 *'", "invalid syntax"),
        ("tests: [gone.py]", "no such tests: gone.py"),
        ("extra: 1", "extra"),
    ],
)
def test_rows_that_cannot_be_tried_are_named(tree, row, message):
    fields = {"file": "code_under_test.py", "code": "2 * x", "replacement": "3 * x", "tests": "[test_it.py]"}
    name, value = row.split(": ", 1)
    lines = "\n  ".join(f"{key}: {text}" for key, text in (fields | {name: value}).items())
    (tree / "room.yaml").write_text(f"- {lines}\n")
    with pytest.raises(ValueError, match=r"room.yaml, fault 1: .*" + message):
        load_mutants(tree, tree)


def test_the_key_changes_with_the_code_and_with_the_tests(tree):
    keys = {fault().key(tree), fault(replacement="4 * x").key(tree)}
    (tree / "code_under_test.py").write_text(CODE + "\n")
    keys.add(fault().key(tree))
    (tree / "test_it.py").write_text(TESTS + "\n")
    keys.add(fault().key(tree))
    assert len(keys) == 4

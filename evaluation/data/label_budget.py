"""Few labels: which k volumes of the training split count as labeled, and a table that restricts a training to them:

python -m evaluation.data.label_budget --config configs/hippocampus/ldm.yaml --k 16 --seed 0 --output out/k16/table.csv

Writes the table, whose rows are the k volumes and the test split's, and beside it `<table>_masks.csv` with the masks of
the k and `<table>_test_masks.csv` with those of the test split, for `generate.py --conditions`. Prints the arguments
that make the trainings read the table. `--data.root DIR` and the like override the config's section `data`.
docs/usefulness.md has the whole sequence.
"""

import csv
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import Number, PositiveInt, Seed
from evaluation.report import config_parser


def parse(args: list[str] | None) -> Namespace:
    """Parse the command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.data.label_budget", __doc__, args)
    parser.add_argument("--k", type=Number(PositiveInt), required=True, help="labeled volumes")
    parser.add_argument("--seed", type=Number(Seed), default=0, help="another number chooses other subjects")
    parser.add_argument("--output", type=str, required=True, help="table to write, a CSV file")
    parsed = parser.instantiate(parser.parse_args(args))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.atomic import atomic_file, remove_leftovers
from files.paths import printable
from files.remote import is_url, plain_path
from volumes import Case, DataConfig, load_cases

from .pairs import learning_cases, test_cases


def draw_labeled(cases: Sequence[Case], k: int, seed: int) -> list[int]:
    """Choose the k volumes that count as labeled. Returns indices into `cases`.

    Subjects come in the order of a hash of (seed, name), each with all its volumes, until there are k; some volumes of
    the last subject may be omitted. So the first 8 are among the 16 of the same seed, and the choice is the same on
    every machine.

    Raises: ValueError unless there are k volumes, at least 1.
    """
    if not 1 <= k <= len(cases):
        raise ValueError(f"{k} labeled volumes cannot be chosen from {len(cases)}; take 1 to {len(cases)}")

    def order(index: int) -> tuple[str, str]:
        subject = cases[index].subject
        return hashlib.sha256(f"{seed}:labeled:{subject}".encode()).hexdigest(), cases[index].name

    return sorted(range(len(cases)), key=order)[:k]


def budget(text: str, available: int) -> int:
    """Return how many labeled volumes `8` or `all` asks for. Raises: ValueError for other texts, and for more than are
    available.
    """
    if text == "all":
        return available
    if not text.isdecimal() or not 1 <= int(text) <= available:
        raise ValueError(f"--labels {text}: give numbers of volumes from 1 to {available}, or all")
    return int(text)


def restrict(config: DataConfig, k: int, seed: int, table: Path) -> DataConfig:
    """Write a table of k labeled volumes of the training split, as "train", and of the whole test split; return the
    config that reads it. All other volumes are in neither: no training sees them.

    Raises: ValueError for data that no table can name: phantoms, files found by `*`, and several patterns.
    """
    if config.phantom is not None:
        raise ValueError("data: phantoms have no files for a table to name; give fewer of them by data.phantom.count")
    files = [*(pattern for patterns in config.patterns.values() for pattern in patterns), config.masks or ""]
    if unnamed := [pattern for pattern in files if {*pattern} & {*"*?"}]:
        raise ValueError(f"data: a table cannot name the files of {unnamed}; write {{name}} instead of *")
    cases = load_cases(config)
    learn, split = learning_cases(cases), config.split or "split"
    chosen = [replace(learn[i], split="train") for i in draw_labeled(learn, k, seed)]
    rows = [{**case.metadata, split: case.split} for case in [*chosen, *test_cases(cases)]]
    _write(table, rows)
    place = table.resolve()
    named = str(place) if is_url(config.root) else os.path.relpath(place, Path(plain_path(config.root)).resolve())
    found = replace(config, table=named, split=split, test_fraction=0.0)
    if {case.name for case in load_cases(found) if case.split != "test"} != {case.name for case in chosen}:
        raise ValueError(f"{table}: names other volumes than were chosen; name the pieces of the files with {{braces}}")
    return found


def write_masks(cases: Sequence[Case], config: DataConfig, table: Path) -> None:
    """Write the masks of `cases`, with their classes and numbers, as a table for `generate.py --conditions`."""
    rows = []
    for case in cases:
        assert case.mask is not None
        asked = {name: case.metadata[name] for name in [*config.classes, *config.numbers] if name in case.metadata}
        rows.append({"mask": os.path.relpath(case.mask.resolve(), table.parent.resolve()), **asked})
    _write(table, rows)


def main(args: list[str] | None = None) -> None:
    """Write the tables that the command line asks for, and say how they are used."""
    options = parse(args)
    table = Path(options.output)
    config = restrict(options.data, options.k, options.seed, table)
    cases = load_cases(config)
    learn = learning_cases(cases)
    masks, test_masks = (table.with_name(f"{table.stem}_{name}.csv") for name in ("masks", "test_masks"))
    write_masks(learn, config, masks)
    write_masks(test_cases(cases), config, test_masks)
    names = printable(", ".join(case.name for case in learn))
    print(f"{len(learn)} volumes of {len({case.subject for case in learn})} subjects: {names}")
    cleared = " --data.test_fraction 0" if options.data.test_fraction else ""
    print(f"train and evaluate with: --data.table {config.table} --data.split {config.split}{cleared}")
    print(f"generate with: --conditions {masks}, or {test_masks} for test volumes")


def _write(table: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    remove_leftovers(table.parent)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_file(table) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

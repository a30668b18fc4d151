"""Write a recipe: data.yaml, vae.yaml and ldm.yaml in a folder, which the trainings' outputs will lie in, too."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from files.atomic import write_text
from files.paths import printable
from files.writable import check_output_folder

from .layouts.structures import ROLE as STRUCTURES
from .report import next_commands, report, written
from .section import CASES, LABELS, structures_name
from .survey import Options, Survey, look_over
from .writing import data_yaml, training_yaml

FILES = ("data.yaml", "vae.yaml", "ldm.yaml")
TEST_CASES = "test.csv"


def make_recipe(options: Options, command: str, *, overwrite: bool = False) -> Survey:
    """Look a folder over, print what was found, and write the recipe.

    Args:
        options: what the user said.
        command: that was typed, for the comments.
        overwrite: replace the files of a recipe that is there; its runs stay.

    Raises:
        ValueError: if there is a recipe already, and as `look_over`.
    """
    there = [name for name in FILES if (options.output / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{options.output}: holds {there[0]} already; add --overwrite to replace it, or give --output DIR"
        )
    survey = look_over(options)
    print(printable(report(survey)))
    check_output_folder(options.output)
    write_recipe(survey, command)
    print(printable(written(survey)))
    return survey


def write_recipe(survey: Survey, command: str) -> None:
    """Write the files of a recipe, and remove the tables of an earlier one."""
    output, section, plan = survey.options.output, survey.section, survey.plan
    for name in (CASES, TEST_CASES):
        (output / name).unlink(missing_ok=True)
    if section.table:
        write_text(output / CASES, section.table)
    if survey.choice.mask is not None:
        write_text(output / TEST_CASES, test_cases(survey))
    write_text(output / "data.yaml", data_yaml(section.settings, section.why, command))
    _, vae, ldm, _ = next_commands(survey)
    for stage, sections, training in (("vae", plan.vae, vae), ("ldm", plan.ldm, ldm)):
        write_text(output / f"{stage}.yaml", training_yaml(stage, sections, plan.why, training, plan.why["flip"]))


def test_cases(survey: Survey) -> str:
    """Return the text of test.csv, for `generate.py --conditions`: a row per case that is held out for testing.

    Masks are relative to the recipe; classes and numbers follow. Without test cases, the rows are of other splits.
    """
    cases, settings = survey.section.cases, survey.section.settings
    chosen = next(
        (found for split in ("test", "validation", "train") if (found := [c for c in cases if c.split == split])), []
    )
    columns = [
        *settings.get("classes", {}),
        *(n for n in settings.get("numbers", []) if n in (chosen[0].metadata if chosen else {})),
    ]
    names = {
        file: key for key in survey.choice.keys for file in [survey.layout.of_role(survey.choice.roles[0])[key].path]
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "mask", *columns])
    output = survey.options.output.resolve()
    for case in chosen:
        if survey.choice.mask == STRUCTURES:
            first = Path(os.path.relpath(next(iter(case.images.values())), survey.options.folder.resolve())).as_posix()
            mask = output / LABELS / structures_name(names[first])
        else:
            assert case.mask is not None
            mask = case.mask
        path = Path(os.path.relpath(mask.resolve(), output)).as_posix()
        writer.writerow([case.name, path, *(case.metadata.get(column, "") for column in columns)])
    return text.getvalue()

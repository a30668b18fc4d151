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
from .report import TEST_CASES, has_conditions, next_commands, report, written
from .section import CASES, LABELS, structures_name
from .survey import Options, Survey, look_over
from .writing import data_yaml, training_yaml

FILES = ("data.yaml", "vae.yaml", "ldm.yaml")


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
    if has_conditions(survey):
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
    splits = ("test", "validation", "train")
    chosen = next((found for split in splits if (found := [case for case in cases if case.split == split])), [])
    known = chosen[0].metadata if chosen else {}
    columns = [name for name in (*settings.get("classes", {}), *settings.get("numbers", [])) if name in known]
    with_mask = survey.choice.mask is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(["mask"] if with_mask else []), *columns])
    masks = _masks(survey) if with_mask else {}
    output = survey.options.output.resolve()
    for case in chosen:
        first = next(iter(case.images.values())).resolve()
        paths = [Path(os.path.relpath(masks[first], output)).as_posix()] if with_mask else []
        writer.writerow([case.name, *paths, *(case.metadata.get(column, "") for column in columns)])
    return text.getvalue()


def _masks(survey: Survey) -> dict[Path, Path]:
    """Return the mask of each case, by the file of its first channel."""
    root, output, mask = survey.options.folder.resolve(), survey.options.output.resolve(), survey.choice.mask
    first = survey.layout.of_role(survey.choice.channels[0].role)
    files = survey.layout.of_role(mask) if mask is not None and mask != STRUCTURES else {}
    made = {key: output / LABELS / structures_name(key) for key in survey.choice.keys}
    return {
        (root / first[key].path).resolve(): (root / files[key].path).resolve() if files else made[key]
        for key in survey.choice.keys
    }

"""Write a recipe: data.yaml, vae.yaml and ldm.yaml in a folder, which the trainings' outputs will lie in, too."""

from __future__ import annotations

from files.atomic import write_text
from files.paths import printable
from files.writable import check_output_folder

from .report import next_commands, report, written
from .section import CASES
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
    """Write the files of a recipe, and remove those of an earlier one that this one lacks."""
    output, section, plan = survey.options.output, survey.section, survey.plan
    for name in (CASES, "vae.yaml"):
        (output / name).unlink(missing_ok=True)
    if section.table:
        write_text(output / CASES, section.table)
    write_text(output / "data.yaml", data_yaml(section.settings, section.why, command))
    autoencoder = plan.start.weights.part("vae") if plan.start.lora and plan.start.weights is not None else ""
    for (stage, sections), training in zip(plan.trainings, next_commands(survey)[1:], strict=False):
        text = training_yaml(stage, sections, plan.why, training, plan.why["flip"], autoencoder)
        write_text(output / f"{stage}.yaml", text)

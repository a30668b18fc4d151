"""Values that stand in two places, because importing the other one takes seconds: they are equal."""

from dataclasses import fields
from pathlib import Path

import edit
import generate
from cli.generation import PRECISIONS
from evaluation.metrics.set_distances import MIN_SIZE
from pipelines.batch_edits import EditConfig
from pipelines.batch_generation import DTYPES, BatchConfig, RunConfig
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from pipelines.sampling import DEFAULTS
from recipes.section import MIN_TEST


def values(config: RunConfig) -> dict[str, object]:
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def test_constants_are_those_that_they_name():
    assert edit.MARGIN == BLEND_MARGIN_MM
    assert MIN_TEST == MIN_SIZE
    assert set(PRECISIONS) == set(DTYPES)


def test_defaults_of_the_commands_are_those_of_their_configs():
    parsed = generate.parse(["--pipeline", "p", "--output", "o"])
    assert values(parsed) == values(BatchConfig("p", Path("o")))
    parsed = edit.parse(["--pipeline", "p", "--output", "o", "--image", "i.nii"])
    assert values(parsed) == values(EditConfig("p", Path("o"), images=("i.nii",)))


def test_the_help_names_the_defaults_of_sampling():
    text = " ".join(generate.make_parser().format_help().split())
    assert f"(the pipeline's, or {DEFAULTS['num_inference_steps']})" in text
    assert f"(the pipeline's, or {DEFAULTS['guidance_scale']:g})" in text

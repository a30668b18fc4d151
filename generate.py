r"""Generate volumes from masks, from a table of conditions, or from nothing, in one process or many:

    python generate.py --pipeline weights/hippocampus --masks 'masks/*.nii.gz' --output out/generated --count 2
    python generate.py --pipeline DIR --conditions table.csv --output out/generated  # classes, numbers, images
    python generate.py --pipeline DIR --output out/generated --count 100             # a model without conditions
    python generate.py --pipeline weights/hippocampus --masks generate:weights/hippocampus-masks --count 100 \
        --output out/pairs
    accelerate launch generate.py ...  # divides masks, rows or volumes over the processes (on a CPU: torchrun)

Writes <name>_<k:03d>.nii.gz on the mask's grid, a JSON sidecar that records how it was generated, and at the end
manifest.csv. A model of several channels writes <name>_<k:03d>_<channel>.nii.gz for each channel that it generates, and
one sidecar. The name is the mask's stem; where masks have one stem, as of 'DIR/*/tumour.nii.gz', it is what differs in
their paths (p01, p02).

The columns of a table are: mask (a path, relative to the table's folder; without masks and images, give --shape), the
model's classes and numbers (an empty cell leaves one out), its condition channels (paths too; the other channels are
generated to match), and name, where the mask's stem should not be the name. Other columns are listed and not read.

Steps and guidance are those of the pipeline's sampling.json, unless --steps and --guidance_scale say otherwise. Each
volume's seed is computed from --seed, its name and k, so batch size, order, processes and interruptions change nothing.
The same command resumes where it stopped.

With `--masks generate:PIPELINE` that pipeline generates --count label maps first, into OUTPUT/masks; each gets one
volume. Without masks and conditions volumes are called volume_000, label maps map_000. Their grid is --shape, or has
the size of a training map. A broken label map (a label missing, in pieces, or cut off at the edge, as in no training
map) is generated again from the next seed; its sidecar records that.

With --reject_copies (a file of `python -m evaluation.copies.fingerprints`) a volume that is too similar to a training
volume is not written, but generated again from the next seed; sidecars and manifest record that.
"""

import argparse
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command
from cli.settings import NonNegativeFloat, NonNegativeInt, Number, PositiveInt, show_ranges

if TYPE_CHECKING:
    from pipelines.base import VolumePipeline
    from pipelines.batch_generation import BatchConfig
    from pipelines.rejection import Check

GENERATE = "generate:"
PRECISIONS = ("no", "bf16", "fp16")


def make_parser() -> ArgumentParser:
    """Describe the options."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub repository")
    parser.add_argument("--lora", help="LoRA for the pipeline, a file or folder of train_ldm.py")
    source = parser.add_mutually_exclusive_group()
    masks_help = f"label maps, or {GENERATE}PIPELINE to generate them first"
    source.add_argument("--masks", nargs="+", default=[], metavar="DIR_OR_GLOB", help=masks_help)
    source.add_argument(
        "--conditions", metavar="TABLE", help="CSV (or JSON), or its URL: one row per volume, see above"
    )
    shape_help = "voxels, where no mask or image sets them"
    parser.add_argument("--shape", nargs=3, type=Number(PositiveInt), metavar=("X", "Y", "Z"), help=shape_help)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--count", type=Number(PositiveInt), default=1, help="volumes per mask or row, or in all (1)")
    parser.add_argument("--steps", type=Number(PositiveInt), help="denoising steps (the pipeline's, or 20)")
    guidance_help = (
        "how closely conditions are followed, for models trained for it; 0 to 1 is no guidance (the pipeline's, or 1)"
    )
    parser.add_argument("--guidance_scale", type=Number(NonNegativeFloat), help=guidance_help)
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="(0)")
    parser.add_argument("--batch_size", type=Number(PositiveInt), default=8, help="volumes denoised together (8)")
    label_help = "read a label value, or a segment of this name, as a label of the model: 3=1 4=tumor GTV=tumor"
    parser.add_argument("--label_map", nargs="+", type=label_pair, default=[], metavar="VALUE=LABEL", help=label_help)
    copies_help = (
        "generate copies of training volumes again, by this file of `python -m evaluation.copies.fingerprints`"
    )
    parser.add_argument("--reject_copies", type=Path, metavar="FINGERPRINTS", help=copies_help)
    parser.add_argument(
        "--max_attempts", type=Number(PositiveInt), default=10, help="attempts at a volume that checks refuse (10)"
    )
    wait_help = "how long to wait for another process that writes to --output; 0 refuses at once (0)"
    parser.add_argument("--wait_minutes", type=Number(NonNegativeFloat), default=0.0, help=wait_help)
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="no is float32 (no)")
    show_ranges(parser)
    return parser


def parse(args: Sequence[str] | None) -> "BatchConfig":
    """Parse the command line. Exits with a message if it cannot be used."""
    parser = make_parser()
    options = parser.parse_args(args)
    masks: list[str] = options.masks
    generated = any(pattern.startswith(GENERATE) for pattern in masks)
    if generated and len(masks) > 1:
        parser.error(f"--masks {' '.join(masks)}: {GENERATE}PIPELINE stands alone")

    from pipelines.batch_generation import BatchConfig  # after the arguments: these imports take seconds
    from pipelines.sampling import SamplingConfig

    return BatchConfig(
        pipeline=options.pipeline,
        output=options.output,
        masks=[] if generated else masks,
        mask_pipeline=masks[0].removeprefix(GENERATE) if generated else None,
        conditions=options.conditions,
        shape=options.shape,
        count=options.count,
        sampling=SamplingConfig(options.steps, guidance_scale=options.guidance_scale, batch_size=options.batch_size),
        seed=options.seed,
        label_map=dict(options.label_map),
        lora=options.lora,
        copy_check=None if options.reject_copies is None else partial(copy_check, options.reject_copies),
        max_attempts=options.max_attempts,
        wait_minutes=options.wait_minutes,
        precision=options.precision,
    )


def label_pair(text: str) -> tuple[int | str, int | str]:
    """Parse VALUE=LABEL, each by value or by name."""
    value, _, label = text.rpartition("=")
    if not label or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not VALUE=LABEL, e.g. 3=1")
    pair = [int(one) if one.lstrip("-").isdigit() else one for one in (value, label)]
    return pair[0], pair[1]


def copy_check(fingerprints: Path, pipe: "VolumePipeline") -> "Check":
    """Return the check of --reject_copies, for this pipeline."""
    from evaluation.copies import fingerprints as copies  # here, for it imports what only evaluation needs

    return copies.copy_check(fingerprints, pipe.data, pipe.training_subjects)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from cli.stopping import stoppable
from pipelines.batch_generation import generate_to_disk
from training import join_processes, report_peer_failure

MAX_RUN_TIME = timedelta(days=30)  # processes wait this long for each other at the end


def main(args: Sequence[str] | None = None) -> None:
    """Generate the volumes that are not there yet."""
    config = parse(args)
    state = join_processes(MAX_RUN_TIME)
    again = "run the same command again: it resumes"
    with report_peer_failure(state, again), stoppable(again):
        missing = generate_to_disk(config, state)
    state.destroy_process_group()
    if missing:
        raise ValueError("not written (all others are finished):\n" + "\n".join(missing))

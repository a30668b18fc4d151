r"""Generate volumes from masks, from a data set, from a table, or from nothing, in one process or many:

    python generate.py --pipeline weights/hippocampus --masks 'masks/*.nii.gz' --output out/generated --count 2
    python generate.py --config configs/mine/ldm.yaml --split test --output out/generated  # the cases of a data set
    python generate.py --pipeline DIR --conditions table.csv --output out/generated  # classes, numbers, images
    python generate.py --pipeline DIR --output out/generated --count 100             # a model without conditions
    python generate.py --pipeline weights/hippocampus --masks generate:weights/hippocampus-masks --count 100 \
        --output out/pairs --export nnunet nnUNet_raw/Dataset501_Synthetic
    accelerate launch generate.py ...  # divides masks, rows or volumes over the processes (on a CPU: torchrun)

Writes <name>_<k:03d>.nii.gz on the mask's grid, a JSON sidecar that records how it was generated, and at the end
manifest.csv and preview.png, the first volumes side by side. A model of several channels writes
<name>_<k:03d>_<channel>.nii.gz for each channel that it generates, and one sidecar. The name is the mask's stem; where
masks have one stem, as of 'DIR/*/tumour.nii.gz', it is what differs in their paths (p01, p02).

--split takes the masks, classes, numbers and condition channels of the cases of one or more splits, under their names,
and applies the data's label_map. The pipeline is then that of the config's training, unless --pipeline names another;
labels that it calls by other names are refused, unless --label_map translates them. Masks of DICOM-SEG and RTSTRUCT are
read with the image of their case, as in training. Where training resampled a case (data.resample_to), its mask is
written to OUTPUT/masks as training read it: on the image's grid, in the box that all its volumes show. The volume has
that grid. Where training cut its cases to a box (data.crop), the case's image sets it, and the whole grid is written.

The columns of a table are: mask (a path, relative to the table's folder; without masks and images, give --shape), the
model's classes and numbers (an empty cell leaves one out), its condition channels (paths too; the other channels are
generated to match), and name, where the mask's stem should not be the name. Other columns are listed and not read.
--classes gives a class to all volumes whose row, or case, has none: with --masks, to all.

Steps and guidance are those of the pipeline's sampling.json, unless --steps, --guidance_scale, --guidance_interval,
--autoguidance_scale, --guidance_without and --without_scale say otherwise. Each volume's seed is computed from --seed,
its name and k, so batch size, order, processes and interruptions change nothing.
The same command resumes where it stopped.

With `--masks generate:PIPELINE` that pipeline generates --count label maps first, into OUTPUT/masks; each gets one
volume. Without masks and conditions volumes are called volume_000, label maps map_000. Their grid is --shape, or has
the size of a training map. A broken label map (a label missing, in pieces, or cut off at the edge, as in no training
map) is generated again from the next seed; its sidecar records that.

With --reject_copies (a file of `python -m evaluation.copies.fingerprints`) a volume that is too similar to a training
volume is not written, but generated again from the next seed; sidecars and manifest record that.

--export writes the finished volumes as a data set too, marked as synthetic: `nnunet DIR` pairs of volume and mask for
nnU-Net (DIR is called Dataset501_Name), `bids DIR` in BIDS' layout. Files are hard links where the disk has them, else
copies. With a run that is finished nothing is generated again. docs/export.md has the layouts.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, next_step, run_command
from cli.generation import Pairs, add_run_arguments, class_pair
from cli.settings import Number, PositiveFloat, PositiveInt, show_ranges
from files.shipped import expand_path

if TYPE_CHECKING:
    from pipelines.base import VolumePipeline
    from pipelines.batch_generation import BatchConfig
    from pipelines.rejection import Check
    from volumes.data.config import DataConfig

GENERATE = "generate:"
SPLITS = ("train", "validation", "test")
PIPELINE = "pipeline"  # of a run of train_ldm.py


def make_parser() -> ArgumentParser:
    """Describe the options."""
    parser = ArgumentParser(description=__doc__)
    pipeline_help = "pipeline folder, shipped:NAME or Hub repository (with --config: the pipeline of that training)"
    parser.add_argument("--pipeline", help=pipeline_help)
    config_help = "training config of the pipeline, whose section `data` names the cases of --split"
    parser.add_argument("--config", type=Path, metavar="FILE", help=config_help)
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="folder of the data, if not the config's")
    source = parser.add_mutually_exclusive_group()
    masks_help = f"label maps, or {GENERATE}PIPELINE to generate them first"
    source.add_argument("--masks", nargs="+", default=[], metavar="DIR_OR_GLOB", help=masks_help)
    source.add_argument(
        "--conditions", metavar="TABLE", help="CSV (or JSON), or its URL: one row per volume, see above"
    )
    split_help = "masks and conditions of the cases of these splits; `evaluate.py dice` learns from all but test"
    source.add_argument("--split", nargs="+", choices=SPLITS, help=split_help)
    classes_help = "class values of all volumes whose row or case has none, such as modality=ct"
    parser.add_argument(
        "--classes", nargs="+", action=Pairs, type=class_pair, default=[], metavar="NAME=VALUE", help=classes_help
    )
    shape_help = "voxels, where no mask or image sets them"
    parser.add_argument("--shape", nargs=3, type=Number(PositiveInt), metavar=("X", "Y", "Z"), help=shape_help)
    spacing_help = "of --shape, in mm (the model's)"
    spacing = Number(PositiveFloat)
    parser.add_argument("--spacing", nargs=3, type=spacing, metavar=("X", "Y", "Z"), help=spacing_help)
    add_run_arguments(parser, "mask, row or case, or in all")
    copies_help = (
        "generate copies of training volumes again, by this file of `python -m evaluation.copies.fingerprints`"
    )
    parser.add_argument("--reject_copies", type=Path, metavar="FINGERPRINTS", help=copies_help)
    parser.add_argument(
        "--max_attempts", type=Number(PositiveInt), default=10, help="attempts at a volume that checks refuse (10)"
    )
    export_help = "export the finished volumes and their masks as a data set: nnunet or bids, and its folder"
    parser.add_argument("--export", nargs=2, action="append", default=[], metavar=("FORMAT", "DIR"), help=export_help)
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

    if options.split is not None and options.config is None:
        parser.error(f"--split {' '.join(options.split)}: is of a data set; name it with --config FILE")
    if options.root is not None and options.split is None:
        parser.error("--data.root: is for --split; leave it out")

    from pipelines.batch_generation import BatchConfig  # after the arguments: these imports take seconds
    from pipelines.sampling import sampling_of

    return BatchConfig(
        pipeline=expand_path(options.pipeline) if options.pipeline else default_pipeline(parser, options.config),
        output=options.output,
        masks=[] if generated else masks,
        mask_pipeline=expand_path(masks[0].removeprefix(GENERATE)) if generated else None,
        conditions=options.conditions,
        data=None if options.split is None else data_section(options.config, options.root),
        splits=options.split or [],
        classes=dict(options.classes),
        shape=options.shape,
        spacing=options.spacing,
        count=options.count,
        sampling=sampling_of(options),
        unet_weak=options.unet_weak,
        seed=options.seed,
        label_map=dict(options.label_map),
        lora=options.lora,
        copy_check=None if options.reject_copies is None else partial(copy_check, options.reject_copies),
        max_attempts=options.max_attempts,
        wait_minutes=options.wait_minutes,
        precision=options.precision,
        exports=[(kind, Path(folder)) for kind, folder in options.export],
    )


def default_pipeline(parser: ArgumentParser, config: Path | None) -> Path:
    """The pipeline of a config's training: the folder `pipeline` of its output. Exits with a message if there is
    none."""
    if config is None:
        parser.error("the following arguments are required: --pipeline")
    from evaluation.report import read_config

    output = read_config(config).get("output")
    folder = Path(str(output)) / PIPELINE
    if output is None or not folder.is_dir():
        where = "it sets no output" if output is None else f"there is no {folder}"
        parser.error(
            f"--config {config}: {where}; run train_ldm.py --config {config} first, or name a pipeline with --pipeline"
        )
    return folder


def data_section(config: Path, root: str | None) -> "DataConfig":
    """The section `data` of a training config; its files are in `root`, if given. Raises: ValueError as
    `evaluation.report.read_config`."""
    from jsonargparse import Namespace

    from cli.parsing import built
    from evaluation.report import read_config
    from volumes.data.config import DataConfig

    section = read_config(config)["data"] | ({} if root is None else {"root": root})
    return built(Namespace(data=Namespace(section)), {"data": DataConfig}).data


def report_arguments(args: Sequence[str] | None, config: "BatchConfig") -> list[str | Path]:
    """Arguments of evaluate.py for a finished run. The config is that of the command line, or of the pipeline's run;
    CONFIG is for the user to fill in. Volumes of held-out masks are for realism; privacy and utility need those of the
    training set."""
    options = make_parser().parse_args(args)
    of_run = Path(config.pipeline).parent / "config.yaml"
    words: list[str | Path] = ["all", "--config", options.config or (of_run if of_run.is_file() else "CONFIG")]
    if options.root is not None:
        words += ["--data.root", options.root]
    folder = config.output.absolute()
    words += ["--synthetic", folder]
    if options.split is not None and "train" not in options.split:
        words += ["--parts", "realism"]
    return [*words, "--output", folder.with_name(f"{folder.name}-report")]


def copy_check(fingerprints: Path, pipe: "VolumePipeline") -> "Check":
    """Return the check of --reject_copies, for this pipeline."""
    from evaluation.copies import fingerprints as copies  # here, for it imports what only evaluation needs

    return copies.copy_check(fingerprints, pipe.data, pipe.training_subjects)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from pipelines.batch_generation import generate_to_disk, generate_with_masks
from training import run_together


def main(args: Sequence[str] | None = None) -> None:
    """Generate the volumes that are not there yet."""
    config = parse(args)
    generate = generate_to_disk if config.mask_pipeline is None else generate_with_masks
    run_together(lambda state: generate(config, state))
    next_step("evaluate.py", *report_arguments(args, config))

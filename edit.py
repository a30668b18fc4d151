r"""Edit volumes: generate a part of an image again, or all of it to a degree, in one process or many.

    python edit.py --pipeline weights/hippocampus --image scan.nii.gz --mask labels.nii.gz --region part.nii.gz \
        --output out/edited --count 3                                      # inpainting: what is not 0 in the region
    python edit.py --pipeline DIR --image scan.nii.gz --mask labels.nii.gz --strength 0.4 --output out/edited
    python edit.py --pipeline DIR --image ct=ct.nii.gz pet=pet.nii.gz --keep_channels ct --strength 1 --output out/pet
    python edit.py --pipeline DIR --image scan.nii.gz --mask labels.nii.gz --insert tumor@40,52,18 --diameter 12 \
        --within liver --output out/with                                   # a lesion, and what it does to the image
    python edit.py --pipeline DIR --image scan.nii.gz --mask labels.nii.gz --remove tumor --replacement liver \
        --output out/without
    python edit.py --pipeline DIR --edits table.csv --output out/edited    # many

Writes <name>_<k:03d>.nii.gz on the image's grid, in its units, with a JSON sidecar, and at the end manifest.csv and
preview.png, as generate.py does: the same command resumes, and no volume depends on the batch, the order or the
processes. Voxels outside a region stay as they are, bit for bit. docs/editing.md explains strength, region and margin.

The columns of a table are: image, or for several channels their names (paths, relative to the table's folder), mask,
region, strength, the model's classes and numbers, and name. Without a name, volumes are called as their image, or by
what differs in the paths of the images.

--insert and --remove change the mask, and generate the region around what changed, 6 mm more on each side. The new mask
and the region are written to OUTPUT/masks and OUTPUT/regions. Positions are voxels of the mask in RAS+ order (x to the
patient's right, y to the front, z up), counted from 0; labels are the model's, by value or name.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command
from cli.generation import add_run_arguments
from cli.settings import NonNegativeFloat, Number, PositiveFloat, show_ranges
from files.shipped import expand_path

if TYPE_CHECKING:
    from pipelines.batch_edits import EditConfig
    from pipelines.inputs.edit_files import Lesion

MARGIN = 4.0  # mm, `pipelines.inputs.inpainting.BLEND_MARGIN_MM`, which takes seconds to import


def make_parser() -> ArgumentParser:
    """Describe the options."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub repository")
    source = parser.add_mutually_exclusive_group(required=True)
    image_help = "the image that is edited; for a model of several channels one per channel"
    source.add_argument("--image", nargs="+", default=[], metavar="[CHANNEL=]FILE", help=image_help)
    source.add_argument("--edits", metavar="TABLE", help="CSV (or JSON), or its URL: one row per edit, see above")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="label map of what the edited image shows")
    parser.add_argument("--region", type=Path, metavar="FILE", help="label map, not 0 where voxels are generated")
    parser.add_argument("--name", help="name of the volumes (the image's stem)")
    strength_help = "in (0, 1], how much of the image is changed; 1 with a region"
    parser.add_argument("--strength", type=Number(PositiveFloat), help=strength_help)
    margin_help = f"mm inside the region's border that are blended with its surroundings ({MARGIN:g})"
    parser.add_argument("--blend_margin", type=Number(NonNegativeFloat), default=MARGIN, help=margin_help)
    keep_help = "channels that stay as they are, and condition the others"
    parser.add_argument("--keep_channels", nargs="+", default=[], metavar="CHANNEL", help=keep_help)
    lesion = parser.add_mutually_exclusive_group()
    lesion.add_argument("--insert", type=label_place, metavar="LABEL@X,Y,Z", help="a lesion of this label, there")
    remove_help = "the lesion of this label at that voxel; LABEL alone: all of them"
    lesion.add_argument("--remove", type=label_place, metavar="LABEL[@X,Y,Z]", help=remove_help)
    diameter_help = "of a lesion that is inserted: a ball's, or one per axis"
    parser.add_argument("--diameter", nargs="+", type=Number(PositiveFloat), metavar="MM", help=diameter_help)
    within_help = "labels that an inserted lesion may replace, such as the organ's (all)"
    parser.add_argument("--within", nargs="+", default=[], metavar="LABEL", help=within_help)
    parser.add_argument("--replacement", metavar="LABEL", help="label that replaces a lesion that is removed")
    add_run_arguments(parser, "edit")
    show_ranges(parser)
    return parser


def parse(args: Sequence[str] | None) -> "EditConfig":
    """Parse the command line. Exits with a message if it cannot be used."""
    parser = make_parser()
    options = parser.parse_args(args)
    if options.edits is not None and (given := [name for name in ("mask", "region", "name") if vars(options)[name]]):
        parser.error(f"--{given[0]}: is a column of the table of --edits; leave it out")
    lesion = lesion_of(parser, options)

    from pipelines.batch_edits import EditConfig  # after the arguments: these imports take seconds
    from pipelines.sampling import sampling_of

    return EditConfig(
        pipeline=expand_path(options.pipeline),
        output=options.output,
        images=options.image,
        mask=options.mask,
        region=options.region,
        name=options.name,
        edits=options.edits,
        strength=options.strength,
        blend_margin=options.blend_margin,
        keep_channels=options.keep_channels,
        lesion=lesion,
        count=options.count,
        sampling=sampling_of(options),
        unet_weak=options.unet_weak,
        seed=options.seed,
        label_map=dict(options.label_map),
        lora=options.lora,
        wait_minutes=options.wait_minutes,
        precision=options.precision,
    )


def label_place(text: str) -> tuple[str, tuple[int, int, int] | None]:
    """LABEL or LABEL@X,Y,Z, the label by value or by name."""
    found = re.fullmatch(r"(.+?)(?:@(\d+),(\d+),(\d+))?", text)
    if found is None or (found[2] is None and "@" in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL@X,Y,Z, such as tumor@40,52,18 (voxels)")
    return found[1], None if found[2] is None else (int(found[2]), int(found[3]), int(found[4]))


def lesion_of(parser: ArgumentParser, options: argparse.Namespace) -> "Lesion | None":
    """The lesion of the command line, if there is one. Exits with a message for options that do not fit each other."""
    insert, remove, diameters = options.insert, options.remove, options.diameter or []
    if insert is None and (diameters or options.within):
        parser.error("--diameter and --within: are for --insert LABEL@X,Y,Z")
    if remove is None and options.replacement is not None:
        parser.error("--replacement: is for --remove LABEL")
    if insert is None and remove is None:
        return None
    if options.region is not None:
        parser.error("--region: is computed for --insert and --remove; leave it out")
    if options.edits is None and options.mask is None:
        parser.error("--insert and --remove change a mask; give --mask FILE")
    if insert is not None and (insert[1] is None or len(diameters) not in (1, 3)):
        parser.error("--insert LABEL@X,Y,Z: needs a place, and --diameter MM: one number, or three")
    if remove is not None and options.replacement is None:
        parser.error("--remove LABEL: needs the label in its place, --replacement LABEL, such as the organ's")

    from pipelines.inputs.edit_files import Lesion

    chosen = insert if remove is None else remove
    assert chosen is not None
    label, position = chosen
    return Lesion(label, position, tuple(diameters), options.within, options.replacement)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from pipelines.batch_edits import edit_to_disk
from training import run_together


def main(args: Sequence[str] | None = None) -> None:
    """Generate the edited volumes that are not there yet."""
    config = parse(args)
    run_together(lambda state: edit_to_disk(config, state))

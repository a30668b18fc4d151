"""Look a folder of scans over and write a recipe for it: data.yaml, vae.yaml and ldm.yaml, with comments.

    medvolume init scans
    medvolume init scans --quick --output recipe --mask tumour --channels ct,pet --classes sex --numbers age

Recognized are flat folders, a folder per patient, nnU-Net, the Medical Segmentation Decathlon, BIDS, DICOM trees,
TotalSegmentator's folders, and tables that name files (docs/init.md). Prints what was found, what is unsure, and the
next commands. Where files may be read in several ways, it stops and says which option decides.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, console_program, run_command
from cli.settings import NonNegativeInt, Number


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the scans")
    parser.add_argument(
        "--output", type=Path, default=Path("recipe"), metavar="DIR", help="folder of the recipe (recipe)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: a first picture in minutes")
    parser.add_argument("--channels", type=names, default=[], metavar="A,B", help="files that are the image's channels")
    parser.add_argument("--mask", metavar="NAME", help="file that is the mask, or none")
    structures_help = "of TotalSegmentator's files, or of the segments of DICOM masks, these"
    parser.add_argument("--structures", type=names, default=[], metavar="A,B", help=structures_help)
    grid_help = "channel onto whose grid the others are resampled, if volumes lie on several grids"
    parser.add_argument("--resample_to", metavar="CHANNEL", help=grid_help)
    parser.add_argument(
        "--label_names", nargs="+", type=label_name, default=[], metavar="VALUE=NAME", help="such as 1=tumor"
    )
    parser.add_argument("--table", metavar="FILE", help="CSV or TSV that names files, or describes the cases")
    parser.add_argument("--subject", metavar="COLUMN", help="column that says whose volume it is; splits go by it")
    parser.add_argument("--group_by", metavar="REGEX", help="finds the subject in a case's name")
    parser.add_argument("--classes", type=names, default=[], metavar="A,B", help="columns of classes as conditions")
    parser.add_argument("--numbers", type=names, default=[], metavar="A,B", help="columns of numbers as conditions")
    parser.add_argument("--time_point", type=Number(NonNegativeInt), help="of 4-D files, the volume that is the image")
    parser.add_argument("--spacing", nargs="+", default=[], metavar="MM", help="X Y Z in mm to resample to, or keep")
    start_help = "none, or shipped weights to start from, such as hippocampus; hippocampus:lora trains a LoRA of them"
    parser.add_argument("--from", dest="start", metavar="WEIGHTS", help=start_help)
    parser.add_argument("--no_mirror", action="store_true", help="never mirror volumes from left to right in training")
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe in --output; its runs stay")
    options = parser.parse_args(args)
    if options.spacing and options.spacing != ["keep"]:
        try:
            options.spacing = [float(word) for word in options.spacing]
        except ValueError:
            options.spacing = []
        if len(options.spacing) != 3 or min(options.spacing) <= 0:
            parser.error("--spacing takes three lengths in mm, such as 1 1 1.5, or the word keep")
    if options.subject and options.group_by:
        parser.error("--subject and --group_by say the same thing twice; remove one")
    return options


def names(text: str) -> list[str]:
    """Parse names with commas between them."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds no name; give some with commas between them, or omit it")
    return found


def label_name(text: str) -> tuple[int, str]:
    """Parse VALUE=NAME."""
    value, _, name = text.partition("=")
    if not value.strip().lstrip("-").isdecimal() or not name.strip():
        raise argparse.ArgumentTypeError(f"{text} is not VALUE=NAME, such as 1=tumor")
    return int(value), name.strip()


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from .choice import Ambiguous
from .recipe import make_recipe
from .survey import Options


def main(args: Sequence[str] | None = None) -> int:
    """Write a recipe as the command line says. Returns 2 if the files may be read in several ways, else 0."""
    options = parse(args)
    words = sys.argv[1:] if args is None else list(args)
    program = console_program() or "python -m recipes"
    own = {**vars(options), "label_names": dict(options.label_names), "mirror": not options.no_mirror}
    del own["no_mirror"], own["overwrite"]
    try:
        make_recipe(Options(**own), f"{program} {shlex.join(words)}", overwrite=options.overwrite)
    except Ambiguous as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0

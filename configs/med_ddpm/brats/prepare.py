"""BraTS 2021 as Med-DDPM learns it: four modalities and a mask with the brain in it, 192 x 192 x 144.

    python configs/med_ddpm/brats/prepare.py --source BraTS2021_Training_Data --output data/brats2021_med_ddpm

Reads {subject}/{subject}_{t1,t1ce,t2,flair,seg}.nii.gz and writes t1/{subject}_t1.nii.gz and so on, in their own units
(the training scales them), and seg/: labels 1 and 2 as they are, enhancing tumor (4) as 3, and 4 where there is brain
(a voxel that is not zero in all modalities) and no tumor. Med-DDPM's own script looks for the brain where the *scaled*
T1 exceeds 0, which leaves out its dark half. The box is the middle one; where it would cut tumor, the volume is named
and left out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder of BraTS 2021's training subjects")
    parser.add_argument("--output", type=Path, default=Path("data/brats2021_med_ddpm"), help="folder to write to")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
from tqdm import tqdm

from volumes import PADDING, Volume, pad_or_crop, read_mask, read_volume, write_volume

MODALITIES = ("t1", "t1ce", "t2", "flair")
BOX = (192, 192, 144)
ENHANCING, BRAIN = 3, 4


def prepare(source: Path, output: Path, box: tuple[int, int, int] = BOX) -> tuple[int, list[str]]:
    """Write what fits into the box; returns how many subjects those are, and those that do not fit.

    Raises: ValueError if there is no subject in `source`, and if its files are not on one grid.
    """
    folders = sorted(path.parent for path in source.glob("*/*_seg.nii.gz"))
    if not folders:
        raise ValueError(f"{source}: no SUBJECT/SUBJECT_seg.nii.gz there")
    left_out = []
    for folder in tqdm(folders, unit="subject"):
        name = folder.name
        images = {m: read_volume(folder / f"{name}_{m}.nii.gz") for m in MODALITIES}
        seg = read_mask(folder / f"{name}_seg.nii.gz")
        if any(image.shape != seg.shape for image in images.values()):
            raise ValueError(f"{folder}: its modalities and its mask are not on one grid")
        labels = np.where(seg.array == 4, ENHANCING, seg.array).astype(np.int16)
        brain = np.any([image.array != 0 for image in images.values()], axis=0)
        labels[(labels == 0) & brain] = BRAIN
        placement = pad_or_crop(seg.shape, box)
        boxed = np.maximum(placement.apply(labels, PADDING), 0)
        if (boxed % BRAIN > 0).sum() < (labels % BRAIN > 0).sum():
            left_out.append(name)
            continue
        affine = placement.shift(seg.affine)
        write_volume(Volume(boxed, affine), output / f"seg/{name}_seg.nii.gz")
        for modality, image in images.items():
            write_volume(
                Volume(placement.apply(image.array, 0), affine), output / f"{modality}/{name}_{modality}.nii.gz"
            )
    return len(folders) - len(left_out), left_out


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    count, left_out = prepare(options.source, options.output)
    print(f"{count} subjects in {options.output}; tumor outside of the box: {', '.join(left_out) or 'none'}")

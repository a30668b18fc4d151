r"""Check volumes for copies of training volumes while generating, without the training scans:

    python -m evaluation.copies.fingerprints --config configs/hippocampus/ldm.yaml --flips 0 \
        --output out/fingerprints.safetensors
    python generate.py ... --reject_copies out/fingerprints.safetensors

A `CopyCheck` holds a fingerprint of each training volume: the means of blocks of `block` voxels in a crop about the
center.

What fingerprints reveal: each is a blurred scan. Coarse anatomy is visible (with blocks of 4 voxels, 1/64 of the
numbers). Anyone with a patient's scan, name or number can tell whether it was in the training set (the check does just
that), and two fingerprints of one patient can be matched. Only fine texture and everything outside the crop are absent.
So they are personal data wherever the scans are: publish them only with public scans. With blocks of 1 voxel they are
the scans, and are not written to files.

What they cannot distinguish: volumes that agree in all but fine detail. Set the threshold by `calibrated`, on unseen
real volumes, as the command does. A fraction `--alpha` of volumes that are not copies is refused then, too, and
generated again.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import (
    Axis,
    InnerShare,
    NonNegativeInt,
    Number,
    PositiveInt,
    TwoOrMore,
)
from evaluation.report import add_overlap_argument, check_report, config_parser


def parse(args: Sequence[str] | None) -> Namespace:
    """Parse the command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.copies.fingerprints", __doc__, args)
    parser.add_argument("--output", type=str, required=True, help="fingerprints to write, a .safetensors file")
    parser.add_argument(
        "--block", type=Number(TwoOrMore), default=4, help="side of the averaged blocks in voxels, 2 or more"
    )
    parser.add_argument(
        "--crop",
        type=Number(PositiveInt),
        nargs=3,
        help=(
            "voxels about the center to compare, multiples of the block; default: the part that all training volumes "
            "have"
        ),
    )
    parser.add_argument(
        "--shift",
        type=Number(NonNegativeInt),
        default=2,
        help="voxels: a copy may be moved by up to that along each axis",
    )
    parser.add_argument(
        "--flips", type=Number(Axis), nargs="*", default=[], help="axes, 0 to 2, along which a copy may be mirrored"
    )
    parser.add_argument(
        "--alpha", type=Number(InnerShare), default=0.05, help="fraction of unseen real subjects that may be refused"
    )
    add_overlap_argument(parser)
    parsed = parser.instantiate(parser.parse_args(None if args is None else list(args)))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from autoencoder.weights import open_safetensors
from cli.live_bar import LiveBar
from evaluation.data.large_arrays import large_zeros
from evaluation.data.model_units import in_model_units
from evaluation.data.volume_sets import UnitVolumes
from evaluation.metrics.nearest import (
    Sides,
    Space,
    Volumes,
    common_crop,
    crop_of,
    standardized,
)
from evaluation.stats.bootstrap import Units
from evaluation.stats.conformal import conformal_threshold
from evaluation.stats.intervals import wilson
from evaluation.studies.limits import check_command
from files.atomic import atomic_file
from files.documents import parse_json
from pipelines import Check
from volumes import VolumeDataset, load_cases, pad_or_crop
from volumes.data.subjects import (
    check_marks,
    is_complete,
    seen,
    unknown_volumes,
)
from volumes.description import DataDescription

from .print_files import write_blocks

logger = logging.getLogger(__name__)
FORMAT = "medvolume copy check 1"
HELD_BYTES = 1 << 26  # of fingerprints and products at a time
SPLITS = {"training": ("train",), "unseen": ("validation", "test")}


class CopyFound(NamedTuple):
    """Whether a volume is a copy, its correlation with the nearest fingerprint, and that fingerprint's number."""

    copy: bool
    similarity: float
    index: int


@dataclass(frozen=True)
class CopyCheck:
    """Standardized fingerprints (R, C, h, w, d) of training volumes, and how to compare volumes with them.

    Args:
        fingerprints: of any number of volumes: they may be a map of a file, and are read in blocks.
        shift, flips: a volume is moved by up to `shift` voxels along each axis and mirrored along every combination of
            `flips`. So a copy moved by whole voxels is found like one that was not, if it extends `shift` voxels beyond
            the crop; elsewhere its edge is repeated.
        threshold: similarity above which a volume is a copy.
        subjects: marks (`volumes.data.subjects.marks_of`) of the "training" volumes and of the "unseen" ones that set
            the threshold. They tell a model whether the fingerprints are of its own training set.
    """

    fingerprints: Tensor
    crop: Sides
    block: int = 4
    flips: tuple[int, ...] = ()
    shift: int = 2
    threshold: float = 1.0
    subjects: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        volumes: Volumes,
        crop: Sides,
        *,
        block: int = 4,
        flips: tuple[int, ...] = (),
        shift: int = 2,
        on_volume: Callable[[], object] | None = None,
    ) -> "CopyCheck":
        """Make the fingerprints of training volumes (C, X, Y, Z), one at a time; `on_volume` is called after each.

        Raises: ValueError for a crop that is not a multiple of the block, and for different numbers of channels.
        """
        if any(side % block for side in crop):
            raise ValueError(f"crop {crop}: each side must be a multiple of the block, {block} voxels")
        maps = torch.empty(0)
        for number, volume in enumerate(volumes):
            blocks = torch.from_numpy(standardized(_blocks(_with_edges(volume, crop), block).numpy()))
            maps = maps if number else large_zeros((len(volumes), *blocks.shape))
            if len(blocks) != maps.shape[1]:
                raise ValueError(f"volume {number} has {len(blocks)} channels, others {maps.shape[1]}")
            maps[number] = blocks
            if on_volume is not None:
                on_volume()
        return cls(maps, crop, block, flips, shift)

    def calibrated(self, unseen: Volumes, units: Units, alpha: float = 0.05) -> "CopyCheck":
        """Set the threshold that one in 1 / alpha unseen real subjects exceeds (`conformal_threshold`)."""
        scores = np.array([self.check(volume).similarity for volume in unseen])
        return dataclasses.replace(self, threshold=conformal_threshold(scores, units, alpha))

    def check(self, volume: Any) -> CopyFound:
        """Check whether the volume (C, X, Y, Z) is a copy. Raises: ValueError for another number of channels."""
        placed = self._placements(volume)
        if placed.shape[1] != self.fingerprints.shape[1]:
            raise ValueError(
                f"a volume of {placed.shape[1]} channels, against {self.fingerprints.shape[1]} of the fingerprints"
            )
        ours = placed.flatten(2)
        highest, nearest = -math.inf, 0
        for start, block in self._parts(products=len(ours)):
            theirs = block.flatten(2)
            products = torch.einsum("pcn,rcn->pcr", ours, theirs) / ours.shape[2]
            varies = (ours.any(2)[:, :, None] & theirs.any(2).T[None]).float()  # constant channels say nothing
            similarity = (products.sum(1) / varies.sum(1).clamp_min(1)).amax(0).clamp(-1, 1)
            most = int(similarity.argmax())
            if similarity[most] > highest:
                highest, nearest = float(similarity[most]), start + most
        return CopyFound(highest > self.threshold, highest, nearest)

    def _parts(self, products: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Give the fingerprints in blocks of about `HELD_BYTES`, in float32, with the number of the first. With each
        fingerprint `products` numbers are held, three times."""
        channels, *sides = self.fingerprints.shape[1:]
        rows = max(HELD_BYTES // (4 * channels * (math.prod(sides) + 3 * products)), 1)
        for start in range(0, len(self.fingerprints), rows):
            yield start, self.fingerprints[start : start + rows].float()

    def _placements(self, volume: Any) -> Tensor:
        """Compute standardized blocks (P, C, h, w, d) of the volume in every placement."""
        x, y, z = (side + 2 * self.shift for side in self.crop)
        within = _with_edges(volume, (x, y, z))
        pieces = []
        for axes in Space(self.crop, self.flips).flip_sets:
            means = F.avg_pool3d(within.flip([axis + 1 for axis in axes])[None], self.block, stride=1)[0]
            for place in itertools.product(range(2 * self.shift + 1), repeat=3):
                window = [
                    slice(low, low + side - self.block + 1, self.block)
                    for low, side in zip(place, self.crop, strict=True)
                ]
                pieces.append(means[:, window[0], window[1], window[2]])
        return torch.from_numpy(standardized(torch.stack(pieces).flatten(0, 1).numpy())).unflatten(0, (len(pieces), -1))

    def save(self, path: str | Path) -> None:
        """Write the fingerprints in half precision, as safetensors. The module's docstring says what they reveal.

        Raises: ValueError for blocks of one voxel, which would be the scans themselves.
        """
        if self.block < 2:
            raise ValueError("fingerprints of single voxels are the scans themselves; take a larger block")
        entries = {name: getattr(self, name) for name in ("crop", "block", "flips", "shift", "threshold")}
        entries["subjects"] = {
            split: [{kind: sorted(values) for kind, values in of_volume.items()} for of_volume in marks]
            for split, marks in self.subjects.items()
        }
        with atomic_file(Path(path)) as unfinished:
            blocks = (block for _, block in self._parts())
            metadata = {"format": FORMAT, "settings": json.dumps(entries)}
            write_blocks(unfinished, "fingerprints", blocks, self.fingerprints.shape, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "CopyCheck":
        """Read a file of `save`. Raises: ValueError for another file, and a damaged one."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; create it with python -m evaluation.copies.fingerprints")
        try:
            with open_safetensors(Path(path)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: holds no fingerprints of training volumes ({FORMAT!r}); create it with "
                        "python -m evaluation.copies.fingerprints"
                    )
                settings = parse_json(metadata["settings"])
                fingerprints = file.get_tensor("fingerprints")  # a map of the file: `_parts` reads it
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is not a safetensors file ({error})") from error
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: is damaged, create it again ({error})") from error
        try:
            settings |= {"crop": tuple(settings["crop"]), "flips": tuple(settings["flips"])}
            check = cls(fingerprints, **settings)
            check._check_settings()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its settings do not fit its fingerprints, create it again ({error})") from error
        return check

    def _check_settings(self) -> None:
        """Raise ValueError or TypeError for settings with which no copy could be found."""
        for part, marks in self.subjects.items():
            if part not in SPLITS:
                raise ValueError(f"subjects {part!r}")
            check_marks(marks)
        x, y, z = self.crop
        whole = [x, y, z, self.block, self.shift, *self.flips]
        if not all(type(n) is int for n in whole) or self.block < 2 or not 0 <= self.shift <= min(x, y, z):
            raise ValueError(f"crop {self.crop}, block {self.block}, shift {self.shift}")
        if not set(self.flips) <= {0, 1, 2} or len(set(self.flips)) < len(self.flips):
            raise ValueError(f"flips {self.flips}")
        if not -1 <= self.threshold <= 1:  # nothing is above NaN
            raise ValueError(f"threshold {self.threshold}")
        expected = (x // self.block, y // self.block, z // self.block)
        shape = tuple(self.fingerprints.shape)
        finite = len(shape) == 5 and min(shape) and all(bool(block.isfinite().all()) for _, block in self._parts())
        if not finite or shape[2:] != expected:
            raise ValueError(f"fingerprints {shape}, or some that are not finite")


def _with_edges(volume: Any, sides: Sides) -> Tensor:
    """Crop (C, *sides) about the center of a volume; repeat its edges where it is smaller."""
    array = np.asarray(volume.detach().cpu() if isinstance(volume, Tensor) else volume)
    array = array[None] if array.ndim == 3 else array
    held = tuple(min(n, side) for n, side in zip(array.shape[1:], sides, strict=True))
    start = pad_or_crop(held, sides).start
    edges = [(-low, target - side + low) for low, side, target in zip(start, held, sides, strict=True)]
    return torch.from_numpy(np.pad(crop_of(array, held), [(0, 0), *edges], mode="edge"))


def _blocks(volume: Tensor, block: int) -> Tensor:
    """Average the blocks of (C, X, Y, Z)."""
    return F.avg_pool3d(volume[None], block)[0]


def check_unseen_subjects(known: CopyCheck, records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check fingerprints against the records of a model's training subjects (`volumes.data.subjects`).

    Logs a warning for training volumes without a fingerprint, and for incomplete records.

    Raises: ValueError if the threshold was set with training volumes of the model: copies of them would pass.
    """
    if not known.subjects or not is_complete(records):
        whose = (
            "have no record of their subjects" if not known.subjects else "are for a model without a complete record"
        )
        logger.warning("%s: these fingerprints %s, so whether they fit the model was not checked", name, whose)
    unseen = known.subjects.get("unseen", [])
    if count := sum(seen(records, marks, ["train"]) is not None for marks in unseen):
        raise ValueError(
            f"{name}: {count} of the {len(unseen)} volumes that set its threshold are among the model's training "
            "volumes, so copies would pass; make the fingerprints with the split of the model's training (data.split, "
            "data.test_fraction, data.split_seed, data.subject as in the config.yaml of its run). If they are other "
            "people who only share names, make them with --accept_overlap"
        )
    if known.subjects and (missing := unknown_volumes(records, known.subjects.get("training", []))):
        logger.warning("%s: %d training volumes of the model have no fingerprint; copies of them pass", name, missing)


def copy_check(path: str | Path, data: DataDescription, records: Sequence[Mapping[str, Any]] = ()) -> Check:
    """Make the check of `generate.py --reject_copies` for a pipeline with this `data`. It records {"fingerprints":
    sha256 of the file, "threshold", "similarity"}.

    Args:
        records: the pipeline's `training_subjects`.
    Raises: ValueError for another file, for another number of channels than the model generates, and as
        `check_unseen_subjects`.
    """
    known = CopyCheck.load(path)
    if (channels := known.fingerprints.shape[1]) != len(data.channels):
        raise ValueError(
            f"{path}: holds fingerprints of {channels} channels, the model generates {len(data.channels)} "
            f"({', '.join(data.channels)}); make them from the model's own training set"
        )

    check_unseen_subjects(known, records, str(path))

    def judge(image: Any, in_box: bool = False) -> tuple[bool, dict[str, float]]:
        result = known.check(in_model_units(image, data, crop=not in_box))
        return result.copy, {"similarity": result.similarity}

    def reason(record: Mapping[str, Any]) -> str:
        return (
            f"is a copy of a training volume (similarity {record['similarity']:.3f}, threshold {known.threshold:.3f})"
        )

    with open(path, "rb") as file:
        settings = {"fingerprints": hashlib.file_digest(file, "sha256").hexdigest(), "threshold": known.threshold}
    return Check("copy_check", judge, reason, settings)


def main(args: Sequence[str] | None = None) -> CopyCheck:
    """Make the fingerprints of the training set, and set the threshold with real volumes outside of it."""
    options = parse(args)
    cases = load_cases(options.data)
    split = {name: [case for case in cases if case.split in part] for name, part in SPLITS.items()}
    check_command("copies", cases, options.data, {"alpha": options.alpha})
    check_report(options.output)
    training, unseen = (VolumeDataset(split[name], options.data) for name in SPLITS)
    subjects, seen = [case.subject for case in unseen.cases], {case.subject for case in training.cases}
    if shared := sorted(seen & set(subjects)):
        raise ValueError(f"subjects {shared[:5]} are unseen and in training: split by subject")
    known, others = UnitVolumes(training), UnitVolumes(unseen)
    crop = tuple(options.crop) if options.crop else default_crop(known.shapes, options.block, options.shift)
    settings = {"block": options.block, "flips": tuple(sorted(set(options.flips))), "shift": options.shift}
    with LiveBar(total=len(known), unit="volume", disable=None, desc="making fingerprints") as progress:
        check = CopyCheck.of(known, crop, **settings, on_volume=progress.update)
    with LiveBar(others, unit="volume", disable=None, desc="comparing unseen volumes") as progress:
        scores = np.array([check.check(volume).similarity for volume in progress])
    others_marks = [{"voxels": marks["voxels"]} for marks in unseen.marks] if options.accept_overlap else unseen.marks
    marks = {"training": training.marks, "unseen": others_marks}
    check = dataclasses.replace(check, threshold=conformal_threshold(scores, subjects, options.alpha), subjects=marks)
    check.save(options.output)
    count = len(set(subjects))
    low, high = wilson(options.alpha, count)
    print(
        f"{len(known)} fingerprints of {len(seen)} subjects, {check.crop} voxels in blocks of {check.block}: "
        f"{options.output}\nthreshold {check.threshold:.4f}, which {options.alpha:g} of unseen subjects exceed "
        f"({low:.3f} to {high:.3f}, from {len(others)} volumes of {count} subjects); their median similarity to the "
        f"nearest is {np.median(scores):.4f}"
    )
    return check


def default_crop(shapes: Sequence[Sequence[int]], block: int, shift: int) -> Sides:
    """Return the crop that all volumes of these shapes contain wherever a copy was moved, in whole blocks.

    Raises: ValueError for less than two blocks.
    """
    sides = common_crop(shapes)
    x, y, z = ((side - 2 * shift) // block * block for side in sides)
    if min(x, y, z) < 2 * block:
        raise ValueError(
            f"the smallest sides of the training volumes are {sides}: too few for two blocks of {block} voxels and "
            f"shifts of {shift}; give a smaller --block or --shift, or a --crop (edges of smaller volumes are repeated)"
        )
    return x, y, z

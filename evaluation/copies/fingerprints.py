"""Is this volume a copy of one that the model learned from? Asked while generating, without the training scans at hand:

python -m evaluation.copies.fingerprints --config configs/hippocampus/ldm.yaml --flips 0 --output out/fingerprints.safetensors
python generate.py ... --reject_copies out/fingerprints.safetensors

A `CopyCheck` holds a fingerprint of each training volume: the means of blocks of `block` voxels in a crop about the center.

What fingerprints reveal: each is a blurred scan. Coarse anatomy can be seen in it (at 4 voxels a block, 1/64 of the numbers), whoever has a
patient's scan, name or number can tell whether it was in the training set (that is what the check does), and two fingerprints of one
patient can be matched. They leave out fine texture and everything outside the crop, and nothing more. So they are personal data wherever
the scans are: publish them only with scans that are public. With blocks of 1 voxel they are the scans, and are not written to files.

What they cannot tell apart: volumes that agree in all but fine detail. Set the threshold by `calibrated`, on unseen real volumes, as the
command does. A fraction `--alpha` of volumes that copy nobody are refused then, too, and are made again.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
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
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.copies.fingerprints", __doc__, args)
    parser.add_argument("--output", type=str, required=True, help="fingerprints to write, a .safetensors file")
    parser.add_argument(
        "--block", type=Number(TwoOrMore), default=4, help="voxels a side of the blocks that are averaged, 2 or more"
    )
    parser.add_argument(
        "--crop",
        type=Number(PositiveInt),
        nargs=3,
        help="voxels about the center that are compared, multiples of the block; default: what all training volumes hold",
    )
    parser.add_argument(
        "--shift", type=Number(NonNegativeInt), default=2, help="voxels by which a copy may be moved along each axis"
    )
    parser.add_argument(
        "--flips", type=Number(Axis), nargs="*", default=[], help="axes, 0 to 2, along which it may be mirrored"
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
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.weights import open_safetensors
from cli.live_bar import LiveBar
from evaluation.data.model_units import in_model_units
from evaluation.metrics.nearest import (
    Sides,
    Space,
    Volumes,
    common_crop,
    crop_of,
    standardized,
)
from evaluation.studies.limits import check_command
from evaluation.studies.privacy import Units, conformal_threshold, wilson
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

logger = logging.getLogger(__name__)
FORMAT = "medvolume copy check 1"
SPLITS = {"training": ("train",), "unseen": ("validation", "test")}


class CopyFound(NamedTuple):
    """Whether a volume is a copy, of the fingerprint with which number, and how alike they are (correlation)."""

    copy: bool
    similarity: float
    index: int


@dataclass(frozen=True)
class CopyCheck:
    """Fingerprints (R, C, h, w, d) of training volumes, standardized; and how volumes are compared with them.

    A volume is moved by up to `shift` voxels along each axis and mirrored along every combination of `flips`, so that a copy moved by
    whole voxels is found as one that was not, if it extends `shift` voxels beyond the crop; elsewhere its edge is repeated.
    `threshold`: similarity above which a volume is a copy.
    `subjects`: what the "training" volumes, and the "unseen" ones that set the threshold, are recognized by
    (`volumes.data.subjects.marks_of` of each), by which a model knows whether they are its own.
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
        cls, volumes: Volumes, crop: Sides, *, block: int = 4, flips: tuple[int, ...] = (), shift: int = 2
    ) -> "CopyCheck":
        """Of training volumes (C, X, Y, Z). Raises: ValueError for a crop that is no multiple of the block."""
        if any(side % block for side in crop):
            raise ValueError(f"crop {crop}: each side must be a multiple of the block, {block} voxels")
        prints = [_blocks(_with_edges(volume, crop), block) for volume in volumes]
        maps = torch.stack([torch.from_numpy(standardized(one.numpy())) for one in prints])
        return cls(maps, crop, block, flips, shift)

    def calibrated(self, unseen: Volumes, units: Units, alpha: float = 0.05) -> "CopyCheck":
        """With the threshold that one in 1 / alpha unseen real subjects exceeds (`conformal_threshold`)."""
        scores = np.array([self.check(volume).similarity for volume in unseen])
        return dataclasses.replace(self, threshold=conformal_threshold(scores, units, alpha))

    def check(self, volume: Any) -> CopyFound:
        """Whether the volume (C, X, Y, Z) is a copy. Raises: ValueError for another number of channels."""
        placed = self._placements(volume)
        if placed.shape[1] != self.fingerprints.shape[1]:
            raise ValueError(
                f"a volume of {placed.shape[1]} channels, against {self.fingerprints.shape[1]} of the fingerprints"
            )
        ours, theirs = placed.flatten(2), self.fingerprints.flatten(2)
        products = torch.einsum("pcn,rcn->pcr", ours, theirs) / ours.shape[2]
        varies = (ours.any(2)[:, :, None] & theirs.any(2).T[None]).float()  # constant channels say nothing
        similarity = (products.sum(1) / varies.sum(1).clamp_min(1)).amax(0).clamp(-1, 1)
        nearest = int(similarity.argmax())
        return CopyFound(bool(similarity[nearest] > self.threshold), float(similarity[nearest]), nearest)

    def _placements(self, volume: Any) -> Tensor:
        """Standardized blocks (P, C, h, w, d) of the volume in every placement."""
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
        """Write the fingerprints in half precision, as safetensors. Read first what they reveal: see this file's head.

        Raises: ValueError for blocks of one voxel, which would be the scans themselves.
        """
        if self.block < 2:
            raise ValueError("fingerprints of single voxels are the scans; take a larger block")
        entries = {name: getattr(self, name) for name in ("crop", "block", "flips", "shift", "threshold")}
        entries["subjects"] = {
            part: [{kind: sorted(found) for kind, found in one.items()} for one in marks]
            for part, marks in self.subjects.items()
        }
        with atomic_file(Path(path)) as unfinished:
            save_file(
                {"fingerprints": self.fingerprints.half().contiguous()},
                unfinished,
                {"format": FORMAT, "settings": json.dumps(entries)},
            )

    @classmethod
    def load(cls, path: str | Path) -> "CopyCheck":
        """Read what `save` wrote. Raises: ValueError for another file, and a damaged one."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; make it with python -m evaluation.copies.fingerprints")
        try:
            with open_safetensors(Path(path)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: holds no fingerprints of training volumes ({FORMAT!r}); make it with "
                        "python -m evaluation.copies.fingerprints"
                    )
                settings = parse_json(metadata["settings"])
                fingerprints = file.get_tensor("fingerprints").float()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is no safetensors file ({error})") from error
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: is damaged, make it anew ({error})") from error
        try:
            settings |= {"crop": tuple(settings["crop"]), "flips": tuple(settings["flips"])}
            check = cls(fingerprints, **settings)
            check._check_settings()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its settings do not fit its fingerprints, make it anew ({error})") from error
        return check

    def _check_settings(self) -> None:
        """Raises: ValueError or TypeError for settings by which no copy would be found, or none could be looked for."""
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
        if len(shape) != 5 or shape[2:] != expected or not min(shape) or not self.fingerprints.isfinite().all():
            raise ValueError(f"fingerprints {shape}, or some that are not finite")


def _with_edges(volume: Any, sides: Sides) -> Tensor:
    """(C, *sides) about the center of a volume, its edges repeated where it is smaller."""
    array = np.asarray(volume.detach().cpu() if isinstance(volume, Tensor) else volume)
    array = array[None] if array.ndim == 3 else array
    held = tuple(min(n, side) for n, side in zip(array.shape[1:], sides, strict=True))
    start = pad_or_crop(held, sides).start
    edges = [(-low, target - side + low) for low, side, target in zip(start, held, sides, strict=True)]
    return torch.from_numpy(np.pad(crop_of(array, held), [(0, 0), *edges], mode="edge"))  # type: ignore[arg-type]


def _blocks(volume: Tensor, block: int) -> Tensor:
    """(C, X, Y, Z) -> means of its blocks."""
    return F.avg_pool3d(volume[None], block)[0]


def check_unseen_subjects(known: CopyCheck, records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check fingerprints against the records of a model's training subjects (`volumes.data.subjects`).

    Volumes that the model learned from and that have no fingerprint have a warning, and so has what is not known.
    Raises: ValueError if the threshold was set by volumes that the model learned from: it lets copies of them pass.
    """
    if not known.subjects or not is_complete(records):
        whose = "hold no record of their subjects" if not known.subjects else "are for a model without a whole record"
        logger.warning("%s: these fingerprints %s, so whether they fit the model was not checked", name, whose)
    unseen = known.subjects.get("unseen", [])
    if count := sum(seen(records, marks, ["train"]) is not None for marks in unseen):
        raise ValueError(
            f"{name}: {count} of the {len(unseen)} volumes by which its threshold was set are among those that the model learned "
            "from, so copies would pass; make the fingerprints with the split of the model's training (data.split, "
            "data.test_fraction, data.split_seed, data.subject as in the config.yaml of its run). If they are other people who "
            "only share names, make them with --accept_overlap"
        )
    if known.subjects and (missing := unknown_volumes(records, known.subjects.get("training", []))):
        logger.warning(
            "%s: %d volumes that the model learned from have no fingerprint; copies of them pass", name, missing
        )


def copy_check(path: str | Path, data: DataDescription, records: Sequence[Mapping[str, Any]] = ()) -> Check:
    """What `generate.py --reject_copies` asks of each image that a pipeline with this `data` makes, and what it records:
    {"fingerprints": sha256 of the file, "threshold", "similarity"}.

    Args:
        records: the pipeline's `training_subjects`.
    Raises: ValueError for another file, for fingerprints of another number of channels than the model makes, and as
        `check_unseen_subjects`.
    """
    known = CopyCheck.load(path)
    if (found := known.fingerprints.shape[1]) != len(data.channels):
        raise ValueError(
            f"{path}: holds fingerprints of {found} channels, the model makes {len(data.channels)} "
            f"({', '.join(data.channels)}); make them from the model's own training set"
        )

    check_unseen_subjects(known, records, str(path))

    def judge(image: Any) -> tuple[bool, dict[str, Any]]:
        found = known.check(in_model_units(image, data))
        return found.copy, {"similarity": found.similarity}

    def reason(found: Mapping[str, Any]) -> str:
        return f"is a copy of a training volume (similarity {found['similarity']:.3f}, threshold {known.threshold:.3f})"

    settings = {"fingerprints": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "threshold": known.threshold}
    return Check("copy_check", judge, reason, settings)


def main(args: Sequence[str] | None = None) -> CopyCheck:
    """Make the fingerprints of the training split, and the threshold from real volumes that are not in it."""
    options = parse(args)
    cases = load_cases(options.data)
    split = {name: [case for case in cases if case.split in part] for name, part in SPLITS.items()}
    check_command("copies", cases, options.data, {"alpha": options.alpha})
    check_report(options.output)
    training, unseen = (VolumeDataset(split[name], options.data) for name in SPLITS)
    subjects, seen = [case.subject for case in unseen.cases], {case.subject for case in training.cases}
    if shared := sorted(seen & set(subjects)):
        raise ValueError(f"subjects {shared[:5]} are unseen and in training: split by subject")
    # [-1, 1] here and [0, 1] in generate.py are one to a correlation
    known, others = ([prepared.image.array for prepared in dataset.prepared] for dataset in (training, unseen))
    crop = tuple(options.crop) if options.crop else default_crop(known, options.block, options.shift)
    check = CopyCheck.of(known, crop, block=options.block, flips=tuple(sorted(set(options.flips))), shift=options.shift)
    with LiveBar(others, unit="volume", disable=None, desc="comparing unseen volumes") as progress:
        scores = np.array([check.check(volume).similarity for volume in progress])
    others_marks = [{"voxels": one["voxels"]} for one in unseen.marks] if options.accept_overlap else unseen.marks
    marks = {"training": training.marks, "unseen": others_marks}
    check = dataclasses.replace(check, threshold=conformal_threshold(scores, subjects, options.alpha), subjects=marks)
    check.save(options.output)
    count = len(set(subjects))
    low, high = wilson(options.alpha, count)
    print(
        f"{len(known)} fingerprints of {len(seen)} subjects, {check.crop} voxels in blocks of {check.block}: {options.output}\n"
        f"threshold {check.threshold:.4f}, which {options.alpha:g} of unseen subjects exceed ({low:.3f} to {high:.3f}, from "
        f"{len(others)} volumes of {count} subjects); their median similarity to the nearest is {np.median(scores):.4f}"
    )
    return check


def default_crop(volumes: Volumes, block: int, shift: int) -> Sides:
    """What all volumes hold wherever a copy was moved, in whole blocks. Raises: ValueError where that is less than two."""
    sides = common_crop(volumes)
    x, y, z = ((side - 2 * shift) // block * block for side in sides)
    if min(x, y, z) < 2 * block:
        raise ValueError(
            f"the smallest sides of the training volumes are {sides}: too few for two blocks of {block} voxels and shifts of {shift}; "
            "give a smaller --block or --shift, or a --crop (the edges of what lacks some of it are repeated)"
        )
    return x, y, z

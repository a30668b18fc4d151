"""What each command of evaluate.py needs of the data, by the splits' counts and the volumes' sizes: asked by the doctor before a model is
trained, and by the commands before they read a voxel. copies and samplers are `python -m evaluation.copies.fingerprints` and `.samplers`.

The rules are those of the functions that compute: `check_counts`, `check_unseen` and the like raise here as they do there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.data.label_budget import budget
from evaluation.data.pairs import label_values, learning_cases, test_cases
from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.ms_ssim import check_pairs, scales_of
from evaluation.metrics.nearest import check_shift
from evaluation.metrics.set_distances import check_counts
from evaluation.metrics.slices import check_slices
from evaluation.networks.classifier import MIN_SIZE as CLASSIFIED
from evaluation.networks.defaults import (
    ALPHA,
    FEW_LABELS,
    PRETRAIN_LABELS,
    SHAPE,
    SHIFT,
)
from volumes import Case, DataConfig

from .privacy import check_references, check_unseen, conformal_threshold
from .realism import PARTS
from .utility import check_shape

Shape = tuple[int, int, int]
REMEDY = "hold out more subjects (data.test_fraction, or the column data.split), or leave the command out"


@dataclass(frozen=True)
class Data:
    """Cases and their config; `shapes` are the volumes' (X, Y, Z) where they are known."""

    cases: Sequence[Case]
    config: DataConfig
    shapes: Sequence[Shape] = ()

    def subjects(self, splits: Sequence[str]) -> list[str]:
        """Whose each volume of some splits is."""
        return [case.subject for case in self.cases if case.split in splits]

    @property
    def smallest(self) -> Shape | None:
        """The smallest side of any volume, axis by axis."""
        x, y, z = (min(sides) for sides in zip(*self.shapes, strict=True)) if self.shapes else (0, 0, 0)
        return (x, y, z) if self.shapes else None


def problems(command: str, data: Data, options: Mapping[str, Any] | None = None) -> list[str]:
    """Why a command cannot work on this data, each reason by itself; often none.

    Args:
        options: of its command line; what is left out is as usual.
    """
    found = []
    for check in CHECKS.get(command, ()):
        try:
            check(data, options or {})
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def check_command(
    command: str, cases: Sequence[Case], config: DataConfig, options: Mapping[str, Any] | None = None
) -> None:
    """Raises: ValueError with all `problems`, before the command's work."""
    if found := problems(command, Data(cases, config), options):
        raise ValueError(f"{command}: " + "; ".join(found))


def check_sets(
    command: str, sets: Mapping[str, VolumeSet], config: DataConfig, options: Mapping[str, Any] | None = None
) -> None:
    """The same of sets that were read, with the generated volumes. Raises: ValueError with all `problems`."""
    split = {"training": "train", "test": "test", "generated": "generated"}
    cases, shapes = [], []
    for name, part in sets.items():
        cases += [
            Case(one, subject=subject, split=split[name])
            for one, subject in zip(part.names, part.subjects, strict=True)
        ]
        shapes += [tuple(volume.shape[1:]) for volume in part.volumes]
    if found := problems(command, Data(cases, config, shapes), {**(options or {}), "unseen": ["test"]}):
        raise ValueError(f"{command}: " + "; ".join(found))


def _unseen(options: Mapping[str, Any]) -> list[str]:
    return list(options.get("unseen") or ["test"])


def _sets(data: Data, options: Mapping[str, Any]) -> None:
    of_sets = {"training": data.subjects(["train"]), "test": data.subjects(_unseen(options))}
    if generated := data.subjects(["generated"]):
        of_sets["generated"] = generated
    for name, splits in (("training", ["train"]), ("test", _unseen(options))):
        if not of_sets[name]:
            raise ValueError(f"no case is in split {' or '.join(splits)}; {REMEDY}")
    parts = options.get("parts") or PARTS
    if set(parts) - {"diversity"}:
        check_counts({name: len(subjects) for name, subjects in of_sets.items()})
    if "diversity" in parts:
        for name, subjects in of_sets.items():
            check_pairs(subjects, name)


def _sizes(data: Data, options: Mapping[str, Any]) -> None:
    parts = options.get("parts") or PARTS
    if data.smallest and "diversity" in parts:
        scales_of(data.smallest)
    if data.smallest and "consistency" in parts:
        check_slices(data.smallest)


def _counts(data: Data, options: Mapping[str, Any]) -> None:
    _sets(data, {**options, "parts": ["consistency"]})


def _label_maps(data: Data, options: Mapping[str, Any]) -> None:
    if not data.config.image_labels:
        raise ValueError("shapes are of label maps: give a config whose data has image_labels")


def _private(data: Data, options: Mapping[str, Any]) -> None:
    unseen, training = data.subjects(_unseen(options)), data.subjects(["train"])
    if not unseen:
        raise ValueError(f"no case is in split {' or '.join(_unseen(options))}; {REMEDY}")
    check_unseen(unseen, options.get("alpha", ALPHA))
    check_references(training)


def _moved(data: Data, options: Mapping[str, Any]) -> None:
    if data.smallest and "image" in (options.get("spaces") or ["image"]):
        check_shift(options.get("shift", SHIFT), data.smallest)


def _segmented(data: Data, options: Mapping[str, Any]) -> None:
    check_shape(options.get("shape") or SHAPE)
    label_values(data.config)
    learning_cases(data.cases)
    test_cases(data.cases)


def _budgets(usual: Sequence[str]) -> Callable[[Data, Mapping[str, Any]], None]:
    def check(data: Data, options: Mapping[str, Any]) -> None:
        available = sum(case.split != "test" for case in data.cases)  # as `learning_cases`
        for labels in options.get("labels") or usual:
            budget(labels, available)

    return check


def _classes(data: Data, options: Mapping[str, Any]) -> None:
    columns = [options["column"]] if options.get("column") else sorted(data.config.classes)
    for column in columns:
        if column not in data.config.classes:
            raise ValueError(f"{column!r} is no class of the data; those are {sorted(data.config.classes)}")
        known = {
            split: Counter(str(case.metadata.get(column) or "") for case in data.cases if case.split == split)
            for split in ("train", "test")
        }
        names = [str(name) for name in data.config.classes[column]]
        if lost := [name for name in names if not known["train"][name]]:
            raise ValueError(
                f"no volume of split train is of {column} {', '.join(lost)}, which a classifier is to learn"
            )
        if not any(known["test"][name] for name in names):
            raise ValueError(f"no volume of split test has a {column}")


def _classified(data: Data, options: Mapping[str, Any]) -> None:
    shape = options.get("shape")
    if shape and min(shape) < CLASSIFIED:
        raise ValueError(f"--shape {' '.join(map(str, shape))}: a classifier needs {CLASSIFIED} voxels a side")


def _split(data: Data, options: Mapping[str, Any]) -> None:
    split = options.get("split", "test")
    if not data.subjects([split]):
        raise ValueError(
            f"no case is in split {split!r}; choose another --split, or see `data` in {options.get('config', 'the config')}"
        )


def _fingerprinted(data: Data, options: Mapping[str, Any]) -> None:
    for name, splits in (("training", ["train"]), ("unseen", ["validation", "test"])):
        if not data.subjects(splits):
            raise ValueError(f"the data has no {name} volumes (split {' or '.join(splits)}); see data.test_fraction")
    unseen = data.subjects(["validation", "test"])
    conformal_threshold(np.zeros(len(unseen)), unseen, options.get("alpha", ALPHA))


CHECKS: dict[str, Sequence[Callable[[Data, Mapping[str, Any]], None]]] = {
    "reconstruction": [_split],
    "realism": [_sets, _sizes],
    "shapes": [_label_maps, _counts],
    "privacy": [_private, _moved],
    "dice": [_segmented],
    "few_labels": [_segmented, _budgets(FEW_LABELS)],
    "pretrain": [_segmented, _budgets(PRETRAIN_LABELS)],
    "conditions": [_classes, _classified],
    "copies": [_fingerprinted],
    "samplers": [_counts, _segmented],
}

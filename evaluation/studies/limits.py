"""Limits: what each command of evaluate.py needs of the data, by the sizes of the splits and of the volumes.

The doctor checks them before a model is trained, and the commands before they read a voxel. "copies" and "samplers" are
`python -m evaluation.copies.fingerprints` and `python -m evaluation.studies.samplers`. The rules are those of the
functions that compute: `check_counts`, `check_unseen` and others raise here as they do there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.data.label_budget import budget
from evaluation.data.maps import tissue_names
from evaluation.data.pairs import WHOLE_MASKS, label_values, learning_cases, test_cases
from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.memorization import check_references
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
from evaluation.stats.conformal import check_unseen, conformal_threshold
from volumes import UNKNOWN, Case, DataConfig
from volumes.data.tables import read_number
from volumes.volume import GRID_NUMBERS

from .map_adherence import check_tissues
from .realism import PARTS
from .utility import check_shape

Shape = tuple[int, int, int]
Options = Mapping[str, Any]  # of a command line
REMEDY = "hold out more subjects (data.test_fraction, or the column data.split), or skip the command"


@dataclass(frozen=True)
class Data:
    """Cases and their config; `shapes` are those of the volumes (X, Y, Z), if known."""

    cases: Sequence[Case]
    config: DataConfig
    shapes: Sequence[Shape] = ()

    def subjects(self, splits: Sequence[str]) -> list[str]:
        """List the subject of each volume of some splits."""
        return [case.subject for case in self.cases if case.split in splits]

    @property
    def smallest(self) -> Shape | None:
        """The smallest side of all volumes along each axis."""
        x, y, z = (min(sides) for sides in zip(*self.shapes, strict=True)) if self.shapes else (0, 0, 0)
        return (x, y, z) if self.shapes else None


def problems(command: str, data: Data, options: Options | None = None) -> list[str]:
    """List the reasons why a command cannot work on this data.

    Args:
        options: of its command line; missing ones have their defaults.
    """
    reasons = []
    for check in CHECKS.get(command, ()):
        try:
            check(data, options or {})
        except ValueError as error:
            reasons.append(str(error))
    return list(dict.fromkeys(reasons))


def check_command(command: str, cases: Sequence[Case], config: DataConfig, options: Options | None = None) -> None:
    """Check the cases before the command's work. Raises: ValueError with all `problems`."""
    if reasons := problems(command, Data(cases, config), options):
        raise ValueError(f"{command}: " + "; ".join(reasons))


def check_sets(command: str, sets: Mapping[str, VolumeSet], config: DataConfig, options: Options | None = None) -> None:
    """Check sets that were read, with the generated volumes. Raises: ValueError with all `problems`."""
    split = {"training": "train", "test": "test", "generated": "generated"}
    cases, shapes = [], []
    for set_name, volumes in sets.items():
        cases += [
            Case(name, subject=subject, split=split[set_name])
            for name, subject in zip(volumes.names, volumes.subjects, strict=True)
        ]
        shapes += [shape[-3:] for shape in volumes.shapes]
    if reasons := problems(command, Data(cases, config, shapes), {**(options or {}), "unseen": ["test"]}):
        raise ValueError(f"{command}: " + "; ".join(reasons))


def _unseen(options: Options) -> list[str]:
    return list(options.get("unseen") or ["test"])


def _sets(data: Data, options: Options) -> None:
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


def _sizes(data: Data, options: Options) -> None:
    parts = options.get("parts") or PARTS
    if data.smallest and "diversity" in parts:
        scales_of(data.smallest)
    if data.smallest and "consistency" in parts:
        check_slices(data.smallest)


def _counts(data: Data, options: Options) -> None:
    _sets(data, {**options, "parts": ["consistency"]})


def _label_maps(data: Data, options: Options) -> None:
    if not data.config.image_labels:
        raise ValueError("shapes are for label maps: give a config whose data has image_labels")


def _tissues(data: Data, options: Options) -> None:
    if data.config.image_labels or not (data.config.masks or data.config.phantom):
        raise ValueError("tissues are those of label maps beside images with intensities: set data.masks")
    check_tissues(data.config.channels, tissue_names(data.config))


def _empty(data: Data, options: Options) -> None:
    if not data.config.empty_background:
        raise ValueError(
            "without a map, tissues are where volumes are not empty: give a config whose data has empty_background"
        )


def _private(data: Data, options: Options) -> None:
    unseen, training = data.subjects(_unseen(options)), data.subjects(["train"])
    if not unseen:
        raise ValueError(f"no case is in split {' or '.join(_unseen(options))}; {REMEDY}")
    check_unseen(unseen, options.get("alpha", ALPHA))
    check_references(training)


def _moved(data: Data, options: Options) -> None:
    if data.smallest and "image" in (options.get("spaces") or ["image"]):
        check_shift(options.get("shift", SHIFT), data.smallest)


def _segmented(data: Data, options: Options) -> None:
    check_shape(options.get("shape") or SHAPE)
    values, config = label_values(data.config), data.config
    hidden = sorted(str(value) for value, target in config.label_map.items() if target == UNKNOWN)
    if hidden and UNKNOWN not in values and config.on_error == "raise":
        raise ValueError(
            f"data.label_map says that the label is unknown where masks hold {', '.join(hidden)} ({UNKNOWN}), and "
            f"segmenters need whole masks; {WHOLE_MASKS}"
        )
    learning_cases(data.cases)
    test_cases(data.cases)


def _budgets(usual: Sequence[str]) -> Callable[[Data, Options], None]:
    def check(data: Data, options: Options) -> None:
        available = sum(case.split != "test" for case in data.cases)  # as `learning_cases`
        for labels in options.get("labels") or usual:
            budget(labels, available)

    return check


def _conditions(data: Data, options: Options) -> None:
    classes, numbers = data.config.classes, data.config.numbers
    columns = [options["column"]] if options.get("column") else [*sorted(classes), *sorted(table_numbers(data.config))]
    for column in columns:
        if column in classes:
            _class(data, column)
        elif column in numbers:
            _number(data, column)
        else:
            known = sorted([*classes, *numbers])
            raise ValueError(f"{column!r} is not a class or number of the data; choose one of {known}")


def table_numbers(config: DataConfig) -> list[str]:
    """List the numbers of the data that are not those of a volume's grid."""
    return [name for name in config.numbers if name not in GRID_NUMBERS]


def _number(data: Data, column: str) -> None:
    for split in ("train", "test"):
        cells = [case.metadata.get(column) for case in data.cases if case.split == split]
        values = {read_number(cell) for cell in cells if cell not in (None, "")}
        if len(values) < 2:
            raise ValueError(f"no two volumes of split {split} differ in {column}: there is nothing to predict")


def _class(data: Data, column: str) -> None:
    counts = {
        split: Counter(str(case.metadata.get(column) or "") for case in data.cases if case.split == split)
        for split in ("train", "test")
    }
    names = [str(name) for name in data.config.class_names[column]]
    if lost := [name for name in names if not counts["train"][name]]:
        raise ValueError(f"no volume of split train is of {column} {', '.join(lost)}: the classifier needs all classes")
    if not any(counts["test"][name] for name in names):
        raise ValueError(f"no volume of split test has a {column}")


def _classified(data: Data, options: Options) -> None:
    shape = options.get("shape")
    if shape and min(shape) < CLASSIFIED:
        raise ValueError(f"--shape {' '.join(map(str, shape))}: a classifier needs {CLASSIFIED} voxels per side")


def _split(data: Data, options: Options) -> None:
    split = options.get("split", "test")
    if not data.subjects([split]):
        raise ValueError(
            f"no case is in split {split!r}; choose another --split, or see `data` in "
            f"{options.get('config', 'the config')}"
        )


def _fingerprinted(data: Data, options: Options) -> None:
    for name, splits in (("training", ["train"]), ("unseen", ["validation", "test"])):
        if not data.subjects(splits):
            raise ValueError(f"the data has no {name} volumes (split {' or '.join(splits)}); see data.test_fraction")
    unseen = data.subjects(["validation", "test"])
    conformal_threshold(np.zeros(len(unseen)), unseen, options.get("alpha", ALPHA))


CHECKS: dict[str, Sequence[Callable[[Data, Options], None]]] = {
    "reconstruction": [_split],
    "realism": [_sets, _sizes],
    "shapes": [_label_maps, _counts],
    "privacy": [_private, _moved],
    "dice": [_segmented],
    "few_labels": [_segmented, _budgets(FEW_LABELS)],
    "pretrain": [_segmented, _budgets(PRETRAIN_LABELS)],
    "conditions": [_conditions, _classified],
    "adherence": [_tissues, _split],
    "morphometry": [_tissues, _empty, _counts],
    "copies": [_fingerprinted],
    "samplers": [_counts, _segmented],
}

"""Load and check masks from any supported input type. Label values are those of files, label indices those of the
model.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import SpatialImage

from diffusion import LatentDenoiser
from diffusion.folding import UNKNOWN_REFUSED
from pipelines.storage.record import SourceRecord
from volumes import PADDING, UNKNOWN, Volume, VolumeError, read_mask, read_volume, volume_parts
from volumes.formats.carriers import as_array, carries_geometry, source_file
from volumes.formats.raw import Reading
from volumes.formats.read import read_stored
from volumes.labels import label_indices, segment_values
from volumes.plausible import header_oddities

# An image in memory of nibabel, SimpleITK or torchio, or a MetaTensor of MONAI, is read with its geometry:
# `volumes.formats.carriers`.
MaskLike = str | os.PathLike | SpatialImage | Volume | np.ndarray | torch.Tensor
LabelMap = Mapping[int, int | str] | Mapping[str, int | str] | Mapping[int | str, int | str]

BACKGROUND = 0  # the label value whose being alone in a mask is worth a warning


@dataclass(frozen=True)
class DrawnMask(os.PathLike[str]):
    """The file of a DICOM-SEG or RTSTRUCT, with the image that it was drawn on, whose grid is the mask's. Elsewhere it
    is the path of the mask.

    Attributes:
        time_point: which volume of a 4-D image file; None for a 3-D file.
    """

    file: Path
    image: Path
    time_point: int | None = None

    def __fspath__(self) -> str:
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)


@dataclass(frozen=True)
class TimePoint(os.PathLike[str]):
    """One volume of a 4-D image file, counted from 0. Elsewhere it is the path of the file."""

    file: Path
    number: int

    def __fspath__(self) -> str:
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)


def as_list(mask: MaskLike | Sequence[MaskLike]) -> list[MaskLike]:
    """Return one mask or several (a list, a tuple, or an array or tensor (B, 1, X, Y, Z)) as a list.

    Raises: ValueError on an empty list.
    """
    several = isinstance(mask, (list, tuple)) or (isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 5)
    masks: list[Any] = list(mask) if several else [mask]  # pyright: ignore[reportArgumentType]
    if not masks:
        raise ValueError("the list of masks is empty; give at least one")
    return masks


def load_mask(
    mask: MaskLike,
    affine: np.ndarray,
    reading: Reading | None = None,
    names: Mapping[str | int, int] | None = None,
    like: Volume | None = None,
) -> tuple[Volume, str]:
    """Read one mask: (1, X, Y, Z) int16 label values in RAS+ order, and its name for messages.

    A plain array or tensor, (X, Y, Z) or (1, X, Y, Z), carries no geometry: it is placed on `affine`, the model's
    template. `reading` is how headers are read, see `volumes.DataConfig.reading`; `names` and `like` are for DICOM-SEG
    and RTSTRUCT, see `volumes.read_mask`.

    Raises: ValueError for an empty mask, for values that are not labels, and for other types.
    """
    if isinstance(mask, DrawnMask) and like is None:
        like = read_volume(mask.image, time_point=mask.time_point, **(reading or {}))
    if isinstance(mask, (str, os.PathLike)):
        return warn_of_header(read_mask(mask, names=names, like=like, **(reading or {})), str(mask)), str(mask)
    if carries_geometry(mask):
        name = source_file(mask) or "the mask"
        return warn_of_header(read_mask(mask, **(reading or {})), name), name
    if isinstance(mask, Volume):
        name, array, source = "the mask (a Volume)", mask.array, mask.source
        affine = mask.affine
        check_axes(mask, name)
    elif isinstance(mask, (np.ndarray, torch.Tensor)):
        array = as_array(mask, "the mask")
        name, source = f"the mask (an array of shape {array.shape})", None
    else:
        raise ValueError(
            f"a mask is a path, an image of nibabel, SimpleITK, torchio or MONAI, a Volume, an array or a tensor; got "
            f"{type(mask).__name__}"
        )
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[0] != 1:
        raise ValueError(f"{name}: expected (X, Y, Z) or (1, X, Y, Z); give several masks as a list")
    if array.size == 0:
        raise ValueError(f"{name}: is empty, it has no voxels")
    return Volume(_whole_numbers(array, name), affine, source), name


def warn_of_header(volume: Volume, name: str) -> Volume:
    """Return the volume. Warns: of oddities in the header that it was read from, as the training does."""
    for oddity in header_oddities(volume.source) if volume.source else []:
        warnings.warn(f"{name}: {oddity}", stacklevel=3)
    return volume


def index_labels(
    values: np.ndarray, labels: Mapping[int, str], label_map: LabelMap | None = None, name: str = "the mask"
) -> np.ndarray:
    """Map label values, as files hold them, to the model's label indices (int16, same shape).

    PADDING stays PADDING, and UNKNOWN stays UNKNOWN, unless it is a label of this model or is mapped to one.

    Args:
        values: integers of any shape.
        labels: the model's label values and names; the index is the rank of the value.
        label_map: values to read as a known label, given by value or name, e.g. `{3: 1}` or `{3: "anterior"}`. Names of
            segments were read with the file.

    Raises: ValueError naming the unknown values and the known ones; or on a mask that is PADDING everywhere.
    Warns: if the mask is background only.
    """
    known = sorted(labels)
    translation = {UNKNOWN: UNKNOWN} | known_labels(labels, label_map)
    outside = (values == PADDING) & (PADDING not in translation) & (PADDING not in known)
    if outside.all():
        raise ValueError(f"{name}: is empty, all its voxels are marked as missing ({PADDING})")
    try:
        indices = label_indices(np.where(outside, known[0], values), known, translation, name=name, partial=True)
    except VolumeError as error:
        listing = ", ".join(f"{value} = {labels[value]}" for value in known)
        raise ValueError(
            f"{error}. This model was trained on {listing}; read a value as one of them with label_map={{value: "
            f"label}} (generate.py: --label_map value=label)"
        ) from error
    if BACKGROUND in known and (indices[~outside] == known.index(BACKGROUND)).all():
        warnings.warn(f"{name}: is background everywhere; the volume will show no labeled structure", stacklevel=2)
    return np.where(outside, np.int16(PADDING), indices)


def model_values(
    mask: MaskLike,
    labels: Mapping[int, str],
    label_map: LabelMap | None,
    affine: np.ndarray,
    reading: Reading | None = None,
) -> Volume:
    """Read a mask as the model sees it: its label values (1, X, Y, Z) int16 after `label_map`, PADDING outside the
    field of view, UNKNOWN where it says so.

    Raises: ValueError as `load_mask` and `index_labels`.
    """
    volume, name = load_mask(mask, affine, reading, segment_values(labels, known_labels(labels, label_map)))
    indices = index_labels(volume.array, labels, label_map, name)
    values = np.array(sorted(labels), np.int16)[np.maximum(indices, 0)]
    return volume.replace(np.where(indices < 0, indices, values))


def describe_mask(mask: MaskLike) -> SourceRecord:
    """Describe a mask for the sidecar: file name (None without a file) and sha256.

    The hash is of the file's bytes (those of all its files: a .hdr/.img pair, the slices of a DICOM series, in the
    order of their names); without a file, of the voxels.
    """
    if isinstance(mask, (str, os.PathLike)):
        digest = hashlib.sha256()
        for path in volume_parts(mask):
            digest.update(path.read_bytes())
        return {"file": Path(mask).name, "sha256": digest.hexdigest()}
    if carries_geometry(mask):
        array = read_stored(mask).values
    elif isinstance(mask, Volume):
        array = mask.array
    else:
        array = as_array(mask)
    file = source_file(mask)
    digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return {"file": None if file is None else Path(file).name, "sha256": digest}


def identity(source: object) -> str | int:
    """Identify a mask or an image: equal for the same path, and for the same object."""
    if isinstance(source, DrawnMask | TimePoint):
        return repr(source)
    return str(source) if isinstance(source, (str, os.PathLike)) else id(source)


def is_placed(given: Any) -> bool:
    """Return whether a mask or an image has a position: all but plain arrays and tensors have one."""
    return isinstance(given, (str, os.PathLike, Volume)) or carries_geometry(given)


def check_axes(volume: Volume, name: str) -> None:
    """Raise ValueError for a Volume whose axes are not in RAS+ order; a volume that was read from a file is."""
    codes = "".join(map(str, aff2axcodes(volume.affine)))
    if volume.source is None and codes != "RAS":
        raise ValueError(f"{name}: its axes run {codes}, a Volume's run RAS; give it as a nibabel image instead")


def check_whole(labels: np.ndarray, name: str) -> None:
    """Check a mask (label indices) for a model that takes whole masks only.

    Raises: ValueError naming the mask if the label of some voxels is unknown.
    """
    if (labels == UNKNOWN).any():
        raise ValueError(f"{name}: {UNKNOWN_REFUSED}")


def source_name(mask: MaskLike) -> str:
    """Return the file of a mask, for messages."""
    if isinstance(mask, (str, os.PathLike)):
        return str(mask)
    return str((carries_geometry(mask) and source_file(mask)) or "the mask")


def replaced_labels(
    unet: LatentDenoiser, labels: Mapping[int, str], replaced: Mapping[str, str | int]
) -> dict[int, int]:
    """Translate `guidance_without` to label indices as `replacement_indices` does, for a model.

    Args:
        labels: of the data that `unet` was trained on.
    Raises: ValueError for a model without masks, for the unknown label if the model takes whole masks only, and as
    `replacement_indices`.
    """
    if replaced and not unet.condition_schema.mask:
        raise ValueError("guidance_without: this model was trained without a mask condition; leave it out")
    indices = replacement_indices(labels, replaced)
    if UNKNOWN in indices.values() and not unet.takes_partial_masks:
        raise ValueError("guidance_without: this model knows no unknown label; name the label around it instead")
    return indices


def replacement_indices(labels: Mapping[int, str], replaced: Mapping[str, str | int]) -> dict[int, int]:
    """Translate `guidance_without` {label: label in its place}, by value or name, to label indices; UNKNOWN, or
    "unknown", may be in the place of a label.

    Raises: ValueError for a label that the model does not know, for one in its own place, for one that is named twice,
    and for a name of several.
    """
    what, found = "guidance_without", _meanings(labels)
    for key in [key for key in found if isinstance(key, int)]:  # records and files hold values as text
        found[str(key)] = found.get(str(key), set()) | found[key]
    listing = ", ".join(f"{value} ({name})" for value, name in labels.items()) or "none"
    if lacking := [one for pair in replaced.items() for one in pair if one not in found]:
        raise ValueError(f"{what} names {lacking}; the labels of this model are {listing}")
    pairs = [(_only(one, found, what), _only(other, found, what)) for one, other in replaced.items()]
    index = {value: rank for rank, value in enumerate(sorted(labels))}
    if any(one not in index for one, _ in pairs):
        raise ValueError(f"{what} replaces a label of the model, not what is unknown; its labels are {listing}")
    if same := [name for name, (one, other) in zip(replaced, pairs, strict=True) if one == other]:
        raise ValueError(f"{what} puts {same} in its own place; name the label that is around it")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{what} {dict(replaced)} names a label twice, by value and by name; remove one")
    return {index[one]: index.get(other, UNKNOWN) for one, other in pairs}


def known_labels(labels: Mapping[int, str], label_map: LabelMap | None) -> dict[int | str, int]:
    """Replace the model's names in `label_map` by values. Raises: ValueError for a target that the model does not
    know, and for a name of several labels.
    """
    label_map, found = label_map or {}, _meanings(labels)
    unknown = [target for target in label_map.values() if target not in found]
    if unknown:
        listing = ", ".join(f"{value} ({name})" for value, name in labels.items())
        raise ValueError(f"label_map leads to {unknown}, which the model does not know; it knows {listing}")
    return {
        key if isinstance(key, str) else int(key): _only(target, found, "label_map")
        for key, target in label_map.items()
    }


def _meanings(labels: Mapping[int, str]) -> dict[int | str, set[int]]:
    """Return the label values that each value and each name may mean. "unknown" and -2 mean UNKNOWN, unless a label of
    the model is called so; with a label of the value -2 there is no UNKNOWN.
    """
    found: dict[int | str, set[int]] = {}
    for value, name in labels.items():
        for key in (int(value), name):
            found.setdefault(key, set()).add(int(value))
    if UNKNOWN not in found:
        found[UNKNOWN] = {UNKNOWN}
        found.setdefault("unknown", {UNKNOWN})
    return found


def _only(label: int | str, found: Mapping[int | str, set[int]], what: str) -> int:
    """Return the value that a label means. Raises: ValueError if several labels have the name."""
    if len(found[label]) > 1:
        values = ", ".join(map(str, sorted(found[label])))
        raise ValueError(f"{what}: {label!r} may mean any of the labels {values}; name the one by its value")
    return next(iter(found[label]))


def _whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Return the array as int16. Raises: ValueError if that would change a value."""
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int16)
    if not np.array_equal(whole, array):
        raise ValueError(f"{name}: holds values that are not int16 labels (fractions, NaN, or beyond +-32767)")
    return whole

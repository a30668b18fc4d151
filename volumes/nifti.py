"""NIfTI files to volumes and back.

That is .nii, .nii.gz and .hdr/.img pairs, NIfTI-1 and -2, either byte order, slope and intercept, qform or sform.

Every file that cannot be read right is refused with a `VolumeError` that names it and says why; nothing is guessed.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from .resampling import resample_to
from .volume import SourceGrid, Volume, VolumeError, check_affine, same_grid

Readable = str | os.PathLike | Nifti1Pair

MILLIMETRES = {
    1: 1000.0,
    2: 1.0,
    3: 0.001,
}  # by the low three bits of xyzt_units: metre, mm, micron; anything else is taken as mm
DESCRIPTION_BYTES = 79  # the header's `descrip` field is 80 bytes, the last one NUL
WHOLE_NUMBER_TOLERANCE = 1e-4
COPY_BYTES = 1 << 22  # at a time, through a gzip file


def read_volume(source: Readable, *, time_point: int | None = None) -> Volume:
    """Read a scalar image as float32 (C, X, Y, Z), in RAS+ order, slope and intercept applied.

    A 3-D file has one channel; the fourth axis of a 4-D file becomes the channels, or `time_point` picks one of them.
    Raises VolumeError for files that are broken, truncated, in colour, complex, or hold values that are not finite.
    """
    name, image = open_nifti(source)
    values = _channels_last(_values(name, image), name)
    if time_point is not None:
        if not 0 <= time_point < values.shape[3]:
            raise VolumeError(f"{name}: has no time point {time_point}; it holds {values.shape[3]}, counted from 0")
        values = values[..., time_point : time_point + 1]
    with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite and is refused below
        array = values.astype(np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise VolumeError(f"{name}: {bad} of {array.size} values are not finite (NaN or infinite); replace them first")
    return _canonical(array, image, name)


def read_mask(source: Readable) -> Volume:
    """Read a label map as int16 (1, X, Y, Z), in RAS+ order. Float files are fine if they hold whole numbers."""
    name, image = open_nifti(source)
    values = _channels_last(_values(name, image), name)
    if values.shape[3] != 1:
        raise VolumeError(f"{name}: a mask is one label map, this file holds {values.shape[3]}; merge them into one")
    if not np.isfinite(values).all():
        raise VolumeError(f"{name}: the mask holds values that are not finite")
    labels = values if values.dtype.kind in "biu" else np.rint(values)
    if labels is not values and np.abs(values - labels).max() > WHOLE_NUMBER_TOLERANCE:
        worst = float(values.flat[np.abs(values - labels).argmax()])
        raise VolumeError(
            f"{name}: the mask holds {worst:.6g}, which is no whole number; is it an image or a probability map?"
        )
    limits = np.iinfo(np.int16)
    if labels.min() < limits.min or labels.max() > limits.max:
        raise VolumeError(
            f"{name}: labels run from {labels.min():.0f} to {labels.max():.0f}; int16 is what is supported"
        )
    return _canonical(labels.astype(np.int16), image, name)


def stored_grid(volume: Volume) -> SourceGrid:
    """The grid on which a volume is written: that of the file that it came from, or its own."""
    return volume.source or SourceGrid(volume.shape, volume.affine, volume.affine, qform_code=1, sform_code=1)


def on_stored_grid(volume: Volume) -> bool:
    """Whether its voxels are those of `stored_grid`, up to the order of the axes: not so once it was resampled."""
    shape, affine = canonical_grid(stored_grid(volume))
    return same_grid(volume, Volume(np.broadcast_to(False, (1, *shape)), affine))


def to_stored_grid(volume: Volume) -> Volume:
    """The volume resampled to `stored_grid` (linearly, or to the nearest voxel when it holds integers) if it is not on it."""
    if on_stored_grid(volume):
        return volume
    return resample_to(volume, *canonical_grid(stored_grid(volume)), nearest=volume.array.dtype.kind in "biu")


def to_nibabel(
    volume: Volume, *, dtype: type[np.number] | np.dtype | None = None, description: str = ""
) -> nib.Nifti1Image:
    """The volume as a NIfTI image on the grid of the file that it came from: shape, orientation, affine, form codes.

    A volume that was resampled meanwhile is resampled back (`to_stored_grid`). A volume without a source is written as it
    is. Channels become the fourth axis. `dtype` is that of the voxels
    (rounded, where it is one of integers); by default float32, or the smallest that holds the integers. `description`
    goes to the header (at most 79 bytes).
    """
    source = stored_grid(volume)
    array = stored_order(to_stored_grid(volume).array, source)
    if array.shape[3] == 1:
        array = array[..., 0]
    array = _storable(array) if dtype is None else array if array.dtype == dtype else rounded(array, dtype)
    return image_on_grid(array, source, description)


def stored_order(array: np.ndarray, grid: SourceGrid) -> np.ndarray:
    """(C, X, Y, Z) in RAS+ order as a view (I, J, K, C) in the order of a stored grid."""
    orientation = ornt_transform(io_orientation(np.eye(4)), io_orientation(grid.affine))
    return apply_orientation(np.moveaxis(array, 0, -1), orientation)


def rounded(array: np.ndarray, dtype: type[np.number] | np.dtype) -> np.ndarray:
    """The array as `dtype`, rounded where it is one of integers; plane by plane, in the order of a NIfTI file.

    Raises: ValueError for values that integers of `dtype` cannot hold: they would wrap around.
    """
    result = np.empty(array.shape, dtype, order="F")
    limits = np.iinfo(result.dtype) if result.dtype.kind in "iu" else None
    for index in np.ndindex(array.shape[2:]):
        plane = array[:, :, *index]
        if limits is not None and plane.size:
            plane = np.rint(plane) if plane.dtype.kind == "f" else plane
            low, high = plane.min().item(), plane.max().item()
            if not limits.min <= low <= high <= limits.max:
                raise ValueError(
                    f"voxels from {low:g} to {high:g} do not fit {result.dtype} ({limits.min} to {limits.max}); "
                    "write them as float32, or scale them first"
                )
        result[:, :, *index] = plane
    return result


def image_on_grid(array: np.ndarray, source: SourceGrid, description: str = "") -> nib.Nifti1Image:
    """Voxels (I, J, K) or (I, J, K, C) in stored order as an image with the header of their grid."""
    if len(description.encode()) > DESCRIPTION_BYTES:
        raise ValueError(
            f"a NIfTI description has at most {DESCRIPTION_BYTES} bytes, not {len(description.encode())}: {description!r}"
        )
    image = nib.Nifti1Image(array, source.affine)
    image.set_sform(source.affine, source.sform_code)
    image.set_qform(source.qform if source.qform is not None else source.affine, source.qform_code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    return image


def write_volume(volume: Volume, path: str | os.PathLike, *, description: str = "") -> None:
    """Write `to_nibabel(volume)` to a .nii or .nii.gz file, in one step: nobody ever finds it half written."""
    path = nifti_path(path)
    image = to_nibabel(volume, description=description)
    with in_one_step(path) as (unfinished,):
        nib.save(image, unfinished)


def nifti_path(path: str | os.PathLike) -> Path:
    """The path of a file to write. Raises: ValueError unless it ends in .nii.gz or .nii."""
    path = Path(path)
    if not path.name.endswith((".nii.gz", ".nii")):
        raise ValueError(f"{path}: name it .nii.gz or .nii")
    return path


@contextmanager
def in_one_step(*paths: Path) -> Iterator[list[Path]]:
    """Files to write instead of `paths` (all in one folder, which is made), that take their places, in this order, when
    the block ends. Where it ends in an error, nothing of them is left."""
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as hidden:
        unfinished = [Path(hidden) / path.name for path in paths]
        yield unfinished
        for made, path in zip(unfinished, paths, strict=True):
            os.replace(made, path)


def open_nifti(source: Readable, *, check_gzip: bool = True) -> tuple[str, Nifti1Pair]:
    """Name (for messages) and header of a NIfTI file or image; voxels are not read yet, only checked if they are gzip.

    Raises: VolumeError for what is no NIfTI file, or a damaged one.
    """
    if isinstance(source, Nifti1Pair):
        return str(source.get_filename() or "nibabel image"), source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"expected a path or a nibabel NIfTI image, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise VolumeError(f"{path}: no such file")
    if path.is_dir():
        raise VolumeError(f"{path}: is a folder; give a NIfTI file")
    _refuse_pointer(path)
    if check_gzip:
        gunzip(path)
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise VolumeError(f"{path}: cannot be read as NIfTI: {error}") from error
    if not isinstance(image, Nifti1Pair):
        raise VolumeError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    for part in {Path(str(holder.filename)) for holder in image.file_map.values()} - {path}:
        if check_gzip:
            gunzip(part)  # the other half of a pair
    return str(path), image


def _refuse_pointer(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be opened: {error.strerror}") from error
    if not start:
        raise VolumeError(f"{path}: is empty")
    if start.startswith(b"version https://git-lfs"):
        raise VolumeError(f"{path}: is a Git LFS pointer, not the volume itself; fetch it with `git lfs pull`")


def gunzip(path: Path, to: BinaryIO | None = None) -> None:
    """Decompress a .gz file to the end, into `to` or only to find a wrong checksum or trailing data: nibabel stops at
    the last voxel."""
    if path.suffix == ".gz":
        for piece in _gunzipped(path):
            if to is not None:
                to.write(piece)


def _gunzipped(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            while piece := file.read(COPY_BYTES):
                yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeError(f"{path}: damaged gzip file: {error}") from error


def check_scalar(name: str, image: Nifti1Pair) -> None:
    """Raises: VolumeError unless the voxels are real numbers."""
    dtype = np.dtype(image.get_data_dtype())
    if dtype.names is not None:
        raise VolumeError(f"{name}: is a colour image ({''.join(dtype.names)}); only scalar images are supported")
    if dtype.kind == "c":
        raise VolumeError(f"{name}: holds complex numbers; save its magnitude")


def _values(name: str, image: Nifti1Pair) -> np.ndarray:
    """All voxels as stored on disk, slope and intercept applied."""
    check_scalar(name, image)
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError) as error:
        raise VolumeError(f"{name}: its voxels cannot be read: {' '.join(str(error).split())}") from error
    return values


def _channels_last(values: np.ndarray, name: str) -> np.ndarray:
    return values.reshape(shape_with_channels(values.shape, name))


def shape_with_channels(shape: tuple[int, ...], name: str) -> tuple[int, int, int, int]:
    """(X, Y, Z), (X, Y, Z, C) or (X, Y, Z, 1, C), possibly with trailing axes of length 1, as (X, Y, Z, C)."""
    if 0 in shape:
        raise VolumeError(f"{name}: holds no voxels (shape {shape})")
    if len(shape) < 3:
        raise VolumeError(f"{name}: has shape {shape}; a volume has three spatial axes")
    extra = [n for n in shape[3:] if n != 1]
    if len(extra) > 1:
        raise VolumeError(f"{name}: has shape {shape}; at most one axis may follow X, Y and Z")
    return shape[0], shape[1], shape[2], extra[0] if extra else 1


def _canonical(values: np.ndarray, image: Nifti1Pair, name: str) -> Volume:
    """Voxels (I, J, K, C) in the order of the file to a Volume in RAS+."""
    source = grid_of(image, values.shape[:3], name)
    array = apply_orientation(values, io_orientation(source.affine))
    return Volume(np.ascontiguousarray(np.moveaxis(array, -1, 0)), canonical_grid(source)[1], source)


def grid_of(image: Nifti1Pair, shape: tuple[int, int, int], name: str) -> SourceGrid:
    """The grid on which a file stores its voxels. Raises: VolumeError if its geometry is broken."""
    try:
        affine = _millimetres(image, image.affine)
        check_affine(affine)
        qform, qform_code = image.get_qform(coded=True)
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"{name}: its geometry is broken: {error}") from error
    return SourceGrid(
        shape=shape,
        affine=affine,
        qform=None if qform is None else _millimetres(image, qform),
        qform_code=int(qform_code),
        sform_code=int(image.header["sform_code"]),
    )


def canonical_grid(source: SourceGrid) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of a stored grid after its axes are permuted and flipped to RAS+."""
    orientation = io_orientation(source.affine)
    shape = [0, 0, 0]
    for stored_axis, axis in enumerate(orientation[:, 0].astype(int)):
        shape[axis] = source.shape[stored_axis]
    return (shape[0], shape[1], shape[2]), source.affine @ inv_ornt_aff(orientation, source.shape)


def _millimetres(image: Nifti1Pair, affine: np.ndarray | None) -> np.ndarray:
    """The affine in mm, whatever length unit the header declares."""
    if affine is None:
        raise ValueError("the image has no affine")
    scale = MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ np.asarray(affine, dtype=np.float64)


def _storable(array: np.ndarray) -> np.ndarray:
    """In a type that every NIfTI reader knows: float32, or the smallest of uint8, int16 and int32 that holds the integers."""
    if array.dtype.kind == "f":
        return np.asarray(array, dtype=np.float32)
    if array.dtype.kind not in "biu":
        raise ValueError(f"voxels of type {array.dtype} cannot be written as NIfTI")
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise ValueError(f"integers from {low} to {high} do not fit the int32 of NIfTI")

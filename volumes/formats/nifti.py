"""NIfTI files to voxels, and volumes to NIfTI files.

That is .nii, .nii.gz and .hdr/.img pairs, NIfTI-1 and -2, either byte order, slope and intercept, qform or sform.

A file that cannot be read reliably is refused with a `VolumeError` that names it and says why; nothing is guessed. A
header is only trusted once the file is known to hold as many bytes as it promises.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from files.atomic import atomic_file
from volumes.resampling import resample_to
from volumes.volume import (
    SourceGrid,
    Volume,
    VolumeError,
    check_affine,
    same_grid,
)

from .contents import GZIP, check_content
from .raw import (
    COPY_BYTES,
    RawVolume,
    check_grid,
    check_room,
    in_millimeters,
    refuse_special_volume,
)

Readable = str | os.PathLike | Nifti1Pair


class VoxelError(ValueError):
    """Voxels that no file should hold: NaN, infinite, or beyond what their type in the file can hold."""


LENGTH_UNITS = {1: "m", 2: "mm", 3: "um"}  # by the low three bits of xyzt_units; anything else is taken as mm
MAX_CHANNELS_FIRST = 16  # an axis that is shorter, and a quarter of all others, is one of channels
SYNTHETIC = b"synthetic;"  # begins the description of what this package generated, whose header is right
DESCRIPTION_BYTES = 79  # the header's `descrip` field is 80 bytes, the last one NUL
NIFTI_SUFFIXES = (".nii.gz", ".hdr.gz", ".img.gz", ".nii", ".hdr", ".img")
MAX_HEADER_BYTES = 1 << 26  # of a header with its extensions, and of what may follow the voxels in a file


def read_nifti(source: Readable, *, units: str | None = None, axes: str | None = None) -> RawVolume:
    """Read voxels, slope and intercept applied, and grid of a NIfTI file (or image).

    Args:
        units: unit of the header's lengths if the header is wrong, one of `raw.UNITS`. Ignored for generated files.
        axes: one of `AXES`; by default X, Y, Z and then channels. A file that seems to have another order is refused.
    Raises: VolumeError for a file that is broken, truncated, in color, complex or sheared.
    """
    name, image = open_nifti(source)
    check_scalar(name, image)
    check_room(name, image.shape, np.dtype(image.get_data_dtype()).itemsize)
    if bytes(np.asarray(image.header["descrip"]).item()).startswith(SYNTHETIC):
        units, axes = None, "XYZC"
    values = _channels_last(_values(name, image), name, axes)
    x, y, z, _ = values.shape
    return RawVolume(name, values, grid_of(image, (x, y, z), name, units))


def stored_grid(volume: Volume) -> SourceGrid:
    """Return the grid on which a volume is written: that of its source file, or its own."""
    return volume.source or SourceGrid(volume.shape, volume.affine, volume.affine, qform_code=1, sform_code=1)


def on_stored_grid(volume: Volume) -> bool:
    """Return whether its voxels are those of `stored_grid`, up to the order of the axes: not after resampling."""
    shape, affine = canonical_grid(stored_grid(volume))
    return same_grid(volume, Volume(np.broadcast_to(False, (1, *shape)), affine))


def to_stored_grid(volume: Volume) -> Volume:
    """Resample the volume to `stored_grid` if necessary: linearly, or to the nearest voxel if it holds integers."""
    if on_stored_grid(volume):
        return volume
    return resample_to(volume, *canonical_grid(stored_grid(volume)), nearest=volume.array.dtype.kind in "biu")


def to_nibabel(
    volume: Volume, *, dtype: type[np.number] | np.dtype | None = None, description: str = ""
) -> nib.Nifti1Image:
    """Convert the volume to a NIfTI image on the grid of its source file: shape, orientation, affine, form codes.

    A volume that was resampled is resampled back (`to_stored_grid`). A volume without a source is written as it is.
    Channels become the fourth axis. `dtype` is that of the voxels (integers are rounded); by default float32, or the
    smallest type that holds the integers. `description` goes to the header (at most 79 bytes).
    """
    source = stored_grid(volume)
    array = stored_order(to_stored_grid(volume).array, source)
    if array.shape[3] == 1:
        array = array[..., 0]
    if dtype is not None and array.dtype == dtype:
        check_voxels(array, array.dtype)
    else:
        array = _storable(array) if dtype is None else rounded(array, dtype)
    return image_on_grid(array, source, description)


def stored_order(array: np.ndarray, grid: SourceGrid) -> np.ndarray:
    """View (C, X, Y, Z) in RAS+ order as (I, J, K, C) in the order of a stored grid."""
    orientation = ornt_transform(io_orientation(np.eye(4)), io_orientation(grid.affine))
    return apply_orientation(np.moveaxis(array, 0, -1), orientation)


def rounded(array: np.ndarray, dtype: type[np.number] | np.dtype) -> np.ndarray:
    """Convert the array to `dtype`, rounded for integers; plane by plane, in the order of a NIfTI file.

    Raises: VoxelError for values that are not finite, or that `dtype` cannot hold: they would wrap around, or become
    infinite.
    """
    result = np.empty(array.shape, dtype, order="F")
    for index in np.ndindex(array.shape[2:]):
        plane = array[:, :, *index]
        check_voxels(plane, result.dtype)
        result[:, :, *index] = np.rint(plane) if result.dtype.kind in "iu" and plane.dtype.kind == "f" else plane
    return result


def check_voxels(array: np.ndarray, dtype: np.dtype) -> None:
    """Raise VoxelError for values that are not finite, or that `dtype`, the type to store them in, cannot hold."""
    if not array.size or (array.dtype == dtype and dtype.kind in "biu"):
        return
    low, high = array.min().item(), array.max().item()  # NaN, if there is any
    if not (math.isfinite(low) and math.isfinite(high)):
        raise VoxelError(
            "voxels are not finite (NaN or infinite) in the units of the file; look for values that are not finite in "
            "the weights, the conditions and the intensity scale"
        )
    if dtype.kind == "f":
        least, most = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    else:
        least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        low, high = round(low), round(high)
    if not least <= low <= high <= most:
        remedy = "scale them first" if dtype.kind == "f" else "write them as float32, or scale them first"
        raise VoxelError(f"voxels from {low:g} to {high:g} do not fit {dtype} ({least:g} to {most:g}); {remedy}")


def image_on_grid(array: np.ndarray, source: SourceGrid, description: str = "") -> nib.Nifti1Image:
    """Return voxels (I, J, K) or (I, J, K, C) in stored order as an image with the header of their grid."""
    check_description(description)
    image = nib.Nifti1Image(array, source.affine)
    image.set_sform(source.affine, source.sform_code)
    image.set_qform(source.qform if source.qform is not None else source.affine, source.qform_code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    return image


def check_description(description: str) -> None:
    """Raises: ValueError for a description that the header of a NIfTI file has no room for."""
    length = len(description.encode())
    if length > DESCRIPTION_BYTES:
        raise ValueError(f"a NIfTI description has at most {DESCRIPTION_BYTES} bytes, not {length}: {description!r}")


def write_volume(volume: Volume, path: str | os.PathLike, *, description: str = "") -> None:
    """Write `to_nibabel(volume)` to a .nii or .nii.gz file, in one step: nobody ever finds it half written.

    Raises: VoxelError for values that are not finite, or that the type of the file cannot hold.
    """
    path = nifti_path(path)
    image = to_nibabel(volume, description=description)
    with atomic_file(path) as unfinished:
        nib.save(image, unfinished)


def nifti_path(path: str | os.PathLike) -> Path:
    """Return the path of a file to write. Raises: ValueError unless it is a name that ends in .nii.gz or .nii."""
    path = Path(path)
    if not path.name.endswith((".nii.gz", ".nii")) or path.name in (".nii.gz", ".nii"):
        raise ValueError(f"{path}: name it .nii.gz or .nii")
    return path


def open_nifti(source: Readable, *, check: bool = True) -> tuple[str, Nifti1Pair]:
    """Return name (for messages) and header of a NIfTI file or image; voxels are not read yet. With `check`, the file
    is checked to hold all voxels, and gzip data to be intact.

    Raises: VolumeError unless it is an intact NIfTI file that holds as much as its header says.
    """
    if isinstance(source, Nifti1Pair):
        return str(source.get_filename() or "nibabel image"), source
    path = Path(source)
    if not path.exists():
        raise VolumeError(f"{path}: no such file")
    if path.is_dir():
        raise VolumeError(f"{path}: is a folder; give a NIfTI file")
    try:
        for half in {path, _header_path(path)}:
            check_content(half)
        image = _nifti_class(path).from_filename(path)
        shape, dtype = image.shape, np.dtype(image.get_data_dtype())
        proxy: Any = image.dataobj
        start, voxels = int(proxy.offset), math.prod(map(int, shape)) * dtype.itemsize
    except VolumeError:
        raise
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        OverflowError,
    ) as error:
        raise VolumeError(f"{path}: cannot be read as NIfTI: {' '.join(str(error).split())}") from error
    for holder in image.file_map.values():
        refuse_special_volume(Path(str(holder.filename)))
    if min(shape, default=0) < 0 or start < 0:
        raise VolumeError(f"{path}: cannot be read as NIfTI: its shape is {shape}, its voxels begin at byte {start}")
    for part in {Path(str(holder.filename)) for holder in image.file_map.values()} if check else ():
        last = start + voxels if part == Path(str(image.file_map["image"].filename)) else 0
        zipped = part.suffix.lower() == ".gz"
        size = gunzip(part, most=last + MAX_HEADER_BYTES) if zipped else part.stat().st_size
        if size < last:
            with open(part, "rb") as file:
                packed = not zipped and file.read(len(GZIP)) == GZIP
            what = f"it is gzip, rename both files to .hdr.gz and {part.suffix}.gz" if packed else "it is truncated"
            raise VolumeError(
                f"{path}: its voxels cannot be read: Expected {voxels} bytes, got {max(size - start, 0)} bytes; {what}"
            )
    return str(path), image


def _nifti_class(path: Path) -> type[Nifti1Pair]:
    """Return the class for the magic number of the header: nibabel would also try unrelated formats."""
    single, header = path.name.lower().removesuffix(".gz").endswith(".nii"), _header_path(path)
    with gzip.open(header) if header.suffix.lower() == ".gz" else open(header, "rb") as file:
        start = file.read(348)
        start += file.read(192) if start[4:8] in (b"n+2\0", b"ni2\0") else b""
    if start[344:348] in (b"n+1\0", b"ni1\0"):
        kind = nib.Nifti1Image if single else Nifti1Pair
    elif start[4:8] in (b"n+2\0", b"ni2\0"):
        kind = nib.Nifti2Image if single else nib.Nifti2Pair
    else:
        raise ImageFileError("its header has no magic number of NIfTI")
    header = kind.header_class(start[: kind.header_class.template_dtype.itemsize], check=False)
    if not int(header["sform_code"]) and (header["pixdim"][1:4] == 0).any():  # for which nibabel would put 1
        sizes = " x ".join(f"{mm:g}" for mm in header["pixdim"][1:4])
        raise VolumeError(
            f"{path}: its geometry is broken: its voxels are {sizes} (pixdim), and it has no sform; write their sizes "
            "into the header"
        )
    return kind


def _header_path(path: Path) -> Path:
    """Return the file with the header: of a .hdr/.img pair, the first."""
    return path.with_name(re.sub(r"\.img(\.gz)?$", r".hdr\1", path.name, flags=re.IGNORECASE))


def gunzip(path: Path, to: BinaryIO | None = None, *, most: int | None = None) -> int:
    """Decompress a .gz file to the end, into `to`, or only to detect a wrong checksum or trailing data: nibabel stops
    at the last voxel.

    Returns: how many bytes it holds. Raises: VolumeError for a damaged file, and for one that holds more than `most`
    bytes.
    """
    size = 0
    try:
        with gzip.open(path) as file:
            while piece := file.read(COPY_BYTES):
                size += len(piece)
                if most is not None and size > most:
                    raise VolumeError(f"{path}: holds far more than the {most} bytes that its header states")
                if to is not None:
                    to.write(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeError(f"{path}: damaged gzip file: {error}") from error
    return size


def check_scalar(name: str, image: Nifti1Pair) -> None:
    """Raise VolumeError unless the voxels are real numbers."""
    dtype = np.dtype(image.get_data_dtype())
    if dtype.names is not None:
        raise VolumeError(f"{name}: is a color image ({''.join(dtype.names)}); only scalar images are supported")
    if dtype.kind == "c":
        raise VolumeError(f"{name}: holds complex numbers; save its magnitude")


def _values(name: str, image: Nifti1Pair) -> np.ndarray:
    """Read all voxels as stored on disk, slope and intercept applied."""
    check_scalar(name, image)
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError) as error:
        raise VolumeError(f"{name}: its voxels cannot be read: {' '.join(str(error).split())}") from error
    return values


def exact_values(values: np.ndarray) -> np.ndarray:
    """Return the same values as integers of up to 32 bits if they are integers, else as float32 or float64."""
    if values.dtype.kind in "biu":
        if values.dtype.kind != "b" and values.dtype.itemsize < 8:
            return values.astype(values.dtype.newbyteorder("="))
        limits = np.iinfo(np.int32)
        fits = limits.min <= int(values.min()) and int(values.max()) <= limits.max
        return values.astype(np.uint8 if values.dtype.kind == "b" else np.int32 if fits else np.float64)
    single = values.astype(np.float32)
    return single if (single == values).all() else values.astype(np.float64)


def _channels_last(values: np.ndarray, name: str, axes: str | None) -> np.ndarray:
    """Return the array as (X, Y, Z, C). Raises: VolumeError for a shape that is not a volume's, and for one that may
    begin with channels unless `axes` is set.
    """
    if axes == "CXYZ":
        values = np.moveaxis(values.reshape(_channels_before(values.shape, name)), 0, -1)
    elif axes is None and _may_begin_with_channels(values.shape):
        raise VolumeError(
            f"{name}: has shape {values.shape}: its first axis looks like one of channels, not of space; save it with "
            "channels last (nibabel: (X, Y, Z) or (X, Y, Z, C)), or set data.axes: CXYZ in the training's config, or "
            "XYZC if it is right"
        )
    return values.reshape(shape_with_channels(values.shape, name))


def _may_begin_with_channels(shape: tuple[int, ...]) -> bool:
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 4 or shape[3] == 1:
        return False
    return shape[0] == 1 or (shape[0] < MAX_CHANNELS_FIRST and 4 * shape[0] <= min(shape[1:4]))


def _channels_before(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return (C, X, Y, Z) for a shape that begins with channels, after axes of length 1; for (X, Y, Z), one channel."""
    given = shape
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    while len(shape) > 4 and shape[0] == 1:
        shape = shape[1:]
    shape = (1, *shape) if len(shape) == 3 else shape
    if len(shape) != 4:
        raise VolumeError(f"{name}: has shape {given}, and data.axes is CXYZ; expected (C, X, Y, Z)")
    return shape


def shape_with_channels(shape: tuple[int, ...], name: str) -> tuple[int, int, int, int]:
    """Return (X, Y, Z), (X, Y, Z, C) or (X, Y, Z, 1, C), possibly with trailing axes of length 1, as (X, Y, Z, C)."""
    if 0 in shape:
        raise VolumeError(f"{name}: holds no voxels (shape {shape})")
    if len(shape) < 3:
        raise VolumeError(f"{name}: has shape {shape}; a volume has three spatial axes")
    extra = [n for n in shape[3:] if n != 1]
    if len(extra) > 1:
        raise VolumeError(f"{name}: has shape {shape}; at most one axis may follow X, Y and Z")
    return shape[0], shape[1], shape[2], extra[0] if extra else 1


def grid_of(image: Nifti1Pair, shape: tuple[int, int, int], name: str, units: str | None = None) -> SourceGrid:
    """Return the grid on which a file stores its voxels. Raises: VolumeError if its geometry is broken."""
    unit = LENGTH_UNITS.get(int(image.header["xyzt_units"]) & 7, "unknown")
    try:
        if image.affine is None:
            raise ValueError("the image has no affine")
        affine = in_millimeters(image.affine, units or unit)
        check_grid(affine, "mm" if units else unit)
        qform_code = int(image.header["qform_code"])
        qform = _qform(image) if qform_code else None
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"{name}: its geometry is broken: {error}") from error
    return SourceGrid(
        shape=shape,
        affine=affine,
        qform=None if qform is None else in_millimeters(qform, units or unit),
        qform_code=qform_code,
        sform_code=int(image.header["sform_code"]),
        unit="mm" if units else unit,
    )


def _qform(image: Nifti1Pair) -> np.ndarray | None:
    """Return the header's second transform; None if it is invalid: it holds numbers that are not finite, or that do not
    make a rotation.
    """
    try:
        qform = image.get_qform()
        check_affine(qform)
    except (HeaderDataError, ValueError):
        return None
    return qform


def canonical_grid(source: SourceGrid) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of a stored grid after its axes are permuted and flipped to RAS+."""
    orientation = io_orientation(source.affine)
    shape = [0, 0, 0]
    for stored_axis, axis in enumerate(orientation[:, 0].astype(int)):
        shape[axis] = source.shape[stored_axis]
    return (shape[0], shape[1], shape[2]), source.affine @ inv_ornt_aff(orientation, source.shape)


def _storable(array: np.ndarray) -> np.ndarray:
    """Convert to a type that every NIfTI reader knows: float32, or the smallest of uint8, int16 and int32 that holds
    the integers.
    """
    if array.dtype.kind == "f":
        check_voxels(array, np.dtype(np.float32))
        return np.asarray(array, dtype=np.float32)
    if array.dtype.kind not in "biu":
        raise ValueError(f"voxels of type {array.dtype} cannot be written as NIfTI")
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise ValueError(f"integers from {low} to {high} do not fit the int32 of NIfTI")

"""Images of other libraries, in memory, that carry their geometry: nibabel, SimpleITK, MONAI and torchio.

None of these libraries is imported here but nibabel: an object's class tells which library it is from. An object that
is known to carry geometry and cannot be read is refused by name; arrays without geometry are not handled here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nibabel.analyze import AnalyzeImage
from nibabel.nifti1 import Nifti1Pair
from nibabel.spatialimages import SpatialImage

from volumes.volume import VolumeError

from .nifti import read_nifti, shape_with_channels
from .raw import LPS_TO_RAS, RawVolume, make_grid

WRITE_IT = "write it to a NIfTI file and give the path"
REMEDIES = {
    "SimpleITK": WRITE_IT,
    "ants": f"{WRITE_IT} (ants.image_write)",
    "itk": f"{WRITE_IT} (itk.imwrite)",
    "nibabel": "give nibabel.Nifti1Image(voxels, affine) with the affine that you know",
    "pydicom": "give the folder of its series",
    "torchio": "give one of its images, such as subject['t1']",
    "vtkmodules": WRITE_IT,
    "xarray": "give nibabel.Nifti1Image(array.values, affine) with the affine that you know",
}
"""What to give instead of an object whose geometry is not read, by the library that it is from."""


def carries_geometry(source: Any) -> bool:
    """Return whether an object is an image of a library whose images know their position: an array or a tensor with an
    `affine` (MONAI's MetaTensor), or any object of nibabel, SimpleITK, torchio and the libraries of `REMEDIES`.
    """
    return _has_affine(source) or _library(source) is not None


def read_carrier(source: Any) -> RawVolume:
    """Return the voxels of such an object, in its own order of axes, and their grid.

    Arrays and tensors with an `affine`, and torchio's images, are (X, Y, Z) or (C, X, Y, Z).

    Raises: VolumeError for an object whose geometry cannot be read, naming the remedy, and for images that are broken,
    in color, complex or sheared.
    """
    if isinstance(source, Nifti1Pair):
        return read_nifti(source)
    reader = _reader(source)
    if reader is None:
        remedy = REMEDIES[_library(source) or ""]
        raise VolumeError(
            f"{type(source).__module__}.{type(source).__qualname__}: this kind of image is not read; {remedy}"
        )
    name = f"{source_file(source) or type(source).__name__}"
    values, affine = reader(source, name)
    if affine.shape != (4, 4):
        raise VolumeError(f"{name}: an affine is 4 x 4; got {affine.shape}")
    if values.dtype.kind not in "biuf":
        raise VolumeError(f"{name}: holds {values.dtype}; only real numbers are supported")
    values = values.reshape(shape_with_channels(values.shape, name))
    return RawVolume(name, values, make_grid(name, values.shape[:3], affine))


def source_file(source: Any) -> str | None:
    """Return the file that an image in memory was read from; None if it does not say."""
    if isinstance(source, SpatialImage):
        found = source.get_filename()
    else:
        meta = getattr(source, "meta", None)
        found = meta.get("filename_or_obj") if isinstance(meta, dict) else None
        found = getattr(source, "path", None) if _library(source) == "torchio" else found
    return str(found) if isinstance(found, str | os.PathLike) and str(found) else None


def as_array(array: Any, name: str = "the array") -> np.ndarray:
    """Convert an array or tensor, on any device, to an array of real numbers; types that numpy lacks (bfloat16, eight
    bits) become float32. Messages call it `name`.

    Raises: VolumeError for a masked array, whose mask would be lost, a tensor without values or not dense, and for
    anything but real numbers.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise VolumeError(f"{name}: is a masked array, whose mask would be lost; fill it first (array.filled(value))")
    if isinstance(array, torch.Tensor):
        array = plain_tensor(array).detach()
        if array.is_meta:
            raise VolumeError(f"{name}: is on the device meta, and has no values; give one on another device")
        if array.layout != torch.strided or array.is_quantized:
            raise VolumeError(
                f"{name}: is sparse or quantized; give a dense tensor (tensor.to_dense(), tensor.dequantize())"
            )
        small = array.is_floating_point() and (array.dtype == torch.bfloat16 or array.dtype.itemsize == 1)
        array = (array.float() if small else array).resolve_conj().resolve_neg().cpu().numpy()
    array = np.asarray(array)
    if array.dtype.kind == "O":  # of numbers, by chance
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise VolumeError(f"{name}: holds objects that are not numbers; give numbers") from error
    if array.dtype.kind not in "biuf":
        raise VolumeError(f"{name}: holds {array.dtype}; give real numbers")
    return array


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as a plain torch.Tensor: results computed from a subclass would have that subclass."""
    return tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)


def _library(source: Any) -> str | None:
    """Return the library of `REMEDIES` that defines an object's class, or a class that it inherits from."""
    roots = (one.__module__.partition(".")[0] for one in type(source).__mro__)
    return next((root for root in roots if root in REMEDIES), None)


def _has_affine(source: Any) -> bool:
    return isinstance(source, np.ndarray | torch.Tensor) and getattr(source, "affine", None) is not None


def _reader(source: Any) -> Callable[[Any, str], tuple[np.ndarray, np.ndarray]] | None:
    if _has_affine(source):
        return _read_tensor
    if isinstance(source, SpatialImage) and not isinstance(source, AnalyzeImage):  # which has no orientation
        return lambda image, name: (np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64))
    if _library(source) == "SimpleITK" and hasattr(source, "GetDirection"):
        return _read_simple_itk
    if _library(source) == "torchio" and isinstance(getattr(source, "data", None), torch.Tensor):
        return lambda image, name: (
            _channels_last(as_array(image.data, name)),
            np.asarray(image.affine, dtype=np.float64),
        )
    return None


def _read_tensor(tensor: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a MetaTensor, or another array with an affine."""
    if getattr(tensor, "has_pending_operations", False):
        raise VolumeError(
            f"{name}: has transforms that are still pending; apply them first (monai.transforms.apply_pending)"
        )
    affine = np.asarray(as_array(tensor.affine), dtype=np.float64)
    space = str(getattr(tensor, "meta", {}).get("space") or "RAS")
    if space not in ("RAS", "LPS"):
        raise VolumeError(f"{name}: its affine leads to {space!r}; RAS and LPS are known")
    if space == "LPS" and affine.shape == (4, 4):
        affine = LPS_TO_RAS @ affine
    return _channels_last(as_array(tensor, name)), affine


def _read_simple_itk(image: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    dimension = image.GetDimension()
    if dimension not in (3, 4):
        raise VolumeError(f"{name}: has {dimension} dimensions; a volume has three")
    if "label" in image.GetPixelIDTypeAsString():
        raise VolumeError(f"{name}: is a list of label objects; give SimpleITK.LabelMapToLabel(image)")
    stored = sys.modules["SimpleITK"].GetArrayViewFromImage(image)  # (K, J, I), channels last, time first
    if dimension == 4 and stored.ndim == 5:
        raise VolumeError(f"{name}: has both a time axis and several components; give one of them")
    values = stored.transpose(*reversed(range(dimension)), *range(dimension, stored.ndim))
    direction = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return values, LPS_TO_RAS @ affine


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, -1) if array.ndim == 4 else array

"""The valid volumes that tests/helpers/fuzz.py damages, and what reads them."""

import gzip
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from fuzz import Files, Target
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from volumes import Case, DataConfig, Volume, read_slabs, read_volume, write_dicom
from volumes.prepared.case import prepare

ARRAY = np.random.default_rng(0).integers(0, 500, (5, 6, 7)).astype(np.int16)
AFFINE = np.array([[-1.5, 0.1, 0, 3], [0.1, 2, 0, 4], [0, 0, 2.5, -5], [0, 0, 0, 1]])
SUFFIXES = (".nii", ".nii.gz", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")


def collected(write: Callable[[Path], object]) -> Files:
    """What a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {
            path.relative_to(name).as_posix(): path.read_bytes()
            for path in sorted(Path(name).rglob("*"))
            if path.is_file()
        }


def read_any(home: Path) -> None:
    """Read the volume in a folder in every way: whole, in slabs, and as a case that is resampled."""
    path = next((p for p in sorted(home.iterdir()) if p.name.endswith(SUFFIXES)), home)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32 and volume.array.size and np.isfinite(volume.array).all()
    assert np.isfinite(volume.affine).all() and "".join(nib.aff2axcodes(volume.affine)) == "RAS"
    if path.name.endswith(SUFFIXES[:3]):
        slabs = list(read_slabs(path, 3))
        np.testing.assert_array_equal(np.concatenate(slabs, axis=3), volume.array)
    config = DataConfig(images="*", time_point=0, spacing=(2.0, 2.0, 2.0), validation_fraction=0)
    prepared = prepare(Case("case", "case", images={"image": path}), config)
    assert np.abs(prepared.image.array).max() <= 1


def nifti_files() -> list[Files]:
    image = nib.Nifti1Image(ARRAY, AFFINE)
    scaled = nib.Nifti1Image(ARRAY.astype(np.float64) / 7, AFFINE)
    scaled.set_data_dtype(np.int16)
    four = nib.Nifti1Image(np.stack([ARRAY, ARRAY + 1], -1).astype(np.float32), AFFINE)
    two = nib.Nifti2Image(ARRAY, AFFINE)
    big = nib.Nifti1Image(ARRAY.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">"))
    kinds = (image, scaled, four, two, big)
    found: list[Files] = [{"a.nii": one.to_bytes()} for one in kinds]
    found += [{"a.nii.gz": gzip.compress(one.to_bytes())} for one in kinds[:2]]
    pair = collected(lambda folder: nib.save(nib.Nifti1Pair(ARRAY, AFFINE), folder / "a.hdr"))
    return [*found, pair]


def dicom_files() -> list[Files]:
    volume = Volume(ARRAY[None, :, :, :4], np.diag([1.0, 2.0, 3.0, 1.0]))

    def write(folder: Path, syntax: Any) -> None:
        for path in write_dicom(volume, folder / "s", modality="CT", software="s", model="m", seed=1):
            one = pydicom.dcmread(path)
            if syntax == RLELossless:
                one.compress(RLELossless)
            elif syntax == ExplicitVRBigEndian:
                one.PixelData = one.pixel_array.astype(">i2").tobytes()
            one.file_meta.TransferSyntaxUID = syntax
            if syntax is None:
                one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            pydicom.dcmwrite(folder / path.name, one, enforce_file_format=True, **_encoding(syntax))
            path.unlink()

    return [
        collected(lambda folder, syntax=syntax: write(folder, syntax))
        for syntax in (None, RLELossless, ExplicitVRBigEndian, ImplicitVRLittleEndian)
    ]


def _encoding(syntax: Any) -> dict[str, bool]:
    if syntax not in (ExplicitVRBigEndian, ImplicitVRLittleEndian):
        return {}
    return {"implicit_vr": syntax == ImplicitVRLittleEndian, "little_endian": syntax == ImplicitVRLittleEndian}


def nrrd_files() -> list[Files]:
    head = "NRRD0005\n# comment\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 6 7\n"
    head += "space directions: (1,0,0.1) (0,2,0) (0,0,3)\nkinds: domain domain domain\nendian: little\n"
    head += 'space units: "mm" "mm" "mm"\nspace origin: (1,2,3)\nkey:=value\n'
    raw = ARRAY.tobytes("F")
    return [
        {"a.nrrd": f"{head}encoding: raw\n\n".encode() + raw},
        {"a.nrrd": f"{head}encoding: gzip\n\n".encode() + gzip.compress(raw)},
        {"a.nhdr": f"{head}encoding: raw\ndata file: a.raw\n".encode(), "a.raw": raw},
        {"a.nhdr": f"{head}encoding: gz\ndata file: a.raw.gz\n\n".encode(), "a.raw.gz": gzip.compress(raw)},
    ]


def metaimage_files() -> list[Files]:
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {}\n"
    head += "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nCenterOfRotation = 0 0 0\nElementSpacing = 1 2 3\n"
    head += "DimSize = 5 6 7\nElementType = MET_SHORT\nElementDataFile = {}\n"
    raw = ARRAY.tobytes("F")
    return [
        {"a.mha": head.format("False", "LOCAL").encode() + raw},
        {"a.mha": head.format("True", "LOCAL").encode() + zlib.compress(raw)},
        {"a.mhd": head.format("False", "a.raw").encode(), "a.raw": raw},
        {"a.mhd": head.format("True", "a.zraw").encode(), "a.zraw": zlib.compress(raw)},
    ]


def outlined_target(kind: str) -> Target:
    """A DICOM-SEG or RTSTRUCT beside its series, of which it alone is damaged; it is read with the image and without,
    by numbers and by names, and as `medvolume init` looks at it."""
    from layouts import segmentation
    from structures import on_slice, rtstruct, series_of

    from recipes.layouts.outlines import read_outline
    from volumes import read_mask

    def write(folder: Path) -> None:
        slices = series_of(Volume(ARRAY[None], np.diag([1.5, 2, 2.5, 1])), folder / "ct")
        (folder / "mask").mkdir()
        if kind == "SEG":
            labels = np.zeros(ARRAY.shape, np.uint8)
            labels[1:3, 1:4, 2:5], labels[3:, 4:, 1:3] = 1, 2
            segmentation(slices, labels, ["tumor", "node"]).save_as(folder / "mask/a.dcm")
        else:
            square = [(0.6, 0.6), (3.4, 0.6), (3.4, 3.4), (0.6, 3.4)]
            contours = [on_slice(square, k, np.diag([1.5, 2, 2.5, 1])) for k in (2, 3, 4)]
            far = [on_slice(np.add(square, (0, 3.5)), 3, np.diag([1.5, 2, 2.5, 1]))]
            drawn = rtstruct(slices, {"tumor": contours, "node": far})
            drawn.save_as(folder / "mask/a.dcm", enforce_file_format=True)

    def read(home: Path) -> None:
        path, image = home / "mask/a.dcm", read_volume(home / "ct")
        found = read_outline("mask", path, kind)
        assert isinstance(found, str) or all(isinstance(name, str) for name in found.segments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of regions that are cut, or hold no voxel
            whole = read_mask(path)
            named = read_mask(path, names={"tumor": 1, "node": 2}, like=image)
        for mask in (whole, named):
            assert mask.array.dtype == np.int16 and np.isfinite(mask.affine).all()
        assert set(np.unique(named.array)) <= {0, 1, 2}

    return Target("dicom_seg" if kind == "SEG" else "rtstruct", [collected(write)], read, mutable="mask/a.dcm".__eq__)

"""DICOM series, NRRD and MetaImage: the same volume as in NIfTI, read as ITK reads it, or refused by name and
reason."""

import csv
import gzip
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian

from pipelines import write_synthetic
from pipelines.storage import to_dicom
from volumes import (
    DataConfig,
    Volume,
    VolumeDataset,
    VolumeError,
    load_cases,
    read_mask,
    read_volume,
    same_grid,
    to_nibabel,
    volume_parts,
    volume_stem,
    write_dicom,
    write_volume,
)

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation() -> np.ndarray:
    """Of some 20 degrees about an axis that is not one of the grid."""
    axes = np.linalg.qr(np.array([[0.98, -0.2, 0.13], [0.2, 0.95, -0.17], [-0.1, 0.19, 0.98]]))[0]
    return axes * np.sign(np.diag(axes))


@pytest.fixture
def volume() -> Volume:
    """5 x 6 x 7 voxels of int16, all different, oblique and anisotropic, in HU."""
    affine = np.eye(4)
    affine[:3, :3] = rotation() * [1.0, 2.0, 3.0]
    affine[:3, 3] = [-10, 20, 30]
    return Volume(np.arange(-50, 160, dtype=np.int16).reshape(1, 5, 6, 7), affine)


def itk_image(volume: Volume) -> sitk.Image:
    """The same in ITK's terms, its voxels in the order of the volume."""
    image = sitk.GetImageFromArray(volume.array[0].T)
    lps = LPS @ volume.affine
    image.SetSpacing(volume.spacing)
    image.SetDirection((lps[:3, :3] / volume.spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def from_itk(image: sitk.Image) -> Volume:
    """As a volume in RAS+, by way of nibabel."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return read_volume(nib.Nifti1Image(sitk.GetArrayFromImage(image).T, LPS @ affine))


def itk_series(folder: Path) -> Volume:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return from_itk(reader.Execute())


def assert_equal(found: Volume, expected: Volume, atol: float = 0.0) -> None:
    np.testing.assert_allclose(found.array, expected.array, atol=atol, rtol=0)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)


@pytest.fixture
def series(volume, tmp_path) -> Path:
    """`volume` as a CT series whose file names sort wrongly as text, with other intercepts on every slice."""
    folder = tmp_path / "series"
    for k, path in enumerate(write_dicom(volume, folder, modality="CT", software="a test", model="0" * 64)):
        one = pydicom.dcmread(path)
        one.RescaleIntercept = str(-2 * k)
        one.set_pixel_data((one.pixel_array + 2 * k).astype(np.int16), "MONOCHROME2", 16)
        one.save_as(folder / f"{7 - k}{'0' * (k % 3)}.dcm")
        path.unlink()
    return folder


def change(path: Path, **values: object) -> None:
    """Change attributes of one slice, or of all in a folder."""
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        slice_ = pydicom.dcmread(one)
        for name, value in values.items():
            setattr(slice_, name, value)
        slice_.save_as(one)


def compress(path: Path) -> None:
    """In a way that is not read: a bomb could hide in it."""
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    one.save_as(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compress", [False, True])
def test_what_itk_writes_is_read(volume, suffix, compress, tmp_path):
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(itk_image(volume), str(path), compress)
    assert_equal(read_volume(path), volume)
    assert_equal(read_mask(path), volume)
    assert read_volume(path, exact=True).array.dtype == np.int16
    parts = volume_parts(path)
    assert (
        parts[0] == path and len(parts) == (2 if suffix in (".nhdr", ".mhd") else 1) and all(p.is_file() for p in parts)
    )
    for part in parts:  # what is cut off is missed, whichever file it is cut off from
        whole = part.read_bytes()
        part.write_bytes(whole[:-4])
        with pytest.raises(VolumeError, match=f"a{suffix}"):
            read_volume(path)
        part.write_bytes(whole)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_types_of_voxels(suffix, dtype, tmp_path):
    array = np.random.default_rng(0).integers(0, 100, (1, 3, 4, 5)).astype(dtype)
    sitk.WriteImage(itk_image(Volume(array, np.eye(4))), str(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(read_volume(tmp_path / f"a{suffix}").array, array)


def test_big_endian_and_channels(tmp_path):
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    head = "NRRD0004\n# a comment\ntype: short\ndimension: 4\nendian: big\nencoding: gzip\nspace: RAS\n"
    first = "sizes: 2 3 4 5\nspace directions: none (1,0,0) (0,1,0) (0,0,2)\nspace origin: (1,2,3)\nkey:=value\n\n"
    (tmp_path / "a.nrrd").write_bytes((head + first).encode() + gzip.compress(array.astype(">i2").tobytes("F")))
    meta = (
        "NDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = True\nElementNumberOfChannels = 2\nOffset = -1 -2 3\n"
    )
    meta += "TransformMatrix = -1 0 0 0 -1 0 0 0 1\nElementSpacing = 1 1 2\nDimSize = 3 4 5\nElementType = MET_SHORT\n"
    (tmp_path / "a.mha").write_bytes((meta + "ElementDataFile = LOCAL\n").encode() + array.astype(">i2").tobytes("F"))
    for name in ("a.nrrd", "a.mha"):
        found = read_volume(tmp_path / name)
        np.testing.assert_array_equal(found.array, array)
        np.testing.assert_array_equal(found.affine, [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 2, 3], [0, 0, 0, 1]])
        assert read_volume(tmp_path / name, time_point=1).array[0, 0, 0, 1] == array[1, 0, 0, 1]


@pytest.mark.parametrize(
    ("suffix", "old", "new", "reason"),
    [
        (".nrrd", "space: left-posterior-superior", "space: scanner-xyz", "space 'scanner-xyz'"),
        (".nrrd", "encoding: raw", "encoding: hex", "raw or gzip"),
        (".nrrd", "type: int16", "type: block", "type 'block'"),
        (".nrrd", "sizes: 5 6 7", "sizes: 5 6 8", "bytes of voxels, its header says"),
        (".nrrd", "sizes: 5 6 7", "sizes: 1048576 1048576 1048576", "GiB of memory"),
        (".nrrd", "sizes: 5 6 7", "sizes: 5 6 0", "1 or more"),
        (".nrrd", "dimension: 3", "dimension: 2", "2 dimensions"),
        (".nrrd", "endian: little", "endian: middle", "endian is little or big"),
        (".nrrd", "space origin: (", "space origin: (nan,", "space origin"),
        (".nrrd", "NRRD", "NEAR", "not an NRRD file"),
        (".nrrd", "space directions: (", "space directions: (0,0,0) (", "expected three vectors"),
        (".mha", "ElementSpacing = 1 2 3", "ElementSpacing = 1 0 3", "geometry is broken"),
        (".mha", "ElementSpacing = 1 2 3", "ElementSpacing = 1 inf 3", "expected 3 numbers"),
        (".mha", "TransformMatrix = -1 0", "TransformMatrix = 65535 0", "not of length 1"),
        (".mha", "ElementSpacing = 1 2 3", "ElementSpacing = 1 2 3000", "1 x 2 x 3000 mm, which no scan"),
        (".mha", "DimSize = 5 6 7", "DimSize = 5 6 9", "bytes of voxels, its header says"),
        (".mha", "DimSize = 5 6 7", "DimSize = 1099511627776 1 1", "GiB of memory"),
        (".mha", "MET_SHORT", "MET_STRING", "MET_STRING"),
        (".mha", "NDims = 3", "ElementToIntensityFunctionOffset = -1024\nNDims = 3", "functionoffset = -1024"),
        (".mha", "NDims = 3", "DistanceUnits = inch\nNDims = 3", "DistanceUnits are 'inch'; save it in mm"),
        (".nrrd", "kinds: domain", "kinds: RGB-color", "colors or complex numbers"),
        (".nrrd", "kinds: domain", "kinds: complex", "colors or complex numbers"),
        (".mha", "NDims = 3", "NDims = 4", "three dimensions"),
        (".mha", "BinaryData = True", "BinaryData = False", "as text"),
        (".mha", "ElementDataFile = LOCAL", "ElementDataFile = ../a.raw", "leads out of the folder"),
        (".mha", "ElementDataFile = LOCAL", "ElementDataFile = /etc/passwd", "leads out of the folder"),
        (".mha", "ElementDataFile = LOCAL", "ElementDataFile = a.raw", "is not a file in"),
    ],
)
def test_headers_that_are_refused(volume, suffix, old, new, reason, tmp_path):
    path = tmp_path / f"a{suffix}"
    upright = Volume(volume.array, np.diag([1.0, 2.0, 3.0, 1.0]))
    sitk.WriteImage(itk_image(upright), str(path))
    data = path.read_bytes()
    data = data.replace(b"type: short", b"type: int16")
    assert data.count(old.encode()) >= 1, data[:600]
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    for read in (read_volume, read_mask):
        with pytest.raises(VolumeError, match=reason) as refused:
            read(path)
        assert str(path) in str(refused.value)


def test_a_link_out_of_the_folder_is_no_file_of_voxels(volume, tmp_path):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "a.mhd"
    sitk.WriteImage(itk_image(volume), str(path))
    (tmp_path / "inside" / "a.raw").rename(tmp_path / "elsewhere.raw")
    (tmp_path / "inside" / "a.raw").symlink_to(tmp_path / "elsewhere.raw")
    with pytest.raises(VolumeError, match="leads out of the folder"):
        read_volume(path)
    (tmp_path / "inside" / "a.raw").unlink()
    (tmp_path / "inside" / "a.raw").symlink_to("a.raw")
    with pytest.raises(VolumeError, match="a.mhd: its file of voxels: 'a.raw'"):
        read_volume(path)


def test_a_bomb_is_refused_before_it_bursts(tmp_path):
    """70 MB of zeros in a few hundred KB, in a file that promises 8 bytes."""
    zeros = gzip.compress(bytes(70_000_000), 1)
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: gzip\nspace: RAS\n"
    head += "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + zeros)
    with pytest.raises(VolumeError, match="holds more voxels than the 8 bytes"):
        read_volume(tmp_path / "a.nrrd")
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(image) + zeros)
    with pytest.raises(VolumeError, match="holds far more than"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_series_is_read_as_itk_reads_it(series, volume):
    assert_equal(read_volume(series), volume)
    assert_equal(itk_series(series), volume)
    assert_equal(read_mask(series), volume)
    assert volume_stem(series) == "series" and len(volume_parts(series)) == 7
    (series / "notes.txt").write_text("beside the slices")
    (series / "DICOMDIR").write_bytes(b"index")
    assert_equal(read_volume(series), volume)


def test_slices_are_ordered_along_their_normal(series, volume):
    """A sagittal series: all slices have one height above the feet, and their files are in no order."""
    for path in series.iterdir():
        one = pydicom.dcmread(path)
        one.ImageOrientationPatient = [*list("010"), "0", "0", "-1"]
        one.ImagePositionPatient = [str(-3 * (one.InstanceNumber - 1)), "5", "40"]
        one.save_as(path)
    found = read_volume(series)
    assert_equal(found, itk_series(series))
    assert found.shape == (7, 5, 6) and found.spacing == pytest.approx((3, 1, 2))
    # LPS: columns run to P, rows down to I, slices to R: in RAS+ order (slice, -column, -row)
    lps = volume.array[0][::-1, ::-1]  # as write_dicom turned it
    np.testing.assert_array_equal(found.array[0], lps.transpose(2, 0, 1)[:, ::-1, ::-1])


def shift(path: Path, mm: float) -> None:
    """Move a slice in its own plane."""
    one = pydicom.dcmread(path)
    moved = np.array(one.ImagePositionPatient, float) + mm * np.array(one.ImageOrientationPatient[:3], float)
    change(path, ImagePositionPatient=[f"{x:.10g}" for x in moved])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s: shift(s / "4.dcm", 0.3), "shifted against each other by up to 0.3 mm"),
        (lambda s: (s / "4.dcm").unlink(), "not evenly spaced: steps of 3 to 6 mm, the median being 3"),
        (lambda s: change(s / "60.dcm", SeriesInstanceUID="1.2.3"), "mixes 2 series"),
        (lambda s: change(s / "7.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "7.dcm: is a localizer"),
        (lambda s: change(s / "7.dcm", NumberOfFrames=7), "7.dcm: holds 7 frames"),
        (lambda s: change(s / "7.dcm", PixelSpacing=["1", "1"]), "another pixel spacing"),
        (lambda s: change(s / "7.dcm", ImageOrientationPatient=list("100010")), "another orientation"),
        (lambda s: change(s, ImageOrientationPatient=list("100000")), "geometry is broken"),
        (lambda s: change(s, PixelSpacing=["0", "1"]), "geometry is broken"),
        (lambda s: change(s / "7.dcm", RescaleSlope="0"), "RescaleSlope is 0"),
        (lambda s: change(s / "7.dcm", Rows=60000), "truncated"),
        (lambda s: change(s / "7.dcm", Rows=5), "pixels cannot be read|another size"),
        (lambda s: change(s / "7.dcm", SamplesPerPixel=3, PhotometricInterpretation="RGB"), "color image \\(RGB\\)"),
        (lambda s: change(s, PhotometricInterpretation="MONOCHROME1"), "is MONOCHROME1"),
        (lambda s: change(s / "7.dcm", BitsStored=12), "7.dcm: its pixels do not end at the lowest bit"),
        (lambda s: compress(s / "7.dcm"), "7.dcm: is stored as Deflated Explicit VR"),
        (lambda s: change(s / "7.dcm", ImagePositionPatient=None), "no ImagePositionPatient"),
        (lambda s: (s / "7.dcm").write_bytes((s / "7.dcm").read_bytes()[:-30]), "7.dcm: .*cannot be read"),
        (lambda s: (s / "7.dcm").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "7.dcm: is not a DICOM"),
        (lambda s: (s / "copy.dcm").write_bytes((s / "7.dcm").read_bytes()), "lie at one place"),
        (lambda s: [p.unlink() for p in s.iterdir() if p.name != "7.dcm"], "is one slice"),
        (lambda s: [p.unlink() for p in s.iterdir()], "is a folder without DICOM"),
    ],
)
def test_series_that_are_refused(series, spoil, reason):
    spoil(series)
    for read in (read_volume, read_mask):
        with pytest.raises(VolumeError, match=reason) as refused:
            read(series)
        assert str(series) in str(refused.value)


def test_a_tilted_gantry_is_refused_by_its_angle(series):
    for path in series.iterdir():
        one = pydicom.dcmread(path)
        axes = np.array(one.ImageOrientationPatient, float)
        height = np.dot(np.cross(axes[:3], axes[3:]), np.array(one.ImagePositionPatient, float))
        leaning = np.array(one.ImagePositionPatient, float) + axes[3:] * height * np.tan(np.radians(18.5))
        one.ImagePositionPatient = [f"{x:.10g}" for x in leaning]
        one.save_as(path)
    with pytest.raises(VolumeError, match="sheared, two of them 71.5 degrees apart"):
        read_volume(series)


def test_all_formats_make_one_data_set(volume, series, tmp_path):
    """Images in a folder a subject, masks in another format; the doctor's and the pipeline's way to read them."""
    for name in ("a", "b"):
        (tmp_path / "dicom").mkdir(exist_ok=True)
        copy = tmp_path / "dicom" / name
        copy.mkdir()
        for path in series.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        mask = volume.replace((volume.array > 50).astype(np.int16))
        (tmp_path / "masks").mkdir(exist_ok=True)
        sitk.WriteImage(itk_image(mask), str(tmp_path / "masks" / f"{name}.nrrd"))
    (tmp_path / "dicom" / "empty").mkdir()
    config = DataConfig(
        root=str(tmp_path),
        images="dicom/{subject}",
        masks="masks/{subject}.nrrd",
        label_names={0: "background", 1: "bright"},
        subject="subject",
        validation_fraction=0,
    )
    cases = load_cases(config)
    assert [(case.name, case.subject) for case in cases] == [("a", "a"), ("b", "b")]
    dataset = VolumeDataset(cases, config)
    np.testing.assert_array_equal(dataset[0]["mask"].numpy(), volume.array[0] > 50)
    write_volume(read_volume(tmp_path / "dicom" / "a"), tmp_path / "a.nii.gz")  # back onto its own grid, in order
    assert same_grid(read_volume(tmp_path / "a.nii.gz"), volume)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_series_written_is_read_by_an_independent_reader(volume, modality, whole, tmp_path):
    array = volume.array if whole else (volume.array.astype(np.float32) * 0.37 - 3)
    made = volume.replace(array)
    files = write_dicom(made, tmp_path / "out", modality=modality, software="medvolume 1", model="ab" * 32, seed=7)
    step = 0.0 if whole else float(np.ptp(array)) / 65000
    for found in (read_volume(tmp_path / "out"), itk_series(tmp_path / "out")):
        assert_equal(found, made, atol=step / 2 + (0 if whole else 1e-5))
    slices = [pydicom.dcmread(path) for path in files]
    assert len({str(one.SOPInstanceUID) for one in slices}) == 7
    assert len({(one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID) for one in slices}) == 1
    for one in slices:
        assert one.ImageType[:2] == ["DERIVED", "SECONDARY"] and one.SyntheticData == "YES"
        assert (
            "SYNTHETIC" in one.ImageComments and "medvolume 1" in one.ImageComments and "ab" * 32 in one.ImageComments
        )
        assert str(one.PatientName) == "SYNTHETIC^MEDVOLUME" and str(one.PatientID).startswith("SYNTHETIC-")
        assert not one.PatientBirthDate and not one.PatientSex and not one.StudyDate and one.Modality == modality
        assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    assert (slices[0].SOPClassUID == CTImageStorage) == (modality == "CT")
    again = pydicom.dcmread(
        write_dicom(made, tmp_path / "again", modality=modality, software="medvolume 1", model="ab" * 32)[0]
    )
    assert again.StudyInstanceUID != slices[0].StudyInstanceUID and again.PatientID != slices[0].PatientID


def test_a_constant_volume_and_unfit_ones(volume, tmp_path):
    flat = volume.replace(np.full((1, 5, 6, 7), 0.25, np.float32))
    write_dicom(flat, tmp_path / "flat", modality="MR", software="s", model="m")
    assert (read_volume(tmp_path / "flat").array == 0.25).all()
    options = {"modality": "MR", "software": "s", "model": "m"}
    with pytest.raises(ValueError, match="is there already"):
        write_dicom(flat, tmp_path / "flat", **options)
    with pytest.raises(ValueError, match="one channel, the volume has 2"):
        write_dicom(Volume(np.zeros((2, 3, 3, 3)), np.eye(4)), tmp_path / "two", **options)
    with pytest.raises(ValueError, match="not finite"):
        write_dicom(Volume(np.full((1, 3, 3, 3), np.nan), np.eye(4)), tmp_path / "nan", **options)
    with pytest.raises(ValueError, match="modality is a code"):
        write_dicom(flat, tmp_path / "new", modality="mr ", software="s", model="m")
    for row, column in ((0, 1), (0, 2)):  # in the plane of the slices, and out of it: 4 degrees
        sheared = np.eye(4)
        sheared[row, column] = np.tan(np.radians(4))
        with pytest.raises(ValueError, match="86.00 degrees apart instead of 90"):
            write_dicom(Volume(flat.array, sheared), tmp_path / "new", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat"]


def test_the_command_writes_what_has_a_sidecar(volume, tmp_path, capsys):
    record = {
        "synthetic": True,
        "software": "medvolume 1",
        "model": "ab" * 32,
        "seed": 5,
        "mask": {"file": "MUELLER.nii"},
    }
    made = tmp_path / "MUELLER_000.nii.gz"
    write_synthetic(to_nibabel(volume), record, made)
    to_dicom.main([str(made), "--output", str(tmp_path / "out"), "--modality", "CT"])
    assert "MUELLER_000: 7 slices" in capsys.readouterr().out
    assert_equal(read_volume(tmp_path / "out" / "MUELLER_000"), volume)
    for path in (tmp_path / "out" / "MUELLER_000").iterdir():
        assert b"MUELLER" not in path.read_bytes() and b"seed 5" in path.read_bytes()
    channels = {"ct": to_nibabel(volume), "pet": to_nibabel(volume)}
    write_synthetic(channels, record | {"channels": ["ct", "pet"]}, tmp_path / "a_000.nii.gz")
    assert to_dicom.find_record(tmp_path / "a_000_pet.nii.gz")["channels"] == ["ct", "pet"]
    write_volume(volume, tmp_path / "a_000_real.nii.gz")
    for name in ("a_000_real.nii.gz", "a_000.nii.gz"):
        with pytest.raises(ValueError, match="has no sidecar"):
            to_dicom.find_record(tmp_path / name)
    with pytest.raises(ValueError, match="not known to be synthetic"):
        to_dicom.main([str(tmp_path / "a_000_real.nii.gz"), "--output", str(tmp_path / "out"), "--modality", "CT"])


# The real files of ../shared/data/awkward: right by the oracles of its README, or refused by name.

AWKWARD = {  # what must be refused, and why; everything else must be read
    "nifti/rgb24_tiny_3D.nii": "color",
    "nifti/rgba32_tiny_4D.nii": "color",
    "nifti/rgb24_ct_perfusion.nii.gz": "color",
    "dicom/single/CT_small.dcm": "one slice",
    "dicom/single/MR_small_bigendian.dcm": "one slice",
    "dicom/single/MR_truncated.dcm": "one slice",
    "dicom/single/MR_small_RLE.dcm": "one slice",
    "dicom/single/rtdose.dcm": "15 frames",
    "dicom/single/decimal_rescale.dcm": "one slice",
    "dicom/ge_ct_tilt_gap.tar.xz": "steps of 1.081 to 6.999 mm.*tilted by 18.5 degrees",
    "broken/not-nifti.nii": "cannot be read as NIfTI",
    "broken/crash-1.nii": "data code -9510",
    "broken/lfs_pointer_liver_0.nii.gz": "Git LFS pointer",
    "broken/derived_truncated_gz.nii.gz": "damaged gzip",
    "broken/derived_truncated_raw.nii": "truncated",
}


def test_every_awkward_file_is_right_or_refused_by_name(awkward, tmp_path):
    entries = [row["file"].split(" ")[0].rstrip("/") for row in csv.DictReader((awkward / "MANIFEST.csv").open())]
    assert len(entries) == 38 and set(AWKWARD) <= set(entries)
    for entry in entries:
        path = awkward / entry
        if path.suffix == ".xz":
            with tarfile.open(path) as packed:
                packed.extractall(tmp_path, filter="data")
            path = next(tmp_path.iterdir())
        if entry in AWKWARD:
            with pytest.raises(VolumeError, match=AWKWARD[entry]) as refused:
                read_volume(path)
            assert path.name in str(refused.value)
            continue
        found = read_volume(path)
        assert "".join(nib.aff2axcodes(found.affine)) == "RAS" and np.isfinite(found.array).all(), entry
        if entry.startswith(("dicom", "other")):
            assert_equal(found, itk_series(path) if path.is_dir() else from_itk(sitk.ReadImage(str(path))), atol=1e-6)
    assert_equal(read_volume(awkward / "other/oblique_FLAIR.nrrd"), read_volume(awkward / "nifti/oblique_FLAIR.nii.gz"))

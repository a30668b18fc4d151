"""Geometry that cannot be meant, and files whose names belie their contents: refused or said, with the remedy."""

import bz2
import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from tiny import tiny_data

from evaluation.doctor.cases import examine_cases
from evaluation.doctor.data_checks import check_geometry
from pipelines.volume_processor import VolumeProcessor
from volumes import (
    DataConfig,
    IntensityScaling,
    VolumeDataset,
    VolumeError,
    describe,
    load_cases,
    read_mask,
    read_volume,
    resample,
    to_nibabel,
    write_volume,
)
from volumes.formats.raw import check_room
from volumes.plausible import contradiction, header_oddities, resampling_oddities

VOXELS = (2 * np.random.default_rng(0).integers(0, 2, (16, 17, 18))).astype(np.int16)


def image_of(values=VOXELS, affine=None, unit=None):
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if unit:
        image.header.set_xyzt_units(unit)
    return image


def saved(tmp_path, count=2, **arguments):
    for number in range(count):
        nib.save(image_of(**arguments), tmp_path / f"c{number}.nii.gz")
    return tmp_path


def config_of(folder, **arguments):
    window = IntensityScaling("window", 0, 1)
    return DataConfig(root=str(folder), images="{c}.nii.gz", validation_fraction=0, intensity=window, **arguments)


def dataset_of(config):
    return VolumeDataset(load_cases(config), config)


def test_meters_that_are_none_are_refused_and_units_cures_it(tmp_path):
    folder = saved(tmp_path, unit="meter")
    with pytest.raises(VolumeError, match=r"1000 x 1000 x 1000 mm, .*unit of length is m\).*data.units: mm"):
        dataset_of(config_of(folder))
    dataset = dataset_of(config_of(folder, units="mm", spacing=(1, 1, 1)))
    np.testing.assert_array_equal(dataset.facts[0].affine, np.eye(4))
    data = describe(dataset)
    assert data.reading == {"units": "mm"} and not describe(dataset_of(config_of(saved(tmp_path)))).reading
    processor = VolumeProcessor(tiny_data(reading=data.reading), (4, 4, 4))
    prepared = processor.preprocess(image_of(unit="meter"))  # a mask of the same headers, as training read them
    np.testing.assert_array_equal(prepared.target.affine, np.eye(4))
    with pytest.raises(VolumeError, match="1000 x 1000 x 1000 mm"):
        VolumeProcessor(tiny_data(), (4, 4, 4)).preprocess(image_of(unit="meter"))


@pytest.mark.parametrize(
    ("units", "numbers", "spacing"),
    [("mm", 2, 2), ("cm", 2, 20), ("m", 0.002, 2), ("um", 500, 0.5), (None, 0.002, 2)],
)
def test_units_are_of_the_headers_numbers(units, numbers, spacing):
    volume = read_volume(image_of(affine=np.diag([numbers] * 3 + [1.0]), unit="meter"), units=units)
    np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-6)
    np.testing.assert_allclose(volume.source.affine, volume.affine)


def test_units_of_other_formats(tmp_path):
    image = sitk.GetImageFromArray(VOXELS.T)
    image.SetSpacing((2, 3, 4))
    for suffix, old, new in (
        (".nrrd", b"\nkinds:", b'\nspace units: "um" "um" "um"\nkinds:'),
        (".mha", b"NDims = 3", b"DistanceUnits = um\nNDims = 3"),
    ):
        path = tmp_path / f"a{suffix}"
        sitk.WriteImage(image, str(path))
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        volume = read_volume(path)
        np.testing.assert_allclose(volume.spacing, (0.002, 0.003, 0.004))
        assert volume.source.unit == "um" and "the header's unit is not mm" in str(header_oddities(volume.source)[0])
        assert read_volume(path, units="cm").spacing == (20, 30, 40)
        path.write_bytes(path.read_bytes().replace(b"um", b"li"))
        with pytest.raises(VolumeError, match="data.units"):
            read_volume(path)
        assert read_volume(path, units="mm").spacing == (2, 3, 4)


def test_generated_files_need_no_setting(tmp_path):
    volume = read_volume(image_of())
    write_volume(volume, tmp_path / "made.nii.gz", description="synthetic; medvolume 0; model 0 seed 0")
    again = read_volume(tmp_path / "made.nii.gz", units="um", axes="CXYZ")
    np.testing.assert_array_equal(again.affine, np.eye(4))
    np.testing.assert_array_equal(again.array, volume.array)


@pytest.mark.parametrize("shape", [(1, 16, 17, 18), (1, 16, 17, 18, 1), (1, 1, 16, 17, 18), (1, 16, 17, 18, 1, 1)])
def test_channels_that_come_first(shape):
    values, affine = VOXELS.reshape(shape), np.diag([-2.0, 2, 3, 1])
    image = image_of(values, affine)
    for read in (read_volume, read_mask):
        with pytest.raises(VolumeError, match="axis|axes"):
            read(image)
        found = read(image, axes="CXYZ")
        np.testing.assert_array_equal(found.array[0], VOXELS[::-1])
        assert found.spacing == (2, 2, 3)
    with pytest.raises(VolumeError, match="first axis looks like|at most one axis"):
        read_volume(image, time_point=0)


def test_several_channels_that_come_first():
    values = np.stack([VOXELS, VOXELS + 1, VOXELS + 2, VOXELS + 3])
    with pytest.raises(VolumeError, match="data.axes: CXYZ"):
        read_volume(image_of(values), time_point=0)
    np.testing.assert_array_equal(read_volume(image_of(values), axes="CXYZ").array, values)
    np.testing.assert_array_equal(read_volume(image_of(values), axes="CXYZ", time_point=2).array[0], VOXELS + 2)
    np.testing.assert_array_equal(read_volume(image_of(values), axes="XYZC").array, np.moveaxis(values, 3, 0))
    np.testing.assert_array_equal(read_volume(image_of(), axes="CXYZ").array[0], VOXELS)  # (X, Y, Z) has no channels


def test_a_first_axis_of_up_to_a_quarter_of_others_is_channels():
    with pytest.raises(VolumeError, match="first axis looks like one of channels"):
        read_volume(image_of(np.zeros((3, 16, 17, 18), np.float32)))
    assert read_volume(image_of(np.zeros((9, 16, 17, 20), np.float32)), time_point=19).shape == (9, 16, 17)


def test_the_memory_that_reading_takes_is_counted(monkeypatch):
    """2 bytes a voxel in the file, 16 more while it is scaled."""
    monkeypatch.setattr("volumes.formats.raw.memory_bytes", lambda: 18_000)
    assert check_room("a.nii", (10, 10, 10), 2) == 2000
    with pytest.raises(VolumeError, match="a.nii: says that it holds 10 x 10 x 10 voxels"):
        check_room("a.nii", (10, 10, 10), 3)


@pytest.mark.parametrize("shape", [(16, 17, 18, 1), (16, 17, 18, 1, 1), (1, 17, 18)])
def test_trailing_axes_and_planes_are_read(shape):
    values = VOXELS[:1].reshape(shape) if shape[0] == 1 else VOXELS.reshape(shape)
    assert read_volume(image_of(values)).shape == shape[:3]


def test_a_set_with_channels_first_is_never_a_plane(tmp_path):
    folder = saved(tmp_path, values=VOXELS[None])
    for change in ({}, {"time_point": 0}):
        with pytest.raises(VolumeError, match="first axis looks like one of channels"):
            dataset_of(config_of(folder, **change))
    assert dataset_of(config_of(folder, axes="CXYZ")).shapes == [(16, 17, 18)] * 2


def twofold(qform, sform=None, codes=(1, 1)):
    image = image_of(affine=np.eye(4) if sform is None else sform)
    image.set_sform(image.affine, codes[1])
    image.set_qform(qform, codes[0])
    return image


@pytest.mark.parametrize(
    ("qform", "detail"),
    [
        (np.diag([-1.0, -1, 1, 1]), "axes RAS by the sform, LPS by the qform"),
        (np.diag([1.0, 1, 2, 1]), "voxels of 1 x 1 x 1 mm by the sform, 1 x 1 x 2 by the qform"),
        (np.eye(4) + np.outer([1, 0, 0, 0], [0, 0, 0, 5]), "corners up to 5 mm apart"),
        (np.eye(4) + np.outer([1, 0, 0, 0], [0, 0, 0, 0.2]), ""),
    ],
)
def test_contradicting_transforms(qform, detail):
    grid = read_volume(twofold(qform)).source
    assert contradiction(grid) == detail
    assert [one.what for one in header_oddities(grid)] == ["sform and qform contradict each other"] * bool(detail)
    assert not contradiction(read_volume(twofold(qform, codes=(0, 1))).source)


@pytest.mark.parametrize(("field", "value"), [("quatern_b", np.nan), ("quatern_b", 5), ("qoffset_x", np.nan)])
def test_a_broken_qform_beside_a_sform_is_told_of(field, value, tmp_path):
    nib.save(twofold(np.eye(4)), tmp_path / "a.nii")
    header = nib.load(tmp_path / "a.nii").header.copy()
    header[field] = value
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(header.binaryblock + data[348:])
    volume = read_volume(tmp_path / "a.nii")
    assert volume.source is not None
    assert contradiction(volume.source) == "the numbers of the qform do not make a transform"
    np.testing.assert_array_equal(to_nibabel(volume).get_qform(coded=True)[0], np.eye(4))


def test_units_and_axes_that_are_none_are_refused():
    for keywords in ({"units": "inch"}, {"units": ["mm"]}, {"axes": "ZYXC"}):
        with pytest.raises(VolumeError, match="expected one of"):
            read_volume(image_of(), **keywords)
    with pytest.raises(VolumeError, match="1000 x 1000 x 1000 mm.* such as data.units: um"):
        read_volume(image_of(affine=np.diag([1000.0, 1000, 1000, 1])))


ODD = {  # what is said of it, by what it is
    "sform and qform contradict each other": lambda: twofold(np.diag([-1.0, -1, 1, 1])),
    "the header's unit is not mm": lambda: image_of(affine=np.diag([0.003, 0.003, 0.003, 1]), unit="meter"),
    "voxels below 0.02 mm": lambda: image_of(affine=np.diag([0.001, 0.001, 0.001, 1])),
    "voxels below 0.02 mm or above 20": lambda: image_of(affine=np.diag([1.0, 1, 50, 1])),
    "a single plane of voxels": lambda: image_of(VOXELS[:, :1]),
    "no qform and no sform": lambda: twofold(np.eye(4), codes=(0, 0)),
}


@pytest.mark.parametrize("said", ODD)
def test_training_doctor_and_generation_say_the_same(said, tmp_path, caplog):
    nib.save(ODD[said](), tmp_path / "c0.nii.gz")
    nib.save(ODD[said](), tmp_path / "c1.nii.gz")
    config = config_of(tmp_path)
    dataset_of(config)
    trained = next(line for line in caplog.messages if line.startswith(said))
    assert "c0.nii.gz" in trained and "c1.nii.gz" in trained
    findings = check_geometry(examine_cases(load_cases(config), config)[0], config)
    found = next(one for one in findings if one.message.startswith(said))
    assert found.level == "WARN" and found.files == tuple(str(tmp_path / f"c{n}.nii.gz") for n in range(2))
    assert trained == f"{found.message}; {found.remedy}"
    with pytest.warns(UserWarning, match=f"c0.nii.gz: {said}"):
        VolumeProcessor(tiny_data(spacing=None), (4, 4, 4)).preprocess(tmp_path / "c0.nii.gz")


def test_a_plain_header_is_not_remarked_on(tmp_path, caplog):
    dataset_of(config_of(saved(tmp_path, unit="mm")))
    assert not caplog.messages
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = tiny_data(spacing=None, shape_range=[[16, 16, 16], [24, 24, 24]])
        VolumeProcessor(data, (4, 4, 4)).preprocess(tmp_path / "c0.nii.gz")


def test_resampling_to_nothing_and_beyond_memory(tmp_path):
    small = read_volume(image_of(affine=np.diag([0.001, 0.001, 0.001, 1])))
    with pytest.raises(VolumeError, match=r"16 x 17 x 18 voxels of 0.001 x .* gives 1 x 1 x 1, which leaves no volume"):
        resample(small, (1, 1, 1))
    with pytest.raises(VolumeError, match="more than fits into memory.*data.units"):
        resample(read_volume(image_of(affine=np.diag([90.0, 90, 90, 1]))), (0.1, 0.1, 0.1))
    assert not resampling_oddities((16, 17, 18), (8, 9, 9)) and not resampling_oddities((4, 4, 4), (4, 4, 4))
    assert "fewer than 8 voxels" in resampling_oddities((16, 17, 18), (3, 9, 9))[0].what
    assert "64 times as many" in resampling_oddities((16, 16, 16), (128, 128, 128))[0].what


@pytest.mark.parametrize(
    "affine", [np.zeros((4, 4)), np.diag([1, 1, np.nan, 1]), np.diag([1.0, 0, 1, 1]), np.diag([1e-6, 1, 1, 1])]
)
def test_affines_that_are_none(affine):
    image = image_of()
    image.set_sform(affine, 1)
    image._affine = affine.astype(float)
    with pytest.raises(VolumeError, match="its geometry is broken"):
        read_volume(image)


@pytest.mark.parametrize("qform_code", [0, 1])
def test_voxels_of_no_size_are_not_taken_as_1_mm(qform_code, tmp_path):
    image = twofold(np.eye(4), codes=(qform_code, 0))
    nib.save(image, tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[88:92] = bytes(4)  # pixdim[3]
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(VolumeError, match=r"a.nii: its geometry is broken: its voxels are 1 x 1 x 0 \(pixdim\)"):
        read_volume(tmp_path / "a.nii")


def other_names(tmp_path):
    """{name: the bytes of one volume as that format}."""
    image = sitk.GetImageFromArray(VOXELS.T)
    contents = {}
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha"):
        sitk.WriteImage(image, str(tmp_path / f"whole{suffix}"))
        contents[suffix] = (tmp_path / f"whole{suffix}").read_bytes()
    return contents


OTHERS = {
    "fork": b"\x00\x05\x16\x07" + bytes(400),
    "zip": b"PK\x03\x04" + bytes(400),
    "bzip2": bz2.compress(bytes(400)),
    "page": b"<!DOCTYPE html>\n<html>",
    "noise": b"\0\0\0\1" + bytes(400),
}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.nii.gz", ".nii", r"is not gzip, though its name ends in .gz \(NIfTI by its content\); rename it to a.nii,"),
        ("a.nii", ".nii.gz", "is gzip by its content, .*rename it to a.nii.gz"),
        ("a.nii", ".nrrd", "is NRRD by its content, its name says NIfTI; rename it to a.nrrd"),
        ("a.nii.gz", ".nrrd", r"is not gzip.*\(NRRD by its content\); rename it to a.nrrd"),
        ("a.nrrd", ".nii", "is NIfTI by its content, its name says NRRD; rename it to a.nii"),
        ("a.nrrd", ".nii.gz", "is gzip by its content.*rename it to a.nii.gz"),
        ("a.mha", ".nrrd", "rename it to a.nrrd"),
        ("a.nrrd", ".mha", "is MetaImage by its content, .* rename it to a.mha"),
        ("a.dat", ".nii", "rename it to a.dat.nii"),
        ("a.nrrd", "gzip .nrrd", "is gzip by its content; unpack it"),
        ("a.mha.gz", "gzip .mha", "is gzip by its content; unpack it"),
        ("a.nii.gz", "gzip .nii.gz", "is gzip within gzip"),
        ("._a.nii.gz", "fork", "is a resource fork .* give a.nii.gz"),
        ("a.nii.gz", "zip", "is a zip archive by its content; unpack it"),
        ("a.nii", "zip", "is a zip archive by its content; unpack it"),
        ("a.nii.gz", "bzip2", "is bzip2 by its content; unpack it"),
        ("a.nii.gz", "page", "is a web page by its content, .* fetch the file itself"),
        ("a.nii.gz", "noise", r"is not gzip, though its name ends in .gz; fetch it again"),
        ("a.mgz", "gzip noise", "is not of a supported kind"),
    ],
)
def test_names_that_belie_their_contents(name, content, reason, tmp_path):
    kind, contents = content.removeprefix("gzip "), {**other_names(tmp_path), **OTHERS}
    data = gzip.compress(contents[kind]) if kind != content else contents[kind]
    (tmp_path / name).write_bytes(data)
    for read in (read_volume, read_mask):
        with pytest.raises(VolumeError, match=reason) as refused:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


def test_pairs_keep_what_they_say(tmp_path):
    nib.save(nib.Nifti1Pair(VOXELS, np.eye(4)), tmp_path / "a.hdr")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.img").array[0], VOXELS)
    (tmp_path / "a.img").write_bytes(gzip.compress((tmp_path / "a.img").read_bytes()))
    with pytest.raises(VolumeError, match="it is gzip, rename both files"):
        read_volume(tmp_path / "a.hdr")


def test_written_volumes_are_in_millimeters():
    image = to_nibabel(read_volume(image_of(affine=np.diag([0.002, 0.002, 0.003, 1]), unit="meter")))
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), (2, 2, 3))

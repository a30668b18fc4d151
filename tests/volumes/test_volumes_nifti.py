"""Files: every orientation and encoding comes out in RAS+ and goes back as it was; what is broken is refused by name
and reason."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from volumes import Volume, VolumeError, read_mask, read_volume, resample, same_grid, to_nibabel, write_volume

ORIENTATIONS = [
    "".join(flipped) for axes in itertools.permutations(("RL", "AP", "SI")) for flipped in itertools.product(*axes)
]  # all 48


@pytest.fixture
def brain():
    """An image of 5 x 6 x 7 voxels, all different, oblique and anisotropic, closest to RAS."""
    rotation = np.array([[0.98, -0.15, 0.13], [0.17, 0.97, -0.17], [-0.1, 0.19, 0.98]])
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rotation)[0] * [1.0, 2.0, 3.0]
    affine[:3, :3] *= np.sign(np.diag(affine))[:3]  # QR may flip axes
    affine[:3, 3] = [-10, 20, 30]
    return nib.Nifti1Image(np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7), affine)


def reoriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(codes)))


def assert_written_as_stored(volume, original):
    written = to_nibabel(volume)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-5)
    assert nib.aff2axcodes(written.affine) == nib.aff2axcodes(original.affine)
    for code in ("qform_code", "sform_code"):
        assert written.header[code] == original.header[code]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_the_same_volume_and_goes_back(brain, codes, tmp_path):
    stored = reoriented(brain, codes)
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    path = tmp_path / "brain.nii"
    nib.save(stored, path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], np.asarray(brain.dataobj))
    np.testing.assert_allclose(volume.affine, brain.affine, atol=1e-5)
    assert_written_as_stored(volume, nib.load(path))


def test_a_voxel_stays_where_it_is_in_the_patient(brain):
    stored = reoriented(brain, "PIL")
    index = (2, 3, 1)
    value = np.asarray(stored.dataobj)[index]
    volume = read_volume(stored)
    found = np.argwhere(volume.array[0] == value)
    assert len(found) == 1
    np.testing.assert_allclose(volume.affine @ [*found[0], 1], stored.affine @ [*index, 1], atol=1e-9)


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("meter", 1e-3)])
def test_a_qform_beside_another_sform_goes_back_as_it_was(brain, unit, scale, tmp_path):
    """The sform says where voxels lie; the scanner's own transform beside it keeps its place, its code, and its
    millimeters."""
    image = reoriented(brain, "LPS")
    scanner = image.affine.copy()
    scanner[:3, 3] += [1.5, -2.0, 3.0]
    to_unit = np.diag([scale, scale, scale, 1.0])
    stored = nib.Nifti1Image(np.asarray(image.dataobj), None)
    stored.set_sform(to_unit @ image.affine, 2)
    stored.set_qform(to_unit @ scanner, 1)
    stored.header.set_xyzt_units(unit)
    nib.save(stored, tmp_path / "brain.nii")
    volume = read_volume(tmp_path / "brain.nii")
    np.testing.assert_allclose(volume.affine, brain.affine, atol=1e-3)
    for written in (to_nibabel(volume), to_nibabel(volume.replace(volume.array * 2))):
        np.testing.assert_allclose(written.get_qform(), scanner, atol=1e-2)
        np.testing.assert_allclose(written.get_sform(), image.affine, atol=1e-3)
        assert (written.header["qform_code"], written.header["sform_code"]) == (1, 2)


@pytest.mark.parametrize(
    "name", ["qform only", "sform only", "neither", "slope", "big-endian", "NIfTI-2", "pair", "gzipped pair", "nii.gz"]
)
def test_encodings(brain, name, tmp_path):
    values, affine = np.asarray(brain.dataobj), brain.affine
    image = reoriented(brain, "LPS")
    stored = np.asarray(image.dataobj)
    expected = values.astype(np.float32)
    path = tmp_path / "brain.nii"
    if name == "qform only":
        image.set_qform(image.affine, 1)
        image.set_sform(None, 0)
    elif name == "sform only":
        image.set_qform(None, 0)
        image.set_sform(image.affine, 3)
    elif name == "neither":
        header = nib.Nifti1Header()
        header.set_data_shape(stored.shape)
        header.set_zooms((1, 2, 3))
        image = nib.Nifti1Image(stored, None, header)
    elif name == "slope":
        image.header.set_slope_inter(0.5, -1024)  # of the integers as they are stored
        expected = expected * 0.5 - 1024
    elif name == "big-endian":
        image = nib.Nifti1Image(stored.astype(">i2"), image.affine, nib.Nifti1Header(endianness=">"))
    elif name == "NIfTI-2":
        image = nib.Nifti2Image(stored, image.affine)
    elif name in ("pair", "gzipped pair"):
        image = nib.Nifti1Pair(stored, image.affine)
        path = tmp_path / ("brain.hdr.gz" if name == "gzipped pair" else "brain.img")
    else:
        path = tmp_path / "brain.nii.gz"
    nib.save(image, path)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    if name == "neither":
        assert volume.spacing == pytest.approx((1, 2, 3))
    else:
        np.testing.assert_allclose(volume.array[0], expected, atol=1e-4)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    written, original = to_nibabel(volume), nib.load(path)
    np.testing.assert_allclose(np.asarray(written.dataobj), np.asarray(original.dataobj), atol=1e-4)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)
    assert written.header["qform_code"] == original.header["qform_code"]
    assert written.header["sform_code"] == original.header["sform_code"]


def test_other_length_units_become_millimeters(brain, tmp_path):
    brain.header.set_xyzt_units("micron")
    nib.save(brain, tmp_path / "micron.nii")
    volume = read_volume(tmp_path / "micron.nii")
    np.testing.assert_allclose(volume.spacing, (0.001, 0.002, 0.003), rtol=1e-5)
    assert to_nibabel(volume).header.get_xyzt_units()[0] == "mm"


def test_four_axes_are_channels_or_a_time_point():
    values = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1]))
    volume = read_volume(image)
    np.testing.assert_array_equal(volume.array, np.moveaxis(values, 3, 0)[:, ::-1])
    np.testing.assert_array_equal(read_volume(image, time_point=2).array, volume.array[2:])
    np.testing.assert_array_equal(np.asarray(to_nibabel(volume).dataobj), values)
    with pytest.raises(VolumeError, match="no time point 3"):
        read_volume(image, time_point=3)
    vector = nib.Nifti1Image(values[:, :, :, None], np.eye(4))
    np.testing.assert_array_equal(read_volume(vector).array, np.moveaxis(values, 3, 0))


def test_masks_hold_whole_numbers():
    labels = np.zeros((3, 4, 5), np.float32)
    labels[1, 2, 3] = 7
    mask = read_mask(nib.Nifti1Image(labels, np.eye(4)))
    assert mask.array.dtype == np.int16
    np.testing.assert_array_equal(mask.array[0], labels)
    for value, reason in [(0.5, "0.5, which is not a whole number"), (70000, "70000"), (np.nan, "not finite")]:
        labels[0, 0, 0] = value
        with pytest.raises(VolumeError, match=reason):
            read_mask(nib.Nifti1Image(labels, np.eye(4)))
    with pytest.raises(VolumeError, match="this file holds 2"):
        read_mask(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), np.eye(4)))


def bad_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 255]) + data[-7:]


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("checksum.nii.gz", bad_checksum, "damaged gzip.*CRC"),
        ("trailing.nii.gz", lambda data: data + b"more", "damaged gzip"),
        ("truncated.nii.gz", lambda data: data[: len(data) // 2], "damaged gzip"),
        ("truncated.nii", lambda data: gzip.decompress(data)[:-10], "voxels cannot be read"),
        ("plain.nii.gz", lambda data: gzip.decompress(data), "is not gzip, though .* rename it to plain.nii"),
        ("dimensions.nii", lambda data: (raw := gzip.decompress(data))[:42] + b"\xff\x7f" * 7 + raw[56:], "be read"),
        ("empty.nii", lambda data: b"", "is empty"),
        ("text.nii", lambda data: b"hello " * 200, "cannot be read as NIfTI"),
        ("pointer.nii.gz", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_damaged_files_are_refused(brain, tmp_path, name, spoil, reason):
    nib.save(brain, tmp_path / "brain.nii.gz")
    path = tmp_path / name
    path.write_bytes(spoil((tmp_path / "brain.nii.gz").read_bytes()))
    with pytest.raises(VolumeError, match=reason) as refused:
        read_volume(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("values", "affine", "reason"),
    [
        (np.full((3, 3, 3), np.nan, np.float32), np.eye(4), "27 of 27 values are not finite"),
        (np.full((3, 3, 3), 1e300), np.eye(4), "not finite"),
        (np.zeros((3, 3, 3), np.complex64), np.eye(4), "complex"),
        (np.zeros((3, 3), np.float32), np.eye(4), "three spatial axes"),
        (np.zeros((3, 3, 3, 2, 2), np.float32), np.eye(4), "at most one axis"),
        (np.zeros((3, 3, 3), np.float32), np.diag([1, 1, 0, 1]), "singular"),
        (np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4), "color image \\(RGB\\)"),
    ],
)
def test_unusable_values_are_refused(values, affine, reason):
    image = nib.Nifti1Image(values, None)
    image.set_sform(affine, 1)
    image._affine = affine.astype(float)
    with pytest.raises(VolumeError, match=reason):
        read_volume(image)


def test_missing_files_folders_and_other_types(tmp_path):
    with pytest.raises(VolumeError, match="nowhere.nii: no such file"):
        read_volume(tmp_path / "nowhere.nii")
    with pytest.raises(VolumeError, match="is a folder"):
        read_volume(tmp_path)
    with pytest.raises(VolumeError, match="expected a path"):
        read_volume(np.zeros((3, 3, 3)))


def test_writing_is_one_step(brain, tmp_path):
    path = tmp_path / "new" / "brain.nii.gz"
    volume = read_volume(brain)
    write_volume(volume, path, description="synthetic")
    assert nib.load(path).header["descrip"].item() == b"synthetic"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="complex64"):
        write_volume(volume.replace(volume.array.astype(np.complex64)), path)
    with pytest.raises(ValueError, match="at most 79 bytes"):
        write_volume(volume, path, description="x" * 80)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="name it .nii.gz"):
        write_volume(volume, tmp_path / "brain.mha")


@pytest.mark.parametrize(
    ("dtype", "low", "high", "stored"),
    [(bool, 0, 1, "uint8"), (np.int16, 0, 3, "uint8"), (np.int64, -5, 900, "int16"), (np.float64, -1, 1, "float32")],
)
def test_written_types(dtype, low, high, stored, tmp_path):
    array = np.zeros((1, 3, 4, 5), dtype)
    array[0, 0, 0, :2] = low, high
    write_volume(Volume(array, np.eye(4)), tmp_path / "a.nii")
    image = nib.load(tmp_path / "a.nii")
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asarray(image.dataobj), array[0])


def test_a_resampled_volume_goes_back_onto_the_grid_of_its_file(brain):
    stored = reoriented(brain, "ILA")
    coarse = resample(read_volume(stored), (2, 2, 2))
    written = to_nibabel(coarse)
    assert written.shape == stored.shape
    np.testing.assert_allclose(written.affine, stored.affine, atol=1e-6)


def test_a_resampled_mask_goes_back_label_by_label(brain):
    """To the nearest voxel: between labels 0 and 9 there is no other."""
    labels = np.random.default_rng(0).choice([0, 9], (5, 6, 7)).astype(np.uint8)
    stored = reoriented(nib.Nifti1Image(labels, brain.affine), "LPS")
    written = to_nibabel(resample(read_mask(stored), (0.4, 0.7, 1.1), nearest=True))
    assert set(np.unique(written.dataobj)) == {0, 9} and written.shape == stored.shape
    assert (np.asarray(written.dataobj) == np.asarray(stored.dataobj)).mean() > 0.95


def test_same_grid_allows_for_rounding_and_nothing_more(brain):
    volume = read_volume(brain)
    near, far = volume.affine.copy(), volume.affine.copy()
    near[:3, 3] += 1e-3
    far[0, 0] *= 1.05
    assert same_grid(volume, Volume(volume.array, near))
    assert not same_grid(volume, Volume(volume.array, far))
    assert not same_grid(volume, Volume(volume.array[..., 1:], volume.affine))


# The real files of ../shared/data/awkward; its README gives the answers.


@pytest.mark.parametrize("codes", ["ALS", "LAS", "LIA", "LPI", "LPS", "RAS"])
def test_awkward_orientations(awkward, codes):
    path = awkward / "nifti" / "orient" / f"{codes}.nii.gz"
    reference = read_volume(awkward / "nifti" / "orient" / "RAS.nii.gz")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, reference.array)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)
    written, original = to_nibabel(volume), nib.load(path)
    assert "".join(nib.aff2axcodes(written.affine)) == codes
    np.testing.assert_allclose(np.asarray(written.dataobj), np.asarray(original.dataobj), atol=1e-5)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-6)


@pytest.mark.parametrize("half", ["air.hdr.gz", "air.img.gz"])
def test_awkward_pair(awkward, half):
    volume = read_volume(awkward / "nifti_pairs" / half)
    reference = read_volume(awkward / "nifti" / "orient" / "RAS.nii.gz")
    np.testing.assert_allclose(volume.array, reference.array, atol=4e-6)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)


def test_awkward_byte_orders(awkward):
    big, little = read_volume(awkward / "nifti" / "zstat1.nii.gz"), read_volume(awkward / "nifti" / "little.nii.gz")
    np.testing.assert_array_equal(big.array, little.array)
    np.testing.assert_array_equal(big.affine, little.affine)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("nifti/anatomical.nii", (1, 33, 41, 25)),
        ("nifti/example4d.nii.gz", (2, 128, 96, 24)),
        ("nifti/example_nifti2.nii.gz", (2, 32, 20, 12)),
        ("nifti/little.nii.gz", (1, 64, 64, 21)),
        ("nifti/oblique_FLAIR.nii.gz", (1, 124, 160, 140)),
        ("nifti/standard.nii.gz", (1, 4, 5, 7)),
        ("nifti/zstat1.nii.gz", (1, 64, 64, 21)),
        ("nifti_pairs/ras.hdr", (1, 62, 41, 34)),
        ("nifti_pairs/ras.img", (1, 62, 41, 34)),
    ],
)
def test_awkward_files_are_read_and_go_back(awkward, name, shape):
    volume, original = read_volume(awkward / name), nib.load(awkward / name)
    assert volume.array.shape == shape
    assert "".join(nib.aff2axcodes(volume.affine)) == "RAS"
    written = to_nibabel(volume)
    expected = np.asarray(original.dataobj)
    np.testing.assert_array_equal(np.asarray(written.dataobj).reshape(expected.shape), expected)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-5)
    assert written.header["qform_code"] == original.header["qform_code"]
    assert written.header["sform_code"] == original.header["sform_code"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nifti/rgb24_tiny_3D.nii", "color image (RGB)"),
        ("nifti/rgba32_tiny_4D.nii", "color image (RGBA)"),
        ("nifti/rgb24_ct_perfusion.nii.gz", "color image (RGB)"),
        ("broken/not-nifti.nii", "cannot be read as NIfTI"),
        ("broken/crash-1.nii", "data code -9510 not recognized"),
        ("broken/lfs_pointer_liver_0.nii.gz", "Git LFS pointer"),
        ("broken/derived_truncated_gz.nii.gz", "ended before the end-of-stream marker"),
        ("broken/derived_truncated_raw.nii", "Expected 42840 bytes, got 29648 bytes"),
    ],
)
@pytest.mark.parametrize("reader", [read_volume, read_mask])
def test_awkward_files_are_refused_by_name_and_reason(awkward, name, reason, reader):
    with pytest.raises(VolumeError) as refused:
        reader(awkward / name)
    assert str(awkward / name) in str(refused.value)
    assert reason in str(refused.value)


def test_nothing_broken_is_left_untried(awkward):
    files = sorted((awkward / "broken").iterdir())
    assert len(files) >= 5
    for path in files:
        with pytest.raises(VolumeError):
            read_volume(path)

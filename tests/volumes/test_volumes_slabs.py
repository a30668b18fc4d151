"""Files in slabs: byte by byte what the whole volume makes, plane by plane what the whole file holds, in flat
memory."""

import gzip
import itertools
import resource
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from volumes import (
    SourceGrid,
    Volume,
    VolumeError,
    read_mask,
    read_slabs,
    read_volume,
    resample,
    stored_grid,
    to_nibabel,
    write_slabs,
    write_volume,
)
from volumes.formats import nifti
from volumes.formats import slabs as module

CODES = ["RAS", "LPS", "RAI", "SAR", "PIR", "ILA", "ASL", "IRP"]  # the third axis stored third, first, second; flipped


def on_grid_of(codes: str, channels: int = 1) -> Volume:
    """A volume of 5 x 6 x 7 voxels, all different, read from a file that stores its axes as `codes`."""
    affine = np.array([[0.98, -0.3, 0.2, -10], [0.2, 1.9, -0.4, 20], [-0.1, 0.4, 2.9, 30], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(size=(5, 6, 7, channels)).astype(np.float32) * 1000
    ornt = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(values, ornt)
    return read_volume(nib.Nifti1Image(stored, affine @ inv_ornt_aff(ornt, values.shape[:3])))


def thick(volume: Volume, *thickness: int) -> list[np.ndarray]:
    return np.split(volume.array, list(itertools.accumulate(thickness)), axis=3)


@pytest.fixture(params=["blocks of one plane", "as it is"])
def small_blocks(request, monkeypatch):
    """So small a file is otherwise one block."""
    if request.param != "as it is":
        monkeypatch.setattr(module, "BLOCK_BYTES", 1)
        monkeypatch.setattr(module, "GATHERED_BYTES", 1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("codes", CODES)
def test_slabs_make_the_same_bytes(small_blocks, codes, dtype, channels, tmp_path):
    volume = on_grid_of(codes, channels)
    image = to_nibabel(volume, dtype=dtype, description="synthetic")
    assert image.get_data_dtype() == dtype and nib.aff2axcodes(image.affine) == tuple(codes)
    np.testing.assert_allclose(read_volume(image).array, volume.array, atol=0.501 if dtype == np.int16 else 0)
    for suffix in (".nii", ".nii.gz"):
        whole, parts = tmp_path / f"whole{suffix}", tmp_path / "new" / f"parts{suffix}"
        nib.save(image, whole)
        write_slabs(parts, thick(volume, 3, 0, 1), stored_grid(volume), dtype, description="synthetic")
        assert parts.read_bytes() == whole.read_bytes()  # nibabel's gzip holds no name and no time
        assert list(parts.parent.iterdir()) == [parts]
        parts.unlink()


def test_a_float_volume_is_written_as_write_volume_does(tmp_path):
    volume = on_grid_of("ASL", 2)
    write_volume(volume, tmp_path / "whole.nii")
    write_slabs(tmp_path / "parts.nii", thick(volume, 2), stored_grid(volume), np.float32)
    assert (tmp_path / "parts.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()


@pytest.mark.parametrize("slabs", [(), (4,), (7, 1), "other"])
def test_slabs_that_do_not_fill_the_grid_leave_no_file(slabs, tmp_path):
    volume = on_grid_of("LPS")
    given = [volume.array[:, 1:]] if slabs == "other" else [volume.array[..., :n] for n in slabs]
    with pytest.raises(ValueError, match="brain.nii: .*(the grid has 7|does not fit a grid of)"):
        write_slabs(tmp_path / "brain.nii", given, stored_grid(volume), np.int16)
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_way_leaves_what_was_there(tmp_path):
    volume, path = on_grid_of("PIR"), tmp_path / "brain.nii.gz"
    path.write_bytes(b"before")

    def failing():
        yield volume.array[..., :3]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_slabs(path, failing(), stored_grid(volume), np.float32)
    with pytest.raises(ValueError, match="name it .nii.gz or .nii"):
        write_slabs(tmp_path / "brain.mha", thick(volume), stored_grid(volume), np.float32)
    with pytest.raises(ValueError, match="at most 79 bytes"):
        write_slabs(path, thick(volume), stored_grid(volume), np.float32, description="x" * 80)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", ["RAS", "SAR"])
def test_a_full_disk_leaves_no_file(codes, suffix, tmp_path):
    """After the first slab no byte beyond the 600th can be written, as if the disk were full then."""
    volume = on_grid_of(codes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def slabs():
        yield volume.array[..., :2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        yield volume.array[..., 2:]

    try:
        with pytest.raises(OSError, match="File too large"):
            write_slabs(tmp_path / f"brain{suffix}", slabs(), stored_grid(volume), np.float32)
        with pytest.raises(OSError, match="File too large"):
            write_volume(volume, tmp_path / "brain.nii")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".img.gz"])
@pytest.mark.parametrize("codes", CODES)
def test_slabs_are_what_is_read_whole(small_blocks, codes, suffix, tmp_path):
    image = to_nibabel(on_grid_of(codes, 2), dtype=np.int16)
    image = nib.Nifti1Pair(image.dataobj, image.affine) if suffix in (".hdr", ".img.gz") else image
    image.header.set_slope_inter(0.37, -1024)  # of the integers as they are stored
    nib.save(image, tmp_path / f"brain{suffix}")
    volume = read_volume(tmp_path / f"brain{suffix}")
    slabs = list(read_slabs(tmp_path / f"brain{suffix}", 3))
    assert [slab.shape for slab in slabs] == [(2, 5, 6, 3), (2, 5, 6, 3), (2, 5, 6, 1)]
    assert all(slab.dtype == np.float32 and slab.flags.c_contiguous for slab in slabs)
    np.testing.assert_array_equal(np.concatenate(slabs, axis=3), volume.array)


def test_other_encodings_are_what_is_read_whole(tmp_path):
    values = np.asarray(to_nibabel(on_grid_of("RAI"), dtype=np.int16).dataobj)
    images = [
        nib.Nifti1Image(values.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">")),
        nib.Nifti2Image(values.astype(np.float64), np.diag([-1, 1, -1, 1])),
        nib.Nifti1Image(values[:, :, :, None, None].repeat(3, axis=4), np.eye(4)),
        nib.Nifti1Image(values.astype(np.uint8), np.eye(4)),
    ]
    for number, image in enumerate(images):
        nib.save(image, tmp_path / f"{number}.nii")
        slabs = list(read_slabs(tmp_path / f"{number}.nii", 4))
        np.testing.assert_array_equal(np.concatenate(slabs, axis=3), read_volume(tmp_path / f"{number}.nii").array)


def bad_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 255]) + data[-7:]


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("checksum.nii.gz", bad_checksum, "damaged gzip.*CRC"),
        ("trailing.nii.gz", lambda data: data + b"more", "damaged gzip"),
        ("truncated.nii.gz", lambda data: data[: len(data) // 2], "damaged gzip|cannot be read"),
        ("truncated.nii", lambda data: gzip.decompress(data)[:-10], "expected 1192 bytes, got 1182; it is truncated"),
        ("short.nii.gz", lambda data: gzip.compress(gzip.decompress(data)[:-10]), "it is truncated"),
        ("plain.nii.gz", lambda data: gzip.decompress(data), "is not gzip, though"),
        (
            "dimensions.nii",
            lambda data: (raw := gzip.decompress(data))[:42] + b"\xff\x7f" * 7 + raw[56:],
            "cannot be read",
        ),
        ("empty.nii", lambda data: b"", "is empty"),
    ],
)
def test_damaged_files_are_refused_before_the_first_slab(tmp_path, name, spoil, reason):
    write_volume(on_grid_of("LPS"), tmp_path / "brain.nii.gz")
    (tmp_path / name).write_bytes(spoil((tmp_path / "brain.nii.gz").read_bytes()))
    with pytest.raises(VolumeError, match=reason) as refused:
        read_slabs(tmp_path / name, 2)
    assert str(tmp_path / name) in str(refused.value)


def test_values_that_are_not_finite_are_named_by_their_planes(tmp_path):
    volume = on_grid_of("SAR")
    bad = to_nibabel(volume)
    volume.array[0, 1, 2:4, 5] = np.nan
    np.asarray(bad.dataobj)[:] = nifti.stored_order(volume.array, stored_grid(volume))[..., 0]
    nib.save(bad, tmp_path / "brain.nii")
    slabs = read_slabs(tmp_path / "brain.nii", 2)
    assert next(slabs).shape == next(slabs).shape == (1, 5, 6, 2)
    with pytest.raises(VolumeError, match="brain.nii: 2 of 60 values in planes 4 to 5 are not finite"):
        next(slabs)
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    with pytest.raises(VolumeError, match="complex"):
        read_slabs(tmp_path / "complex.nii", 2)
    with pytest.raises(ValueError, match="1 plane or more, not 0"):
        read_slabs(tmp_path / "brain.nii", 0)


def test_a_resampled_volume_is_rounded_after_it_went_back():
    volume = on_grid_of("ILA")
    coarse = resample(volume, (2, 2, 2))
    exact, whole = to_nibabel(coarse), to_nibabel(coarse, dtype=np.int16)
    np.testing.assert_array_equal(np.asarray(whole.dataobj), np.rint(np.asarray(exact.dataobj)))


@pytest.mark.parametrize(
    ("value", "dtype"), [(300.0, np.uint8), (-1.0, np.uint8), (32767.6, np.int16), (70000, np.int16)]
)
def test_voxels_that_would_wrap_around_are_refused(value, dtype, tmp_path):
    volume = on_grid_of("LPS")
    volume.array[:] = 100
    volume = volume.replace(volume.array.astype(type(value)))
    volume.array[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=f"do not fit {np.dtype(dtype)} .*write them as float32"):
        to_nibabel(volume, dtype=dtype)
    with pytest.raises(ValueError, match=f"do not fit {np.dtype(dtype)} "):
        write_slabs(tmp_path / "brain.nii", thick(volume, 2), stored_grid(volume), dtype)
    assert not list(tmp_path.iterdir())
    volume.array[0, 1, 2, 3] = 255
    assert np.asarray(to_nibabel(volume, dtype=dtype).dataobj).max() == 255


def test_masks_of_integers_and_of_floats_are_the_same(tmp_path):
    labels = np.random.default_rng(0).integers(-3, 400, (4, 5, 6))
    for dtype in (np.int16, np.uint16, np.int32, np.float32, np.float64):
        stored = np.abs(labels).astype(dtype)
        np.testing.assert_array_equal(read_mask(nib.Nifti1Image(stored, np.eye(4))).array[0], np.abs(labels))
    image = nib.Nifti1Image(labels.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 0)
    nib.save(image, tmp_path / "halves.nii")
    with pytest.raises(VolumeError, match="not a whole number"):
        read_mask(tmp_path / "halves.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("affine", [np.eye(4), np.eye(4)[[1, 2, 0, 3]]], ids=["third axis last", "third axis first"])
def test_memory_does_not_grow_with_the_file(affine, suffix, tmp_path, monkeypatch):
    """1 and 3 MiB of voxels go through the same few hundred KiB, both ways."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(module, "GATHERED_BYTES", 1 << 18)
    monkeypatch.setattr(module, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(nifti, "COPY_BYTES", 1 << 16)
    slab = np.random.default_rng(0).integers(0, 9, (1, 64, 64, 8)).astype(np.float32)
    peaks = []
    for depth in (64, 192):
        grid = SourceGrid((64, 64, depth) if affine[2, 2] else (depth, 64, 64), affine, affine, 1, 1)
        tracemalloc.start()
        write_slabs(tmp_path / f"a{suffix}", (slab for _ in range(depth // 8)), grid, np.float32)
        for read in read_slabs(tmp_path / f"a{suffix}", 8):
            assert np.array_equal(read, slab)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1 << 20 and peaks[1] < 1.1 * peaks[0], peaks

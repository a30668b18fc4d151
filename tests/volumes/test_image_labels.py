"""Label maps as images: from files to channels, and from channels back to one label map, with planted values."""

import csv
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from shifted_coder import ShiftedCoder
from tiny import seeded, tiny_data, tiny_pipeline

from evaluation import evaluate_reconstruction
from pipelines import VolumeProcessor
from volumes import (
    DataConfig,
    IntensityScaling,
    PhantomConfig,
    VolumeDataset,
    VolumeError,
    describe,
    load_cases,
    merge_channels,
    read_volume,
)
from volumes.description import ChannelScale

ROOT = Path(__file__).resolve().parents[2]
LABELS = {5: "cortex", 0: "outside", 9: "medulla"}
SHAPE = (9, 10, 11)


def planted() -> np.ndarray:
    """A medulla of label 9 within a cortex of label 5."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 2:8, 2:9] = 5
    labels[4:6, 3:7, 4:7] = 9
    return labels


def dataset_of(folder, labels, **changes) -> VolumeDataset:
    nib.save(nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1])), folder / "gland.nii.gz")
    settings = {"root": str(folder), "images": "*.nii.gz", "image_labels": LABELS, "validation_fraction": 0, **changes}
    config = DataConfig(**settings)
    return VolumeDataset(load_cases(config), config)


def test_no_voxel_of_a_label_map_is_unknown():
    """Only a mask's may be; a label map with masks of its own may say so of these."""
    settings = {"images": "i/{x}.nii.gz", "image_labels": LABELS, "label_map": {255: -2}}
    with pytest.raises(
        ValueError, match=r"label_map calls \[255\] unknown \(-2\), which is for masks, and image_labels"
    ):
        DataConfig(**settings)
    assert DataConfig(**settings, masks="m/{x}.nii.gz", label_names={0: "background"}).masks
    assert DataConfig(**{**settings, "image_labels": {-2: "outside", 1: "cortex"}}).label_map == {255: -2}


def test_each_label_is_a_channel(tmp_path):
    dataset = dataset_of(tmp_path, planted())
    image = dataset[0]["image"].numpy()
    assert dataset.channels == ["cortex", "medulla"] and image.dtype == np.float32
    np.testing.assert_array_equal(image[0], np.where(planted() == 5, 1, -1))
    np.testing.assert_array_equal(image[1], np.where(planted() == 9, 1, -1))
    described = describe(dataset)
    assert described.image_labels == {0: "outside", 5: "cortex", 9: "medulla"} and described.labels == {}
    assert described.channels == ("cortex", "medulla")
    assert described.intensity == (ChannelScale("window", low=0.0, high=1.0),) * 2
    np.testing.assert_array_equal(merge_channels(image, [0, 5, 9])[0], planted())


def test_values_are_translated_and_unknown_ones_named(tmp_path):
    labels = planted()
    labels[labels == 9] = 200
    with pytest.raises(VolumeError, match=r"gland.nii.gz: .*labels \[200\] that have no name"):
        dataset_of(tmp_path, labels)
    image = dataset_of(tmp_path, labels, label_map={200: 9})[0]["image"]
    np.testing.assert_array_equal(image[1], np.where(labels == 200, 1, -1))
    with pytest.raises(ValueError, match=r"label_map leads to \[7\]"):
        dataset_of(tmp_path, labels, label_map={200: 7})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_labels": {0: "outside"}}, "names the background and one label or more"),
        ({"image_labels": {0: "outside", 1: "gland", 2: "gland"}}, "each once"),
        ({"images": {"CT": "ct/*.nii"}}, "give images as one pattern"),
        ({"intensity": IntensityScaling("window", 0, 9)}, "intensity has no effect on label maps"),
        ({"time_point": 1}, "time_point 1 is of 4-D images"),
        ({"images": [], "phantom": PhantomConfig()}, "phantom takes the place of files; remove image_labels"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        DataConfig(**{"images": "*.nii", "image_labels": LABELS, **changes})


def test_channels_are_merged_to_the_largest_above_the_threshold():
    channels = np.array([[0.1, -0.1, 0.9, 0.2], [-0.5, -0.9, 0.3, 0.6]]).reshape(2, 1, 1, 4)
    assert merge_channels(channels, [-3, 5, 400]).ravel().tolist() == [5, -3, 5, 400]
    assert merge_channels(channels, [-3, 5, 400], threshold=0.5).ravel().tolist() == [-3, -3, 5, 400]
    tied = np.array([[0.5, 0.7], [0.2, 0.7]]).reshape(2, 1, 1, 2)  # at the threshold is not above it; of two, the first
    assert merge_channels(tied, [-3, 5, 400], threshold=0.5).ravel().tolist() == [-3, 5]


def processor_of(values, spacing=2.0) -> VolumeProcessor:
    names = {str(value): f"label {value}" for value in values}
    intensity = [{"kind": "window", "low": 0.0, "high": 1.0}] * (len(values) - 1)
    grid = {"spacing": [spacing] * 3, "affine": np.diag([spacing] * 3 + [1.0]).tolist()}
    data = tiny_data(channels=list(names.values())[1:], image_labels=names, intensity=intensity, **grid)
    return VolumeProcessor(data, (4, 4, 4))


def decoded() -> torch.Tensor:
    """What an autoencoder might make of the planted map: right by a narrow margin."""
    channels = np.stack([np.where(planted() == value, 0.1, -0.1) for value in (5, 9)])
    return torch.from_numpy(channels).float()


@pytest.mark.parametrize(("values", "dtype"), [((0, 5, 9), np.uint8), ((0, 5, 300), np.int16), ((-2, 5, 9), np.int16)])
def test_the_output_is_one_label_map(values, dtype, tmp_path):
    processor = processor_of(values)
    prepared = processor.preprocess_shape(SHAPE)
    sample = prepared.placement.apply(decoded(), 0.05)  # the padding is nonsense
    expected = np.full(SHAPE, values[0], dtype)
    for old, new in zip((5, 9), values[1:], strict=True):
        expected[planted() == old] = new
    image = processor.postprocess(sample, prepared)
    assert image.get_data_dtype() == dtype and image.shape == SHAPE
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
    for kind in ("np", "pt"):
        array = np.asarray(processor.postprocess(sample, prepared, kind))
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected[None])
    processor.write(sample.split(5, dim=3), prepared, tmp_path / "slabs.nii.gz")
    nib.save(image, tmp_path / "whole.nii.gz")
    assert (tmp_path / "slabs.nii.gz").read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()


def test_channels_of_another_grid_are_resampled_before_merging():
    """Halfway between labels 0 and 9, a label map that was interpolated would say 4 or 5: another organ."""
    processor = processor_of((0, 5, 9), spacing=2.0)
    processor.labels = {0: "background", 1: "here"}
    fine = nib.Nifti1Image(np.ones((16, 16, 16), np.int16), np.eye(4))  # of 1 mm: resampled, and back
    with pytest.warns(UserWarning, match="the mask is resampled"):
        prepared = processor.preprocess(fine)
    assert prepared.grid.shape == (8, 8, 8)
    sample = torch.full((2, 8, 8, 8), -1.0)
    sample[1, 2:6, 2:6, 2:6] = 1.0
    image = processor.postprocess(sample, prepared)
    array = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.uint8 and array.shape == (16, 16, 16)
    expected = np.zeros((16, 16, 16), np.uint8)
    expected[4:12, 4:12, 4:12] = 9
    assert set(np.unique(array)) == {0, 9}
    assert (array != expected).sum() <= 12 * 8 * 4  # edges are rounded, faces are where they were
    assert (array[4:12, 8, 8] == 9).all() and (array[[3, 12], 8, 8] == 0).all()


def test_a_pipeline_writes_label_maps(tmp_path):
    names = {"0": "background", "1": "gland"}
    pipe = tiny_pipeline(
        num_labels=0, labels={}, image_labels=names, intensity=[{"kind": "window", "low": 0.0, "high": 1.0}]
    )
    whole = pipe(shape=(9, 10, 11), generator=seeded(3), output_type="np", num_inference_steps=2).volumes[0]
    pipe.vae.enable_tiling(slab_bytes=1)
    path = tmp_path / "gland.nii.gz"
    pipe(shape=(9, 10, 11), generator=seeded(3), paths=path, num_inference_steps=2)
    assert nib.load(path).get_data_dtype() == np.uint8
    written = read_volume(path).array
    assert set(np.unique(whole)) == {0, 1}
    assert (written != whole).mean() < 0.01  # slabs are equal to rounding


def test_reconstructions_have_a_dice_for_each_label(tmp_path):
    """A coder that darkens by 2.5 wipes every label out, one that darkens by 0.5 loses nothing."""
    dataset = dataset_of(tmp_path, np.kron(planted(), np.ones((3, 3, 3), np.uint8)))
    exact = evaluate_reconstruction(ShiftedCoder(0.5), dataset)["dice"]
    assert exact == {name: {"volumes": 1, "mean": 1.0, "lowest": 1.0} for name in ("cortex", "medulla")}
    assert evaluate_reconstruction(ShiftedCoder(2.5), dataset)["dice"]["cortex"]["mean"] == 0


def test_dice_leaves_out_volumes_that_lack_the_label(tmp_path):
    whole = np.kron(planted(), np.ones((3, 3, 3), np.uint8))
    nib.save(nib.Nifti1Image(np.where(whole == 9, 5, whole), np.eye(4)), tmp_path / "no_medulla.nii.gz")
    dice = evaluate_reconstruction(ShiftedCoder(0.5), dataset_of(tmp_path, whole))["dice"]
    assert {name: (row["volumes"], row["mean"]) for name, row in dice.items()} == {"cortex": (2, 1), "medulla": (1, 1)}


def test_adrenal_shapes_are_prepared(tmp_path):
    """Of three glands in the test split one has the diagnosis 1: so do 333 of 1,000 requests."""
    arrays = {}
    for split, labels in (("train", [0, 1]), ("val", [0]), ("test", [0, 1, 0])):
        arrays[f"{split}_images"] = np.zeros((len(labels), 4, 4, 4), np.uint8)
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)[:, None]
    arrays["test_images"][1, 0, 1, 2] = 255
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    runpy.run_path(str(ROOT / "configs/adrenal_shapes/prepare.py"))["prepare"](tmp_path / "set.npz", tmp_path / "data")
    shape = read_volume(tmp_path / "data/shapes/test_0001.nii.gz")
    assert shape.array.sum() == shape.array[0, 0, 1, 2] == 1
    np.testing.assert_allclose(shape.affine @ [1.5, 1.5, 1.5, 1], [0, 0, 0, 1])  # the center of the box of 64 mm
    assert shape.spacing == (16, 16, 16)
    with open(tmp_path / "data/shapes.csv") as table:
        rows = list(csv.reader(table))
    assert rows[0] == ["name", "split", "diagnosis"] and ["test_0001", "test", "hyperplasia"] in rows
    assert ["validation_0000", "validation", "normal"] in rows and len(rows) == 7
    with open(tmp_path / "data/conditions.csv") as table:
        wanted = [row["diagnosis"] for row in csv.DictReader(table)]
    assert (wanted.count("normal"), wanted.count("hyperplasia")) == (667, 333)

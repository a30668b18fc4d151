"""From cases to tensors: labels, scaling, refusals, crops and padding, with values that are known."""

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

from volumes import (
    PADDING,
    UNKNOWN,
    CropDataset,
    DataConfig,
    IntensityScaling,
    PhantomConfig,
    VolumeDataset,
    VolumeError,
    describe,
    load_cases,
    pad_sample,
)
from volumes import label_indices as to_indices
from volumes.description import ChannelScale

SHAPES = {"a": (9, 10, 11), "b": (6, 12, 8), "c": (7, 7, 7)}


def nearly_constant(shape, value):
    """All voxels but the last; a volume that is constant is refused."""
    values = np.full(shape, value, np.int16)
    values[-1, -1, -1] += 1
    return values


def save(values, path, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


@pytest.fixture
def folder(tmp_path):
    """Three volumes whose voxels are numbered, so that any voxel can be found again, and masks of labels 0, 5 and 9."""
    for name, shape in SHAPES.items():
        save(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), tmp_path / "images" / f"{name}.nii")
        labels = np.zeros(shape, np.uint8)
        labels[2:4, 2:5], labels[4:6, 2:5] = 5, 9
        save(labels, tmp_path / "labels" / f"{name}.nii")
    return tmp_path


def config_of(folder, **changes):
    arguments = {
        "root": str(folder),
        "images": "images/*.nii",
        "masks": "labels/*.nii",
        "label_names": {9: "posterior", 0: "background", 5: "anterior"},
        "intensity": IntensityScaling("window", 0, 1000),
        "validation_fraction": 0,
    }
    return DataConfig(**{**arguments, **changes})


def dataset_of(folder, **changes):
    config = config_of(folder, **changes)
    return VolumeDataset(load_cases(config), config)


def test_items(folder):
    item = dataset_of(folder)[1]
    number = np.arange(6 * 12 * 8).reshape(6, 12, 8)
    assert item["image"].dtype == torch.float32 and item["mask"].dtype == torch.int16
    np.testing.assert_allclose(item["image"][0], number / 500 - 1, atol=1e-6)
    expected = np.zeros((6, 12, 8), np.int16)
    expected[2:4, 2:5], expected[4:6, 2:5] = 1, 2  # places of 5 and 9 among the sorted values
    np.testing.assert_array_equal(item["mask"], expected)
    assert (item["name"], item["subject"], item["index"]) == ("b", "b", 1)
    np.testing.assert_array_equal(item["affine"], np.eye(4))
    np.testing.assert_array_equal(item["scale"], [[0, 1000]])


def test_labels_are_mapped_then_named(folder):
    item = dataset_of(folder, label_map={9: 5}, label_names={0: "background", 5: "organ"})[0]
    assert item["mask"].unique().tolist() == [0, 1]
    with pytest.raises(
        VolumeError, match=r"a.nii: mask holds labels \[5, 9\] that have no name \(named are \[0, 1\]\)"
    ):
        dataset_of(folder, label_names={0: "background", 1: "organ"})
    with pytest.raises(ValueError, match="masks are given but label_names is not"):
        dataset_of(folder, label_names={})


def test_negative_labels():
    labels = np.array([-3, 0, 32767, -32768], np.int16)
    assert to_indices(labels, [-32768, -3, 0, 32767]).tolist() == [1, 2, 3, 0]
    assert to_indices(labels, [0, 1], {-3: 1, 32767: 0, -32768: 0}).tolist() == [1, 0, 0, 0]
    with pytest.raises(VolumeError, match=r"labels \[-32768, -3\]"):
        to_indices(labels, [0, 32767])


def test_a_label_is_unknown_only_where_a_mask_says_so():
    labels = np.array([0, 255, -2], np.int16)
    assert to_indices(labels, [0, 1], {255: UNKNOWN}, partial=True).tolist() == [0, UNKNOWN, UNKNOWN]
    with pytest.raises(VolumeError, match=r"holds \[255\], which label_map calls unknown \(-2\).*map them to a label"):
        to_indices(labels, [0, 1], {255: UNKNOWN, -2: 0})
    with pytest.raises(VolumeError, match=r"labels \[-2\] that have no name.*{-2: -2} maps -2 to unknown"):
        to_indices(labels, [0, 1], {255: 0}, partial=True)


def test_without_masks(folder):
    dataset = dataset_of(folder, masks=None, label_names={})
    assert dataset.num_labels == 0
    assert "mask" not in dataset[0] and "mask" not in pad_sample(dataset[0], 4)
    assert "mask" not in CropDataset(dataset, (4, 4, 4), seed=0)[0]


def test_channels_are_scaled_each_in_its_own_way(folder):
    """CT from -300 to 1070 in its window, which cuts off both ends; PET from 0 to 342 by its own extremes."""
    for name, shape in SHAPES.items():
        hounsfield = 4 * np.arange(np.prod(shape), dtype=np.int16).reshape(shape) - 300
        save(hounsfield, folder / "ct" / f"{name}.nii")
    window, percentiles = IntensityScaling("window", -160, 240), IntensityScaling("percentile", 0, 100)
    dataset = dataset_of(
        folder,
        images={"PET": "images/*.nii", "CT": "ct/*.nii"},
        intensity={"CT": window, "PET": percentiles},
    )
    item = dataset[2]
    assert dataset.channels == ["PET", "CT"]
    np.testing.assert_allclose(item["image"][0].flatten(), np.linspace(-1, 1, 343), atol=1e-6)
    expected = np.clip((4 * np.arange(343) - 300 + 160) / 200 - 1, -1, 1)
    np.testing.assert_allclose(item["image"][1].flatten(), expected, atol=1e-6)
    np.testing.assert_allclose(item["scale"], [[0, 342], [-160, 240]])


def test_other_grids_are_refused(folder):
    save(np.zeros(SHAPES["b"], np.uint8), folder / "labels" / "b.nii", np.diag([1.0, 1, 2, 1]))
    with pytest.raises(VolumeError, match=r"labels/b.nii: is not on the grid of .*images/b.nii.*1 x 1 x 2 mm"):
        dataset_of(folder)


def test_a_common_spacing(folder):
    for name, shape in SHAPES.items():
        save(nearly_constant(shape, 300).astype(np.float32), folder / "images" / f"{name}.nii", np.diag([1.0, 1, 2, 1]))
        save(np.full(shape, 5, np.uint8), folder / "labels" / f"{name}.nii", np.diag([1.0, 1, 2, 1]))
    item = dataset_of(folder, spacing=(1.0, 1.0, 1.0))[0]
    assert item["image"].shape == (1, 9, 10, 22) and item["mask"].shape == (9, 10, 22)
    np.testing.assert_allclose(item["image"][:, :-2], -0.4, atol=1e-6)
    assert (item["mask"] == 1).all()
    np.testing.assert_allclose(np.linalg.norm(item["affine"][:3, :3], axis=0), 1)


def test_one_4d_file_fills_several_channels(folder):
    for name, shape in SHAPES.items():
        values = np.stack([nearly_constant(shape, value) for value in (100, 250, 700)], axis=-1)
        save(values, folder / "images" / f"{name}.nii")
    images = {"T2": "images/*.nii", "T1": "images/*.nii"}
    item = dataset_of(folder, images=images, time_point={"T1": 0, "T2": 2})[0]
    np.testing.assert_allclose(item["image"][:, 0, 0, 0], [0.4, -0.8], atol=1e-6)  # 700 and 100 of 0..1000
    np.testing.assert_allclose(dataset_of(folder, time_point=1)[0]["image"].flatten()[:-1], -0.5, atol=1e-6)
    with pytest.raises(VolumeError, match="a.nii: holds 3 volumes, .*choose it with time_point"):
        dataset_of(folder)
    with pytest.raises(VolumeError, match="a.nii: has no time point 3"):
        dataset_of(folder, time_point=3)


def test_a_row_whose_file_is_missing_is_skipped_and_listed(folder):
    (folder / "table.csv").write_text("case\na\nb\nnowhere\n")
    table = {"table": "table.csv", "images": "images/{case}.nii", "masks": "labels/{case}.nii"}
    with pytest.raises(ValueError, match="nowhere.nii: no such file"):
        dataset_of(folder, **table)
    dataset = dataset_of(folder, **table, on_error="skip")
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.skipped == [("nowhere", f"{folder / 'images/nowhere.nii'}: no such file")]


def test_a_constant_channel_is_named(folder):
    values = np.stack([nearly_constant(SHAPES["a"], 100), np.full(SHAPES["a"], 7, np.int16)], axis=-1)
    save(values, folder / "images" / "a.nii")
    with pytest.raises(VolumeError, match=r"images/a.nii: channel t2: every voxel is 7: it is constant"):
        dataset_of(
            folder, images={"t1": "images/a.nii", "t2": "images/a.nii"}, masks=None, time_point={"t1": 0, "t2": 1}
        )


def test_refused_files_stop_or_are_skipped_and_listed(folder, caplog):
    (folder / "images" / "b.nii").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    save(np.full(SHAPES["c"], 3.0, np.float32), folder / "images" / "c.nii")
    percentiles = IntensityScaling()
    with pytest.raises(VolumeError, match=r"images/b.nii: is a Git LFS pointer"):
        dataset_of(folder, intensity=percentiles)
    with caplog.at_level(logging.WARNING):
        dataset = dataset_of(folder, intensity=percentiles, on_error="skip")
    assert [case.name for case in dataset.cases] == ["a"] and len(dataset) == 1
    assert [name for name, _ in dataset.skipped] == ["b", "c"]
    assert "Git LFS pointer" in dataset.skipped[0][1] and "constant" in dataset.skipped[1][1]
    assert "2 of 3 cases were skipped" in caplog.text and str(folder / "images" / "c.nii") in caplog.text
    (folder / "images" / "a.nii").write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 cases were skipped"):
        dataset_of(folder, intensity=percentiles, on_error="skip")


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 8), (16, 5, 9)])
def test_crops_show_the_volume_and_padding_is_not_background(folder, shape):
    dataset = dataset_of(folder)
    crops = CropDataset(dataset, shape, seed=0, samples_per_volume=4)
    assert len(crops) == 12
    for index in range(len(crops)):
        crop, whole = crops[index], dataset[index // 4]
        assert crop["index"] == index // 4 and crop["name"] == whole["name"]
        assert crop["image"].shape == (1, *shape) and crop["mask"].shape == shape and crop["fov"].shape == (1, *shape)
        seen = crop["fov"][0]
        # as much of the volume as fits is seen
        assert seen.sum() == np.prod([min(n, w) for n, w in zip(whole["mask"].shape, shape, strict=True)])
        # seen voxels are those of the volume, in order: each voxel's number tells its place
        number = ((crop["image"][0][seen].double() + 1) * 500).round().long()
        place = np.stack(np.unravel_index(number.numpy(), tuple(whole["mask"].shape)))
        offset = place - np.stack(np.nonzero(seen.numpy()))
        assert (offset == offset[:, :1]).all()
        assert (crop["mask"][seen] == whole["mask"][tuple(place)]).all()
        # padding has its own label and the lowest intensity
        assert (crop["mask"][~seen] == PADDING).all() and (crop["image"][0][~seen] == -1).all()
        assert (crop["mask"][seen] >= 0).all()


def test_crops_reach_every_place(folder):
    crops = CropDataset(dataset_of(folder), (8, 8, 8), seed=0)
    starts = set()
    for epoch in range(200):
        crops.set_epoch(epoch)
        fov = crops[2]["fov"][0]  # volume c, 7^3: one plane of padding, at either end of each axis
        starts.add(tuple(int(axis.min()) for axis in fov.nonzero(as_tuple=True)))
    assert starts == {(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)}


def test_flips_turn_image_mask_and_field_of_view_together(folder):
    dataset = dataset_of(folder)
    plain = CropDataset(dataset, (12, 8, 14), seed=0)  # larger than the volume along the axes that are flipped
    flipping = CropDataset(dataset, (12, 8, 14), seed=0, flip_axes=(0, 2))
    seen = set()
    for epoch in range(40):
        plain.set_epoch(epoch)
        flipping.set_epoch(epoch)
        a, b = plain[0], flipping[0]
        assert torch.equal(b["fov"][0], b["mask"] != PADDING) and not b["fov"].all()
        matches = [
            axes
            for axes in ((), (0,), (2,), (0, 2))
            if all(torch.equal(a[k].flip([axis - 3 for axis in axes]), b[k]) for k in ("image", "mask", "fov"))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == {(), (0,), (2,), (0, 2)}


def test_randomness_is_of_seed_epoch_and_index_alone(folder):
    dataset = dataset_of(folder)
    first = CropDataset(dataset, (5, 5, 5), seed=1, flip_axes=(0, 1, 2), samples_per_volume=5)
    again = CropDataset(dataset, (5, 5, 5), seed=1, flip_axes=(0, 1, 2), samples_per_volume=5)
    first.set_epoch(3)
    again.set_epoch(3)
    backwards = [again[i] for i in reversed(range(15))][::-1]
    for index in range(15):
        torch.rand(1)  # global state plays no part
        assert torch.equal(first[index]["image"], backwards[index]["image"])
    images = {epoch: [] for epoch in (3, 4)}
    for epoch in images:
        first.set_epoch(epoch)
        images[epoch] = [first[i]["image"] for i in range(15)]
    assert any(not torch.equal(a, b) for a, b in zip(*images.values(), strict=True))


def test_workers_see_the_epoch(folder):
    crops = CropDataset(dataset_of(folder), (5, 5, 5), seed=0, samples_per_volume=2)
    loader = DataLoader(crops, batch_size=3, num_workers=1)
    for epoch in (0, 5):
        crops.set_epoch(epoch)
        batches = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(batches, torch.stack([crops[i]["image"] for i in range(6)]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"shape": (4, 4)}, "three positive numbers"),
        ({"shape": (4, 4, 4), "flip_axes": (3,)}, "flip_axes"),
        ({"shape": (4, 4, 4), "samples_per_volume": 0}, "1 or more"),
    ],
)
def test_impossible_crops(folder, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        CropDataset(dataset_of(folder), seed=0, **arguments)


def test_padding_whole_volumes(folder):
    dataset = dataset_of(folder)
    whole = dataset[0]
    padded = pad_sample(whole, (4, 8, 4))
    assert padded["image"].shape == (1, 12, 16, 12)
    assert padded["fov"].sum() == 9 * 10 * 11
    assert (padded["mask"] == PADDING).sum() == 12 * 16 * 12 - 9 * 10 * 11
    assert (padded["image"][~padded["fov"]] == -1).all()
    assert torch.equal(padded["placement"].undo(padded["image"]), whole["image"])
    assert torch.equal(padded["placement"].undo(padded["mask"]), whole["mask"])
    np.testing.assert_allclose(padded["affine"] @ torch.tensor([1.0, 3, 0, 1]).double(), [0, 0, 0, 1])
    assert whole["image"].shape == (1, 9, 10, 11)


def test_describe(folder):
    save(nearly_constant(SHAPES["b"], 0), folder / "images" / "b.nii", np.diag([-1.0, 1, 1, 1]))
    save(np.zeros(SHAPES["b"], np.uint8), folder / "labels" / "b.nii", np.diag([-1.0, 1, 1, 1]))
    dataset = dataset_of(folder, images={"MR": "images/*.nii"})
    median_affine = np.eye(4)
    median_affine[0, 3] = -5  # b, the second largest, was stored from right to left: its first voxel is at -5 mm
    assert describe(dataset, "numbers").to_json() == {
        "channels": ["MR"],
        "labels": {"0": "background", "5": "anterior", "9": "posterior"},
        "image_labels": {},
        "grid_numbers": [],
        "spacing": [1.0, 1.0, 1.0],
        "intensity": [{"kind": "window", "low": 0.0, "high": 1000.0}],
        "shape_range": [[6, 7, 7], [9, 12, 11]],
        "affine": median_affine.tolist(),
        "classes": {},
        "numbers": {},
        "common_labels": [0],  # the mask of b is background alone
        "description": "numbers",
    }


def test_percentiles_are_medians_and_mixed_spacings_are_none(folder):
    """Volumes of unlike spacings have no spacing in common."""
    save(np.zeros(SHAPES["b"], np.uint8), folder / "labels" / "b.nii", np.diag([2.0, 1, 1, 1]))
    numbers = np.arange(np.prod(SHAPES["b"]), dtype=np.float32).reshape(SHAPES["b"])
    save(numbers, folder / "images" / "b.nii", np.diag([2.0, 1, 1, 1]))
    described = describe(dataset_of(folder, intensity=IntensityScaling("percentile", 0, 100)))
    assert described.spacing is None
    medians = ChannelScale("percentile", low=0.0, high=575.0, percentiles=(0, 100))  # of 342, 575 and 989
    assert described.intensity == (medians,)
    assert medians.scaling == IntensityScaling("percentile", 0, 100)
    with pytest.raises(ValueError, match="kind percentile needs percentiles"):  # 575 is none
        ChannelScale("percentile", low=0.0, high=575.0)


def test_the_config_in_yaml(folder):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data", type=DataConfig)
    yaml = f"""
data:
  root: {folder}
  images: {{CT: "images/*.nii", PET: "images/*.nii"}}
  masks: labels/*.nii
  label_map: {{9: 5}}
  label_names: {{0: background, 5: organ}}
  spacing: [1, 1, 2.5]
  time_point: {{PET: 3}}
  intensity: {{CT: {{kind: window, low: -1000, high: 400}}, PET: {{kind: percentile, low: 0, high: 99.9}}}}
"""
    (folder / "config.yaml").write_text(yaml)
    data = parser.instantiate(parser.parse_args([f"--config={folder / 'config.yaml'}", "--data.on_error=skip"])).data
    assert data.channels == ["CT", "PET"] and data.on_error == "skip"
    assert data.label_map == {9: 5} and data.label_names == {0: "background", 5: "organ"}
    assert data.spacing == (1.0, 1.0, 2.5)
    assert (data.volume_number("CT"), data.volume_number("PET")) == (None, 3)
    assert data.scaling("CT") == IntensityScaling("window", -1000, 400)
    phantom = parser.instantiate(parser.parse_args(["--data.phantom={count: 3, shape: [8, 9, 10]}"])).data
    assert phantom.phantom == PhantomConfig(count=3, shape=(8, 9, 10))
    with pytest.raises(Exception, match="shap"):
        parser.parse_args(["--data.phantom={count: 3, shap: [8, 9, 10]}"])


def test_hippocampus_scaling_agrees_with_the_reference_protocol(hippocampus):
    """Case 001 by the formula of ../shared/tools/segmenter_test.py."""
    config = DataConfig(
        root=str(hippocampus),
        images={"MR": "images/hippocampus_00*.nii.gz"},
        masks="labels/hippocampus_00*.nii.gz",
        label_names={0: "background", 1: "anterior", 2: "posterior"},
        validation_fraction=0,
    )
    dataset = VolumeDataset(load_cases(config), config)
    assert len(dataset) >= 4
    for item in (dataset[i] for i in range(len(dataset))):
        image = nib.load(dataset.cases[item["index"]].images["MR"])
        values = np.squeeze(np.asarray(image.dataobj, dtype=np.float32))
        low, high = np.percentile(values, [0.5, 99.5]).astype(np.float32)
        np.testing.assert_allclose((item["image"][0] + 1) / 2, np.clip((values - low) / (high - low), 0, 1), atol=1e-6)
        mask = np.asarray(nib.load(dataset.cases[item["index"]].mask).dataobj)
        np.testing.assert_array_equal(item["mask"], mask)

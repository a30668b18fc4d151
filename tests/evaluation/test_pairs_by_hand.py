"""What the segmenter learns from, what is hidden from it, and the measure of an edit's border: answers known by
hand."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import tiny_data
from torch import nn

from evaluation.data import pairs
from evaluation.data.model_units import in_model_units
from evaluation.data.pairs import Pair, generated_pairs, load_pairs, unit_range
from evaluation.data.volume_sets import real_set
from evaluation.networks import pretraining
from evaluation.studies.edit_borders import border_jump, labeled_region, summarize_region
from pipelines import describe_mask
from volumes import (
    UNKNOWN,
    Case,
    DataConfig,
    PhantomConfig,
    Volume,
    VolumeDataset,
    VolumeError,
    load_cases,
    write_volume,
)

SHAPE = (4, 4, 4)
TWO = {"t1": "{volume}_t1.nii.gz", "post_t1": "{volume}_post_t1.nii.gz"}


def stored(array, path, affine=None):
    """The (X, Y, Z) array as a file of this path, which is returned."""
    write_volume(Volume(np.asarray(array)[None], np.eye(4) if affine is None else affine), path)
    return path


def case_with_mask(folder, **images) -> Case:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1] = 1
    return Case("case", "case", images=images, mask=stored(mask, folder / "masks" / "case.nii.gz"))


def ramp(top: float) -> np.ndarray:
    return np.linspace(0, top, 64, dtype=np.float32).reshape(SHAPE)


def config(**more) -> DataConfig:
    return DataConfig(label_names={0: "background", 1: "organ"}, **more)


def test_half_a_percent_is_clipped_on_each_side():
    scaled = unit_range(np.arange(201.0))  # the percentiles are 1 and 199
    assert scaled[1] == 0 and scaled[199] == 1
    assert scaled[[2, 100, 198]] == pytest.approx([1 / 198, 0.5, 197 / 198])


def test_each_channel_is_scaled_by_itself(tmp_path):
    made = stored(ramp(1), tmp_path / "made_t1.nii.gz"), stored(ramp(1000), tmp_path / "made_post_t1.nii.gz")
    images = load_pairs([Pair(case_with_mask(tmp_path), made)], config(images=TWO), SHAPE).images[0]
    assert images.amin((1, 2, 3)).tolist() == [0, 0] and images.amax((1, 2, 3)).tolist() == [1, 1]
    torch.testing.assert_close(images[0], images[1])


def test_phantoms_are_those_of_the_training():
    """With their small lesions."""
    phantom = PhantomConfig(count=1, shape=(24, 24, 24), lesion_voxels=(2, 6), lesions=2)
    config = DataConfig(phantom=phantom, validation_fraction=0)
    cases = load_cases(config)
    loaded, [trained] = load_pairs([Pair(cases[0])], config, (24, 24, 24)), VolumeDataset(cases, config)
    assert torch.equal(loaded.labels[0], trained["mask"].to(torch.uint8))
    assert 4 <= int((loaded.labels == 3).sum()) <= 12


def test_masks_that_are_known_in_part_are_refused_by_name(tmp_path):
    """Also on the image's grid; with on_error: skip their cases are left out."""
    whole = case_with_mask(tmp_path, image=stored(ramp(1), tmp_path / "images" / "case.nii.gz"))
    mask = np.zeros(SHAPE, np.uint8)
    mask[2, 1, :3] = 255
    part = replace(whole, name="part", mask=stored(mask, tmp_path / "masks" / "part.nii.gz"))
    listed, known = [Pair(part), Pair(whole)], {"images": "images/{case}.nii.gz", "masks": "masks/{case}.nii.gz"}
    for resample_to in (None, "image"):
        data = config(label_map={255: UNKNOWN}, resample_to=resample_to, **known)
        with pytest.raises(
            VolumeError, match=r"part.nii.gz: the label of 3 voxels is unknown \(-2.*--data.on_error skip"
        ):
            load_pairs(listed, data, SHAPE)
        loaded = load_pairs(listed, replace(data, on_error="skip"), SHAPE)
        assert loaded.cases == [whole] and [name for name, _ in loaded.skipped] == ["part"]
        assert torch.equal(load_pairs(listed[1:], data, SHAPE).labels, loaded.labels)


def test_volumes_are_found_by_the_name_of_their_case(tmp_path):
    """As generate.py --split names them; masks of one stem, as of patients' folders, say nothing."""
    cases = []
    for name in ("p0", "p1", "labels"):
        (tmp_path / name).mkdir()
        cases.append(Case(name, name, mask=stored(np.zeros(SHAPE, np.uint8), tmp_path / name / "labels.nii.gz")))
    for name in ("p0_000", "p1_000", "labels_000"):
        stored(ramp(1), tmp_path / "made" / f"{name}.nii.gz")
    found = {pair.case.name: pair.generated[0].name for pair in generated_pairs(cases, tmp_path / "made")}
    assert found == {"p0": "p0_000.nii.gz", "p1": "p1_000.nii.gz", "labels": "labels_000.nii.gz"}
    with pytest.raises(ValueError, match="named after a mask"):
        generated_pairs(cases[:2], tmp_path / "p0")


def test_a_generated_file_is_read_without_the_data_time_point(tmp_path):
    made = (stored(ramp(1), tmp_path / "case_000.nii.gz"),)
    data = config(images="{volume}.nii.gz", time_point=1)
    images = load_pairs([Pair(case_with_mask(tmp_path), made)], data, SHAPE).images
    assert np.array_equal(images[0, 0].numpy(), unit_range(ramp(1)))


def test_a_file_is_of_the_channel_with_the_longest_name(tmp_path):
    """`_post_t1` ends with `_t1`, too."""
    real = {name: tmp_path / f"{name}.nii.gz" for name in TWO}
    made = [stored(ramp(1), tmp_path / "made" / f"case_000_{name}.nii.gz") for name in TWO]
    found = generated_pairs([case_with_mask(tmp_path, **real)], tmp_path / "made")
    assert [pair.generated for pair in found] == [tuple(made)]


def test_a_kept_channel_must_match_the_hash_in_the_sidecar(tmp_path, monkeypatch):
    """Else it does not belong to the case."""
    real = {name: stored(ramp(top), tmp_path / f"{name}.nii.gz") for top, name in enumerate(TWO, 1)}
    made = stored(ramp(3), tmp_path / "made" / "case_000_t1.nii.gz")
    case = case_with_mask(tmp_path, **real)
    for given, fits in ((real["post_t1"], True), (real["t1"], False)):
        record = {"images": {"post_t1": describe_mask(given)}}
        monkeypatch.setattr(pairs, "read_sidecar", lambda path, record=record: record)
        if fits:
            (pair,) = generated_pairs([case], tmp_path / "made")
            assert pair.generated == (made, real["post_t1"])
        else:
            with pytest.raises(
                ValueError, match="no file of channel 'post_t1', and was not conditioned on that of case"
            ):
                generated_pairs([case], tmp_path / "made")


def test_channels_in_another_order_are_not_the_models():
    one, two = (nib.Nifti1Image(np.full((2, 2, 2), value, np.float32), np.eye(4)) for value in (0.25, 0.75))
    data = tiny_data(channels=["a", "b"], intensity=[{"kind": "window", "low": 0.0, "high": 1.0}] * 2)
    assert in_model_units({"a": one, "b": two}, data)[:, 0, 0, 0] == pytest.approx([0.25, 0.75])
    with pytest.raises(VolumeError, match=r"2 channels \['b', 'a'\], the model makes \['a', 'b'\]"):
        in_model_units({"b": two, "a": one}, data)


def test_real_volumes_keep_the_spacing_of_their_files(tmp_path):
    path = stored(ramp(1), tmp_path / "case.nii.gz", np.diag([1.5, 2, 3, 1]))
    found, _ = real_set([Case("case", "case", images={"image": path})], DataConfig(images="{volume}.nii.gz"), ["train"])
    assert list(found.spacings) == [(1.5, 2, 3)]


def test_noise_on_what_is_not_hidden_deviates_by_a_tenth(monkeypatch):
    monkeypatch.setattr(pretraining, "HIDDEN", 0)
    noise = pretraining.hide(torch.full((1, 1, 16, 16, 16), 0.5), torch.Generator().manual_seed(0)) - 0.5
    assert noise.std() == pytest.approx(0.1, abs=0.005) and abs(noise.mean()) < 0.01


def test_a_voxel_that_is_0_in_one_channel_alone_is_no_padding(monkeypatch):
    """The restored volume is 0: the loss is the mean of what was wanted, at a gain of 0.9 to 1.1 and a shift of up to
    0.05."""

    def zeros(channels: int, width: int) -> nn.Module:
        network = nn.Conv3d(channels, width, 1)
        nn.init.zeros_(network.weight)
        return network

    class Zero(nn.Conv3d):
        def forward(self, images):
            return 0 * super().forward(images)

    monkeypatch.setattr(pretraining, "make_segmenter", zeros)
    monkeypatch.setattr(nn, "Conv3d", Zero)
    images, losses = torch.zeros(1, 2, 8, 8, 8), []
    images[:, 0, :4] = 1
    pretraining.pretrain(images, seed=0, iterations=2, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == 2 and all(0.42 < loss < 0.61 for loss in losses)


def test_the_jump_is_over_the_differences_on_both_sides():
    squares = np.broadcast_to(np.arange(8.0)[:, None, None] ** 2, (8, 8, 8))
    region = np.zeros((8, 8, 8), bool)
    region[:4] = True
    assert border_jump(squares, region) == 1  # 7 across, 5 inside, 9 outside


def test_the_labeled_region_reaches_3_mm_of_the_masks_spacing():
    mask = Volume(np.zeros((1, 1, 1, 9), np.uint8), np.diag([1.0, 1, 3, 1]))
    mask.array[0, 0, 0, 4] = 1
    assert np.flatnonzero(labeled_region(mask)).tolist() == [3, 4, 5]


def test_means_over_resampled_subjects_keep_their_volume_count():
    """A subject that is drawn twice brings its volumes twice."""
    row = {"profile": [1.0], "untouched_profile": [1.0], "changed_outside": 0, "changed_inside": 1.0}
    found = summarize_region([{"jump": 2.0, "untouched": 1.0, **row}] * 3, ["a", "a", "b"])
    assert found["jump"]["interval"] == [2, 2] and found["untouched"]["interval"] == [1, 1]

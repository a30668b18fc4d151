"""One call of a pipeline, and what it is asked for: whose noise, edit and grid each volume has, known by hand."""

import hashlib
import math
import warnings
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import LABELS, editor_of, labels_of, mask_image, seeded, tiny_data, tiny_pipeline

from diffusion import LatentUNet3D
from pipelines import MedVolumePipeline, SamplingConfig
from pipelines.checks.label_map import map_check
from pipelines.inputs.arguments import translation
from pipelines.inputs.conditions import condition_tensors
from pipelines.inputs.masks import index_labels
from pipelines.inputs.request import VolumeRequest
from pipelines.inputs.request_files import read_requests
from volumes import PADDING
from volumes.map_checks import LabelMapStats

NUMBERS = {"age": {"mean": 50.0, "std": 20.0}, "weight": {"mean": 70.0, "std": 10.0}}
RANGES = {"age": NUMBERS["age"] | {"low": 20, "high": 80}, "weight": NUMBERS["weight"] | {"low": 45, "high": 95}}
MR = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [5.0, 95.0]}


def numbers_pipeline() -> MedVolumePipeline:
    """A pipeline of two numbers, each of which may be left out."""
    base = tiny_pipeline()
    dropout = {"age": 0.2, "weight": 0.2}
    unet = LatentUNet3D(
        channels=(16, 16),
        blocks=(1, 1),
        attention=(False, True),
        head_dim=8,
        mask_width=8,
        num_labels=3,
        numbers=NUMBERS,
        condition_dropout=dropout,
    )
    pipe = MedVolumePipeline(base.vae, unet.eval(), base.scheduler, tiny_data(numbers=RANGES))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# whose each thing is


def test_the_residual_noise_of_a_volume_is_of_its_own_generator():
    """Two volumes of one mask: each has the noise that it has when it is generated alone."""
    pipe, mask, drawn = tiny_pipeline(), labels_of((8, 8, 8)), []

    def add(slabs, seed):
        drawn.append(seed)
        yield from slabs

    pipe.noise_model = SimpleNamespace(add=add)
    asked = {"num_inference_steps": 1, "output_type": "np"}
    for seed in (3, 4):
        pipe(mask, generator=seeded(seed), **asked)
    alone = drawn.copy()
    pipe(mask, num_volumes_per_mask=2, generator=seeded(3, 4), **asked)
    assert len(set(alone)) == 2 and drawn[2:] == alone


def test_each_volume_has_the_edit_of_its_own_image():
    pipe, mask, random = tiny_pipeline(intensity=[MR]), mask_image((8, 8, 8)), np.random.default_rng(0)
    images = [nib.Nifti1Image(random.uniform(0, 250, (8, 8, 8)).astype(np.float32), mask.affine) for _ in range(2)]
    asked = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(0, 1)}
    records = editor_of(pipe)([mask, mask], image=images, strength=0.5, **asked).provenance
    own = [hashlib.sha256(np.ascontiguousarray(image.dataobj).data).hexdigest() for image in images]
    assert [record["edit"]["image"]["MR"]["sha256"] for record in records] == own


def test_masks_of_one_batch_each_keep_their_grid():
    """All three are padded to 8 x 8 x 8, and cut back to their own."""
    pipe, shapes = tiny_pipeline(), [(7, 8, 8), (8, 7, 8), (8, 8, 5)]
    affines = [np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * shift for shift in (0, 5, 9)]
    masks = [mask_image(shape, affine) for shape, affine in zip(shapes, affines, strict=True)]
    out = pipe(masks, num_inference_steps=1, generator=seeded(0, 1, 2))
    assert [volume.shape for volume in out.volumes] == shapes
    for volume, affine in zip(out.volumes, affines, strict=True):
        np.testing.assert_array_equal(volume.affine, affine)


# conditions


@pytest.mark.parametrize(
    ("age", "far"),
    [(13.9, True), (14.1, False), (20, False), (80, False), (85.9, False), (86.1, True), (100, True), (139, True)],
)
def test_numbers_are_far_a_tenth_of_the_range_beyond_it(age, far):
    """20 to 80: below 14 and above 86."""
    pipe = numbers_pipeline()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(labels_of((8, 8, 8)), numbers={"age": age}, num_inference_steps=1, output_type="latent")
    assert any("age" in str(one.message) and "trained on 20 to 80" in str(one.message) for one in caught) == far


def test_a_number_that_is_left_out_is_not_0():
    pipe = numbers_pipeline()
    mask = labels_of((8, 8, 8))
    requests = [VolumeRequest(mask, numbers=numbers) for numbers in ({"age": 3.0}, {"weight": 5.0})]
    with pytest.warns(UserWarning, match="trained on"):
        prepared = pipe.prepare(requests, SamplingConfig(1))
    found = condition_tensors(pipe.unet, prepared, torch.device("cpu")).numbers
    columns = list(pipe.unet.condition_schema.numbers)
    expected = torch.tensor([[{"age": 3.0}.get(name, math.nan) for name in columns], [math.nan, math.nan]])
    expected[1, columns.index("weight")] = 5.0
    torch.testing.assert_close(found, expected, equal_nan=True)


# masks


def test_a_value_that_is_translated_is_not_missing():
    """-1 marks voxels outside of the field of view, unless it is read as a label."""
    values = np.array([-1, 0, 2, 5], np.int16)
    labels = {int(value): name for value, name in LABELS.items()}
    assert index_labels(values, labels).tolist() == [PADDING, 0, 1, 2]
    assert index_labels(values, labels, {-1: 5}).tolist() == [2, 0, 1, 2]


def test_a_value_is_translated_once():
    """3 and "3" are one value; two values may lead to one label."""
    assert translation({3: 1, "4": 1}) == {3: 1, 4: 1}
    for twice in ({3: 1, "3": 1}, {3: 1, "3": 2}):
        with pytest.raises(ValueError, match="label_map translates 3 twice"):
            translation(twice)


# what a callback changes


@pytest.mark.parametrize(("step", "recorded"), [(1, True), (2, True), (3, False)])
def test_a_callback_changes_nothing_after_the_last_step(step, recorded):
    """Of four steps, 0 to 3: guidance and interruption after step 3 come too late for the volume."""
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})

    def change(pipe, number, *_):
        if number == step:
            pipe._guidance_scale = 3.0
            pipe._interrupt = True

    asked = {"num_inference_steps": 4, "generator": seeded(0), "output_type": "latent"}
    record = pipe(labels_of((8, 8, 8)), callback_on_step_end=change, **asked).provenance[0]
    expected = {"guidance_scale": {str(step): 3.0}, "interrupted_after": step + 1}
    assert record.get("callback") == (expected if recorded else None)


# tables and label maps


def test_a_mask_for_some_rows_and_images_for_all_are_two_tables(tmp_path):
    dropout = {"mask": 0.1, "CT": 0.5}
    intensity = [MR, {"kind": "window", "low": -1000.0, "high": 1000.0}]
    pipe = tiny_pipeline(images={"CT": 4}, condition_dropout=dropout, channels=["MR", "CT"], intensity=intensity)
    for name in ("mask", "a", "b"):
        (tmp_path / f"{name}.nii").touch()
    table = tmp_path / "table.csv"
    table.write_text("name,mask,CT\nx,mask.nii,a.nii\ny,,b.nii\n")
    with pytest.raises(ValueError, match="1 of 2 rows have a mask; split it into two tables"):
        read_requests(table, pipe, tmp_path / "out")
    table.write_text("name,CT\nx,a.nii\ny,b.nii\n")
    assert [request.name for request in read_requests(table, pipe, tmp_path / "out")] == ["x", "y"]


@pytest.mark.parametrize(
    ("zooms", "size"),
    [((1, 1, 1), None), ((1, 1, 2), None), ((2, 1.5, 1), "24 mm3 of organ"), ((0.5, 1, 1), "4 mm3 of organ")],
)
def test_the_size_of_a_label_is_told_in_mm3(zooms, size):
    """Eight voxels, where every training map had 10 mm3: half of that to twice of that is accepted."""
    limits = {"mm3": [10.0, 10.0], "pieces": 1, "edge": 0, "always": True}
    names = {0: "background", 1: "organ"}
    known = LabelMapStats.from_json({"labels": {"organ": limits}, "pieces": 1, "shapes": "4x4x4"}, list(names.values()))
    array = np.zeros((4, 4, 4), np.int16)
    array[1:3, 1:3, 1:3] = 1
    refused, found = map_check(known, names).judge(nib.Nifti1Image(array, np.diag([*zooms, 1.0])))
    assert (refused, found.get("fault")) == (size is not None, size)

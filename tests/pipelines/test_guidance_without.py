"""Guidance away from the same mask without a label, and masks that are known in part, in calls of a pipeline."""

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import labels_of, mask_image, seeded, tiny_pipeline

import generate
from diffusion.conditioning import Conditions
from diffusion.guidance import contrasted
from pipelines import MedVolumePipeline, SamplingSettings
from pipelines.inputs.masks import index_labels, known_labels, replacement_indices
from pipelines.storage.finished import guidance_columns
from pipelines.storage.record import GenerationRecord
from volumes import UNKNOWN

SHAPE = (8, 8, 8)


def latent(pipe, mask=None, **how) -> torch.Tensor:
    mask = mask_image(SHAPE) if mask is None else mask
    output = pipe(mask, num_inference_steps=1, generator=seeded(0), output_type="latent", **how)
    return output.volumes[0]


def test_weights_sum_to_1():
    one, other, third = (Conditions(mask=torch.full((1, 1), value)) for value in (1.0, 2.0, 3.0))
    assert contrasted([(1.0, one)], []) == [(1.0, one)]
    terms = contrasted([(2.0, one), (-1.0, other)], [(3.0, third)])
    assert [weight for weight, _ in terms] == [4.0, -1.0, -2.0]
    assert [given for _, given in terms] == [one, other, third]


def test_the_difference_that_a_label_makes_is_scaled():
    """In one step from the same noise the latents are a linear function of the prediction."""
    pipe = tiny_pipeline()
    labels = labels_of(SHAPE)
    without = nib.Nifti1Image(np.where(labels == 5, 2, labels).astype(np.int16), np.eye(4))
    plain, other = latent(pipe), latent(pipe, without)
    assert not torch.allclose(plain, other)
    for replaced in ({"posterior": "anterior"}, {5: 2}, {"5": 2}):
        guided = latent(pipe, guidance_without=replaced, without_scale=3.0)
        torch.testing.assert_close(guided, plain + 2 * (plain - other), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        latent(pipe, guidance_without={"posterior": "anterior"}), 2 * plain - other, rtol=1e-3, atol=1e-4
    )  # a scale of 2 where none is given
    for off in ({"guidance_without": {}}, {"guidance_without": {5: 2}, "without_scale": 1.0}):
        assert torch.equal(latent(pipe, **off), plain)
    same = latent(pipe, without, guidance_without={5: 2})  # a mask without the label
    assert torch.equal(same, other)


def test_it_adds_to_guidance_by_conditions():
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    labels = labels_of(SHAPE)
    without = nib.Nifti1Image(np.where(labels == 5, 2, labels).astype(np.int16), np.eye(4))
    plain, other, guided = latent(pipe), latent(pipe, without), latent(pipe, guidance_scale=2.0)
    both = latent(pipe, guidance_scale=2.0, guidance_without={5: 2}, without_scale=1.5)
    torch.testing.assert_close(both, guided + 0.5 * (plain - other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"guidance_without": {5: 2, "5": 0}}, "names a label twice; remove one"),
        ({"guidance_without": {5: 2, "posterior": 0}}, "names a label twice, by value and by name; remove one"),
        ({"guidance_without": {5: -2}}, "this model knows no unknown label"),
        ({"guidance_without": {"tumor": 2}}, r"names \['tumor'\]; the labels of this model are 0 \(background\)"),
        ({"guidance_without": {5: 5}}, "in its own place"),
        ({"guidance_without": {5: "unknown"}}, "this model knows no unknown label"),
        ({"guidance_without": ["posterior"]}, "maps labels to the labels in their place"),
        ({"guidance_without": {5: 2}, "without_scale": -1}, "without_scale is a number of 0 or more"),
    ],
)
def test_what_cannot_be_used_is_named(how, message):
    with pytest.raises(ValueError, match=message):
        latent(tiny_pipeline(), **how)


def test_it_is_recorded_and_travels_with_the_pipeline(tmp_path):
    pipe = tiny_pipeline()
    assert "guidance_without" not in pipe(mask_image(SHAPE), num_inference_steps=1).provenance[0]
    pipe.sampling_settings = SamplingSettings(1, guidance_without={"posterior": "anterior"}, without_scale=3.0)
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    record = pipe(mask_image(SHAPE), generator=seeded(0)).provenance[0]
    assert record["guidance_without"] == {"labels": {"posterior": "anterior"}, "scale": 3.0}
    assert record["settings_from"]["guidance_without"] == "pipeline"
    record = pipe(mask_image(SHAPE), generator=seeded(0), guidance_without={}).provenance[0]
    assert "guidance_without" not in record and record["settings_from"]["guidance_without"] == "call"


def test_a_model_without_masks_refuses_it():
    pipe = tiny_pipeline(num_labels=0)
    with pytest.raises(ValueError, match="guidance_without: this model was trained without a mask condition"):
        pipe(shape=SHAPE, num_inference_steps=1, guidance_without={5: 2})


def test_settings_that_no_call_could_use_are_refused_at_loading(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "sampling.json").write_text('{"guidance_without": {"posterior": "unknown"}}')
    with pytest.raises(ValueError, match=r"sampling.json: guidance_without: this model knows no unknown label"):
        MedVolumePipeline.from_pretrained(tmp_path)


def test_volumes_without_the_label_take_no_call_and_record_none(tmp_path):
    """In one call with a volume that has it. The interval, which limits nothing else, is not recorded either."""
    labels = labels_of(SHAPE)
    without = nib.Nifti1Image(np.where(labels == 5, 2, labels).astype(np.int16), np.eye(4))
    pipe = tiny_pipeline()
    how = {"num_inference_steps": 2, "guidance_without": {5: 2}, "guidance_interval": (0.2, 1)}
    records = pipe([mask_image(SHAPE), without, mask_image(SHAPE)], generator=seeded(0, 1, 2), **how).provenance
    assert [record["network_calls"] for record in records] == [4, 2, 4]
    assert ["guidance_without" in record for record in records] == [True, False, True]
    assert ["guidance_interval" in record for record in records] == [True, False, True]


def test_the_manifest_names_it():
    record = GenerationRecord("s", "m", 0, 1, guidance_without={"labels": {"lesion": "organ", "5": 2}, "scale": 3.0})
    assert guidance_columns(record) == {"guidance_without": "lesion=organ;5=2", "without_scale": 3.0}


def test_settings_that_nothing_reads_are_named():
    pipe = tiny_pipeline()
    with pytest.warns(UserWarning, match="without_scale is of guidance_without, and there is none; it is not used"):
        latent(pipe, without_scale=3.0)
    with pytest.warns(UserWarning, match="guidance_interval acts on guidance, and there is none"):
        latent(pipe, guidance_interval=(0.2, 0.8))
    pipe.sampling_settings = SamplingSettings(guidance_interval=(0.2, 0.8), without_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latent(pipe)  # they are the pipeline's, for calls with guidance
        latent(pipe, guidance_interval=(0, 1))


def test_the_command_line_has_it(tmp_path, capsys):
    args = ["--pipeline", str(tmp_path), "--masks", "m.nii.gz", "--output", str(tmp_path / "out")]
    assert generate.parse(args).sampling.without is None
    sampling = generate.parse([*args, "--guidance_without", "lesion=organ", "--without_scale", "3"]).sampling
    assert sampling.without == {"labels": {"lesion": "organ"}, "scale": 3.0}
    json.dumps(sampling.without)
    for option in ("--guidance_without", "--label_map"):
        with pytest.raises(SystemExit):
            generate.parse([*args, option, "lesion=organ", "3=1", "lesion=body"])
        assert f"{option}: names lesion twice; remove one" in capsys.readouterr().err


def test_what_a_label_means():
    """Names of several labels mean none of them; nothing is unknown where -2 is a label."""
    labels = {0: "background", 1: "tumor", 2: "tumor", 4: "3", 3: "organ", 7: "unknown"}
    assert replacement_indices(labels, {"7": "organ", 1: "background"}) == {5: 3, 1: 0}
    assert replacement_indices(labels, {"unknown": -2, "2": "-2"}) == {5: UNKNOWN, 2: UNKNOWN}
    assert known_labels(labels, {9: "organ", "GTV": 2, 255: -2, 8: "3"}) == {9: 3, "GTV": 2, 255: UNKNOWN, 8: 4}
    for what, replaced in (("'tumor' may mean any of the labels 1, 2", {"tumor": 0}), ("'3' .* 3, 4", {1: "3"})):
        with pytest.raises(ValueError, match=f"guidance_without: {what}"):
            replacement_indices(labels, replaced)
    with pytest.raises(ValueError, match="label_map: 'tumor' may mean any of the labels 1, 2; name the one by its"):
        known_labels(labels, {9: "tumor"})
    for one, other in ((UNKNOWN, UNKNOWN), ("-2", 3)):
        with pytest.raises(ValueError, match="replaces a label of the model, not what is unknown"):
            replacement_indices(labels, {one: other})
    air = {-2: "air", 3: "organ"}
    assert replacement_indices(air, {"organ": -2}) == {1: 0} and replacement_indices(air, {-2: 3}) == {0: 1}
    assert index_labels(np.array([-2, 3, 255]), air, {255: -2}).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"label_map leads to \['unknown'\], which the model does not know"):
        known_labels(air, {255: "unknown"})


def test_partial_masks_are_for_models_of_them():
    """Unknown voxels, -2 or what a label map calls unknown; the known ones act, and a model of whole masks refuses."""
    labels = labels_of(SHAPE)
    half = labels.copy()
    half[4:] = UNKNOWN
    image = nib.Nifti1Image(half, np.eye(4))
    with pytest.raises(
        ValueError, match=r"the mask: the mask holds voxels whose label is unknown \(-2\).*partial_masks"
    ):
        latent(tiny_pipeline(), image)
    pipe = tiny_pipeline(partial_masks=0.2)
    given, whole = latent(pipe, image), latent(pipe)
    assert not torch.equal(given, whole)
    other = half.copy()
    other[0] = 0
    assert not torch.equal(latent(pipe, nib.Nifti1Image(other, np.eye(4))), given)
    mapped = np.where(half == UNKNOWN, 255, half).astype(np.int16)
    for target in ("unknown", UNKNOWN):  # a label map and guidance take the same
        assert replacement_indices(pipe.data.labels, {"posterior": target}) == {2: UNKNOWN}
        again = latent(pipe, nib.Nifti1Image(mapped, np.eye(4)), label_map={255: target})
        assert torch.equal(again, given)
    changed = latent(pipe, guidance_without={5: "unknown"})
    assert not torch.equal(changed, whole)


def test_outside_of_the_interval_there_is_none():
    """The only step begins at pure noise, which is outside (0, 0.5]; and inside (0.5, 1]."""
    pipe = tiny_pipeline()
    how = {"guidance_without": {5: 2}, "without_scale": 3.0}
    outside = pipe(mask_image(SHAPE), num_inference_steps=1, generator=seeded(0), guidance_interval=(0, 0.5), **how)
    inside = pipe(mask_image(SHAPE), num_inference_steps=1, generator=seeded(0), guidance_interval=(0.5, 1), **how)
    plain = pipe(mask_image(SHAPE), num_inference_steps=1, generator=seeded(0))
    voxels = [np.asarray(one.volumes[0].dataobj) for one in (outside, inside, plain)]
    assert np.array_equal(voxels[0], voxels[2]) and not np.array_equal(voxels[1], voxels[2])
    assert [one.provenance[0]["network_calls"] for one in (outside, inside, plain)] == [1, 2, 1]

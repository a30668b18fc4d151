"""Guidance away from the same mask without a label, and masks that are known in part, in calls of a pipeline."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import labels_of, mask_image, seeded, tiny_pipeline

import generate
from diffusion import LatentUNet3D, make_scheduler
from diffusion.conditioning import Conditions
from diffusion.guidance import contrasted
from pipelines import MedVolumePipeline, SamplingSettings
from volumes import UNKNOWN

SHAPE = (8, 8, 8)


def latent(pipe, mask=None, **how) -> torch.Tensor:
    mask = mask_image(SHAPE) if mask is None else mask
    output = pipe(mask, num_inference_steps=1, generator=seeded(0), output_type="latent", **how)
    return output.volumes[0]


def partial_pipeline() -> MedVolumePipeline:
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    settings = {name: value for name, value in pipe.unet.config.items() if name[0] != "_"}
    unet = LatentUNet3D(**{**settings, "partial_masks": 0.2})
    for parameter in (unet.conv_out.weight, *(block.conv2.weight for level in unet.down_blocks for block in level)):
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = MedVolumePipeline(pipe.vae, unet.eval(), make_scheduler("rectified_flow"), pipe.data)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def test_the_command_line_has_it(tmp_path):
    args = ["--pipeline", str(tmp_path), "--masks", "m.nii.gz", "--output", str(tmp_path / "out")]
    assert generate.parse(args).sampling.without is None
    sampling = generate.parse([*args, "--guidance_without", "lesion=organ", "--without_scale", "3"]).sampling
    assert sampling.without == {"labels": {"lesion": "organ"}, "scale": 3.0}
    json.dumps(sampling.without)


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
    pipe = partial_pipeline()
    given, whole = latent(pipe, image), latent(pipe)
    assert not torch.equal(given, whole)
    other = half.copy()
    other[0] = 0
    assert not torch.equal(latent(pipe, nib.Nifti1Image(other, np.eye(4))), given)
    mapped = np.where(half == UNKNOWN, 255, half).astype(np.int16)
    for target in ("unknown", UNKNOWN):
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

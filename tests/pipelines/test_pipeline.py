"""MedVolumePipeline's call: the right grid, the right units, and every volume by itself."""

import itertools
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tiny import labels_of, mask_image, seeded, tiny_pipeline

from pipelines import MedVolumePipeline, equal_batches, read_sidecar, sidecar_path, write_synthetic
from pipelines.sampling import initial_latents
from volumes import Volume, read_mask, resample

OBLIQUE = np.array([[0.8, 0.6, 0, -20], [-0.6, 0.8, 0, 7], [0, 0, 1, 30], [0, 0, 0, 1]], dtype=float)
STEPS = 2


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def voxels(image):
    return np.asarray(image.dataobj, dtype=np.float32)


def paint(pipe, monkeypatch, function):
    """Make the autoencoder decode to `function(X, Y, Z)`, channels first, of the padded grid's voxel indices."""

    def decode(z, return_dict=True):
        grid = np.indices([n * 4 for n in z.shape[2:]]).astype(np.float32)
        return (torch.from_numpy(np.stack(function(*grid))[None].astype(np.float32)),)

    monkeypatch.setattr(pipe.vae, "decode", decode)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIR"])
def test_a_volume_lies_on_its_masks_grid(pipe, codes):
    """However the mask is stored, the volume is stored the same way and shows the same thing in the same place."""
    ras = nib.Nifti1Image(labels_of((7, 9, 6)), OBLIQUE @ np.diag([1, 1, 1, 1]))
    stored = ras.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(codes))
    )
    reference = pipe(ras, num_inference_steps=STEPS, generator=seeded(3)).volumes[0]
    volume = pipe(stored, num_inference_steps=STEPS, generator=seeded(3)).volumes[0]
    assert volume.shape == stored.shape
    np.testing.assert_allclose(volume.affine, stored.affine, atol=1e-5)
    assert nib.aff2axcodes(volume.affine) == tuple(codes)
    np.testing.assert_allclose(
        voxels(nib.as_closest_canonical(volume)), voxels(nib.as_closest_canonical(reference)), rtol=1e-4
    )


def test_padding_is_taken_off_and_units_are_restored(pipe, monkeypatch):
    """A decoder that paints the padded grid's first index: 7 voxels are padded to 8, one at the end, so 0..6 come out,
    in file units."""
    paint(pipe, monkeypatch, lambda x, y, z: [x / 10 - 1])
    volume = voxels(pipe(mask_image((7, 8, 8)), num_inference_steps=1).volumes[0])
    expected = 100 + (np.arange(7) / 10) * 100  # -1 is 100, 1 is 300
    np.testing.assert_allclose(volume, np.broadcast_to(expected[:, None, None], (7, 8, 8)), rtol=1e-5)


def test_values_beyond_the_scale_are_clipped(pipe, monkeypatch):
    paint(pipe, monkeypatch, lambda x, y, z: [x - 2])
    volume = voxels(pipe(mask_image((8, 8, 8)), num_inference_steps=1).volumes[0])
    np.testing.assert_allclose(volume[:, 0, 0], [100, 100, 200, 300, 300, 300, 300, 300])


def test_channels_and_ct_windows(monkeypatch):
    """Two channels in HU: an int16 image of each, each with its own window."""
    windows = [{"kind": "window", "low": -1000, "high": 1000}, {"kind": "window", "low": 0, "high": 400}]
    pipe = tiny_pipeline(channels=["lung", "bone"], intensity=windows)
    paint(pipe, monkeypatch, lambda x, y, z: [0 * x + 0.0004, 0 * x + 0.5])
    images = pipe(mask_image((8, 8, 5)), num_inference_steps=1).volumes[0]
    assert list(images) == ["lung", "bone"]
    for image, value in zip(images.values(), (0, 300), strict=True):
        assert image.shape == (8, 8, 5) and image.get_data_dtype() == np.int16 and (voxels(image) == value).all()
    array = pipe(mask_image((8, 8, 5)), num_inference_steps=1, output_type="np").volumes[0]
    assert array.shape == (2, 8, 8, 5)
    np.testing.assert_allclose(array[0], 0.4, atol=1e-3)


def test_ct_is_interpolated_before_it_is_rounded(tmp_path):
    """A mask that was resampled since it was read: the volume goes back to its file's grid smoothly, as "np" does."""
    pipe = tiny_pipeline(intensity=[{"kind": "window", "low": 0, "high": 256}])
    nib.save(mask_image((16, 16, 8), np.diag([0.5, 0.5, 1, 1])), tmp_path / "fine.nii")
    mask = resample(read_mask(tmp_path / "fine.nii"), (1.0, 1.0, 1.0), nearest=True)
    image, array = (
        pipe(mask, num_inference_steps=1, generator=seeded(5), output_type=kind).volumes[0] for kind in ("nifti", "np")
    )
    assert image.get_data_dtype() == np.int16 and image.header["descrip"].item().startswith(b"synthetic")
    np.testing.assert_allclose(image.affine, np.diag([0.5, 0.5, 1, 1]))
    np.testing.assert_allclose(voxels(image), array[0], atol=0.501)


def test_a_narrow_window_is_not_rounded(monkeypatch):
    pipe = tiny_pipeline(intensity=[{"kind": "window", "low": 0, "high": 20}])  # PET, in SUV
    paint(pipe, monkeypatch, lambda x, y, z: [0 * x + 0.05])
    np.testing.assert_allclose(voxels(pipe(mask_image((8, 8, 8)), num_inference_steps=1).volumes[0]), 10.5)


def test_a_volume_depends_on_its_own_mask_and_generator_alone(pipe):
    """Several shapes, two volumes each, in batches or one by one: the same volumes, to rounding."""
    masks = [mask_image(shape, seed=i) for i, shape in enumerate([(8, 8, 8), (7, 8, 9), (8, 7, 8), (7, 6, 5)])]
    seeds = range(8)
    together = pipe(masks, num_inference_steps=STEPS, num_volumes_per_mask=2, generator=seeded(*seeds)).volumes
    small = pipe(
        masks, num_inference_steps=STEPS, num_volumes_per_mask=2, generator=seeded(*seeds), batch_size=1
    ).volumes
    for i, (volume, other) in enumerate(zip(together, small, strict=True)):
        alone = pipe(masks[i // 2], num_inference_steps=STEPS, generator=seeded(i)).volumes[0]
        assert volume.shape == masks[i // 2].shape
        np.testing.assert_allclose(voxels(volume), voxels(alone), atol=0.01)  # of a range of 200
        np.testing.assert_allclose(voxels(other), voxels(alone), atol=0.01)
    assert np.abs(voxels(together[0]) - voxels(together[1])).max() > 1  # another seed, another volume


def reproduced(pipe, out, masks):
    """Whether the seed of each volume's record, as the README has it, makes the volume again, to rounding."""
    for mask, volume, record in zip(masks, out.volumes, out.provenance, strict=True):
        generator = torch.Generator().manual_seed(record["seed"])
        again = pipe(mask, num_inference_steps=STEPS, generator=generator)
        np.testing.assert_allclose(voxels(again.volumes[0]), voxels(volume), atol=0.01)
        assert again.provenance[0] == record


def test_one_generator_seeds_every_volume_in_order(pipe):
    """Of several volumes: volume i is the same however many follow, and its recorded seed reproduces it."""
    masks = [mask_image((8, 8, 8), seed=1), mask_image((5, 8, 8), seed=2), mask_image((8, 8, 8), seed=3)]
    two, three = (
        pipe(masks[:n], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)) for n in (2, 3)
    )
    drawn = torch.Generator().manual_seed(0)
    expected = [int(torch.randint(2**63 - 1, (1,), generator=drawn)) for _ in masks]
    assert [record["seed"] for record in three.provenance] == expected and two.provenance == three.provenance[:2]
    np.testing.assert_allclose(voxels(two.volumes[1]), voxels(three.volumes[1]), atol=0.01)
    reproduced(pipe, three, masks)


def test_one_generator_is_a_list_of_one_for_one_volume(pipe):
    mask = mask_image((8, 8, 8), seed=1)
    alone, listed = (
        pipe(mask, num_inference_steps=STEPS, generator=generator)
        for generator in (torch.Generator().manual_seed(5), seeded(5))
    )
    assert alone.provenance == listed.provenance and alone.provenance[0]["seed"] == 5
    np.testing.assert_array_equal(voxels(alone.volumes[0]), voxels(listed.volumes[0]))
    reproduced(pipe, alone, [mask])
    torch.manual_seed(3)  # without a generator a seed is drawn from torch's own
    reproduced(pipe, pipe(mask, num_inference_steps=STEPS), [mask])
    again = torch.Generator().manual_seed(5)
    outs = [pipe(mask, num_inference_steps=STEPS, generator=again) for _ in range(2)]
    assert [out.provenance[0]["seed"] for out in outs] == [5, None]  # the second began where the first had ended
    assert np.abs(voxels(outs[1].volumes[0]) - voxels(outs[0].volumes[0])).max() > 1
    reproduced(pipe, pipe([mask, mask], num_inference_steps=STEPS, generator=again), [mask, mask])


def test_seeds_reproduce_with_random_samplers_and_noise_models():
    level = {"kernel": np.ones((7, 7, 7)).tolist(), "std": 0.1, "curve": [1.0] * 16, "levels": [1.0] * 65}
    pipe = tiny_pipeline(objective="epsilon", residual_noise=[level])
    pipe.scheduler = DDPMScheduler(timestep_spacing="trailing")
    mask = mask_image((8, 8, 8))

    def sampled(masks, **options):
        return pipe(masks, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), **options)

    alone, two = sampled(mask), sampled([mask] * 2)
    reproduced(pipe, alone, [mask])
    reproduced(pipe, two, [mask] * 2)
    assert alone.provenance[0]["seed"] == 1
    seeds = [record["seed"] for record in two.provenance]
    assert len({1, *seeds}) == 3
    volumes = [voxels(volume) for volume in (*alone.volumes, *two.volumes)]
    assert all(np.abs(one - other).max() > 1 for one, other in itertools.combinations(volumes, 2))
    # Both take numbers from the generator: the model of noise, and the sampler after its first noise.
    smooth = sampled(mask, residual_noise=False)
    assert np.abs(voxels(smooth.volumes[0]) - volumes[0]).max() > 1
    noise = torch.randn(sampled(mask, output_type="latent").volumes[0].shape)
    first, second = (
        pipe(mask, num_inference_steps=STEPS, latents=[noise], generator=seeded(seed), output_type="latent").volumes[0]
        for seed in (1, 2)
    )
    assert (first - second).abs().max() > 0.01


def test_the_mask_matters(pipe):
    same_noise = [pipe(mask_image((8, 8, 8), seed=i), num_inference_steps=STEPS, generator=seeded(0)) for i in (1, 2)]
    assert np.abs(voxels(same_noise[0].volumes[0]) - voxels(same_noise[1].volumes[0])).max() > 1


def test_every_kind_of_mask_is_the_same_mask(pipe, tmp_path):
    labels = labels_of((7, 8, 6))
    image = nib.Nifti1Image(labels, np.array(pipe.data.affine))
    nib.save(image, tmp_path / "mask.nii.gz")
    kinds = [
        tmp_path / "mask.nii.gz",
        str(tmp_path / "mask.nii.gz"),
        image,
        Volume(labels[None], image.affine),
        labels,
        labels.astype(np.float32),
        torch.from_numpy(labels),
        torch.from_numpy(labels)[None],
    ]
    out = pipe(kinds, num_inference_steps=STEPS, generator=seeded(*[5] * len(kinds)))
    for volume in out.volumes:
        np.testing.assert_allclose(volume.affine, image.affine)
        np.testing.assert_allclose(voxels(volume), voxels(out.volumes[0]), atol=0.01)
    batch = pipe(
        torch.from_numpy(np.stack([labels, labels]))[:, None], num_inference_steps=STEPS, generator=seeded(5, 6)
    )
    assert len(batch.volumes) == 2
    np.testing.assert_allclose(voxels(batch.volumes[0]), voxels(out.volumes[0]), atol=0.01)


def test_output_types_hold_the_same_voxels(pipe):
    mask = mask_image((7, 9, 6), OBLIQUE @ np.diag([-1, 1, 1, 1]))
    outputs = {
        kind: pipe(mask, num_inference_steps=STEPS, generator=seeded(1), output_type=kind).volumes[0]
        for kind in ("nifti", "np", "pt", "latent")
    }
    assert outputs["np"].shape == (1, 7, 9, 6) and outputs["np"].dtype == np.float32
    np.testing.assert_array_equal(outputs["np"][0], voxels(outputs["nifti"]))
    np.testing.assert_array_equal(outputs["pt"].numpy(), outputs["np"])
    assert outputs["latent"].shape == (4, 2, 3, 2)
    assert pipe(mask, num_inference_steps=1, return_dict=False, output_type="np")[0][0].shape == (1, 7, 9, 6)
    with pytest.raises(ValueError, match="unknown output_type 'pil'; known: nifti, np, pt, latent"):
        pipe(mask, output_type="pil")


def test_given_latents_are_the_noise(pipe):
    mask = mask_image((8, 8, 8))
    noise = torch.randn((1, 4, 2, 2, 2), generator=torch.Generator().manual_seed(9))
    given = pipe(mask, num_inference_steps=STEPS, latents=noise)
    drawn = pipe(mask, num_inference_steps=STEPS, generator=seeded(9))
    np.testing.assert_array_equal(voxels(given.volumes[0]), voxels(drawn.volumes[0]))
    assert given.provenance[0]["seed"] is None and drawn.provenance[0]["seed"] == 9
    with pytest.raises(ValueError, match=r"latents of shape \(4, 3, 2, 2\) for a mask that needs \(4, 2, 2, 2\)"):
        pipe(mask, latents=torch.zeros(1, 4, 3, 2, 2))


def test_a_generator_already_drawn_from_leaves_no_seed(pipe):
    used = torch.Generator().manual_seed(4)
    torch.randn(3, generator=used)
    assert pipe(mask_image((8, 8, 8)), num_inference_steps=1, generator=[used]).provenance[0]["seed"] is None


def test_the_callback_sees_and_replaces_latents(pipe):
    seen = []

    def callback(same, step, timestep, tensors):
        seen.append((same is pipe, step, float(timestep)))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 2 else None

    out = pipe(mask_image((8, 8, 8)), num_inference_steps=3, callback_on_step_end=callback, output_type="latent")
    assert [(same, step) for same, step, _ in seen] == [(True, 0), (True, 1), (True, 2)]
    assert seen[0][2] == 1000 and (out.volumes[0] == 0.5).all()


def test_sigmas_are_the_steps(pipe):
    mask = mask_image((8, 8, 8))
    even = pipe(mask, num_inference_steps=4, generator=seeded(0))
    sigmas = pipe(mask, sigmas=[1.0, 0.75, 0.5, 0.25], generator=seeded(0))
    np.testing.assert_allclose(voxels(sigmas.volumes[0]), voxels(even.volumes[0]), atol=0.01)
    assert sigmas.provenance[0]["num_inference_steps"] == 4


def test_schedulers_are_converted_or_refused():
    pipe = tiny_pipeline()
    mask = mask_image((8, 8, 8))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # an eps scheduler, without a word
    out = pipe(mask, num_inference_steps=8, generator=seeded(0))
    assert out.provenance[0]["scheduler"]["class"] == "DPMSolverMultistepScheduler"
    assert out.provenance[0]["scheduler"]["prediction_type"] == "flow_prediction"
    euler = tiny_pipeline()(mask, num_inference_steps=50, generator=seeded(0)).volumes[0]
    assert np.abs(voxels(out.volumes[0]) - voxels(euler)).mean() < 4  # the same ODE, of a range of 200
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler cannot sample a model that predicts rectified_flow"):
        pipe(mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    mask = mask_image((8, 8, 8))
    full = tiny_pipeline()(mask, num_inference_steps=STEPS, generator=seeded(0)).volumes[0]
    half = tiny_pipeline().to(dtype)(mask, num_inference_steps=STEPS, generator=seeded(0))
    assert half.volumes[0].get_data_dtype() == np.float32
    assert half.provenance[0]["dtype"] == str(dtype).removeprefix("torch.")
    assert np.abs(voxels(half.volumes[0]) - voxels(full)).max() < 5  # of a range of 200


def test_a_volume_that_is_not_finite_raises():
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="the volume of seed 8 is not finite in float32; look for NaN in the weights"):
        pipe(mask_image((8, 8, 8)), generator=seeded(8))
    pipe.to(torch.float16)  # of which alone the range can be too small
    with pytest.raises(ValueError, match="is not finite in float16; use bfloat16 or float32"):
        pipe(mask_image((8, 8, 8)), num_inference_steps=1, generator=seeded(8))


def test_a_model_without_masks_takes_a_shape():
    pipe = tiny_pipeline(num_labels=0, labels={})
    out = pipe(shape=(7, 6, 9), num_inference_steps=STEPS, num_volumes_per_mask=2)
    assert [image.shape for image in out.volumes] == [(7, 6, 9)] * 2
    np.testing.assert_allclose(out.volumes[0].affine, pipe.data.affine)
    with pytest.raises(ValueError, match="trained without a mask condition"):
        pipe(mask_image((8, 8, 8)))
    with pytest.raises(ValueError, match="three positive numbers"):
        pipe(shape=(8, 8))


def test_what_cannot_be_is_named(pipe):
    mask = mask_image((8, 8, 8))
    with pytest.raises(ValueError, match="this model is conditioned on a mask"):
        pipe()
    with pytest.raises(ValueError, match="3 generators for 2 volumes"):
        pipe([mask, mask], generator=seeded(1, 2, 3))
    with pytest.raises(ValueError, match="holds one generator twice"):
        pipe([mask, mask], generator=seeded(1) * 2)
    with pytest.raises(ValueError, match="a torch.Generator or a list of them, got 3"):
        pipe(mask, generator=3)
    for sigmas in ([], [0.2, 0.6, 1.0], [1.0, 1.0, 0.5], [1.0, 0.0], [1.5, 0.5]):
        with pytest.raises(ValueError, match="sigmas are noise levels"):
            pipe(mask, sigmas=sigmas)
    with pytest.raises(ValueError, match="2 latents for 1 volumes"):
        pipe(mask, latents=torch.zeros(2, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="num_volumes_per_mask is a whole number, 1 or more; got 0"):
        pipe(mask, num_volumes_per_mask=0)


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="the U-Net knows 4 labels, data names 3"):
        tiny_pipeline(num_labels=4)
    parts = tiny_pipeline()
    parts.vae.register_to_config(latents_mean=None, latents_std=None)
    with pytest.raises(ValueError, match="no latent statistics"):
        MedVolumePipeline(parts.vae, parts.unet, parts.scheduler, parts.data)


def test_a_volume_says_that_it_is_synthetic(pipe, tmp_path):
    nib.save(mask_image((8, 8, 8)), tmp_path / "case.nii.gz")
    out = pipe(tmp_path / "case.nii.gz", num_inference_steps=STEPS, generator=seeded(12))
    write_synthetic(out.volumes[0], out.provenance[0], tmp_path / "out" / "case_000.nii.gz")
    description = nib.load(tmp_path / "out" / "case_000.nii.gz").header["descrip"].item().decode()
    assert description.startswith("synthetic; medvolume") and description.endswith(f"{pipe.model_hash[:12]} seed 12")
    record = read_sidecar(tmp_path / "out" / "case_000.nii.gz")
    assert record == out.provenance[0] and sidecar_path("a/b.c.nii.gz").name == "b.c.json"
    assert (record["seed"], record["num_inference_steps"], record["mask"]["file"]) == (12, STEPS, "case.nii.gz")
    assert record["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case_000.json", "case_000.nii.gz"]


def test_noise_is_drawn_in_float32_whatever_the_type():
    """So that a seed means one noise: of bfloat16 alone, another would be drawn."""
    shape = (4, 3, 3, 3)  # 108 numbers: of multiples of 16, torch draws the same in both types
    samples = [SimpleNamespace(generator=generator, noise=None) for generator in seeded(3, 4)]
    narrow = initial_latents(samples, shape, torch.device("cpu"), torch.bfloat16)
    rows = [torch.randn(1, *shape, generator=generator) for generator in seeded(3, 4)]
    assert torch.equal(narrow, torch.cat(rows).bfloat16())


def test_grids_with_permuted_sides_share_no_batch():
    shapes = [(4, 8, 12), (12, 8, 4), (4, 8, 12), (4, 12, 8), (4, 8, 12)]
    assert list(equal_batches(shapes, 2)) == [[0, 2], [4], [1], [3]]


def test_equal_grids_alone_share_a_batch(pipe, monkeypatch):
    """Three of one padded grid and one of another, two at a time: batches of 2, 1 and 1."""
    sizes = []
    forward = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet,
        "forward",
        lambda sample, *args, **kw: (sizes.append(tuple(sample.shape)), forward(sample, *args, **kw))[1],
    )
    pipe(
        [mask_image(shape) for shape in [(8, 8, 8), (12, 8, 8), (7, 8, 5), (5, 5, 6)]],
        num_inference_steps=1,
        batch_size=2,
    )
    assert sizes == [(2, 4, 2, 2, 2), (1, 4, 2, 2, 2), (1, 4, 3, 2, 2)]

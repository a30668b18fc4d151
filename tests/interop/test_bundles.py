"""Bundles of MONAI's model zoo, converted, generate what their scripts generate; what else they say is refused."""

import json

import bundles
import numpy as np
import pytest
import torch
from bundles import BRAIN, BRATS, NUMBERS
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.schedulers.ddim import DDIMScheduler
from safetensors.torch import load_file

from convert import main as command
from diffusion import MonaiUNet3D
from generate import main as generate
from interop.bundles import BundleOptions, read_bundle
from interop.convert import convert
from interop.formats import FORMATS
from interop.networks import PEERS, config_of, expected_shapes, renamed
from pipelines import MedVolumePipeline, read_sidecar

KIND = "monai-bundle"
AGES = {"gender": 1.0, "age": 0.7, "ventricular_vol": 0.3, "brain_vol": 0.5}


def assert_close(ours, theirs) -> None:
    ours, theirs = torch.as_tensor(ours).float(), torch.as_tensor(theirs).float()
    assert theirs.std() > 1e-3 and ours.numel() == theirs.numel()
    assert (ours.reshape(theirs.shape) - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


@torch.no_grad()
def zoo_sample(vae, unet, noise, beta_end: float, conditioning=None):
    """What `scripts/ldm_sampler.py` and `scripts/sampler.py` do: the latents, and the image."""
    scheduler = DDIMScheduler(1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=beta_end)
    scheduler.set_timesteps(num_inference_steps=50)
    constant = None
    if conditioning is not None:
        constant = conditioning.squeeze(1)[..., None, None, None].expand(-1, -1, *noise.shape[2:])
    for t in scheduler.timesteps:
        given = noise if constant is None else torch.cat((noise, constant), dim=1)
        predicted = unet(given, timesteps=torch.Tensor((t,)).long(), context=conditioning)
        noise, _ = scheduler.step(predicted, t, noise)
    return noise, vae.decode_stage_2_outputs(noise)


@pytest.mark.parametrize(
    ("name", "vae", "unet"), [(BRATS, (130, 21_000_353), (296, 189_325_576)), (BRAIN, (162, 13_766_248), None)]
)
def test_published_bundles_at_full_width(name, vae, unet, tmp_path):
    """Tensors and parameters of MONAI's classes (on the meta device), by the zoo's own configs."""
    bundles.write_config(tmp_path, name, bundles.CONFIGS[name])
    (tmp_path / "models").mkdir()
    for file in bundles.FILES[name]:
        (tmp_path / "models" / file).touch()
    kind, value_range = read_bundle(FORMATS[KIND], tmp_path, BundleOptions(), None)
    shape, spacing = {BRATS: ((144, 176, 112), 1.1), BRAIN: ((160, 224, 160), 1.0)}[name]
    assert (kind.variant.shape, kind.variant.spacing, kind.variant.steps) == (shape, (spacing,) * 3, 50)
    assert value_range == (0.0, 1.0)
    for part, counts in zip(kind.parts, (vae, unet or (528, 553_168_899)), strict=True):
        peer = PEERS[part.peers[0]]
        expected = expected_shapes(peer, config_of(peer, part.arguments) | dict(part.settings))
        assert (len(expected), sum(int(np.prod(shape)) for shape in expected.values())) == counts


@pytest.mark.parametrize("name", [BRATS, BRAIN])
def test_a_bundle_generates_what_it_generated(name, tmp_path):
    vae, unet = bundles.write_bundle(tmp_path / "bundle", name)
    convert(KIND, tmp_path / "bundle", tmp_path / "out")
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)

    stored = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    theirs = {f"network.{key}": value for key, value in unet.state_dict().items()}
    assert stored.keys() == theirs.keys() and all(torch.equal(stored[key], value) for key, value in theirs.items())

    voxels = torch.rand(1, 1, 16, 24, 8)
    with torch.no_grad():
        posterior = pipe.vae.encode(voxels * 2 - 1).latent_dist
        for ours, expected in zip((posterior.raw_mean, posterior.std), vae.encode(voxels), strict=True):
            assert_close(ours, expected)
        noise = torch.randn(1, *posterior.mean.shape[1:])
        assert_close((pipe.vae.decode(noise).sample + 1) / 2, vae.decode(noise))

    channels = pipe.vae.config["latent_channels"]
    noise = torch.randn(1, channels, 4, 8, 4, generator=torch.Generator().manual_seed(3))
    values, conditioning, own = {}, None, None
    if name == BRAIN:
        values, conditioning = {"numbers": AGES}, torch.tensor([[[AGES[name] for name in NUMBERS]]])
        own = torch.tensor([[AGES[name] for name in sorted(NUMBERS)]])
    with torch.no_grad():
        given = noise if conditioning is None else torch.cat([noise, conditioning[0, 0].view(1, 4, 1, 1, 1).expand(1, 4, 4, 8, 4)], 1)
        predicted = unet(given, torch.tensor([437]), context=conditioning)
        assert_close(pipe.unet(noise, torch.tensor([437]), numbers=own).sample, predicted)

    request = {"shape": pipe.data.shape_range[0], **values}
    latents, image = zoo_sample(vae, unet, noise, 0.0205 if name == BRAIN else 0.0195, conditioning)
    out = pipe(**request, output_type="latent", generator=torch.Generator().manual_seed(3))
    assert_close(out.volumes[0], latents)
    voxels = pipe(**request, output_type="pt", generator=torch.Generator().manual_seed(3)).volumes[0]
    assert_close(voxels, image.clamp(0, 1))
    volume = pipe(**request, generator=torch.Generator().manual_seed(3)).volumes[0]
    assert volume.get_data_dtype() == np.float32
    assert np.allclose(volume.affine, np.diag([*[1.1 if name == BRATS else 1.0] * 3, 1.0]))

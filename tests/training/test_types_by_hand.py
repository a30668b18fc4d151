"""What must not depend on how a number is stored, on gradients, or on what is already there."""

import pytest
import torch

from autoencoder import (
    AutoencoderKL3D,
    Codebook,
    DiagonalGaussian3D,
    SpaceToDepth3D,
    kl_loss,
    latent_statistics,
    spectrum_loss,
)
from autoencoder.losses.perceptual import perceptual_loss
from diffusion import (
    Conditions,
    LatentCacheConfig,
    LatentUNet3D,
    build_latent_cache,
    denoise,
    make_scheduler,
    training_loss,
)
from diffusion.latents.cache import weights_hash
from diffusion.objectives import sample_timesteps
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases


def test_features_in_half_precision_are_compared_in_float32():
    """Unit vectors of (3, 4) and (4, 3) are 0.08 apart; in bfloat16 they would be 0.076 to 0.084."""

    class Planted(torch.nn.Module):
        dims, in_channels = 3, 1

        def forward(self, volumes):
            return [torch.cat([volumes, 7 - volumes], 1).bfloat16()]

    image, fov = torch.full((1, 1, 2, 1, 1), 3.0), torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)
    loss = perceptual_loss(Planted(), image + 1, image, fov)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.08, rel=1e-5)


def test_statistics_are_exact_far_from_zero():
    """Latents of 1000 +- 0.01, whose squares float32 cannot tell apart."""
    vae = AutoencoderKL3D(channels=(4, 4), encoder_blocks=(0, 0), decoder_blocks=(0, 0), latent_channels=1).eval()
    planted = torch.tensor([999.99, 1000.01] * 32)
    vae._encode = lambda x: torch.stack([planted.view(4, 4, 4), torch.zeros(4, 4, 4)])[None]
    volume = torch.zeros(1, 1, 16, 16, 16)
    [mean], [std] = latent_statistics(vae, [{"image": volume, "fov": volume == 0}])
    assert mean == pytest.approx(1000.0) and std == pytest.approx(0.01, rel=0.01)


def test_half_precision_cells_move_a_codebook_as_they_are():
    cells = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    books = [Codebook(4, 3, decay=0.9) for _ in range(2)]
    books[1].load_state_dict(books[0].state_dict())
    for book, own in zip(books, (cells, cells.float()), strict=True):
        for _ in range(3):
            book.update(own, torch.Generator().manual_seed(1))
    assert books[0].codes.dtype == torch.float32 and torch.equal(books[0].codes, books[1].codes)


def test_losses_are_float32_in_half_precision():
    reconstruction, image = torch.rand(1, 1, 16, 16, 16).bfloat16(), torch.rand(1, 1, 16, 16, 16)
    fov = torch.ones(1, 1, 16, 16, 16, dtype=torch.bool)
    spectrum = spectrum_loss(reconstruction, image, fov)
    torch.testing.assert_close(spectrum, spectrum_loss(reconstruction.float(), image, fov))
    moments = torch.randn(1, 4, 4, 4, 4).bfloat16()
    posterior, exact = (DiagonalGaussian3D(one, torch.zeros(2), torch.ones(2)) for one in (moments, moments.float()))
    torch.testing.assert_close(kl_loss(posterior, fov), kl_loss(exact, fov))

    class Half(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (torch.full_like(sample, 1 / 3).bfloat16(),)

    loss = training_loss(
        Half(),
        "epsilon",
        torch.zeros(1, 2, 4, 4, 4),
        Conditions(),
        torch.ones(1, 1, 4, 4, 4),
        torch.Generator().manual_seed(0),
    )
    noise = torch.Generator().manual_seed(0)
    torch.randint(0, 1000, (1,), generator=noise)
    drawn = torch.randn(1, 2, 4, 4, 4, generator=noise)
    expected = (torch.tensor(1 / 3).bfloat16().float() - drawn).square().mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_sampling_and_measuring_keep_no_graph_and_training_does():
    unet, latents = LatentUNet3D(channels=(8,), strides=(), blocks=(1,), attention=(False,)), torch.randn(1, 4, 3, 3, 3)
    torch.nn.init.normal_(unet.conv_out.weight)
    made = denoise(unet, latents, make_scheduler("rectified_flow"), Conditions(), num_inference_steps=2)
    assert not made.requires_grad and unet.training
    loss = training_loss(unet, "rectified_flow", latents, Conditions(), torch.ones(1, 1, 3, 3, 3), torch.Generator())
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.conv_out.parameters()
    )


def test_each_version_that_is_missing_is_made_again(tmp_path):
    config = DataConfig(phantom=PhantomConfig(count=2, shape=(9, 9, 9)))
    dataset, how = VolumeDataset(load_cases(config), config), LatentCacheConfig(versions=2, shift=True)
    vae = SpaceToDepth3D(patch_size=2)
    files = build_latent_cache(dataset, vae, tmp_path, how, progress=False).files
    assert len(files) == 4
    contents = [file.read_bytes() for file in files]
    for gone in (1, 2):
        files[gone].unlink()
        again = build_latent_cache(dataset, vae, tmp_path, how, progress=False)
        assert again.files == files and [file.read_bytes() for file in files] == contents


def test_every_bit_of_the_weights_counts_in_their_hash():
    """Of parameters and buffers, whatever the memory format; names, shapes and types as well."""
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3))
    before = weights_hash(model)
    hashes = {before}
    model.to(memory_format=torch.channels_last_3d)
    assert weights_hash(model) == before
    for change in (
        lambda: model[0].weight.data[2, 1, 1, 1, 1].mul_(1 + 1e-6),
        lambda: model[1].running_mean.add_(1e-7),
        lambda: setattr(model[0].bias, "data", model[0].bias.data.view(3).double()),
        lambda: setattr(model[0].bias, "data", model[0].bias.data.view(3, 1)),
        lambda: model.add_module("2", torch.nn.Linear(1, 1)),
    ):
        change()
        hashes.add(weights_hash(model))
    assert len(hashes) == 6


def test_timesteps_of_several_generators_are_independent():
    seeds = range(40)
    for objective, steps in (("epsilon", 7), ("v_prediction", 300), ("rectified_flow", 1000)):
        drawn = sample_timesteps(objective, 40, [torch.Generator().manual_seed(seed) for seed in seeds], steps)
        alone = [sample_timesteps(objective, 1, torch.Generator().manual_seed(seed), steps) for seed in seeds]
        assert torch.equal(drawn, torch.cat(alone)) and drawn.max() < steps and len(drawn.unique()) > 5

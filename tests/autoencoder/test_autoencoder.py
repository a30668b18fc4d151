"""The autoencoder: folding of space, finite receptive field, the posterior, losses inside the field of view, latent
statistics, files."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from autoencoder import (
    AutoencoderKL3D,
    DiagonalGaussian3D,
    gradient_loss,
    kl_loss,
    l1_loss,
    latent_statistics,
    mse_loss,
    spectrum_loss,
)
from autoencoder.layers import as_stride, depth_to_space, space_to_depth

SMALL = {"channels": (8, 16), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


def small_vae(**arguments) -> AutoencoderKL3D:
    """A small autoencoder whose residual branches are not zero, as after training."""
    torch.manual_seed(0)
    vae = AutoencoderKL3D(**{**SMALL, **arguments})
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vae.eval()


@pytest.mark.parametrize("stride", [(2, 2, 2), (4, 2, 1)])
def test_space_to_depth_is_invertible_and_keeps_neighbors(stride):
    x = torch.arange(2 * 3 * 8 * 4 * 6.0).reshape(2, 3, 8, 4, 6)
    folded = space_to_depth(x, stride)
    assert torch.equal(depth_to_space(folded, stride), x)
    cell = folded[0, :, 1, 1, 1].reshape(3, *stride)
    sx, sy, sz = stride
    assert torch.equal(cell, x[0, :, sx : 2 * sx, sy : 2 * sy, sz : 2 * sz])


def test_strides_per_axis_multiply():
    vae = AutoencoderKL3D(**SMALL, patch_size=(2, 2, 1), strides=[(2, 2, 1)])
    assert vae.stride == (4, 4, 1)
    assert vae.encode(torch.zeros(1, 1, 8, 12, 5)).latent_dist.mean.shape == (1, 4, 2, 3, 5)
    with pytest.raises(ValueError, match="stride"):
        as_stride((2, 2))


def test_sides_that_do_not_fit_the_stride_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 9, 8\).*multiple of \(4, 4, 4\)"):
        small_vae().encode(torch.zeros(1, 1, 8, 9, 8))


def test_per_channel_coding_equals_the_one_channel_autoencoder():
    two, one = (
        small_vae(in_channels=2, out_channels=2, latent_channels=6, per_channel=True),
        small_vae(latent_channels=3),
    )
    one.load_state_dict(two.state_dict())
    two.set_latent_statistics([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    x, z = torch.randn(2, 2, 8, 12, 16), torch.randn(2, 6, 2, 3, 4)
    with torch.no_grad():
        posterior, decoded = two.encode(x).latent_dist, two.decode(z).sample
        for i, (mean, std) in enumerate([([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), ([0.4, 0.5, 0.6], [4.0, 5.0, 6.0])]):
            one.set_latent_statistics(mean, std)
            alone, own = one.encode(x[:, i : i + 1]).latent_dist, two.latents_of(i)
            torch.testing.assert_close(posterior.mean[:, own], alone.mean)
            torch.testing.assert_close(posterior.std[:, own], alone.std)
            torch.testing.assert_close(decoded[:, i : i + 1], one.decode(z[:, own]).sample)
        moved = two.encode(torch.stack([x[:, 0], torch.full_like(x[:, 0], -1.0)], 1)).latent_dist.mean
    assert torch.equal(moved[:, two.latents_of(0)], posterior.mean[:, two.latents_of(0)])
    assert not torch.allclose(moved[:, two.latents_of(1)], posterior.mean[:, two.latents_of(1)])
    assert two.activation_bytes((8, 12, 16)) == 2 * one.activation_bytes((8, 12, 16))


def test_channels_that_cannot_be_coded_apart_are_refused():
    with pytest.raises(ValueError, match=r"latent_channels \(5\) a multiple"):
        AutoencoderKL3D(in_channels=2, out_channels=2, latent_channels=5, per_channel=True)
    with pytest.raises(ValueError, match="train one with per_channel: true"):
        small_vae(in_channels=2, out_channels=2).latents_of(0)
    with pytest.raises(ValueError, match="channel 1: .*0 to 0"):
        small_vae().latents_of(1)


def test_channels_that_do_not_agree_are_refused():
    """One reconstructed channel would broadcast against two real ones, and train, without a word."""
    with pytest.raises(ValueError, match="2 channels: this autoencoder takes 1"):
        small_vae().encode(torch.zeros(1, 2, 8, 8, 8))
    fov = torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    for loss in (l1_loss, mse_loss, gradient_loss, spectrum_loss):
        with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 4\).*\(1, 2, 4, 4, 4\).*out_channels"):
            loss(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4), fov)


def test_the_spectrum_loss_counts_power_whatever_its_place():
    torch.manual_seed(0)
    image, fov = torch.randn(2, 1, 24, 28, 26), torch.ones(2, 1, 24, 28, 26, dtype=torch.bool)
    assert spectrum_loss(image, image, fov) == 0
    halved = spectrum_loss(image * 0.5**0.5, image, fov)  # half the power in every band
    assert halved.item() == pytest.approx(math.log(2) ** 2, rel=1e-4)
    assert spectrum_loss(torch.randn_like(image), image, fov) < 0.1 * halved  # other noise of the same power
    blurred = torch.nn.functional.avg_pool3d(image, 3, stride=1, padding=1)
    assert spectrum_loss(blurred, image, fov) > 10 * halved
    fov[:, :, :8] = False
    assert spectrum_loss(torch.where(fov, image, torch.zeros_like(image)), image, fov) == 0  # padding has no truth
    soft = (image * 0.9).requires_grad_()
    spectrum_loss(soft, image, fov | True).backward()
    assert (soft.grad * soft).sum() < 0  # more power costs less


def test_the_spectrum_of_what_is_flat_has_a_bounded_price():
    """Noise of 0.01 against air has 10 times the power of 8 bits: (log 11)^2 = 5.7, and it must not drown tissue."""
    torch.manual_seed(0)
    air, fov = torch.full((2, 1, 16, 16, 16), -1.0), torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    noisy = spectrum_loss(air + 0.01 * torch.randn_like(air), air, fov)
    assert noisy.item() == pytest.approx(math.log(11) ** 2, rel=0.2)  # few waves in the lowest bands
    assert spectrum_loss(air + 0.001 * torch.randn_like(air), air, fov) < 0.02


def test_kl_of_half_precision_moments_does_not_overflow():
    """Mean 300, variance 1: 45,000 nats an element, whose square and whose sum float16 cannot hold."""
    moments = torch.cat([torch.full((1, 1, 4, 4, 4), 300.0), torch.zeros(1, 1, 4, 4, 4)], 1).half()
    posterior = DiagonalGaussian3D(moments, torch.zeros(1), torch.ones(1))
    assert kl_loss(posterior, torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)).item() == pytest.approx(45_000)


def test_levels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one entry per level"):
        AutoencoderKL3D(channels=(8, 16, 32), strides=(2,), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


def test_far_voxels_do_not_matter():
    """A finite receptive field: a change at one end leaves the other end bit for bit as it was; with GroupNorm it would
    not."""
    vae, x = small_vae(), torch.randn(1, 1, 96, 8, 8)
    changed = x.clone()
    changed[:, :, 64:] += 1.0
    with torch.no_grad():
        before, after = vae(x).sample, vae(changed).sample
    assert torch.equal(before[:, :, :16], after[:, :, :16])
    assert not torch.allclose(before[:, :, 60:], after[:, :, 60:])


def test_kl_is_that_of_torch_distributions_in_five_dimensions():
    moments = torch.randn(2, 6, 3, 4, 5)
    mean, logvar = moments.chunk(2, 1)
    posterior = DiagonalGaussian3D(moments, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 4.0]))
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(
        posterior.kl(), expected.sum(dim=(1, 2, 3, 4))
    )  # of the raw posterior, whatever the statistics
    torch.testing.assert_close(kl_loss(posterior, torch.ones(2, 1, 3, 4, 5, dtype=torch.bool)), expected.mean())


def test_samples_have_the_posterior_moments_and_are_seeded():
    """Samples follow the generator that is passed."""
    moments = torch.cat([torch.full((1, 1, 20, 20, 20), 3.0), torch.full((1, 1, 20, 20, 20), 2 * math.log(0.5))], 1)
    posterior = DiagonalGaussian3D(moments, torch.tensor([1.0]), torch.tensor([2.0]))
    draw = posterior.sample(torch.Generator().manual_seed(1))
    assert draw.mean().item() == pytest.approx((3 - 1) / 2, abs=0.01)
    assert draw.std().item() == pytest.approx(0.5 / 2, abs=0.01)
    assert torch.equal(draw, posterior.sample(torch.Generator().manual_seed(1)))
    assert torch.equal(posterior.mode(), posterior.mean)


def test_losses_ignore_padding():
    """Whatever is in the padding, the losses of the volume inside are the same."""
    torch.manual_seed(0)
    inside, target = torch.randn(1, 1, 6, 6, 6), torch.randn(1, 1, 6, 6, 6)
    fov = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    fov[..., 1:7, 1:7, 1:7] = True
    padded, padded_target = torch.full((1, 1, 8, 8, 8), 7.0), torch.full((1, 1, 8, 8, 8), -5.0)
    padded[..., 1:7, 1:7, 1:7], padded_target[..., 1:7, 1:7, 1:7] = inside, target
    everywhere = torch.ones(1, 1, 6, 6, 6, dtype=torch.bool)
    for loss in (l1_loss, mse_loss, gradient_loss):
        torch.testing.assert_close(loss(padded, padded_target, fov), loss(inside, target, everywhere))
    torch.testing.assert_close(l1_loss(inside, target, everywhere), (inside - target).abs().mean())


def test_batch_loss_is_the_mean_of_its_parts_despite_padding():
    """Else losses would depend on how many processes, or accumulated parts, share a batch."""
    generator = torch.Generator().manual_seed(0)
    ours, real = (torch.randn(3, 1, 8, 8, 8, generator=generator) for _ in range(2))
    fov = torch.zeros(3, 1, 8, 8, 8, dtype=torch.bool)
    for one, inside in zip(fov, (2, 8, 5), strict=True):
        one[:, :inside] = True
    moments = torch.randn(3, 4, 4, 4, 4, generator=generator)
    posterior, *parts = (DiagonalGaussian3D(one, torch.zeros(2), torch.ones(2)) for one in (moments, *moments[:, None]))
    for loss in (l1_loss, mse_loss, gradient_loss):
        apart = torch.stack([loss(ours[i : i + 1], real[i : i + 1], fov[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(loss(ours, real, fov), apart.mean())
    apart = torch.stack([kl_loss(part, fov[i : i + 1]) for i, part in enumerate(parts)])
    torch.testing.assert_close(kl_loss(posterior, fov), apart.mean())


def test_gradient_loss_sees_edges_but_not_offsets():
    x, everywhere = torch.randn(1, 1, 6, 6, 6), torch.ones(1, 1, 6, 6, 6, dtype=torch.bool)
    assert gradient_loss(x + 1.0, x, everywhere).item() == pytest.approx(0, abs=1e-6)
    ramp = torch.arange(6.0).view(1, 1, 6, 1, 1).expand_as(x)
    assert gradient_loss(x + 3 * ramp, x, everywhere).item() == pytest.approx(
        1.0, abs=1e-5
    )  # 3 along one axis of three


def test_measured_statistics_standardize_and_decode_undoes_it():
    vae = small_vae()
    volumes = [torch.rand(1, 1, 16, 8, 12) * 2 - 1, torch.rand(1, 1, 8, 8, 8) * 2 - 1]
    batches = [{"image": v, "fov": torch.ones_like(v, dtype=torch.bool)} for v in volumes]
    with torch.no_grad():
        before = [vae(v).sample for v in volumes]
        vae.set_latent_statistics(*latent_statistics(vae, batches))
        cells = torch.cat([vae.encode(v).latent_dist.mode().movedim(1, -1).flatten(0, 3) for v in volumes])
        after = [vae(v).sample for v in volumes]
    torch.testing.assert_close(cells.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(cells.std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_statistics_leave_padding_out():
    vae, x = small_vae(), torch.rand(1, 1, 8, 8, 8) * 2 - 1
    wide = torch.cat([x, torch.full((1, 1, 64, 8, 8), -1.0)], 2)
    fov = torch.zeros_like(wide, dtype=torch.bool)
    fov[:, :, :8] = True
    raw = vae.encode(wide).latent_dist.raw_mean[:, :, :2].movedim(1, -1).flatten(0, 3)
    mean, _ = latent_statistics(vae, [{"image": wide, "fov": fov}])
    torch.testing.assert_close(torch.tensor(mean), raw.mean(0), atol=1e-5, rtol=1e-4)


def test_wrong_statistics_are_refused():
    with pytest.raises(ValueError, match="latents_mean: need 4 numbers"):
        small_vae().set_latent_statistics([0.0], [1.0])
    with pytest.raises(ValueError, match=r"latents_std\[2\]: got 0.0"):
        small_vae().set_latent_statistics([0.0] * 4, [1.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="at least one volume"):
        latent_statistics(small_vae(), [])


def test_saved_and_loaded_is_the_same(tmp_path):
    vae, x = small_vae(), torch.rand(1, 1, 8, 8, 8)
    vae.set_latent_statistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL3D.from_pretrained(tmp_path, use_safetensors=True)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == vae.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(x).sample, vae(x).sample)
        assert torch.equal(loaded.encode(x).latent_dist.std, vae.encode(x).latent_dist.std)


def test_a_missing_or_extra_key_raises(tmp_path):
    vae = small_vae()
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    bias = weights.pop("encoder.0.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"1 missing \(encoder\.0\.bias\)"):
        AutoencoderKL3D.from_pretrained(tmp_path)
    save_file(weights | {"encoder.0.bias": bias, "stray": bias.clone()}, file)
    with pytest.raises(ValueError, match=r"1 unknown \(stray\)"):
        AutoencoderKL3D.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pickle"):
        AutoencoderKL3D.from_pretrained(tmp_path, use_safetensors=False)


def test_bfloat16_is_close_to_float32():
    vae, x = small_vae(), torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        exact, half = vae(x).sample, vae.to(torch.bfloat16)(x.bfloat16()).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()

"""Losses, posterior and codebook where the answer can be worked out on paper."""

import math

import numpy as np
import pytest
import torch

from autoencoder import (
    VQGAN3D,
    AutoencoderKL3D,
    Codebook,
    DiagonalGaussian3D,
    SpaceToDepth3D,
    commitment_loss,
    gradient_loss,
    kl_loss,
    l1_loss,
    latent_loss,
    latent_statistics,
    mse_loss,
    spectrum_loss,
)
from autoencoder.losses.adversarial import (
    adaptive_weight,
    discriminator_loss,
    draw_slices,
    feature_matching_loss,
    generator_loss,
)
from autoencoder.losses.perceptual import perceptual_loss
from autoencoder.losses.reconstruction import cells_inside, masked_mean
from autoencoder.posterior import LatentDistribution
from autoencoder.residual_noise import _at, _power, _window


def everywhere(like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like[:, :1], dtype=torch.bool)


def half_padded() -> torch.Tensor:
    """(2, 1, 8, 8, 8): of the first volume the lower half along X is inside, of the second all."""
    fov = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    fov[0, :, 4:] = False
    return fov


# the posterior


def test_kl_of_a_half_padded_field_of_view():
    """N(m, e^l) against N(0, 1) costs (m^2 + e^l - 1 - l) / 2: here 2 nats inside, and 40 or so where only padding
    is."""
    mean, logvar = torch.full((2, 3, 2, 2, 2), 2.0), torch.zeros(2, 3, 2, 2, 2)
    mean[0, :, 1:], logvar[0, :, 1:] = -9.0, -2.0
    posterior = DiagonalGaussian3D(torch.cat([mean, logvar], 1), torch.zeros(3), torch.ones(3))
    assert kl_loss(posterior, half_padded()).item() == pytest.approx(2.0)
    outside = (81 + math.exp(-2) - 1 + 2) / 2
    whole = (0.5 * (2 + outside) + 2) / 2  # mean of two volumes, of the first half is far off
    assert kl_loss(posterior, torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)).item() == pytest.approx(whole)
    fov = half_padded()
    fov[0, :, 4] = True  # one plane of voxels makes the whole plane of cells count
    assert kl_loss(posterior, fov).item() == pytest.approx(whole)
    assert latent_loss(posterior, half_padded())[0] == "kl"
    assert latent_loss(posterior, half_padded())[1].item() == pytest.approx(2.0)


def test_log_variance_is_clipped_against_overflow_of_exp():
    """A posterior is clipped where exp would overflow or vanish."""
    logvar = torch.tensor([-100.0, -29.0, 0.0, 19.0, 100.0]).view(1, 1, 5, 1, 1)
    posterior = DiagonalGaussian3D(torch.cat([torch.zeros_like(logvar), logvar], 1), torch.zeros(1), torch.ones(1))
    expected = [math.exp(half) for half in (-15, -14.5, 0, 9.5, 10)]
    torch.testing.assert_close(posterior.std.flatten(), torch.tensor(expected))
    assert posterior.kl_map()[0, 0, 4, 0, 0].item() == pytest.approx(0.5 * (math.exp(20) - 1 - 20), rel=1e-5)
    assert posterior.kl_map()[0, 0, 0, 0, 0].item() == pytest.approx(0.5 * (30 - 1), rel=1e-5)


def test_a_reconstruction_draws_its_latents_from_the_generators():
    """One a volume, whatever the batch; without a draw, the mean is decoded. The latents' standard deviation is that of
    a cell."""
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()
    volumes = torch.rand(2, 1, 8, 8, 8)

    def made(*seeds: int, of: torch.Tensor = volumes) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return vae(of, sample_posterior=True, return_dict=False, generator=generators)[0]

    with torch.no_grad():
        together = made(3, 4)
        torch.testing.assert_close(
            together, torch.cat([made(3, of=volumes[:1]), made(4, of=volumes[1:])]), atol=1e-5, rtol=0
        )
        assert (together[:1] - made(5, of=volumes[:1])).abs().max() > 1e-3
        posterior = vae.encode(volumes).latent_dist
        assert torch.equal(vae(volumes).sample, vae.decode(posterior.mean).sample)
        noise = torch.randn(posterior.mean[:1].shape, generator=torch.Generator().manual_seed(3))
        expected = vae.decode(posterior.mean[:1] + posterior.std[:1] * noise).sample
        torch.testing.assert_close(together[:1], expected, atol=1e-4, rtol=0)


def test_standardized_latents_of_a_certain_encoder():
    raw = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1, 1)
    latents = LatentDistribution(raw, torch.zeros_like(raw), torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.5]))
    assert latents.mean.flatten().tolist() == [-1.0, 2.0] == latents.sample().flatten().tolist()


def test_statistics_count_every_cell_once_whatever_its_volume():
    """Two volumes of unlike size in which channels are known: mean and standard deviation of all cells together."""
    vae = AutoencoderKL3D(channels=(4, 4), encoder_blocks=(0, 0), decoder_blocks=(0, 0), latent_channels=1).eval()
    small, large = torch.full((1, 1, 4, 4, 4), 0.5), torch.full((1, 1, 4, 4, 12), -1.0)
    planted = {4: torch.tensor([7.0]), 12: torch.tensor([1.0, 2.0, 3.0])}
    vae._encode = lambda x: torch.stack([planted[x.shape[4]], torch.zeros(x.shape[4] // 4)])[None, :, None, None]
    batches = [{"image": one, "fov": everywhere(one)} for one in (small, large)]
    mean, std = latent_statistics(vae, batches)
    assert mean == pytest.approx([(7 + 1 + 2 + 3) / 4]) and std == pytest.approx([math.sqrt(63 / 4 - 3.25**2)])
    batches[1]["fov"] = batches[1]["fov"].clone()
    batches[1]["fov"][..., 4:] = False  # of the large one, the first cell alone
    mean, std = latent_statistics(vae, batches)
    assert mean == pytest.approx([4.0]) and std == pytest.approx([3.0])


# losses of voxels


def test_means_are_of_the_voxels_inside_volume_by_volume():
    values = torch.zeros(3, 2, 2, 1, 1)
    values[0, :, 0], values[0, :, 1], values[1] = 3.0, 100.0, 6.0
    fov = torch.ones(3, 1, 2, 1, 1, dtype=torch.bool)
    fov[0, :, 1] = False
    assert masked_mean(values, fov).item() == pytest.approx((3 + 6 + 0) / 3)
    fov[1] = False  # of a volume without any, zero
    assert masked_mean(values, fov).item() == pytest.approx(1.0)


def test_padding_does_not_change_the_losses_of_a_volume():
    """Three quarters of the volume are padding."""
    generator = torch.Generator().manual_seed(0)
    ours, real = (torch.randn(1, 2, 4, 8, 8, generator=generator) for _ in range(2))
    padded = [torch.cat([one, torch.full((1, 2, 12, 8, 8), fill)], 2) for one, fill in ((ours, 9.0), (real, -1.0))]
    fov = everywhere(padded[0])
    fov[:, :, 4:] = False
    for loss in (l1_loss, mse_loss, gradient_loss):
        torch.testing.assert_close(loss(*padded, fov), loss(ours, real, everywhere(ours)))
    assert l1_loss(ours, real, everywhere(ours)).item() == pytest.approx((ours - real).abs().mean().item())
    assert mse_loss(ours, real, everywhere(ours)).item() == pytest.approx((ours - real).square().mean().item())


def test_gradient_loss_looks_along_every_axis_alike():
    x = torch.randn(1, 1, 6, 5, 4)
    for axis, slope in ((2, 3.0), (3, -6.0), (4, 9.0)):
        shape = [1] * 5
        shape[axis] = x.shape[axis]
        ramp = slope * torch.arange(float(x.shape[axis])).view(shape)
        assert gradient_loss(x + ramp, x, everywhere(x)).item() == pytest.approx(abs(slope) / 3, abs=1e-5)
        back = torch.zeros_like(x).index_fill_(axis, torch.tensor([0]), 1.0)  # one step down, of n - 1
        assert gradient_loss(x + back, x, everywhere(x)).item() == pytest.approx(1 / 3 / (x.shape[axis] - 1), abs=1e-5)


def waves(frequency: float, axis: int) -> torch.Tensor:
    """A wave of so many cycles a voxel along one axis, of 80 voxels, so that the window's blur of one of 80 stays in
    its band."""
    sides = [30, 30, 30]
    sides[axis - 2] = 80
    along = [80 if one == axis else 1 for one in range(5)]
    return torch.cos(2 * math.pi * frequency * torch.arange(80)).view(along).expand(1, 1, *sides).contiguous()


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_spectrum_loss_bands_are_a_twentieth_of_a_cycle_wide(axis):
    """Where a wave is the whole power of a band along its axis, twice its power costs (log 2)^2 in one of 24 parts,
    which are eight bands of three directions; below 0.1 cycles a voxel it costs nothing."""
    fov = everywhere(waves(0.05, axis))
    for frequency, bands in ((0.05, 0), (0.125, 1), (0.325, 1), (0.475, 1)):
        wave = waves(frequency, axis)
        cost = spectrum_loss(2**0.5 * wave, wave, fov).item()
        assert cost == pytest.approx(bands * math.log(2) ** 2 / 24, rel=0.05, abs=1e-3), frequency
    both = waves(0.125, axis) + waves(0.325, axis)
    cost = spectrum_loss(both + (2**0.5 - 1) * waves(0.325, axis), both, fov).item()
    assert cost == pytest.approx(math.log(2) ** 2 / 24, rel=0.05)  # of one band, whatever is in the others


def test_spectrum_loss_sees_a_soft_axis_beside_a_sharp_one():
    """Power that is too low along one axis and too high along another costs, though their sum is right."""
    wave = torch.cos(2 * math.pi * 0.325 * torch.arange(80))
    along = [wave.view(view).expand(1, 1, 80, 80, 20) for view in ((1, 1, 80, 1, 1), (1, 1, 1, 80, 1))]
    image = along[0] + along[1]
    skewed = 1.5**0.5 * along[0] + 0.5**0.5 * along[1]
    parts = math.log(1.5) ** 2 + math.log(0.5) ** 2
    assert spectrum_loss(skewed, image, everywhere(image)).item() == pytest.approx(parts / 24, rel=0.2)


def test_spectrum_loss_is_equal_for_too_much_and_too_little():
    noise = torch.randn(1, 1, 16, 16, 16)
    losses = [spectrum_loss(noise * factor, noise, everywhere(noise)).item() for factor in (2.0, 0.5)]
    assert losses == pytest.approx([math.log(4) ** 2] * 2, rel=1e-3)


def test_cells_are_inside_that_hold_one_voxel():
    fov = torch.zeros(1, 1, 8, 8, 12, dtype=torch.bool)
    fov[0, 0, 3, 7, 4] = True
    assert cells_inside(fov, (2, 2, 3)).nonzero().tolist() == [[0, 0, 0, 1, 1]]


# the codebook


def planted(codes: list[float], *, decay: float, dead_below: float, count: float = 1.0) -> Codebook:
    """A codebook of one number a code, each chosen by `count` cells so far."""
    book = Codebook(len(codes), 1, decay=decay, dead_below=dead_below)
    book.codes.copy_(torch.tensor(codes)[:, None])
    book.counts.fill_(count)
    book.sums.copy_(book.codes * count)
    book.initialized.fill_(True)
    return book


def test_a_restarted_code_that_nobody_chooses_stays():
    """Its count begins at 1 and its sum at itself, so it is the same code while its count decays, until that is low
    again."""
    book = planted([0.0, 500.0], decay=0.5, dead_below=0.3, count=0.5)
    generator = torch.Generator().manual_seed(0)
    book.update(torch.tensor([[0.0], [0.0], [8.0]]), generator)  # 500 has 0.25 of a cell: it restarts at one of these
    book.codes[1], book.sums[1] = 8.0, 8.0  # say, at this one
    assert book.counts[1] == 1
    for expected in (0.5, 1.0):  # 0.25 of a cell is too few again: back to 1, at a cell of this update
        book.update(torch.zeros(4, 1), generator)
        assert book.counts[1].item() == pytest.approx(expected)
        assert book.codes[1].item() == (8.0 if expected == 0.5 else 0.0)
        assert book.sums[1].item() == pytest.approx(book.codes[1].item() * expected)


def test_a_code_dies_below_the_limit_and_not_at_it():
    book = planted([0.0, 100.0], decay=0.5, dead_below=0.25, count=0.5)
    book.update(torch.zeros(4, 1), torch.Generator().manual_seed(0))
    assert book.counts[1].item() == 0.25 and book.codes[1].item() == 100.0


def test_a_new_codebook_begins_at_cells_with_a_count_of_one():
    book, cells = Codebook(3, 2, decay=0.9), torch.tensor([[1.0, 2.0], [30.0, 40.0], [-50.0, 6.0]])
    book.update(cells, torch.Generator().manual_seed(0))
    order = torch.cdist(cells, book.codes).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(book.codes[order], cells)
    torch.testing.assert_close(book.counts, torch.ones(3))
    torch.testing.assert_close(book.sums, book.codes)
    empty = Codebook(3, 2)
    empty.update(torch.zeros(0, 2), torch.Generator())
    assert not empty.initialized


def test_nothing_but_the_encoder_follows_the_commitment():
    """Its gradient is 2 (z - e) / n, and 0 in padding."""
    vae = VQGAN3D(channels=(4, 4), encoder_blocks=(0, 0), decoder_blocks=(0, 0), num_codes=4, latent_channels=2)
    raw = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    latents = vae._distribution(raw)
    fov = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    fov[..., 4:] = False
    name, loss = latent_loss(latents, fov)
    assert name == "commitment" and loss == commitment_loss(latents, fov)
    loss.backward()
    codes = vae.codebook.codes[latents.indices].movedim(-1, 1)
    expected = 2 * (raw.detach() - codes) / 8  # two channels of four cells
    expected[..., 1:] = 0
    torch.testing.assert_close(raw.grad, expected)


# adversaries


def test_several_discriminators_and_their_layers_weigh_equally():
    logits = [[torch.tensor([2.0, 0.5])], [torch.tensor([0.0])]]
    assert discriminator_loss(logits, logits[::-1]).item() == pytest.approx((0.5 * (0.25 + 1) + 0.5 * (1 + 2.25)) / 2)
    assert generator_loss(logits).item() == pytest.approx(-(1.25 + 0.0) / 2)
    real = [[torch.zeros(2), torch.zeros(4), torch.zeros(1)], [torch.zeros(3), torch.zeros(1)]]
    fake = [[torch.ones(2), -2 * torch.ones(4), torch.full((1,), 99.0)], [6 * torch.ones(3), torch.full((1,), 99.0)]]
    assert feature_matching_loss(real, fake).item() == pytest.approx((1 + 2 + 6) / 3)


def test_an_adaptive_weight_is_a_number_and_bounded():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    pull = adaptive_weight((weight**2).sum(), (weight * torch.tensor([0.6, 0.8])).sum(), weight)
    assert pull.item() == pytest.approx(10.0, rel=1e-4) and not pull.requires_grad
    assert adaptive_weight((weight**2).sum(), 0 * weight.sum(), weight).item() == 1e4
    assert adaptive_weight(0 * weight.sum(), weight.sum(), weight).item() == 0
    assert adaptive_weight((weight**2).sum(), 0 * weight.sum(), weight, most=7.0).item() == 7


def test_slices_are_drawn_apart_for_each_volume():
    fov = torch.zeros(2, 1, 6, 6, 6, dtype=torch.bool)
    fov[0, :, :2, :2, :2], fov[1, :, 4:, 4:, 4:] = True, True
    for seed in range(6):
        drawn = draw_slices(fov, 5, torch.Generator().manual_seed(seed))
        assert drawn.positions.shape == (2, 5)
        assert drawn.positions[0].max() < 2 and drawn.positions[1].min() > 3


# features, bounds, noise


def test_a_feature_is_inside_if_one_voxel_of_its_cell_is():
    """Unit features (1, 0) and (0, 1) are 2 apart: in a cell of which one voxel of eight is inside, and in no other."""

    class Planted(torch.nn.Module):
        dims, in_channels = 3, 1

        def forward(self, volumes):
            kind = volumes[:, :, ::2, ::2, ::2]
            return [torch.cat([kind, 1 - kind], 1)]

    real, ours = torch.zeros(1, 1, 4, 2, 2), torch.ones(1, 1, 4, 2, 2)
    fov = torch.zeros(1, 1, 4, 2, 2, dtype=torch.bool)
    fov[0, 0, 1, 1, 1] = True
    assert perceptual_loss(Planted(), ours, real, fov).item() == pytest.approx(2, rel=1e-5)
    ours[:, :, :2] = 0  # only where nothing is inside
    assert perceptual_loss(Planted(), ours, real, fov).item() == 0


def test_bounds_are_those_of_what_can_be_decoded():
    """Voxels of -1 and 1, and the outermost code, in standardized units, whichever end is farther."""
    for mean, std, bound in ((0.5, 0.25, 6.0), (-0.5, 0.25, 6.0), (0.0, 2.0, 0.5)):
        voxels = SpaceToDepth3D()
        voxels.set_latent_statistics([mean], [std])
        assert voxels.latent_bound() == pytest.approx(bound)
    vae = VQGAN3D(channels=(4, 4), encoder_blocks=(0, 0), decoder_blocks=(0, 0), num_codes=3, latent_channels=2)
    vae.codebook.codes.copy_(torch.tensor([[0.0, 1.0], [-3.0, 2.0], [1.0, 5.0]]))
    vae.set_latent_statistics([1.0, 4.0], [2.0, 0.25])
    assert vae.latent_bound() == pytest.approx(12.0)  # (1 - 4) / 0.25; the others are 2 and 8 at most
    assert AutoencoderKL3D(channels=(4, 4), encoder_blocks=(0, 0), decoder_blocks=(0, 0)).latent_bound() is None


def test_a_curve_is_read_between_the_centers_of_its_bins():
    """Four bins of 0.5 from -1 to 1, centerd at -0.75, -0.25, 0.25 and 0.75; constant beyond them."""
    curve = np.array([1.0, 3.0, 4.0, 10.0], np.float32)
    places = torch.tensor([-2.0, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 3.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 7.0, 10.0, 10.0, 10.0, 10.0])
    torch.testing.assert_close(_at(curve, places), expected)


def test_the_mean_power_is_the_variance_under_the_window():
    """By Parseval's theorem; a constant has none, and the crop is the middle of the volume."""
    volume = np.random.default_rng(0).standard_normal((1, 14, 10, 8)) + 3.0
    sides = (10, 8, 8)
    weights = _window(sides) ** 2
    middle = volume[0, 2:12, 1:9]
    mean = (middle * _window(sides)).sum() / _window(sides).sum()
    expected = (weights * (middle - mean) ** 2).sum() / weights.sum()
    assert _power(volume, sides).mean() == pytest.approx(expected)
    assert _power(np.full((1, 14, 10, 8), 5.0), sides).max() < 1e-20
    moved = volume.copy()
    moved[:, :2], moved[:, 12:], moved[:, :, :1], moved[:, :, 9:] = 99, 99, 99, 99
    np.testing.assert_allclose(_power(moved, sides), _power(volume, sides))

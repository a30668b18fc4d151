"""How versions of a volume are flipped, scaled and turned, where the draws are planted or counted."""

import numpy as np
import pytest
import torch

from diffusion import LatentCacheConfig
from diffusion.images import image_columns
from diffusion.latents.cache import _version, deformed


class Planted:
    """A random generator whose draws are known: angles in degrees, then growth of each side."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def uniform(self, low, high, size):
        return np.asarray(self.draws.pop(0), float)


def moved(image: torch.Tensor, angles, growth, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    monkeypatch.setattr(np.random, "default_rng", lambda _: Planted(angles, growth))
    how = LatentCacheConfig(versions=2, rotate=90, scale=0.5)
    shown, _, fov = deformed(image, None, how, torch.Generator().manual_seed(0), order=1)
    return shown[0], fov


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_lies_half_a_voxel_outside_is_outside(axis, monkeypatch):
    """At 1.25 voxels a step about the center of nine, places run from -1 to 9: the first and the last show nothing."""
    growth = [0.0, 0.0, 0.0]
    growth[axis] = 0.25
    shown, fov = moved(torch.randn(1, 9, 9, 9), [0.0] * 3, growth, monkeypatch)
    lines = fov.movedim(axis, 0).flatten(1)
    assert not lines[[0, 8]].any() and lines[1:8].all()
    assert (shown.movedim(axis, 0)[[0, 8]] == -1).all()


def test_sides_grow_before_they_are_turned(monkeypatch):
    """Twice as far apart along Y of what is made, which a quarter turn about X lays along Z of the volume."""
    image = torch.randn(1, 9, 9, 9)
    shown, fov = moved(image, [90.0, 0.0, 0.0], [0.0, 1.0, 0.0], monkeypatch)
    assert fov[:, 2:7].all() and not fov[:, :2].any() and not fov[:, 7:].any()
    every_second = image[0, :, :, 0::2]  # (X, Y, 5) to (X, 5, Y)
    candidates = [every_second.transpose(1, 2).flip(axis) for axis in (1, 2)]
    assert sum(torch.allclose(shown[:, 2:7], one, atol=1e-4) for one in candidates) == 1


def test_each_axis_is_flipped_half_of_the_time_by_itself():
    """Of 200 versions; the first is the volume as it is."""
    image = torch.arange(8.0).view(1, 2, 2, 2)
    how = LatentCacheConfig(versions=2, flip_axes=(0, 2))
    item, flipped = {"image": image, "affine": torch.eye(4)}, []
    for version in range(201):
        made = _version(item, (2, 2, 2), how, 0, 0, version, 3)["image"][0]
        match = [axes for axes in ((), (0,), (2,), (0, 2)) if torch.equal(made[0], image[0].flip(axes))]
        assert len(match) == 1
        flipped.append(match[0])
    assert flipped[0] == ()
    for axes in ((), (0,), (2,), (0, 2)):
        assert flipped[1:].count(axes) == pytest.approx(50, abs=20)


def test_columns_of_images_are_in_the_order_of_their_names():
    assert image_columns({"pet": 1, "ct": 2}) == ["ct", "ct", "ct", "pet", "pet"]

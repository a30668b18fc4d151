"""The latent cache and the loss with an autoencoder that loses nothing: what is cached are the voxels themselves."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from planted_volumes import plant
from safetensors.torch import load_file

from autoencoder import SpaceToDepth3D
from autoencoder.layers import depth_to_space
from diffusion import Conditions, LatentCacheConfig, build_latent_cache, collate_latents, fold_mask, training_loss
from diffusion.folding import cells_inside
from diffusion.latents.cache import cache_key, deformed
from diffusion.objectives import noisy_and_target, sample_timesteps
from volumes import PADDING, DataConfig, PhantomConfig, VolumeDataset, load_cases

STRIDE = (4, 2, 2)
SHAPE = (13, 10, 12)


@pytest.fixture(scope="module")
def vae() -> SpaceToDepth3D:
    vae = SpaceToDepth3D(patch_size=STRIDE)
    vae.set_latent_statistics([0.25] * 16, [2.0] * 16)
    return vae


@pytest.fixture
def dataset() -> VolumeDataset:
    """Two cases whose image tells everywhere which label its mask has there: label / 2 - 0.75, between -0.75 and
    0.25."""
    config = DataConfig(phantom=PhantomConfig(count=2, shape=SHAPE))
    made = VolumeDataset(load_cases(config), config)
    random = np.random.default_rng(0)

    def change(case):
        case.mask.array[:] = random.integers(0, 3, SHAPE)
        case.image.array[:] = case.mask.array / 2 - 0.75

    for index in range(2):
        plant(made, index, change)
    return made


def voxels(entry: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a cached entry's latents stand for: its padded image (X, Y, Z)."""
    return depth_to_space(entry["mean"][None] * 2 + 0.25, STRIDE)[0, 0]


@pytest.mark.parametrize(
    "how",
    [
        {"flip_axes": (0,)},
        {"flip_axes": (1, 2)},
        {"shift": True},
        {"flip_axes": (0, 1, 2), "shift": True},
    ],
)
def test_image_mask_and_field_of_view_flip_and_shift_together(tmp_path, vae, dataset, how):
    latents = build_latent_cache(dataset, vae, tmp_path, LatentCacheConfig(versions=6, **how), seed=1, progress=False)
    stored, flips, places = {index: dataset[index // 6] for index in range(12)}, set(), set()
    for index in range(len(latents)):
        entry, original = latents[index], stored[index]
        image, mask = voxels(entry), entry["mask"]
        outside = mask == PADDING
        torch.testing.assert_close(image[outside], torch.full_like(image[outside], -1.0))
        torch.testing.assert_close(image[~outside], mask[~outside] / 2 - 0.75)
        corner = tuple(int(places_.min()) for places_ in torch.nonzero(~outside, as_tuple=True))
        inner = image[tuple(slice(low, low + n) for low, n in zip(corner, SHAPE, strict=True))]
        turned = [
            axes
            for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
            if torch.allclose(inner, original["image"][0].flip(axes), atol=1e-5)
        ]
        assert len(turned) == 1 and set(turned[0]) <= set(how.get("flip_axes", ()))
        if index % 6 == 0:
            assert turned == [()] and corner == (
                1,
                0,
                0,
            )  # 3, 0 and 0 voxels are missing: the lower half of them in front
        if index % 6 and how.get("shift"):
            assert all(0 <= low < s for low, s in zip(corner, STRIDE, strict=True))
        flips.add(turned[0])
        places.add(corner)
        seen = torch.nn.functional.max_pool3d((~outside)[None].float(), STRIDE) > 0
        assert torch.equal(entry["inside"], seen)
    axes = {axis for flip in flips for axis in flip}
    assert axes == set(how.get("flip_axes", ()))
    assert (len(places) > 4) is bool(how.get("shift"))


def test_volumes_versions_and_seeds_are_augmented_differently(tmp_path, vae, dataset):
    """Each version of each volume is moved by itself: no two alike, and another seed moves them otherwise."""

    def masks(folder: str, seed: int) -> list[torch.Tensor]:
        how = LatentCacheConfig(versions=3, flip_axes=(0, 1, 2), shift=True, rotate=20)
        latents = build_latent_cache(dataset, vae, tmp_path / folder, how, seed=seed, progress=False)
        return [latents[index]["mask"] for index in range(len(latents))]

    mask = dataset.load(0).mask.array
    plant(dataset, 1, lambda case: np.copyto(case.mask.array, mask))  # equal volumes
    first, other = masks("a", 0), masks("b", 1)
    assert torch.equal(first[0], first[3]) and torch.equal(first[0], other[0])
    moved = [one for index, one in enumerate(first) if index % 3] + [
        one for index, one in enumerate(other) if index % 3
    ]
    alike = [(i, j) for i in range(8) for j in range(i) if torch.equal(moved[i], moved[j])]
    assert not alike


def test_what_turns_outside_is_no_data(tmp_path, vae, dataset):
    """Corners of a rotated volume show what lay outside: padding in image and mask, and cells of nothing else have no
    weight."""
    how = LatentCacheConfig(versions=4, rotate=40)
    latents = build_latent_cache(dataset, vae, tmp_path, how, progress=False)
    empty = 0
    for index in (1, 2, 3):
        entry = latents[index]
        outside = entry["mask"] == PADDING
        image = voxels(entry)
        torch.testing.assert_close(image[outside], torch.full_like(image[outside], -1.0))
        assert (image[~outside] > -0.76).all() and (image[~outside] < 0.26).all()  # splines overshoot; values do not
        assert torch.equal(entry["inside"], torch.nn.functional.max_pool3d((~outside)[None].float(), STRIDE) > 0)
        empty += int((~entry["inside"]).sum())
    assert empty > 0


def test_a_quarter_turn_is_a_quarter_turn(monkeypatch):
    """Of angles and sizes that are known, about the center of the volume: voxels come to lie on voxels."""
    image = torch.randn(1, 9, 9, 9)
    mask = torch.randint(0, 5, (9, 9, 9), dtype=torch.int16)

    class Planted:
        def __init__(self, *draws):
            self.draws = list(draws)

        def uniform(self, low, high, size):
            assert low == -high and size == 3
            return np.asarray(self.draws.pop(0), float)

    def turned(angles, scales=(0.0, 0.0, 0.0), spacing=(1.0, 1.0, 1.0)):
        monkeypatch.setattr(np.random, "default_rng", lambda _: Planted(angles, scales))
        how = LatentCacheConfig(versions=2, rotate=90, scale=0.5)
        return deformed(image, mask, how, torch.Generator().manual_seed(0), spacing, order=1)

    for axis, plane in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = 90.0
        moved, labels, fov = turned(angles)
        expected = [torch.rot90(image[0], k, plane) for k in (1, -1)]
        found = [torch.allclose(moved[0], one, atol=1e-4) for one in expected]
        assert sum(found) == 1 and fov.all()
        assert torch.equal(labels, torch.rot90(mask, 1 if found[0] else -1, plane))
    moved, labels, fov = turned([0.0, 0.0, 0.0], (0.0, 1.0, 0.0))  # twice as far apart along Y
    assert torch.allclose(moved[0, :, 2:7], image[0, :, 0::2], atol=1e-5) and torch.equal(labels[:, 2:7], mask[:, 0::2])
    assert fov[:, 2:7].all() and not fov[:, :2].any() and not fov[:, 7:].any()
    moved, _, fov = turned([0.0, 0.0, 0.0], spacing=(1.0, 2.0, 3.0))  # without a rotation, spacing is nothing
    assert torch.allclose(moved, image, atol=1e-5) and fov.all()


def test_standard_deviations_are_cached_and_batched(tmp_path, vae, dataset):
    """See test_training_by_hand for the latents that a training step draws with them."""
    encode = vae.encode

    def uncertain(volumes, return_dict=True):
        posterior = encode(volumes, return_dict=False)[0]
        posterior.std = posterior.mean.abs() + 0.5
        return (posterior,)

    vae.encode = uncertain
    try:
        latents = build_latent_cache(dataset, vae, tmp_path, progress=False)
    finally:
        del vae.encode
    entry = latents[0]
    torch.testing.assert_close(entry["std"], entry["mean"].abs() + 0.5)
    batch = collate_latents([latents[0], latents[1]], STRIDE, 0)
    assert torch.equal(batch["std"][0], entry["std"]) and torch.equal(batch["std"][1], latents[1]["std"])


def test_a_certain_encoder_has_no_standard_deviation(tmp_path, vae, dataset):
    files = build_latent_cache(dataset, vae, tmp_path, progress=False).files
    assert load_file(files[0])["std"].shape == (1, 1, 1, 1) and not load_file(files[0])["std"].any()


# the key


def test_the_key_is_made_of_the_prepared_volumes(vae, dataset):
    """Of their keys and digests, in their order; names and conditions do not matter. Which settings of the data change
    the keys is tested in tests/volumes/test_prepared_keys.py.
    """

    def key() -> str:
        return cache_key(dataset, vae, LatentCacheConfig())

    keys, (first, second) = [key()], dataset.keys
    dataset.keys = [second, first]
    keys.append(key())
    dataset.keys = [first, "0" * 40]
    keys.append(key())
    dataset.keys = [first, second]
    dataset.facts[1] = dataclasses.replace(dataset.facts[1], digest=dataset.facts[1].digest + 1)
    keys.append(key())
    assert len(set(keys)) == 4
    dataset.cases = [dataclasses.replace(case, name=f"other {case.name}") for case in dataset.cases]
    dataset.config.numbers, dataset.config.root = ["age"], "elsewhere"
    assert key() == keys[-1]


def test_every_setting_of_the_augmentation_changes_the_key(vae, dataset):
    changes = {"versions": 2, "flip_axes": (1,), "shift": True, "rotate": 3.0, "scale": 0.1, "deform": 1.0}
    assert {*changes, "folder"} == {field.name for field in dataclasses.fields(LatentCacheConfig)}
    keys = {cache_key(dataset, vae, LatentCacheConfig(**{name: value})) for name, value in changes.items()}
    keys.add(cache_key(dataset, vae, LatentCacheConfig(), seed=9))
    usual = cache_key(dataset, vae, LatentCacheConfig())
    assert len(keys | {usual}) == len(changes) + 2
    assert cache_key(dataset, vae, LatentCacheConfig(folder="elsewhere")) == usual


def test_the_autoencoders_config_changes_the_key(vae, dataset):
    def key(of: SpaceToDepth3D = vae) -> str:
        return cache_key(dataset, of, LatentCacheConfig())

    keys, other = [key()], SpaceToDepth3D(patch_size=STRIDE)
    keys.append(key(other))
    other.set_latent_statistics([0.25] * 16, [2.5] * 16)
    keys.append(key(other))
    assert len(set(keys)) == len(keys)
    other.register_to_config(
        subjects=[{"a": 1}], data={"spacing": 1}, _name_or_path="somewhere"
    )  # what is known of a training
    assert key(other) == keys[-1]


# batches and the loss


def entry_of(shape: tuple[int, int, int], name: str) -> dict[str, Any]:
    mean = torch.randn(2, *shape)
    inside = torch.ones(1, *shape, dtype=torch.bool)
    mask = torch.randint(0, 3, tuple(n * s for n, s in zip(shape, STRIDE, strict=True)), dtype=torch.int16)
    return {"mean": mean, "std": mean.abs() + 1, "inside": inside, "mask": mask, "name": name}


def test_every_place_of_a_smaller_and_a_larger_entry_occurs():
    """A crop begins at 0 to 2 of cells that are 2 too many, a smaller entry at 0 to 2 of room for it: each of them, on
    all axes."""
    for side, places in ((5, {-2, -1, 0}), (1, {0, 1, 2})):
        found: list[set[int]] = [set(), set(), set()]
        for number in range(60):
            items = [entry_of((3, 3, 3), "a"), entry_of((side,) * 3, f"b{number}")]
            items[1]["mean"] = torch.arange(1.0, side**3 + 1).view(1, side, side, side).repeat(2, 1, 1, 1)
            batch = collate_latents(items, STRIDE, 3)["mean"][1, 0]
            cell = torch.nonzero(batch)[0]
            value = int(batch[tuple(cell)]) - 1
            own = (value // side**2, value // side % side, value % side)
            for axis in range(3):
                found[axis].add(int(cell[axis]) - own[axis])
        assert found == [places] * 3


def test_outside_cells_weigh_nothing_and_deviations_are_batched():
    items = [entry_of((3, 3, 3), "a"), entry_of((3, 3, 3), "b")]
    items[1]["inside"][0, 1] = False
    batch = collate_latents(items, STRIDE, 3)
    assert batch["weight"].dtype == torch.float32
    assert batch["weight"][0].all() and not batch["weight"][1, 0, 1].any() and batch["weight"][1, 0, [0, 2]].all()
    assert torch.equal(batch["std"][1], items[1]["std"]) and not torch.equal(batch["std"][1], batch["mean"][1])


class Watched(torch.nn.Module):
    """Predicts a number everywhere, and keeps what it is given."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value, self.seen = value, []

    def forward(self, sample, timestep, return_dict=True, **conditions):
        self.seen.append((sample, timestep, conditions))
        return (torch.full_like(sample, self.value),)


@pytest.mark.parametrize("objective", ["rectified_flow", "v_prediction", "epsilon"])
def test_padding_is_zero_in_the_unet_and_ignored_by_the_loss(objective):
    """A volume of which three quarters are padding has the loss of the whole: that of its cells, by hand."""
    weight = torch.ones(2, 1, 4, 3, 2)
    weight[1, :, 1:] = 0
    latents, unet = torch.randn(2, 3, 4, 3, 2), Watched(0.5)
    latents[1, :, 1:] = 50.0
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    conditions = Conditions(numbers=torch.tensor([[1.0], [2.0]]))
    loss = training_loss(unet, objective, latents, conditions, weight, generators)
    seen, timestep, given = unet.seen[0]
    assert not seen[1, :, 1:].any() and seen[1, :, 0].all() and seen[0].all()
    assert given == conditions.as_kwargs() and timestep.shape == (2,)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(timestep, sample_timesteps(objective, 2, generators))
    noise = torch.stack([torch.randn(3, 4, 3, 2, generator=one) for one in generators])
    noisy, target = noisy_and_target(objective, latents, noise, timestep)
    torch.testing.assert_close(seen, noisy * weight)
    by_hand = [(0.5 - target[0]).square().mean(), (0.5 - target[1, :, :1]).square().mean()]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())

    def again(**how) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return training_loss(Watched(0.5), objective, latents, Conditions(), weight, generators, **how)

    by_hand = [(0.5 - target[0]).abs().mean(), (0.5 - target[1, :, :1]).abs().mean()]
    torch.testing.assert_close(again(absolute=True), torch.stack(by_hand).mean())
    of_channels = [(0.5 - target[0]).square().mean((1, 2, 3)), (0.5 - target[1, :, :1]).square().mean((1, 2, 3))]
    torch.testing.assert_close(again(each=True), torch.stack(of_channels).mean(0))
    expanded = training_loss(
        Watched(0.5),
        objective,
        latents[:1].expand(2, -1, -1, -1, -1),
        Conditions(),
        weight[:1],
        [torch.Generator().manual_seed(s) for s in (3, 4)],
        each=True,
    )
    assert expanded.shape == (3,)


def test_a_batch_of_padding_alone_costs_nothing():
    loss = training_loss(
        Watched(), "epsilon", torch.zeros(1, 2, 3, 3, 3), Conditions(), torch.zeros(1, 1, 3, 3, 3), torch.Generator()
    )
    assert loss.item() == 0


def test_cells_with_one_voxel_inside_are_inside():
    labels = torch.full((1, 8, 4, 4), PADDING)
    labels[0, 3, 1, 1] = 0  # background, at the last place of its cell
    labels[0, 4:, 2:] = 2
    inside = cells_inside(fold_mask(labels, STRIDE, 3))
    assert inside[0, 0].tolist() == [[[True, False], [False, False]], [[False, False], [True, True]]]

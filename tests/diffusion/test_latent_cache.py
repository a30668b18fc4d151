"""The latent cache: rebuilt when what it depends on changes, never silently stale; batches of different shapes."""

import hashlib
import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from planted_volumes import plant
from safetensors.torch import load_file, save_file

from autoencoder import AutoencoderKL3D, latent_statistics
from diffusion import (
    LatentCacheConfig,
    LatentDataset,
    build_latent_cache,
    collate_latents,
    fold_mask,
)
from diffusion.latents import cache as latent_cache
from diffusion.latents import entry as latent_entry
from diffusion.latents.cache import cache_key, weights_hash
from diffusion.latents.entry import entry_digest, write_entry
from volumes import PADDING, DataConfig, IntensityScaling, PhantomConfig, VolumeDataset, load_cases


@pytest.fixture
def vae() -> AutoencoderKL3D:
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()
    vae.set_latent_statistics([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 2.0, 0.1])
    return vae


@pytest.fixture
def dataset() -> VolumeDataset:
    config = DataConfig(phantom=PhantomConfig(count=4, shape=(17, 14, 15)))
    return VolumeDataset(load_cases(config), config)


def test_entries_are_the_posteriors_of_padded_volumes(tmp_path, vae, dataset):
    latents = build_latent_cache(dataset, vae, tmp_path, progress=False)
    entry, item = latents[1], dataset[1]
    assert len(latents) == len(dataset) and entry["mean"].shape == (4, 5, 4, 4)
    padded = torch.full((1, 1, 20, 16, 16), -1.0)
    padded[0, 0, 1:18, 1:15, :15] = item["image"][
        0
    ]  # two, two and one voxels are missing: the lower half of them in front
    with torch.no_grad():
        posterior = vae.encode(padded).latent_dist
    torch.testing.assert_close(entry["mean"], posterior.mean[0])
    torch.testing.assert_close(entry["std"], posterior.std[0])
    assert torch.equal(entry["mask"][1:18, 1:15, :15], item["mask"])
    assert (entry["mask"][0] == PADDING).all() and (entry["mask"][:, :, 15] == PADDING).all()
    assert entry["inside"].all()


def test_a_complete_cache_is_read_and_a_partial_one_resumed(tmp_path, vae, dataset):
    files = build_latent_cache(dataset, vae, tmp_path, progress=False).files
    times = [f.stat().st_mtime_ns for f in files]
    files[2].unlink()
    build_latent_cache(dataset, vae, tmp_path, progress=False)
    again = [f.stat().st_mtime_ns for f in files]
    assert [a == b for a, b in zip(times, again, strict=True)] == [i != 2 for i in range(len(files))]


def test_a_digest_tells_name_type_shape_and_bytes(tmp_path):
    tensors = {"mean": torch.tensor([[1.0, 2.0]]), "std": torch.tensor([0.5])}
    digest = entry_digest("key/a", tensors)
    by_hand = hashlib.sha256(
        b"key/a\nmean torch.float32 (1, 2)\n"
        + struct.pack("<2f", 1, 2)
        + b"\nstd torch.float32 (1,)\n"
        + struct.pack("<f", 0.5)
    )
    assert digest == by_hand.hexdigest()
    others = [("key/b", tensors), ("key/a", {**tensors, "std": torch.tensor([0.25])})]
    others += [
        ("key/a", {**tensors, "mean": tensors["mean"].T}),
        ("key/a", {"mean": tensors["std"], "std": tensors["mean"]}),
    ]
    assert len({digest, *(entry_digest(*other) for other in others)}) == 5


def zero(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start:] = bytes(len(content) - start)
    file.write_bytes(content)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def add_nan(file: Path) -> None:
    """By hands that know how an entry is written."""
    tensors = load_file(file)
    tensors["mean"][0, 0, 0, 0] = float("nan")
    write_entry(tensors, file, name=f"{file.parent.name}/{file.name}")


DAMAGE = {
    "zeroed": zero,
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "swapped": lambda file: shutil.copyfile(file.with_name("00003_00.safetensors"), file),
    "without digest": lambda file: save_file({k: v.clone() for k, v in load_file(file).items()}, file),
    "nan": add_nan,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_named_and_made_again(tmp_path, vae, dataset, caplog, damage):
    files = build_latent_cache(dataset, vae, tmp_path, progress=False).files
    expected = [file.read_bytes() for file in files]
    DAMAGE[damage](files[1])
    with pytest.raises(ValueError, match=r"00001_00.safetensors: a damaged entry.*phantom_0*1 .*--resume latest"):
        LatentDataset(files, names=[case.name for case in dataset.cases])[1]
    with caplog.at_level("WARNING"):
        again = build_latent_cache(dataset, vae, tmp_path, progress=False)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{files[1]}: a damaged entry of the latent cache" in told and "made again" in told
    assert [file.read_bytes() for file in files] == expected
    assert again[1]["mean"].isfinite().all()


def test_an_entry_is_checked_once_and_again_when_modified(tmp_path, vae, dataset, monkeypatch):
    """Once per process, unless its file changes."""
    files = build_latent_cache(dataset, vae, tmp_path, progress=False).files
    checked, digest = [], latent_entry.entry_digest
    monkeypatch.setattr(latent_entry, "entry_digest", lambda name, _: (checked.append(name), digest(name, _))[1])
    latents = build_latent_cache(dataset, vae, tmp_path, progress=False)
    assert checked == [f"{file.parent.name}/{file.name}" for file in files]
    for _ in range(3):
        assert latents[2]["mean"].isfinite().all()
    loaded = pickle.loads(pickle.dumps(latents))  # as a process that loads data gets it
    assert loaded[2]["mean"].isfinite().all() and len(checked) == len(files)
    shutil.copyfile(files[0], files[2])
    for one in (latents, loaded):
        with pytest.raises(ValueError, match="00002_00.*content differs from the one written"):
            one[2]
    assert len(checked) == len(files) + 2


def test_pipes_and_links_in_the_cache_are_replaced_or_refused(tmp_path, vae, dataset):
    """No pipe blocks the reader, and nothing is written through a link."""
    files = build_latent_cache(dataset, vae, tmp_path / "cache", progress=False).files
    (tmp_path / "precious").write_text("precious")
    files[0].unlink()
    files[0].symlink_to(tmp_path / "precious")
    build_latent_cache(dataset, vae, tmp_path / "cache", progress=False)
    assert (tmp_path / "precious").read_text() == "precious" and not files[0].is_symlink()
    files[1].unlink()
    os.mkfifo(files[1])
    with pytest.raises(ValueError, match="00001_00.safetensors: .*could not be written .*is not a regular file"):
        build_latent_cache(dataset, vae, tmp_path / "cache", progress=False)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / files[0].parent.name).symlink_to(tmp_path / "cache")
    with pytest.raises(ValueError, match="is a link; remove it, or set cache.folder"):
        build_latent_cache(dataset, vae, tmp_path / "linked", progress=False)


def test_latents_that_are_not_finite_are_refused_by_volume(tmp_path, vae, dataset, monkeypatch):
    """Nothing is written for that volume."""
    encode = type(vae).encode

    def overflow(self, image, **options):
        (posterior,) = encode(self, image, **options)
        if torch.equal(image[0, :, 1:18, 1:15, :15], dataset[2]["image"]):
            posterior.mean[0, 0, 0, 0, 0] = float("inf")
        return (posterior,)

    monkeypatch.setattr(type(vae), "encode", overflow)
    with pytest.raises(ValueError, match=rf"^{dataset.cases[2].name}: its latents are not finite"):
        build_latent_cache(dataset, vae, tmp_path, progress=False)
    assert sorted(path.name[:5] for path in tmp_path.rglob("*.safetensors")) == ["00000", "00001"]
    batches = (
        {"name": item["name"], "image": item["image"][None], "fov": torch.ones(1, 1, 17, 14, 15).bool()}
        for item in dataset
    )
    monkeypatch.setattr(
        type(vae), "encode", lambda *a, **k: (SimpleNamespace(raw_mean=torch.full((1, 4, 5, 4, 4), torch.nan)),)
    )
    with pytest.raises(ValueError, match=rf"^{dataset.cases[0].name}: its latents are not finite"):
        latent_statistics(vae, batches)


def test_cache_depends_on_model_preprocessing_and_augmentation(tmp_path, vae, dataset):
    """Another autoencoder, preprocessing or augmentation is another cache."""
    first = build_latent_cache(dataset, vae, tmp_path, progress=False)
    key = cache_key(dataset, vae, LatentCacheConfig())
    with torch.no_grad():
        vae.decoder[0].bias[0] += 1.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    assert key == cache_key(dataset, vae, LatentCacheConfig())  # latents do not depend on the decoder
    assert key != cache_key(dataset, vae, LatentCacheConfig(versions=2))
    scaling = IntensityScaling(kind="percentile", low=0.5, high=90.0)
    other_scale = DataConfig(phantom=PhantomConfig(count=4, shape=(17, 14, 15)), intensity=scaling)
    assert key != cache_key(VolumeDataset(load_cases(other_scale), other_scale), vae, LatentCacheConfig())
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    assert key != cache_key(dataset, vae, LatentCacheConfig())  # the same weights, standardized otherwise
    with torch.no_grad():
        vae.encoder[0].bias[0] += 1.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    second = build_latent_cache(dataset, vae, tmp_path, progress=False)
    assert first.files[0].parent != second.files[0].parent
    assert not torch.allclose(first[0]["mean"], second[0]["mean"])


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_voxels_of_the_same_size_and_time_are_another_cache(tmp_path, vae, monkeypatch, zipped):
    """In the file beside a header, too."""
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    voxels, path = np.zeros((4, 5, 6), np.int16), tmp_path / f"data/a.img{zipped}"
    config = DataConfig(root=str(tmp_path / "data"), images=f"{{name}}.hdr{zipped}", validation_fraction=0)

    def key(value: int) -> str:
        voxels[0, 0, 0] = value
        nib.save(nib.Nifti1Pair(voxels, np.eye(4)), path)
        for part in (tmp_path / "data").iterdir():
            os.utime(part, (1e9, 1e9))
        sizes.append(path.stat().st_size)
        return cache_key(VolumeDataset(load_cases(config), config), vae, LatentCacheConfig())

    sizes: list[int] = []
    first, second, again = key(1), key(2), key(1)
    assert sizes[0] == sizes[1] and first != second and first == again


def resident(kind: str) -> float:
    """MiB of this process's memory, `RssAnon` (its own) or `RssFile` (pages of files, which can be dropped)."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(kind)) / 1024


def test_entries_are_read_by_memory_map(tmp_path):
    """32 entries of 4 MiB are held at once: none is copied into the process, and what is not touched is not loaded."""
    for i in range(32):
        entry = {"mean": torch.full((4, 64, 64, 64), float(i)), "std": torch.zeros(1, 1, 1, 1), "inside": torch.ones(1)}
        write_entry(entry, tmp_path / f"{i}.safetensors", name=f"{tmp_path.name}/{i}.safetensors")
    latents = LatentDataset([tmp_path / f"{i}.safetensors" for i in range(32)])
    assert all(latents[i]["mean"].shape == (4, 64, 64, 64) for i in range(32))  # which compares their digests
    own, of_files = resident("RssAnon"), resident("RssFile")
    entries = [latents[i] for i in range(len(latents))]
    assert [entry["mean"][0, 0, 0, 0].item() for entry in entries] == list(range(32))
    assert resident("RssFile") - of_files < 32  # of 128; the system reads a little ahead
    assert entries[3]["mean"].sum() == 3 * 4 * 64**3
    assert resident("RssFile") - of_files > 4
    assert resident("RssAnon") - own < 4


def test_weights_hash_sees_values_and_names():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad():
        b.bias[1] += 1e-6
    assert weights_hash(a) != weights_hash(b)


def test_a_shard_encodes_its_share_only(tmp_path, vae, dataset):
    files = build_latent_cache(dataset, vae, tmp_path, shard=(1, 2), progress=False).files
    assert [f.exists() for f in files] == [False, True, False, True]


def test_two_runs_that_fill_one_cache_do_not_write_one_file(tmp_path, vae, dataset, monkeypatch):
    """Each entry is written under a name of its own, so another process cannot cut it short before it is renamed."""
    written = []
    monkeypatch.setattr(
        latent_entry,
        "save_file",
        lambda entry, path, **options: (written.append(path), save_file(entry, path, **options)),
    )
    for file in build_latent_cache(dataset, vae, tmp_path, progress=False).files:
        file.unlink()
    files = build_latent_cache(dataset, vae, tmp_path, progress=False).files
    assert len(set(written)) == 2 * len(files) and set(files[0].parent.iterdir()) == set(files)


def test_augmentation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="versions: got 0, expected a whole number, 1 or more"):
        LatentCacheConfig(versions=0)
    with pytest.raises(ValueError, match=r"flip_axes\[0\]: got 3, expected a whole number, from 0 to 2"):
        LatentCacheConfig(flip_axes=(3,))
    for wrong in ({"rotate": -1.0}, {"scale": 1.0}, {"deform": -2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got "):
            LatentCacheConfig(**wrong)


def test_augmented_versions_are_flipped_and_shifted_volumes(tmp_path, vae, dataset):
    """Whatever the flip and the shift, the labels are the same ones, as many of each, and version 0 is the volume
    itself."""
    augmentation = LatentCacheConfig(versions=6, flip_axes=(0,), shift=True)
    latents = build_latent_cache(dataset, vae, tmp_path, augmentation, seed=3, progress=False)
    plain = build_latent_cache(dataset, vae, tmp_path, progress=False)
    assert torch.equal(latents[0]["mask"], plain[0]["mask"]) and torch.equal(latents[0]["mean"], plain[0]["mean"])
    mask, seen = dataset[0]["mask"], set()
    for version in range(6):
        placed = latents[version]["mask"]
        at = tuple(int(c.min()) for c in torch.nonzero(placed != PADDING, as_tuple=True))
        inner = placed[tuple(slice(a, a + n) for a, n in zip(at, mask.shape, strict=True))]
        assert torch.equal(inner, mask) or torch.equal(inner, mask.flip(0))
        assert (placed != PADDING).sum() == mask.numel()
        seen.add((at, torch.equal(inner, mask)))
    assert len(seen) > 3 and {flipped for _, flipped in seen} == {True, False}


def test_deformed_versions_keep_image_and_mask_together(tmp_path, vae, dataset):
    """What the field of view shows of the deformed image is bright where the deformed mask is; the outside is
    padding."""
    mask = torch.zeros(24, 24, 24, dtype=torch.int16)
    mask[6:18, 8:16, 7:17] = 1
    image = 2.0 * mask[None].float() - 1
    how = LatentCacheConfig(versions=2, rotate=15, scale=0.1, deform=1.5)
    moved, labels, fov = latent_cache.deformed(image, mask, how, torch.Generator().manual_seed(0))
    again = latent_cache.deformed(image, mask, how, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again[0]) and torch.equal(labels, again[1])
    assert (labels == 1).sum() > 0.6 * mask.sum() and (labels != mask).float().mean() > 0.02
    assert ((moved[0] > 0) == (labels == 1)).float().mean() > 0.98
    assert (labels[~fov] == PADDING).all() and (moved[0][~fov] == -1).all() and (labels[fov] != PADDING).all()
    assert 0.5 < fov.float().mean() < 1

    shifted = [latent_cache.deformed(image, mask, how, torch.Generator().manual_seed(i))[1] for i in (1, 2)]
    assert not torch.equal(*shifted)
    latents = build_latent_cache(dataset, vae, tmp_path, how, progress=False)
    assert not latents[1]["inside"].all() or not torch.equal(latents[1]["mask"], latents[0]["mask"])
    assert (latents[1]["mask"] == PADDING).any() and latents[1]["mean"].isfinite().all()


def test_volumes_are_rotated_in_mm():
    """Distances from the center stay what they are, in voxels of 1 x 1 x 3 mm."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (33, 33, 11)), indexing="ij"))
    distance = (places * torch.tensor([1.0, 1.0, 3.0]).view(3, 1, 1, 1)).norm(dim=0)
    how = LatentCacheConfig(versions=2, rotate=40)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved, _, fov = latent_cache.deformed(distance[None], None, how, generator, (1.0, 1.0, 3.0))
        assert (moved[0] - distance)[fov & (distance < 12)].abs().mean() < 0.1


def test_label_maps_stay_label_maps_and_spacing_is_per_volume(tmp_path, vae, dataset, monkeypatch):
    asked = []

    def deformed(image, mask, augmentation, generator, spacing, order, seen):
        asked.append((spacing, order))
        moved = original(image, mask, augmentation, generator, spacing, order, seen)
        assert order or set(moved[0].unique().tolist()) <= {-1.0, 1.0}
        return moved

    original = latent_cache.deformed
    monkeypatch.setattr(latent_cache, "deformed", deformed)
    how = LatentCacheConfig(versions=2, rotate=10)

    def change(case):
        case.image.affine[2, 2], case.image.array[:] = 3.0, 2.0 * (case.image.array > 0) - 1

    for index in range(len(dataset)):
        plant(dataset, index, change)
    for labels, order in (({}, 3), ({0: "background", 1: "organ"}, 0)):
        dataset.config.image_labels = labels
        build_latent_cache(dataset, vae, tmp_path / str(order), how, progress=False)
        assert asked[-1] == ([1.0, 1.0, 3.0], order)


def test_the_displacement_is_as_large_as_asked():
    """A ramp that is bent shows its displacement: its standard deviation is that of `deform`, inside."""
    ramp = torch.arange(32.0).view(1, 32, 1, 1).expand(1, 32, 24, 24).contiguous()
    moves = []
    for seed in range(24):
        how = LatentCacheConfig(versions=2, deform=2.0)
        moved, _, _ = latent_cache.deformed(ramp, None, how, torch.Generator().manual_seed(seed))
        moves.append((moved - ramp)[0, 10:22:5, 6:18:5, 6:18:5])
    assert torch.cat(moves).square().mean().sqrt().item() == pytest.approx(2.0, rel=0.15)


def entry(name: str, shape: tuple[int, int, int]) -> dict:
    """A cache entry whose latents tell their cell: 1, 2, 3, ..."""
    cells = torch.arange(1.0, 1 + shape[0] * shape[1] * shape[2]).view(1, *shape)
    mask = torch.ones(*(4 * s for s in shape), dtype=torch.int16)
    return {
        "mean": cells.expand(4, -1, -1, -1),
        "std": cells[:1].expand(4, -1, -1, -1) / 10,
        "inside": torch.ones(1, *shape, dtype=torch.bool),
        "mask": mask,
        "name": name,
    }


def test_a_batch_takes_the_first_shape_and_ignores_padding():
    items = [entry("a", (3, 4, 3)), entry("b", (5, 4, 2))]
    batch = collate_latents(items, (4, 4, 4), 2)
    assert batch["mean"].shape == (2, 4, 3, 4, 3) and batch["conditions"].mask.shape == (2, 3, 4, 3, 64)
    assert torch.equal(batch["mean"][0], items[0]["mean"])
    inside = batch["weight"][1, 0] > 0
    assert inside.sum() == 3 * 4 * 2  # cropped along x, padded along z
    assert not batch["mean"][1][:, ~inside].any() and not batch["conditions"].mask[1][~inside].any()
    values = batch["mean"][1, 0][inside].view(3, 4, 2)
    start = int(values[0, 0, 0] - 1) // 8
    assert torch.equal(values, items[1]["mean"][0, start : start + 3])
    assert torch.equal(batch["std"][1, 0][inside].view(3, 4, 2), values / 10)
    assert torch.equal(
        batch["conditions"].mask[1][inside].view(3, 4, 2, 64), fold_mask(items[1]["mask"][None], (4, 4, 4), 2)[0, :3]
    )


def test_a_batch_is_a_function_of_its_names_and_places_vary():
    placed = [
        collate_latents([entry("a", (3, 3, 3)), entry(f"b{i}", (6, 6, 6))], (4, 4, 4), 2)["mean"][1, 0, 0, 0, 0].item()
        for i in range(8)
    ]
    again = [
        collate_latents([entry("a", (3, 3, 3)), entry(f"b{i}", (6, 6, 6))], (4, 4, 4), 2)["mean"][1, 0, 0, 0, 0].item()
        for i in range(8)
    ]
    assert placed == again and len(set(placed)) > 3


def test_a_mask_is_required_only_where_there_are_labels():
    item = entry("a", (3, 3, 3))
    assert collate_latents([item], (4, 4, 4), 0)["conditions"].as_kwargs() == {}
    del item["mask"]
    with pytest.raises(ValueError, match="a: no mask"):
        collate_latents([item], (4, 4, 4), 2)

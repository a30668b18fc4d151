"""The latent cache at fsspec URLs: that of a folder, shared by machines, refused when damaged."""

import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from accelerate.state import AcceleratorState
from fsspec.implementations.local import LocalFileSystem
from remote_sets import add_series, data, make_set, upload
from safetensors.torch import load_file

import train_ldm
from autoencoder import AutoencoderKL3D
from diffusion import LatentCacheConfig, build_latent_cache
from diffusion.latents import store as latent_store
from diffusion.latents.cache import cache_key
from diffusion.latents.store import LatentStore
from files.cache import OF_URL, cache_root, contents
from volumes import VolumeDataset, load_cases

pytestmark = pytest.mark.usefixtures("copies")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_set(tmp_path / "data")


@pytest.fixture
def vae() -> AutoencoderKL3D:
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()
    vae.set_latent_statistics([0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 2.0, 0.1])
    return vae


@pytest.fixture
def dataset(folder) -> VolumeDataset:
    config = data(folder)
    return VolumeDataset(load_cases(config), config)


def assert_same_latents(one, other) -> None:
    assert len(one) == len(other)
    for mine, theirs in ((one[i], other[i]) for i in range(len(one))):
        assert mine.keys() == theirs.keys() and mine["name"] == theirs["name"]
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if key != "name")


def test_latents_at_a_url_are_those_of_a_folder_and_made_once(vae, dataset, tmp_path, monkeypatch):
    local = build_latent_cache(dataset, vae, tmp_path / "local", progress=False)
    assert_same_latents(build_latent_cache(dataset, vae, "memory://latents", progress=False), local)
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "another"))  # another machine
    monkeypatch.setattr(type(vae), "encode", lambda *a, **k: pytest.fail("encodes again"))
    assert_same_latents(build_latent_cache(dataset, vae, "memory://latents/", progress=False), local)


def test_a_truncated_entry_is_rebuilt_and_a_damaged_one_refused(vae, dataset, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    local = build_latent_cache(dataset, vae, "memory://latents", progress=False)
    first, second, _ = sorted(memory.find("/latents"))
    whole = memory.cat(first), memory.cat(second)
    memory.pipe(first, whole[0][:-5])  # a store that shows what is not whole yet
    memory.pipe(second, whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "another"))
    latents = build_latent_cache(dataset, vae, "memory://latents", progress=False)
    assert memory.cat(first) == whole[0]
    assert torch.equal(latents[0]["mean"], local[0]["mean"])
    with pytest.raises(ValueError, match=f"memory:/{re.escape(second)}: is damaged.*delete it.*--resume latest"):
        latents[1]
    memory.rm(second)
    with pytest.raises(ValueError, match=r"has no entry 00001_00 any more.*--resume latest"):
        build_latent_cache(dataset, vae, "memory://latents", shard=(0, 2), progress=False)[1]
    assert_same_latents(build_latent_cache(dataset, vae, "memory://latents", progress=False), local)
    assert not [path for path in (tmp_path / "another").rglob("*") if path.name.count("-") == 2]


def test_processes_of_one_machine_may_fetch_the_same_entry(vae, dataset, tmp_path, monkeypatch):
    build_latent_cache(dataset, vae, "memory://latents", progress=False)
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "another"))
    latents = build_latent_cache(dataset, vae, "memory://latents", progress=False)
    alone = latent_store.download

    def with_another(*args):
        digest = alone(*args)
        monkeypatch.setattr(latent_store, "download", alone)
        latents.store.fetch(latents.files[0])
        return digest

    monkeypatch.setattr(latent_store, "download", with_another)
    assert latents[0]["name"] == "00000_00"
    assert {path.name for path in latents.files[0].parent.iterdir()} == {"00000_00.safetensors", OF_URL}


def test_copies_of_latents_stay_below_the_limit(vae, dataset, tmp_path, monkeypatch, caplog):
    """Of which one fits at a time; only this user may read them."""
    expected = build_latent_cache(dataset, vae, "memory://latents", progress=False)
    size = max(file.stat().st_size for file in expected.files)
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "another"))
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{int(1.5 * size) + 1024} B")
    latents = build_latent_cache(dataset, vae, "memory://latents", progress=False)
    for _ in range(2):
        for index in range(len(dataset)):
            assert torch.equal(latents[index]["mean"], expected[index]["mean"])
            assert 0 < contents(cache_root())[0] <= 1.5 * size + 1024
    assert not caplog.records and latents.files[-1].stat().st_mode & 0o777 == 0o600
    original = latents.reader.read

    def removed(path, name):  # by another process, after this one saw it
        monkeypatch.setattr(latents.reader, "read", original)
        path.unlink()
        return original(path, name)

    monkeypatch.setattr(latents.reader, "read", removed)
    assert torch.equal(latents[len(dataset) - 1]["mean"], expected[len(dataset) - 1]["mean"])
    assert not caplog.records
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{size // 2} B")
    for index in (0, 1):
        assert torch.equal(latents[index]["mean"], expected[index]["mean"])
    assert caplog.text.count("copies of its latents exceed the limit of the cache") == 1


@pytest.mark.parametrize("images", ["meta/{name}.mhd", "series/{name}"])
def test_the_key_depends_on_voxels_not_on_names_or_machines(vae, folder, tmp_path, monkeypatch, images):
    """Other voxels under the same name are other latents, and the key is the same on every machine."""
    add_series(folder)
    url = upload(folder)
    voxels = sorted((folder / images.format(name="a")).parent.glob("a.raw" if "meta" in images else "a/*"))[0]
    other = voxels.read_bytes()[:-2] + b"\x01\x01"

    def key(root) -> str:
        config = data(root, images=images)
        return cache_key(VolumeDataset(load_cases(config), config), vae, LatentCacheConfig())

    there, here = key(url), key(folder)
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "another"))
    assert key(url) == there
    voxels.write_bytes(other)  # in place: neither the header nor the folder changes
    os.utime(voxels, (1, 1))
    fsspec.filesystem("memory").pipe(f"/bucket/set/{voxels.relative_to(folder)}", other)
    assert key(folder) != here
    assert key(url) != there


def test_a_place_that_cannot_be_written_is_named(vae, dataset, monkeypatch, copies):
    def denied(*a, **k):
        raise PermissionError("not yours")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", denied)
    with pytest.raises(
        ValueError, match=r"memory://latents/.*00000_00-.*could not be written.*not yours.*cache\.folder"
    ):
        build_latent_cache(dataset, vae, "memory://latents", progress=False)
    left = [path for path in copies.rglob("*") if "prepared" not in path.parts]
    assert not [path for path in left if path.suffix == ".safetensors" or "unfinished" in path.name]


class Folder(LocalFileSystem):
    protocol = "folder"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("folder://", "/"))


def fill_first_half(url: str, vae: AutoencoderKL3D, cache: str, done: Any) -> None:
    """In a process of its own, as if on another machine: encode half of the volumes; sends the key."""
    torch.set_num_threads(1)
    os.environ["MEDVOLUME_CACHE"] = cache
    config = data(url)
    latents = build_latent_cache(VolumeDataset(load_cases(config), config), vae, f"{url}/latents", shard=(0, 2))
    done.put(latents.files[0].parent.name)


def test_two_processes_fill_one_cache_and_a_third_reads_it(vae, folder, tmp_path, monkeypatch):
    """Data and latents at one URL; each process has copies of its own, as if on another machine."""
    fsspec.register_implementation("folder", Folder, clobber=True)
    url, config = f"folder:/{folder}", data(f"folder:/{folder}")
    forks = multiprocessing.get_context("fork")
    done = forks.SimpleQueue()
    other = forks.Process(target=fill_first_half, args=(url, vae, str(tmp_path / "elsewhere"), done))
    other.start()
    dataset = VolumeDataset(load_cases(config), config)
    mine = build_latent_cache(dataset, vae, f"{url}/latents", shard=(1, 2), progress=False)
    other.join(200)
    assert other.exitcode == 0 and done.get() == mine.files[0].parent.name  # the key
    objects = sorted((folder / "latents" / mine.files[0].parent.name).iterdir())
    assert [one.name[:8] for one in objects] == ["00000_00", "00001_00", "00002_00"]

    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "third"))
    monkeypatch.setattr(type(vae), "encode", lambda *a, **k: pytest.fail("encodes again"))
    third = build_latent_cache(VolumeDataset(load_cases(config), config), vae, f"{url}/latents", progress=False)
    assert_same_latents(third, mine)
    assert all(torch.equal(load_file(one)["mean"], third[i]["mean"]) for i, one in enumerate(objects))


def test_training_on_remote_volumes_and_latents_equals_local(vae, folder, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    metrics = []
    for root in (str(folder), upload(folder)):
        AcceleratorState._reset_state(reset_partial_state=True)
        output = tmp_path / f"run_{len(metrics)}"
        given = [
            *(f"--output={output}", f"--vae={tmp_path / 'vae'}", f"--data.root={root}"),
            *("--data.images=images/{name}.nii.gz", "--data.masks=masks/{name}.nii.gz"),
            "--data.label_names={0: background, 1: left, 2: right}",
            *("--data.validation_fraction=0.3", f"--cache.folder={root}/latents"),
            "--model={class: diffusion.LatentUNet3D, channels: [8, 16], blocks: [1, 1], head_dim: 8}",
            *(f"--loop.{one}" for one in ("max_steps=2", "batch_size=1", "validate_every=2", "preview_every=9")),
            *("--loop.mixed_precision=no", "--loop.trackers=[]", "--inference_steps=2"),
        ]
        metrics.append(train_ldm.main(given))
        assert not (output / "latents").exists()
    assert metrics[0] == metrics[1]
    assert fsspec.filesystem("memory").glob("/bucket/set/latents/*/00000_00-*.safetensors")


def test_a_remote_entry_of_other_content_is_not_copied(copies, tmp_path):
    """The name of its object says what is in it; another content of the same length is not believed."""
    (tmp_path / "entry").write_bytes(b"latents")
    store = LatentStore("memory://latents")
    store.put(tmp_path / "entry", "0_1.safetensors")
    fsspec.filesystem("memory").pipe_file(f"/latents/{store.known['0_1.safetensors']}", b"Latents")
    with pytest.raises(ValueError, match="its content is not that of its name"):
        store.fetch(tmp_path / "0_1.safetensors")
    assert not (tmp_path / "0_1.safetensors").exists()

"""Prepared volumes on disk: the bits that memory would hold, once per content, whatever happens to their files."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from files.cache import cache_root
from volumes import (
    PADDING,
    CropDataset,
    DataConfig,
    IntensityScaling,
    PhantomConfig,
    VolumeDataset,
    VolumeError,
    load_cases,
    make_phantom,
    pad_or_crop,
    write_dicom,
    write_volume,
)
from volumes.data.case_files import one_grid, read_case
from volumes.foreground import ForegroundCrop
from volumes.prepared import preparation
from volumes.prepared.case import prepare_unscaled
from volumes.prepared.entry import smallest
from volumes.prepared.keys import case_key, settings_key
from volumes.prepared.preparation import prepare_cases

ROOT = Path(__file__).resolve().parents[2]
LABELS = {0: "background", 1: "body", 2: "organ", 3: "lesion"}
SHAPE = (14, 12, 10)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDVOLUME_CACHE_LIMIT", raising=False)


def config_of(folder: Path, **settings) -> DataConfig:
    usual = {"images": "{name}_image.nii", "masks": "{name}_mask.nii", "label_names": LABELS, "validation_fraction": 0}
    return DataConfig(root=str(folder), **{**usual, **settings})


def saved(folder: Path, count: int = 3, shape=SHAPE) -> DataConfig:
    """Phantoms as NIfTI files of integers."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image, mask, _ = make_phantom(number, shape)
        write_volume(replace(image, array=image.array.round().astype(np.int16)), folder / f"c{number}_image.nii")
        write_volume(mask, folder / f"c{number}_mask.nii")
    return config_of(folder)


def dataset_of(config: DataConfig) -> VolumeDataset:
    return VolumeDataset(load_cases(config), config)


def slope(folder: Path) -> DataConfig:
    config = saved(folder)
    for path in folder.glob("*_image.nii"):
        image = nib.load(path)
        image.header.set_slope_inter(0.1, -3)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 0.1 - 3, image.affine, image.header), path)
    return config


def fractions(folder: Path) -> DataConfig:
    config = saved(folder)
    for number, path in enumerate(sorted(folder.glob("*_image.nii"))):
        values = np.random.default_rng(number).normal(0, 1, SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(values, nib.load(path).affine), path)
    return replace(config, intensity=IntensityScaling("window", -1.5, 2))


def resampled(folder: Path) -> DataConfig:
    return replace(saved(folder), spacing=(1.3, 0.8, 1.0))


def aligned(folder: Path) -> DataConfig:
    config = saved(folder)
    for path in folder.glob("*_image.nii"):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3, 3] += (2.5, 0, 1)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], affine), str(path).replace("_image", "_other"))
    images = {"a": "{name}_image.nii", "b": "{name}_other.nii"}
    return replace(config, images=images, resample_to="a", intensity=IntensityScaling())


def maps(folder: Path) -> DataConfig:
    return config_of(saved(folder).root, images="{name}_mask.nii", masks=None, label_names={}, image_labels=LABELS)


def series(folder: Path) -> DataConfig:
    folder.mkdir()
    for number in range(2):
        image, _, _ = make_phantom(number, SHAPE)
        rounded = replace(image, array=image.array.round())
        write_dicom(rounded, folder / f"c{number}_series", modality="CT", software="a test", model="0" * 64)
    return config_of(folder, images="{name}_series", masks=None, label_names={})


def phantoms(folder: Path) -> DataConfig:
    return DataConfig(phantom=PhantomConfig(count=3, shape=SHAPE, seed=4), validation_fraction=0, numbers=["size_x"])


def cropped(folder: Path) -> DataConfig:
    return replace(saved(folder), crop=ForegroundCrop("mask", margin=1), spacing=(1.5, 1.5, 1.5))


KINDS = [saved, slope, fractions, resampled, aligned, maps, series, phantoms, cropped]


def in_memory(case, config):
    """Image, mask and field of view by the formula of a data set that keeps float32 volumes in memory."""
    grid = one_grid(case, read_case(case, config), config)
    seen = np.ones(grid.image.shape, bool) if grid.seen is None else grid.seen
    image = np.full_like(grid.image.array, -1)
    for index, channel in enumerate(config.channels):
        shown = grid.image.array[index][seen]
        scale = config.scaling(channel).fit(shown)
        image[index][seen] = scale.apply(shown)
    return image, None if grid.mask is None else grid.mask.array[0], grid.seen


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_bits_of_memory(kind, tmp_path):
    """When they are prepared, when they are read by a later process, and when only a part is read."""
    config = kind(tmp_path / "data")
    for _ in range(2):
        dataset = dataset_of(config)
        assert not dataset.held
        for index, case in enumerate(dataset.cases):
            image, mask, seen = in_memory(case, config)
            item = dataset[index]
            assert item["image"].dtype == torch.float32 and np.array_equal(item["image"].numpy(), image)
            assert ("mask" in item, "seen" in item) == (mask is not None, seen is not None)
            if mask is not None:
                assert item["mask"].dtype == torch.int16 and np.array_equal(item["mask"].numpy(), mask)
            if seen is not None:
                assert not seen.all() and np.array_equal(item["seen"][0].numpy(), seen)
            box = (slice(1, 7), slice(0, 5), slice(3, 9))
            part = dataset.part(index, box)
            assert np.array_equal(part.image, image[:, *box])
            assert part.mask is None or np.array_equal(part.mask, item["mask"].numpy()[box])


@pytest.mark.parametrize("kind", [saved, aligned, maps])
def test_crops_are_those_of_whole_volumes(kind, tmp_path):
    dataset = dataset_of(kind(tmp_path / "data"))
    shape, smaller = (7, 16, 5), 0
    crops = CropDataset(dataset, shape, seed=5, flip_axes=(0, 2), samples_per_volume=4)
    for index in range(len(crops)):
        item, whole = crops[index], dataset[index // 4]
        random = np.random.default_rng((5, 0, index))
        room = [n - width for n, width in zip(whole["image"].shape[1:], shape, strict=True)]
        smaller += min(room) < 0
        offset = tuple(int(random.integers(min(0, r), max(0, r), endpoint=True)) for r in room)
        flipped = [axis - 3 for axis in (0, 2) if random.random() < 0.5]
        placement = pad_or_crop(tuple(whole["image"].shape[1:]), shape, offset=offset)
        assert torch.equal(item["image"], placement.apply(whole["image"], -1.0).flip(flipped))
        fov = torch.from_numpy(placement.field_of_view)[None]
        fov = placement.apply(whole["seen"], False) if "seen" in whole else fov
        assert torch.equal(item["fov"], fov.flip(flipped))
        if "mask" in whole:
            assert torch.equal(item["mask"], placement.apply(whole["mask"], PADDING).flip(flipped))
        assert (item["name"], item["index"]) == (whole["name"], index // 4)
    assert smaller


def test_whole_cases_come_back(tmp_path):
    """Grids of the files, oddities with the file's name, and what was resampled."""
    config = replace(aligned(tmp_path / "data"), crop=ForegroundCrop(100.0, channel="a"))
    first, again = dataset_of(config), dataset_of(config)
    for index, case in enumerate(first.cases):
        facts, other, whole = first.facts[index], again.facts[index], again.load(index)
        assert facts.source is not None and other.source is not None and whole.image.source is other.source
        np.testing.assert_array_equal(facts.source.affine, other.source.affine)
        assert (facts.source.shape, facts.source.unit) == (other.source.shape, other.source.unit)
        assert facts.details() == other.details() and facts.resampled[0].name == "b" and facts.box is not None
        np.testing.assert_array_equal(facts.affine, other.affine)
        assert whole.mask is not None and whole.mask.source is not None
        counts = [int((whole.mask.array == label).sum()) for label in range(4)]
        assert facts.mask is not None and other.mask is not None and list(other.mask.counts) == counts
        assert all(file == str(case.images["a"]) for file, _ in other.oddities)


def test_scans_of_integers_take_their_bytes(tmp_path):
    dataset = dataset_of(saved(tmp_path / "data"))
    voxels = int(np.prod(SHAPE))
    assert [facts.nbytes for facts in dataset.facts] == [3 * voxels] * 3  # int16, and int8 of labels
    for path in (cache_root() / "prepared").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert (cache_root() / "prepared").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "values, kind",
    [
        ([0, 255], np.uint8),
        ([-1, 127], np.int8),
        ([0, 256], np.uint16),
        ([-1024, 3071], np.int16),
        ([0.5, 1.25], np.float16),
        ([0, 65536], np.float32),
        ([0, 65504.5], np.float32),
        ([0.1, 1], np.float32),
        ([-40001, 40000], np.float32),
        ([0, np.inf], np.float32),
    ],
)
def test_the_smallest_type_that_is_exact(values, kind):
    stored = smallest(np.array(values, np.float32))
    assert stored.dtype == kind and np.array_equal(stored.astype(np.float32), np.array(values, np.float32))


# Keys


def keys_of(config: DataConfig) -> list[str]:
    return [case_key(case, settings_key(config)) for case in load_cases(config)]


def test_keys_follow_contents_and_settings(tmp_path):
    config = saved(tmp_path / "data")
    first = keys_of(config)
    assert len(set(first)) == 3 and keys_of(config) == first
    for change in (
        {"spacing": (2, 2, 2)},
        {"intensity": IntensityScaling("percentile", 1, 99)},
        {"label_map": {3: 2}},
        {"units": "cm"},
        {"crop": ForegroundCrop(300.0)},
        {"masks": None, "label_names": {}},
        {"images": {"t1": "{name}_image.nii"}},
        {"image_labels": LABELS, "images": "{name}_mask.nii", "masks": None, "label_names": {}},
    ):
        assert not set(keys_of(replace(config, **change))) & set(first), change
    for change in ({"group_by": "c."}, {"on_error": "skip"}, {"test_fraction": 0.4}, {"numbers": ["size_x"]}):
        assert keys_of(replace(config, **change)) == first, change
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = replace(config, root=str(tmp_path / "moved"))
    assert keys_of(moved) == first
    for number, name in enumerate(("c0_image.nii", "c1_mask.nii")):
        path = tmp_path / "moved" / name
        data, times = bytearray(path.read_bytes()), path.stat()
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert [new == old for new, old in zip(keys_of(moved), first, strict=True)] == [n > number for n in range(3)]


def test_keys_follow_all_files_of_a_volume(tmp_path):
    """Every slice of a series, and voxels that lie beside their header."""
    config = series(tmp_path / "dicom")
    first = keys_of(config)
    file = sorted((tmp_path / "dicom/c1_series").iterdir())[3]
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    assert [new == old for new, old in zip(keys_of(config), first, strict=True)] == [True, False]
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), tmp_path / "a.mhd")
    detached = config_of(tmp_path, images="{name}.mhd", masks=None, label_names={})
    (first,) = keys_of(detached)
    raw = bytearray((tmp_path / "a.raw").read_bytes())
    raw[0] ^= 1
    (tmp_path / "a.raw").write_bytes(raw)
    assert keys_of(detached) != [first]


def test_keys_follow_voxels_beside_a_header_in_capitals(tmp_path):
    """Two scans with equal headers are two scans."""
    for number in range(2):
        pair = nib.Nifti1Pair(np.full((4, 5, 6), number, np.int16), np.eye(4))
        nib.save(pair, tmp_path / f"c{number}.hdr")
        for suffix in ("hdr", "img"):
            (tmp_path / f"c{number}.{suffix}").rename(tmp_path / f"C{number}.{suffix.upper()}")
    first, second = keys_of(config_of(tmp_path, images="{name}.HDR", masks=None, label_names={}))
    assert first != second


def test_a_change_that_hides_its_time_is_noticed(tmp_path, monkeypatch):
    """Even after the digest was remembered: a copy over the file that keeps its size and time of change."""
    monkeypatch.setattr("volumes.prepared.keys.SETTLED", -1.0)
    config = saved(tmp_path / "data", 1)
    first, path = keys_of(config), tmp_path / "data/c0_image.nii"
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and keys_of(config) != first


def test_digests_of_settled_files_are_remembered(tmp_path, monkeypatch):
    config = saved(tmp_path / "data")
    read: list[str] = []
    digest = preparation.case_key.__globals__["_digest"]
    monkeypatch.setattr("volumes.prepared.keys._digest", lambda path: read.append(path) or digest(path))
    monkeypatch.setattr("volumes.prepared.keys.SETTLED", 0.0)
    first = keys_of(config)
    assert len(read) == 6 and keys_of(config) == first and len(read) == 6
    for path in (cache_root() / "sources").iterdir():
        path.write_text("{}")
    assert keys_of(config) == first and len(read) == 12


def test_conditions_are_not_stored(tmp_path):
    """Another table of the same files prepares nothing, and is read again."""
    saved(tmp_path / "data")
    for value in ("1", "2"):
        rows = "".join(f"c{n},{value if n else ''},{'MF'[n % 2]}\n" for n in range(3))
        (tmp_path / f"data/table{value}.csv").write_text(f"name,age,sex\n{rows}")
    usual = {"numbers": ["age", "size_x"], "classes": {"sex": ["F", "M"]}}
    one, other = (dataset_of(config_of(tmp_path / "data", table=f"table{n}.csv", **usual)) for n in (1, 2))
    assert one.facts[1].numbers == (1.0, 14.0) and other.facts[1].numbers == (2.0, 14.0)
    assert np.isnan(other.facts[0].numbers[0]) and [facts.classes for facts in other.facts] == [(1,), (0,), (1,)]
    assert len(list((cache_root() / "prepared").glob("*.json"))) == 3


# Files that were damaged, removed or cut off


def entries(suffix: str = ".safetensors") -> list[Path]:
    return sorted((cache_root() / "prepared").glob(f"*{suffix}"))


def zeroed(path: Path) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(len(data) - start))


def foreign(path: Path) -> None:
    path.write_bytes(entries()[-1].read_bytes())


DAMAGES = {
    "zeroed": zeroed,
    "foreign": foreign,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("open_already", [True, False])
def test_damaged_voxels_are_prepared_again(damage, open_already, tmp_path, caplog):
    config = saved(tmp_path / "data")
    dataset = dataset_of(config)
    expected = [dataset[index]["image"] for index in range(3)]
    for path in entries()[:2]:
        DAMAGES[damage](path)
    read = dataset if open_already else dataset_of(config)
    for index in range(3):
        assert torch.equal(read[index]["image"], expected[index])
    said = [record.message for record in caplog.records if "prepared again" in record.message]
    named = damage in ("zeroed", "foreign", "noise", "truncated") or (open_already and damage != "removed")
    assert len(said) == (2 if named else 0)
    assert all(str(path) in " ".join(said) for path in entries()[:2]) or not named
    assert len(entries()) == 3 and not list((cache_root() / "prepared").glob(".unfinished-*"))
    again = dataset_of(config)
    assert all(torch.equal(again[index]["image"], expected[index]) for index in range(3))


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"key": 1}', "x" * 99, "[" * 99999])
def test_damaged_facts_are_prepared_again(text, tmp_path, caplog):
    config = saved(tmp_path / "data")
    expected = dataset_of(config).facts
    for path in entries(".json"):
        path.write_text(text)
    found = dataset_of(config).facts
    assert [one.digest for one in found] == [one.digest for one in expected]
    assert sum("damaged" in record.message for record in caplog.records) == 3


def test_a_changed_number_in_the_facts_is_noticed(tmp_path, caplog):
    config = saved(tmp_path / "data")
    expected = [facts.scales for facts in dataset_of(config).facts]
    for path in entries(".json"):
        path.write_text(path.read_text().replace('"high": ', '"high": 1'))
    assert [facts.scales for facts in dataset_of(config).facts] == expected
    assert caplog.text.count("its content has changed") == 3


def test_facts_of_another_version_are_prepared_again(tmp_path):
    config = saved(tmp_path / "data")
    dataset_of(config)
    for path in entries(".json"):
        facts = json.loads(path.read_text())
        kept = {**facts["facts"], "scales": [{"low": "0", "high": 1.0}]}
        digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        path.write_text(json.dumps({**facts, "facts": kept, "sha256": digest}))
    assert all(isinstance(facts.scales[0].low, float) for facts in dataset_of(config).facts)


def test_a_part_is_read_without_the_rest(tmp_path):
    """Damage elsewhere in the file does not matter to a patch, and is found when all is read."""
    dataset = dataset_of(saved(tmp_path / "data"))
    box = (slice(2, 6), slice(2, 6), slice(2, 6))
    expected, whole = dataset.part(0, box).image, dataset[0]["image"]
    path = cache_root() / "prepared" / f"{dataset.keys[0]}.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # voxel (0, 0, 0)
    path.write_bytes(data)
    assert np.array_equal(dataset.part(0, box).image, expected)
    assert torch.equal(dataset[0]["image"], whole)


def test_a_source_that_changed_meanwhile_is_refused(tmp_path):
    dataset = dataset_of(saved(tmp_path / "data"))
    for path in entries():
        path.unlink()
    image, _, _ = make_phantom(77, SHAPE)
    write_volume(image, tmp_path / "data/c1_image.nii")
    assert dataset[0]["name"] == "c0"
    with pytest.raises(VolumeError, match="c1_image.nii: has changed since this process began"):
        dataset[1]
    (tmp_path / "data/c2_mask.nii").unlink()
    with pytest.raises(VolumeError, match="c2_mask.nii"):
        dataset[2]


def test_voxels_that_come_back_otherwise_are_refused(tmp_path, monkeypatch):
    dataset = dataset_of(saved(tmp_path / "data"))
    entries()[0].unlink()
    index = dataset.keys.index(entries(".json")[0].stem)
    other = dataset.cases[(index + 1) % 3]
    monkeypatch.setattr(preparation, "prepare_unscaled", lambda case, config: prepare_unscaled(other, config))
    with pytest.raises(VolumeError, match="gives other voxels than before"):
        dataset[index]
    assert len(entries()) == 2


def test_an_equal_checksum_under_another_key(tmp_path, caplog):
    """A copy of a file under another name is not read, whatever it holds."""
    dataset = dataset_of(saved(tmp_path / "data"))
    path = entries()[0]
    index = dataset.keys.index(path.stem)
    with safe_open(path, framework="np") as file:
        arrays, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(arrays, path, metadata={**header, "key": "0" * 40})
    assert dataset[index]["name"] and "it is another volume" in caplog.text


# Processes


PREPARE = """
import os, signal, sys, time
from volumes import DataConfig, VolumeDataset, load_cases
from volumes.foreground import ForegroundCrop
from volumes.prepared import preparation

config = DataConfig(root=sys.argv[1], images="{name}_image.nii", masks="{name}_mask.nii", validation_fraction=0,
                    label_names={0: "background", 1: "body", 2: "organ", 3: "lesion"}, on_error="skip")
original, prepared = preparation.prepare_unscaled, []

def prepare_unscaled(case, config):
    made = original(case, config)
    prepared.append(case.name)
    if len(prepared) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return made

preparation.prepare_unscaled = prepare_unscaled
print("ready", flush=True)
input()
dataset = VolumeDataset(load_cases(config), config)
print(*sorted(prepared))
print(*(name for name, _ in dataset.skipped))
print(*(case.name for case in dataset.cases))
"""


def started(folder: Path, kill_at: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PREPARE, str(folder), str(kill_at)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)


def together(processes: list[subprocess.Popen]) -> list[list[str]]:
    """Let them begin once all have started, and return the lines that each printed."""
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].splitlines() for process in processes]


def test_a_killed_preparation_continues(tmp_path, monkeypatch):
    config = saved(tmp_path / "data", 12)
    process = started(tmp_path / "data", kill_at=7)
    together([process])
    assert process.returncode == -signal.SIGKILL
    there, again = len(entries(".json")), []
    assert 1 <= there <= 7
    original = preparation.prepare_unscaled
    monkeypatch.setattr(preparation, "prepare_unscaled", lambda case, c: again.append(case.name) or original(case, c))
    dataset = dataset_of(config)
    assert len(again) == 12 - there and len(dataset) == 12
    assert len(entries()) == 12 and not list((cache_root() / "prepared").glob(".unfinished-*"))


def test_two_processes_share_the_work(tmp_path):
    """Each volume is prepared once, by one of them; a refused one is skipped by both."""
    saved(tmp_path / "data", 12)
    (tmp_path / "data/c5_image.nii").write_bytes(b"no volume")
    said = together([started(tmp_path / "data") for _ in range(2)])
    prepared = [lines[0].split() for lines in said]
    assert sorted(prepared[0] + prepared[1]) == sorted(f"c{number}" for number in range(12) if number != 5)
    assert min(map(len, prepared)) >= 2
    assert [lines[1] for lines in said] == ["c5"] * 2 and said[0][2] == said[1][2]


def test_a_helping_process_has_no_semaphore(tmp_path, monkeypatch):
    """It is terminated, and one of tqdm's lock would stay behind, of which Python warns."""
    monkeypatch.setattr(preparation.logging, "disable", lambda level: None)
    monkeypatch.setattr(preparation.tqdm, "_lock", None, raising=False)
    config = saved(tmp_path / "data", 2)
    preparation._help(load_cases(config), config, 2)
    assert isinstance(preparation.tqdm.get_lock(), type(threading.RLock())) and len(entries()) == 2


MEMORY = """
import resource
from volumes import CropDataset, DataConfig, PhantomConfig, VolumeDataset, load_cases

for count in (10, 120):
    config = DataConfig(phantom=PhantomConfig(count=count, shape=(48, 48, 32)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    crops = CropDataset(dataset, (16, 16, 16), seed=0)
    for index in range(len(crops)):
        crops[index], dataset[index]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_volumes():
    """120 of these volumes would take 50 MiB."""
    printed = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, check=True, capture_output=True).stdout
    peaks = [int(line) for line in printed.split()]
    assert peaks[1] < peaks[0] + 16 * 1024, peaks


def test_workers_of_a_loader_read_the_same(tmp_path):
    dataset = dataset_of(saved(tmp_path / "data"))
    crops = CropDataset(dataset, (6, 6, 6), seed=0)
    loader = torch.utils.data.DataLoader(crops, batch_size=1, num_workers=2)
    for index, batch in enumerate(loader):
        assert torch.equal(batch["image"][0], crops[index]["image"])


# The limit, and caches that cannot be written to


def held_bytes() -> int:
    return sum(path.stat().st_size for path in entries())


def test_a_limited_cache_stays_below_its_limit(tmp_path, monkeypatch, caplog):
    """With the same samples; without them it would take three times as much."""
    config = saved(tmp_path / "data", 9, (24, 24, 24))
    crops = CropDataset(dataset_of(config), (8, 8, 8), seed=0)
    expected, whole = [crops[index]["image"] for index in range(9)], held_bytes()
    for path in entries():
        path.unlink()
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{whole // 3} B")
    dataset = dataset_of(config)
    assert "9 volumes take" in caplog.text and "Raise $MEDVOLUME_CACHE_LIMIT" in caplog.text
    for _ in range(2):
        for index in range(9):
            crop = CropDataset(dataset, (8, 8, 8), seed=0)[index]
            assert torch.equal(crop["image"], expected[index])
            assert 0 < held_bytes() <= whole // 3
    assert len(entries(".json")) == 9 and not dataset.held


def test_volumes_that_were_removed_come_back_if_there_is_room(tmp_path):
    config = saved(tmp_path / "data")
    dataset_of(config)
    for path in entries()[:2]:
        path.unlink()
    dataset_of(config)
    assert len(entries()) == 3


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_cache_that_cannot_be_written_to(memory, tmp_path, monkeypatch, caplog):
    """The volumes are kept in memory, or prepared at each read; a message says it once, and what to type."""
    config = saved(tmp_path / "data")
    expected = [dataset_of(config)[index]["image"] for index in range(3)]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setattr("volumes.prepared.preparation.memory_bytes", lambda: memory)
    dataset = dataset_of(config)
    assert len(dataset.held) == (3 if memory else 0)
    assert all(torch.equal(dataset[index]["image"], expected[index]) for index in range(3))
    crop = CropDataset(dataset, (8, 8, 8), seed=0)[0]
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    assert torch.equal(CropDataset(dataset_of(config), (8, 8, 8), seed=0)[0]["image"], crop["image"])
    said = [
        record.message for record in caplog.records if "set MEDVOLUME_CACHE to a folder with room" in record.message
    ]
    assert len(said) == 1


def test_volumes_that_are_not_stored_are_held_up_to_a_bound(tmp_path, monkeypatch):
    """While they are prepared, too, and not only afterwards."""
    config = saved(tmp_path / "data", 6)
    size = dataset_of(config).facts[0].nbytes
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setattr(preparation, "memory_bytes", lambda: 5 * size)
    outcomes = preparation.Preparation(config, preparation.PreparedStore()).run(load_cases(config))
    assert sum(one.held is not None for one in outcomes) == 2


def test_a_full_disk_is_said_and_ends_nothing(tmp_path, monkeypatch, caplog):
    """The system refuses files above 1,000 bytes, as a quota does."""
    config = saved(tmp_path / "data")
    expected = [dataset_of(config)[index]["image"] for index in range(3)]
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "full"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        dataset = dataset_of(config)
        assert all(torch.equal(dataset[index]["image"], expected[index]) for index in range(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(dataset.held) == 3 and not entries()
    assert caplog.text.count("set MEDVOLUME_CACHE to a folder with room") == 1


def test_a_volume_above_the_limit_is_not_stored(tmp_path, monkeypatch, caplog):
    config = saved(tmp_path / "data")
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "1KB")
    dataset = dataset_of(config)
    assert not entries() and len(dataset.held) == 3 and "raise $MEDVOLUME_CACHE_LIMIT" in caplog.text


def test_a_wrong_limit_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "many")
    with pytest.raises(ValueError, match=r"\$MEDVOLUME_CACHE_LIMIT is 'many'; give a size such as 200GB"):
        dataset_of(saved(tmp_path / "data"))


def test_verification_finds_what_changed(tmp_path, caplog):
    config = saved(tmp_path / "data")
    cases = load_cases(config)
    prepare_cases(cases, config)
    zeroed(entries()[1])
    prepare_cases(cases, config)
    assert "damaged" not in caplog.text
    prepare_cases(cases, config, verify=True)
    assert f"{entries()[1]}: damaged" in caplog.text
    caplog.clear()
    prepare_cases(cases, config, verify=True)
    assert "damaged" not in caplog.text

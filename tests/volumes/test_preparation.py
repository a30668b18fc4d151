"""How volumes are prepared together: memory, Ctrl-C, the limit, and generated volumes, which are read and not kept."""

import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from files.cache import cache_root
from files.remote import copy_here
from volumes import DataConfig, Volume, VolumeDataset, VolumeError, load_cases, make_phantom, write_dicom, write_volume
from volumes.prepared import memory, preparation
from volumes.prepared.keys import case_key, settings_key
from volumes.prepared.memory import VOXEL_BYTES, MemoryShare, preparing_bytes
from volumes.prepared.preparation import Preparation
from volumes.prepared.store import PreparedStore

SHAPE = (14, 12, 10)
VOXELS = math.prod(SHAPE)
PACE = 0.2  # seconds that a slow preparation takes


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDVOLUME_CACHE_LIMIT", raising=False)


def saved(folder: Path, count: int = 3, first: int = 0) -> DataConfig:
    """Phantoms as NIfTI files of integers: two bytes a voxel."""
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        image = make_phantom(number, SHAPE)[0]
        write_volume(replace(image, array=300 + image.array.round().astype(np.int16)), folder / f"c{number}.nii")
    return DataConfig(root=str(folder), images="{name}.nii", validation_fraction=0)


# Memory


@pytest.mark.parametrize("processes, most", [(1, 3), (2, 1), (100, 1)])
def test_no_more_volumes_at_a_time_than_the_memory_holds(tmp_path, monkeypatch, processes, most):
    """Of all processes of the machine together: half of the free memory, and one volume always."""
    config = saved(tmp_path / "data", 8)
    monkeypatch.setattr(memory, "memory_bytes", lambda: int(2 * 3.5 * VOXEL_BYTES * VOXELS))
    now, together = [], []
    original = preparation.prepare_unscaled

    def slowly(case, config):
        now.append(case.name)
        together.append(len(now))
        time.sleep(PACE)
        now.remove(case.name)
        return original(case, config)

    monkeypatch.setattr(preparation, "prepare_unscaled", slowly)
    if processes == 2:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        processes = 1
    outcomes = Preparation(config, PreparedStore(), processes=processes).run(load_cases(config))
    assert len(outcomes) == len(together) == 8 and min(most, 2) <= max(together) <= most


def test_a_volume_that_waits_for_memory_is_given_up_at_the_end():
    share, stopped, ended = MemoryShare(1), threading.Event(), []
    share.room = 10

    def wait() -> None:
        try:
            with share.take(8, stopped):
                ended.append("taken")
        except Exception as error:
            ended.append(str(error))

    with share.take(8, stopped):
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        stopped.set()
        thread.join(timeout=10)
        assert ended == ["stopped before its volume was read"]
    stopped.clear()
    wait()
    assert ended[1:] == ["taken"]


def test_headers_tell_how_much_memory_a_volume_takes(tmp_path):
    values = np.zeros((10, 12, 14), np.int16)  # (Z, Y, X) of SimpleITK
    values[2:5] = 100
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.0, 2.0, 3.0))
    for suffix in ("nii.gz", "nrrd", "mha", "mhd"):
        sitk.WriteImage(image, tmp_path / f"a.{suffix}", True)
    volume = Volume(np.moveaxis(values, 0, -1).transpose(1, 0, 2)[None].astype(np.float32), np.diag([1.0, 2, 3, 1]))
    write_dicom(volume, tmp_path / "series", modality="CT", software="a test", model="0" * 64)
    for name in ("a.nii.gz", "a.nrrd", "a.mha", "a.mhd", "series"):
        config = DataConfig(root=str(tmp_path), images=name, validation_fraction=0)
        (case,) = load_cases(config)
        assert preparing_bytes(case, config) == VOXEL_BYTES * VOXELS, name
        finer, coarser = replace(config, spacing=(1.0, 1.0, 1.5)), replace(config, spacing=(9.0, 9.0, 9.0))
        assert preparing_bytes(case, finer) == 4 * VOXEL_BYTES * VOXELS, name
        assert preparing_bytes(case, coarser) == VOXEL_BYTES * VOXELS, name
        masked = replace(case, mask=tmp_path / "a.nrrd")
        assert preparing_bytes(masked, config) == 2 * VOXEL_BYTES * VOXELS
    (tmp_path / "a.nrrd").write_bytes(b"no volume")
    assert preparing_bytes(masked, config) == VOXEL_BYTES * VOXELS


def test_infinite_voxels_in_a_header_end_nothing(tmp_path):
    """Such a file is refused by its name, and the others are prepared."""
    config = replace(saved(tmp_path / "data"), spacing=(1.0, 1.0, 1.0), on_error="skip")
    path = tmp_path / "data/c1.nii"
    content = bytearray(path.read_bytes())
    for place in (80, 280):  # pixdim[1] and srow_x[0]
        content[place : place + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(content)
    cases = load_cases(config)
    assert preparing_bytes(cases[1], config) == VOXEL_BYTES * VOXELS
    refused = [one for one in Preparation(config, PreparedStore()).run(cases) if isinstance(one, VolumeError)]
    assert len(refused) == 1 and "c1.nii" in str(refused[0])


def test_preparing_takes_no_more_memory_than_is_counted(tmp_path):
    """Measured by what NumPy and Python allocate at their peak, for each kind of work."""
    import tracemalloc

    folder, shape = tmp_path / "data", (64, 60, 56)
    folder.mkdir()
    image, mask, _ = make_phantom(0, shape)
    write_volume(replace(image, array=300 + image.array.round().astype(np.int16)), folder / "a_image.nii.gz")
    write_volume(mask, folder / "a_mask.nii.gz")
    labels = {0: "background", 1: "body", 2: "organ", 3: "lesion"}
    plain = DataConfig(root=str(folder), images="{name}_image.nii.gz", validation_fraction=0)
    masked = replace(plain, masks="{name}_mask.nii.gz", label_names=labels)
    for config in (plain, masked, replace(masked, spacing=(0.7, 1.0, 1.0))):
        (case,) = load_cases(config)
        tracemalloc.start()
        Preparation(config, PreparedStore())._prepare(case, case_key(case, settings_key(config)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        counted = preparing_bytes(case, config)
        assert 0.3 * counted < peak < counted, (peak / counted, config)


# Ctrl-C


def test_an_interruption_does_not_wait_for_another_process(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    config = saved(tmp_path / "data")
    case = load_cases(config)[1]
    done = threading.Event()

    def other() -> None:  # as another process, for it opens the lock of its own
        with PreparedStore().claim(case_key(case, settings_key(config)), wait=False, stopped=threading.Event()):
            done.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.2)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            Preparation(config, PreparedStore()).run(load_cases(config))
        assert time.monotonic() - start < 5
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert len(VolumeDataset(load_cases(config), config)) == 3


# The limit


def test_all_data_sets_of_a_process_count(tmp_path, monkeypatch, caplog):
    """The cache holds each of them, but not both."""
    configs = [saved(tmp_path / str(number), 3, first=3 * number) for number in range(2)]
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{int(4.5 * 2 * VOXELS)} B")
    first = VolumeDataset(load_cases(configs[0]), configs[0])
    assert "the cache may hold" not in caplog.text
    second = VolumeDataset(load_cases(configs[1]), configs[1])
    assert caplog.text.count("the 6 volumes take") == 1 and len(first) == len(second) == 3
    del first
    caplog.clear()
    VolumeDataset(load_cases(configs[1]), configs[1])  # the first is gone
    assert "the cache may hold" not in caplog.text


def test_volumes_that_are_all_there_need_no_room(tmp_path, monkeypatch, caplog):
    """A lower limit removes nothing until something is written."""
    config = saved(tmp_path / "data")
    VolumeDataset(load_cases(config), config)
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{2 * VOXELS} B")
    VolumeDataset(load_cases(config), config)
    assert "the cache may hold" not in caplog.text
    next((cache_root() / "prepared").glob("*.safetensors")).unlink()
    VolumeDataset(load_cases(config), config)
    assert "the 3 volumes take" in caplog.text


def test_copies_that_a_job_uses_count(tmp_path, monkeypatch, caplog):
    config = saved(tmp_path / "data")
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pipe("/bucket/set/a.nii", bytes(2 * 2 * VOXELS))
    copy_here("memory://bucket/set", lambda path: True)
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{int(4.5 * 2 * VOXELS)} B")
    dataset = VolumeDataset(load_cases(config), config)
    assert "the 3 volumes take" in caplog.text and "copies of remote files that running jobs use" in caplog.text
    assert len(dataset) == 3


# Generated volumes


@pytest.mark.parametrize("room, least, most", [(4.5, 1, 2), (3.1, 0, 0)])
def test_generated_volumes_leave_real_ones_in_the_cache(tmp_path, monkeypatch, room, least, most):
    """They are kept apart, with the same voxels, and make room for nobody but themselves."""
    real, generated = saved(tmp_path / "real", 3), saved(tmp_path / "generated", 6, first=3)
    expected = VolumeDataset(load_cases(generated), generated)
    images = [expected[index]["image"] for index in range(6)]
    for path in (cache_root() / "prepared").iterdir():
        if path.is_file():
            path.unlink()
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", f"{int(room * (2 * VOXELS + 1024))} B")
    VolumeDataset(load_cases(real), real)
    before = sorted((cache_root() / "prepared").glob("*.*"))
    assert len(before) == 6
    dataset = VolumeDataset([replace(case, split="generated") for case in load_cases(generated)], generated)
    assert all(torch.equal(dataset[index]["image"], images[index]) for index in range(6))
    assert sorted((cache_root() / "prepared").glob("*.*")) == before
    stored = [path.suffix for path in (cache_root() / "generated").glob("*.*")]
    assert least <= stored.count(".safetensors") == stored.count(".json") <= most

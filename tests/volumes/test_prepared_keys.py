"""Keys of prepared volumes: what changes them, what the same files gave before, and the memory of digests."""

import dataclasses
import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from files.cache import cache_root
from volumes import DataConfig, IntensityScaling, PhantomConfig, VolumeDataset, load_cases
from volumes.foreground import ForegroundCrop
from volumes.prepared import keys
from volumes.prepared.case import prepare_unscaled
from volumes.prepared.codec import to_plain
from volumes.prepared.entry import facts_of, pack
from volumes.prepared.keys import FORMAT, case_key, settings_key
from volumes.prepared.store import PreparedStore

LABELS = {0: "background", 1: "body", 2: "organ"}
SHAPE = (12, 10, 8)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDVOLUME_CACHE_LIMIT", raising=False)


RELATED: dict[str, Any] = {
    "time_point": 1,
    "units": "cm",
    "axes": "CXYZ",
    "label_map": {3: 1},
    "label_names": LABELS,
    "image_labels": LABELS,
    "resample_to": "ct",
    "crop": ForegroundCrop(100),
    "spacing": (1.0, 1.0, 2.0),
    "intensity": IntensityScaling("window", -160, 240),
}
UNRELATED: dict[str, Any] = {
    "root": "elsewhere",
    "table": "cases.csv",
    "images": "{name}_t1.nii",
    "masks": "{name}_labels.nii",
    "subject": "name",
    "group_by": "a.*",
    "split": "set",
    "test_fraction": 0.2,
    "validation_fraction": 0.3,
    "split_seed": 4,
    "classes": {"sex": ["F", "M"]},
    "numbers": ["age"],
    "condition_channels": ["ct"],
    "on_error": "skip",
    "phantom": PhantomConfig(count=2),
    "empty_background": True,
}


def test_every_setting_of_the_data_is_on_one_side():
    """A new one must be named here: does it change what is prepared of the same files? Then the key must change."""
    assert {one.name for one in dataclasses.fields(DataConfig)} == {*RELATED, *UNRELATED}
    assert {*UNRELATED} == {*keys.UNRELATED}
    usual = DataConfig(images="{name}.nii")

    def key(**changed: Any) -> str:
        config = DataConfig(images="{name}.nii")
        for name, value in changed.items():  # without the checks of settings that exclude each other
            setattr(config, name, value)
        return settings_key(config)

    assert len({settings_key(usual), *(key(**{name: value}) for name, value in RELATED.items())}) == len(RELATED) + 1
    for name, value in UNRELATED.items():
        if name != "phantom":
            assert key(**{name: value}) == settings_key(usual), name
    drawn = {settings_key(DataConfig(phantom=PhantomConfig(count=n, seed=n))) for n in (1, 2)}
    assert len(drawn) == 1 and drawn != {settings_key(DataConfig(phantom=PhantomConfig(shape=(8, 8, 8))))}
    channels = {settings_key(DataConfig(images={name: "{name}.nii"})) for name in ("ct", "pet")}
    assert len(channels) == 2


# What the same files gave before

GOLDEN: dict[int, dict[str, list[Any]]] = {
    1: {
        "integers": [[12, 10, 8], {"image.0": "uint16", "mask": "uint8"}, 3825348002, 1420286364, "0f07ab6a3b249d05"],
        "eighths": [[12, 10, 8], {"image.0": "float16", "mask": "uint8"}, 4293020268, 4117069073, "45dd6d8d3fc6408e"],
        "thirds": [[12, 10, 8], {"image.0": "float32", "mask": "uint8"}, 3926792941, 1606444405, "b2f087aecc2ca4dd"],
        "cropped": [[9, 10, 8], {"image.0": "uint16", "mask": "uint8"}, 2658334023, 1301494077, "834ca5875e84aeda"],
        "channels": [
            [12, 10, 8],
            {"image.0": "uint16", "image.1": "uint16", "mask": "uint8"},
            3761752812,
            521458685,
            "9ffb7b3d3afa46cc",
        ],
        "labels": [[12, 10, 8], {"image.0": "uint8", "image.1": "uint8"}, 2319815043, 750278861, "266ff787f15cd819"],
        "resampled": [[8, 10, 16], {}, [-0.27, 0.593, -0.383], 713933930],
        "aligned": [[10, 10, 8], {}, [-0.125, 0.626, -0.173], 782599253],
    },
}


def written(folder: Path, *, slope: float = 1.0, shift: float = 0.0) -> DataConfig:
    """A case of integers that are computed without rounding: an image, another one beside it, and a mask."""
    folder.mkdir()
    x, y, z = np.indices(SHAPE)
    values = ((7 * x * x + 13 * y + 29 * z) % 1000).astype(np.int16)
    mask = ((x + y + z) // 4 % 3).astype(np.int16)
    values[:2], values[..., -1], mask[:3] = 0, 0, 0
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    image = nib.Nifti1Image(values * np.float32(slope), affine) if slope != 1 else nib.Nifti1Image(values, affine)
    nib.save(image, folder / "a_image.nii")
    moved = affine.copy()
    moved[0, 3] = shift
    nib.save(nib.Nifti1Image(values[::-1], moved), folder / "a_other.nii")
    nib.save(nib.Nifti1Image(mask, affine), folder / "a_mask.nii")
    window = IntensityScaling("window", 0, 900)
    usual = {"masks": "{name}_mask.nii", "label_names": LABELS, "validation_fraction": 0, "intensity": window}
    return DataConfig(root=str(folder), images="{name}_image.nii", **usual)


KINDS = {
    "integers": lambda folder: written(folder),
    "eighths": lambda folder: written(folder, slope=0.125),
    "thirds": lambda folder: written(folder, slope=1 / 3),
    "cropped": lambda folder: dataclasses.replace(written(folder), crop=ForegroundCrop("mask", margin=0)),
    "channels": lambda folder: dataclasses.replace(
        written(folder), images={"a": "{name}_image.nii", "b": "{name}_other.nii"}
    ),
    "labels": lambda folder: dataclasses.replace(
        written(folder),
        **{"images": "{name}_mask.nii", "masks": None, "label_names": {}, "image_labels": LABELS},
        intensity=IntensityScaling(),
    ),
    "resampled": lambda folder: dataclasses.replace(written(folder), spacing=(1.5, 1.0, 1.0)),
    "aligned": lambda folder: dataclasses.replace(
        written(folder, shift=2.0), images={"a": "{name}_image.nii", "b": "{name}_other.nii"}, resample_to="a"
    ),
}
INTERPOLATED = ("resampled", "aligned")  # whose last bits another version of PyTorch may round otherwise


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_give_what_they_gave(kind, tmp_path):
    """Volumes that an earlier version stored are read as they are. If this fails, the same files are prepared
    otherwise: raise FORMAT in volumes/prepared/keys.py, and record what they give now.
    """
    config = KINDS[kind](tmp_path / "data")
    (case,) = load_cases(config)
    unscaled = prepare_unscaled(case, config)
    facts = facts_of(unscaled, arrays := pack(unscaled), config, len(LABELS))
    kinds = {name: str(array.dtype) for name, array in sorted(arrays.items())}
    found: list[Any] = [list(facts.shape), {} if kind in INTERPOLATED else kinds]
    if kind in INTERPOLATED:
        image = unscaled.scaled().image.array.astype(np.float64)
        found += [[round(float(value), 3) for value in (image.mean(), image.std(), image[0, 3, 4, 5])]]
        found += [zlib.crc32(np.ascontiguousarray(unscaled.mask.array).data)]
    else:
        plain = json.dumps([to_plain(facts.scales), to_plain(facts.inside), to_plain(facts.affine), facts.voxels])
        found += [facts.digest, facts.checksum, hashlib.sha256(plain.encode()).hexdigest()[:16]]
    assert found == GOLDEN[FORMAT][kind]


# The memory of digests


def test_a_server_whose_clock_is_behind(tmp_path, monkeypatch):
    """A file that changed ten seconds ago by the server's clock may have changed just now, and may change again."""
    config = written(tmp_path / "data")
    (case,), now = load_cases(config), time.time_ns
    monkeypatch.setattr(keys.time, "time_ns", lambda: now() + 10 * 10**9)
    case_key(case, settings_key(config))
    assert not list((cache_root() / "sources").glob("*"))
    monkeypatch.setattr(keys.time, "time_ns", lambda: now() + 100 * 10**9)
    case_key(case, settings_key(config))
    assert len(list((cache_root() / "sources").glob("*"))) == 1


def test_digests_that_nobody_asks_for_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SETTLED", -1.0)
    config = written(tmp_path / "data")
    VolumeDataset(load_cases(config), config)
    (used,) = (path for path in (cache_root() / "sources").iterdir() if len(path.name) == 40)
    PreparedStore().clean()
    unused = used.with_name("0" * 40)
    unused.write_text("{}")
    looked = time.time() - 86400 * 2
    old = time.time() - 86400 * 100
    for path in (used, unused):
        os.utime(path, (old, old))
    case_key(load_cases(config)[0], settings_key(config))  # which is a use
    PreparedStore().clean()
    assert unused.exists()  # it was looked at just now
    os.utime(used.with_name(".looked"), (looked, looked))
    PreparedStore().clean()
    assert used.exists() and not unused.exists()
    assert used.stat().st_mode & 0o777 == 0o600

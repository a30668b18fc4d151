"""The limit of the cache: sizes, what is removed first, and what is kept."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from files import cache
from files.cache import cache_limit, cache_root, contents, parse_size, room_for, touch
from files.remote import copy_here

GIB = 1 << 30


@pytest.mark.parametrize(
    "text, size",
    [("200GB", 200 * 10**9), ("1.5 TiB", 3 * 2**39), ("50%", 500), (" 7 kib", 7168), ("0.5MB", 500_000), ("12 B", 12)],
)
def test_sizes(text, size):
    assert parse_size(text, 1000) == size


@pytest.mark.parametrize("text", ["", "200", "-1GB", "many", "101%", "5 GBs", "1e3GB", "nanGB", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"\$MEDVOLUME_CACHE_LIMIT is .*give a size such as 200GB"):
        parse_size(text, 1000)


def test_the_default_is_half_of_what_the_disk_would_have(copies, monkeypatch):
    monkeypatch.delenv("MEDVOLUME_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100 * GIB, 70 * GIB, 30 * GIB))
    assert cache_limit(copies, 10 * GIB) == 20 * GIB
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "25%")
    assert cache_limit(copies, 10 * GIB) == 25 * GIB


def entry(name: str, size: int, used: float) -> Path:
    path = cache_root() / f"prepared/{name * 40}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def limited(copies, monkeypatch):
    monkeypatch.setenv("MEDVOLUME_CACHE_LIMIT", "1000 B")
    return copies


def test_the_least_recently_used_is_removed_first(limited):
    old, oldest, new = entry("a", 300, 2e9), entry("b", 300, 1e9), entry("c", 300, 3e9)
    facts = oldest.with_suffix(".json")
    facts.write_text("{}")
    with room_for(100) as fits:
        assert fits and all(path.exists() for path in (old, oldest, new))
    with room_for(200) as fits:
        assert fits and [path.exists() for path in (old, oldest, new)] == [True, False, True] and facts.exists()
    os.utime(old, (4e9, 2e9))  # read later
    with room_for(700) as fits:
        assert fits and [path.exists() for path in (old, oldest, new)] == [True, False, False]


def test_files_of_others_are_never_removed(limited):
    """People put their runs into the folder of the cache, too."""
    ours = entry("a", 900, 1e9)
    theirs = [limited / name for name in ("recipe/vae/model.safetensors", "prepared/model.safetensors", "files/a.txt")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(900))
        os.utime(path, (1e8, 1e8))
    with room_for(500) as fits:
        assert fits and not ours.exists() and all(path.exists() for path in theirs)


def test_what_never_fits_removes_nothing(limited):
    path = entry("a", 900, 1e9)
    with room_for(1001) as fits:
        assert not fits and path.exists()


def test_a_touch_is_a_use_and_no_change(limited, monkeypatch):
    path = entry("a", 10, 1e9)
    touch(path)
    assert path.stat().st_mtime == 1e9 and path.stat().st_atime > 1.5e9
    os.utime(path, (1e9, 1e9))
    touch(path)  # within a minute of the last one
    assert path.stat().st_atime == 1e9
    monkeypatch.setattr(cache, "TOUCHED_AGAIN", 0.0)
    touch(path)
    assert path.stat().st_atime > 1.5e9
    touch(path.with_name("missing"))


def test_many_writers_stay_below_the_limit(limited):
    """Twenty threads that write 90 bytes each, five times: 9,000 bytes for 1,000."""
    sizes = []

    def write(number: int) -> None:
        for turn in range(5):
            with room_for(90) as fits:
                assert fits
                entry(f"{number}_{turn}", 90, 1e9 + turn)
                sizes.append(contents(cache_root())[0])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 100 and max(sizes) <= 1000


def test_links_of_remote_files_are_removed_with_their_copies(limited):
    """Unless a job uses them, in this process or another; a copy that other links need stays."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/bucket/{number}/a.nii", bytes(200))
    views = [copy_here(f"memory://bucket/{number}", lambda path: True) for number in range(3)]
    assert len(list((limited / "files").iterdir())) == 3 and contents(limited)[0] == 600
    for number, view in enumerate(views):
        os.utime(view.with_name(f".{view.name}.in-use"), (1e9 + number, 1e9 + number))
    with room_for(900) as fits:  # all are used by this process
        assert not fits and all((view / "a.nii").exists() for view in views)
    for view in views[:2]:  # as if their job ended
        cache._pinned.pop(view).close()
    code = f"import pathlib, files.cache as c; c.pin(pathlib.Path({str(views[1])!r})); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=Path(__file__).parents[2])
    assert other.stdout and other.stdout.readline() == b"1\n"
    with room_for(500) as fits:
        assert fits and [view.exists() for view in views] == [False, True, True]
    other.communicate(b"\n")
    os.utime(views[1].with_name(f".{views[1].name}.in-use"), (1e9, 1e9))
    with room_for(700) as fits:
        assert fits and [view.exists() for view in views] == [False, False, True]
    assert len(list((limited / "files").iterdir())) == len(list((limited / "digests").iterdir())) == 1
    assert (copy_here("memory://bucket/0", lambda path: True) / "a.nii").read_bytes() == bytes(200)

"""The limit of the cache: sizes, what is removed first, and what is kept."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from files import cache, remote, room
from files.atomic import atomic_file
from files.cache import OF_URL, cache_limit, cache_root, contents, make_folder, parse_size, pinned_bytes, touch
from files.remote import copy_here
from files.room import room_for

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


def entry(name: str, size: int, used: float, folder: str = "prepared") -> Path:
    path = cache_root() / f"{folder}/{name * 40}.safetensors"
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


def test_nothing_is_removed_if_that_makes_too_little_room(limited):
    """Beside what is promised; and beside copies that a job uses, or whose links do."""
    import fsspec

    path = entry("a", 300, 1e9)
    with room_for(600, anyway=True):
        (limited / "room/total").unlink()
        with room_for(500) as fits:
            assert not fits and path.exists()
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/set/a.nii", bytes(100))
    memory.pipe("/bucket/set/b.nii", bytes(500))
    both, one = (copy_here("memory://bucket/set", lambda path, name=name: path >= name) for name in ("a", "b"))
    cache._pinned.pop(both).close()
    room._refused.clear()
    with room_for(550) as fits:
        assert not fits and path.exists() and both.exists()
    cache._pinned.pop(one).close()
    room._refused.clear()
    with cache.copying(), room_for(550) as fits:
        assert not fits and path.exists() and both.exists() and one.exists()
    room._refused.clear()
    with room_for(1000) as fits:
        assert fits and contents(limited)[0] == 0


def test_what_is_written_without_room_does_not_pile_up(limited):
    """Beside what cannot be removed; and what is within the limit stays."""
    paths = [entry("d", 40, 1e8)]
    with room_for(950, anyway=True):
        for number, letter in enumerate("abc"):
            with room_for(100, anyway=True) as fits:
                assert not fits
                paths.append(entry(letter, 100, 1e9 + number))
                (limited / "room/total").unlink()
            assert [path.exists() for path in paths] == [not number] + [False] * number + [True]


def test_the_low_water_is_of_what_may_be_removed(limited):
    paths = [entry(letter, 10, 1e9) for letter in "abcd"]
    with room_for(950, anyway=True):
        (limited / "room/total").unlink()
        with room_for(20) as fits:
            assert fits and sum(path.exists() for path in paths) == 3


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
                path = entry("a", 90, 1e9 + turn)
                path.rename(path.with_name(f"{5 * number + turn:040x}.safetensors"))
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


def looked_at(monkeypatch) -> list[Path]:
    """Every time when the folders of the cache are looked at."""
    looks: list[Path] = []
    monkeypatch.setattr(room, "contents", lambda root: looks.append(root) or contents(root))
    return looks


def test_a_full_cache_is_looked_at_once_for_many_files(limited, monkeypatch):
    for number in range(10):
        entry(f"{number}", 100, 1e9 + number)
    looks = looked_at(monkeypatch)
    for letter in "abcdef":
        with room_for(10) as fits:
            assert fits
            entry(letter, 10, 2e9)
            assert contents(limited)[0] <= 1000
    assert len(looks) == 1 and contents(limited)[0] == 960


def test_the_total_is_not_believed_for_long(limited, monkeypatch):
    """Other programs remove files, too, and a killed process leaves a part of it."""
    path = entry("a", 900, 1e9)
    with room_for(50) as fits:
        assert fits
    looks = looked_at(monkeypatch)
    path.unlink()
    with room_for(40) as fits:
        assert fits and not looks
    monkeypatch.setattr(room, "LOOKED_AGAIN", 0.0)
    with room_for(10) as fits:
        assert fits and len(looks) == 1
    monkeypatch.setattr(room, "LOOKED_AGAIN", 600.0)
    (limited / "room/total").write_text("[1")
    with room_for(10) as fits:
        assert fits and len(looks) == 2


def test_bytes_that_are_still_written_count(limited):
    """Copies take hours, in which other processes make room and write."""
    entry("a", 300, 1e9)
    answers: list[bool] = []

    def ask(nbytes: int) -> None:
        (limited / "room/total").unlink()  # so that the folders are looked at
        with room_for(nbytes) as fits:
            answers.append(bool(fits))

    with room_for(600, anyway=True):
        for nbytes in (500, 400):
            thread = threading.Thread(target=ask, args=(nbytes,), daemon=True)
            thread.start()
            thread.join(timeout=10)
    ask(450)
    assert answers == [False, True, True] and not list((limited / "room").glob("*-*"))


def test_what_is_written_without_room_counts_too(limited):
    with room_for(2000, anyway=True) as fits:
        assert not fits
        with room_for(10) as more:
            assert not more


def test_promises_of_killed_processes_are_void(limited):
    make_folder(limited / "room")
    (limited / "room/900-killed").touch()
    with room_for(950) as fits:
        assert fits and not (limited / "room/900-killed").exists()


def test_copies_that_have_arrived_count_once(limited, monkeypatch):
    """Another job looks for room while the second file is fetched."""
    import fsspec

    path, answers, original = entry("a", 300, 1e9), [], remote.download
    for name in "xy":
        fsspec.filesystem("memory").pipe(f"/bucket/set/{name}.nii", bytes(300))

    def download(url: str, name: str, *args) -> str:
        if name == "y.nii":
            (limited / "room/total").unlink()
            with room_for(50) as fits:
                answers.append((bool(fits), path.exists(), [one.name.split("-")[0] for one in promises()]))
        return original(url, name, *args)

    def promises() -> list[Path]:
        return [one for one in (limited / "room").glob("*-*") if not one.name.startswith("50-")]

    monkeypatch.setattr(remote, "download", download)
    monkeypatch.setattr(remote, "CONNECTIONS", 1)
    copy_here("memory://bucket/set", lambda path: True)
    assert answers == [(True, True, ["300"])] and not promises()


@pytest.mark.parametrize("locks", [True, False])
def test_a_promise_that_is_a_day_old(limited, monkeypatch, locks):
    """It counts as long as its process holds it, and is void where nobody can tell."""

    def cannot(*args) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if not locks:
        monkeypatch.setattr("fcntl.flock", cannot)
    with room_for(900, anyway=True):
        (promise,) = (limited / "room").glob("900-*")
        os.utime(promise, (1e9, 1e9))
        (limited / "room/total").unlink()
        with room_for(200) as fits:
            assert bool(fits) != locks and promise.exists() == locks


@pytest.mark.parametrize("folder", ["files", "prepared", "generated", "s3/bucket/latents"])
def test_what_killed_processes_left_unfinished_is_removed(limited, folder):
    make_folder(limited / folder)
    (limited / folder / OF_URL).touch()
    left = limited / folder / ".unfinished-left"
    for part in ("lock", "new/0"):
        (left / part).parent.mkdir(exist_ok=True, parents=True)
        (left / part).write_bytes(bytes(500))
    with atomic_file(limited / folder / "living") as living:
        living.touch()
        with room_for(10) as fits:
            assert fits and not left.exists() and living.exists()


def test_what_did_not_fit_is_not_looked_for_again_at_once(limited, monkeypatch):
    entry("a", 900, 1e9)
    looks = looked_at(monkeypatch)
    for _ in range(20):
        with room_for(200, generated=True) as fits:
            assert not fits
    assert len(looks) == 1
    with room_for(200) as fits:  # what may remove more
        assert fits
    monkeypatch.setattr(room, "REFUSED_AGAIN", 0.0)
    with room_for(200, generated=True) as fits:
        assert fits


def test_generated_volumes_are_removed_before_all_others(limited):
    real, older, newer = entry("a", 300, 1e9), entry("b", 300, 2e9, "generated"), entry("c", 300, 3e9, "generated")
    facts = [path.with_suffix(".json") for path in (real, older, newer)]
    for path in facts:
        path.write_text("{}")
    assert contents(limited)[0] == 900
    with room_for(200) as fits:
        assert fits and [path.exists() for path in (real, older, newer, *facts)] == [True, False, True] * 2
    with room_for(800, generated=True) as fits:
        assert not fits and real.exists() and newer.exists()
    with room_for(700, generated=True) as fits:
        assert fits and real.exists()


def test_copies_of_remote_latents_are_removed_and_no_others(limited):
    """Nobody could copy a latent cache again that a user put into the folder."""
    names = [f"0123456789abcdef/0000{number}_00.safetensors" for number in range(2)]
    copies, own = ([limited / folder / name for name in names] for folder in ("s3/bucket/latents", "latents"))
    for number, path in enumerate(copies + own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(400))
        os.utime(path, (1e9 + number, 1e9 + number))
    (copies[0].parent / OF_URL).touch()
    assert contents(limited)[0] == 800
    with room_for(400) as fits:
        assert fits and [path.exists() for path in copies + own] == [False, True, True, True]


def test_pinned_copies_are_counted(copies):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/set/a.nii", bytes(200))
    memory.pipe("/bucket/set/b.nii", bytes(100))
    views = [copy_here("memory://bucket/set", lambda path, name=name: path >= name) for name in ("a", "b")]
    assert len(set(views)) == 2 and pinned_bytes(contents(copies)[1]) == 300  # b.nii is in both
    cache._pinned.pop(views[0]).close()
    assert pinned_bytes(contents(copies)[1]) == 100


def test_copies_in_a_cache_that_is_read_only_count_as_pinned(copies, monkeypatch):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/set/a.nii", bytes(200))
    view = copy_here("memory://bucket/set", lambda path: True)
    cache._pinned.pop(view).close()

    def refused(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache, "_open", refused)
    assert pinned_bytes(contents(copies)[1]) == 200


def rights(folder: Path) -> set[tuple[str, int]]:
    every = [folder, *folder.rglob("*")]
    return {("folder" if path.is_dir() else "file", path.stat().st_mode & 0o7777) for path in every}


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_user_or_a_group_that_shares_it_reads(copies, shared):
    import fsspec

    if shared:
        copies.mkdir()
        copies.chmod(0o2770)
    before = os.umask(0o022)
    try:
        fsspec.filesystem("memory").pipe("/bucket/set/below/a.nii", bytes(200))
        assert (copy_here("memory://bucket/set", lambda path: True) / "below/a.nii").exists()
    finally:
        os.umask(before)
    assert rights(copies) == ({("folder", 0o2770), ("file", 0o660)} if shared else {("folder", 0o700), ("file", 0o600)})


def test_a_folder_that_is_there_keeps_its_rights(copies):
    """One that all may read does not make the files readable; nor does one of umask 002, which a group may write to."""
    for mode in (0o755, 0o775):
        copies.mkdir()
        copies.chmod(mode)
        make_folder(copies / "prepared")
        assert [path.stat().st_mode & 0o7777 for path in (copies, copies / "prepared")] == [mode, 0o700]
        assert cache.file_mode() == 0o600
        shutil.rmtree(copies)

"""The package `files`: atomic files and folders, locks, and paths that others wrote."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from files import atomic
from files.atomic import (
    atomic_file,
    atomic_files,
    atomic_folder,
    atomic_parts,
    remove_folder,
    remove_leftovers,
    write_text,
)
from files.locks import HOLDER, LOCK, OutputInUse, one_at_a_time, only_writer
from files.paths import check_name, open_regular, path_inside

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX links, pipes and signals")


def child(code: str, *args: object) -> subprocess.Popen:
    """A Python process of its own that prints a line when it is ready."""
    program = f"import sys, time; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new/report.json"
    with atomic_file(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists() and unfinished.name == path.name
        assert unfinished.parent.parent.name.startswith(".")  # hidden
    assert path.read_text() == "half" and names(path.parent) == ["report.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_keeps_the_older_file_and_nothing_of_the_new(tmp_path):
    write_text(tmp_path / "a", "older")
    with pytest.raises(OSError, match="full"), atomic_files(tmp_path / "a", tmp_path / "b") as (a, _):
        a.write_text("newer")
        raise OSError("full")
    assert (tmp_path / "a").read_text() == "older" and names(tmp_path) == ["a"]


@posix
def test_links_are_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.csv").symlink_to(precious)
    write_text(out / "manifest.csv", "rows")
    assert precious.read_text() == "precious" and (out / "manifest.csv").read_text() == "rows"
    assert not (out / "manifest.csv").is_symlink()
    (out / "model").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(FileExistsError, match="a link is in the place"), atomic_folder(out / "model"):
        pytest.fail("wrote")
    remove_folder(out / "model")
    assert precious.exists() and names(out) == ["manifest.csv"]


@posix
def test_a_link_is_removed_on_a_full_disk(tmp_path, monkeypatch):
    """Nothing is written for it, unlike for a folder; what it leads to stays."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "precious", target_is_directory=True)

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", full)
    remove_folder(tmp_path / "link")
    assert names(tmp_path) == ["precious"]


@posix
def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    """`--output /dev/null` of an administrator would take it from everybody."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match=f"{name}: is not a regular file"), atomic_file(tmp_path / name):
            pytest.fail("wrote")
    assert names(tmp_path) == ["folder", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
        remove_leftovers(tmp_path)  # of the living nothing is removed
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path) == ["a"]


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    inode = lambda path: os.stat(path).st_ino  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", os.fstat(fd).st_ino)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), done.append(("name", inode(b)))))
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), done.append(("name", inode(b)))))
    write_text(tmp_path / "a", "text")
    file, folder = inode(tmp_path / "a"), inode(tmp_path)
    order = [done.index(step) for step in (("sync", file), ("name", file), ("sync", folder))]
    assert order == sorted(order)
    done.clear()
    with atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "vae").mkdir()
        (unfinished / "vae/weights").write_text("1")
    model = tmp_path / "model"
    for synced in (model, model / "vae", model / "vae/weights"):
        assert done.index(("sync", inode(synced))) < done.index(("name", inode(model)))
    assert done[-1] == ("sync", folder)


def test_a_folder_replaces_an_older_one(tmp_path, monkeypatch):
    for content in "12":
        with atomic_folder(tmp_path / "model") as unfinished:
            (unfinished / "weights").write_text(content)
    assert (tmp_path / "model/weights").read_text() == "2" and names(tmp_path) == ["model"]
    rename = os.rename

    def fail(a, b):
        if Path(b).name == "model" and Path(a).parent.name == atomic.NEW:
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model/weights").read_text() == "2" and names(tmp_path) == ["model"]


def test_parts_go_into_a_folder_that_is_there_and_empty(tmp_path, monkeypatch):
    """It may be somebody's working directory, a disk's own folder, or in a folder that only others may write to."""
    folder = tmp_path / "shared/mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    before, make = folder.stat().st_ino, atomic.tempfile.mkdtemp

    def refuse(prefix, dir):
        if Path(dir) == folder.parent:
            raise PermissionError(errno.EACCES, "denied", str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", refuse)
    with atomic_parts(Path("."), "index") as unfinished:
        (unfinished / "index").write_text("1")
        (unfinished / "unet").mkdir()
        assert names(folder) == [unfinished.parent.parent.name]
    assert folder.stat().st_ino == before and names(Path.cwd()) == ["index", "unet"]


@posix
def test_folders_that_cannot_be_flushed_are_written_to(tmp_path, monkeypatch):
    """On CIFS and some of FUSE fsync of a folder is an error, of a file it is not."""
    fsync, error = os.fsync, errno.EINVAL

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a", "text")
    with atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("1")
    assert names(tmp_path) == ["a", "model"]
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "b", "text")


KILLED = """
import os
from files import atomic
rename = os.rename
def stop(a, b):
    if Path(a).parent.name == atomic.NEW:
        print("ready", flush=True); time.sleep(60)
    rename(a, b)
os.rename = stop
with atomic.atomic_folder(Path(sys.argv[1])) as unfinished:
    (unfinished / "weights").write_text("2")
"""


@posix
def test_leftovers_of_a_kill_are_removed_and_replaced_put_back(tmp_path):
    """What the killed process had replaced is put back."""
    with atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("1")
    process = child(KILLED, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == 1  # it lives
    process.kill()
    process.wait()
    remove_leftovers(tmp_path)
    assert (tmp_path / "model/weights").read_text() == "1" and names(tmp_path) == ["model"]


def hidden_folder(folder: Path, *, older: bool = False, age: float = 0, lock: bool = True) -> Path:
    """What a process that was killed leaves, `age` seconds ago; without a lock, if it was killed before it made one."""
    hidden = folder / f"{atomic.UNFINISHED}1"
    (hidden / atomic.NEW / "model").mkdir(parents=True)
    if older:
        (hidden / atomic.REPLACED / "model").mkdir(parents=True)
        (hidden / atomic.REPLACED / "model/weights").write_text("older")
    if lock:
        (hidden / atomic.LOCK).touch()
    os.utime(hidden, (time.time() - age,) * 2)
    return hidden


def test_killed_after_the_replacement_the_older_one_is_removed(tmp_path):
    hidden_folder(tmp_path, older=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("newer")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (tmp_path / "model/weights").read_text() == "newer"


@posix
def test_what_a_link_in_a_folder_leads_to_is_not_touched(tmp_path):
    """A FIFO would be waited for, and a link to nothing be an error."""
    with atomic_folder(tmp_path / "model") as unfinished:
        (unfinished / "nowhere").symlink_to(tmp_path / "nothing")
        (unfinished / "weights").write_text("1")
    assert names(tmp_path / "model") == ["nowhere", "weights"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(FileExistsError, match="a file is in the place"), atomic_folder(tmp_path / "model"):
        pytest.fail("wrote")
    assert (tmp_path / "model").read_text() == "precious" and names(tmp_path) == ["model"]


def test_leftovers_are_known_by_their_lock_and_not_by_the_clock(tmp_path):
    for name, age in (("old", 3600), ("future", -3600), ("starting", 1)):
        hidden = tmp_path / f"{atomic.UNFINISHED}{name}"
        hidden.mkdir()
        os.utime(hidden, (time.time() - age,) * 2)
    (tmp_path / f"{atomic.UNFINISHED}killed").mkdir()
    (tmp_path / f"{atomic.UNFINISHED}killed/{atomic.LOCK}").touch()  # just now, and nobody holds it
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [f"{atomic.UNFINISHED}starting"]


@posix
def test_planted_leftovers_lead_nowhere(tmp_path):
    """What is put back comes from the hidden folder alone, and no lock is taken through a link."""
    home, out = tmp_path / "home", tmp_path / "out"
    for folder in (home, out / f"{atomic.UNFINISHED}1", out / f"{atomic.UNFINISHED}2", out / f"{atomic.UNFINISHED}3"):
        folder.mkdir(parents=True)
    (home / "precious").write_text("precious")
    (out / f"{atomic.UNFINISHED}1/{atomic.LOCK}").touch()
    (out / f"{atomic.UNFINISHED}1/{atomic.REPLACED}").symlink_to(home)
    (out / f"{atomic.UNFINISHED}2/{atomic.LOCK}").symlink_to(home / "precious")
    (out / f"{atomic.UNFINISHED}3/{atomic.LOCK}").touch()
    (out / f"{atomic.UNFINISHED}3/{atomic.REPLACED}").mkdir()
    (out / f"{atomic.UNFINISHED}3/{atomic.REPLACED}/link").symlink_to(home)
    remove_leftovers(out)
    assert names(out) == [f"{atomic.UNFINISHED}2"] and (home / "precious").read_text() == "precious"


@posix
def test_links_that_look_like_leftovers_are_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/{atomic.UNFINISHED}1").symlink_to(tmp_path / "home", target_is_directory=True)
    os.utime(tmp_path / "home", (time.time() - 100,) * 2)
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path / "home") == ["precious"] and len(names(tmp_path / "out")) == 1


HOLDS = """
from files.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("ready", flush=True); time.sleep(float(sys.argv[2]))
"""


@posix
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    process = child(HOLDS, tmp_path, 60)
    with (
        pytest.raises(OutputInUse, match=rf"--output .*process {process.pid} on .*--wait_minutes"),
        only_writer(tmp_path),
    ):
        pytest.fail("entered")
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with only_writer(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / HOLDER).exists()


@posix
@pytest.mark.parametrize(("folder", "lock"), [(0o2775, 0o664), (0o777, 0o666), (0o755, 0o644), (0o700, 0o600)])
def test_a_lock_can_be_held_by_all_who_may_write_in_its_folder(tmp_path, folder, lock):
    """Its file stays: by the usual umask the next user of a group's folder could not open it."""
    tmp_path.chmod(folder)
    before = os.umask(0o022)
    try:
        with only_writer(tmp_path):
            assert (tmp_path / LOCK).stat().st_mode & 0o777 == lock
    finally:
        os.umask(before)


@posix
def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=f"{LOCK} is a link"), only_writer(tmp_path / "out"):
        pytest.fail("entered")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_system_that_cannot_lock_is_told_and_written_to(tmp_path, monkeypatch, capsys):
    def cannot(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", cannot)
    with only_writer(tmp_path):
        write_text(tmp_path / "a", "text")
        (tmp_path / f"{atomic.UNFINISHED}1").mkdir()
        os.utime(tmp_path / f"{atomic.UNFINISHED}1", (1, 1))
        remove_leftovers(tmp_path)  # whose it is cannot be known
        with one_at_a_time(tmp_path / "lock"):
            pass
    assert "its file system cannot lock" in capsys.readouterr().out
    assert (tmp_path / "a").read_text() == "text" and f"{atomic.UNFINISHED}1" in names(tmp_path)


FORKS = """
from files.locks import only_writer
import os
with only_writer(Path(sys.argv[1])):
    if not os.fork():
        time.sleep(10); os._exit(0)
    print("ready", flush=True); time.sleep(60)
"""


@posix
def test_a_lock_ends_with_its_process_though_that_has_forked(tmp_path):
    """As a training does, for processes that load data and outlive it by seconds."""
    process = child(FORKS, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with only_writer(tmp_path, wait_minutes=0.5):
        assert time.monotonic() - began < 8  # the fork lives for ten


@posix
def test_a_lock_is_waited_for_when_asked_to(tmp_path, capsys):
    process = child(HOLDS, tmp_path, 1.6)
    began = time.monotonic()
    with only_writer(tmp_path, wait_minutes=1):
        assert process.wait(10) == 0 and time.monotonic() - began < 30
    assert "waiting for another process" in capsys.readouterr().out


# Paths that others wrote


@posix
def test_paths_stay_inside(tmp_path):
    home = tmp_path / "home"
    (home / "pictures").mkdir(parents=True)
    (home / "pictures/a.png").touch()
    for secret in (tmp_path / "secret", tmp_path / "home-secret", home / "a\\b", home / "c\nd"):
        secret.touch()
    (home / "out").symlink_to(tmp_path)
    (home / "loop").symlink_to(home / "loop")
    os.mkfifo(home / "pipe")
    assert path_inside(home, "pictures/a.png", "r.json") == (home / "pictures/a.png").resolve()
    assert path_inside(home, "out/home/pictures/a.png", "r.json").name == "a.png"  # comes back inside
    wrong = [
        "../secret",
        "../home-secret",  # whose path begins like that of home
        "out/secret",
        "a\\b",
        "c\nd",
        str(tmp_path / "secret"),
        str(home / "pictures/a.png"),
        "",
        ".",
        "pictures",
        "none",
    ]
    wrong += ["pipe", "loop", "a\0b", "a\nb", "\x1b[31m", "a" * 300, "..\\secret", 3, None]
    for named in wrong:
        with pytest.raises(ValueError, match="^r.json: ") as error:
            path_inside(home, named, "r.json")
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "a\nb",
        "a\0",
        "\x1b[31mred",
        "\u202efdp",
        "a\u2028b",
        "a\udc80",
        " a",
        "a ",
        "a" * 201,
        "ä" * 101,
    ],
)
def test_names_that_no_file_should_have(name):
    with pytest.raises(ValueError, match="^table.csv, line 3: the name ") as error:
        check_name(name, "table.csv, line 3")
    assert str(error.value).isprintable() and len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["a", "Case 1.2", "Müller", "患者", "a" * 200, "-", "a..b"])
def test_names_that_files_may_have(name):
    assert check_name(name, "table.csv") == name


@posix
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            open_regular(path)
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"abc"

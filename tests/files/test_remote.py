"""Volumes and latents at fsspec URLs: bit for bit those of local folders, with the same checks, and copied whole or not
at all.

`memory://` is in this process, `webhdfs://` a server on this machine (fsspec's own client, over HTTP), `folder://`
files of this machine by another name, which processes share.
"""

import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
import torch
from remote_sets import add_series, data, make_set, upload
from tiny import tiny_pipeline

from evaluation.data.label_budget import restrict
from files import remote
from files.remote import list_files, refuse_url
from pipelines.inputs.request_files import find_masks, read_requests
from volumes import VolumeDataset, VolumeError, load_cases

pytestmark = pytest.mark.usefixtures("copies")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_set(tmp_path / "data")


def assert_same(url: str, folder: Path, **changes) -> VolumeDataset:
    """The volumes at the URL are bit for bit those of the folder. Returns them."""
    configs = data(url, **changes), data(folder, **changes)
    there, here = (VolumeDataset(load_cases(config), config) for config in configs)
    assert [case.name for case in there.cases] == [case.name for case in here.cases] and len(there) == 3
    for one, other in ((there[i], here[i]) for i in range(3)):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["affine"], other["affine"])
        assert ("mask" in one) == ("mask" in other) and ("mask" not in one or torch.equal(one["mask"], other["mask"]))
        assert one["metadata"] == other["metadata"] and torch.equal(one["scale"], other["scale"])
    return there


IMAGES = ["images/{name}.nii.gz", "pairs/{name}.hdr", "meta/{name}.mhd", "series/{name}", "im*/**/{name}.nii.?z"]


@pytest.mark.parametrize("images", IMAGES)
def test_every_format_is_read_as_from_a_folder(folder, images):
    if images.startswith("series"):
        add_series(folder)
    without = {"masks": None} if "*" in images else {}  # masks and images belong together when their stars agree
    assert_same(upload(folder), folder, images=images, **without)


def test_only_what_the_patterns_name_is_copied(folder, copies):
    assert_same(upload(folder), folder)
    (place,) = (copies / "memory/bucket/set").glob("@*")
    names = {f"{kind}/{name}.nii.gz" for kind in ("images", "masks") for name in "abc"}
    assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == names
    assert len(list((copies / "files").iterdir())) == 6


def test_file_urls_are_read_where_they_lie(folder, copies):
    assert_same(f"file://{folder}", folder)
    assert {path.name for path in copies.iterdir()} <= {"prepared", "sources", "room", ".room.lock"}


@pytest.mark.parametrize("table", ["cases.csv", "memory://tables/of/cases.csv"])
def test_a_table_and_what_its_rows_name(folder, table):
    url = upload(folder)
    fsspec.filesystem("memory").pipe("/tables/of/cases.csv", (folder / "cases.csv").read_bytes())
    there = load_cases(data(url, table=table))
    here = load_cases(data(folder, table="cases.csv"))
    assert [(case.name, case.metadata) for case in there] == [(case.name, case.metadata) for case in here]
    fsspec.filesystem("memory").rm("/bucket/set/masks/b.nii.gz")
    with pytest.raises(ValueError, match=r"^memory://bucket/set/masks/b\.nii\.gz: no such file"):
        load_cases(data(url, table=table))
    config = data(url, table=table, on_error="skip")
    skipped = VolumeDataset(load_cases(config), config).skipped
    assert skipped == [("b", "memory://bucket/set/masks/b.nii.gz: no such file")]


def test_a_damaged_file_is_refused_by_url_until_repaired(folder):
    url, memory = upload(folder), fsspec.filesystem("memory")
    whole = memory.cat("/bucket/set/images/b.nii.gz")
    memory.pipe("/bucket/set/images/b.nii.gz", whole[:-9])
    config = data(url)
    with pytest.raises(VolumeError, match=r"^memory://bucket/set/images/b\.nii\.gz: "):
        VolumeDataset(load_cases(config), config)
    memory.pipe("/bucket/set/images/b.nii.gz", whole)
    assert_same(url, folder)


def test_nothing_is_fetched_twice_and_a_new_version_alone(folder, monkeypatch):
    fetched, real = [], remote.download
    monkeypatch.setattr(remote, "download", lambda *a: (fetched.append(a[1]), real(*a))[1])
    url = upload(folder)
    first = load_cases(data(url))
    assert len(fetched) == 6
    assert load_cases(data(url)) == first and len(fetched) == 6
    fsspec.filesystem("memory").pipe("/bucket/set/images/b.nii.gz", (folder / "images/a.nii.gz").read_bytes())
    second = load_cases(data(url))
    assert fetched[6:] == ["images/b.nii.gz"]
    old, new = first[1].images["image"], second[1].images["image"]
    assert (
        old.read_bytes() == (folder / "images/b.nii.gz").read_bytes() != new.read_bytes()
    )  # who read the old one still does
    assert old.stat().st_mtime_ns != new.stat().st_mtime_ns  # what keys are made of
    assert first[0].images["image"].samefile(second[0].images["image"])


def test_keys_are_the_same_on_every_machine(folder, monkeypatch, tmp_path):
    """Names, sizes and times, of which the latents' key is made."""
    url, stamps = upload(folder), []
    for machine in ("one", "two"):
        monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / machine))
        paths = [case.images["image"] for case in load_cases(data(url))]
        stamps.append([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    assert stamps[0] == stamps[1] and len(set(stamps[0])) == 3


def test_a_file_that_changes_while_it_is_copied_is_noticed(folder, monkeypatch, copies):
    url, memory, real = upload(folder), fsspec.filesystem("memory"), remote.download

    def while_it_changes(url: str, name: str, size: int, target: Path, time: int | None) -> str:
        found = real(url, name, size, target, time)
        if name == "masks/c.nii.gz":
            memory.pipe(f"/bucket/set/{name}", bytes(size))  # as long as before
        return found

    monkeypatch.setattr(remote, "download", while_it_changes)
    with pytest.raises(ValueError, match=r"memory://bucket/set/masks/c\.nii\.gz: changed while it was copied"):
        load_cases(data(url))
    monkeypatch.setattr(remote, "download", real)
    with pytest.raises(
        VolumeError, match=r"memory://bucket/set/masks/c\.nii\.gz: "
    ):  # what is there now, and not before
        VolumeDataset(load_cases(data(url)), data(url))
    assert not list(copies.rglob(".unfinished-*"))


def test_no_more_is_read_than_was_listed(folder, monkeypatch, copies):
    url = upload(folder)
    listed = list_files(url)
    listed["images/a.nii.gz"] = dataclasses.replace(listed["images/a.nii.gz"], size=100)
    monkeypatch.setattr(remote, "list_files", lambda *a: listed)
    with pytest.raises(ValueError, match=r"memory://bucket/set/images/a\.nii\.gz: sends more than the 100 bytes"):
        load_cases(data(url))
    listed["images/a.nii.gz"] = dataclasses.replace(listed["images/a.nii.gz"], size=None)
    with pytest.raises(ValueError, match=r"images/a\.nii\.gz: its server does not say how long it is"):
        load_cases(data(url))
    assert not list(copies.rglob(".unfinished-*"))


def test_a_cache_of_copies_that_lost_bytes_is_repaired(folder, copies):
    url = upload(folder)
    load_cases(data(url))
    for file in (copies / "files").iterdir():
        os.truncate(file, 10)
    assert_same(url, folder)


@pytest.fixture
def another_process(monkeypatch):
    """What a process remembers of copies is forgotten."""
    return lambda: monkeypatch.setattr(remote, "_whole", {})


@pytest.mark.parametrize("damage", ["zeroed", "swapped", "without digest", "pipe"])
def test_damaged_copies_of_the_right_size_are_fetched_again(folder, copies, caplog, another_process, damage):
    """Zeroed sectors keep size and time, and so does a file that was put in another's place."""
    url = upload(folder)
    (whole,) = [case.images["image"] for case in load_cases(data(url)) if case.name == "b"]
    (file,) = [path for path in (copies / "files").iterdir() if path.samefile(whole)]
    times, content = file.stat().st_mtime_ns, file.read_bytes()
    if damage == "without digest":
        (copies / "digests" / file.name).unlink()
    else:
        other = bytes(len(content)) if damage == "zeroed" else content[::-1]
        file.write_bytes(other)  # the hard link's, too
        os.utime(file, ns=(times, times))
    if damage == "pipe":
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(ValueError, match="cannot be copied to .*is not a regular file"):
            load_cases(data(url))
        file.unlink()
    another_process()
    with caplog.at_level("WARNING"):
        assert_same(url, folder)
    assert damage == "pipe" or "memory://bucket/set/images/b.nii.gz: its copy in" in caplog.text
    assert whole.read_bytes() == content and whole.stat().st_mtime_ns == times
    assert not list(copies.rglob(".unfinished-*"))


def test_a_copy_is_read_once_a_process_to_compare_its_digest(folder, another_process, monkeypatch):
    url, compared, digest = upload(folder), [], remote.hashlib.file_digest
    load_cases(data(url))
    another_process()
    monkeypatch.setattr(remote.hashlib, "file_digest", lambda *a: (compared.append(a), digest(*a))[1])
    load_cases(data(url))
    load_cases(data(url))
    assert len(compared) == 6


def test_a_full_disk_is_named_before_anything_is_fetched(folder, monkeypatch, copies):
    url = upload(folder)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="memory://bucket/set: .* GiB are to be copied .* MEDVOLUME_CACHE"):
        load_cases(data(url))
    assert not list((copies / "files").iterdir())


def test_names_that_lead_out_of_the_folder_are_refused(folder, copies, monkeypatch):
    url = upload(folder)
    real = list_files(url)
    hostile = {"images/../../../../x.nii.gz": real["images/a.nii.gz"]}
    monkeypatch.setattr(remote, "list_files", lambda *a: real | hostile)
    with pytest.raises(ValueError, match="not a path below a folder"):
        load_cases(data(url, images="**/*.nii.gz", masks=None, label_names={}))
    assert not list(copies.parent.rglob("x.nii.gz"))


def test_a_server_that_makes_up_folders_without_end_is_left(folder):
    url = upload(folder)
    fsspec.filesystem("memory").pipe("/bucket/set/images" + "/x" * 70 + "/a.nii.gz", b"1")
    with pytest.raises(ValueError, match=r"memory://bucket/set: cannot be listed: .* 64 folders deep"):
        load_cases(data(url, images="**/{name}.nii.gz"))
    assert len(load_cases(data(url, images="masks/{name}.nii.gz"))) == 3  # nothing else is looked at


def test_a_folder_that_cannot_be_listed_is_not_passed_over(folder, monkeypatch):
    def ls(self, path, **kwargs):
        if path.endswith("/images"):
            raise PermissionError("not yours")
        return real(self, path, **kwargs)

    url, memory = upload(folder), type(fsspec.filesystem("memory"))
    real = memory.ls
    monkeypatch.setattr(memory, "ls", ls)
    with pytest.raises(ValueError, match="memory://bucket/set: cannot be listed: PermissionError: not yours"):
        load_cases(data(url, images="**/{name}.nii.gz", masks=None, label_names={}))


def test_processes_of_a_machine_fetch_once(folder, monkeypatch):
    fetched, real = [], remote.download
    monkeypatch.setattr(remote, "download", lambda *a: (fetched.append(a[1]), time.sleep(0.01), real(*a))[2])
    config = data(upload(folder))
    with ThreadPoolExecutor(3) as others:
        found = list(others.map(load_cases, [config] * 3))
    assert found[0] == found[1] == found[2] and len(fetched) == len(set(fetched)) == 6


def test_labeled_volumes_are_drawn_from_a_url(folder, tmp_path):
    """`evaluation.data.label_budget` names volumes in a table of this machine; the files stay where they are."""
    config = data(upload(folder), test_fraction=0.3)
    found = restrict(config, 1, 0, tmp_path / "drawn.csv")
    assert found.root == config.root
    assert {case.split for case in load_cases(found)} == {"train", "test"} and len(load_cases(found)) == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/set", "pip install gcsfs"),
        ("nowhere://bucket/set", "nowhere"),
        ("s3://", "names no folder"),
        ("memory://bucket/empty", "no file matches .* in memory://bucket/empty$"),
        ("memory://bucket/../set", "not a path below a folder"),
        ("simplecache::s3://bucket/set", "fsspec's own configuration"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_with_a_remedy(url, says):
    with pytest.raises(ValueError, match=says):
        load_cases(data(url))


@pytest.mark.parametrize("url", ["ftp://me:secret@host/set", "https://host/set?token=secret"])
def test_secrets_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="fsspec's own configuration") as raised:
        load_cases(data(url))
    assert "secret" not in str(raised.value)


def test_masks_and_tables_to_generate_from(folder, tmp_path):
    url, memory = upload(folder), fsspec.filesystem("memory")
    for pattern in ("masks", "masks/*.nii.gz", "masks/a.nii.gz"):
        here, there = find_masks([str(folder / pattern)], tmp_path), find_masks([f"{url}/{pattern}"], tmp_path)
        assert [path.name for path in there] == [path.name for path in here]
        assert [path.read_bytes() for path in there] == [path.read_bytes() for path in here]
    memory.pipe("/bucket/set/asked.csv", b"name,mask\nx,masks/b.nii.gz\ny,masks/c.nii.gz\n")
    requests = read_requests(f"{url}/asked.csv", tiny_pipeline(), tmp_path)
    masks = [request.mask for request in requests if request.mask]
    assert [path.read_bytes() for path in masks] == [(folder / f"masks/{n}.nii.gz").read_bytes() for n in "bc"]
    with pytest.raises(ValueError, match=r"no masks found in memory://bucket/set/none"):
        find_masks([f"{url}/none"], tmp_path)


def test_outputs_are_local(tmp_path):
    for path in ("s3://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(ValueError, match="s3:/.*is a URL"):
            refuse_url(path, "--output")
    refuse_url(tmp_path, "--output")


# a server


class Server(BaseHTTPRequestHandler):
    """What fsspec's client of WebHDFS asks for to list and read: https://hadoop.apache.org/docs/r1.0.4/webhdfs.html"""

    folder: Path
    spoil: Callable[[str, bytes], bytes] | None

    def do_GET(self) -> None:
        asked, query = urlsplit(self.path), {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        path = self.folder / unquote(asked.path).removeprefix("/webhdfs/v1/data").strip("/")
        if not path.exists():
            return self.answer(404, {"RemoteException": {"exception": "FileNotFoundException", "message": "none"}})
        if query["op"] == "OPEN":
            start, length = int(query["offset"]), int(query["length"])
            content = path.read_bytes()[start : start + length]
            return self.answer(200, self.spoil(path.name, content) if self.spoil else content)
        if query["op"] == "GETFILESTATUS":
            return self.answer(200, {"FileStatus": self.status(path)})
        return self.answer(200, {"FileStatuses": {"FileStatus": [self.status(one) for one in path.iterdir()]}})

    def status(self, path: Path) -> dict[str, object]:
        found, kind = path.stat(), "DIRECTORY" if path.is_dir() else "FILE"
        return {
            "pathSuffix": path.name,
            "type": kind,
            "length": found.st_size,
            "modificationTime": found.st_mtime_ns // 10**6,
        }

    def answer(self, code: int, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not among a test's output."""


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not among a test's output."""


@pytest.fixture
def server(folder) -> Iterator[Any]:
    handler: Any = type("Handler", (Server,), {"folder": folder, "spoil": None})
    with Quiet(("127.0.0.1", 0), handler) as running:
        handler.url = f"webhdfs://127.0.0.1:{running.server_port}/data"
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield handler
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("images", ["images/{name}.nii.gz", "series/{name}"])
def test_volumes_of_a_server_are_those_of_its_folder(server, folder, images):
    add_series(folder)
    assert_same(server.url, folder, images=images)


@pytest.mark.parametrize("spoilt", ["short", "gone"])
def test_an_unexpected_response_is_refused_by_the_files_url(server, folder, spoilt, copies):
    def gone(content: bytes) -> bytes:
        raise ConnectionResetError("the server dies")

    change = {"short": lambda content: content[:-3], "gone": gone}[spoilt]
    server.spoil = staticmethod(lambda name, content: change(content) if name == "b.nii.gz" else content)
    with pytest.raises(ValueError, match=rf"{server.url}/(images|masks)/b\.nii\.gz: (sends|cannot be read)"):
        load_cases(data(server.url))
    assert not list(copies.rglob(".unfinished-*"))
    server.spoil = None
    assert_same(server.url, folder)


def test_a_server_that_does_not_answer_is_named(server):
    url = re.sub(r":\d+/", ":1/", server.url)
    with pytest.raises(ValueError, match=f"{url}: cannot be listed: .*fsspec's own configuration"):
        load_cases(data(url))


@pytest.mark.parametrize("key", ["ETag", "LastModified", "mtime", "modify", "sha", "blob_id"])
def test_what_file_systems_tell_versions_by_makes_another_copy(key):
    listed = [remote._listed({"size": 9, key: version}) for version in ("1", "1", "2")]
    versions = [remote._digest("s3://bucket", "a.nii", file) for file in listed]
    assert versions[0] == versions[1] != versions[2]

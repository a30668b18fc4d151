"""The studio's command: where it listens, what it prints, and how it ends."""

import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
import urllib.request

import pytest
from studios import loaded, save_tiny_pipeline

from cli.command import CannotContinue
from studio import server as serving
from studio.__main__ import parse
from studio.server import ServerSettings, address, check_installed, from_anywhere, listening, serve

pytest.importorskip("starlette", reason="needs the extra studio")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra studio")


@pytest.fixture
def printed(monkeypatch, tmp_path):
    """What the command prints; temporary folders are in `tmp_path`."""
    lines = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serving, "NEEDED", ("starlette", "uvicorn"))
    monkeypatch.setattr("studio.niivue.niivue_module", lambda: "")
    return lines


def test_it_serves_until_it_is_interrupted(tmp_path, printed, monkeypatch):
    folder = save_tiny_pipeline(tmp_path / "tiny")
    monkeypatch.setattr(serving, "load", lambda settings, pipeline: loaded(pipeline))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for work in the background
    seen = []

    def visit():
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", "\n".join(printed))):
                time.sleep(0.05)
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            seen.append(opener.open(found[0], timeout=60).read().decode())
            seen.append([path.name for path in tmp_path.glob("medvolume-studio-*/*")])
            state = {}
            while not state.get("ready"):
                state = json.load(opener.open(found[0].split("?")[0] + "api/state", timeout=60))
            seen.append(state["models"])
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(KeyboardInterrupt):
        serve(ServerSettings([str(folder), f"{folder}/"], port=0))
    visitor.join()
    signal.signal(signal.SIGINT, before)
    assert "<title>medvolume studio</title>" in seen[0] and len(seen[1]) == 1
    assert seen[2] == [{"name": str(folder), "title": "tiny"}]  # one model, by two spellings
    assert list(tmp_path.glob("medvolume-studio-*")) == []
    assert not any("Caution" in line for line in printed)


def test_a_pipeline_that_cannot_be_loaded_ends_it(tmp_path, printed):
    with pytest.raises(CannotContinue, match="nowhere"):
        serve(ServerSettings([str(tmp_path / "nowhere")], host="0.0.0.0", port=0))
    [caution] = [line for line in printed if "Caution" in line]
    assert "other machines reach the studio" in caution and "ssh -L" in caution


def test_a_model_that_fails_before_the_server_exists_ends_it(tmp_path, printed, monkeypatch):
    """Loading fails in another thread, at once for a folder that is not there; the studio then served for ever."""
    failed = threading.Event()

    def load(settings, pipeline):
        try:
            raise ValueError("no pipeline in nowhere")
        finally:
            failed.set()

    def config(*args, **options):
        failed.wait()
        time.sleep(0.5)
        return real(*args, **options)

    real = uvicorn.Config
    monkeypatch.setattr(serving, "load", load)
    monkeypatch.setattr("uvicorn.Config", config)
    ended = []

    def run():
        with pytest.raises(CannotContinue, match="nowhere"):
            serve(ServerSettings([str(tmp_path / "nowhere")], port=0))
        ended.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert ended


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port}: cannot listen there .*give another --port"):
            listening(ServerSettings(["p"], port=port))


def test_the_address_is_for_a_browser_on_this_machine():
    hosts = ("127.0.0.1", "0.0.0.0", "::1", "10.0.0.5")
    expected = ["http://127.0.0.1:1", "http://127.0.0.1:1", "http://[::1]:1", "http://10.0.0.5:1"]
    assert [address(host, 1) for host in hosts] == expected


def test_commands_that_are_copied_find_the_pipeline(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert from_anywhere("weights") == str(tmp_path / "weights")
    assert from_anywhere("somebody/repository") == "somebody/repository"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(serving, "NEEDED", ("starlette", "no_such_package"))
    with pytest.raises(ValueError, match=r"the studio needs no_such_package: pip install -e '\.\[studio\]' -c"):
        check_installed()


def test_the_defaults_of_the_command_are_those_of_the_settings():
    options = vars(parse(["--pipeline", "p"]))
    assert options == vars(ServerSettings(["p"]))
    assert parse(["--pipeline", "p", "q", "--port", "0"]).pipeline == ["p", "q"]

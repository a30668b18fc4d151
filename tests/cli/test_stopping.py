"""Ctrl-C: the first lets the work in progress end and keeps it, the second ends at once; and long steps show that they
are alive."""

import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from jsonargparse import Namespace
from tiny import mask_image, tiny_pipeline

import evaluate
import generate
from benchmarks.phantom_set import write_phantoms
from cli import live_bar, stopping
from cli.live_bar import LiveBar
from cli.stopping import (
    Stopped,
    check_stop,
    finishing,
    now_finishing,
    stop_came,
    stoppable,
)
from evaluation.commands import trainings
from evaluation.commands.common import run_command
from pipelines import Check, MedVolumePipeline, Rejection, batch_generation
from training import ResumableBatchSampler
from training.engine.sampling_order import training_batches
from volumes import DataConfig, VolumeDataset
from volumes.data.cases import Case
from volumes.prepared import preparation
from volumes.volume import VolumeError

ROOT = Path(__file__).resolve().parents[2]


def interrupt(number: int = signal.SIGINT) -> None:
    """Send this thread a signal, which is there when the call returns."""
    signal.raise_signal(number)


@pytest.fixture(autouse=True)
def signals_are_taken(monkeypatch):
    """These tests interrupt the process that runs them. It must not die of them: a signal that nobody takes, and an
    exit, fail the test. (Of tests that run in the background of a shell, Ctrl-C is ignored, so it is set here.)"""
    assert not stopping._signals.listening, "an earlier test left signals taken"
    process, leave, ends = os.getpid(), os._exit, []
    monkeypatch.setattr(os, "_exit", lambda code: ends.append(code) if os.getpid() == process else leave(code))
    missed: list[int] = []

    def miss(number, frame):
        missed.append(number)

    before = {number: signal.signal(number, miss) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    handlers = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(handlers.values()) == {miss} and not missed and not ends and not stopping._signals.listening


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_work_in_progress_ends_and_then_the_program(number, name, capfd):
    done = []
    with pytest.raises(Stopped) as end, stoppable("go on so"):
        for step in range(5):
            with finishing(f"step {step}"):
                if step == 2:
                    interrupt(number)
                    assert stop_came() == number
                done.append(step)
    assert end.value.code == 128 + number and done == [0, 1, 2]
    said = capfd.readouterr().err
    assert f"{name}: finishing step 2" in said and said.strip().endswith("go on so")
    assert ("Ctrl-C again ends at once" in said) == (number == signal.SIGINT)


def test_without_work_in_progress_it_ends_at_once(capfd):
    with pytest.raises(Stopped) as end, stoppable():
        interrupt()
        pytest.fail("went on")
    assert end.value.code == 130 and "Ctrl-C: ending" in capfd.readouterr().err


def test_sigterm_may_come_twice_and_the_outer_work_decides(capfd):
    reached = []
    with pytest.raises(Stopped), stoppable():
        with finishing("the part"):
            with finishing("one of its volumes"):
                now_finishing("another volume")
                interrupt(signal.SIGTERM)
                interrupt(signal.SIGTERM)
            reached.append("the rest of the part")
        reached.append("the next part")
    assert reached == ["the rest of the part"]
    assert capfd.readouterr().err.count("SIGTERM: finishing another volume") == 1


def test_an_error_in_the_work_is_not_hidden_by_a_stop():
    with pytest.raises(ZeroDivisionError), stoppable(), finishing("a step"):
        interrupt()
        raise ZeroDivisionError
    check_stop()  # outside nothing is asked for any more


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_taken():
    reached = []

    def work():
        with stoppable(), finishing("a step"):
            now_finishing("the next")
            reached.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [1]


SLOW = """
import ctypes, sys, time
sys.path.insert(0, {root!r})
from cli.stopping import stoppable, finishing
with stoppable("go on so"), finishing("a long step"):
    print("ready", flush=True)
    ctypes.CDLL(None).sleep({seconds})  # like PyTorch: for Python, one line, in which it looks at no signal
    for _ in range(4):  # each signal ends one
        ctypes.CDLL(None).sleep({seconds})
    print("kept", flush=True)
"""


def started(seconds: int) -> subprocess.Popen:
    """A program in a step that Python cannot interrupt."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(root=str(ROOT), seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_an_interrupt_in_a_long_step_is_announced_at_once():
    """A second interrupt ends the step at once."""
    process = started(60)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    said = process.stderr.readline() + process.stderr.readline()
    assert said.strip() == "Ctrl-C: finishing a long step; Ctrl-C again ends at once"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - began < 20
    assert "kept" not in process.stdout.read() and "Traceback" not in process.stderr.read()


def test_a_child_of_a_fork_leaves_the_decision_to_its_parent(capfd):
    """A process that loads data gets the terminal's Ctrl-C too; it neither dies of it nor counts as a second one."""
    with pytest.raises(Stopped), stoppable(), finishing("a step"):
        child = os.fork()
        if not child:
            interrupt()
            interrupt()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stop_came() is None
        interrupt()
    assert capfd.readouterr().err.count("Ctrl-C") == 2  # of one line


def test_an_interrupt_just_after_a_fork_counts_only_once(capfd):
    """It comes before the child had its own handlers: with its parent's it would count there."""
    with pytest.raises(Stopped), stoppable(), finishing("a step"):
        for _ in range(30):
            child = os.fork()
            if not child:
                os._exit(7)
            os.kill(child, signal.SIGINT)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stop_came() is None
        interrupt()
    assert capfd.readouterr().err.count("Ctrl-C: finishing") == 1


def test_processes_that_load_data_outlive_an_interrupt(capfd):
    stream = ResumableBatchSampler(8, 2, seed=0)
    with pytest.raises(Stopped), stoppable(), finishing("a step"):
        batches = training_batches(range(8), stream, workers=2, collate=list, pin_memory=False)
        got = [next(batches)]
        children = multiprocessing.active_children()
        assert len(children) == 2
        for pid in (*(child.pid for child in children), os.getpid()):
            os.kill(pid, signal.SIGINT)
        got += [next(batches) for _ in range(20)]
        assert all(child.is_alive() for child in children)
        batches.close()
    assert got == [[index for _, index in keys] for keys in itertools.islice(iter(stream), 21)]
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("Ctrl-C: finishing a step") == 1


# Generation and evaluation


def test_ctrl_c_ends_the_reading_of_a_set_that_was_begun(monkeypatch):
    """Of 40 volumes that take 0.2 s each, four at a time, all of them would take two seconds."""
    begun, numbers = [], itertools.count(1)

    def slow(case: Case, config: DataConfig) -> None:
        begun.append(case.name)
        if next(numbers) == 6:
            os.kill(os.getpid(), signal.SIGINT)  # this is another thread: it comes to the main one
        time.sleep(0.2)
        raise VolumeError("no volume")

    monkeypatch.setattr(preparation, "prepare_unscaled", slow)
    config = DataConfig(images="x", on_error="skip")
    cases = [Case(f"c{number}", f"c{number}") for number in range(40)]
    with pytest.raises(Stopped), stoppable():
        VolumeDataset(cases, config)
    assert len(begun) < 20


def test_interrupted_generation_finishes_its_batch_and_resumes(tmp_path, monkeypatch, capfd):
    """The volumes in progress are finished, and the same command continues."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "masks").mkdir()
    for number in range(5):
        nib.save(mask_image((8, 8, 8), seed=number), tmp_path / f"masks/case_{number}.nii.gz")
    args = ["--pipeline", str(tmp_path / "pipeline"), "--masks", str(tmp_path / "masks"), "--steps", "1"]
    args += ["--batch_size", "2", "--output"]
    generate.main([*args, str(tmp_path / "whole")])
    work, batches = MedVolumePipeline.generate, []

    def interrupted(*given, **options):
        batches.append(1)
        if len(batches) == 2:
            interrupt()
        return work(*given, **options)

    monkeypatch.setattr(MedVolumePipeline, "generate", interrupted)
    with pytest.raises(SystemExit) as end:
        generate.main([*args, str(tmp_path / "out")])
    assert end.value.code == 130 and len(batches) == 2
    said = capfd.readouterr()
    assert "Ctrl-C: finishing case_2_000.nii.gz and 1 more" in said.err and "run the same command again" in said.err
    assert "stopped: 4 volumes are in" in said.out
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4
    assert len((tmp_path / "out/manifest.csv").read_text().splitlines()) == 5
    generate.main([*args, str(tmp_path / "out")])
    assert len(batches) == 3
    for path in (tmp_path / "whole").glob("*.nii.gz"):
        ours, theirs = (np.asarray(nib.load(one).dataobj) for one in (tmp_path / "out" / path.name, path))
        np.testing.assert_array_equal(ours, theirs)


def test_accepted_volumes_of_an_interrupted_batch_are_kept(tmp_path, monkeypatch, capfd):
    """Only the others of the batch are made again."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    nib.save(mask_image((8, 8, 8)), tmp_path / "case.nii.gz")
    judged = []

    def judge(image, in_box):
        judged.append(1)
        if len(judged) == 2:
            interrupt()
        return len(judged) % 2 == 0, {}  # the second of two is refused

    check = Rejection([Check("copy_check", judge, lambda found: "is a copy")], 10)
    monkeypatch.setattr(batch_generation, "load_rejection", lambda *_: check)
    args = ["--pipeline", str(tmp_path / "pipeline"), "--masks", str(tmp_path / "case.nii.gz"), "--steps", "1"]
    with pytest.raises(SystemExit):
        generate.main([*args, "--count", "2", "--output", str(tmp_path / "out")])
    assert len(judged) == 2 and [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["case_000.nii.gz"]
    capfd.readouterr()


def test_interrupted_evaluation_finishes_a_training_and_resumes(tmp_path, monkeypatch, capfd):
    write_phantoms(tmp_path, range(5), tests=1)
    args = ["dice", "--config", str(tmp_path / "config.yaml"), "--synthetic", str(tmp_path / "made"), "--device", "cpu"]
    args += ["--precision", "no", "--shape", "16", "16", "16", "--iterations", "2", "--seeds", "2"]
    args += ["--train_on", "real", "--output", str(tmp_path / "dice.json")]
    score, trained = trainings.score_training, []

    def interrupted(*given, **options):
        trained.append(options["seed"])
        if len(trained) == 1:
            interrupt()
        return score(*given, **options)

    monkeypatch.setattr(trainings, "score_training", interrupted)
    with pytest.raises(SystemExit) as end:
        evaluate.main(args)
    assert end.value.code == 130 and trained == [0]
    assert [row["seed"] for row in json.loads((tmp_path / "dice.json").read_text())["scores"]["real"]] == [0]
    said = capfd.readouterr().err
    assert "Ctrl-C: finishing real, labels any, seed 0" in said and "run the same command again" in said
    evaluate.main(args)
    assert trained == [0, 1]
    assert [row["seed"] for row in json.loads((tmp_path / "dice.json").read_text())["scores"]["real"]] == [0, 1]


def test_a_command_without_parts_finishes_its_report(tmp_path, capfd):
    class Command:
        name, divides, reads_data, makes_folder = "realism", False, False, False

        @staticmethod
        def run(*_):
            interrupt()
            (tmp_path / "report").touch()
            return {}

    with pytest.raises(Stopped), stoppable():
        run_command(Command, Namespace(output=str(tmp_path / "report.json"), wait_minutes=0), None, None)
    assert (tmp_path / "report").exists()
    assert "finishing realism, whose report is written at its end" in capfd.readouterr().err


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def until(there, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_clock_of_a_bar_goes_on_during_a_step(monkeypatch):
    monkeypatch.setattr(live_bar, "REFRESH", 0.05)
    terminal = Terminal()
    with LiveBar(total=3, file=terminal, desc="volumes") as bar:
        bar.update()
        drawn = len(terminal.getvalue())
        until(lambda: terminal.getvalue()[drawn:].count("1/3") >= 3)
        bar.now("validation")
        assert "volumes, validation" in terminal.getvalue()


def test_a_long_step_logs_at_intervals_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(live_bar, "QUIET", 0.2)
    with LiveBar(total=3, file=io.StringIO(), desc="volumes") as bar:
        bar.update()
        time.sleep(1.1)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(re.fullmatch(r"volumes: 1 of 3 done; the next one takes 0:00:0\d so far", line) for line in lines)
    assert list(LiveBar(range(3), file=io.StringIO())) == [0, 1, 2]
    with LiveBar(total=3, disable=True) as silent:
        silent.update()
        time.sleep(0.5)
    assert capsys.readouterr().err == ""

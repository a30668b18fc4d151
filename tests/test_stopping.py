"""Ctrl-C: the first lets the work in progress end and keeps it, the second ends at once; and long steps show that they are alive."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from volumes import live_bar
from volumes.live_bar import LiveBar
from volumes.stopping import Stopped, check_stop, finishing, now_finishing, stop_came, stoppable

ROOT = Path(__file__).resolve().parents[1]


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def signals_are_taken():
    """Of a test run in the background of a shell, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
from volumes.stopping import stoppable, finishing
with stoppable("go on so"), finishing("a long step"):
    print("ready", flush=True)
    ctypes.CDLL(None).sleep({seconds})  # like PyTorch: for Python, one line, in which it looks at no signal
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


def test_a_long_step_is_told_of_at_once_and_a_second_interrupt_ends_it_at_once():
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


def test_without_a_terminal_a_long_step_writes_a_line_at_intervals(monkeypatch, capsys):
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

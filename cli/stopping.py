"""Handle Ctrl-C (SIGINT) and SIGTERM: the first finishes the work in progress, a second Ctrl-C ends at once.

    with stoppable("run the same command to resume"):
        load()                          # a signal ends the program here: there is nothing to keep
        for batch in batches:
            with finishing("volume 3 of 10"):
                write(generate(batch))  # a signal is noted here, and ends the program at the end of the block

A thread announces the effect of a signal at once: Python handles signals between two of its own instructions, not while
PyTorch computes. SIGTERM may arrive several times, from a scheduler and from a launcher; only a second Ctrl-C means
that work may be lost.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """The program ends because of a signal.

    Its exit status is 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
    """


class _Signals:
    """The signals received and the work in progress; one instance, like the signal handlers of a process."""

    def __init__(self) -> None:
        self.listening = False
        self.forking = threading.local()  # the signal mask before a fork, in the thread that forks
        self.reset()

    def reset(self) -> None:
        self.work: str | None = None
        self.came: int | None = None
        self.ending: str | None = None  # the work in progress when it came
        self.announced: int | None = None
        self.interrupts = 0

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal in the main thread. Raises: Stopped if no work is in progress."""
        if self.came is None:
            self.came, self.ending = number, self.work
            if self.work is None:
                raise Stopped(128 + number)

    def listen(self, wakeup: socket.socket) -> None:
        """Announce every signal as soon as it comes; runs in a thread."""
        while numbers := wakeup.recv(64):
            for number in numbers:
                if number in NAMES:
                    self.announce(signal.Signals(number))

    def announce(self, number: signal.Signals) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            say("Ctrl-C: ended at once")
            os._exit(128 + signal.SIGINT)
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        if self.announced is None or again:
            work = self.work if self.came is None else self.ending
            say(f"{NAMES[number]}: {f'finishing {work}' if work else 'ending'}{again}")
        self.announced = number

    def before_fork(self) -> None:
        """Block signals until the new process has its own handlers; with these, it would report here."""
        self.forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES) if self.listening else None

    def after_fork(self) -> None:
        if self.forking.mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.forking.mask)

    def after_fork_in_child(self) -> None:
        """Ignore Ctrl-C in a forked process, such as a data loader: its parent gets it too, and decides."""
        if self.listening:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.after_fork()


_signals = _Signals()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_signals.before_fork,
        after_in_parent=_signals.after_fork,
        after_in_child=_signals.after_fork_in_child,
    )


def say(text: str) -> None:
    """Write a line to standard error, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def stoppable(remedy: str | None = None) -> Iterator[None]:
    """Handle SIGINT and SIGTERM until the end of the block.

    A nested block has no effect; nor has one outside the main thread, where Python receives no signals. Ignored signals
    (as in a background job) stay ignored.

    Args:
        remedy: how to resume; printed if a signal ended the block.

    Raises:
        Stopped: at once, or at the end of a block of `finishing`.
    """
    if _signals.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NAMES}
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_signals.listen, args=(ours,), daemon=True)
    _signals.reset()
    _signals.listening = True
    thread.start()
    stopped = False
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _signals.note)
        yield
    except Stopped:
        stopped = True
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        _signals.listening = False
        theirs.shutdown(socket.SHUT_RDWR)  # ends the thread
        theirs.close()
        thread.join()
        ours.close()
        if stopped and remedy:
            say(remedy)


@contextmanager
def finishing(work: str) -> Iterator[None]:
    """Finish the block even if a signal comes; of nested blocks the outer one decides.

    Args:
        work: name of the work in the message "finishing ...".

    Raises:
        Stopped: at the end of the block if a signal came.
    """
    outer, _signals.work = _signals.work, work
    if outer is None:
        check_stop()
    try:
        yield
    finally:
        _signals.work = outer
    if outer is None:
        check_stop()


def stop_came() -> signal.Signals | None:
    """Return the signal that came since `stoppable` began, or None."""
    return None if _signals.came is None or not _signals.listening else signal.Signals(_signals.came)


def check_stop() -> None:
    """End the program if a signal came. Raises: Stopped."""
    if came := stop_came():
        raise Stopped(128 + came)


def now_finishing(work: str) -> None:
    """Rename the work inside `finishing`, for example to the next step; no effect elsewhere."""
    if _signals.work is not None:
        _signals.work = work

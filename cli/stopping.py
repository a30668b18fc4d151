"""Ctrl-C (SIGINT) and SIGTERM: the first one lets the work in progress end and be kept, a second Ctrl-C ends the program at once.

    with stoppable("the same command goes on"):
        load()                          # a signal ends the program here: there is nothing to keep
        for batch in batches:
            with finishing("volume 3 of 10"):
                write(generate(batch))  # a signal is noted here, and ends the program at the end of the block

What a signal does is said by a thread, so that it is said at once: Python itself looks at signals between two lines of its own, not
while PyTorch computes. SIGTERM may come several times, from a scheduler and from a launcher; only a second Ctrl-C is a wish to lose work.
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
    """The program ends because a signal asked for it. Its exit status is 128 + the signal's number: 130 of Ctrl-C, 143 of SIGTERM."""


class _Signals:
    """What came, and what is under way. There is one, as there is one set of signal handlers in a process."""

    def __init__(self) -> None:
        self.listening = False
        self.forking = threading.local()  # the signal mask before a fork, in the thread that forks
        self.reset()

    def reset(self) -> None:
        self.work: str | None = None
        self.came: int | None = None
        self.ending: str | None = None  # the work that was under way then
        self.told: int | None = None
        self.interrupts = 0

    def note(self, number: int, frame: Any) -> None:
        """Python's handler, in the main thread. Raises: Stopped where no work is under way."""
        if self.came is None:
            self.came, self.ending = number, self.work
            if self.work is None:
                raise Stopped(128 + number)

    def listen(self, wakeup: socket.socket) -> None:
        """Say what every signal does, as soon as it comes; in a thread."""
        while numbers := wakeup.recv(64):
            for number in numbers:
                if number in NAMES:
                    self.tell(signal.Signals(number))

    def tell(self, number: signal.Signals) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            say("Ctrl-C: ended at once")
            os._exit(128 + signal.SIGINT)
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        if self.told is None or again:
            work = self.work if self.came is None else self.ending
            say(f"{NAMES[number]}: {f'finishing {work}' if work else 'ending'}{again}")
        self.told = number

    def before_fork(self) -> None:
        """Hold signals back until the new process has its own handlers: with this one's it would report them here, as a second one."""
        self.forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES) if self.listening else None

    def after_fork(self) -> None:
        if self.forking.mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.forking.mask)

    def after_fork_in_child(self) -> None:
        """A process that is forked from this one, such as one that loads data, gets the terminal's Ctrl-C too: the decision is this
        one's, which ends the other."""
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
    """Write a line to standard error, as the first of the processes that were launched together."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def stoppable(remedy: str | None = None) -> Iterator[None]:
    """Take SIGINT and SIGTERM until the end of the block; an inner one of two is without effect, and so is one in another thread than
    the main one, where Python takes no signals. A signal that is ignored (of a job in the background) stays ignored.

    Args:
        remedy: how to go on; it is said where a signal ended the block.
    Raises: Stopped, at once or at the end of a block of `finishing`.
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
    """Let the block end although a signal comes in it; the outer one of two decides.

    Args:
        work: what is finished, for people: "finishing ...".
    Raises: Stopped at the end of the block if a signal came.
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
    """The signal that asks for the end, if one came since `stoppable` began."""
    return None if _signals.came is None or not _signals.listening else signal.Signals(_signals.came)


def check_stop() -> None:
    """Raises: Stopped if a signal asks for the end."""
    if came := stop_came():
        raise Stopped(128 + came)


def now_finishing(work: str) -> None:
    """Inside `finishing`: the work is another one now, such as the next step. Without effect elsewhere."""
    if _signals.work is not None:
        _signals.work = work

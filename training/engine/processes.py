"""Processes that were launched together: how they start, wait for each other and end."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.distributed import DistError

from cli.command import CannotContinue, command_line
from cli.stopping import stop_came, stoppable

MAX_RUN_TIME = timedelta(days=30)  # processes that generate wait this long for each other at the end


def on_cpu() -> bool:
    """Return whether there is no accelerator to compute on.

    Accelerate needs this: without it, processes that torchrun starts on a CPU do not know of each other, and each does
    all the work.
    """
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    )


def join_processes(timeout: timedelta) -> PartialState:
    """Join the processes that `accelerate launch` or `torchrun` started; a single process if nothing did.

    Args:
        timeout: how long they wait for each other before the job ends.
    Raises: ValueError if other processes were launched that cannot be reached.
    """
    state = PartialState(cpu=on_cpu(), timeout=timeout)
    check_together(state.num_processes)
    return state


def check_together(processes: int) -> None:
    """Raises: ValueError if more processes were launched than Accelerate sees: each would do all the work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate sees {processes}; launch with `accelerate launch "
            "--multi_gpu`, or with `torchrun` (also on a CPU)"
        )


def how_to_resume(script: str, args: Sequence[str] | None) -> str:
    """Return the command that resumes a run, as a sentence.

    Args:
        script: the training script, such as train_vae.py.
        args: its command line; None for the program's.
    """
    words, kept = list(sys.argv[1:] if args is None else args), []
    while words:
        word = words.pop(0)
        if word == "--resume":
            del words[:1]
        elif not word.startswith("--resume="):
            kept.append(word)
    command = command_line(script, *kept, "--resume", "latest")
    launched = {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()  # by torchrun or `accelerate launch`
    if launched:
        return f"continue with the same launcher and: {command.removeprefix('python ')}"
    return f"continue with: {command}"


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error of this process means that another process has ended or does not answer."""
    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


class PeerFailure(CannotContinue):
    """Another process has ended or does not answer."""


@contextlib.contextmanager
def report_peer_failure(
    state: Accelerator | PartialState,
    remedy: str = "continue with --resume latest. If it was only slow, raise loop.timeout_minutes",
) -> Iterator[None]:
    """Explain PyTorch's error when another process has ended or does not answer. Raises: PeerFailure."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerFailure) or state.num_processes == 1 or not is_peer_failure(error):
            raise
        raise PeerFailure(
            f"process {state.process_index} of {state.num_processes}: another process has ended, or does not answer "
            f"({str(error).strip().splitlines()[0][:200]}). Its message, above or in its log, says why; fix that, and "
            f"{remedy}"
        ) from error


def run_together(work: Callable[[PartialState], Sequence[str]]) -> None:
    """Run `work` in all processes that were launched together, until it ends or a signal comes. The same command can
    resume it.

    Args:
        work: called with the state of these processes; returns one line per volume that it did not write.
    Raises: ValueError listing these volumes, PeerFailure.
    """
    state = join_processes(MAX_RUN_TIME)
    again = "run the same command again: it resumes"
    with report_peer_failure(state, again), stoppable(again):
        missing = work(state)
    state.destroy_process_group()
    if missing:
        raise ValueError("not written (all others are finished):\n" + "\n".join(missing))


def stop_asked_anywhere(accelerator: Accelerator) -> signal.Signals | None:
    """Return the signal that any process received to end (`cli.stopping`), or None; the same in all of them.
    Collective."""
    came = stop_came()
    if accelerator.num_processes > 1:
        reduced: Any = accelerator.gather(torch.tensor([int(came or 0)], device=accelerator.device))
        came = int(reduced.max().item())
    return signal.Signals(came) if came else None


def outlive_signals(_: int = 0) -> None:
    """Keep a process that loads data alive on SIGTERM and Ctrl-C, because the training still finishes its step. It ends
    with the training, or a minute after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

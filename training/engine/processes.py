"""This process among those that were launched together: how they begin, wait for each other and end."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.distributed import DistError

from cli.command import CannotContinue
from cli.stopping import stop_came


def on_cpu() -> bool:
    """Whether there is no accelerator to compute on. Accelerate must be told: without it, processes that torchrun starts on a
    CPU do not know of each other, and each does all of the work."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    )


def join_processes(timeout: timedelta) -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone, if nothing did.

    Args:
        patience: how long they wait for each other before the job ends.
    Raises: ValueError if there are others that cannot be talked to.
    """
    state = PartialState(cpu=on_cpu(), timeout=timeout)
    check_together(state.num_processes)
    return state


def check_together(processes: int) -> None:
    """Raises: ValueError if more processes were launched than Accelerate knows of: each would do all of the work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate sees {processes}; launch with `accelerate launch --multi_gpu`, "
            "or with `torchrun` (on a CPU, too)"
        )


def how_to_resume(script: str, args: Sequence[str] | None) -> str:
    """The command that goes on with a run, for people.

    Args:
        script: that trains, such as train_vae.py.
        args: of its command line; None for those of the program.
    """
    given, kept = list(sys.argv[1:] if args is None else args), []
    while given:
        one = given.pop(0)
        if one == "--resume":
            del given[:1]
        elif not one.startswith("--resume="):
            kept.append(one)
    command = shlex.join([script if args is not None else sys.argv[0], *kept, "--resume", "latest"])
    launched = {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()  # by torchrun or `accelerate launch`
    return f"go on with the same launcher and: {command}" if launched else f"go on with: python {command}"


def is_of_another(error: BaseException) -> bool:
    """Whether an error of this process says that another one is gone, or stands still."""
    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


class AnotherEnded(CannotContinue):
    """Another process is gone, or stands still."""


@contextlib.contextmanager
def report_peer_failure(
    state: Accelerator | PartialState,
    remedy: str = "go on with --resume latest. If it only took long, raise loop.timeout_minutes",
) -> Iterator[None]:
    """What PyTorch says when another process is gone or stands still, in words that help. Raises: AnotherEnded."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, AnotherEnded) or state.num_processes == 1 or not is_of_another(error):
            raise
        raise AnotherEnded(
            f"process {state.process_index} of {state.num_processes}: another one has ended, or stands still "
            f"({str(error).strip().splitlines()[0][:200]}). Its own message, above or in its log, says why; remedy that, and "
            f"{remedy}"
        ) from error


def stop_asked_anywhere(accelerator: Accelerator) -> signal.Signals | None:
    """The signal that asks any of the processes to end (`cli.stopping`), if one came by now; the same answer in all of them, which
    all must ask."""
    came = stop_came()
    if accelerator.num_processes > 1:
        reduced: Any = accelerator.gather(torch.tensor([int(came or 0)], device=accelerator.device))
        came = int(reduced.max().item())
    return signal.Signals(came) if came else None


def outlive_signals(_: int = 0) -> None:
    """For a process that loads data: a SIGTERM or Ctrl-C to all processes must not take it from the training, which still finishes its
    step. A minute after SIGTERM it ends; it also ends with the training."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

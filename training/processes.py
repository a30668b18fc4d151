"""This process among those that were launched together: how they begin, wait for each other and end."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.distributed import DistError

from volumes.command import Stopped

TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that SIGTERM stopped, as of any program


def on_cpu() -> bool:
    """Whether there is no accelerator to compute on. Accelerate must be told: without it, processes that torchrun starts on a
    CPU do not know of each other, and each does all of the work."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    )


def join_processes(patience: timedelta) -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone, if nothing did.

    Args:
        patience: how long they wait for each other before the job ends.
    Raises: ValueError if there are others that cannot be talked to.
    """
    state = PartialState(cpu=on_cpu(), timeout=patience)
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


def is_of_another(error: BaseException) -> bool:
    """Whether an error of this process says that another one is gone, or stands still."""
    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


class AnotherEnded(Stopped):
    """Another process is gone, or stands still."""


@contextlib.contextmanager
def ending_with_others(
    state: Accelerator | PartialState,
    remedy: str = "go on with --resume latest. If it only took long, raise loop.patience",
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


class StopSignal:
    """Notes SIGTERM, with which a scheduler announces that it will take the machine, instead of ending at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.came = accelerator, False

    def __enter__(self) -> "StopSignal":
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():  # where alone Python takes signals
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.came = True

    def anywhere(self) -> bool:
        """Whether any of the processes noted it by now; the same answer in all of them, which all must ask."""
        if self.accelerator.num_processes == 1:
            return self.came
        came: Any = self.accelerator.reduce(
            torch.tensor(int(self.came), device=self.accelerator.device), reduction="sum"
        )
        return bool(came.item())


def outlive_sigterm(_: int = 0) -> None:
    """For a process that loads data: a SIGTERM to all processes must not take it from the training, which still finishes its
    step. A minute later it ends."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))

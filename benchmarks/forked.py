"""Run the project's scripts in separate processes, for tests that kill, stop and compare them.

The processes are forked from a server that has imported the scripts, so each starts at once.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_vae", "train_ldm", "generate", "evaluate"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # the server's, too


def start(script: str, args: Sequence[str], log: Path, *, losses: Path | None = None, **environment: str) -> Any:
    """Run `script`.main(args) in a process.

    Its output goes to `log`, and its tracked values to `losses`, one line per step.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_run, args=(script, list(args), str(log), losses and str(losses), environment))
    process.start()
    return process


def start_group(
    script: str, args: Sequence[str], log: Path, count: int, *, losses: Path | None = None, **environment: str
) -> list[Any]:
    """Run a script in `count` processes of one group, as torchrun starts them; their logs end in .0, .1, ..."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared, **environment} for rank in range(count)]
    return [start(script, args, log.with_suffix(f".{rank['RANK']}"), losses=losses, **rank) for rank in ranks]


def start_two(script: str, args: Sequence[str], log: Path, *, losses: Path | None = None) -> list[Any]:
    """Run a script in two processes of one group."""
    return start_group(script, args, log, 2, losses=losses)


def run(script: str, args: Sequence[str], log: Path, **options: Any) -> str:
    """Run a script, wait until it ends, and return its output. Raises: RuntimeError if it fails."""
    process = start(script, args, log, **options)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{script} ended with {process.exitcode}:\n{log.read_text()[-3000:]}")
    return log.read_text()


def ended(process: Any, seconds: float = 120) -> int:
    """Return the exit status of a process, which must end within `seconds`."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still runs after {seconds:.0f} s")
    return process.exitcode


def _run(script: str, args: list[str], log: str, losses: str | None, environment: dict[str, str]) -> None:
    import torch
    from accelerate import Accelerator

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(tempfile.gettempdir())  # nothing may depend on the working directory
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    if losses:

        def note(
            self: Accelerator, values: Mapping[str, object], step: int | None = None, log_kwargs: Any = None
        ) -> None:
            if self.is_main_process:
                with open(losses, "a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")

        Accelerator.log = note
    importlib.import_module(script).main(args)

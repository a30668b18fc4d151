"""Measure seconds and peak memory of one job in a fresh process, or report why that failed.

With one process per measurement, the peak belongs to the job and no cache is warm from earlier ones. Linux only: the
peak is read from and reset in /proc/self (`ru_maxrss` of a process starts at its parent's).
"""

import functools
import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Required, TypedDict

import torch

OK = "ok"
TOO_LONG = "too long"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
NOT_RUN = "not run"
CUT = "cut"


class Times(TypedDict):
    """Seconds of the counted runs; `warm` tells whether an uncounted run came first."""

    median: float
    min: float
    max: float
    all: list[float]
    warm: bool


class Memory(TypedDict):
    """Bytes in use before the first run, at the peak, and the difference."""

    baseline: int
    peak: int
    above: int


class Forecast(TypedDict):
    """Bytes and seconds that a job would need, from the growth over smaller sizes."""

    bytes: float
    seconds: float


class Result(TypedDict, total=False):
    """Outcome of a measurement: figures if `status` is "ok", else a `detail`."""

    status: Required[str]
    detail: str
    seconds: Times
    memory: Memory
    facts: dict[str, Any]  # known before the run, such as FLOPs
    values: dict[str, Any]  # figures that the run returned
    forecast: Forecast  # of a job that was not run
    later_round: dict[str, str]  # status and detail of a later round that failed


@dataclass
class Work:
    """The work to time: `run`, which may return figures, and facts that are known before it runs."""

    run: Callable[[], Mapping[str, object] | None]
    facts: Mapping[str, object] = field(default_factory=dict)


def measure(
    setup: Callable[..., Work],
    arguments: Mapping[str, Any],
    *,
    device: str = "cpu",
    repeats: int = 3,
    seconds: float = 10.0,
    timeout: float = 600.0,
    memory: int | None = None,
) -> Result:
    """Call `setup(**arguments)` and time its `run` in a fresh process.

    The first run is a warm-up and does not count, unless it takes more than `seconds` or `repeats` is 0. Then up to
    `repeats` runs count, for about `seconds`.

    Args:
        setup: a top-level function that builds models and inputs.
        arguments: its arguments.
        device: "cpu" or a CUDA device.
        repeats: maximum number of counted runs.
        seconds: time for all counted runs.
        timeout: seconds after which the process is killed.
        memory: bytes that the process may use beyond its imports (CPU only).

    Returns:
        The figures, or why there are none: "too long", "out of memory" or "failed".
    """
    multiprocessing.set_forkserver_preload([__name__, setup.__module__])  # imports once, forks often
    context = multiprocessing.get_context(start_method(device))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(  # pyright: ignore[reportAttributeAccessIssue]
        target=_child, args=(sender, setup, dict(arguments), device, repeats, seconds, memory), daemon=True
    )
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        return {"status": TOO_LONG, "detail": f"stopped after {timeout:.0f} s"}
    except EOFError:  # it died without a message
        process.join()
        status = OUT_OF_MEMORY if process.exitcode == -9 else FAILED
        return {"status": status, "detail": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


@functools.cache
def start_method(device: str) -> str:
    """Return forkserver where possible: CUDA does not survive a fork once an import has initialized it."""
    if device.startswith("cuda"):
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU then does not initialize CUDA
        process = multiprocessing.get_context("forkserver").Process(target=torch.cuda.init)
        process.start()
        process.join()
        return "forkserver" if process.exitcode == 0 else "spawn"
    return "forkserver"


def _child(sender, setup, arguments, device, repeats, seconds, memory) -> None:
    try:
        result: Result = _measure(setup, arguments, device, repeats, seconds, memory)
    except Exception as error:
        status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        result = {"status": status, "detail": f"{type(error).__name__}: {lines[0][:300]}"}
    sender.send(result)


def _measure(setup, arguments, device, repeats, seconds, memory) -> Result:
    if memory is not None and device == "cpu":
        limit = proc_status("VmSize") + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work: Work = setup(**arguments)
    torch.nn.functional.conv3d(torch.ones(1, 8, 8, 8, 8), torch.ones(8, 8, 3, 3, 3))  # loads kernels, starts threads
    baseline = reset_peak(device)
    first, values = timed(work.run, device)
    warm, times = repeats > 0 and first <= seconds, [first]
    if warm:
        times = []
        while len(times) < repeats and sum(times) < seconds:
            duration, values = timed(work.run, device)
            times.append(duration)
    peak = peak_memory(device)
    return {
        "status": OK,
        "seconds": summary(times, warm),
        "memory": {"baseline": baseline, "peak": peak, "above": peak - baseline},
        "facts": dict(work.facts),
        "values": dict(values or {}),
    }


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return the seconds until the device has finished `run`, and its result."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def summary(times: Sequence[float], warm: bool) -> Times:
    """Return median, minimum, maximum and all of the times."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "all": list(times), "warm": warm}


def reset_peak(device: str) -> int:
    """Reset the peak, and return the memory in use, in bytes."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return proc_status("VmRSS")


def peak_memory(device: str) -> int:
    """Return the peak memory since `reset_peak`, in bytes: resident, or allocated on the GPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else proc_status("VmHWM")


def proc_status(name: str) -> int:
    """Read a size of this process from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}: memory is measured on Linux only")


def available_memory(device: str = "cpu") -> int:
    """Return the free memory in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(meminfo["MemAvailable"].split()[0])


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed, in Python, PyTorch or oneDNN."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        word in text for word in ("can't allocate memory", "bad_alloc", "out of memory", "cannot allocate memory")
    )

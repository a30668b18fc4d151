"""One measurement in a process of its own: seconds, peak memory, and an honest word where there are none.

A fresh process a measurement, so that its peak is its own and nothing is warm but what it warms itself. Linux only:
the peak is read from, and reset in, /proc/self (`ru_maxrss` of a process starts at its parent's).
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
from typing import Any

import torch

OK, TOO_LONG, OUT_OF_MEMORY, FAILED, NOT_RUN = "ok", "too long", "out of memory", "failed", "not run"


@dataclass
class Work:
    """What a set-up hands to the clock: `run`, which may return figures of its own, and what is known before it
    runs."""

    run: Callable[[], Mapping[str, Any] | None]
    facts: dict[str, Any] = field(default_factory=dict)


def measure(
    setup: Callable[..., Work],
    arguments: Mapping[str, Any],
    *,
    device: str = "cpu",
    repeats: int = 3,
    seconds: float = 10.0,
    timeout: float = 600.0,
    memory: int | None = None,
) -> dict[str, Any]:
    """`setup(**arguments)` and its `run` in a fresh process.

    The first run is a warm-up and not counted, unless it alone took more than `seconds` or `repeats` is 0; then up to
    `repeats` runs are, for about `seconds`.

    Args:
        setup: a function at the top of a module, which builds models and inputs.
        timeout: seconds after which the process is killed.
        memory: bytes that the process may take besides what its imports took (CPU only).
    Returns: {"status": "ok", "seconds": {"median", "min", "max", "all", "warm"}, "memory": {"baseline", "peak",
    "above"} in bytes, "facts", "values"}, or {"status": "too long" | "out of memory" | "failed", "detail"}.
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
    except EOFError:  # it died without a word
        process.join()
        status = OUT_OF_MEMORY if process.exitcode == -9 else FAILED
        return {"status": status, "detail": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


@functools.cache
def start_method(device: str) -> str:
    """forkserver where it can be: CUDA does not survive a fork once anything that was imported has touched it."""
    if device.startswith("cuda"):
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU is then no such touch
        process = multiprocessing.get_context("forkserver").Process(target=torch.cuda.init)
        process.start()
        process.join()
        return "forkserver" if process.exitcode == 0 else "spawn"
    return "forkserver"


def _child(sender, setup, arguments, device, repeats, seconds, memory) -> None:
    try:
        result = _measure(setup, arguments, device, repeats, seconds, memory)
    except Exception as error:
        status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        result = {"status": status, "detail": f"{type(error).__name__}: {lines[0][:300]}"}
    sender.send(result)


def _measure(setup, arguments, device, repeats, seconds, memory) -> dict[str, Any]:
    if memory is not None and device == "cpu":
        limit = proc_status("VmSize") + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work: Work = setup(**arguments)
    torch.nn.functional.conv3d(torch.ones(1, 8, 8, 8, 8), torch.ones(8, 8, 3, 3, 3))  # loads kernels, starts threads
    baseline = reset_peak(device)
    first, values = timed(work.run, device)
    warm, times = 0 < repeats and first <= seconds, [first]
    if warm:
        times = []
        while len(times) < repeats and sum(times) < seconds:
            duration, values = timed(work.run, device)
            times.append(duration)
    peak = peak_memory(device)
    return {
        "status": OK,
        "seconds": summary(times) | {"warm": warm},
        "memory": {"baseline": baseline, "peak": peak, "above": peak - baseline},
        "facts": work.facts,
        "values": dict(values or {}),
    }


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds until the device is done, and what `run` returned."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and all of the times."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "all": list(times)}


def reset_peak(device: str) -> int:
    """Start counting peak memory from now; returns what is in use, in bytes."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return proc_status("VmRSS")


def peak_memory(device: str) -> int:
    """Largest memory in use since `reset_peak`, in bytes: resident, or allocated on the GPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else proc_status("VmHWM")


def proc_status(name: str) -> int:
    """A size of this process from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}: memory is measured on Linux only")


def available_memory(device: str = "cpu") -> int:
    """Bytes that are free for a measurement."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(meminfo["MemAvailable"].split()[0])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, in Python, PyTorch or oneDNN."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        word in text for word in ("can't allocate memory", "bad_alloc", "out of memory", "cannot allocate memory")
    )

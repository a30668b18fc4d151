"""Run benchmarks: measure jobs in turns, skip those that would not fit, and keep every record in bench.json."""

# pyright: reportTypedDictNotRequiredAccess=false

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from evaluation import provenance, write_report
from training import native_bf16

from .fits import predict
from .measure import (
    CUT,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    TOO_LONG,
    Forecast,
    Result,
    Work,
    available_memory,
    measure,
    summary,
)
from .records import Record, find, line, same_job

ROOT = Path(__file__).resolve().parents[2]
DONE = (OK, OUT_OF_MEMORY, NOT_RUN)  # outcomes that measuring again would not change


@dataclass(frozen=True)
class Job:
    """A function of jobs.py with its arguments, and how often and how long it may run."""

    setup: Callable[..., Work]
    arguments: dict[str, Any]
    repeats: int = 3
    seconds: float = 8.0
    timeout: float = 400.0


class Bench:
    """Run jobs, and keep their records in memory and in bench.json."""

    def __init__(self, output: Path, device: str, memory: int):
        self.output, self.device, self.memory = output, device, memory
        self.until = math.inf  # seconds of time.monotonic at which the current part is cut
        self.records: list[Record] = []
        self.precisions = {"float32": "measured", "bf16": "measured" if native_bf16() else "no bf16 hardware here"}
        if device.startswith("cuda"):
            self.precisions["tf32"] = "measured"
        self.environment = environment(device) | {"precisions": self.precisions, "memory_limit": memory}
        this_run = {name: self.environment.pop(name) for name in ("command", "date", "commit")}
        self.environment["runs"] = [this_run]  # more than one with `keep`

    def measured_precisions(self) -> list[str]:
        """Return the precisions that this machine can measure."""
        return [name for name, state in self.precisions.items() if state == "measured"]

    def compare(self, part: str, todo: Sequence[Job], rounds: int = 1) -> None:
        """Measure the jobs in turns, `rounds` times; jobs that failed or took long are not repeated.

        Those that an earlier run measured are skipped (`keep`); what the part's time does not suffice for is recorded
        as cut.
        """
        records: dict[int, Record] = {}
        earlier = list(self.records)
        todo = [job for job in todo if not any(same_job(r, self._record(part, job)) for r in earlier)]
        for turn in range(rounds):
            for index, job in enumerate(todo):
                if turn and not (
                    records[index]["status"] == OK and records[index]["seconds"]["median"] < 60 and job.repeats
                ):
                    continue
                left = self.until - time.monotonic()
                if turn and left <= 0:
                    return
                result = self._forecast(part, job) or self._measured(job, left)
                if turn:
                    records[index].update(cast(Record, joined(records[index], result)))
                else:
                    records[index] = cast(Record, self._record(part, job) | result)
                    self.records.append(records[index])
                print(line(records[index]), flush=True)
                self.write()

    def _record(self, part: str, job: Job) -> Record:
        """Return a job's entry without its outcome."""
        arguments = {k: _within_clone(v) for k, v in job.arguments.items()}
        return cast(Record, {"part": part, "job": job.setup.__name__, **arguments})

    def _measured(self, job: Job, left: float) -> Result:
        """Measure a job, for at most `left` seconds."""
        if left <= 0:
            return {"status": CUT, "detail": "the time of this part was spent"}
        result = measure(
            job.setup,
            job.arguments,
            device=self.device,
            repeats=job.repeats,
            seconds=min(job.seconds, left),
            timeout=min(job.timeout, left),
            memory=self.memory,
        )
        if result["status"] == TOO_LONG and left < job.timeout:
            return {"status": CUT, "detail": f"the time of this part ended after {left:.0f} s of this measurement"}
        return result

    def find(self, part: str, job: str, **arguments: object) -> list[Record]:
        """Return the successful records of a job, smallest shape first."""
        return find(self.records, part, job, **arguments)

    def _forecast(self, part: str, job: Job) -> Result | None:
        """Return why a job is skipped, if smaller sizes show that it would not fit in memory or time."""
        if "shape" not in job.arguments:
            return None
        same = {k: v for k, v in job.arguments.items() if k not in ("shape", "batch")}
        voxels = math.prod(job.arguments["shape"])
        smaller = [r for r in self.find(part, job.setup.__name__, **same) if math.prod(r["shape"]) < voxels][-2:]
        if len(smaller) < 2 or voxels < 4 * math.prod(smaller[-1]["shape"]):
            return None
        sizes = [math.prod(r["shape"]) for r in smaller]
        memory = predict(sizes, [max(r["memory"]["above"], 1) for r in smaller], voxels)
        seconds = predict(sizes, [r["seconds"]["median"] for r in smaller], voxels)
        forecast: Forecast = {"bytes": memory, "seconds": seconds}
        if memory > self.memory:
            detail = f"needs about {memory / 1e9:.2g} GB, {self.memory / 1e9:.2g} GB are free"
        elif seconds > job.timeout:
            detail = f"would take about {seconds:.0f} s, {job.timeout:.0f} s are allowed"
        else:
            return None
        detail += " (from the growth over smaller volumes)"
        return {"status": NOT_RUN, "detail": detail, "forecast": forecast}

    def skip(self, part: str, reason: str) -> None:
        """Record a part that cannot be measured here."""
        self.records.append({"part": part, "job": part, "status": NOT_RUN, "detail": reason})
        print(line(self.records[-1]), flush=True)

    def keep(self, again: Sequence[str], *, resume: bool = False) -> None:
        """Continue the output folder's bench.json, without the records of the parts that are measured again.

        Args:
            again: names of the parts.
            resume: whether to keep what they have measured, and run only the jobs that are missing, failed, or were
                cut.

        Raises:
            ValueError: if it is from another device or processor, whose figures cannot be compared with these.
        """
        path = self.output / "bench.json"
        if not path.is_file():
            return
        before = json.loads(path.read_text())
        old, new = ((e["device"], e["machine"]["processor"]) for e in (before["environment"], self.environment))
        if old != new:
            raise ValueError(f"{path}: was measured on {old}, this is {new}; choose another --output")
        self.records = [r for r in before["measurements"] if r["part"] not in again or (resume and r["status"] in DONE)]
        self.environment["runs"] = before["environment"]["runs"] + self.environment["runs"]

    def write(self) -> Path:
        """Write bench.json and return its path."""
        return write_report(self.output / "bench.json", {"environment": self.environment, "measurements": self.records})


def _within_clone(value: object) -> object:
    """Make paths in the clone relative to it, so that a report names no folder of the machine."""
    return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value


def joined(first: Result, second: Result) -> Result:
    """Merge the second round of a measurement: all times, and the larger peak. A failed second round is noted."""
    if second["status"] != OK:
        return {"status": OK, "later_round": {"status": second["status"], "detail": second["detail"]}}
    times = first["seconds"]["all"] + second["seconds"]["all"]
    return {
        "status": OK,
        "seconds": summary(times, first["seconds"]["warm"] and second["seconds"]["warm"]),
        "memory": max(first["memory"], second["memory"], key=lambda m: m["above"]),
    }


def environment(device: str) -> dict[str, Any]:
    """Return machine, instructions, versions and commit."""
    found = provenance()
    found["versions"] |= {name: version(name) for name in ("monai", "diffusers", "accelerate")}
    found["machine"]["instructions"] = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if name in cpu_flags()
    ]
    return found | {"device": device, "memory_available": available_memory(device)}


def cpu_flags() -> set[str]:
    """Return the processor's flags from /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for text in lines if text.startswith("flags") for flag in text.split(":", 1)[1].split()}

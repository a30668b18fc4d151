"""Find and format the records of bench.json.

A record has figures if its `status` is "ok" (see `find`), and the arguments of its job.
"""

# pyright: reportTypedDictNotRequiredAccess=false

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Required

from .measure import OK, Result


class Record(Result, total=False):
    """A measurement with its part, its job and the job's arguments."""

    part: Required[str]
    job: Required[str]
    model: str
    shape: list[int]
    batch: int
    precision: str
    streamed: bool
    checkpointing: bool
    compiled: bool
    backend: str
    window: int
    weights: str | None


def find(records: Iterable[Record], part: str, job: str, **arguments: object) -> list[Record]:
    """Return the successful records of a job with these arguments, smallest shape first."""
    matches = [r for r in records if r["part"] == part and r["job"] == job and r["status"] == OK]
    matches = [r for r in matches if all(_plain(r.get(k)) == _plain(v) for k, v in arguments.items())]
    return sorted(matches, key=lambda r: math.prod(r.get("shape", ())))


def same_job(record: Mapping[str, object], job: Mapping[str, object]) -> bool:
    """Return whether a record is the outcome of `job`: its part, its name and all its arguments."""
    return all(key in record and _plain(record[key]) == _plain(value) for key, value in job.items())


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def median(records: Sequence[Record]) -> float | None:
    """Return the median seconds of the last record, or None for an empty list."""
    return records[-1]["seconds"]["median"] if records else None


def whole_sample(record: Record) -> float:
    """Return the seconds of all steps of a sample, if only some were run."""
    return record["seconds"]["median"] * record["facts"]["steps"] / record["facts"]["steps_run"]


def line(record: Record) -> str:
    """Format a measurement as a line for the terminal."""
    words = [record["part"], record["job"], record.get("model", record.get("backend", ""))]
    words += [name for name in ("streamed", "checkpointing", "compiled") if record.get(name)]
    words += [shape_text(record["shape"])] if "shape" in record else []
    words.append(record.get("precision", ""))
    return f"{' '.join(w for w in words if w):72} {result(record)}"


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape: 64^3, or 40 x 56 x 40."""
    return f"{shape[0]}^3" if len(set(shape)) == 1 else " x ".join(map(str, shape))


def result(record: Record) -> str:
    """Format seconds and memory, or why there are none."""
    if record["status"] != OK:
        return f"{record['status']}: {record['detail']}"
    return f"{seconds(record)}, {gigabytes(record)}"


def seconds(record: Record) -> str:
    """Format median and range of the times."""
    if record["status"] != OK:
        return f"{record['status']}: {record['detail']}"
    times = record["seconds"]
    spread = f" ({short(times['min'])} to {short(times['max'])})" if len(times["all"]) > 1 else " (one run)"
    return f"{short(times['median'])} s{spread}"


def gigabytes(record: Record) -> str:
    """Format the peak memory above that of imports, weights and inputs."""
    return f"{short(record['memory']['above'] / 1e9)} GB" if record["status"] == OK else ""


def short(value: float) -> str:
    """Format three significant digits, without an exponent unless it is needed."""
    return (
        f"{value:#.3g}".rstrip(".")
        if 1e-3 <= abs(value) < 1e3 or value == 0
        else f"{value:.3g}"
        if value < 1e5
        else f"{value:.2e}"
    )

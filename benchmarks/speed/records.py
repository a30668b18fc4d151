"""The records of bench.json: looking them up, and saying in a few words what they hold."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .measure import OK

Record = dict[str, Any]


def find(records: Iterable[Record], part: str, job: str, **arguments: Any) -> list[Record]:
    """Records of a part that went well and have these arguments, smallest shape first."""
    found = [r for r in records if r["part"] == part and r["job"] == job and r["status"] == OK]
    found = [r for r in found if all(_plain(r.get(k)) == _plain(v) for k, v in arguments.items())]
    return sorted(found, key=lambda r: math.prod(r.get("shape", ())))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def median(records: Sequence[Record]) -> float | None:
    """Median seconds of the last record; None if there is none."""
    return records[-1]["seconds"]["median"] if records else None


def whole_sample(record: Record) -> float:
    """Seconds of all steps of a sample, where only some were run."""
    return record["seconds"]["median"] * record["facts"]["steps"] / record["facts"]["steps_run"]


def line(record: Record) -> str:
    """One measurement in one line, for the terminal."""
    words = [record["part"], record["job"], record.get("model", record.get("backend", ""))]
    words += [name for name in ("streamed", "checkpointing", "compiled") if record.get(name)]
    words += [shape_text(record["shape"])] if "shape" in record else []
    words.append(record.get("precision", ""))
    return f"{' '.join(w for w in words if w):72} {result(record)}"


def shape_text(shape: Sequence[int]) -> str:
    """64^3, or 40 x 56 x 40."""
    return f"{shape[0]}^3" if len(set(shape)) == 1 else " x ".join(map(str, shape))


def result(record: Record) -> str:
    """Seconds and memory, or why there are none."""
    if record["status"] != OK:
        return f"{record['status']}: {record['detail']}"
    return f"{seconds(record)}, {gigabytes(record)}"


def seconds(record: Record) -> str:
    """Median and range of the times."""
    if record["status"] != OK:
        return f"{record['status']}: {record['detail']}"
    times = record["seconds"]
    spread = f" ({short(times['min'])} to {short(times['max'])})" if len(times["all"]) > 1 else " (one run)"
    return f"{short(times['median'])} s{spread}"


def gigabytes(record: Record) -> str:
    """Peak memory above what imports, weights and inputs took."""
    return f"{short(record['memory']['above'] / 1e9)} GB" if record["status"] == OK else ""


def short(value: float) -> str:
    """Three significant digits, without an exponent where it is not needed."""
    return (
        f"{value:#.3g}".rstrip(".")
        if 1e-3 <= abs(value) < 1e3 or value == 0
        else f"{value:.3g}"
        if value < 1e5
        else f"{value:.2e}"
    )

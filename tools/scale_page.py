"""Write what many volumes cost into docs/prepared_volumes.md and docs/evaluation.md, between two comments each.

    python -m tools.scale_page

The figures are those of docs/prepared.json, docs/cohort.json (if it is there) and docs/evaluation_size.json, of
`benchmarks.prepared`, `benchmarks.cohort` and `benchmarks.evaluation_size`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN = "<!-- measured: written by tools.scale_page -->"
END = "<!-- end of measured -->"
TRAININGS = {"vae": "autoencoder", "ldm": "diffusion model"}


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return ArgumentParser(description=__doc__).parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.documents import read_object

from .markdown import rewrite_between, table


def main(args: Sequence[str] | None = None) -> None:
    """Write the two pages."""
    parse(args)
    for page, text in pages().items():
        rewrite_between(page, BEGIN, END, f"\n{text}\n")
        print(page)


def pages() -> dict[Path, str]:
    """Return what stands between the comments of each page."""
    cohort = DOCS / "cohort.json"
    prepared = prepared_text(read_object(DOCS / "prepared.json"))
    prepared += cohort_text(read_object(cohort)) if cohort.is_file() else ""
    evaluation = evaluation_text(read_object(DOCS / "evaluation_size.json"))
    return {DOCS / "prepared_volumes.md": prepared, DOCS / "evaluation.md": evaluation}


def prepared_text(report: Mapping[str, Any]) -> str:
    """Describe memory and starts of both trainings, the preparation and the wait for patches."""
    memory, preparation, wait = (report[part] for part in ("memory", "preparation", "wait"))
    few, many = sorted({int(name.rpartition("_")[2]) for name in memory if name.startswith("vae_")})
    rows = []
    for name, text in TRAININGS.items():
        peaks = [memory[f"{name}_{count}"]["peak_mib"] for count in (few, many)]
        rows.append((text, *(f"{peak:,.0f} MiB" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}"))
    heads = ("training", f"{few:,} volumes", f"{many:,} volumes", "ratio")
    return (
        f"Peak resident memory ({origin(memory)}):\n\n{table(heads, rows)}\n"
        f"A second start on {many:,} prepared volumes takes {memory[f'second_start_{many}']['first_step_s']:.1f} s to "
        "the end of the first step, the imports included.\n"
        f"A step waits {100 * wait['data_wait']:.1f} % of its time for its patches ({origin(wait)}).\n"
        f"Preparing {preparation['volumes']} volumes took {preparation['one_on_one_core']:.0f} s in one process on one "
        f"core, {preparation['two_on_two_cores']:.0f} s in two processes on two cores ({preparation['speedup']:.2f} "
        f"times as fast, the start of the second process included), and {preparation['one_on_two_cores']:.0f} s in one "
        f"process on two cores, by its threads ({origin(preparation)}).\n"
    )


def cohort_text(report: Mapping[str, Any]) -> str:
    """Describe trainings in a cache that is smaller than their volumes."""
    text = ""
    if "limited" in report:
        found = report["limited"]
        one, sizes = found["limited"], found["unlimited"]
        losses = "the same losses as" if found["same_losses"] else "other losses than"
        text += (
            f"\nBoth trainings on {found['cases']} volumes, {gib(sizes['prepared'])} prepared, in a cache limited to "
            f"{gib(one['limit'])}: it held {gib(one['largest_cache'])} at most, and they had {losses} in an unlimited "
            f"one ({origin(found)}).\n"
        )
    if "cohort" in report:
        found = report["cohort"]
        peak = max(found[script]["peak_mib"] for script in ("train_vae", "train_ldm"))
        text += (
            f"\n{found['cases']:,} volumes of {' x '.join(map(str, found['shape']))} voxels, "
            f"{gib(found['prepared'])} prepared, in a cache limited to {gib(found['limit'])}: it held "
            f"{gib(found['largest_cache'])} at most, and a process took {peak:,.0f} MiB ({origin(found)}).\n"
        )
    return text


def evaluation_text(report: Mapping[str, Any]) -> str:
    """Describe the memory of the evaluation commands by the number of volumes."""
    rows = [
        (f"{int(count):,} + {int(count):,}", *(f"{one[name]['peak_mib']:,} MiB" for name in ("realism", "privacy")))
        for count, one in report["costs"].items()
    ]
    side, crop = report["side"], report["crop"]
    return (
        f"Highest resident memory of each command ({origin(report)}; phantoms of {side}³ voxels, crops of {crop}³ for "
        f"`privacy`):\n\n{table(('generated + real volumes', '`realism`', '`privacy`'), rows)}"
    )


def origin(report: Mapping[str, Any]) -> str:
    """Name the command, the machine, the commit and the date of a report."""
    machine = report["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return (
        f"`{report['command']}`, {cores} of an {machine['processor']}, commit {report['commit']}, {report['date'][:10]}"
    )


def gib(size: float) -> str:
    """Return a size in bytes as text."""
    return f"{size / 2**30:.2f} GiB"

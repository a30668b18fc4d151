"""Write the figures of timestep_shift.json into docs/large_latents.md, between two comments.

python -m benchmarks.learning.shift_page docs/timestep_shift.json --page docs/large_latents.md
"""

import argparse
from collections.abc import Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return parse_page(__doc__, "JSON file of benchmarks.learning.timestep_shift", args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np

from evaluation.report import read_report

from .timestep_shift import Report, Row

BEGIN = "<!-- timestep shift: written by benchmarks.learning.shift_page -->"
END = "<!-- end of timestep shift -->"
SHOWN = ("600", "800", "900", "950", "980")  # timesteps, of 1000


def page_text(report: Report) -> str:
    """Return the part between the two comments: what noisy latents leave unknown, and the trained models."""
    (small, base), (large, other) = report["unknown"].items()
    count = report["shift_voxels"]
    shift = (int(large) ** 3 / count) ** 0.5
    cubes = [f"{side} x {side} x {side}" for side in (small, large)]
    rows = [(f"{cubes[0]} (`shift_voxels`, s = 1)", base["even"])]
    rows += [(f"{cubes[1]}, no shift", other["even"]), (f"{cubes[1]}, s = {shift:.2f}", other["shifted"])]
    header = ["t before the shift", *(f"{int(time) / 1000:g}" for time in SHOWN)]
    unknown = table(header, ([name, *(f"{found[time]:.3f}" for time in SHOWN)] for name, found in rows))
    machine = report["machine"]["processor"]
    measured = f"Measured by `{report['command']}` on {machine} ({report['date'][:10]}; docs/timestep_shift.json).\n"
    return f"\n{unknown}\n{models_text(report['models'])}{measured}"


def models_text(models: Sequence[Row]) -> str:
    """Return the tables of the trained models, as means over the seeds; a sentence if there are none."""
    if not models:
        return "No trained models are in this report, so it does not say whether they sample better with the shift.\n"
    kinds = list(dict.fromkeys((row["side"], row["trained_with_shift"]) for row in models))
    losses, samples = [], []
    for side, shifted in kinds:
        same = [row for row in models if (row["side"], row["trained_with_shift"]) == (side, shifted)]
        name = f"{side} x {side} x {side}, trained {'with the shift' if shifted else 'without a shift'}"
        means = [np.mean([row["loss_by_timestep"][time] for row in same]) for time in SHOWN]
        losses.append([name, *(f"{mean:.3f}" for mean in means)])
        for way in same[0]["samples"]:
            cells = []
            for kind in ("coarse", "local"):
                found = [row["samples"][way][kind] for row in same]
                generated, floor = (np.mean([one[key] for one in found]) for key in ("generated", "floor"))
                cells.append(f"{generated:.3f} ({floor:.3f})")
            samples.append([name, "shifted" if way == "shifted" else "not shifted", *cells])
    seeds = len({row["seed"] for row in models})
    return (
        f"Losses of tiny models on unseen phantoms by t, means of {seeds} trainings:\n\n"
        + table(["t", *(f"{int(time) / 1000:g}" for time in SHOWN)], losses)
        + "\nKernel distances of their samples from unseen phantoms (those of training phantoms), less is better:\n\n"
        + table(["model", "sampling", "coarse", "local"], samples)
        + "\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the part of the page. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    report = read_report(options.report, Report, "benchmarks.learning.timestep_shift")
    rewrite_between(options.page, BEGIN, END, page_text(report))

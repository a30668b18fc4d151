"""Write docs/cluster.md from docs/cluster.in.md and the reports of benchmarks.stages and benchmarks.processes.

    python -m tools.cluster_page
    python -m tools.cluster_page --stages stages.json --output cluster.md    # with the figures of your own machine

A test fails while the page is not what this command writes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "cluster.md"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages, processes = DOCS / "stages.json", DOCS / "processes.json"
    parser.add_argument("--stages", type=Path, default=stages, help="report of benchmarks.stages (docs/stages.json)")
    parser.add_argument(
        "--processes", type=Path, default=processes, help="report of benchmarks.processes (docs/processes.json)"
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write (docs/cluster.md)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from benchmarks import processes, stages
from benchmarks.cluster_plan import Costs, Plan
from evaluation.report import read_report
from files.atomic import write_text
from tools.markdown import table
from tools.ship import fill

STAGES = {
    "prepare": "prepare, each node all volumes",
    "train_vae": "train the autoencoder",
    "latents": "encode the latents",
    "train_ldm": "train the diffusion model",
    "generate": "generate",
    "evaluate": "evaluate: features, one process",
    "total": "**total**",
}
TRAININGS = {"train_vae": "autoencoder", "train_ldm": "diffusion model"}
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
RUNS = {"one": "1", "two": "2", "sharded": "2, `--loop.fsdp true`", "four": "4"}


def main(args: Sequence[str] | None = None) -> None:
    """Write the page."""
    options = parse(args)
    costs = read_report(options.stages, stages.Report, "benchmarks.stages")
    losses = read_report(options.processes, processes.Report, "benchmarks.processes")
    write_text(options.output, page(costs, losses))
    print(options.output)


def page(costs: stages.Report, losses: processes.Report) -> str:
    """Return the page as Markdown. Raises: ValueError naming a missing figure."""
    tables = {
        "costs": costs_table(costs["costs"]).rstrip(),
        "plan": plan_table(costs["plans"]).rstrip(),
        "processes_table": processes_table(losses).rstrip(),
        "device": device(costs),
        "precision": PRECISIONS[costs["costs"]["ldm_step"]["precision"]],
        "sides": " x ".join(map(str, costs["shape"])),
    }
    return fill((DOCS / "cluster.in.md").read_text(), {"stages": costs, "processes": losses, **tables})


def device(report: stages.Report) -> str:
    """Say what the costs were measured on."""
    if report["device"] == "cpu":
        return f"one core of an {report['machine']['processor']}; **no GPU has run any of it**"
    return f"one {report['device']}"


def costs_table(costs: Costs) -> str:
    """Return the costs per volume as a table."""
    read, prepared = size(costs["prepare"]["read_bytes"]), size(costs["prepare"]["stored_bytes"])
    encode, versions = costs["latents"], costs["versions"]
    rows = [
        ("prepare", f"{costs['prepare']['seconds']:.2f} s a volume", f"{read} read, {prepared} stored"),
        (
            "latents",
            f"{encode['seconds']:.2f} s a volume as it is, {encode['version_seconds']:.2f} s for each other version",
            f"{size(encode['bytes'])} a version; {versions} version{'s' if versions > 1 else ''} a volume",
        ),
    ]
    for name, step in (("autoencoder", costs["vae_step"]), ("diffusion model", costs["ldm_step"])):
        text = f"{step['seconds']:.2f} s a step of {step['batch']}; {step['passes']:.0f} passes over the volumes"
        sizes = f"checkpoint {size(step['checkpoint_bytes'])}, gradients {size(step['gradient_bytes'])}"
        rows.append((f"train the {name}", text, sizes))
    pipeline = f"{size(costs['generate']['bytes'])} a volume; pipeline {size(costs['pipeline_bytes'])}"
    rows.append(("generate", f"{costs['generate']['seconds']:.2f} s a volume", pipeline))
    rows.append(("evaluate", f"{costs['evaluate']['seconds']:.2f} s a volume (features)", ""))
    return table(("stage", "time", "size"), rows)


def plan_table(columns: Sequence[Plan]) -> str:
    """Return the plans side by side as a table."""
    rows = [(text, *(duration(one["seconds"][stage]) for one in columns)) for stage, text in STAGES.items()]
    for name, text in TRAININGS.items():
        rows.append((f"steps of the {text}", *(f"{one['steps'][name]:,}" for one in columns)))
    sizes = {
        "object storage: scans": [one["shared"]["source"] for one in columns],
        "object storage: latents": [one["shared"]["latents"] for one in columns],
        "generated volumes": [one["shared"]["generated"] for one in columns],
        "cache of each node (copies, prepared volumes, latents)": [one["node"]["total"] for one in columns],
        "checkpoints of the autoencoder's run": [one["run"]["vae_checkpoints"] for one in columns],
        "checkpoints of the diffusion model's run": [one["run"]["ldm_checkpoints"] for one in columns],
        "network: each node of the trainings downloads, in all": [one["network"]["download"] for one in columns],
        "network: each node uploads, in all": [one["network"]["upload"] for one in columns],
    }
    rows += [(text, *map(size, values)) for text, values in sizes.items()]
    for name, text in TRAININGS.items():
        rates = [one["network"][f"{name}_per_second"] for one in columns]
        sent = [f"{size(rate)}/s" if rate else "-" for rate in rates]
        rows.append((f"network between nodes, training of the {text}", *sent))
    return table(("", *(head(one) for one in columns)), rows)


def head(one: Plan) -> str:
    """Return the title of a plan's column."""
    return f"{one['gpus']} GPUs, {one['nodes']} node{'s' if one['nodes'] > 1 else ''}"


def processes_table(report: processes.Report) -> str:
    """Return the losses of several processes beside those of one as a table."""
    rows = []
    for script, found in (("train_vae", report["train_vae"]), ("train_ldm", report["train_ldm"])):
        for run, text in RUNS.items():
            difference = found["largest_relative_difference"][run]
            last = f"{found['losses'][run][-1]:.6f}"
            apart = "" if run == "one" else f"{difference:.1e}"
            rows.append((f"`{script}.py`", text, last, apart, f"{found['samples_a_second'][run]:.0f}"))
    head = ("training", "processes", "last loss", "largest relative difference of a loss", "samples a second")
    return table(head, rows)


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def size(number: float) -> str:
    """Return bytes in a unit that leaves few digits."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= length:
            return f"{number / length:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"

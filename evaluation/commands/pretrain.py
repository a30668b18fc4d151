"""`evaluate.py pretrain`: what pre-training on synthetic volumes, without labels, saves of labels (Medical Diffusion's test)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from cli.live_bar import LiveBar
from cli.stopping import finishing
from evaluation.data.label_budget import budget, draw_labeled
from evaluation.data.pairs import label_values
from evaluation.networks.pretraining import DIFFERENCES, pretrain
from evaluation.report import provenance
from evaluation.studies.few_labels import summarize
from evaluation.studies.limits import check_command
from evaluation.studies.utility import protocol, score_training
from volumes import load_cases

from .few_labels import load_sources
from .ledger import Job, Ledger, content_of, tell
from .trainings import StepClock, progress_disabled

NAME = "pretrain"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Pre-train, fine-tune, judge, and write the report anew after every fine-tuning."""
    config, shape = options.data, tuple(options.shape)
    check_command(NAME, load_cases(config), config, vars(options))
    rules = protocol(shape, options.iterations, dtype)
    num_labels = len(label_values(config))
    real, made, judge = load_sources(config, Path(options.synthetic), shape)
    unlabeled = {"synthetic": made.images, "real": real.images}
    budgets = {labels: budget(labels, len(real.cases)) for labels in options.labels}
    subjects = [case.subject for case in judge.cases]
    volumes = {"real": len(real.cases), "synthetic": len(made.cases), "judge": len(judge.cases)}
    report = {
        "evaluation": NAME,
        "protocol": {**rules, "pretrain_iterations": options.pretrain_iterations, "volumes": volumes},
        "synthetic": options.synthetic,
        "content": content_of(real, made, judge),
        "skipped": dict(real.skipped + made.skipped + judge.skipped),
        "data": dataclasses.asdict(config),
        **provenance(),
    }
    ledger = Ledger(
        Path(options.output),
        report,
        lambda rows: {**summarize(rows, subjects, DIFFERENCES, "difference"), "rows": [row.as_json() for row in rows]},
    )
    jobs = [(start, labels, seed) for seed in range(options.seeds) for start in options.starts for labels in budgets]

    def cost(jobs: list[Job]) -> int:
        beginnings = {(start, seed) for start, _, seed in jobs if start in unlabeled}
        return len(beginnings) * options.pretrain_iterations + len(jobs) * options.iterations

    jobs = ledger.share(ledger.missing(jobs), cost, lambda job: (job[0], job[2]))  # of one pre-training in one process
    clock, quiet = StepClock(cost(jobs)), progress_disabled()
    bodies: dict[tuple[str, int], dict[str, Tensor]] = {}  # of the latest pre-training; the jobs come in its order
    for start, labels, seed in jobs:
        what = f"{start}, labels {labels}, seed {seed}"
        with finishing(what):  # with its pre-training, of which nothing would be kept without
            if start in unlabeled and (start, seed) not in bodies:
                steps = options.pretrain_iterations
                first = f"pre-training, {start}, seed {seed}"
                with LiveBar(total=steps, unit="step", disable=quiet, desc=first) as progress:
                    learned = pretrain(
                        unlabeled[start],
                        seed=seed,
                        iterations=steps,
                        device=device,
                        dtype=dtype,
                        on_step=clock.watch(progress),
                    )
                bodies = {(start, seed): learned}
            steps = options.iterations
            with LiveBar(total=steps, unit="step", disable=quiet, desc=what) as progress:
                result = score_training(
                    real.take(draw_labeled(real.cases, budgets[labels], seed)),
                    judge,
                    num_labels,
                    arm=start,
                    labels=labels,
                    seed=seed,
                    iterations=steps,
                    device=device,
                    dtype=dtype,
                    on_step=clock.watch(progress),
                    start=bodies.get((start, seed)),
                )
                ledger.add(result)
    report = ledger.write()
    if not quiet:
        tell(report, "differences")
        print(f"report: {options.output}")
    return report

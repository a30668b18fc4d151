"""`evaluate.py pretrain`: how many labels pre-training on synthetic volumes saves, itself without labels (Medical
Diffusion's test)."""

import torch
from jsonargparse import Namespace
from torch import Tensor

from evaluation.data.label_budget import budget, draw_labeled
from evaluation.networks.pretraining import DIFFERENCES, pretrain

from .ledger import Job
from .trainings import (
    StepClock,
    Training,
    load_sources,
    make_budget_ledger,
    print_budgets,
    run_trainings,
)

NAME = "pretrain"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Pre-train, fine-tune and test segmenters. The report is written after every fine-tuning."""
    sources = load_sources(options, NAME)
    real, synthetic = sources.real, sources.synthetic
    assert synthetic is not None  # --synthetic is required
    unlabeled = {"synthetic": synthetic.images, "real": real.images}
    budgets = {labels: budget(labels, len(real.cases)) for labels in options.labels}
    settings = {"pretrain_iterations": options.pretrain_iterations}
    ledger = make_budget_ledger(
        NAME, options, sources, dtype, settings=settings, comparisons=DIFFERENCES, how="difference"
    )
    jobs = [(start, labels, seed) for seed in range(options.seeds) for start in options.starts for labels in budgets]
    latest: dict[tuple[str, int], dict[str, Tensor]] = {}  # the latest pre-training; the jobs come in its order

    def prepare(job: Job, clock: StepClock) -> Training:
        start, labels, seed = job
        if start in unlabeled and (start, seed) not in latest:
            latest.clear()
            with clock.bar(options.pretrain_iterations, f"pre-training, {start}, seed {seed}") as on_step:
                latest[start, seed] = pretrain(
                    unlabeled[start],
                    seed=seed,
                    iterations=options.pretrain_iterations,
                    device=device,
                    dtype=dtype,
                    on_step=on_step,
                )
        labeled = real.take(draw_labeled(real.cases, budgets[labels], seed))
        return Training(labeled, options.iterations, start=latest.get((start, seed)))

    def cost(jobs: list[Job]) -> int:
        pretrainings = {(start, seed) for start, _, seed in jobs if start in unlabeled}
        return len(pretrainings) * options.pretrain_iterations + len(jobs) * options.iterations

    report = run_trainings(
        ledger,
        jobs,
        sources,
        options,
        device,
        dtype,
        prepare=prepare,
        cost=cost,
        together=lambda job: (job[0], job[2]),  # one pre-training is done in one process
    )
    print_budgets(report, "differences")
    return report

"""`evaluate.py few_labels`: what synthetic volumes add where few real ones have labels (Med-DDPM's test, at several
budgets)."""

import torch
from jsonargparse import Namespace

from evaluation.data.label_budget import budget, draw_labeled
from evaluation.networks.defaults import ANY, SYNTHETIC
from evaluation.studies.few_labels import RATIOS, steps_of, training_set

from .ledger import Job
from .trainings import (
    StepClock,
    Training,
    load_sources,
    make_budget_ledger,
    print_budgets,
    run_trainings,
)

NAME = "few_labels"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Train and test segmenters. The report is written after every training."""
    sources = load_sources(options, NAME)
    real, synthetic = sources.real, sources.synthetic
    assert synthetic is not None  # --synthetic is required
    budgets = {labels: budget(labels, len(real.cases)) for labels in options.labels}
    settings = {"synthetic_masks": options.synthetic_masks, "mix": options.mix}
    ledger = make_budget_ledger(NAME, options, sources, dtype, settings=settings, comparisons=RATIOS, how="ratio")
    any_budget = {SYNTHETIC} if options.synthetic_masks == "all" else set()  # arms that no budget changes
    jobs = [
        (arm, labels, seed)
        for seed in range(options.seeds)
        for arm in options.train_on
        for labels in ([ANY] if arm in any_budget else budgets)
    ]

    def prepare(job: Job, clock: StepClock) -> Training:
        arm, labels, seed = job
        labeled = draw_labeled(real.cases, budgets.get(labels, len(real.cases)), seed)
        masks, balanced = options.synthetic_masks, options.mix == "balanced"
        train_set = training_set(arm, real, synthetic, labeled, masks=masks, balanced=balanced)
        return Training(train_set, steps_of(arm, options.iterations), drawn_from=len(train_set.images))

    report = run_trainings(ledger, jobs, sources, options, device, dtype, prepare=prepare)
    print_budgets(report, "ratios")
    return report

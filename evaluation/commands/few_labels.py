"""`evaluate.py few_labels`: what synthetic volumes add where few real ones have labels (Med-DDPM's test, at several budgets)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from cli.stopping import finishing
from evaluation.data.label_budget import budget, draw_labeled
from evaluation.data.pairs import (
    LoadedPairs,
    Pair,
    generated_pairs,
    label_values,
    learning_cases,
    load_pairs,
    test_cases,
)
from evaluation.networks.defaults import SYNTHETIC
from evaluation.report import provenance
from evaluation.studies.few_labels import (
    ANY,
    RATIOS,
    steps_of,
    summarize,
    training_set,
)
from evaluation.studies.limits import check_command
from evaluation.studies.utility import protocol, score_training
from volumes import DataConfig, load_cases

from .ledger import Job, Ledger, content_of, tell
from .trainings import StepClock, progress_disabled

NAME = "few_labels"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Train, judge, and write the report anew after every training."""
    config, shape = options.data, tuple(options.shape)
    check_command(NAME, load_cases(config), config, vars(options))
    rules = protocol(shape, options.iterations, dtype)
    num_labels = len(label_values(config))
    real, made, judge = load_sources(config, Path(options.synthetic), shape)
    budgets = {labels: budget(labels, len(real.cases)) for labels in options.labels}
    subjects = [case.subject for case in judge.cases]
    volumes = {"real": len(real.cases), "synthetic": len(made.cases), "judge": len(judge.cases)}
    report = {
        "evaluation": NAME,
        "protocol": {**rules, "synthetic_masks": options.synthetic_masks, "mix": options.mix, "volumes": volumes},
        "synthetic": options.synthetic,
        "content": content_of(real, made, judge),
        "skipped": dict(real.skipped + made.skipped + judge.skipped),
        "data": dataclasses.asdict(config),
        **provenance(),
    }
    ledger = Ledger(
        Path(options.output),
        report,
        lambda rows: {**summarize(rows, subjects, RATIOS, "ratio"), "rows": [row.as_json() for row in rows]},
    )
    everywhere = {SYNTHETIC} if options.synthetic_masks == "all" else set()  # the arms that no budget changes
    jobs = [
        (arm, labels, seed)
        for seed in range(options.seeds)
        for arm in options.train_on
        for labels in ([ANY] if arm in everywhere else budgets)
    ]

    def cost(jobs: list[Job]) -> int:
        return sum(steps_of(arm, options.iterations) for arm, _, _ in jobs)

    jobs = ledger.share(ledger.missing(jobs), cost)
    clock, quiet = StepClock(cost(jobs)), progress_disabled()
    for arm, labels, seed in jobs:
        drawn = draw_labeled(real.cases, budgets.get(labels, len(real.cases)), seed)
        learn = training_set(arm, real, made, drawn, masks=options.synthetic_masks, balanced=options.mix == "balanced")
        steps = steps_of(arm, options.iterations)
        what = f"{arm}, labels {labels}, seed {seed}"
        with finishing(what), LiveBar(total=steps, unit="step", disable=quiet, desc=what) as progress:
            result = score_training(
                learn,
                judge,
                num_labels,
                arm=arm,
                labels=labels,
                seed=seed,
                iterations=steps,
                device=device,
                dtype=dtype,
                on_step=clock.watch(progress),
            )
            ledger.add(dataclasses.replace(result, drawn_from=len(learn.images)))
    report = ledger.write()
    if not quiet:
        tell(report, "ratios")
        print(f"report: {options.output}")
    return report


def load_sources(
    config: DataConfig, synthetic: Path, shape: tuple[int, int, int]
) -> tuple[LoadedPairs, LoadedPairs, LoadedPairs]:
    """Real volumes to learn from, synthetic ones of their masks in a folder, and the real ones that judge."""
    cases = load_cases(config)
    real, judge = ([Pair(case) for case in chosen(cases)] for chosen in (learning_cases, test_cases))
    made = generated_pairs(cases, synthetic)
    return load_pairs(real, config, shape), load_pairs(made, config, shape), load_pairs(judge, config, shape)

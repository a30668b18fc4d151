"""`evaluate.py dice`: how useful generated volumes are to a segmenter."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from cli.stopping import finishing
from evaluation import (
    Pair,
    generated_pairs,
    iterations_of,
    label_values,
    learning_cases,
    load_pairs,
    mask_adherence,
    protocol,
    provenance,
    ratios,
    score_training,
    test_cases,
)
from evaluation.networks.defaults import REAL, SYNTHETIC
from evaluation.studies.few_labels import ANY
from evaluation.studies.limits import check_command
from evaluation.studies.training_result import TrainingResult
from files.documents import read_object
from volumes import load_cases

from .ledger import Job, Ledger, content_of
from .trainings import StepClock, progress_disabled

NAME = "dice"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Train and judge. The report is written anew after every training, so a run that is stopped leaves what it has."""
    config, shape = options.data, tuple(options.shape)
    check_command(NAME, load_cases(config), config, vars(options))
    cases = load_cases(config)
    learn, judge = learning_cases(cases), test_cases(cases)
    pairs = {"real": [Pair(case) for case in learn]}
    if options.synthetic:
        pairs["synthetic"] = generated_pairs(cases, Path(options.synthetic))
        pairs["both"] = pairs["real"] + pairs["synthetic"]
    elif set(options.train_on) != {"real"}:
        raise ValueError("--synthetic is missing: give a folder of generated volumes, or --train_on real")
    report: dict[str, Any] = {
        "evaluation": "dice",
        "protocol": protocol(shape, options.iterations, dtype),
        "volumes": {"judge": len(judge), **{source: len(listed) for source, listed in pairs.items()}},
        "scores": {},
        "synthetic": options.synthetic,
        "judge_synthetic": options.judge_synthetic,
        "data": dataclasses.asdict(config),
        **provenance(),
    }
    judged_too = None
    if options.judge_synthetic:
        if "real" not in options.train_on:
            raise ValueError("--judge_synthetic is for segmenters trained on real: add real to --train_on")
        judged_too = load_pairs(generated_pairs(cases, Path(options.judge_synthetic), "test"), config, shape)
        report["volumes"]["judge_synthetic"] = len(judged_too.cases)
    earlier: dict[str, list[TrainingResult]] = {}
    for path in options.earlier:
        earlier.update(earlier_scores(Path(path), report))
        report.setdefault("earlier", {})[Path(path).name] = read_object(Path(path)).get("commit")
    num_labels = len(label_values(config))
    judged = load_pairs([Pair(case) for case in judge], config, shape)
    loaded = {source: load_pairs(pairs[source], config, shape) for source in (REAL, SYNTHETIC) if source in pairs}
    sources = [*loaded.values(), judged, *([judged_too] if judged_too else [])]
    report["skipped"] = dict(skipped for source in sources for skipped in source.skipped)
    report["content"] = content_of(*sources)

    def summarize(rows: list[TrainingResult]) -> dict[str, Any]:
        scores = {source: list(results) for source, results in earlier.items()}
        for row in rows:
            scores.setdefault(row.arm, []).append(row)
        found: dict[str, Any] = {
            "scores": {source: [_without_job(row) for row in results] for source, results in scores.items()},
            "ratios": ratios(scores, [case.subject for case in judged.cases]),
        }
        if judged_too is not None and scores.get("real"):
            found["adherence"] = mask_adherence(scores["real"], judged.cases, judged_too.cases)
        return found

    def rows_of(report: dict[str, Any]) -> list[TrainingResult]:
        scores = {arm: results for arm, results in report["scores"].items() if arm not in earlier}
        return [TrainingResult.from_json(row, arm=arm, labels=ANY) for arm, rows in scores.items() for row in rows]

    def cost(jobs: list[Job]) -> int:
        return sum(iterations_of(source, options.iterations) for source, _, _ in jobs)

    ledger = Ledger(Path(options.output), report, summarize, rows_of)
    wanted = [
        (source, ANY, seed) for source in options.train_on if source not in earlier for seed in range(options.seeds)
    ]
    jobs = ledger.share(ledger.missing(wanted), cost)
    clock, quiet = StepClock(cost(jobs)), progress_disabled()
    for source, labels, seed in jobs:
        steps = iterations_of(source, options.iterations)
        what = f"learning from {source}, seed {seed}"
        with finishing(what), LiveBar(total=steps, unit="step", disable=quiet, desc=what) as progress:
            result = score_training(
                loaded[source] if source in loaded else loaded[REAL].join(loaded[SYNTHETIC]),
                judged,
                num_labels,
                arm=source,
                labels=labels,
                seed=seed,
                iterations=steps,
                device=device,
                dtype=dtype,
                on_step=clock.watch(progress),
                synthetic=judged_too if source == REAL else None,
            )
            ledger.add(result)
    report = ledger.write()
    if quiet:
        return report
    for source, results in report["scores"].items():
        print(
            f"{source}: {sum(r['dice'] for r in results) / len(results):.4f}  {[round(r['dice'], 4) for r in results]}"
        )
    for name, ratio in report["ratios"].items():
        interval = ratio.get("interval_subjects")  # of earlier reports that hold no scores of volumes there is none
        over = f" ({interval[0]:.4f} to {interval[1]:.4f} over subjects)" if interval else ""
        print(f"{name}: {ratio['of_means']:.4f}{over}  {[round(r, 4) for r in ratio['per_seed'].values()]}")
    if adherence := report.get("adherence"):
        gap = adherence["synthetic-real"]
        low, high = gap["interval_subjects"]
        print(
            f"trained on real: Dice {adherence['synthetic']:.4f} on volumes generated from {adherence['masks']} test masks, "
            f"{adherence['real']:.4f} on the real ones; difference {gap['of_means']:+.4f} ({low:+.4f} to {high:+.4f}, over subjects)"
        )
    print(f"report: {options.output}")
    return report


def _without_job(result: TrainingResult) -> dict[str, object]:
    """The row of a report that lists results by source, all of one budget."""
    return {key: value for key, value in result.as_json().items() if key not in ("arm", "labels")}


def earlier_scores(path: Path, report: dict[str, Any]) -> dict[str, list[TrainingResult]]:
    """Scores by source of an earlier report. Raises ValueError unless it was measured on the same data by the same protocol."""
    earlier = read_object(path)
    try:
        return _same_scores(path, earlier, report)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is no report of evaluate.py dice, or damaged ({type(error).__name__}: {error})"
        ) from error


def _same_scores(path: Path, earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, list[TrainingResult]]:
    for key in ("protocol", "data"):
        wanted = json.loads(json.dumps(report[key]))
        if key == "data":  # settings that the data section got since were at their defaults
            earlier[key] = {**{new: value for new, value in wanted.items() if not value}, **earlier.get(key, {})}
        if wanted != earlier.get(key):
            raise ValueError(f"{path}: was measured with another {key} ({earlier.get(key)}); train again")
    if set(earlier["scores"]) != {"real"} and earlier["synthetic"] != report["synthetic"]:
        raise ValueError(f"{path}: learned from the volumes in {earlier['synthetic']}, not in {report['synthetic']}")
    sources, wanted = ["judge", *earlier["scores"]], report["judge_synthetic"]
    if wanted and "real" in earlier["scores"]:
        if earlier.get("judge_synthetic") != wanted:
            raise ValueError(f"{path}: did not judge the volumes in {wanted}; train on real again")
        sources.append("judge_synthetic")
    for source in sources:
        if earlier["volumes"][source] != report["volumes"].get(source):
            raise ValueError(
                f"{path}: has {earlier['volumes'][source]} volumes ({source}), not {report['volumes'].get(source)}"
            )
    scores = {}
    for name, rows in earlier["scores"].items():
        try:
            scores[name] = [TrainingResult.from_json(row, arm=name, labels=ANY) for row in rows]
        except ValueError as error:
            raise ValueError(f"{path}: holds no Dice of {name!r}; it was damaged ({error})") from error
        if not rows:
            raise ValueError(f"{path}: holds no Dice of {name!r}; it was damaged")
    return scores

"""`evaluate.py dice`: how useful generated volumes are for training a segmenter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from evaluation.data.pairs import LoadedPairs
from evaluation.networks.defaults import ANY, BOTH, REAL, SYNTHETIC
from evaluation.studies.few_labels import steps_of
from evaluation.studies.training_result import TrainingResult
from evaluation.studies.utility import mask_adherence, protocol, ratios
from files.documents import read_object

from .common import describe_study
from .ledger import Job, Ledger, content_of
from .trainings import Sources, StepClock, Training, load_sources, run_trainings

NAME = "dice"
Scores = Mapping[str, Sequence[TrainingResult]]  # by training set


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Train and test segmenters. The report is written after every training, so a run that is stopped keeps its
    results."""
    check_options(options)
    sources = load_sources(options, NAME)
    study = describe_study(
        NAME,
        options,
        {
            "protocol": protocol(options.shape, options.iterations, dtype),
            "volumes": count_volumes(sources),
            "skipped": sources.skipped,
            "content": content_of(*sources.loaded),
        },
    )
    earlier: dict[str, list[TrainingResult]] = {}
    for path in map(Path, options.earlier):
        earlier |= earlier_scores(path, study)
    if options.earlier:
        study["earlier"] = {Path(path).name: read_object(Path(path)).get("commit") for path in options.earlier}
    ledger = make_ledger(Path(options.output), sources, study, earlier)
    train_sets = [name for name in options.train_on if name not in earlier]
    jobs = [(name, ANY, seed) for name in train_sets for seed in range(options.seeds)]

    def prepare(job: Job, clock: StepClock) -> Training:
        name = job[0]
        synthetic = sources.synthetic_test if name == REAL else None
        return Training(training_set(sources, name), steps_of(name, options.iterations), synthetic=synthetic)

    report = run_trainings(ledger, jobs, sources, options, device, dtype, prepare=prepare)
    if PartialState().is_main_process:
        print_summary(report)
    return report


def check_options(options: Namespace) -> None:
    """Raise ValueError for training sets whose option is missing."""
    if not options.synthetic and set(options.train_on) != {REAL}:
        raise ValueError("--synthetic is missing: give a folder of generated volumes, or --train_on real")
    if options.judge_synthetic and REAL not in options.train_on:
        raise ValueError("--judge_synthetic is for segmenters trained on real: add real to --train_on")


def training_set(sources: Sources, name: str) -> LoadedPairs:
    """Return the training set of that name."""
    if name == REAL:
        return sources.real
    assert sources.synthetic is not None  # `check_options`
    return sources.synthetic if name == SYNTHETIC else sources.real.join(sources.synthetic)


def count_volumes(sources: Sources) -> dict[str, int]:
    """Count the volumes of each source, with the refused ones."""

    def count(pairs: LoadedPairs) -> int:
        return len(pairs.cases) + len(pairs.skipped)

    volumes = {"judge": count(sources.test), REAL: count(sources.real)}
    if sources.synthetic is not None:
        volumes[SYNTHETIC] = count(sources.synthetic)
        volumes[BOTH] = volumes[REAL] + volumes[SYNTHETIC]
    if sources.synthetic_test is not None:
        volumes["judge_synthetic"] = len(sources.synthetic_test.cases)
    return volumes


def make_ledger(path: Path, sources: Sources, study: Mapping[str, object], earlier: Scores) -> Ledger:
    """Make the ledger; its report lists the results by training set, those of earlier reports included."""

    def summarize(rows: Sequence[TrainingResult]) -> dict[str, object]:
        scores = {name: list(results) for name, results in earlier.items()}
        for row in rows:
            scores.setdefault(row.arm, []).append(row)
        summary: dict[str, object] = {
            "scores": {name: [_without_job(result) for result in results] for name, results in scores.items()},
            "ratios": ratios(scores, sources.subjects),
        }
        if sources.synthetic_test is not None and scores.get(REAL):
            summary["adherence"] = mask_adherence(scores[REAL], sources.test.cases, sources.synthetic_test.cases)
        return summary

    def rows_of(report: Mapping[str, Any]) -> list[TrainingResult]:
        scores = {name: rows for name, rows in report["scores"].items() if name not in earlier}
        return [TrainingResult.from_json(row, arm=name, labels=ANY) for name, rows in scores.items() for row in rows]

    return Ledger(path, study, summarize, rows_of)


def print_summary(report: Mapping[str, Any]) -> None:
    """Print the Dice of each training set, their ratios to real, and the adherence to masks."""
    for name, results in report["scores"].items():
        dice = [result["dice"] for result in results]
        print(f"{name}: {sum(dice) / len(dice):.4f}  {[round(value, 4) for value in dice]}")
    for name, ratio in report["ratios"].items():
        low, high = ratio["interval_subjects"]
        per_seed = [round(value, 4) for value in ratio["per_seed"].values()]
        print(f"{name}: {ratio['of_means']:.4f} ({low:.4f} to {high:.4f} over subjects)  {per_seed}")
    if adherence := report.get("adherence"):
        gap = adherence["synthetic-real"]
        low, high = gap["interval_subjects"]
        print(
            f"trained on real: Dice {adherence['synthetic']:.4f} on volumes generated from {adherence['masks']} test "
            f"masks, {adherence['real']:.4f} on the real volumes; difference {gap['of_means']:+.4f} ({low:+.4f} to "
            f"{high:+.4f}, over subjects)"
        )


def _without_job(result: TrainingResult) -> dict[str, object]:
    """Return the row of a report that lists results by source, all of one budget."""
    return {key: value for key, value in result.as_json().items() if key not in ("arm", "labels")}


def earlier_scores(path: Path, report: Mapping[str, Any]) -> dict[str, list[TrainingResult]]:
    """Read the results of an earlier report by training set.

    Raises: ValueError unless they were measured on the same data with the same protocol as `report`.
    """
    earlier = read_object(path)
    try:
        _check_same(path, earlier, report)
        return {name: _results(path, name, rows) for name, rows in earlier["scores"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a report of evaluate.py dice, or damaged ({type(error).__name__}: {error})"
        ) from error


def _check_same(path: Path, earlier: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    for key in ("protocol", "data"):
        expected, recorded = json.loads(json.dumps(report[key])), earlier.get(key) or {}
        # What is not set changes nothing, and may be missing on either side.
        if _values_set(expected) != _values_set(recorded):
            raise ValueError(f"{path}: was measured with another {key} ({recorded}); train again")
    if set(earlier["scores"]) != {REAL} and earlier["synthetic"] != report["synthetic"]:
        raise ValueError(f"{path}: trained on the volumes in {earlier['synthetic']}, not in {report['synthetic']}")
    sources, folder = ["judge", *earlier["scores"]], report["judge_synthetic"]
    if folder and REAL in earlier["scores"]:
        if earlier.get("judge_synthetic") != folder:
            raise ValueError(f"{path}: was not scored on the volumes in {folder}; train on real again")
        sources.append("judge_synthetic")
    for source in sources:
        recorded, expected = earlier["volumes"][source], report["volumes"].get(source)
        if recorded != expected:
            raise ValueError(f"{path}: has {recorded} volumes ({source}), not {expected}")


def _values_set(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value}


def _results(path: Path, name: str, rows: Any) -> list[TrainingResult]:
    try:
        results = [TrainingResult.from_json(row, arm=name, labels=ANY) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: holds no Dice of {name!r}, so it is damaged ({error})") from error
    if not results:
        raise ValueError(f"{path}: holds no Dice of {name!r}, so it is damaged")
    return results

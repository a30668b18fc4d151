"""What the commands that train segmenters share: the volumes, the loop over the trainings, and its progress."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from jsonargparse import Namespace
from torch import Tensor

from cli.live_bar import LiveBar
from cli.stopping import finishing
from evaluation.data.pairs import (
    LoadedPairs,
    Pair,
    generated_pairs,
    label_values,
    learning_cases,
    load_pairs,
    test_cases,
)
from evaluation.studies.few_labels import steps_of, summarize
from evaluation.studies.limits import check_command
from evaluation.studies.utility import protocol, score_training
from files.paths import printable
from volumes import load_cases

from .common import describe_study
from .ledger import Job, Ledger, content_of, describe_job


@dataclass(frozen=True)
class Sources:
    """Volumes and their masks, at one size.

    Args:
        real: real volumes to train on.
        test: the real test set.
        synthetic: volumes generated from the masks of `real`, if any.
        synthetic_test: volumes generated from the masks of `test`, if any.
    """

    real: LoadedPairs
    test: LoadedPairs
    synthetic: LoadedPairs | None = None
    synthetic_test: LoadedPairs | None = None

    @property
    def loaded(self) -> list[LoadedPairs]:
        """All of them; `content_of` depends on the order."""
        pairs = (self.real, self.synthetic, self.test, self.synthetic_test)
        return [source for source in pairs if source is not None]

    @property
    def skipped(self) -> dict[str, str]:
        """The reason for each refused volume, by case."""
        return dict(refused for source in self.loaded for refused in source.skipped)

    @property
    def subjects(self) -> list[str]:
        """The subject of each volume of the test set."""
        return [case.subject for case in self.test.cases]


@dataclass(frozen=True)
class Training:
    """One training of the segmenter.

    Args:
        start: parameters to start from, as in `train_segmenter`.
        drawn_from: size of the training set, where the report records it.
        synthetic: generated volumes that the segmenter is scored on too, as in `score_training`.
    """

    train_set: LoadedPairs
    steps: int
    start: Mapping[str, Tensor] | None = None
    drawn_from: int | None = None
    synthetic: LoadedPairs | None = None


def load_sources(options: Namespace, command: str) -> Sources:
    """Load the volumes that `--config`, `--synthetic` and `--judge_synthetic` name.

    Raises: ValueError for data that the command cannot use (`evaluation.studies.limits`), before a volume is read.
    """
    config, shape = options.data, tuple(options.shape)
    cases = load_cases(config)
    check_command(command, cases, config, vars(options))
    pairs = {
        "real": [Pair(case) for case in learning_cases(cases)],
        "test": [Pair(case) for case in test_cases(cases)],
    }
    if options.synthetic:
        pairs["synthetic"] = generated_pairs(cases, Path(options.synthetic))
    if folder := options.get("judge_synthetic"):
        pairs["synthetic_test"] = generated_pairs(cases, Path(folder), "test")
    return Sources(**{name: load_pairs(listed, config, shape) for name, listed in pairs.items()})


def run_trainings(
    ledger: Ledger,
    jobs: Sequence[Job],
    sources: Sources,
    options: Namespace,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    prepare: Callable[[Job, "StepClock"], Training],
    cost: Callable[[list[Job]], int] | None = None,
    together: Callable[[Job], Hashable] = lambda job: job,
) -> dict[str, object]:
    """Run the trainings that the ledger lacks, this process's share of them. Returns the report with all trainings.

    Args:
        prepare: makes the training of a job. The clock gives progress bars to what it trains itself.
        cost: training steps of some jobs. Needed if `prepare` trains too.
        together: as in `Ledger.share`.
    """

    def steps(jobs: list[Job]) -> int:
        return sum(steps_of(arm, options.iterations) for arm, _, _ in jobs)

    cost = cost or steps
    jobs = ledger.share(ledger.missing(jobs), cost, together)
    clock = StepClock(cost(jobs))
    num_labels = len(label_values(options.data))
    for job in jobs:
        arm, labels, seed = job
        with finishing(describe_job(job)):  # with `prepare`: without the training, nothing of it would be kept
            training = prepare(job, clock)
            with clock.bar(training.steps, describe_job(job)) as on_step:
                result = score_training(
                    training.train_set,
                    sources.test,
                    num_labels,
                    arm=arm,
                    labels=labels,
                    seed=seed,
                    iterations=training.steps,
                    device=device,
                    dtype=dtype,
                    on_step=on_step,
                    start=training.start,
                    synthetic=training.synthetic,
                )
            ledger.add(dataclasses.replace(result, drawn_from=training.drawn_from))
    return ledger.write()


def make_budget_ledger(
    name: str,
    options: Namespace,
    sources: Sources,
    dtype: torch.dtype | None,
    *,
    settings: Mapping[str, object],
    comparisons: Sequence[tuple[str, str]],
    how: Literal["difference", "ratio"],
) -> Ledger:
    """Make the ledger of a command that trains at several label budgets.

    Args:
        settings: what the protocol contains beside that of the segmenter.
        comparisons, how: as in `summarize`.
    """
    sizes = {"real": sources.real, "synthetic": sources.synthetic, "judge": sources.test}
    volumes = {source: len(pairs.cases) for source, pairs in sizes.items() if pairs is not None}
    study = {
        "protocol": {**protocol(options.shape, options.iterations, dtype), **settings, "volumes": volumes},
        "content": content_of(*sources.loaded),
        "skipped": sources.skipped,
    }
    return Ledger(
        Path(options.output),
        describe_study(name, options, study),
        lambda rows: {
            **summarize(rows, sources.subjects, comparisons, how),
            "rows": [row.as_json() for row in rows],
        },
    )


def print_budgets(report: Mapping[str, Any], how: Literal["differences", "ratios"]) -> None:
    """Print the mean Dice of every arm and budget, and their ratios or differences with intervals over seeds and
    subjects."""
    if not PartialState().is_main_process:
        return
    for arm, budgets in report["dice"].items():
        for labels, dice in budgets.items():
            seeds = _format_interval(dice["interval_seeds"])
            print(f"{printable(arm)}, labels {printable(labels)}: Dice {dice['mean']:.4f}{seeds} over seeds")
    for name, budgets in report[how].items():
        for labels, compared in budgets.items():
            seeds, subjects = (_format_interval(compared[f"interval_{unit}"]) for unit in ("seeds", "subjects"))
            print(
                f"{printable(name)}, labels {printable(labels)}: {compared['of_means']:.4f}{seeds} over "
                f"seeds,{subjects} over subjects"
            )


def _format_interval(interval: Sequence[float] | None) -> str:
    return " (one: no interval)" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def progress_disabled() -> bool | None:
    """Return the `disable` of a progress bar: one bar on a terminal, of the main process."""
    return None if PartialState().is_main_process else True


class StepClock:
    """Progress bars of trainings. After the first steps, prints how long all `steps` will take."""

    def __init__(self, steps: int):
        self.steps = steps
        self.start = 0.0
        self.printed = False

    @contextmanager
    def bar(self, steps: int, title: str) -> Iterator[Callable[[int, float], None]]:
        """Show a progress bar for one training. Gives a callback for each step: (step counted from 1, loss)."""
        with LiveBar(total=steps, unit="step", disable=progress_disabled(), desc=title) as progress:

            def on_step(step: int, loss: float) -> None:
                progress.update()
                progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if step == 1:  # the first step prepares kernels, so the clock starts after it
                    self.start = time.perf_counter()
                elif step == 4 and not self.printed:
                    seconds = (time.perf_counter() - self.start) / 3
                    minutes = seconds * self.steps / 60
                    progress.write(
                        f"a training step takes {seconds:.2f} s: about {minutes:.0f} minutes for {self.steps} steps"
                    )
                    self.printed = True

            yield on_step

"""What a run measures at a step, with the averaged weights: the validation, the comparison of generated with held-out
volumes, and the previews."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device

from cli.stopping import now_finishing, stop_came
from training.engine.checkpoints import TrainState
from training.engine.config import LoopConfig
from training.engine.processes import stop_asked_anywhere
from training.engine.sampling_order import derive_seed, seeded
from training.engine.step import Generates, Items, TrainingStep
from training.engine.tracking import Progress, log_figure

from .best import BestWeights

logger = logging.getLogger("training")
# They keep the seeds of validation noise and of generated volumes apart from each other and from those of the training.
_VALIDATION = 1 << 32
_SAMPLES = 1 << 34


class Measurements:
    """Measures a run on its held-out items, which the processes share, where and when the loop's settings say.

    Args:
        items: held out.
        output: of the run; previews are drawn there.
        best: is told of each validation.
        state: of the run; tells the step, and what was measured already.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: LoopConfig,
        step: TrainingStep,
        items: Items,
        output: Path,
        best: BestWeights,
        state: TrainState,
        progress: Progress,
    ):
        self.accelerator = accelerator
        self.options = options
        self.step = step
        self.items = items
        self.output = output
        self.best = best
        self.state = state
        self.progress = progress
        self.measured: dict[str, dict[str, float]] = {}  # at this step

    def begin_step(self) -> None:
        """Forget what was measured at the step before."""
        self.measured = {}

    def take(self, at_end: bool = False) -> dict[str, float]:
        """Validate, and compare generated volumes, where due and not done at this step yet. Returns all of its
        metrics."""
        state, options = self.state, self.options
        due = at_end or (is_due(state.step, options.validate_every) and state.validated < state.step)
        if due and "validation" not in self.measured and (metrics := self.validate()):
            state.validated = state.step
            self._judge("validation", metrics)
        due = at_end or (is_due(state.step, options.sample_every) and state.sampled < state.step)
        if due and options.sample_every and "samples" not in self.measured and (metrics := self.sample()):
            state.sampled = state.step
            self._judge("samples", metrics)
        return {name: value for metrics in self.measured.values() for name, value in metrics.items()}

    def _judge(self, kind: str, metrics: dict[str, float]) -> None:
        self.measured[kind] = metrics
        self.best.judge(metrics, self.state)
        if (shown := metrics.get(self.best.metric)) is not None:
            self.progress.show(**{self.best.metric: shown})

    def validate(self, *, log: bool = True) -> dict[str, float]:
        """Return the mean of every metric over the held-out items, which the processes share; empty without such items,
        and if a signal ended it."""
        accelerator, items = self.accelerator, self.items
        self._show_phase("validation", f"the validation at step {self.state.step}")
        self._gather_averages()
        if not len(items):
            return {}
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}  # of the items that have a metric: a label may be absent from some
        for index in range(accelerator.process_index, len(items), accelerator.num_processes):
            if stop_came():
                break
            generator = seeded(accelerator.device, self.options.seed, _VALIDATION, index)
            item = items[index]
            values = self.step.validate(send_to_device(item, accelerator.device), generator)
            if wrong := ", ".join(name for name, value in values.items() if not math.isfinite(value)):
                volume = item.get("name", f"item {index}")
                logger.warning("step %d: validation volume %s: %s is not finite", self.state.step, volume, wrong)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
        metrics: dict[str, float] = {}
        self.progress.doing()
        parts = gather_object([(sums, counts)])
        if stop_asked_anywhere(accelerator):
            logger.warning("step %d: the validation was cut short", self.state.step)
            return {}
        for part, _ in parts:
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value / sum(others.get(name, 0) for _, others in parts)
        if log:
            self._log_validation(metrics, f"{len(items)} items")
        return metrics

    def sample(self, *, log: bool = True) -> dict[str, float]:
        """Generate volumes from the conditions of held-out items, always from the same noise, and return how far they
        are from these. The processes share the volumes. Empty if a signal ended it."""
        accelerator, items, step = self.accelerator, self.items, self.step
        assert isinstance(step, Generates)  # see `BestWeights`
        self._show_phase("sampling", f"the comparison of generated volumes at step {self.state.step}")
        self._gather_averages()
        count = min(self.options.sample_volumes, len(items), step.max_samples)
        rows = {}
        for number in range(accelerator.process_index, count, accelerator.num_processes):
            if stop_came():
                break
            generator = torch.Generator().manual_seed(derive_seed(self.options.seed, _SAMPLES, number))
            item = send_to_device(items[number * len(items) // count], accelerator.device)
            rows[number] = step.sample(item, number, count, generator)
        self.progress.doing()
        parts = gather_object([rows])
        if stop_asked_anywhere(accelerator):
            logger.warning("step %d: the comparison of generated volumes was cut short", self.state.step)
            return {}
        rows = {number: row for part in parts for number, row in part.items()}
        metrics = step.compare([rows[number] for number in range(count)])
        if log:
            self._log_validation(metrics, f"{count} generated volumes")
        return metrics

    def _log_validation(self, metrics: Mapping[str, float], of: str) -> None:
        self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=self.state.step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("step %d  validation (%s): %s", self.state.step, of, text)

    def _gather_averages(self) -> None:
        for learner in self.step.learners:
            learner.gather_average()

    def preview(self) -> None:
        """Draw the first few held-out items, in the main process; nothing if a signal came."""
        count = min(self.options.previews, len(self.items))
        if stop_asked_anywhere(self.accelerator):
            return
        self._show_phase("preview", f"the preview of step {self.state.step}")
        self._gather_averages()
        if count and self.accelerator.is_main_process:
            items = [send_to_device(self.items[i], self.accelerator.device) for i in range(count)]
            log_figure(self.accelerator, self.step.preview(items), "preview", self.state.step, self.output / "previews")
        self.progress.doing()
        self.accelerator.wait_for_everyone()

    def _show_phase(self, short: str, phase: str) -> None:
        self.progress.doing(short)
        now_finishing(f"{phase}, then saving")  # no effect after the last checkpoint, when a signal ends at once


def is_due(step: int, every: int) -> bool:
    """Return whether a step is one of every `every`; never, for 0."""
    return every > 0 and step % every == 0

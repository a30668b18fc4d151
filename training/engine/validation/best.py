"""The best averaged weights of a run by its validation, and its early stop."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cli.command import CannotContinue
from files.atomic import remove_folder
from training.engine.checkpoints import BEST_WEIGHTS, TrainState
from training.engine.config import MIN_SAMPLE, LoopConfig
from training.engine.learner import Learner
from training.engine.output import replacing
from training.engine.step import Generates, TrainingStep

logger = logging.getLogger("training")
BEST = "best"  # folder in the output
DESCRIBED = "best.json"


class BestWeights:
    """Keeps the best averaged weights of a run in `best/`: best.safetensors, and best.json with metric, step and
    value.

    The checkpoints have them too, with their step and value in the state: a resumed run continues from the best that
    its checkpoint knew.

    Args:
        step: whose first learner is kept.
        held_out: number of held-out items.
    Raises: ValueError if `best_by`, `patience`, `export` or `sample_every` ask for what this run does not measure.
    """

    def __init__(self, accelerator: Accelerator, options: LoopConfig, step: TrainingStep, output: Path, held_out: int):
        self.accelerator, self.options, self.folder = accelerator, options, output / BEST
        self.learner: Learner = step.learners[0]
        generates = isinstance(step, Generates)
        if options.sample_every and not generates:
            raise ValueError("loop.sample_every: this model generates no volumes; set it to 0")
        if options.sample_every and generates and min(step.max_samples, held_out) < MIN_SAMPLE:
            raise ValueError(
                f"loop.sample_every: {step.max_samples} training volumes and {held_out} held-out ones are too few to "
                f"compare; use {MIN_SAMPLE} or more of each (data.validation_fraction), or set it to 0"
            )
        metrics = dict(step.metrics) | ({step.distance: False} if generates and options.sample_every else {})
        self.metric = options.best_by or next(iter(step.metrics))
        if self.metric not in metrics:
            remedy = "; it needs loop.sample_every" if generates and self.metric == step.distance else ""
            raise ValueError(f"loop.best_by: {self.metric} is not measured{remedy}; choose from {', '.join(metrics)}")
        self.more_is_better = metrics[self.metric]
        self.validated = {*step.metrics} if self.metric in step.metrics else set()
        every = options.sample_every if generates and self.metric == step.distance else options.validate_every
        self.judges = held_out > 0 and every > 0
        wanted = [f"loop.patience {options.patience}"] if options.patience else []
        wanted += [f"loop.export {options.export}"] if options.export != "last" else []
        if options.export == "posthoc" and not (options.ema_snapshots and options.ema_lengths):
            raise ValueError("loop.export posthoc: needs loop.ema_snapshots above 0 and loop.ema_lengths")
        if wanted and not self.judges:
            raise ValueError(
                f"{' and '.join(wanted)}: nothing is validated during the run; hold out subjects "
                "(data.validation_fraction), and set loop.validate_every above 0"
            )

    @property
    def weights(self) -> Path:
        """The file of the best weights; it exists once there are any."""
        return self.folder / BEST_WEIGHTS

    def begin(self, checkpoint: Path | None, state: TrainState) -> None:
        """Make `best/` what it was when `checkpoint` was written; None for a new run, which has none."""
        if self.judges and state.best_metric not in ("", self.metric):
            logger.warning("best/ by %s is dropped: the run now keeps the best by %s", state.best_metric, self.metric)
            state.best_metric, state.best_step, state.best_value, state.stale = "", 0, None, 0
        if not self.accelerator.is_main_process:
            return
        if checkpoint is not None and state.best_value is not None:
            with replacing(self.folder) as unfinished:
                shutil.copyfile(checkpoint / BEST_WEIGHTS, unfinished / BEST_WEIGHTS)
                self._describe(unfinished, state)
        elif self.weights.is_file():
            remove_folder(self.folder)

    def judge(self, metrics: Mapping[str, float], state: TrainState) -> None:
        """Compare a validation with the best one so far, and keep the averaged weights if it is better. Called by every
        process, with the same metrics."""
        if not self.judges:
            return
        if self.validated & metrics.keys():  # a validation, not a comparison of generated volumes
            self.check_measured(metrics)
        if self.metric not in metrics:
            return
        value, best = metrics[self.metric], state.best_value
        sign = -1 if self.more_is_better else 1
        better = math.isfinite(value) and (best is None or sign * (best - value) > self.options.min_delta)
        state.stale = 0 if better else state.stale + 1
        if better:
            state.best_metric, state.best_step, state.best_value = self.metric, state.step, value
            if self.accelerator.is_main_process:
                with replacing(self.folder) as unfinished:
                    weights = self.learner.average.state_dict()
                    save_file({name: each.contiguous() for name, each in weights.items()}, unfinished / BEST_WEIGHTS)
                    self._describe(unfinished, state)

    def check_measured(self, metrics: Mapping[str, float]) -> None:
        """Raises: CannotContinue if these metrics, of a whole validation, lack the one that is judged by."""
        if self.metric not in metrics:
            raise CannotContinue(
                f"loop.best_by {self.metric}: none of the held-out items has it, so nothing can be judged by it; hold "
                f"out items that do, or judge by {', '.join(metrics)}"
            )

    def out_of_patience(self, state: TrainState) -> str | None:
        """Return why the run should end early, or None."""
        if not self.options.patience or state.stale < self.options.patience:
            return None
        best = "" if state.best_value is None else f": the best was {state.best_value:.4g} at step {state.best_step}"
        return (
            f"stopped early at step {state.step}, because {self.metric} did not improve in {state.stale} validations "
            f"in a row{best}. To continue, raise loop.patience, and resume"
        )

    def load(self) -> None:
        """Load the best weights into the average, which is then what the run leaves.

        Raises: CannotContinue if no validation gave a finite value, so that there are none.
        """
        if not self.weights.is_file():
            raise CannotContinue(
                f"loop.export best: {self.metric} was not finite in any validation, so there are no best weights; "
                "resume with --loop.export last"
            )
        logger.info("the run leaves the weights of %s", self.folder)
        self.learner.average.load_state_dict(load_file(self.weights), strict=True)

    def _describe(self, folder: Path, state: TrainState) -> None:
        described = {"metric": state.best_metric, "step": state.best_step, "value": state.best_value}
        (folder / DESCRIBED).write_text(json.dumps(described, indent=1))

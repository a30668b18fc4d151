"""The training loop: data, state, trackers and checkpoints.

It knows Accelerate and no model; losses and optimisers are the step's.
"""

import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object, send_to_device
from torch import Tensor
from torch.utils.data import default_collate

from .checkpoints import Checkpointer, TrainState, find_checkpoint, list_checkpoints
from .config import LoopConfig, config_changes, save_config, to_plain
from .data import SampleStream, derive_seed, training_batches
from .learner import Learner
from .precision import resolve_precision
from .tracking import Progress, log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
_VALIDATION = 1 << 32  # keeps seeds of validation noise apart from those of training noise


class Items(Protocol):
    """Numbered samples: a map-style data set, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrainingStep(Protocol):
    """What a script gives to the loop."""

    @property
    def learners(self) -> Sequence[Learner]:
        """The networks that are trained."""
        ...

    def __call__(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute losses of one batch and call `learner.backward` on them. All randomness is drawn from `generator`.

        Returns: detached scalars to log.
        """
        ...

    def after_update(self, taken: bool) -> None:
        """Called after each optimiser step, with whether it was taken: for state that does not move by gradients."""
        ...

    def validate(self, item: Any, generator: torch.Generator) -> dict[str, float]:
        """Metrics of one held-out item, with the averaged weights."""
        ...

    def preview(self, items: list[Any]) -> "Figure":
        """A figure of a few held-out items, with the averaged weights."""
        ...


def make_accelerator(config: Any) -> Accelerator:
    """Accelerate as the loop needs it, for the run that `config` describes (`loop`, `output` and `resume` are read).

    Raises: ValueError if the output folder holds another run and nothing says to resume it; for sharded training (FSDP,
    DeepSpeed), which the moving average does not support; for a tracker that is unknown or not installed; for
    `loop.compile` on a machine that cannot.
    """
    options: LoopConfig = config.loop
    if config.resume is None and list_checkpoints(Path(config.output) / "checkpoints"):
        raise ValueError(f"{config.output} already holds a run; go on with --resume latest, or choose another --output")
    precision = resolve_precision(options.mixed_precision)
    trackers: list[Any] | None = list(options.trackers) or None
    # others wait while the main process reads, measures or draws; the default of ten minutes is short for large data
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=precision, log_with=trackers, project_dir=config.output, kwargs_handlers=[patience]
    )
    if absent := set(options.trackers) - {str(tracker) for tracker in accelerator.log_with}:
        raise ValueError(
            f"loop.trackers: {sorted(absent)} not installed; install it, or leave it out (--loop.trackers [] for none)"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type} is not supported; launch with plain data parallelism (--multi_gpu)"
        )
    if options.compile:
        check_compiler(accelerator.device)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    return accelerator


def check_compiler(device: torch.device) -> None:
    """Compile a line of code, before data are read. Raises: ValueError where torch.compile does not work."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton
        raise ValueError(
            f"loop.compile: torch.compile does not work here ({str(error).strip().splitlines()[0]}); install a C++ "
            "compiler such as g++, or set loop.compile: false"
        ) from error


class Loop:
    """One run.

    Args:
        config: the whole run's config: its `loop`, `optimizer`, `output` and `resume` are read; all of it is saved.
        step: losses and learners; its learners are prepared here.
        data: training samples; `collate` makes batches of them.
        validation: held-out items, whole, one at a time; may be empty.
    Raises: ValueError if the checkpoint to resume from is not one of this run, or is damaged.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Any,
        step: TrainingStep,
        data: Items,
        validation: Items,
        collate: Any = default_collate,
    ):
        self.accelerator, self.config, self.step = accelerator, config, step
        self.data, self.validation, self.collate = data, validation, collate
        self.options: LoopConfig = config.loop
        if accelerator.mixed_precision == "fp16" and len(step.learners) > 1:  # Accelerate has one loss scale for all
            raise ValueError("fp16 with a discriminator is not supported: use loop.mixed_precision bf16 or no")
        self.output = Path(config.output)
        for learner in step.learners:
            learner.prepare(accelerator, compile=self.options.compile)
        self.checkpoints = Checkpointer(
            accelerator, step.learners, self.output / "checkpoints", self.options.keep_checkpoints
        )
        self.state = self._begin_or_resume()

    def _begin_or_resume(self) -> TrainState:
        folder, saved = self.output / "checkpoints", self.output / "config.yaml"
        state = TrainState()
        path = find_checkpoint(self.config.resume, folder) if self.config.resume else None
        if path is not None:
            state = self.checkpoints.load(path)
            logger.info("resumed from %s at step %d", path, state.step)
            old = yaml.safe_load(saved.read_text()) if saved.is_file() else {}
            for change in config_changes(old, to_plain(self.config)):
                logger.warning("config changed since the run began: %s", change)
        elif self.config.resume:
            logger.info("nothing to resume in %s yet: starting at step 0", folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_config(self.config, saved)
        return state

    def run(self) -> dict[str, float]:
        """Train to `max_steps`, then validate. Returns the last validation's metrics, which are also in metrics.json.

        The caller ends with `accelerator.end_training()`, which closes the trackers and the process group.

        Raises: RuntimeError after `max_skipped` steps in a row with non-finite gradients.
        """
        accelerator, options, state = self.accelerator, self.options, self.state
        accelerator.init_trackers("logs")
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would add a folder per start; config.yaml is beside the run
                tracker.store_init_configuration(to_plain(self.config))
        accumulation = self.config.optimizer.gradient_accumulation
        stream = SampleStream(
            len(self.data),
            options.batch_size,
            seed=options.seed,
            start=state.samples,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        on_cpu = accelerator.device.type == "cpu"  # where loading takes the cores of the training itself
        workers = options.workers if options.workers is not None else 0 if on_cpu else 2
        batches = training_batches(
            self.data,
            stream,
            workers=workers,
            collate=self.collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        progress = Progress(options.max_steps, state.step, enabled=accelerator.is_main_process)
        totals: dict[str, Tensor] = {}
        counted: Counter[str] = Counter()
        waited, since = 0.0, time.perf_counter()
        while state.step < options.max_steps:
            losses: dict[str, Tensor] = {}
            for part in range(accumulation):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with self._gradients_stay_local(part < accumulation - 1):
                    for name, value in self.step(batch, self._generator(state.step, part)).items():
                        losses[name] = value / accumulation + losses.get(name, 0.0)
            finite = True
            for learner in self.step.learners:
                taken, norm = learner.update(state.step)
                finite, losses[f"grad_norm/{learner.name}"] = finite and taken, norm
            self.step.after_update(finite)
            state.step += 1
            state.samples += accumulation * options.batch_size * accelerator.num_processes
            self._count_skipped(finite)
            if finite:
                totals = {k: v + totals.get(k, 0.0) for k, v in losses.items()}
                counted.update(losses.keys())
            progress.update()
            if state.step % options.log_every == 0 and counted:
                self._report(progress, totals, counted, waited / (time.perf_counter() - since))
                totals, counted = {}, Counter()
                waited, since = 0.0, time.perf_counter()
            last = state.step == options.max_steps
            if not last and _due(state.step, options.validate_every):
                self.validate()
            if not last and _due(state.step, options.preview_every):
                self.preview()
            if last or _due(state.step, options.checkpoint_every):
                self.checkpoints.save(state)
        progress.close()
        metrics = self.validate()
        self.preview()
        if accelerator.is_main_process:
            (self.output / "metrics.json").write_text(
                json.dumps({"step": state.step, "skipped": state.skipped, **metrics}, indent=1)
            )
        return metrics

    def _generator(self, *position: int) -> torch.Generator:
        """Noise of one batch, from (seed, step, accumulation part, process)."""
        return self._seeded(self.options.seed, *position, self.accelerator.process_index)

    def _seeded(self, *numbers: int) -> torch.Generator:
        return torch.Generator(self.accelerator.device).manual_seed(derive_seed(*numbers))

    @contextlib.contextmanager
    def _gradients_stay_local(self, yes: bool):
        """Between accumulated batches, gradients are not exchanged between processes."""
        with contextlib.ExitStack() as stack:
            if yes:
                for learner in self.step.learners:
                    stack.enter_context(self.accelerator.no_sync(learner.model))
            yield

    def _count_skipped(self, finite: bool) -> None:
        state, limit = self.state, self.options.max_skipped
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        state.skipped += not finite
        if state.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"step {state.step}: gradients were not finite for {limit} steps in a row, so none of them was taken. "
                "Lower optimizer.learning_rate, or train with loop.mixed_precision: no; then --resume latest"
            )

    def _report(self, progress: Progress, totals: dict[str, Tensor], counted: Counter[str], data_wait: float) -> None:
        """Means over the steps since the last report and over processes, to the bar and the trackers.

        Args:
            counted: steps in which each value occurred; an adversary's begin later than the others.
            data_wait: part of the time, validation included, in which this process waited for its next batch.
        """
        means = {name: total.float() / counted[name] for name, total in totals.items()}
        means["data_wait"] = torch.tensor(data_wait, device=self.accelerator.device)
        reduced = self.accelerator.reduce(torch.stack(list(means.values())), reduction="mean")
        assert isinstance(reduced, Tensor)
        values = dict(zip(means, reduced.tolist(), strict=True))
        values["learning_rate"] = self.step.learners[0].optimizer.param_groups[0]["lr"]
        values["skipped_steps"] = self.state.skipped
        self.accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self.state.step)
        progress.report(self.state.step, values)

    def validate(self) -> dict[str, float]:
        """Mean of every metric over the held-out items, shared among the processes; empty without such items."""
        accelerator, items = self.accelerator, self.validation
        if not len(items):
            return {}
        sums: dict[str, float] = {}
        for index in range(accelerator.process_index, len(items), accelerator.num_processes):
            generator = self._seeded(self.options.seed, _VALIDATION, index)
            for name, value in self.step.validate(send_to_device(items[index], accelerator.device), generator).items():
                sums[name] = sums.get(name, 0.0) + value
        metrics: dict[str, float] = {}
        for part in gather_object([sums]):
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(items)
        accelerator.log({f"validation/{k}": v for k, v in metrics.items()}, step=self.state.step)
        text = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        logger.info("step %d  validation (%d items): %s", self.state.step, len(items), text)
        if not all(math.isfinite(v) for v in metrics.values()):
            logger.warning("step %d: a validation metric is not finite", self.state.step)
        return metrics

    def preview(self) -> None:
        """Draw the first few held-out items, on the main process."""
        count = min(self.options.previews, len(self.validation))
        if count and self.accelerator.is_main_process:
            items = [send_to_device(self.validation[i], self.accelerator.device) for i in range(count)]
            log_figure(self.accelerator, self.step.preview(items), "preview", self.state.step, self.output / "previews")
        self.accelerator.wait_for_everyone()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

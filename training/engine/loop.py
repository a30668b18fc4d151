"""The training loop: data, state, trackers and checkpoints. Losses and optimizers are those of the step."""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import default_collate

from cli.command import CannotContinue
from cli.stopping import (
    Stopped,
    finishing,
    now_finishing,
    stoppable,
)
from files.atomic import write_text
from files.documents import read_object

from .averages.snapshots import Snapshots
from .checkpoints import Checkpointer, TrainState, list_checkpoints
from .config import LoopConfig, RunConfig, config_changes, read_config, refuse_changes, save_config, to_plain
from .loss_spikes import SpikeWatch, StandstillWatch
from .processes import report_peer_failure, stop_asked_anywhere
from .sampling_order import ResumableBatchSampler, seeded, training_batches
from .step import Items, TrainingStep
from .tracking import Progress, RunFile
from .validation.best import BestWeights
from .validation.lengths import choose_length
from .validation.measurements import Measurements, is_due

logger = logging.getLogger("training")
_TRAINING = 1 << 33  # keeps the seeds of its noise apart from those of the data order, and of `Measurements`


class Loop:
    """The loop of a run.

    Args:
        config: the run's config. The loop reads the settings of `RunConfig`, and saves all of it.
        step: losses and learners; the loop prepares its learners.
        data, validation, collate, contents: see `Training`.
    Raises: ValueError if the checkpoint to resume from belongs to another run, or none is intact; and if config or
        contents differ from those of the run, unless `accept_changes` is set.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        step: TrainingStep,
        data: Items,
        validation: Items,
        collate: Any = default_collate,
        contents: Mapping[str, str] | None = None,
    ):
        self.accelerator, self.config, self.step = accelerator, config, step
        self.data, self.validation, self.collate = data, validation, collate
        self.options: LoopConfig = config.loop
        # Accelerate has one loss scale for all learners.
        if accelerator.mixed_precision == "fp16" and len(step.learners) > 1:
            raise ValueError("fp16 with a discriminator is not supported; use loop.mixed_precision bf16 or no")
        if self.options.fsdp and len(step.learners) > 1:  # the adaptive weight needs a full layer's gradient
            raise ValueError("loop.fsdp with a discriminator is not supported; set it to false")
        self.output, self.contents = Path(config.output), dict(contents or {})
        described = json.dumps(self.contents, sort_keys=True)
        if len(set(gather_object([described]))) > 1:
            raise ValueError(
                "the processes read different training volumes; do not write to the data while they start, and start "
                "again"
            )
        self.spikes, self.standstill = SpikeWatch(), StandstillWatch()
        self.best = BestWeights(accelerator, self.options, step, self.output, len(validation))
        for learner in step.learners:
            learner.prepare(accelerator, compile=self.options.compile, sharded=self.options.fsdp)
        folder, keep = self.output / "checkpoints", self.options.keep_checkpoints
        best = self.best.weights
        self.checkpoints = Checkpointer(accelerator, step.learners, folder, keep, self.options.fsdp, best)
        first, count = step.learners[0], self.options.ema_snapshots
        self.snapshots = Snapshots(accelerator, first, self.output, count, self.options.max_steps)
        self.state = self._begin_or_resume()
        self.snapshots.begin(self.state.step)
        self.progress = Progress(self.options.max_steps, self.state.step, enabled=accelerator.is_main_process)
        self.measurements = Measurements(
            accelerator, self.options, step, validation, self.output, self.best, self.state, self.progress
        )

    def _begin_or_resume(self) -> TrainState:
        saved, described = self.output / "config.yaml", self.output / "volumes.json"
        state = TrainState()
        if self.config.resume and list_checkpoints(self.checkpoints.folder):
            changes = config_changes(read_config(saved, type(self.config)), self.config) if saved.is_file() else {}
            if described.is_file():
                changes |= content_changes(read_object(described), self.contents)
            refuse_changes(changes, self.config.accept_changes)
        restored = self.checkpoints.resume(self.config.resume) if self.config.resume else None
        if restored is not None:
            path, state = restored
            self.best.begin(path, state)
            logger.info("resumed from %s at step %d", path, state.step)
        else:
            self.best.begin(None, state)
        if restored is None and self.config.resume:
            logger.info("nothing to resume in %s yet: starting at step 0", self.checkpoints.folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_config(self.config, saved)
            write_text(described, json.dumps(self.contents, indent=1))
        return state

    def run(self) -> dict[str, float]:
        """Train to `max_steps`, then validate. Returns the last validation's metrics, which metrics.json holds too.

        The caller ends with `accelerator.end_training()`, which closes the trackers and the process group. The first
        Ctrl-C, or SIGTERM, finishes the step, writes a checkpoint and ends the program with status 130 or 143; a second
        Ctrl-C ends it at once.

        Raises: CannotContinue after `max_skipped` steps in a row with non-finite gradients; if a checkpoint cannot be
            written; and if another process has ended or does not answer.
        """
        with report_peer_failure(self.accelerator), stoppable(), self.progress:
            return self._run()

    def _run(self) -> dict[str, float]:
        accelerator, options, state = self.accelerator, self.options, self.state
        for tracker in accelerator.trackers:
            if isinstance(tracker, RunFile):
                tracker.keep_until(state.step)
            elif tracker.name != "tensorboard":  # it would add a folder per start, and config.yaml has it
                tracker.store_init_configuration(to_plain(self.config))
        stream = ResumableBatchSampler(
            len(self.data),
            options.batch_size,
            seed=options.seed,
            start=state.samples,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        on_cpu = accelerator.device.type == "cpu"  # there, loading takes cores from the training
        workers = options.workers if options.workers is not None else 0 if on_cpu else 2
        batches = training_batches(
            self.data,
            stream,
            workers=workers,
            collate=self.collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        taken, before = state.step - state.skipped, [learner.checksums() for learner in self.step.learners]
        try:
            with finishing("the last step"):
                self._train(batches)
        finally:
            batches.close()  # ends the processes that load data
        self._warn_if_nothing_was_learned(state.step - state.skipped - taken, before)
        metrics = self.measurements.take(at_end=True)
        self.measurements.preview()
        if options.export == "best":
            self.best.load()
        lengths = {}
        if options.export == "posthoc":
            found, metrics = choose_length(self.measurements, self.snapshots)
            lengths = {"lengths": found}
        if accelerator.is_main_process:
            best = {"metric": state.best_metric, "step": state.best_step, "value": state.best_value}
            kept = {} if state.best_value is None else {"best": best, "export": options.export}
            text = json.dumps({"step": state.step, "skipped": state.skipped, **metrics, **kept, **lengths}, indent=1)
            write_text(self.output / "metrics.json", text)
        return metrics

    def _train(self, batches: Iterator[Any]) -> None:
        accelerator, options, state = self.accelerator, self.options, self.state
        accumulation = self.config.optimizer.gradient_accumulation
        totals: dict[str, Tensor] = {}
        counted: Counter[str] = Counter()
        self._catch_up()
        waited, since = 0.0, time.perf_counter()
        early = self.best.out_of_patience(state) if state.step < options.max_steps else None
        while state.step < options.max_steps and not early:
            now_finishing(f"step {state.step + 1}, then saving")
            losses: dict[str, Tensor] = {}
            parts: list[dict[str, Tensor]] = []
            for part in range(accumulation):
                start = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - start
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with self._gradients_stay_local(part < accumulation - 1):
                    parts.append(self.step(batch, self._generators(part)))
                    for name, value in parts[-1].items():
                        losses[name] = value / accumulation + losses.get(name, 0.0)
            finite = True
            for learner in self.step.learners:
                taken, norm = learner.update(state.step)
                finite, losses[f"grad_norm/{learner.name}"] = finite and taken, norm
            self.step.after_update(finite)
            state.step += 1
            self.measurements.begin_step()
            if not finite:
                self._warn_of_skipped(parts)
            state.samples += accumulation * options.batch_size * accelerator.num_processes
            self._count_skipped(finite)
            if self.snapshots.is_due(state.step):
                self.snapshots.take(state.step)
                state.snapshots.append(state.step)
            if finite:
                totals = {k: v + totals.get(k, 0.0) for k, v in losses.items()}
                counted.update(losses.keys())
            self.progress.update()
            if state.step % options.log_every == 0 and counted:
                self._report(totals, counted, waited / (time.perf_counter() - since))
                totals, counted = {}, Counter()
                waited, since = 0.0, time.perf_counter()
            last = state.step == options.max_steps
            if not last:
                self.measurements.take()
                early = self.best.out_of_patience(state)
            if not last and not early and is_due(state.step, options.preview_every):
                self.measurements.preview()
            stopped = stop_asked_anywhere(accelerator)
            if last or early or stopped or is_due(state.step, options.checkpoint_every):
                now_finishing(f"the checkpoint of step {state.step}")
                written = self.checkpoints.save(state)
                # A signal that came meanwhile needs no second checkpoint.
                stopped = stopped or stop_asked_anywhere(accelerator)
                if stopped:
                    logger.warning("%s: wrote %s; --resume latest continues from there", stopped.name, written)
                    accelerator.end_training()
                    raise Stopped(128 + stopped)
        if early:
            logger.info("%s", early)

    def _catch_up(self) -> None:
        """Make the validation that an uninterrupted run would have made at the step of the checkpoint: a signal may
        have cut it short, or the run is longer now. Raises: Stopped if a signal comes again."""
        if 0 < self.state.step < self.options.max_steps:
            self.measurements.take()
            if stopped := stop_asked_anywhere(self.accelerator):
                self.accelerator.end_training()
                raise Stopped(128 + stopped)

    def _warn_if_nothing_was_learned(self, steps: int, before: Sequence[tuple[int, int]]) -> None:
        """Warn if weights or loss did not move. `before`: the learners' checksums at the start."""
        moved = {}
        for learner, (weights, average) in zip(self.step.learners, before, strict=True):
            now = learner.checksums()
            moved[learner.name] = (now[0] != weights, now[1] != average)
        for fault in self.standstill.verdict(steps, moved, adversarial=len(self.step.learners) > 1):
            logger.warning("%s", fault)

    def _generators(self, part: int) -> list[torch.Generator]:
        """Return a generator per sample of this process's batch, seeded by (seed, number of the sample in the run): one
        process with the global batch gets the same noise as several with parts of it."""
        size, seed, accelerator = self.options.batch_size, self.options.seed, self.accelerator
        first = self.state.samples + (part * accelerator.num_processes + accelerator.process_index) * size
        return [seeded(accelerator.device, seed, _TRAINING, number) for number in range(first, first + size)]

    @contextlib.contextmanager
    def _gradients_stay_local(self, local: bool):
        """Do not exchange gradients between processes until the last accumulated batch."""
        with contextlib.ExitStack() as stack:
            if local:
                for learner in self.step.learners:
                    stack.enter_context(self.accelerator.no_sync(learner.model))
            yield

    def _warn_of_skipped(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Warn of a skipped step, with the samples of this process whose losses are not finite. In fp16 only losses
        count, because its loss scale makes gradients infinite now and then."""
        wrong = [part for part, losses in enumerate(parts) if not all(v.isfinite().all() for v in losses.values())]
        if not wrong and self.accelerator.mixed_precision == "fp16":
            return
        what, parts_of = ("loss", wrong) if wrong else ("gradient", range(len(parts)))
        names = ", ".join(name for part in parts_of for name in self._names(part))
        logger.warning("step %d: skipped, because its %s is not finite. Its samples: %s", self.state.step, what, names)

    def _names(self, part: int) -> list[str]:
        """Return the samples of this process's batch number `part` of the step, by name if the data have names."""
        options, processes = self.options, self.accelerator.num_processes
        start = self.state.samples + part * processes * options.batch_size
        order = {"seed": options.seed, "process": self.accelerator.process_index, "processes": processes}
        keys = next(iter(ResumableBatchSampler(len(self.data), options.batch_size, start=start, **order)))
        names = getattr(self.data, "names", None)
        return [f"sample {index}" if names is None else names[index] for _, index in keys]

    def _count_skipped(self, finite: bool) -> None:
        state, limit = self.state, self.options.max_skipped
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        state.skipped += not finite
        if state.skipped_in_a_row >= limit:
            raise CannotContinue(
                f"step {state.step}: gradients were not finite for {limit} steps in a row, so none of these was taken. "
                "Lower optimizer.learning_rate, or set loop.mixed_precision: no; then --resume latest "
                "--accept_changes true"
            )

    def _report(self, totals: dict[str, Tensor], counted: Counter[str], data_wait: float) -> None:
        """Report means over processes and over the steps since the last report, to the bar and the trackers.

        Args:
            counted: steps in which each value occurred; those of a discriminator start late.
            data_wait: fraction of the time, validation included, that this process waited for its next batch.
        """
        means = {name: total.float() / counted[name] for name, total in totals.items()}
        means["data_wait"] = torch.tensor(data_wait, device=self.accelerator.device)
        reduced = self.accelerator.reduce(torch.stack(list(means.values())), reduction="mean")
        assert isinstance(reduced, Tensor)
        values = dict(zip(means, reduced.tolist(), strict=True))
        spike = self.spikes(values["loss"]) if "loss" in values else None
        if "loss" in values:
            self.standstill.note(values["loss"])
        for fault in [*([spike] if spike else []), *self.step.review(values)]:
            logger.warning("step %d: %s", self.state.step, fault)
        values["learning_rate"] = self.step.learners[0].optimizer.param_groups[0]["lr"]
        values["skipped_steps"] = self.state.skipped
        self.accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self.state.step)
        self.progress.report(self.state.step, values)


def content_changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return how the training volumes differ from those the run was started with, by name."""
    changes = {f"volume {name}": "is missing now" for name in old.keys() - new.keys()}
    changes |= {f"volume {name}": "is new" for name in new.keys() - old.keys()}
    other = "has other voxels or conditions"
    changes |= {f"volume {name}": other for name in old.keys() & new.keys() if old[name] != new[name]}
    return dict(sorted(changes.items()))

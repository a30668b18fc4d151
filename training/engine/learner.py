"""A network in training: its optimizer, learning rate, gradient clipping and moving average.

A training step has one learner, or several (a generator and a discriminator, each with its own optimizer).
"""

import copy
import logging
import math
import zlib
from collections.abc import Sequence
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from .averages.power import STORED, MovingAverage
from .config import OptimizerConfig, RunConfig
from .muon import Muon, is_kernel
from .sharding import local, shard, whole, whole_weights

logger = logging.getLogger("training")
Model = TypeVar("Model", bound=nn.Module)


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step`, from 0: linear warm-up, then half a cosine to `final_lr_ratio` at
    `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)


class Learner(Generic[Model]):
    """A network with everything that trains it.

    The network goes by four names:
        network: the bare network that is trained. Its weights are sharded under `loop.fsdp`.
        model: Accelerate's wrapper of it. A step calls it to compute losses, so that gradients are averaged over
            processes.
        ema.module: the moving average of `network`, sharded as it is.
        tracked: power-function averages of `network` by their lengths, sharded as it is, for `averages.snapshots`.
        average: the moving average with full weights, which is validated and saved: `ema.module`, or, if that is
            sharded, a copy that `gather_average` fills.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        config: OptimizerConfig,
        *,
        ema_decay: float,
        max_steps: int,
        ema_length: float | None = None,
        tracked: Sequence[float] = (),
    ):
        self.name, self.config, self.max_steps = name, config, max_steps
        self.network = model
        self.model: Any = model
        self.ema = MovingAverage(model, ema_decay, ema_length)
        self.tracked = {length: MovingAverage(model, 0.0, length) for length in tracked}
        self.optimizer: Any = self._make_optimizer()
        self._full_average: nn.Module | None = None  # only if the average is sharded
        self._is_gathered = False
        self.updates = 0

    def _make_optimizer(self) -> Muon:
        config, parameters = self.config, [p for p in self.network.parameters() if p.requires_grad]
        kernels = {id(p) for p in parameters if config.algorithm == "muon" and is_kernel(p)}
        decay = config.weight_decay
        groups = [
            {"params": [p for p in parameters if id(p) in kernels], "weight_decay": decay, "muon": True},
            {"params": [p for p in parameters if p.ndim > 1 and id(p) not in kernels], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # biases and norm scales
        ]
        # `lr` as set here is never used: update() sets that of the step, so the schedule has no state of its own.
        return Muon(
            [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )

    @property
    def average(self) -> Model:
        """The network with averaged weights, in evaluation mode; if it is sharded, call `gather_average` first."""
        return self.ema.module if self._full_average is None else self._full_average  # pyright: ignore[reportReturnType]

    def gather_average(self) -> None:
        """Gather a sharded average, until the next update. Collective."""
        if self._full_average is not None and not self._is_gathered:
            self._full_average.load_state_dict(whole_weights(self.ema.module))
            self._full_average.to(self.accelerator.device)
            self._is_gathered = True

    def prepare(self, accelerator: Accelerator, *, compile: bool = False, sharded: bool = False) -> None:
        """Move to the accelerator's device and wrap for mixed precision and several processes.

        Args:
            compile: torch.compile the network in place, without a wrapper, so that names in checkpoints do not change.
                The average is not compiled: validation and previews code whole volumes of any shape. With `dynamic`
                shapes inductor (torch 2.13, CPU) fails on the U-Net and specializes on them anyway.
            sharded: shard weights, gradients, optimizer state and average among the processes
                (training/engine/sharding.py).
        """
        self.accelerator = accelerator
        if sharded:
            self._full_average = copy.deepcopy(self.ema.module)
            forward = accelerator.autocast()(self.network.forward)  # as Accelerate does without sharding
            self.network.forward = convert_outputs_to_fp32(forward)
            for module in (self.network, self.ema.module, *(one.module for one in self.tracked.values())):
                shard(module, accelerator)
            self.optimizer = self._make_optimizer()  # of the sharded weights
            weights = list(self.network.parameters())
            held, total = sum(w.numel() for w in local(weights)), sum(w.numel() for w in weights)
            logger.info("%s is sharded: this process holds %d of %d weights", self.name, held, total)
            self.model.train()
            return
        for average in (self.ema, *self.tracked.values()):
            average.module.to(accelerator.device)
        if compile:
            self.network.compile(dynamic=False)
        self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        self.model.train()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, divided by the number of accumulated batches."""
        self.accelerator.backward(loss / self.config.gradient_accumulation)

    def update(self, step: int) -> tuple[bool, Tensor]:
        """Clip the gradient, take an optimizer step and update the average.

        Returns: whether the step was taken, and the gradient's norm before clipping. A gradient that is not finite
        changes only fp16's loss scale.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.config.max_grad_norm or math.inf  # 0: no clipping
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        finite = bool(torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.max_steps, self.config)
        if finite:
            self.optimizer.step()
            self.updates += 1
            self.ema.update(self.network, self.updates)
            for average in self.tracked.values():
                average.update(self.network, self.updates)
            if self._is_gathered:
                self._release_average()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers fp16's loss scale after the overflow
        self.optimizer.zero_grad(set_to_none=True)
        return finite, norm.to(self.accelerator.device)  # without any gradient it is on the CPU

    @torch.no_grad()
    def checksums(self) -> tuple[int, int]:
        """Return checksums of the trained weights, and of the average, that this process holds: equal only if no bit
        moved."""
        trained = {name for name, weight in self.network.named_parameters() if weight.requires_grad}
        checksums = []
        for module in (self.network, self.ema.module):
            parts = local(weight for name, weight in module.named_parameters() if name in trained)
            bits = (part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in parts)
            checksums.append(reduce(lambda crc, part: zlib.crc32(part, crc), bits, 0))
        return checksums[0], checksums[1]

    def _release_average(self) -> None:
        """Free the gathered average, which an update has made outdated."""
        assert self._full_average is not None
        self._full_average.to("cpu")
        self._is_gathered = False


def run_learner(name: str, model: Model, config: RunConfig) -> Learner[Model]:
    """Return the learner of the network that a run leaves, with the optimizer and the averages of its config."""
    loop = config.loop
    return Learner(
        name,
        model,
        config.optimizer,
        ema_decay=loop.ema_decay,
        ema_length=loop.ema_length,
        max_steps=loop.max_steps,
        tracked=STORED if loop.ema_snapshots else (),
    )

"""One network that is being trained: its optimizer, learning rate, gradient clipping and moving average.

A training step owns one learner, or several (a generator and a discriminator, each with its own optimizer).
"""

import copy
import logging
import math
import zlib
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from training.config import OptimizerConfig

from .ema import MovingAverage
from .muon import Muon, is_kernel
from .sharding import local, shard, whole, whole_weights

logger = logging.getLogger("training")
Model = TypeVar("Model", bound=nn.Module)


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then half a cosine to `final_lr_ratio` at `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)


class Learner(Generic[Model]):
    """A network with all that trains it.

    `model` is what a step calls to compute losses: Accelerate's wrapper, so gradients are averaged over processes.
    `average` is the network that is validated and saved.
    """

    def __init__(self, name: str, model: Model, config: OptimizerConfig, *, ema_decay: float, max_steps: int):
        self.name, self.config, self.max_steps = name, config, max_steps
        self.network = model
        self.model: Any = model
        self.ema = MovingAverage(model, ema_decay)
        self.optimizer: Any = self._make_optimizer()
        self._whole: nn.Module | None = None  # where the average is divided, a network to put it together in
        self._gathered = False
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
        """The bare network with averaged weights, in evaluation mode; where it is divided, as `gather` put it together."""
        return self.ema.module if self._whole is None else self._whole  # pyright: ignore[reportReturnType]

    def gather(self) -> None:
        """Put a divided average together, until the next update. Called by every process, before it is used."""
        if self._whole is not None and not self._gathered:
            self._whole.load_state_dict(whole_weights(self.ema.module))
            self._whole.to(self.accelerator.device)
            self._gathered = True

    def prepare(self, accelerator: Accelerator, *, compile: bool = False, sharded: bool = False) -> None:
        """Move to the accelerator's device and wrap for mixed precision and several processes.

        Args:
            compile: torch.compile the network, in place: no wrapper, so no name in a checkpoint changes. The average
            stays as it is: validation and previews code whole volumes of any shape. With `dynamic` shapes inductor
            (torch 2.13, CPU) fails on the U-Net and specializes on them anyway.
            sharded: divide weights, gradients, optimizer state and average among the processes (training/engine/sharding.py).
        """
        self.accelerator = accelerator
        if sharded:
            self._whole = copy.deepcopy(self.ema.module)
            forward = accelerator.autocast()(self.network.forward)  # what Accelerate does without sharding
            self.network.forward = convert_outputs_to_fp32(forward)
            for module in (self.network, self.ema.module):
                shard(module, accelerator)
            self.optimizer = self._make_optimizer()  # of the divided weights
            weights = list(self.network.parameters())
            mine, all_of_it = sum(one.numel() for one in local(weights)), sum(one.numel() for one in weights)
            logger.info("%s is divided: this process holds %d of %d weights", self.name, mine, all_of_it)
            self.model.train()
            return
        self.ema.module.to(accelerator.device)
        if compile:
            self.network.compile(dynamic=False)
        self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        self.model.train()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, divided by the number of accumulated batches."""
        self.accelerator.backward(loss / self.config.gradient_accumulation)

    def update(self, step: int) -> tuple[bool, Tensor]:
        """Clip and take one optimizer step and one of the average.

        Returns: whether the step was taken, and the gradient's norm before clipping. A gradient that is not finite
        changes nothing but fp16's loss scale.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.config.max_grad_norm or math.inf  # 0: none
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        finite = bool(torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.max_steps, self.config)
        if finite:
            self.optimizer.step()
            self.updates += 1
            self.ema.update(self.network, self.updates)
            self._release()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers fp16's loss scale after the overflow
        self.optimizer.zero_grad(set_to_none=True)
        return finite, norm.to(self.accelerator.device)  # of no gradients at all it is on the CPU

    @torch.no_grad()
    def checksums(self) -> tuple[int, int]:
        """Of what this process holds of the trained weights, and of the average: equal only if no bit of them moved."""
        trained = {name for name, weight in self.network.named_parameters() if weight.requires_grad}
        found = []
        for module in (self.network, self.ema.module):
            parts = local(weight for name, weight in module.named_parameters() if name in trained)
            bits = (part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in parts)
            found.append(reduce(lambda crc, part: zlib.crc32(part, crc), bits, 0))
        return found[0], found[1]

    def _release(self) -> None:
        """The average has moved on: what `gather` put together is of no use any more."""
        if self._whole is not None and self._gathered:
            self._whole.to("cpu")
            self._gathered = False

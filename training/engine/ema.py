"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn

from .sharding import local


class MovingAverage:
    """A copy of `model` whose parameters follow it slowly. Buffers are copied (a codebook is already an average).

    The decay warms up as min(decay, (1 + n) / (10 + n)) with the number of updates n, so that a short run, too, forgets the
    random start. It depends on n only: the weights are the only state.

    Args:
        model: the bare network, before Accelerate wraps it.
        decay: weight of the past per update; 0 makes the average equal to the model.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move toward `model`, whose `updates`-th optimizer step (counted from 1) was just taken."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(local(self.module.parameters()), local(model.parameters()), 1.0 - decay)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(current)

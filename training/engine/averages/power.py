"""Moving averages of weights, and averages of other lengths computed from stored ones (Karras et al. 2024, "Analyzing
and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).

A power-function average at update t weighs the weights at time tau by (g + 1) tau^g / t^(g + 1): its length is the
standard deviation of tau, relative to t, and does not change with t.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..sharding import local

STORED = (0.05, 0.1)  # lengths of the averages that are stored (section 3.2)


def power_of(length: float) -> float:
    """Return the power g of an average whose weights grow as t^g over the steps t, and whose standard deviation over t
    is `length` times the steps: length^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, section 3.1)."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class MovingAverage:
    """A copy of `model` whose parameters follow it slowly. Buffers are copied (a codebook is already an average).

    The decay warms up as min(decay, (1 + n) / (10 + n)) with the number of updates n, so that a short run, too, forgets
    the random start. With a `length` it is (1 - 1 / n)^(g + 1) (Karras et al. 2024, section 3.1), whose average spans
    the same part of every run. Both depend on n only: the weights are the only state.

    Args:
        model: the bare network, before Accelerate wraps it.
        decay: weight of the past per update; 0 makes the average equal to the model.
        length: relative length, in place of `decay`, see `power_of`.
    """

    def __init__(self, model: nn.Module, decay: float, length: float | None = None):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.power = decay, None if length is None else power_of(length)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move toward `model`, whose `updates`-th optimizer step (counted from 1) was just taken."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        if self.power is not None:
            decay = (1 - 1 / updates) ** (self.power + 1)
        torch._foreach_lerp_(local(self.module.parameters()), local(model.parameters()), 1.0 - decay)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(current)


def overlaps(
    times: Sequence[float], powers: Sequence[float], other_times: Sequence[float], other_powers: Sequence[float]
) -> np.ndarray:
    """Return the inner products (n, m) of n power functions with m others, each with its time t and its power g: the
    integral over tau of their product (Algorithm 3)."""
    t, g = (np.asarray(values, np.float64)[:, None] for values in (times, powers))
    u, h = (np.asarray(values, np.float64)[None] for values in (other_times, other_powers))
    ratio = np.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) * ratio / ((g + h + 1) * np.maximum(t, u))


def coefficients(times: Sequence[float], lengths: Sequence[float], time: float, length: float) -> np.ndarray:
    """Return how much of each stored average adds up to the one of another length, nearest in least squares over the
    time of the training (Algorithm 3). They sum to 1, so that weights that never moved stay.

    Args:
        times, lengths: of the stored averages: their update, counted from 1, and their length.
        time, length: of the one that is wanted.
    """
    powers, power = [power_of(one) for one in lengths], power_of(length)
    count = len(times)
    system, right = np.zeros((count + 1, count + 1)), np.ones(count + 1)
    system[:count, :count] = overlaps(times, powers, times, powers) * time
    right[:count] = overlaps(times, powers, [time], [power])[:, 0] * time
    system[count, :count] = system[:count, count] = 1  # the Lagrange multiplier of the sum
    return np.linalg.lstsq(system, right, rcond=None)[0][:count]

"""The moving average of a length relative to the run: its weights by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from training.engine.averages.power import MovingAverage, power_of


def weights_after(steps: int, length: float) -> np.ndarray:
    """The weight of each step in the average: step i alone has a 1 in place i."""
    model = nn.Linear(steps, 1, bias=False).double()
    average = MovingAverage(model, 0.5, length)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.zero_()[0, step - 1] = 1
        average.update(model, step)
    return average.module.weight[0].numpy()


@pytest.mark.parametrize("length", [0.05, 0.15])
def test_the_average_spans_the_same_part_of_every_run(length):
    for steps in (200, 1000):
        weights, places = weights_after(steps, length), np.arange(1, steps + 1) / steps
        assert weights.sum() == pytest.approx(1)  # nothing of the random start is left
        power = power_of(length)
        expected = places**power / (places**power).sum()
        assert np.abs(weights - expected).sum() < 0.1 * 200 / steps + 0.02
        spread = np.sqrt((weights * (places - (weights * places).sum()) ** 2).sum())
        assert spread == pytest.approx(length, rel=0.05)


def test_the_power_of_a_length():
    """sqrt((g + 1) / (g + 3)) / (g + 2) by hand: 1 / sqrt(12) of a plain mean, g = 0."""
    for power in (0.5, 6.94, 16.97):
        assert power_of(((power + 1) / (power + 3)) ** 0.5 / (power + 2)) == pytest.approx(power, rel=1e-6)

"""The training loop of the small networks: AdamW under a one-cycle schedule."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

OnStep = Callable[[int, float], None]  # called with the step, counted from 1, and its loss


def fit(
    network: nn.Module,
    batch_loss: Callable[[], Tensor],
    *,
    iterations: int,
    learning_rate: float,
    weight_decay: float,
    on_step: OnStep | None = None,
) -> None:
    """Train a network in place. `batch_loss` samples a batch and returns its loss.

    Gradients are clipped to a norm of 1. A step with a gradient that is not finite is skipped.
    """
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations)
    for step in range(1, iterations + 1):
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite():
            optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())


def brightened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale and shift the intensities of each image (B, C, X, Y, Z) at random: gain 0.9 to 1.1, shift -0.05 to 0.05."""
    gain = 1 + 0.2 * (torch.rand(len(images), 1, 1, 1, 1, generator=generator) - 0.5)
    shift = 0.1 * (torch.rand(len(images), 1, 1, 1, 1, generator=generator) - 0.5)
    return images * gain + shift

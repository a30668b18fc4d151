"""Muon for convolution kernels, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest semi-orthogonal matrix, so that every
direction of the matrix learns at the same rate. Compare with `--optimizer.algorithm adamw`.
"""

from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal matrix near `matrix` (rows, columns): its singular values are brought near 1.

    A quintic Newton-Schulz iteration whose coefficients make small singular values grow fast and leave all of them
    within about 0.7 to 1.2 (Jordan et al. 2024); that is enough for an update's direction and needs matrix products
    only. Every iterate is a polynomial of the Gram matrix times `matrix`, so the iteration runs on the small Gram
    matrix and touches the long side twice instead of ten times. In float32.
    """
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / wide.norm().clamp_min(1e-7)
    gram = wide @ wide.T
    product = identity = torch.eye(len(gram), device=gram.device)
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    result = product @ wide
    return result if matrix.shape[0] <= matrix.shape[1] else result.T


def is_kernel(parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a hidden convolution; the first and the last have few channels on a
    side."""
    return parameter.ndim > 2 and parameter[0, 0].numel() > 1 and min(parameter.shape[:2]) > 8


class Muon(torch.optim.AdamW):
    """AdamW, except for the parameter groups with `"muon": True`, whose parameters are updated by Muon with Nesterov
    momentum `betas[0]`.

    Muon's update is scaled by 0.4 * sqrt(max(rows, columns)), about the size of AdamW's (Liu et al. 2025, section 2.2,
    use 0.2), so that both groups share one learning rate and one schedule.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own looks for its `step` in every parameter's state

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if not group.get("muon"):
                continue
            momentum = group["betas"][0]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(momentum).add_(parameter.grad)
                direction = (parameter.grad + momentum * state["momentum"]).flatten(1)
                update = orthogonalise(direction).to(parameter.dtype).view(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.4 * group["lr"] * max(direction.shape) ** 0.5)
        return loss

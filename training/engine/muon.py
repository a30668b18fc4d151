"""Muon for convolution kernels, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest semi-orthogonal matrix, so that every
direction of the matrix learns at the same rate. Compare with `--optimizer.algorithm adamw`.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import divided_as, whole


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the semi-orthogonal matrices near `matrices` (..., rows, columns), whose singular values are near 1.

    A quintic Newton-Schulz iteration whose coefficients make small singular values grow fast and leave all of them
    within about 0.7 to 1.2 (Jordan et al. 2024); that is enough for an update's direction and needs matrix products
    only. Every iterate is a polynomial of the Gram matrix times the matrix, so the iteration runs on the small Gram
    matrix and touches the long side twice instead of ten times. In float32.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.float().mT if tall else matrices.float()
    gram = wide @ wide.mT
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-14)  # of the Frobenius norm
    gram = gram / square
    product = identity = torch.eye(gram.shape[-1], device=gram.device)
    for step in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product if step else factor
        if step < steps - 1:
            gram = factor @ gram @ factor
    result = (product * square.rsqrt()) @ wide
    return result.mT if tall else result


def is_kernel(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the kernel of a hidden convolution; the first and the last have few channels on one
    side."""
    return parameter.ndim > 2 and parameter.shape[2:].numel() > 1 and min(parameter.shape[:2]) > 8


class Muon(torch.optim.AdamW):
    """AdamW, except for the parameter groups with `"muon": True`, whose parameters are updated by Muon with Nesterov
    momentum `betas[0]`.

    Muon's update is scaled by 0.4 * sqrt(max(rows, columns)), about the size of AdamW's (Liu et al. 2025, section 2.2,
    use 0.2), so that both groups share one learning rate and one schedule.

    The momentum of a sharded kernel is sharded too; its direction is gathered, and every process orthogonalizes it.
    """

    def __setstate__(self, state: Mapping[str, object]) -> None:
        torch.optim.Optimizer.__setstate__(
            self, dict(state)
        )  # AdamW's own looks for its `step` in every parameter's state

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._update_kernels(group)
        return loss

    def _update_kernels(self, group: Mapping[str, Any]) -> None:
        """Take Muon's step. Kernels of the same shape are orthogonalized together."""
        same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for kernel in group["params"]:
            if kernel.grad is not None:
                same_shape[kernel.shape].append(kernel)
        rate, decay, momentum = group["lr"], group["weight_decay"], group["betas"][0]
        for kernels in same_shape.values():
            gradients: list[Any] = [kernel.grad for kernel in kernels]
            for kernel in kernels:
                if "momentum" not in self.state[kernel]:
                    self.state[kernel]["momentum"] = torch.zeros_like(kernel)
            momenta = [self.state[kernel]["momentum"] for kernel in kernels]
            torch._foreach_mul_(momenta, momentum)
            torch._foreach_add_(momenta, gradients)
            directions = torch._foreach_add(gradients, momenta, alpha=momentum)
            # columns in the order (x, y, z, channel), in which channels_last_3d stores them: any order gives one result
            stacked = torch.stack([whole(direction).movedim(1, -1) for direction in directions])
            updates = orthogonalize(stacked.flatten(2)).view(stacked.shape).movedim(-1, 2)
            scale = 0.4 * max(len(kernels[0]), kernels[0][0].numel()) ** 0.5
            torch._foreach_mul_(kernels, 1 - rate * decay)
            changes = [
                divided_as(update, kernel) for update, kernel in zip(updates.to(kernels[0].dtype), kernels, strict=True)
            ]
            torch._foreach_add_(kernels, changes, alpha=-rate * scale)

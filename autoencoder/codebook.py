"""A codebook learned by moving averages (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019).

It is float32 under autocast, and in a model that is loaded in another type (`torch_dtype`); `.to(dtype)` casts it too,
and diffusers warns of that. `forward` changes nothing: the training step calls `update` once per optimizer step, with
the latents of all its batches and processes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

DISTANCE_BYTES = 1 << 26  # of the distances held at a time; more is not faster


class Codebook(nn.Module):
    """`num_codes` vectors of `channels` numbers; all state is in buffers, so checkpoints and averages carry it.

    Args:
        decay: weight of the past in the moving averages.
        dead_below: a code that fewer latents than this chose, on the moving average of an update, is moved to a latent
            chosen at random.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(self, num_codes: int, channels: int, decay: float = 0.99, dead_below: float = 0.1):
        super().__init__()
        if num_codes < 2 or not 0 <= decay < 1 or dead_below < 0:
            raise ValueError(
                f"a codebook needs two codes or more (got {num_codes}), a decay in [0, 1) (got {decay}) and "
                f"dead_below of zero or more (got {dead_below})"
            )
        self.decay, self.dead_below = decay, dead_below
        self.register_buffer("codes", torch.randn(num_codes, channels))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents (B, C, h, w, d) to their nearest codes, of the same shape, and the codes' indices (B, h, w, d).

        The gradient of the codes is passed to the latents unchanged (straight-through, van den Oord et al. 2017, sec.
        3.2).
        """
        cells = latents.movedim(1, -1)
        indices = self.nearest(cells.reshape(-1, cells.shape[-1])).view(cells.shape[:-1])
        quantized = self.codes[indices].movedim(-1, 1).to(latents.dtype)
        return quantized + (latents - latents.detach()), indices  # exactly the codes, in any precision

    @torch.no_grad()
    def nearest(self, cells: Tensor) -> Tensor:
        """Return the index of the nearest code of each latent, (N, C) to (N,). Latents are searched in parts, so memory
        stays flat.
        """
        with torch.autocast(cells.device.type, enabled=False):
            codes = self.codes.float()
            offset = 0.5 * (codes**2).sum(1)  # |z - e|^2 / 2 = z^2 / 2 - z e + e^2 / 2, without z^2 / 2
            part = max(DISTANCE_BYTES // (4 * len(codes)), 1)
            found = [(offset - some.float() @ codes.T).argmin(1) for some in cells.split(part)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=cells.device)

    @torch.no_grad()
    def update(
        self,
        cells: Tensor,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor] = lambda cells: cells,
    ) -> None:
        """Move the codes toward the latents that chose them; the first call sets them to latents chosen at random.

        Args:
            cells: (N, C) latents inside the field of view.
            generator: on the CPU, the same on every process.
            gather: returns the latents of all processes from those of one, in the same order everywhere, so that all
                processes have the same codebook.
        """
        cells = gather(cells.float())
        if not len(cells):
            return
        if not self.initialized:
            self.codes.copy_(self._draw(cells, len(self.codes), generator))
            self.counts.fill_(1.0)
            self.sums.copy_(self.codes)
            self.initialized.fill_(True)
        indices = self.nearest(cells)
        chosen = torch.zeros_like(self.counts).index_add_(0, indices, torch.ones_like(cells[:, 0]))
        total = torch.zeros_like(self.sums).index_add_(0, indices, cells)
        self.counts.lerp_(chosen, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        self.codes.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
        dead = self.counts < self.dead_below
        if count := int(dead.sum()):
            self.codes[dead] = self._draw(cells, count, generator)
            self.counts[dead] = 1.0
            self.sums[dead] = self.codes[dead]

    @staticmethod
    def _draw(cells: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` latents chosen at random, none twice if there are enough; repeated ones are moved apart a
        little.
        """
        order = torch.cat([torch.randperm(len(cells), generator=generator) for _ in range(-(-count // len(cells)))])
        drawn = cells[order[:count].to(cells.device)]
        apart = torch.randn(drawn.shape, generator=generator).to(drawn) * 1e-2 * cells.std(0, correction=0)
        apart[: len(cells)] = 0
        return drawn + apart


def code_statistics(indices: Tensor, num_codes: int) -> dict[str, Tensor]:
    """Measure how codes are used, as scalars: "perplexity" (effective number of codes), "usage" (the fraction that
    occurs at all) and "bits_per_cell" (entropy: what an ideal coder without context would need).
    """
    return count_statistics(torch.bincount(indices.flatten(), minlength=num_codes))


def count_statistics(counts: Tensor) -> dict[str, Tensor]:
    """Compute `code_statistics` from how often each code is used, (codes,)."""
    p = counts.float()
    p = p / p.sum().clamp_min(1)
    entropy = -torch.xlogy(p, p).sum()
    return {"perplexity": entropy.exp(), "usage": (p > 0).float().mean(), "bits_per_cell": entropy / math.log(2)}

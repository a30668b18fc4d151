"""A label map folded to the latent grid, losslessly, and its embedding. Axes: labels (B, X, Y, Z), ids (B, h, w, d, r)
with r = sx * sy * sz.

Space-to-depth of the one-hot mask followed by a 1x1x1 convolution is a linear map of a vector with one 1 per voxel. The
same map is the sum of one embedding per voxel, indexed by (label, position in the latent voxel): an `EmbeddingBag` on
integers. So the one-hot mask is never built. Med-DDPM's channel concatenation (Dorjsembe et al. 2024), lifted into
latent space.
"""

import torch
from torch import Tensor, nn

from autoencoder.layers import Stride
from volumes import PADDING

DENSE_ELEMENTS = 1 << 24  # up to 64 MiB of ones and zeros are built to embed a mask


def fold_mask(labels: Tensor, stride: Stride, num_labels: int) -> Tensor:
    """Map label indices (B, X, Y, Z), `PADDING` outside the field of view, to ids (B, X/sx, Y/sy, Z/sz, r), int32.

    id 0 is padding (its embedding is zero, like an all-zero one-hot); `label * r + place + 1` is a label at one place
    in its latent voxel.
    Raises: ValueError for labels outside 0..num_labels-1 and for sides that are not multiples of the stride.
    """
    if any(n % s for n, s in zip(labels.shape[1:], stride, strict=True)):
        raise ValueError(
            f"mask of {tuple(labels.shape[1:])} voxels: every side must be a multiple of the stride {stride}; pad it "
            "first"
        )
    if labels.numel() and (int(labels.min()) < PADDING or int(labels.max()) >= num_labels):
        wrong = sorted(set(labels.unique().tolist()) - set(range(PADDING, num_labels)))
        raise ValueError(
            f"the mask holds label indices {wrong}, the model knows 0 to {num_labels - 1} (and {PADDING} for padding)"
        )
    (sx, sy, sz), (nx, ny, nz) = stride, (n // s for n, s in zip(labels.shape[1:], stride, strict=True))
    cells = labels.reshape(-1, nx, sx, ny, sy, nz, sz).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    places = cells.shape[-1]
    ids = cells.to(torch.int32, copy=True).mul_(places)  # in place: a mask may have billions of voxels
    ids += torch.arange(1, places + 1, dtype=torch.int32, device=labels.device)
    return ids.masked_fill_(cells == PADDING, 0)


def unfold_mask(ids: Tensor, stride: Stride) -> Tensor:
    """Invert `fold_mask`: map ids (B, h, w, d, r) to label indices (B, X, Y, Z), int32."""
    b, nx, ny, nz, places = ids.shape
    labels = torch.where(ids == 0, PADDING, (ids - 1) // places)
    labels = labels.reshape(b, nx, ny, nz, *stride).permute(0, 1, 4, 2, 5, 3, 6)
    return labels.reshape(b, nx * stride[0], ny * stride[1], nz * stride[2])


def cells_inside(ids: Tensor) -> Tensor:
    """Map ids (B, h, w, d, r) to boolean (B, 1, h, w, d): True for latent voxels with at least one voxel inside the
    field of view.
    """
    return (ids != 0).any(-1).unsqueeze(1)


class _Bag(nn.EmbeddingBag):
    """nn.EmbeddingBag in sum mode. In ids (N, r), 0 is padding and any other id occurs at most once per row."""

    def forward(self, ids: Tensor) -> Tensor:
        if len(ids) * len(self.weight) > DENSE_ELEMENTS:
            return super().forward(ids)
        # few labels: one product is several times faster than the bag, on a CPU, there and back
        present = self.weight.new_zeros((len(ids), len(self.weight))).scatter_(1, ids.long(), 1)
        present[:, 0] = 0
        return present @ self.weight


class FoldedMaskEmbedding(nn.Module):
    """Maps ids (B, h, w, d, r) to (B, width, h, w, d): the sum over a latent voxel of one learned vector per (label,
    position).
    """

    def __init__(self, num_labels: int, places: int, width: int):
        super().__init__()
        self.table = _Bag(num_labels * places + 1, width, mode="sum", padding_idx=0)
        with torch.no_grad():  # unit variance after the sum over a cell; the padding row stays zero
            self.table.weight[1:].normal_(std=places**-0.5)
            self.table.weight[0].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.table(ids.flatten(0, 3))
        return embedded.unflatten(0, ids.shape[:4]).permute(0, 4, 1, 2, 3)

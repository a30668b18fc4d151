"""A label map folded to the latent grid, losslessly, and its embedding. Axes: labels (B, X, Y, Z), ids (B, h, w, d, r)
with r = sx * sy * sz. `PADDING` marks voxels outside the field of view, `UNKNOWN` those whose label is not known.

Space-to-depth of the one-hot mask followed by a 1x1x1 convolution is a linear map of a vector with one 1 per voxel. The
same map is the sum of one embedding per voxel, indexed by (label, position in the latent voxel): an `EmbeddingBag` on
integers. So the one-hot mask is never built. Med-DDPM's channel concatenation (Dorjsembe et al. 2024), lifted into
latent space.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoencoder.layers import Stride
from volumes import PADDING, UNKNOWN

UNKNOWN_REFUSED = (
    f"the mask holds voxels whose label is unknown ({UNKNOWN}), and this model was trained on whole masks; give them a "
    "label, or train a model that takes such masks: model.partial_masks: 0.3, with --init_from PIPELINE/unet to start "
    "from this one"
)
DENSE_ELEMENTS = 1 << 24  # up to 64 MiB of ones and zeros are built to embed a mask


def fold_mask(labels: Tensor, stride: Stride, num_labels: int, *, partial: bool = False) -> Tensor:
    """Map label indices (B, X, Y, Z), `PADDING` outside the field of view, to ids (B, X/sx, Y/sy, Z/sz, r), int32.

    id 0 is padding (its embedding is zero, like an all-zero one-hot); `label * r + place + 1` is a label at one place
    in its latent voxel. `UNKNOWN` is folded like a label after the last one.

    Args:
        partial: whether the model takes masks with `UNKNOWN` voxels (the U-Net's `takes_partial_masks`).
    Raises: ValueError for labels outside 0..num_labels-1 and for sides that are not multiples of the stride.
    """
    if any(n % s for n, s in zip(labels.shape[1:], stride, strict=True)):
        raise ValueError(
            f"mask of {tuple(labels.shape[1:])} voxels: every side must be a multiple of the stride {stride}; pad it "
            "first"
        )
    if (
        not torch.compiler.is_exporting()
        and labels.numel()
        and (int(labels.min()) < (UNKNOWN if partial else PADDING) or int(labels.max()) >= num_labels)
    ):
        _refuse(labels, num_labels, partial)
    (sx, sy, sz), (nx, ny, nz) = stride, (n // s for n, s in zip(labels.shape[1:], stride, strict=True))
    cells = labels.reshape(-1, nx, sx, ny, sy, nz, sz).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    places = cells.shape[-1]
    ids = cells.to(torch.int32, copy=True).mul_(places)  # in place: a mask may have billions of voxels
    if partial:
        ids.masked_fill_(cells == UNKNOWN, num_labels * places)
    ids += torch.arange(1, places + 1, dtype=torch.int32, device=labels.device)
    return ids.masked_fill_(cells == PADDING, 0)


def _refuse(labels: Tensor, num_labels: int, partial: bool) -> None:
    wrong = sorted(set(labels.unique().tolist()) - set(range(PADDING, num_labels)) - ({UNKNOWN} if partial else set()))
    if wrong == [UNKNOWN]:
        raise ValueError(UNKNOWN_REFUSED)
    raise ValueError(
        f"the mask holds label indices {wrong}, the model knows 0 to {num_labels - 1} (and {PADDING} for padding)"
    )


def unfold_mask(ids: Tensor, stride: Stride, num_labels: int | None = None) -> Tensor:
    """Invert `fold_mask`: map ids (B, h, w, d, r) to label indices (B, X, Y, Z), int32.

    Args:
        num_labels: that of `fold_mask`, for a mask with `UNKNOWN` voxels.
    """
    b, nx, ny, nz, places = ids.shape
    labels = torch.where(ids == 0, PADDING, (ids - 1) // places)
    if num_labels is not None:
        labels = labels.masked_fill(labels == num_labels, UNKNOWN)
    labels = labels.reshape(b, nx, ny, nz, *stride).permute(0, 1, 4, 2, 5, 3, 6)
    return labels.reshape(b, nx * stride[0], ny * stride[1], nz * stride[2])


def emphasis_of(ids: Tensor, weights: Mapping[int, float], num_labels: int) -> Tensor:
    """Map ids (B, h, w, d, r) to the weight of each latent voxel in the loss, float32 (B, 1, h, w, d): the largest
    weight of its voxels. So a lesion of two voxels counts in full wherever it lies: all channels of its latent voxel
    describe it. The mean over the 64 voxels of a stride of 4 would leave a thirtieth of its weight.

    Args:
        weights: of each label index that has one, above 0; all others and unknown have 1. Padding has none.
    """
    of_label = torch.ones(num_labels + 1, device=ids.device)
    for label, weight in weights.items():
        of_label[label] = weight
    of_id = torch.cat([of_label.new_zeros(1), of_label.repeat_interleave(ids.shape[-1])])
    return of_id[ids.long()].amax(-1).unsqueeze(1)


def cells_with(ids: Tensor, label: int) -> Tensor:
    """Map ids (B, h, w, d, r) to boolean (B, 1, h, w, d): True for latent voxels with at least one voxel of a label
    index.
    """
    return ((ids - 1) // ids.shape[-1] == label).any(-1).unsqueeze(1)


def hide_parts(
    ids: Tensor, stride: Stride, num_labels: int, rate: float, generator: torch.Generator | Sequence[torch.Generator]
) -> Tensor:
    """Make a part of some masks unknown, for training: ids (B, h, w, d, r) of `fold_mask`. Padding stays.

    A mask is changed with probability `rate`. Of those, a third loses a random box, a third all but a random box, and a
    third all voxels but those of random labels, each of which is kept with probability 1/2. (Hiding single labels would
    teach the model that a label has the shape of what is unknown.)

    Args:
        generator: one for the batch, or one for each sample.
    """
    sources = [generator] * len(ids) if isinstance(generator, torch.Generator) else generator
    hidden = [_hide(one, stride, num_labels, rate, source) for one, source in zip(ids, sources, strict=True)]
    return torch.stack(hidden)


def _hide(ids: Tensor, stride: Stride, num_labels: int, rate: float, generator: torch.Generator) -> Tensor:
    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device).to(ids.device)

    chance, kind = draw(2).tolist()
    if chance >= rate:
        return ids
    places = ids.shape[-1]
    of_place = torch.arange(places, dtype=ids.dtype, device=ids.device)
    if kind < 2 / 3:
        unknown = _box(ids.shape[:3], stride, draw(6), of_place)
        unknown = unknown if kind < 1 / 3 else ~unknown
    else:
        kept = draw(num_labels + 1) < 0.5  # the last one is the unknown voxels of the file
        unknown = ~kept[((ids - 1) // places).clamp_min(0).long()]
    return torch.where(unknown & (ids != 0), num_labels * places + of_place + 1, ids)


def _box(sides: Sequence[int], stride: Stride, uniform: Tensor, of_place: Tensor) -> Tensor:
    """Return a random box on the folded grid, bool (h, w, d, r), from six uniform numbers: its sides are a quarter to
    three quarters of the grid's, in voxels."""
    inside = torch.ones((*sides, len(of_place)), dtype=torch.bool, device=of_place.device)
    step = len(of_place)
    for axis, (side, size) in enumerate(zip(sides, stride, strict=True)):
        step //= size
        cells = torch.arange(side, device=of_place.device)[:, None] * size
        voxels = cells + of_place // step % size  # (side, r): each voxel's place along this axis
        width = (0.25 + 0.5 * uniform[2 * axis]) * side * size
        start = uniform[2 * axis + 1] * (side * size - width)
        within = (voxels >= start) & (voxels < start + width)
        inside &= within.view(*(side if one == axis else 1 for one in range(3)), -1)
    return inside


def cells_inside(ids: Tensor) -> Tensor:
    """Map ids (B, h, w, d, r) to boolean (B, 1, h, w, d): True for latent voxels with at least one voxel inside the
    field of view.
    """
    return (ids != 0).any(-1).unsqueeze(1)


class _Bag(nn.EmbeddingBag):
    """nn.EmbeddingBag in sum mode. In ids (N, r), 0 is padding and any other id occurs at most once per row."""

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or len(ids) * len(self.weight) > DENSE_ELEMENTS:
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

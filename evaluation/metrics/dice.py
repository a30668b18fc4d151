"""Overlap of two label maps."""

from torch import Tensor


def dice_per_volume(prediction: Tensor, target: Tensor, label: int) -> Tensor:
    """Dice coefficient of one label, `2 |A and B| / (|A| + |B|)`, for each volume of a batch (Dice 1945).

    `prediction` and `target` are (B, X, Y, Z) label indices; the result is (B,) float32 in [0, 1]. A volume where neither has the label
    scores 0, as in the reference protocol.
    """
    found, wanted = (prediction == label).flatten(1).float(), (target == label).flatten(1).float()
    return 2 * (found * wanted).sum(1) / (found.sum(1) + wanted.sum(1)).clamp_min(1)

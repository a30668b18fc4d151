"""Overlap of two label maps."""

from torch import Tensor


def dice_per_volume(prediction: Tensor, target: Tensor, label: int) -> Tensor:
    """Compute the Dice coefficient of one label, `2 |A and B| / (|A| + |B|)`, for each volume of a batch (Dice 1945).

    `prediction` and `target` are (B, X, Y, Z) label indices; the result is (B,) float32 in [0, 1]. If neither has the
    label, the volume scores 0, as in the reference protocol.
    """
    predicted, expected = (prediction == label).flatten(1).float(), (target == label).flatten(1).float()
    return 2 * (predicted * expected).sum(1) / (predicted.sum(1) + expected.sum(1)).clamp_min(1)

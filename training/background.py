"""Volumes whose background is empty (`data.empty_background`): the check of the training set, and the threshold that
tells the background of a decoded volume where no mask does."""

import numpy as np
import torch

from autoencoder import VolumeAutoencoder
from cli.live_bar import LiveBar
from volumes import VolumeDataset, pad_to_multiple
from volumes.foreground import background_index

MOST = 1e-3  # of a volume's background may have other intensities than the lowest: traces of a resampling
BINS = 400  # of decoded intensity, over [-1, 1]


def check_background(dataset: VolumeDataset) -> None:
    """Check that the background of every volume is as empty as the config says, if it does.

    Raises: ValueError naming the first volume that has other intensities there, and for one without a mask.
    """
    if not dataset.config.empty_background:
        return
    background = background_index(dataset.labels)
    for index, case in enumerate(dataset.cases):
        sample = dataset[index]
        if "mask" not in sample:
            raise ValueError(f"data: empty_background: {case.name} has no mask, which says where its background is")
        empty = sample["mask"] == background
        share = float((sample["image"].amax(0)[empty] > -1).float().mean()) if empty.any() else 0.0
        if share > MOST:
            raise ValueError(
                f"data: empty_background: {case.name} has other intensities than the lowest in {share:.1%} of the "
                "voxels that its mask calls background; remove the setting, give masks that cover all of the body, or "
                "intensity a lower end that is the background's value, such as {kind: window, low: 0, high: 255}"
            )


@torch.inference_mode()
def measure_background(dataset: VolumeDataset, vae: VolumeAutoencoder, *, progress: bool = True) -> float:
    """Return the decoded intensity in [-1, 1] that best tells background from the rest in reconstructions: the one
    with the largest Dice of what is not background. It is the largest of all channels that counts."""
    background, counts = background_index(dataset.labels), np.zeros((2, BINS))
    bar = LiveBar(range(len(dataset)), desc="measure background", unit="volume", disable=None if progress else True)
    for index in bar:
        sample = dataset[index]
        placement = pad_to_multiple(tuple(sample["image"].shape[1:]), vae.stride)
        padded = placement.apply(sample["image"], -1.0)[None].to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(padded, return_dict=False)[0].mean, return_dict=False)[0][0].float().cpu()
        brightest = placement.undo(decoded).amax(0).clamp(-1, 1)
        labels = sample.get("mask")
        assert labels is not None  # see check_background
        for place, inside in enumerate((labels == background, (labels >= 0) & (labels != background))):
            counts[place] += np.histogram(brightest[inside].numpy(), BINS, (-1, 1))[0]
    outside_above, inside_above = counts[:, ::-1].cumsum(1)[:, ::-1]  # at or above the lower edge of each bin
    dice = 2 * inside_above / np.maximum(outside_above + inside_above + counts[1].sum(), 1)
    best = 1 + int(dice[1:].argmax())  # not the lowest edge, below which there is nothing
    return -1 + 2 * best / BINS

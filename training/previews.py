"""Pictures of held-out volumes beside what a model makes of them, in the units of their files."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from volumes import LinearScale, merge_channels

from .splits import WholeVolume


def preview_case(
    item: WholeVolume,
    images: Mapping[str, Tensor],
    channels: Sequence[str],
    label_maps: bool = False,
    show_mask: bool = True,
) -> dict[str, object]:
    """Return a case for `volumes.slices_figure`.

    Args:
        images: (C, X, Y, Z) in [-1, 1] by name, such as "real" and "generated".
        channels: names of the C channels.
        label_maps: whether the channels are the labels of a label map, which is drawn instead.
    """
    arrays = {name: image.detach().float().cpu().numpy() for name, image in images.items()}
    shown = ("mask", "spacing", "axes") if show_mask else ("spacing", "axes")
    case = {"title": item["name"], **{key: item.get(key) for key in shown if key in item}}
    if label_maps:
        maps = {name: merge_channels(array, range(len(array) + 1)) for name, array in arrays.items()}
        return {**case, "images": maps, "labels": True}
    scales = [LinearScale(low, high) for low, high in item["scale"]]
    in_units = {
        name: np.stack([scale.invert(channel) for scale, channel in zip(scales, array, strict=True)])
        for name, array in arrays.items()
    }
    windows = dict(zip(channels, item["scale"], strict=True))
    return {**case, "images": in_units, "channels": list(channels), "windows": windows}

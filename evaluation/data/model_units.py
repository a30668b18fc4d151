"""Generated images as the model's training volumes were: in their boxes, in RAS+ order, at its spacing, in [0, 1]."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import MedVolumePipeline
from pipelines.volume_processor import SPACING_TOLERANCE
from volumes import VolumeError, label_channels, label_indices, read_mask, read_volume, resample
from volumes.description import DataDescription
from volumes.foreground import cut, image_box


def pipeline_of_boxes(pipe: MedVolumePipeline) -> MedVolumePipeline:
    """Return a pipeline with the same components that takes masks and shapes for the boxes of cases that were cut
    already, as those of a `VolumeDataset` are: it cuts none again (`data.crop`). It shows no progress bar."""
    boxes = MedVolumePipeline.from_pipe(pipe, data=replace(pipe.data, crop=None))
    boxes.set_progress_bar_config(disable=True)
    return boxes


def in_model_units(image: Any, data: DataDescription, *, crop: bool = False) -> np.ndarray:
    """Scale what the pipeline returns or writes to (C, X, Y, Z) float32 in [0, 1].

    Channels are scaled back by the scales in `data` (for kind percentile the medians over the training set), by which
    the pipeline converted them to file units. Statistics of the volume itself are not used.

    Args:
        image: a NIfTI image or path, or {channel: image} of all channels of the data.
        data: the pipeline's, see `volumes.describe`.
        crop: whether to cut it to the box of its foreground as the training volumes were (`data.crop`), where it has
            any; the box of a mask is not found in an image.
    Raises: ValueError for other channels than the data's.
    """
    known = list(data.image_labels)
    parts = list(image.values()) if isinstance(image, Mapping) else [image]
    if known:
        volume = read_mask(parts[0])
        channels = label_channels(label_indices(volume.array[0], known, name="the generated label map"), len(known))
    else:
        volumes = [read_volume(part) for part in parts]
        volume, channels = volumes[0], np.concatenate([one.array for one in volumes])
    names = list(image) if isinstance(image, Mapping) else list(data.channels)
    if names != list(data.channels) or len(channels) != len(names):
        raise VolumeError(f"a volume of {len(channels)} channels {names}, the model makes {list(data.channels)}")
    volume = volume.replace(channels)
    if crop and data.crop is not None and data.crop.channel is not None:
        box = image_box(volume.replace(channels[names.index(data.crop.channel)][None]), data.crop)
        volume = volume if box is None else cut(volume, box)
    if data.spacing is not None and not np.allclose(volume.spacing, data.spacing, rtol=SPACING_TOLERANCE, atol=0):
        volume = resample(volume, data.spacing)
    scales = [scale.linear for scale in data.intensity]
    scaled = [(scale.apply(channel) + 1) / 2 for scale, channel in zip(scales, volume.array, strict=True)]
    return np.stack(scaled).astype(np.float32)

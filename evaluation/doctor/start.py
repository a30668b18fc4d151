"""Find shipped weights that a training may start from: those for the same kind of images, whose layers fit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoencoder import VolumeAutoencoder
from autoencoder.weights import open_safetensors
from files.documents import read_object
from files.shipped import PREFIX, WEIGHTS
from volumes import DataConfig
from volumes.description import DataDescription

NEAR = 1.5  # ratio of voxel sizes, up to which details look alike


def advise_start(
    vae: VolumeAutoencoder,
    config: DataConfig,
    spacings: Sequence[Sequence[float]],
    weights: Path = WEIGHTS,
) -> str | None:
    """Return how to start an autoencoder's training from shipped weights, or None if none fit.

    Weights fit if they were trained on the same kind of images (scaled by percentiles or a window, label maps or not)
    with similar voxel sizes, and if every layer has the shape of the config's: others would stay as initialized.

    Args:
        vae: as the config builds it.
        spacings: (x, y, z) in mm of each volume.
        weights: folder of pipelines.
    """
    channels = len(config.channels)
    middle = np.median(np.array(config.spacing or spacings, np.float64).reshape(-1, 3), axis=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    for index in sorted(weights.glob("*/model_index.json")):
        data = DataDescription.from_json(read_object(index).get("data"))
        if not _alike(data, config, middle):
            continue
        path = index.parent / "vae"
        stored, described = _shapes(path), read_object(path / "config.json")
        shown = f"{PREFIX}{path.parent.name}/vae"
        same = f"if these are images of a similar kind (see weights/{path.parent.name}/README.md)"
        if stored == shapes and len(data.channels) in (1, channels):
            each = " (each channel separately, per_channel)" if vae.num_channel_groups > 1 else ""
            return f"start from shipped weights{each}: --init_from {shown}, {same}"
        if channels > 1 and vae.num_channel_groups == 1 and len(data.channels) == 1:
            latents = described["latent_channels"] * channels
            keys = ("channels", "encoder_blocks", "decoder_blocks")
            levels = ", ".join(f"{key}: {described[key]}" for key in keys)
            return (
                f"no shipped weights fit an autoencoder that mixes {channels} channels; with model: {{per_channel: "
                f"true, latent_channels: {latents}, {levels}}} it codes each separately, and can start from "
                f"--init_from {shown}, {same}"
            )
    return None


def _alike(data: DataDescription, config: DataConfig, spacing: np.ndarray) -> bool:
    """Return whether a pipeline's description of its training set is of such images."""
    if bool(data.image_labels) != bool(config.image_labels) or data.spacing is None:
        return False
    if config.image_labels and list(data.channels) != config.channels:
        return False
    kinds = {scale.kind for scale in data.intensity} | {config.scaling(channel).kind for channel in config.channels}
    ratio = np.abs(np.log(spacing / np.array(data.spacing, np.float64)))
    quantity = kinds == {"window"} and not config.image_labels  # HU of one set are not SUV of another
    return len(kinds) == 1 and not quantity and bool((ratio <= np.log(NEAR)).all())


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a saved model's tensors, by name, without reading them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes

"""Which shipped weights a training may start from: those of the same kind of images, whose layers fit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoencoder import VolumeAutoencoder
from autoencoder.weights import open_safetensors
from files.documents import read_object
from volumes import DataConfig
from volumes.description import DataDescription

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
NEAR = 1.5  # ratio of voxel sizes, up to which details look alike


def advise_start(
    vae: VolumeAutoencoder,
    config: DataConfig,
    spacings: Sequence[Sequence[float]],
    weights: Path = WEIGHTS,
) -> str | None:
    """Return how to start an autoencoder's training from shipped weights, or None where none fit.

    Weights fit if they are of the same kind of images (scaled by percentiles or a window, label maps or not), of near voxel
    sizes, and if every layer has the shape of the config's: others would stay as initialized.

    Args:
        vae: as the config builds it.
        spacings: (x, y, z) in mm of each volume.
        weights: folder of pipelines.
    """
    channels, middle = (
        len(config.channels),
        np.median(np.array(config.spacing or spacings, np.float64).reshape(-1, 3), axis=0),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    for index in sorted(weights.glob("*/model_index.json")):
        data = DataDescription.from_json(read_object(index).get("data"))
        if not _alike(data, config, middle):
            continue
        path = index.parent / "vae"
        stored, own = _shapes(path), read_object(path / "config.json")
        shown = path.relative_to(weights.parent)
        same = f"if these are images of a similar kind (see {shown.parent}/README.md)"
        if stored == shapes and len(data.channels) in (1, channels):
            each = " (each channel by itself, per_channel)" if vae.num_channel_groups > 1 else ""
            return f"start from shipped weights{each}: --init_from {shown}, {same}"
        if channels > 1 and vae.num_channel_groups == 1 and len(data.channels) == 1:
            latents = own["latent_channels"] * channels
            levels = f"channels: {own['channels']}, encoder_blocks: {own['encoder_blocks']}, decoder_blocks: {own['decoder_blocks']}"
            return (
                f"{channels} channels mixed by one autoencoder start from nothing that is shipped; with model: {{per_channel: true, "
                f"latent_channels: {latents}, {levels}}} it codes each by itself, and may start from --init_from {shown}, {same}"
            )
    return None


def _alike(data: DataDescription, config: DataConfig, spacing: np.ndarray) -> bool:
    """Whether a pipeline's description of its training set is of such images."""
    if bool(data.image_labels) != bool(config.image_labels) or data.spacing is None:
        return False
    if config.image_labels and list(data.channels) != config.channels:
        return False
    kinds = {scale.kind for scale in data.intensity} | {config.scaling(channel).kind for channel in config.channels}
    ratio = np.abs(np.log(spacing / np.array(data.spacing, np.float64)))
    quantity = kinds == {"window"} and not config.image_labels  # HU of one set are not SUV of another
    return len(kinds) == 1 and not quantity and bool((ratio <= np.log(NEAR)).all())


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a saved model's tensors, by name, without reading them."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found

"""Perceptual losses: the distance between a frozen network's features of a reconstruction and of its volume.

Axes: volumes (B, C, X, Y, Z) in [-1, 1], slices (B, C, ., .). Nothing is downloaded: the network is an autoencoder of
this package, or VGG-16 in a local file.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..base import VolumeAutoencoder
from ..layers import ChannelRMSNorm, Downsample, space_to_depth
from ..weights import PICKLES, stored_shapes
from .reconstruction import masked_mean


class EncoderFeatures(nn.Module):
    """Features of volumes: activations of a trained autoencoder's encoder at the end of each level.

    Args:
        vae: frozen here. An autoencoder of a single channel, or with per_channel, sees one channel at a time.
    """

    dims: int = 3

    def __init__(self, vae: VolumeAutoencoder):
        super().__init__()
        self.encoder, self.patch_size, self.stride = vae.encoder, vae.patch_size, vae.stride
        self.in_channels = vae.config["in_channels"] // vae.num_channel_groups
        self.eval().requires_grad_(False)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Map (B, C, X, Y, Z) to (B * C / in_channels, ., x, y, z), one per level, finest first."""
        x, features = space_to_depth(volumes.reshape(-1, self.in_channels, *volumes.shape[2:]), self.patch_size), []
        for layer in self.encoder:
            if isinstance(layer, (Downsample, ChannelRMSNorm)):  # one follows each level
                features.append(x)
            x = layer(x)
        return features


class VGG16Features(nn.Module):
    """Features of slices: VGG-16 (Simonyan & Zisserman 2015, Table 1, D) up to the last activation of each of its five
    blocks, as LPIPS takes them (Zhang et al. 2018). Each channel is processed separately, as a gray picture.

    Args:
        path: safetensors file with the weights under torchvision's names, `features.0.weight` and so on; those of the
            classifier may be there and are not read.
    Raises: ValueError for a pickle, and for a file that is damaged, missing or does not hold exactly these features.
    """

    dims: int = 2
    blocks = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    in_channels, smallest = 1, 16  # four times halved, a side of 16 is 1
    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path):
        super().__init__()
        with torch.device("meta"):  # draws no random numbers
            self.features = self._layers()
        self.load_state_dict(_read_features(Path(path), self.state_dict()), assign=True)
        # of ImageNet's colors in [0, 1], which these weights were trained with (torchvision)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def _layers(self) -> nn.Sequential:
        layers, before = [], 3
        for widths in self.blocks:
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers)

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Map (B, C, H, W) to (B * C, ., h, w), one per block, finest first."""
        gray = slices.reshape(-1, 1, *slices.shape[2:])
        x, features = ((gray + 1) / 2 - self.mean) / self.std, []  # one channel becomes three
        for layer in list(self.features)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                features.append(x)
            x = layer(x)
        return [*features, x]


def _read_features(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors `expected` from a safetensors file, in float32. Raises: ValueError unless it holds exactly
    those.
    """
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: is a pickle, which can run any code when it is read; only safetensors are loaded. If you trust "
            f"it, convert it: safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
            "'vgg16.safetensors')"
        )
    stored = {key: shape for key, shape in stored_shapes([path]).items() if not key.startswith("classifier.")}
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    if wrong := sorted(key for key in stored.keys() | shapes.keys() if stored.get(key) != shapes.get(key)):
        raise ValueError(
            f"{path}: is not VGG-16 with torchvision's names: {len(wrong)} tensors are missing, unknown or of another "
            f"shape, such as {wrong[0]}; give torchvision's vgg16 (without batch norm) as safetensors, or an "
            "autoencoder's folder"
        )
    return {key: value.float() for key, value in load_file(path).items() if key in expected}


def perceptual_loss(
    network: EncoderFeatures | VGG16Features, reconstruction: Tensor, image: Tensor, fov: Tensor
) -> Tensor:
    """Compute the squared distance of unit-normalized features, averaged inside the field of view and summed over
    levels (Zhang et al. 2018, Eq. 1, with all weights 1).

    Gradients reach the reconstruction only.

    Args:
        reconstruction, image: volumes (B, C, X, Y, Z), or slices (B, C, H, W) for a network with `dims` 2.
        fov: boolean, the same with one channel. A feature is inside if one of the voxels that it covers is.
    """
    with torch.no_grad():
        real = network(image)
    losses = []
    for ours, theirs in zip(network(reconstruction), real, strict=True):
        distance = ((_unit(ours) - _unit(theirs)) ** 2).sum(1, keepdim=True)
        pool = F.adaptive_max_pool3d if network.dims == 3 else F.adaptive_max_pool2d
        inside = pool(fov.float(), distance.shape[2:]).repeat_interleave(len(distance) // len(fov), 0)
        volumes = (len(fov), -1)  # or slices, whose channels belong together
        losses.append(masked_mean(distance.unflatten(0, volumes), inside.unflatten(0, volumes)))
    return torch.stack(losses).sum()


def _unit(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale features to length 1 over their channels (to nearly 0 where all are 0), in float32."""
    features = features.float()
    return features * torch.rsqrt((features**2).sum(1, keepdim=True) + eps)

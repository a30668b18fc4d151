"""MedDDPMUNet3D: the U-Net of Med-DDPM, written anew from its paper and from the tensors of its files.

Axes: latents (B, C, X, Y, Z), which are the voxels (`SpaceToDepth3D` with `patch_size: 1`); inside the network
(B, C, Z, Y, X), as in its training.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from cli.settings import PositiveInt, Range

from ..conditioning import ConditionSchema
from ..denoiser import LatentDenoiser
from ..objectives import MAX_SHIFT_VOXELS, check_shift
from ..scheduler_options import MAX_TIMESTEPS
from ..unet import LatentUNet3DOutput, crop_at_end, pad_at_end

if TYPE_CHECKING:
    from autoencoder import VolumeAutoencoder

    from ..completion import DataFacts

OURS = "RAS"  # orientation of our volumes
LONGEST_PERIOD = 1000.0  # of the time features, in steps


class MedDDPMResidualBlock(nn.Module):
    """Two 3x3x3 convolutions around a residual, with the time added between them (Ho et al. 2020)."""

    def __init__(self, in_channels: int, channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv3d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == channels else nn.Conv3d(in_channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time(F.silu(time))[:, :, None, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class _Attention(nn.Module):
    """Self-attention of one head over all voxels, added to its input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        voxels = self.norm(x).flatten(2)
        query, key, value = self.qkv(voxels).transpose(1, 2).chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return x + self.out(attended.transpose(1, 2)).unflatten(2, x.shape[2:])


class _Downsample(nn.Module):
    """A convolution that halves every side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Upsample(nn.Module):
    """Trilinear interpolation that doubles every side, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="trilinear"))


class MedDDPMUNet3D(LatentDenoiser):
    """The U-Net of Med-DDPM (Dorjsembe et al., "Conditional Diffusion Models for Semantic 3D Brain MRI Synthesis",
    2024): noisy voxels and one channel for each label of the mask, concatenated, to the noise (epsilon).

    Its architecture is that of Dhariwal & Nichol 2021, in 3-D. `interop` converts the weights.

    Args:
        in_channels, out_channels: channels of the volume.
        num_labels: labels of the mask, background included, which has no channel.
        channels: width of each level, finest first; each level but the first halves every side.
        num_res_blocks: residual blocks per level on the way down; on the way up there is one more.
        attention_levels: whether each level has attention. The middle always has.
        norm_num_groups: of GroupNorm.
        mask_low: value of a label's channel where the mask has another label; where it has this one it is 1.
        orientation: of the training volumes' arrays, as nibabel names it; volumes of ours are RAS.
        objective: what it predicts.
        train_steps: length of its noise schedule, the cosine one (Nichol & Dhariwal 2021).
        license: of the weights, where generated volumes must name it.
        shift_voxels: for flows only, so refused.
        subjects: records of the training subjects (`volumes.data.subjects`).
    Raises: ValueError unless there is one entry per level, and for `shift_voxels`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MedDDPMResidualBlock"]
    _repeated_blocks = ["MedDDPMResidualBlock"]
    mask_stride = (1, 1, 1)
    bound = 1.0  # it denoises voxels themselves, and its sampler clips to their range
    memory_format = torch.contiguous_format  # see MonaiUNet3D

    # Long: a third are its arguments, which diffusers saves as the config.
    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt = 1,
        num_labels: Annotated[int, Range(2, 1000)] = 3,
        channels: Sequence[PositiveInt] = (64, 64, 128, 192, 256),
        num_res_blocks: Sequence[PositiveInt] = (1, 1, 1, 1, 1),
        attention_levels: Sequence[bool] = (False, False, False, True, False),
        norm_num_groups: PositiveInt = 32,
        mask_low: Annotated[float, Range(-1.0, 0.0)] = -1.0,
        orientation: Literal["RAS", "LPS"] = "RAS",
        objective: Literal["epsilon"] = "epsilon",
        train_steps: Annotated[int, Range(2, MAX_TIMESTEPS)] = 250,
        license: str | None = None,
        shift_voxels: Annotated[int, Range(1, MAX_SHIFT_VOXELS)] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        check_shift(objective, shift_voxels)
        if not len(channels) == len(num_res_blocks) == len(attention_levels):
            raise ValueError(
                f"channels {channels}, num_res_blocks {num_res_blocks} and attention_levels {attention_levels} need "
                "one entry per level"
            )
        self.gradient_checkpointing = False
        self.stride = 2 ** (len(channels) - 1)
        time_width, groups = 4 * channels[0], norm_num_groups
        self.time_in = nn.Linear(channels[0], time_width)
        self.time_out = nn.Linear(time_width, time_width)

        def block(first: int, level: int) -> list[nn.Module]:
            attention = [_Attention(channels[level], groups)] if attention_levels[level] else []
            return [MedDDPMResidualBlock(first, channels[level], time_width, groups), *attention]

        # Every entry of `down` is a skip to one of `up`.
        down: list[list[nn.Module]] = [[nn.Conv3d(in_channels + num_labels - 1, channels[0], 3, padding=1)]]
        width, skips = channels[0], [channels[0]]
        for level, count in enumerate(num_res_blocks):
            if level:
                down.append([_Downsample(width)])
                skips.append(width)
            for _ in range(count):
                down.append(block(width, level))
                width = channels[level]
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                MedDDPMResidualBlock(width, width, time_width, groups),
                _Attention(width, groups),
                MedDDPMResidualBlock(width, width, time_width, groups),
            ]
        )
        up: list[list[nn.Module]] = []
        for level in reversed(range(len(channels))):
            for _ in range(num_res_blocks[level] + 1):
                up.append(block(width + skips.pop(), level))
                width = channels[level]
            if level:
                up[-1].append(_Upsample(width))
        self.down = nn.ModuleList(map(nn.ModuleList, down))
        self.up = nn.ModuleList(map(nn.ModuleList, up))
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv3d(width, out_channels, 3, padding=1)

    @classmethod
    def complete(
        cls, section: Mapping[str, Any], vae: "VolumeAutoencoder", data: "DataFacts", images: Mapping[str, slice]
    ) -> dict[str, object]:
        """Return a model section with the channels and labels.

        Raises: ValueError for an autoencoder that does not leave voxels as they are, for other channels or labels than
            the section has, and for classes, numbers and images, which this U-Net does not take.
        """
        if tuple(vae.stride) != cls.mask_stride:
            raise ValueError(f"{cls.__name__} denoises voxels: set vae to a SpaceToDepth3D with patch_size: 1")
        if data.classes or data.numbers or images:
            raise ValueError(
                f"{cls.__name__} takes a mask alone: remove data.classes, data.numbers and data.condition_channels"
            )
        channels = vae.config["latent_channels"]
        decided = {"in_channels": channels, "out_channels": channels, "num_labels": len(data.labels)}
        for name, value in decided.items():
            if section.get(name, value) != value:
                raise ValueError(f"model.{name} is {section[name]}, but the data makes it {value}; give data like its")
        return {**decided, **section}

    @property
    def condition_schema(self) -> ConditionSchema:
        """The conditions that this model knows: a mask, which training never dropped."""
        return ConditionSchema(mask=True)

    @apply_forward_hook
    def embed_mask(self, ids: Tensor) -> Tensor:
        """Map folded ids (B, X, Y, Z, 1) to the mask's channels (B, num_labels - 1, X, Y, Z). Padding is background."""
        label = ids[..., 0] - 1
        own = torch.arange(1, self.config["num_labels"], device=ids.device)
        inside = label[:, None] == own[:, None, None, None]
        return torch.where(inside, 1.0, self.config["mask_low"]).to(self.dtype)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, mask: Tensor | None = None, return_dict: bool = True
    ) -> LatentUNet3DOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: noisy voxels (B, in_channels, X, Y, Z). Sides that are not multiples of `stride` are padded with
                zeros, as training pads, and the result is cropped; pipelines generate multiples.
            timestep: (B,) or a scalar, 0 to `train_steps` - 1.
            mask: folded ids (B, X, Y, Z, 1) of `fold_mask`, or embedded (B, num_labels - 1, X, Y, Z).
        Raises: ValueError without a mask, and for one of another grid.
        """
        if mask is None:
            raise ValueError("this model is conditioned on a mask: pass one")
        mask = mask if mask.is_floating_point() else self.embed_mask(mask)
        sides = sample.shape[2:]
        if mask.shape[2:] != sides:
            raise ValueError(f"the mask is of {tuple(mask.shape[2:])} voxels, the latents are {tuple(sides)}")
        low, stride = self.config["mask_low"], (self.stride, self.stride, self.stride)
        x = torch.cat([pad_at_end(sample, stride), pad_at_end(mask.to(sample.dtype) - low, stride) + low], dim=1)
        time = self.time_out(F.silu(self.time_in(self._time_features(timestep, sample))))
        hidden, skips = self._turned(x), []
        for layers in self.down:
            hidden = self._run(layers, hidden, time)  # pyright: ignore[reportArgumentType]
            skips.append(hidden)
        hidden = self._run(self.middle, hidden, time)
        for layers in self.up:
            joined = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(layers, joined, time)  # pyright: ignore[reportArgumentType]
        predicted = self.conv_out(F.silu(self.norm_out(hidden)))
        predicted = crop_at_end(self._turned(predicted, back=True), sides)
        return LatentUNet3DOutput(sample=predicted) if return_dict else (predicted,)

    def _run(self, layers: Iterable[nn.Module], x: Tensor, time: Tensor) -> Tensor:
        for layer in layers:
            given = (x, time) if isinstance(layer, MedDDPMResidualBlock) else (x,)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, *given)  # pyright: ignore[reportOptionalCall]
            else:
                x = layer(*given)
        return x

    def _time_features(self, timestep: Tensor | float | int, sample: Tensor) -> Tensor:
        """Return cosines and sines of the timestep (B, channels[0]), with periods up to `LONGEST_PERIOD` 2 pi."""
        half = self.config["channels"][0] // 2
        steps = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float()
        exponents = torch.arange(half, device=sample.device, dtype=torch.float32) / half
        angles = steps[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(sample.dtype)

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Turn (B, C, X, Y, Z) in RAS order to (B, C, Z, Y, X) in the order of the training volumes, or back."""
        against = [axis for axis, end in enumerate(self.config["orientation"]) if end != OURS[axis]]
        if back:
            return x.permute(0, 1, 4, 3, 2).flip([2 + axis for axis in against]).contiguous()
        return x.flip([2 + axis for axis in against]).permute(0, 1, 4, 3, 2).contiguous()

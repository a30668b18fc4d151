"""LatentUNet3D: the denoiser. Axes: latents (B, C, h, w, d); any size of three latent voxels or more, odd ones
included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from autoencoder.layers import ChannelRMSNorm, Conv3d, Downsample, Stride, Upsample, as_stride
from cli.settings import (
    NonNegativeInt,
    PositiveInt,
    Range,
    ShareBelowOne,
)

from .attention import SelfAttention
from .condition_embedding import ConditionEmbedding
from .conditioning import ConditionSchema
from .denoiser import LatentDenoiser
from .folding import FoldedMaskEmbedding
from .images import image_columns
from .objectives import (
    FLOW_MAP,
    MAX_SHIFT_VOXELS,
    check_objective,
    check_shift,
    check_train_steps,
)
from .scheduler_options import MAX_TIMESTEPS

if TYPE_CHECKING:
    from autoencoder import VolumeAutoencoder

    from .completion import DataFacts


@dataclass
class LatentUNet3DOutput(BaseOutput):
    """`sample` (B, out_channels, h, w, d): what the objective predicts (velocity, noise, v, or average velocity)."""

    sample: Tensor


class TimeResidualBlock(nn.Module):
    """Two 3x3x3 convolutions around a residual, scaled and shifted by the time embedding (FiLM; Dhariwal & Nichol
    2021, Eq. 2), then attention."""

    def __init__(self, in_channels: int, channels: int, time_width: int, head_dim: int | None):
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels)
        self.conv1 = Conv3d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * channels)
        self.norm2 = ChannelRMSNorm(channels)
        self.conv2 = Conv3d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == channels else Conv3d(in_channels, channels, 1)
        self.attention = nn.Identity() if head_dim is None else SelfAttention(channels, head_dim)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None, None].chunk(2, dim=1)
        hidden = self.conv2(F.silu(self.norm2(hidden) * (1 + scale) + shift))
        return self.attention(self.skip(x) + hidden)


def pad_at_end(x: Tensor, stride: Stride) -> Tensor:
    """Zero-pad the far sides of (B, C, h, w, d) to multiples of the stride."""
    missing = [(n + s - 1) // s * s - n for n, s in zip(x.shape[2:], stride, strict=True)]
    if torch.compiler.is_exporting() or any(missing):  # a program of `interop` is of any size
        return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
    return x


def crop_at_end(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Cut the far sides of (B, C, h, w, d)."""
    h, w, d = sides
    if not torch.compiler.is_exporting():
        return x[:, :, :h, :w, :d]
    for axis, side in enumerate((h, w, d), start=2):  # a slice is traced either as cutting, or as not
        x = x.index_select(axis, torch.arange(side, device=x.device))
    return x


class LatentUNet3D(LatentDenoiser, AttentionMixin):
    """3-D U-Net (Ronneberger et al. 2015; Ho et al. 2020) over latents. It is conditioned on any of these: a mask
    folded to the latent grid, classes, numbers, and images (condition channels).

    Odd sizes are padded on the way down and cropped to the skip's size on the way up.

    Args:
        in_channels, out_channels: channels of the latents.
        channels: width of each level, finest first.
        strides: between levels, one integer or one per axis each.
        blocks: residual blocks on each level, on the way down and again on the way up.
        attention: whether each level's blocks end in self-attention over the whole grid.
        head_dim: width of an attention head.
        num_labels: labels of the conditioning mask, background included; 0 means no mask.
        mask_stride: voxels per latent voxel along each axis (the autoencoder's stride).
        mask_width: channels of the embedded mask.
        objective: what the output means, see `diffusion.objectives`; stored here because a scheduler must fit it.
        classes: values of each class that conditions the model, e.g. {"sex": ["F", "M"]}.
        numbers: mean and std of each number that conditions the model, e.g. {"age": {"mean": 50.0, "std": 18.0}}.
        images: latent channels of each image that conditions the model, e.g. {"ct": 6, "pet": 6}; see
            `diffusion.images`.
        shift_voxels: number of latent voxels at which timesteps are not shifted. Training and sampling shift them
            toward noise on larger grids, and toward the image on smaller ones (Esser et al. 2024, Eq. 23; see
            docs/large_latents.md). Default: no shift. For flows only; stored here for the same reason.
        train_steps: length of the schedule that v or eps is trained with; 1000 if absent. Stored here for the same
            reason.
        condition_dropout: how often training drops each condition, such as {"mask": 0.1, "sex": 0.2}; those that were
            never dropped cannot be guided (Ho & Salimans 2022).
        partial_masks: how often training makes a part of the mask unknown (`folding.hide_parts`). A model with this
            setting takes masks whose labels are known in part; 0 hides no more than the training masks do. Default: it
            takes whole masks only.
        subjects: records of the training subjects (`volumes.data.subjects`); train_ldm.py sets it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TimeResidualBlock"]
    _repeated_blocks = ["TimeResidualBlock"]  # of `compile_repeated_blocks`
    # diffusers hooks only modules that are called; these are lists of lists, and a module that `embed_mask` calls
    _group_offload_block_modules = ["down_blocks", "up_blocks", "mask_embedding"]
    # in float8 these two cost half of the whole error, and hold a twentieth of the weights (norms are never cast)
    _skip_layerwise_casting_patterns = ["conv_in", "conv_out"]

    # Long: a third are its arguments, which diffusers saves as the config and so must be named one by one.
    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 4,
        out_channels: PositiveInt = 4,
        channels: Sequence[PositiveInt] = (64, 160),
        strides: Sequence[PositiveInt | Sequence[PositiveInt]] = (2,),
        blocks: Sequence[PositiveInt] = (1, 2),
        attention: Sequence[bool] = (False, True),
        head_dim: PositiveInt = 32,
        num_labels: NonNegativeInt = 0,
        mask_stride: PositiveInt | Sequence[PositiveInt] = 4,
        mask_width: PositiveInt = 32,
        objective: str = "rectified_flow",
        condition_dropout: dict[str, ShareBelowOne] | None = None,
        classes: dict[str, list[str]] | None = None,
        numbers: dict[str, dict[str, Annotated[float, Range(-1e12, 1e12)]]] | None = None,
        images: dict[str, PositiveInt] | None = None,
        train_steps: Annotated[int, Range(2, MAX_TIMESTEPS)] | None = None,
        shift_voxels: Annotated[int, Range(1, MAX_SHIFT_VOXELS)] | None = None,
        partial_masks: ShareBelowOne | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        if not len(channels) == len(strides) + 1 == len(blocks) == len(attention):
            raise ValueError(
                f"channels {channels}, blocks {blocks} and attention {attention} need one entry per level, strides "
                f"{strides} one fewer"
            )
        check_objective(objective)
        check_train_steps(objective, train_steps)
        check_shift(objective, shift_voxels)
        if partial_masks is not None and not num_labels:
            raise ValueError(f"partial_masks {partial_masks}: this model has no mask condition; omit it")
        schema = self.condition_schema
        self.gradient_checkpointing = False
        level_strides = [as_stride(s) for s in strides]
        self.mask_stride = as_stride(mask_stride)
        time_width = 4 * channels[0]
        heads = [head_dim if on else None for on in attention]

        self.time_features = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], time_width)
        self.next_embedding = None
        if objective == FLOW_MAP:
            self.next_embedding = TimestepEmbedding(channels[0], time_width)
            nn.init.zeros_(self.next_embedding.linear_2.weight)  # a student predicts its teacher's velocity at first
            nn.init.zeros_(self.next_embedding.linear_2.bias)
        classes, numbers = classes or {}, numbers or {}
        self.condition_embedding = ConditionEmbedding(classes, numbers, time_width) if classes or numbers else None
        self.mask_embedding = (
            FoldedMaskEmbedding(num_labels + (partial_masks is not None), math.prod(self.mask_stride), mask_width)
            if num_labels
            else None
        )
        extra = (mask_width if schema.mask else 0) + len(schema.image_columns)
        self.conv_in = Conv3d(in_channels + extra, channels[0], 3, padding=1)

        def level(first: int, i: int) -> nn.ModuleList:
            widths = [first] + [channels[i]] * (blocks[i] - 1)
            return nn.ModuleList(TimeResidualBlock(w, channels[i], time_width, heads[i]) for w in widths)

        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(level(channels[i], i) for i in range(len(channels)))
        self.downsamplers = nn.ModuleList(
            Downsample(channels[i], channels[i + 1], level_strides[i]) for i in range(last)
        )
        self.upsamplers = nn.ModuleList(Upsample(channels[i + 1], channels[i], level_strides[i]) for i in range(last))
        self.up_blocks = nn.ModuleList(level(2 * channels[i], i) for i in range(last))
        self.norm_out = ChannelRMSNorm(channels[0])
        self.conv_out = Conv3d(channels[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    @classmethod
    def complete(
        cls, section: Mapping[str, Any], vae: "VolumeAutoencoder", data: "DataFacts", images: Mapping[str, slice]
    ) -> dict[str, object]:
        """Return a model section with the entries that autoencoder and data decide, see `complete_model`."""
        channels = vae.config["latent_channels"]
        decided = {
            "in_channels": channels,
            "out_channels": channels,
            "mask_stride": list(vae.stride),
            "num_labels": len(data.labels),
            "classes": data.classes or None,
            "numbers": {name: {"mean": stats.mean, "std": stats.std} for name, stats in data.numbers.items()} or None,
            "images": {name: own.stop - own.start for name, own in images.items()} or None,
        }
        for name, value in decided.items():
            given = section.get(name, value)
            known_numbers = name == "numbers" and given and value and set(given) == set(value)
            if given != value and not (name == "num_labels" and given == 0) and not known_numbers:
                raise ValueError(f"model.{name} is {given}, but autoencoder and data make it {value}; omit it")
        return {**decided, **section}

    def set_attention_backend(self, backend: str) -> None:
        """Set the attention backend as diffusers does, but for this model alone; diffusers also makes it the default of
        the whole process.

        Raises: ValueError for a backend that is unknown or not installed. A backend without a kernel for the device is
        reported when the model is called, as the model may be moved until then.
        """
        default = _AttentionBackendRegistry.get_active_backend()[0]
        try:
            super().set_attention_backend(backend)
        except RuntimeError as error:
            raise ValueError(f"attention backend {backend!r}: {error} Or use 'native'") from error
        finally:
            _AttentionBackendRegistry.set_active_backend(default)

    @property
    def takes_next_timestep(self) -> bool:
        """Whether it predicts the average velocity to a second time, `next_timestep`."""
        return self.next_embedding is not None

    @property
    def takes_partial_masks(self) -> bool:
        """Whether masks may hold `volumes.UNKNOWN`."""
        return self.config["partial_masks"] is not None

    @property
    def condition_schema(self) -> ConditionSchema:
        """The conditions that this model knows. Raises: ValueError as `ConditionSchema.from_config`."""
        return ConditionSchema.from_config(self.config)

    @apply_forward_hook
    def embed_mask(self, ids: Tensor) -> Tensor:
        """Embed folded ids (B, h, w, d, r) as the mask's channels (B, mask_width, h, w, d). Raises: ValueError for a
        model without masks.
        """
        if self.mask_embedding is None:
            raise ValueError("this model was trained without a mask condition; omit `mask`")
        return self.mask_embedding(ids)

    def _mask_channels(self, mask: Tensor | None, sample: Tensor) -> list[Tensor]:
        """Return the embedded mask, or zeros if it is absent; nothing for a model without masks."""
        if self.mask_embedding is None:
            if mask is not None:
                raise ValueError("this model was trained without a mask condition; omit `mask`")
            return []
        if mask is None:
            if not (self.config["condition_dropout"] or {}).get("mask"):
                raise ValueError("this model is conditioned on a mask: pass one")
            return [sample.new_zeros(len(sample), self.config["mask_width"], *sample.shape[2:])]  # of padding alone
        embedded = mask if mask.is_floating_point() else self.embed_mask(mask)
        if embedded.shape[2:] != sample.shape[2:]:
            raise ValueError(
                f"the mask is folded to {tuple(embedded.shape[2:])} cells, the latents are {tuple(sample.shape[2:])}"
            )
        return [embedded.to(sample.dtype)]

    def _image_channels(self, image: Tensor | None, sample: Tensor) -> list[Tensor]:
        """Return the images, or zeros if they are absent; nothing for a model without images."""
        images, rates = self.config["images"] or {}, self.config["condition_dropout"] or {}
        if not images:
            if image is not None:
                raise ValueError("this model was trained without image conditions; omit `image`")
            return []
        expected = (len(sample), len(image_columns(images)), *sample.shape[2:])
        if image is None:
            if always := sorted(name for name in images if not rates.get(name)):
                raise ValueError(f"this model was never trained without {', '.join(always)}: pass image (fold_images)")
            return [sample.new_zeros(expected)]
        if tuple(image.shape) != expected:
            raise ValueError(f"image is {tuple(image.shape)}, expected {expected} from fold_images")
        return [image.to(sample.dtype)]

    def _run(self, blocks: nn.ModuleList, x: Tensor, time: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, time)  # pyright: ignore[reportOptionalCall]
            else:
                x = block(x, time)
        return x

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        numbers: Tensor | None = None,
        image: Tensor | None = None,
        next_timestep: Tensor | float | int | None = None,
        return_dict: bool = True,
    ) -> LatentUNet3DOutput | tuple[Tensor]:
        """Predict the objective's target.

        Args:
            sample: noisy latents (B, in_channels, h, w, d).
            timestep: (B,) or a scalar, in the scheduler's units, 0 to `train_steps`.
            mask: folded ids (B, h, w, d, r) from `fold_mask`, or the result of `embed_mask`, (B, mask_width, h, w, d),
                so that a sampler embeds once and not at every step. Only for models with labels; optional if training
                dropped the mask at times.
            classes: int64 (B, n), the index of each class's value, -1 where absent; columns as in `condition_schema`.
            numbers: (B, m) in the units of `mean` and `std`, NaN where absent; columns as in `condition_schema`.
            image: the result of `fold_images`; optional if training dropped each image at times.
            next_timestep: (B,) or a scalar, in the same units, below `timestep`: where the step of a flow map ends.
        Raises: ValueError if the mask is missing, not wanted, or on another grid than the latents; the same for images;
            if classes or numbers are missing, not wanted, or have other columns; if `next_timestep` is missing or not
            wanted.
        """
        time = self._time(self._time_vector(timestep, next_timestep, sample), classes, numbers)
        extra = [*self._mask_channels(mask, sample), *self._image_channels(image, sample)]
        x = torch.cat([sample, *extra], dim=1) if extra else sample
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        x, skips = self._down(x, time)
        x = self._up(x, skips, time)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return LatentUNet3DOutput(sample=x) if return_dict else (x,)

    def _time_vector(
        self, timestep: Tensor | float | int, next_timestep: Tensor | float | int | None, sample: Tensor
    ) -> Tensor:
        """Embed the timestep, and the next one of a flow map, as one vector per sample."""

        def features(values: Tensor | float | int) -> Tensor:
            values = torch.as_tensor(values, device=sample.device).expand(sample.shape[0])
            return self.time_features(values).to(sample.dtype)

        time = self.time_embedding(features(timestep))
        if self.next_embedding is None:
            if next_timestep is not None:
                raise ValueError(f"a model of {self.config['objective']} has one timestep; omit `next_timestep`")
            return time
        if next_timestep is None:
            raise ValueError(f"a model of {FLOW_MAP} predicts a whole step: pass `next_timestep`, where it ends")
        return time + self.next_embedding(features(next_timestep))

    def _time(self, time: Tensor, classes: Tensor | None, numbers: Tensor | None) -> Tensor:
        """Add the classes and the numbers to the embedded time."""
        if self.condition_embedding is not None:
            time = time + self.condition_embedding(classes, numbers, time.dtype)
        elif classes is not None or numbers is not None:
            raise ValueError("this model was trained without classes and numbers; omit `classes` and `numbers`")
        return F.silu(time)

    def _down(self, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the way down. Returns the coarsest features, and those before each downsampling."""
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down_blocks):
            x = self._run(blocks, x, time)  # pyright: ignore[reportArgumentType]
            if i < len(self.downsamplers):
                skips.append(x)
                down: Downsample = self.downsamplers[i]  # pyright: ignore[reportAssignmentType]
                x = down(pad_at_end(x, down.stride))
        return x, skips

    def _up(self, x: Tensor, skips: list[Tensor], time: Tensor) -> Tensor:
        """Run the way up, cropped to the skips' sizes."""
        for i in reversed(range(len(self.up_blocks))):
            skip = skips.pop()
            x = torch.cat([crop_at_end(self.upsamplers[i](x), skip.shape[2:]), skip], dim=1)
            x = self._run(self.up_blocks[i], x, time)  # pyright: ignore[reportArgumentType]
        return x

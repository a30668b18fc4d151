"""MonaiUNet3D: MONAI's diffusion U-Net, as a model of ours. Axes: latents (B, C, h, w, d)."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor

from autoencoder.model import VolumeModel
from cli.settings import NonNegativeInt, PositiveFloat, PositiveInt

from .unet import LatentUNet3DOutput

REGIONS = 4  # MAISI's parts of the body: head and neck, chest, abdomen, lower body


class MonaiUNet3D(VolumeModel):
    """`monai.networks.nets.DiffusionModelUNet`, and MAISI's `DiffusionModelUNetMaisi`, which adds spacing and regions
    to it (Pinaya et al. 2022; Guo et al. 2024). The layers are MONAI's own; `interop` converts weights.

    Args:
        in_channels, out_channels: channels of the latents; conditions may be further input channels.
        channels: width of each level, finest first; each level but the first halves every side.
        num_res_blocks: residual blocks per level.
        attention_levels: whether each level has attention.
        num_head_channels: width of an attention head, per level.
        norm_num_groups, norm_eps: of GroupNorm.
        resblock_updown: whether residual blocks change the size, in place of convolutions.
        attention_output: whether self-attention ends in a linear layer (MONAI's include_fc).
        cross_attention_dim: width of `context`; None for a model without.
        transformer_num_layers: transformer blocks per attention; only with `cross_attention_dim`.
        num_class_embeds: number of classes; None for a model without.
        upcast_attention: whether attention is computed in float32.
        takes_spacing, takes_regions: whether it is conditioned on voxel size, and on the first and last region.
        license: of the weights, where generated volumes must name it.
    """

    _no_split_modules = ["DiffusionUNetResnetBlock"]
    _repeated_blocks = ["DiffusionUNetResnetBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 4,
        out_channels: PositiveInt = 4,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        num_res_blocks: Sequence[PositiveInt] = (2, 2, 2, 2),
        attention_levels: Sequence[bool] = (False, False, True, True),
        num_head_channels: Sequence[NonNegativeInt] = (0, 0, 32, 32),
        norm_num_groups: PositiveInt = 32,
        norm_eps: PositiveFloat = 1e-6,
        resblock_updown: bool = False,
        attention_output: bool = True,
        cross_attention_dim: PositiveInt | None = None,
        transformer_num_layers: PositiveInt = 1,
        num_class_embeds: PositiveInt | None = None,
        upcast_attention: bool = False,
        takes_spacing: bool = False,
        takes_regions: bool = False,
        license: str | None = None,
    ):
        super().__init__()
        if not len(channels) == len(num_res_blocks) == len(attention_levels) == len(num_head_channels):
            raise ValueError(
                f"channels {channels}, num_res_blocks {num_res_blocks}, attention_levels {attention_levels} and "
                f"num_head_channels {num_head_channels} need one entry per level"
            )
        self.network = DiffusionModelUNetMaisi(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            num_channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
            with_conditioning=cross_attention_dim is not None,
            transformer_num_layers=transformer_num_layers,
            cross_attention_dim=cross_attention_dim,
            num_class_embeds=num_class_embeds,
            upcast_attention=upcast_attention,
            include_fc=attention_output,
            include_top_region_index_input=takes_regions,
            include_bottom_region_index_input=takes_regions,
            include_spacing_input=takes_spacing,
        )
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        spacing: Tensor | None = None,
        top_region: Tensor | None = None,
        bottom_region: Tensor | None = None,
        return_dict: bool = True,
    ) -> LatentUNet3DOutput | tuple[Tensor]:
        """Predict what the original was trained to predict, in its own units and with its own sign.

        Args:
            sample: noisy latents (B, in_channels, h, w, d), multiples of 2 for each level but the first.
            timestep: (B,) or a scalar.
            context: (B, n, cross_attention_dim).
            class_labels: int64 (B,).
            spacing: (B, 3), voxel size in mm times 100.
            top_region, bottom_region: (B, 4), one-hot times 100.
        Raises: ValueError for a size that cannot be halved as often, and for a condition that is missing, not wanted,
            or of another shape.
        """
        stride = 2 ** (len(self.config["channels"]) - 1)
        if any(side % stride for side in sample.shape[2:]):
            raise ValueError(f"latents of {tuple(sample.shape[2:])}: every side must be a multiple of {stride}")
        self._check_condition("context", context, self.config["cross_attention_dim"])
        self._check_condition("class_labels", class_labels, 0 if self.config["num_class_embeds"] else None)
        self._check_condition("spacing", spacing, 3 if self.config["takes_spacing"] else None)
        regions = REGIONS if self.config["takes_regions"] else None
        self._check_condition("top_region", top_region, regions)
        self._check_condition("bottom_region", bottom_region, regions)
        predicted = self.network(
            sample,
            torch.as_tensor(timestep, device=sample.device).expand(len(sample)),
            context=context,
            class_labels=class_labels,
            top_region_index_tensor=top_region,
            bottom_region_index_tensor=bottom_region,
            spacing_tensor=spacing,
        )
        return LatentUNet3DOutput(sample=predicted) if return_dict else (predicted,)

    def _check_condition(self, name: str, value: Tensor | None, width: int | None) -> None:
        """Raise ValueError unless a condition is there as the model takes it: of `width` columns, 0 for none; None if
        the model does not take it."""
        if width is None and value is not None:
            raise ValueError(f"this model was trained without {name}; omit it")
        if width is not None and value is None:
            raise ValueError(f"this model is conditioned on {name}: pass it")
        if width and value is not None and value.shape[-1] != width:
            raise ValueError(f"{name} has {value.shape[-1]} columns; this model takes {width}")

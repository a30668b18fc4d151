"""MonaiControlNet3D: MAISI's ControlNet, by which a label map steers its U-Net. Axes: latents (B, C, h, w, d)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from torch import Tensor, nn

from autoencoder.layers import as_stride
from autoencoder.model import VolumeModel
from cli.settings import NonNegativeInt, PositiveFloat, PositiveInt, Range
from diffusion.conditioning import ConditionSchema
from diffusion.denoiser import CONTROLNET, LatentDenoiser
from diffusion.unet import LatentUNet3DOutput
from volumes import PADDING

from .unet import ControlResiduals, MonaiUNet3D, check_levels

if TYPE_CHECKING:
    from autoencoder import VolumeAutoencoder
    from diffusion.completion import DataFacts

BITS = 8  # of a label value, each a channel, the lowest first
LabelValue = Annotated[int, Range(0, 2**BITS - 1)]
OPTIONAL = 0.5  # as a rate of dropout: the U-Net alone was trained without masks; nothing reads the number itself
SAME = ("in_channels", "channels", "num_res_blocks", "num_class_embeds")  # in the configs of both networks


class MonaiControlNet3D(VolumeModel):
    """MAISI's `ControlNetMaisi` (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"; Guo
    et al. 2024): a copy of the U-Net's encoder that also sees the label map, and whose outputs are added to those of
    the U-Net's own. The layers are MONAI's; `interop` converts weights.

    Args:
        in_channels: channels of the latents.
        channels, num_res_blocks, attention_levels, num_head_channels, norm_num_groups, norm_eps, resblock_updown,
            attention_output, num_class_embeds, upcast_attention: those of the U-Net, see `MonaiUNet3D`.
        embedding_channels: widths of the convolutions by which the label map is embedded, finest first; each but the
            first halves every side.
        label_values: the values of the labels that it knows, rising. Masks hold their indices.
        license: of the weights, where generated volumes must name it.
    """

    _no_split_modules = ["DiffusionUNetResnetBlock"]
    _repeated_blocks = ["DiffusionUNetResnetBlock"]
    memory_format = torch.contiguous_format  # see `MonaiUNet3D`

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 4,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        num_res_blocks: Sequence[PositiveInt] = (2, 2, 2, 2),
        attention_levels: Sequence[bool] = (False, False, True, True),
        num_head_channels: Sequence[NonNegativeInt] = (0, 0, 32, 32),
        norm_num_groups: PositiveInt = 32,
        norm_eps: PositiveFloat = 1e-6,
        resblock_updown: bool = False,
        attention_output: bool = False,
        num_class_embeds: PositiveInt | None = None,
        upcast_attention: bool = False,
        embedding_channels: Sequence[PositiveInt] = (8, 32, 64),
        label_values: Sequence[LabelValue] = (0, 1),
        license: str | None = None,
    ):
        super().__init__()
        check_levels(channels, num_res_blocks, attention_levels, num_head_channels)
        if not embedding_channels or list(label_values) != sorted(set(label_values)) or not label_values:
            raise ValueError(
                f"embedding_channels {[*embedding_channels]}, label_values {[*label_values]}: give at least one of "
                "each, and the values in rising order, each once"
            )
        self.mask_stride = as_stride(2 ** (len(embedding_channels) - 1))
        network: Any = ControlNetMaisi(
            spatial_dims=3,
            in_channels=in_channels,
            num_res_blocks=num_res_blocks,
            num_channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
            num_class_embeds=num_class_embeds,
            upcast_attention=upcast_attention,
            conditioning_embedding_in_channels=BITS,
            conditioning_embedding_num_channels=embedding_channels,
            use_checkpointing=False,
            include_fc=attention_output,
        )
        self.embedding = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()  # label maps are embedded once, not at every step
        self.network = network

    @apply_forward_hook
    def embed_mask(self, labels: Tensor) -> Tensor:
        """Embed label indices (B, X, Y, Z) as (B, channels[0], h, w, d): the bits of their values, as eight channels,
        through the convolutions. Outside the field of view (`PADDING`) the value is 0.

        Raises: ValueError for indices that are not labels.
        """
        values = self.config["label_values"]
        low, high = int(labels.min()), int(labels.max())
        if low < PADDING or high >= len(values):
            raise ValueError(f"the mask holds label indices {low} to {high}, the ControlNet knows {len(values)} labels")
        table = torch.tensor([0, *values], dtype=torch.uint8, device=labels.device)
        bits = torch.tensor([1 << bit for bit in range(BITS)], dtype=torch.uint8, device=labels.device)
        channels = table[labels.long() - PADDING][:, None].bitwise_and(bits.view(-1, 1, 1, 1)) != 0
        return self.embedding(channels.to(self.dtype))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        mask: Tensor,
        class_labels: Tensor | None = None,
        conditioning_scale: float = 1.0,
    ) -> ControlResiduals:
        """Compute what is added to the U-Net's encoder.

        Args:
            sample: noisy latents (B, in_channels, h, w, d).
            timestep: (B,) or a scalar, as the U-Net's.
            mask: (B, channels[0], h, w, d) of `embed_mask`.
            class_labels: MONAI's class labels (B,), for a model with `num_class_embeds`.
            conditioning_scale: factor of the result.
        Returns: one tensor for each skip connection, and that of the middle block.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        return self.network(
            sample, timesteps, mask.to(sample.dtype), conditioning_scale=conditioning_scale, class_labels=class_labels
        )


class ControlledUNet(LatentDenoiser):
    """A U-Net and its ControlNet as one network, which label maps condition, too. Without a mask it is the U-Net. It
    lives as long as a call of a pipeline; what is saved, loaded and moved is its parts.

    Args:
        unet: a `MonaiUNet3D`, compiled or not.
        conditioning_scale: factor of what the ControlNet adds.
    """

    mask_halo = 3  # the embedding of a latent voxel sees 3 * stride - 1 voxels around the voxel at its corner

    def __init__(self, unet: Any, controlnet: MonaiControlNet3D, conditioning_scale: float = 1.0):
        nn.Module.__init__(self)  # it has no config of its own
        self.unet, self.controlnet, self.conditioning_scale = unet, controlnet, conditioning_scale

    @classmethod
    def complete(
        cls, section: Mapping[str, Any], vae: "VolumeAutoencoder", data: "DataFacts", images: Mapping[str, slice]
    ) -> dict[str, object]:
        """Raise ValueError: it is not trained here."""
        raise ValueError(CONTROLNET)

    @property
    def config(self) -> Any:
        """That of the U-Net."""
        return self.unet.config

    @property
    def mask_stride(self) -> tuple[int, int, int]:
        """Voxels of a latent voxel."""
        return self.controlnet.mask_stride

    @property
    def num_labels(self) -> int:
        """Number of labels of the masks."""
        return len(self.controlnet.config["label_values"])

    @property
    def condition_schema(self) -> ConditionSchema:
        """That of the U-Net, and a mask, which may be absent."""
        schema = self.unet.condition_schema
        return replace(schema, mask=True, dropout={**schema.dropout, "mask": OPTIONAL})

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Embed label indices, see `MonaiControlNet3D.embed_mask`."""
        return self.controlnet.embed_mask(labels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        numbers: Tensor | None = None,
        return_dict: bool = True,
    ) -> LatentUNet3DOutput | tuple[Tensor]:
        """Predict the objective's target.

        Args:
            sample, timestep, classes, numbers: as `MonaiUNet3D.forward`.
            mask: (B, channels[0], h, w, d) of `embed_labels`; zeros for samples without a mask.
        Raises: ValueError as `MonaiUNet3D.forward`, and for a mask of other sides than the latents, which must be
            multiples of `MonaiUNet3D.stride`.
        """
        residuals = None
        if mask is not None:
            sides, stride = tuple(sample.shape[2:]), self.unet.stride
            if tuple(mask.shape[2:]) != sides or any(side % stride for side in sides):
                raise ValueError(
                    f"the mask is embedded to {tuple(mask.shape[2:])}, the latents are {sides}; both must be the same "
                    f"multiples of {stride}"
                )
            residuals = self._residuals(sample, timestep, mask, self.unet.class_labels(classes))
        return self.unet(
            sample, timestep, classes=classes, numbers=numbers, residuals=residuals, return_dict=return_dict
        )

    def _residuals(
        self, sample: Tensor, timestep: Tensor | float | int, mask: Tensor, class_labels: Tensor | None
    ) -> ControlResiduals:
        """Return those of the ControlNet, zero for samples without a mask."""
        down, middle = self.controlnet(sample, timestep, mask, class_labels, self.conditioning_scale)
        present = mask.flatten(1).any(1)
        if present.all():
            return down, middle
        present = present.to(middle.dtype).view(-1, 1, 1, 1, 1)
        return [one * present for one in down], middle * present


def controlled(
    unet: LatentDenoiser, controlnet: MonaiControlNet3D | None, conditioning_scale: float | None = None
) -> LatentDenoiser:
    """Return the network that the conditions of a pipeline are for: the U-Net, or with a ControlNet both. A scale of
    None is 1."""
    if controlnet is None:
        return unet
    return ControlledUNet(unet, controlnet, 1.0 if conditioning_scale is None else conditioning_scale)


def check_controlnet(unet: LatentDenoiser, controlnet: MonaiControlNet3D) -> None:
    """Raise ValueError if a ControlNet is not one of this U-Net, or of another type."""
    base, control = (getattr(one, "_orig_mod", one) for one in (unet, controlnet))  # beneath torch.compile
    if not isinstance(base, MonaiUNet3D):
        raise ValueError(f"controlnet: is for a MonaiUNet3D, and the pipeline's U-Net is a {type(base).__name__}")
    for name in SAME:
        ours, theirs = (_listed(one.config[name]) for one in (base, control))
        if ours != theirs:
            raise ValueError(
                f"controlnet has {name} {theirs!r:.80}, the U-Net {ours!r:.80}; take the ControlNet that was trained "
                "with this U-Net"
            )
    if base.config["cross_attention_dim"] is not None:
        raise ValueError("controlnet: the U-Net has cross attention, which no ControlNet here has")
    if base.dtype != control.dtype:
        raise ValueError(
            f"controlnet is {control.dtype}, the U-Net {base.dtype}; cast it first: controlnet.to({base.dtype})"
        )


def _listed(value: object) -> object:
    """Return an entry of a config as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value

"""MonaiUNet3D: MONAI's diffusion U-Net, as a model of ours. Axes: latents (B, C, h, w, d)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch import Tensor

from cli.settings import InnerShare, NonNegativeInt, PositiveFloat, PositiveInt, Range, ShareBelowOne
from diffusion.conditioning import ConditionSchema
from diffusion.denoiser import LatentDenoiser
from diffusion.objectives import FLOW_MAP, FLOWS, MAX_SHIFT_VOXELS, check_objective, check_shift, check_train_steps
from diffusion.scheduler_options import MAX_TIMESTEPS, Betas
from diffusion.unet import LatentUNet3DOutput, crop_at_end, pad_at_end

if TYPE_CHECKING:
    from autoencoder import VolumeAutoencoder
    from diffusion.completion import DataFacts

REGIONS = ("head", "chest", "abdomen", "pelvis")  # of the body, in MAISI's order
REGION_CLASSES = ("bottom_region", "top_region")  # the last and the first region that a volume shows
SPACING = ("spacing_x", "spacing_y", "spacing_z")
UNIT = 100.0  # by which MAISI multiplies mm, and the one-hots of regions
ControlResiduals = tuple[Sequence[Tensor], Tensor]  # added to the skip connections, and to the middle block


class MonaiUNet3D(LatentDenoiser):
    """`monai.networks.nets.DiffusionModelUNet`, and MAISI's `DiffusionModelUNetMaisi`, which adds spacing and regions
    to it (Pinaya et al. 2022; Guo et al. 2024). The layers are MONAI's own; `interop` converts weights.

    Its conditions are named as those of `LatentUNet3D`: a class for MONAI's class labels, numbers for the voxel size,
    and two more classes for the regions of the body.

    Args:
        in_channels, out_channels: channels of the latents.
        channels: width of each level, finest first; each level but the first halves every side.
        num_res_blocks: residual blocks per level.
        attention_levels: whether each level has attention.
        num_head_channels: width of an attention head, per level.
        norm_num_groups, norm_eps: of GroupNorm.
        resblock_updown: whether residual blocks change the size, in place of convolutions.
        attention_output: whether self-attention ends in a linear layer (MONAI's include_fc).
        cross_attention_dim: width of `context`; None for a model without.
        context_numbers: names of the numbers that are its context, as one token; None for a context of another kind.
        numbers_as_channels: whether the same numbers are constant input channels, too, behind the latents. None for
            False, so that the hashes of models without stay.
        transformer_num_layers: transformer blocks per attention; only with `cross_attention_dim`.
        num_class_embeds: number of MONAI's class labels; None for a model without.
        upcast_attention: whether attention is computed in float32.
        takes_spacing, takes_regions: whether it is conditioned on voxel size, and on the first and last region.
        objective: what it was trained to predict, see `diffusion.objectives`; None where that is not known, so that no
            pipeline can have it. MONAI's flows predict image minus noise; the sign is changed to ours.
        classes: one class, {name: values}, for the class labels.
        class_labels: MONAI's class label of each value. Where the class is absent, it is 0.
        condition_dropout: how often training dropped each condition; see `LatentUNet3D`.
        train_steps: length of the schedule of v and eps; 1000 if absent.
        beta_schedule, beta_start, beta_end: noise schedule of v and eps. Default: the cosine schedule.
        shift_voxels: number of latent voxels at which timesteps of a flow are not shifted. MAISI shifts them by the
            cube root of the ratio of voxels, which is that of the sides. Default: no shift.
        license: of the weights, where generated volumes must name it.
        subjects: records of the training subjects (`volumes.data.subjects`).
    """

    _no_split_modules = ["DiffusionUNetResnetBlock"]
    _repeated_blocks = ["DiffusionUNetResnetBlock"]
    shift_power = 1 / 3
    known_numbers = SPACING
    # In channels_last_3d torch's GroupNorm on a CPU is off by 4e-4 of the range, for batches of two or more.
    memory_format = torch.contiguous_format

    # Long: two thirds are its arguments, and those of MONAI's class.
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
        context_numbers: Sequence[str] | None = None,
        numbers_as_channels: bool | None = None,
        objective: str | None = None,
        classes: dict[str, list[str]] | None = None,
        class_labels: Sequence[NonNegativeInt] | None = None,
        condition_dropout: dict[str, ShareBelowOne] | None = None,
        train_steps: Annotated[int, Range(2, MAX_TIMESTEPS)] | None = None,
        beta_schedule: Literal["linear", "scaled_linear"] | None = None,
        beta_start: InnerShare | None = None,
        beta_end: InnerShare | None = None,
        shift_voxels: Annotated[int, Range(1, MAX_SHIFT_VOXELS)] | None = None,
        license: str | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        check_levels(channels, num_res_blocks, attention_levels, num_head_channels)
        if objective == FLOW_MAP:
            raise ValueError(f"objective {FLOW_MAP}: students are LatentUNet3D")
        if objective is not None:
            check_objective(objective)
            check_train_steps(objective, train_steps)
            check_shift(objective, shift_voxels)
        ends = [beta_schedule, beta_start, beta_end]
        if any(end is None for end in ends) and ends != [None] * 3:
            raise ValueError(f"beta_schedule, beta_start and beta_end are {ends}: give all three, or none")
        self._check_classes(classes or {}, class_labels or [], num_class_embeds)
        self._check_numbers(context_numbers or [], cross_attention_dim, bool(numbers_as_channels))
        self.condition_schema.check_dropout()
        if numbers := sorted({*(condition_dropout or {})} & {*self.condition_schema.numbers}):
            raise ValueError(f"condition_dropout: this network cannot do without {', '.join(numbers)}; remove them")
        self.stride = 2 ** (len(channels) - 1)
        self.network = DiffusionModelUNetMaisi(
            spatial_dims=3,
            in_channels=in_channels + (len(context_numbers or ()) if numbers_as_channels else 0),
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

    @staticmethod
    def _check_classes(classes: dict[str, list[str]], labels: Sequence[int], count: int | None) -> None:
        """Raise ValueError unless there is one class with a label for each value, where there are class labels."""
        values = [value for one in classes.values() for value in one]
        wanted = 0 if count is None else 1
        if len(classes) != wanted or len(set(values)) != len(labels) or len(values) != len(labels):
            raise ValueError(
                f"classes {classes} with class_labels {[*labels]}: num_class_embeds {count} needs {wanted} class, and "
                "one class label for each of its values"
            )
        if count is not None and not (labels and max(labels) < count):
            raise ValueError(f"class_labels {[*labels]}: give at least one, all below num_class_embeds {count}")

    @staticmethod
    def _check_numbers(names: Sequence[str], width: int | None, as_channels: bool) -> None:
        """Raise ValueError unless numbers are named once each, and are as many as the context is wide."""
        if as_channels and not names:
            raise ValueError("numbers_as_channels: give their names in context_numbers")
        if names and (len({*names, *SPACING}) < len(names) + len(SPACING) or len(names) != width):
            raise ValueError(
                f"context_numbers {[*names]}: give as many different names as cross_attention_dim, {width}, and none "
                f"of {', '.join(SPACING)}"
            )

    @classmethod
    def complete(
        cls, section: Mapping[str, Any], vae: "VolumeAutoencoder", data: "DataFacts", images: Mapping[str, slice]
    ) -> dict[str, object]:
        """Return a model section with the latent channels.

        Raises: ValueError unless the data has the conditions of the section, and for masks and images, which this U-Net
            does not take.
        """
        if data.labels or images:
            raise ValueError(
                f"{cls.__name__} takes no masks and no images: remove data.masks and data.condition_channels, or train "
                "a diffusion.LatentUNet3D on the same autoencoder"
            )
        known = _class_values(section)
        if data.classes != known:
            raise ValueError(
                f"data.classes is {data.classes or None}, the U-Net knows {known or None}; give data its own"
            )
        numbers = _numbers(section)
        if set(data.numbers) != set(numbers):
            raise ValueError(
                f"data.numbers is {sorted(data.numbers)}, the U-Net knows {list(numbers)}; set data.numbers to these. "
                "Voxel sizes are those of the files"
            )
        channels = vae.config["latent_channels"]
        for name in ("in_channels", "out_channels"):
            if section.get(name, channels) != channels:
                raise ValueError(f"model.{name} is {section[name]}, but the autoencoder makes it {channels}; omit it")
        return {"in_channels": channels, "out_channels": channels, **section}

    @property
    def condition_schema(self) -> ConditionSchema:
        """The conditions that this model knows."""
        config = self.config
        values = _class_values(config)
        return ConditionSchema(
            classes=tuple(sorted(values)),
            numbers=_numbers(config),
            dropout=dict(config["condition_dropout"] or {}),
            values={name: values[name] for name in sorted(values)},
        )

    @property
    def betas(self) -> Betas | None:
        """The noise schedule of v and eps that it was trained with."""
        schedule, start, end = (self.config[name] for name in Betas.__annotations__)
        return None if schedule is None else {"beta_schedule": schedule, "beta_start": start, "beta_end": end}

    def timestep_shift(self, sides: Sequence[int]) -> float:
        """Return MAISI's shift of timesteps on a grid of latents (h, w, d); 1 for a model without `shift_voxels`. It is
        computed in float32, as MONAI does."""
        base = self.config["shift_voxels"]
        return 1.0 if base is None else float((torch.tensor(math.prod(sides)) / base) ** (1.0 / 3))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        classes: Tensor | None = None,
        numbers: Tensor | None = None,
        context: Tensor | None = None,
        return_dict: bool = True,
        residuals: ControlResiduals | None = None,
    ) -> LatentUNet3DOutput | tuple[Tensor]:
        """Predict the objective's target.

        Args:
            sample: noisy latents (B, in_channels, h, w, d). Sides that are not multiples of `stride` are padded with
                zeros, as training pads, and the result is cropped; pipelines generate multiples.
            timestep: (B,) or a scalar, 0 to `train_steps`.
            classes: int64 (B, n), the index of each class's value, -1 where absent; columns as in `condition_schema`.
            numbers: (B, n), voxel size in mm, and the context's numbers; columns as in `condition_schema`.
            context: (B, n, cross_attention_dim), for a model without `context_numbers`.
            residuals: of a ControlNet, for latents whose sides are multiples of `stride`. They may be changed.
        Raises: ValueError for a condition that is missing, not wanted, or has other columns.
        """
        schema, config = self.condition_schema, self.config
        _check_columns("classes", classes, schema.classes)
        _check_columns("numbers", numbers, schema.numbers)
        sides = sample.shape[2:]
        sample = pad_at_end(sample, (self.stride, self.stride, self.stride))
        number = {} if numbers is None else dict(zip(schema.numbers, numbers.unbind(1), strict=True))
        if names := config["context_numbers"]:
            if context is not None:
                raise ValueError(f"the context of this model is {', '.join(names)}; omit `context`")
            token = torch.stack([number[name] for name in names], dim=1).to(sample.dtype)
            context = token[:, None]
            if config["numbers_as_channels"]:
                constant = token[:, :, None, None, None].expand(-1, -1, *sample.shape[2:])
                sample = torch.cat([sample, constant], dim=1)
        if (context is None) != (config["cross_attention_dim"] is None):
            how = "with context: pass it" if context is None else "without context: omit it"
            raise ValueError(f"this model was trained {how}")
        of_class = {} if classes is None else dict(zip(schema.classes, classes.unbind(1), strict=True))
        top, bottom = (self._region(of_class.get(name), sample.dtype) for name in reversed(REGION_CLASSES))
        spacing = torch.stack([number[name] for name in SPACING], dim=1) if config["takes_spacing"] else None
        predicted = self.network(
            sample,
            torch.as_tensor(timestep, device=sample.device).expand(len(sample)),
            context=context,
            class_labels=self.class_labels(classes),
            down_block_additional_residuals=None if residuals is None else residuals[0],
            mid_block_additional_residual=None if residuals is None else residuals[1],
            top_region_index_tensor=top,
            bottom_region_index_tensor=bottom,
            spacing_tensor=None if spacing is None else (spacing * UNIT).to(sample.dtype),
        )
        predicted = crop_at_end(predicted, sides)
        predicted = -predicted if config["objective"] in FLOWS else predicted
        return LatentUNet3DOutput(sample=predicted) if return_dict else (predicted,)

    def class_labels(self, classes: Tensor | None) -> Tensor | None:
        """Return MONAI's class labels (B,) for the columns of `condition_schema`; None for a model without."""
        names = [*(self.config["classes"] or ())]
        if classes is None or not names:
            return None
        indices = classes[:, self.condition_schema.classes.index(names[0])]
        table = torch.tensor([0, *self.config["class_labels"]], device=indices.device)
        return table[indices + 1]

    @staticmethod
    def _region(indices: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return one-hots (B, 4) of regions, in MAISI's units; zeros where absent."""
        if indices is None:
            return None
        return (indices[:, None] == torch.arange(len(REGIONS), device=indices.device)).to(dtype) * UNIT


def check_levels(
    channels: Sequence[int],
    num_res_blocks: Sequence[int],
    attention_levels: Sequence[bool],
    num_head_channels: Sequence[int],
) -> None:
    """Raise ValueError unless each has one entry per level."""
    if not len(channels) == len(num_res_blocks) == len(attention_levels) == len(num_head_channels):
        raise ValueError(
            f"channels {channels}, num_res_blocks {num_res_blocks}, attention_levels {attention_levels} and "
            f"num_head_channels {num_head_channels} need one entry per level"
        )


def _class_values(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the values of each class of a config: the class labels, and the regions."""
    values = {name: list(values) for name, values in (config.get("classes") or {}).items()}
    regions = REGION_CLASSES if config.get("takes_regions") else ()
    return {**values, **{name: list(REGIONS) for name in regions}}


def _numbers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the numbers of a config, in alphabetical order."""
    return tuple(sorted([*(SPACING if config.get("takes_spacing") else ()), *(config.get("context_numbers") or ())]))


def _check_columns(name: str, value: Tensor | None, columns: Sequence[str]) -> None:
    """Raise ValueError unless a condition is there with these columns, or absent where there are none."""
    if value is not None and not columns:
        raise ValueError(f"this model was trained without {name}; omit `{name}`")
    if columns and (value is None or value.ndim != 2 or value.shape[1] != len(columns)):
        found = "none" if value is None else f"a tensor {tuple(value.shape)}"
        raise ValueError(
            f"this model is conditioned on {len(columns)} {name} ({', '.join(columns)}): pass {name} "
            f"(B, {len(columns)}); got {found}"
        )

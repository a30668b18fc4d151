"""The variants of MAISI as pipelines: conditions, sampling, intensities and grids.

Facts are from NVIDIA's public configs and scripts (NV-Generate-CTMR, Apache-2.0). The table of formats needs them
before anything heavy is imported, so methods import what they build.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from autoencoder import MonaiAutoencoderKL
    from diffusion import MonaiControlNet3D, MonaiUNet3D
    from pipelines import MedVolumePipeline
    from volumes.description import DataDescription

from .maisi_labels import BODY, LABELS

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
SHIFT_VOXELS = 32**3  # latent voxels at which timesteps are not shifted
DROPPED = 0.1  # how often its training left the modality out
MODALITY = "modality"
MASK_SPACING = 1.5  # mm, of label maps that are generated
SIZES = (  # of organs and tumors, in the order of the mask diffusion's input
    *("gallbladder", "liver", "stomach", "pancreas", "colon"),
    *("lung_tumor", "pancreatic_tumor", "hepatic_tumor", "colon_cancer_primaries", "bone_lesion"),
)
Scale = tuple[Literal["window", "percentile"], float, float, tuple[float, float] | None]  # of `ChannelScale`
HOUNSFIELD: Scale = ("window", -1000.0, 1000.0, None)
PERCENTILES: Scale = ("percentile", 0.0, 1000.0, (0.0, 99.5))  # a file's unit is a thousandth of the upper one
MR = {"mri": 8, "mri_t1": 9, "mri_t2": 10, "mri_flair": 11}
STRIPPED = ("mri_t1_skull_stripped", "mri_t2_skull_stripped", "mri_flair_skull_stripped", "mri_swi_skull_stripped")
BRAIN = {**MR, "mri_swi": 20, **{name: 29 + number for number, name in enumerate(STRIPPED)}}


@dataclass(frozen=True)
class Variant:
    """What turns the networks of a variant into a pipeline.

    Attributes:
        channel: name of the image channel.
        scale: of its intensities.
        spacing: mm, of a volume whose request does not say.
        spacings: smallest and largest voxel size that it is published for, along x and y, and along z.
        shapes: smallest and largest number of voxels that it is published for.
        steps: denoising steps.
        modalities: MONAI's class label of each; none for a U-Net without.
        guidance: by the modality; 1 is none.
        flow: whether it is a rectified flow.
    """

    channel: str
    scale: Scale
    spacing: Sequence[float]
    spacings: Sequence[tuple[float, float]]
    shapes: Sequence[tuple[int, int, int]]
    steps: int = 30
    modalities: Mapping[str, int] = field(default_factory=dict)
    guidance: float = 1.0
    flow: bool = True

    def unet_settings(self) -> dict[str, object]:
        """Return the entries of `MonaiUNet3D`'s config that MONAI's class does not have."""
        noise: dict[str, object] = {"objective": "epsilon", **BETAS}
        if self.flow:
            noise = {"objective": "rectified_flow", "shift_voxels": SHIFT_VOXELS}
        if not self.modalities:
            return noise
        return {
            **noise,
            "classes": {MODALITY: list(self.modalities)},
            "class_labels": list(self.modalities.values()),
            "condition_dropout": {MODALITY: DROPPED},
        }

    def description(self, unet: "MonaiUNet3D", controlnet: "MonaiControlNet3D | None") -> "DataDescription":
        """Return what is known of its training set.

        Of the voxel sizes that is a range. Their mean and standard deviation are those of equal frequency; nothing
        reads them. With a ControlNet, voxels that a mask calls background are set to air, as MAISI's script does.
        """
        from diffusion.monai.unet import SPACING
        from volumes.description import ChannelScale, DataDescription, NumberStats

        x, y, z = self.spacing
        ranges = dict(zip(SPACING, (self.spacings[0], *self.spacings), strict=True))
        return DataDescription(
            channels=(self.channel,),
            labels={} if controlnet is None else dict(LABELS),
            common_labels=None if controlnet is None else (BODY,),
            background_threshold=None if controlnet is None else -1.0,
            spacing=None,
            intensity=(ChannelScale(*self.scale),),
            shape_range=(self.shapes[0], self.shapes[1]),
            affine=((x, 0.0, 0.0, 0.0), (0.0, y, 0.0, 0.0), (0.0, 0.0, z, 0.0), (0.0, 0.0, 0.0, 1.0)),
            classes={name: list(values) for name, values in unet.condition_schema.values.items()},
            numbers={n: NumberStats((a + b) / 2, (b - a) / math.sqrt(12), a, b) for n, (a, b) in ranges.items()},
            grid_numbers=SPACING,
        )

    def pipeline(
        self, vae: "MonaiAutoencoderKL", unet: "MonaiUNet3D", controlnet: "MonaiControlNet3D | None" = None
    ) -> "MedVolumePipeline":
        """Put the networks together. Raises: ValueError if they do not fit."""
        from pipelines import MedVolumePipeline, SamplingSettings

        scheduler = unet.new_scheduler(None if self.flow else "DDPMScheduler")
        pipe = MedVolumePipeline(vae, unet, scheduler, self.description(unet, controlnet), controlnet=controlnet)
        guidance = None if self.guidance == 1 else {MODALITY: self.guidance}
        pipe.sampling_settings = SamplingSettings(self.steps, guidance, maisi_steps=False if self.flow else None)
        return pipe


_CT_SHAPES = (256, 256, 128), (512, 512, 768)
_MR_SHAPES = (128, 128, 128), (512, 512, 256)
_CT_SPACINGS = (0.5, 3.0), (0.5, 5.0)
_MR_SPACINGS = (0.4, 5.0), (0.4, 5.0)
DDPM_CT = Variant("ct", HOUNSFIELD, (1.0, 1.0, 0.75), _CT_SPACINGS, _CT_SHAPES, steps=1000, flow=False)
RFLOW_CT = Variant("ct", HOUNSFIELD, (1.0, 1.0, 0.75), _CT_SPACINGS, _CT_SHAPES, modalities={"ct": 1})
RFLOW_MR = Variant(
    "mr",
    PERCENTILES,
    (1.25, 1.0, 1.0),
    _MR_SPACINGS,
    _MR_SHAPES,
    modalities=MR,
    guidance=10.0,
)
RFLOW_MR_BRAIN = Variant(
    "mr",
    PERCENTILES,
    (0.8, 1.0, 1.0),
    _MR_SPACINGS,
    _MR_SHAPES,
    modalities=BRAIN,
    guidance=10.0,
)

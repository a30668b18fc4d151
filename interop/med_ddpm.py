"""Med-DDPM's two published models as pipelines: their masks, intensities, grids and sampling.

Facts are from its paper (Dorjsembe et al. 2024), from the options of its scripts, and from the headers of the sample
volumes beside them. Its code is GPL-3.0, and none of it is here. The checkpoints could not be had where this was
written; their layout is that of the script that saves them. The table of formats needs this file before anything heavy
is imported, so methods import what they build.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from files.documents import FileError

if TYPE_CHECKING:
    from diffusion import MedDDPMUNet3D
    from pipelines import MedVolumePipeline

    from .convert import Source
    from .formats import Format

PEER = "Med-DDPM"
EMA = "ema"  # the entry of a checkpoint with the averaged weights, which its scripts sample with
BETAS = "betas"
TENSOR = r"(?:module\.)?"
# The noise schedule, which a checkpoint holds thirteen times over. `betas` are checked; the others follow from them.
SCHEDULE = TENSOR + (
    r"(?:betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
    r"|posterior_log_variance_clipped|posterior_mean_coef[123])"
)
FIRST, LAST = "denoise_fn.input_blocks.0.0.weight", "denoise_fn.out.2.weight"
ROUNDING = 1e-5  # of stored betas
CHANNELS = [64, 64, 128, 192, 256]
NOTES = (
    "The repository of Med-DDPM has its code under GPL-3.0. It names no license of the weights; it invites to use them "
    "for further research, and asks to cite the paper (Dorjsembe et al., IEEE Journal of Biomedical and Health "
    "Informatics 28(7), 2024, doi:10.1109/JBHI.2024.3385504).",
    "Volumes are generated from a mask alone. The names of its labels are in model_index.json, under data.",
)

# Names of its layers, and ours.
_PLACES = (
    (r"input_blocks\.(\d+)\.(\d+)", r"down.\1.\2"),
    (r"output_blocks\.(\d+)\.(\d+)", r"up.\1.\2"),
    (r"middle_block\.(\d+)()", r"middle.\1\2"),
)
_LAYERS = {
    r"\.in_layers\.0": ".norm1",
    r"\.in_layers\.2": ".conv1",
    r"\.emb_layers\.1": ".time",
    r"\.out_layers\.0": ".norm2",
    r"\.out_layers\.3": ".conv2",
    r"\.skip_connection": ".skip",
    r"\.norm": ".norm",
    r"\.qkv": ".qkv",
    r"\.proj_out": ".out",
    r"\.op": ".conv",
    r"\.conv": ".conv",
    "": "",
}
_SINGLE = {r"time_embed\.0": "time_in", r"time_embed\.2": "time_out", r"out\.0": "norm_out", r"out\.2": "conv_out"}
_KIND = r"\.(weight|bias)"
RENAMES: Sequence[tuple[str, str]] = (
    *((rf"denoise_fn\.{theirs}{_KIND}", rf"{ours}.\1") for theirs, ours in _SINGLE.items()),
    *(
        (rf"denoise_fn\.{place}{layer}{_KIND}", rf"{ours}{name}.\3")
        for place, ours in _PLACES
        for layer, name in _LAYERS.items()
    ),
)


@dataclass(frozen=True)
class Published:
    """What turns the U-Net of a published checkpoint into a pipeline.

    Attributes:
        channels: names of the image channels.
        labels: value in a mask's file, and name.
        num_res_blocks: per level.
        attention_levels: whether each level has attention.
        mask_low, orientation: as in `MedDDPMUNet3D`.
        intensity: of a generated volume, where the network has -1 and 1.
        shape, spacing: of a training volume, in voxels and mm.
        origin: of the sample volumes, in RAS+ order, in mm.
    """

    channels: Sequence[str]
    labels: Mapping[int, str]
    num_res_blocks: int
    attention_levels: Sequence[bool]
    mask_low: float
    orientation: str
    intensity: tuple[float, float]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    @property
    def arguments(self) -> dict[str, object]:
        """The sizes of its network."""
        return {
            "in_channels": len(self.channels),
            "out_channels": len(self.channels),
            "num_labels": len(self.labels),
            "channels": CHANNELS,
            "num_res_blocks": self.num_res_blocks,
            "attention_levels": list(self.attention_levels),
        }

    @property
    def tells(self) -> tuple[int, int]:
        """Input and output channels of its network, which no other published one has."""
        return len(self.channels) + len(self.labels) - 1, len(self.channels)

    def pipeline(self, vae: None, unet: "MedDDPMUNet3D", controlnet: None = None) -> "MedVolumePipeline":
        """Build the pipeline: voxels are the latents, so there is no autoencoder to convert."""
        from autoencoder import SpaceToDepth3D
        from pipelines import MedVolumePipeline, SamplingSettings
        from volumes.description import ChannelScale, DataDescription

        count = len(self.channels)
        voxels = SpaceToDepth3D(
            count, latents_mean=[0.0] * count, latents_std=[1.0] * count, channel_names=list(self.channels)
        )
        (a, b, c), (x, y, z) = self.spacing, self.origin
        data = DataDescription(
            channels=tuple(self.channels),
            labels=dict(self.labels),
            spacing=self.spacing,
            intensity=(ChannelScale("percentile", *self.intensity, (0.0, 100.0)),) * count,
            shape_range=(self.shape, self.shape),
            affine=((a, 0.0, 0.0, x), (0.0, b, 0.0, y), (0.0, 0.0, c, z), (0.0, 0.0, 0.0, 1.0)),
        )
        pipe = MedVolumePipeline(voxels, unet, unet.new_scheduler("DDPMScheduler"), data)
        pipe.sampling_settings = SamplingSettings(unet.train_steps)
        return pipe


WHOLE_HEAD = Published(
    channels=("mr",),
    labels={0: "background", 1: "head", 2: "tumor"},
    num_res_blocks=1,
    attention_levels=(False, False, False, True, False),
    mask_low=-1.0,
    orientation="RAS",
    intensity=(-1.0, 1.0),
    shape=(128, 128, 128),
    spacing=(1.5, 1.5, 1.5),
    origin=(-94.75, -112.75, -73.75),
)
BRATS = Published(
    channels=("t1", "t1ce", "t2", "flair"),
    labels={0: "background", 1: "necrotic core", 2: "edema", 3: "enhancing tumor", 4: "brain"},
    num_res_blocks=2,
    attention_levels=(False,) * 5,
    mask_low=0.0,
    orientation="LPS",
    intensity=(0.0, 1.0),
    shape=(192, 192, 144),
    spacing=(1.0, 1.0, 1.0),
    origin=(-215.0, 24.0, 6.0),
)
PUBLISHED = {"whole heads": WHOLE_HEAD, "BraTS": BRATS}


def identify(kind: "Format", source: "Source") -> "Format":
    """Return the format with the network that a checkpoint is of: the channels of its first and last layer tell.

    Raises: FileError for other channels, and for a noise schedule that is not the cosine one.
    """
    names = {name.removeprefix("module."): name for name in source.state}
    shapes = [source.state[names[name]][0] if name in names else () for name in (FIRST, LAST)]
    sizes = tuple(shape[axis] if len(shape) == 5 else 0 for shape, axis in zip(shapes, (1, 0), strict=True))
    found = next((one for one in PUBLISHED.values() if one.tells == sizes), None)
    if found is None:
        known = ", ".join(f"{name}: {a} and {b}" for name, (a, b) in ((n, one.tells) for n, one in PUBLISHED.items()))
        raise FileError(
            f"{source.path}: its network has {sizes[0]} input and {sizes[1]} output channels; those of the published "
            f"ones are known ({known}). Train another one here: configs/med_ddpm"
        )
    steps = _check_schedule(source, names.get(BETAS))
    settings = {"mask_low": found.mask_low, "orientation": found.orientation, "train_steps": steps}
    return replace(kind, parts=[replace(kind.parts[0], arguments=found.arguments, settings=settings)], variant=found)


def _check_schedule(source: "Source", name: str | None) -> int:
    """Return the number of steps of a checkpoint's noise schedule. Raises: FileError unless it is the cosine one."""
    shape, floating = ((), False) if name is None else source.state[name]
    if name is None or len(shape) != 1 or shape[0] < 2 or not floating:
        raise FileError(f"{source.path}: has no {BETAS}, the noise schedule that it was trained with")
    steps = shape[0]
    level = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    expected = [min(1 - after / before, 0.999) for before, after in pairwise(level)]
    betas = source.read({name: BETAS})[BETAS].double().tolist()
    if not all(abs(one - other) <= ROUNDING for one, other in zip(betas, expected, strict=True)):
        raise FileError(
            f"{source.path}: its {BETAS} are not those of the cosine schedule of {steps} steps (Nichol & Dhariwal "
            "2021), which Med-DDPM trains with; other schedules cannot be converted"
        )
    return steps

"""The formats that are read: which files, which classes of MONAI with which arguments, whose license.

And the names of those that are written.

Facts of MAISI are from NVIDIA's public configs and scripts (NV-Generate-CTMR, Apache-2.0). The files themselves could
not be had where this was written; their layout is that of the scripts that wrote them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import maisi, med_ddpm
from .maisi import Variant
from .maisi_labels import LABELS

if TYPE_CHECKING:
    from pipelines import MedVolumePipeline

    from .convert import Source

# Where files keep their weights, beside other entries; or they hold nothing else.
STATES = (
    *("unet_state_dict", "autoencoder_state_dict", "controlnet_state_dict"),
    *("state_dict", "model_state_dict", "model"),
)
OUT_PROJ = r".+\.(?:attentions\.\d+|attention)\.attn\.out_proj\.(?:weight|bias)"


@dataclass(frozen=True)
class Part:
    """One network of a format.

    Attributes:
        peers: classes of its owner that it may be; the first unless the arguments name one (`_target_`).
        arguments: of the class; None where the user gives them (`--network`).
        files: its file's names in a folder, newest first.
        dropped: a pattern of tensors that its files hold and its class never used.
        settings: entries of our config beyond those that MONAI's class has.
        optional: whether a folder may lack its file.
    """

    peers: Sequence[str]
    arguments: Mapping[str, object] | None = None
    files: Sequence[str] = ()
    dropped: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    optional: bool = False


class Assembly(Protocol):
    """What turns the networks of a format into a pipeline."""

    def pipeline(self, vae: Any, unet: Any, controlnet: Any = None) -> "MedVolumePipeline":
        """Put the networks together; a format may have no autoencoder, and no ControlNet.

        Raises: ValueError if they do not fit.
        """
        ...


@dataclass(frozen=True)
class Format:
    """What a file or folder of weights is.

    Attributes:
        help: one line for `--help`.
        parts: its networks; the autoencoder first.
        value_range: intensities that the autoencoder takes for our -1 and 1; None where the user gives them.
        license: of the weights, for the model card.
        restricted: what every generated volume must say of the license; None where nothing is forbidden.
        source: where the weights are published.
        variant: what turns the networks into a pipeline; None where that is not known.
        is_bundle: whether the bundle's own configs name arguments, files and sampling (`interop.bundle_reader`).
        config: the file that the arguments were read from.
        scale_factor: what latents are multiplied by where neither a file nor the user says; None if one must.
        identify: for a format of several networks, returns the one that a file is of.
        states: entries of a file that may hold the weights.
        notes: paragraphs of the model card, on what the owner says of the license, and on the use.
        takes_labels: whether the user gives the label values of its outputs (`interop.maisi_masks`).
    """

    help: str
    parts: Sequence[Part]
    value_range: Sequence[float] | None = None
    license: str | None = None
    restricted: str | None = None
    source: str | None = None
    variant: Assembly | None = None
    is_bundle: bool = False
    config: Path | None = None
    scale_factor: float | None = None
    identify: "Callable[[Format, Source], Format] | None" = None
    states: Sequence[str] = STATES
    notes: Sequence[str] = ()
    takes_labels: bool = False


_MAISI_VAE: Mapping[str, object] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [64, 128, 256],
    "num_res_blocks": [2, 2, 2],
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "include_fc": False,
}
_MAISI_UNET: Mapping[str, object] = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels": [64, 128, 256, 512],
    "num_res_blocks": 2,
    "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32],
    "include_spacing_input": True,
}
_DDPM = {**_MAISI_UNET, "include_top_region_index_input": True, "include_bottom_region_index_input": True}
_RFLOW = {**_MAISI_UNET, "include_fc": True, "resblock_updown": True, "num_class_embeds": 128}
_MASK_VAE: Mapping[str, object] = {
    **_MAISI_VAE,
    "in_channels": 8,
    "out_channels": 125,
    "num_channels": [32, 64, 128],
    "num_res_blocks": [1, 2, 2],
    "use_convtranspose": True,
}
_MASK_UNET: Mapping[str, object] = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "channels": [64, 128, 256, 512],
    "num_res_blocks": 2,
    "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32],
    "with_conditioning": True,
    "cross_attention_dim": 10,
    "upcast_attention": True,
}
_CONTROL: Mapping[str, object] = {
    **{name: value for name, value in _MAISI_UNET.items() if name not in ("out_channels", "include_spacing_input")},
    "conditioning_embedding_in_channels": 8,
    "conditioning_embedding_num_channels": [8, 32, 64],
}
_CONTROL_RFLOW = {**_CONTROL, "include_fc": True, "resblock_updown": True, "num_class_embeds": 128}
_VAE_V1 = Part(["AutoencoderKlMaisi"], _MAISI_VAE, ["autoencoder_v1.pt", "autoencoder_epoch273.pt"])
_VAE_V2 = Part(["AutoencoderKlMaisi"], _MAISI_VAE, ["autoencoder_v2.pt"])
_OPEN = "NVIDIA Open Model License"
_RESEARCH = "non-commercial research only, also for derivatives (NVIDIA, LICENSE.weights of NV-Generate-MR, 3.2, 3.3)"


AND_CONTROLNET = " (and the ControlNet, if it is there)"


def _controlnet(arguments: Mapping[str, object], files: Sequence[str], dropped: str | None = None) -> Part:
    settings = {"label_values": sorted(LABELS)}
    return Part(["ControlNetMaisi"], arguments, files, dropped=dropped, settings=settings, optional=True)


def _maisi(
    name: str,
    file: str,
    vae: Part,
    variant: Variant,
    *,
    license: str,
    source: str,
    restricted: str | None = None,
    controlnet: Part | None = None,
) -> Format:
    unet = Part(["DiffusionModelUNetMaisi"], _RFLOW, [file], settings=variant.unet_settings())
    return Format(
        f"MAISI {name}: autoencoder and U-Net" + ("" if controlnet is None else AND_CONTROLNET),
        [vae, unet] if controlnet is None else [vae, unet, controlnet],
        value_range=(0.0, 1.0),
        license=license,
        restricted=restricted,
        source=source,
        variant=variant,
    )


FORMATS: dict[str, Format] = {
    "monai-autoencoderkl": Format(
        "MONAI's AutoencoderKL, or AutoencoderKlMaisi, that you trained (--network, --value_range)",
        [Part(["AutoencoderKL", "AutoencoderKlMaisi"])],
    ),
    "monai-vqvae": Format("MONAI's VQVAE that you trained (--network, --value_range)", [Part(["VQVAE"])]),
    "monai-diffusion-unet": Format(
        "MONAI's DiffusionModelUNet, or DiffusionModelUNetMaisi, that you trained (--network)",
        [Part(["DiffusionModelUNet", "DiffusionModelUNetMaisi"])],
    ),
    "monai-bundle": Format(
        "a bundle of MONAI's model zoo, with an autoencoder and a diffusion U-Net of latents (its folder)",
        [Part(["AutoencoderKL"]), Part(["DiffusionModelUNet"])],
        is_bundle=True,
        scale_factor=1.0,  # the scripts of the zoo's bundles decode latents as they are
    ),
    "maisi-ddpm-ct": Format(
        f"MAISI v1, DDPM, CT: autoencoder and U-Net{AND_CONTROLNET}",
        [
            _VAE_V1,
            Part(
                ["DiffusionModelUNetMaisi"],
                _DDPM,
                ["diff_unet_3d_ddpm-ct.pt", "diff_unet_ckpt_epoch19350.pt"],
                dropped=OUT_PROJ,
                settings=maisi.DDPM_CT.unet_settings(),
            ),
            _controlnet(_CONTROL, ["controlnet_3d_ddpm-ct.pt", "controlnet_current.pt"], OUT_PROJ),
        ],
        value_range=(0.0, 1.0),
        license=_OPEN,
        source="https://huggingface.co/nvidia/NV-Generate-CT",
        variant=maisi.DDPM_CT,
    ),
    "maisi-rflow-ct": _maisi(
        "rectified flow, CT",
        "diff_unet_3d_rflow-ct.pt",
        _VAE_V1,
        maisi.RFLOW_CT,
        controlnet=_controlnet(_CONTROL_RFLOW, ["controlnet_3d_rflow-ct.pt"]),
        license=_OPEN,
        source="https://huggingface.co/nvidia/NV-Generate-CT",
    ),
    "maisi-rflow-mr": _maisi(
        "rectified flow, MR",
        "diff_unet_3d_rflow-mr.pt",
        _VAE_V2,
        maisi.RFLOW_MR,
        license=_RESEARCH,
        restricted=_RESEARCH,
        source="https://huggingface.co/nvidia/NV-Generate-MR",
    ),
    "maisi-rflow-mr-brain": _maisi(
        "rectified flow, brain MR",
        "diff_unet_3d_rflow-mr-brain_v1.pt",
        _VAE_V1,
        maisi.RFLOW_MR_BRAIN,
        license=_OPEN,
        source="https://huggingface.co/nvidia/NV-Generate-MR-Brain",
    ),
    "med-ddpm": Format(
        "Med-DDPM, of whole heads or of BraTS: its checkpoint (a file)",
        [Part([med_ddpm.PEER], {}, dropped=med_ddpm.SCHEDULE)],
        source="https://github.com/mobaidoctor/med-ddpm",
        identify=med_ddpm.identify,
        states=[med_ddpm.EMA],
        notes=med_ddpm.NOTES,
    ),
    "maisi-masks": Format(
        "MAISI's label maps of CT from organ sizes: mask autoencoder and mask diffusion (--labels)",
        [
            Part(["AutoencoderKlMaisi"], _MASK_VAE, ["mask_generation_autoencoder.pt"]),
            Part(
                ["DiffusionModelUNet"],
                _MASK_UNET,
                ["mask_generation_diffusion_unet.pt"],
                settings={"objective": "epsilon", **maisi.BETAS, "context_numbers": list(maisi.SIZES)},
            ),
        ],
        value_range=(0.0, 1.0),
        license=_OPEN,
        source="https://huggingface.co/nvidia/NV-Generate-CT",
        scale_factor=1.0055984258651733,
        takes_labels=True,
    ),
}
TARGETS = {
    "torch-export": "decoder, encoder and U-Net as .pt2 programs, which torch alone runs",
    "onnx": "the decoder as decoder.onnx, for ONNX Runtime",
    "monai-bundle": "a bundle that MONAI alone runs, for pipelines that a mask conditions",
    "monai-weights": "weights for MONAI's own classes, of networks converted from MONAI or MAISI",
}

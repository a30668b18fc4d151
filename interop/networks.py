"""Others' classes, most of them MONAI's, in terms of ours: arguments, defaults, and the names of their tensors."""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autoencoder.model import VolumeModel
from autoencoder.monai.kl import MonaiAutoencoderKL
from autoencoder.monai.vq import MonaiVQVAE
from diffusion.med_ddpm.unet import MedDDPMUNet3D
from diffusion.monai.controlnet import BITS, MonaiControlNet3D
from diffusion.monai.unet import MonaiUNet3D

from . import med_ddpm

Renames = Sequence[tuple[str, str]]

# Arguments that change time or memory alone, or training.
WITHOUT_EFFECT = frozenset(
    "use_flash_attention use_checkpoint use_checkpointing num_splits dim_split norm_float16 print_info save_mem "
    "dropout_cattn _target_ _desc_ _disabled_".split()
)
FIXED: Mapping[str, Sequence[object]] = {"spatial_dims": (3,), "use_combined_linear": (False,)}
# Of a U-Net's training: entries of `MonaiUNet3D`'s config.
TRAINED = ("objective", "train_steps", "beta_schedule", "beta_start", "beta_end", "shift_voxels")
# And of its conditions.
CONDITIONS = ("classes", "class_labels", "condition_dropout", "context_numbers", "numbers_as_channels")
# In weights of MONAI Generative, before MONAI 1.4, these had other names.
OLD_AUTOENCODER: Renames = (
    (r"((?:en|de)coder\.blocks\.\d+)\.(to_[qkv])\.(weight|bias)", r"\1.attn.\2.\3"),
    (r"((?:en|de)coder\.blocks\.\d+)\.proj_attn\.(weight|bias)", r"\1.attn.out_proj.\2"),
    (r"(decoder\.blocks\.\d+)\.conv\.conv\.(weight|bias)", r"\1.postconv.conv.\2"),
)
MAISI_AUTOENCODER: Renames = (
    (r"(decoder\.blocks\.\d+)\.conv\.conv\.conv\.(weight|bias)", r"\1.postconv.conv.\2"),
    (r"(encoder\.blocks\.\d+\.conv)\.conv\.conv\.(weight|bias)", r"\1.conv.\2"),
    (r"((?:en|de)coder\.blocks\.\d+(?:\.conv1|\.conv2|\.nin_shortcut)?)\.conv\.conv\.(weight|bias)", r"\1.conv.\2"),
)
# Layers of MONAI Generative's self-attention that its forward pass never used. Nor does MONAI's without `include_fc`.
UNUSED_AUTOENCODER = r"(?:module\.)?(?:en|de)coder\.blocks\.\d+\.proj_attn\.(?:weight|bias)"
UNUSED_UNET = r".+\.(?:attentions\.\d+|attention)\.proj_attn\.(?:weight|bias)"
OF_MAISI = ("trilinear", "transposed_3")  # how MAISI's autoencoders upsample
GENERATIVE = "generative."  # the package of MONAI Generative
UNET: Renames = (
    (r"(.+\.(?:attentions\.\d+|attention))\.(to_[qkv])\.(weight|bias)", r"network.\1.attn.\2.\3"),
    (r"(.+\.(?:attentions\.\d+|attention))\.proj_attn\.(weight|bias)", r"network.\1.attn.out_proj.\2"),
    (r"(.+\.transformer_blocks\.\d+\.attn[12])\.to_out\.0\.(weight|bias)", r"network.\1.out_proj.\2"),
    (r"(up_blocks\.\d+\.upsampler)\.conv\.conv\.(weight|bias)", r"network.\1.postconv.conv.\2"),
    (r"(.+)", r"network.\1"),
)
CONTROLNET: Renames = ((r"controlnet_cond_embedding\.(.+)", r"embedding.\1"), *UNET)


@dataclass(frozen=True)
class Peer:
    """A class of MONAI, or of another owner.

    Attributes:
        model: our class that computes the same.
        folder: its place in a pipeline.
        arguments: MONAI's names of arguments, and ours.
        defaults: what MONAI takes for arguments that are not given, by our names.
        renames: patterns of the names of its tensors, and ours; the first that fits counts, others keep their names.
        marker: the beginning of names that tells its weights from those of other classes.
        path: where its owner has it.
        ignored: arguments that change training alone, and no weight's name, as `WITHOUT_EFFECT`.
        fixed: arguments that must have one of these values, the first by default.
        added: values of tensors that our class has beside MONAI's.
        unused: a pattern of tensors that files may hold, and a network without `attention_output` does not use.
    """

    model: type[VolumeModel]
    folder: str
    arguments: Mapping[str, str]
    defaults: Mapping[str, object]
    renames: Renames
    marker: str
    path: str
    unused: str | None = None
    ignored: frozenset[str] = frozenset()
    added: Mapping[str, bool] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[object]] = field(default_factory=lambda: FIXED)


_SHARED = {
    **{name: name for name in ("in_channels", "out_channels", "channels", "num_res_blocks", "attention_levels")},
    **{name: name for name in ("norm_num_groups", "norm_eps")},
    "num_channels": "channels",
    "include_fc": "attention_output",
}
_AUTOENCODER = _SHARED | {
    "latent_channels": "latent_channels",
    "with_encoder_nonlocal_attn": "encoder_attention",
    "with_decoder_nonlocal_attn": "decoder_attention",
}
_UNET = _SHARED | {
    **{name: name for name in ("resblock_updown", "num_head_channels", "transformer_num_layers")},
    **{name: name for name in ("cross_attention_dim", "num_class_embeds", "upcast_attention")},
}
_CONTROLNET = {name: ours for name, ours in _SHARED.items() if name != "out_channels"} | {
    **{name: name for name in ("resblock_updown", "num_head_channels", "num_class_embeds", "upcast_attention")},
    "conditioning_embedding_num_channels": "embedding_channels",
}
_AUTOENCODER_DEFAULTS = {
    "num_res_blocks": 2,
    "channels": [32, 64, 64, 64],
    "attention_levels": [False, False, True, True],
    "latent_channels": 3,
    "encoder_attention": True,
    "decoder_attention": True,
    "attention_output": True,
    "upsampling": "nearest",
}
_MAISI_DEFAULTS = {
    "latent_channels": 3,
    "encoder_attention": False,
    "decoder_attention": False,
    "attention_output": False,
    "upsampling": "trilinear",
}
_VQVAE = {
    **{name: name for name in ("in_channels", "out_channels", "channels", "num_res_layers", "num_res_channels")},
    "num_channels": "channels",
    "num_embeddings": "num_codes",
    "embedding_dim": "latent_channels",
    "decay": "codebook_decay",
    "downsample_parameters": "downsample",
    "upsample_parameters": "upsample",
}
LEVELS = ("downsample", "upsample")  # of one level: several numbers, which MONAI takes for all levels, too
_VQVAE_DEFAULTS = {"channels": [96, 96, 192]}  # the others are those of our class
VQVAE: Renames = (
    (r"quantizer\.quantizer\.embedding\.weight", "codebook.codes"),
    (r"quantizer\.quantizer\.ema_cluster_size", "codebook.counts"),
    (r"quantizer\.quantizer\.ema_w", "codebook.sums"),
)
_UNET_DEFAULTS = {
    "num_res_blocks": 2,
    "channels": [32, 64, 64, 64],
    "attention_levels": [False, False, True, True],
    "num_head_channels": 8,
    "attention_output": True,
}
_MAISI_NETWORKS = "monai.apps.generation.maisi.networks"
PEERS = {
    "AutoencoderKL": Peer(
        MonaiAutoencoderKL,
        "vae",
        _AUTOENCODER,
        _AUTOENCODER_DEFAULTS,
        OLD_AUTOENCODER,
        "encoder.",
        "monai.networks.nets.autoencoderkl",
        UNUSED_AUTOENCODER,
    ),
    "AutoencoderKlMaisi": Peer(
        MonaiAutoencoderKL,
        "vae",
        _AUTOENCODER,
        _MAISI_DEFAULTS,
        MAISI_AUTOENCODER,
        "encoder.",
        f"{_MAISI_NETWORKS}.autoencoderkl_maisi",
    ),
    "VQVAE": Peer(
        MonaiVQVAE,
        "vae",
        _VQVAE,
        _VQVAE_DEFAULTS,
        VQVAE,
        "encoder.",
        "monai.networks.nets.vqvae",
        ignored=frozenset("dropout embedding_init commitment_cost epsilon ddp_sync".split()),
        added={"codebook.initialized": True},
        fixed={"spatial_dims": (3,), "act": ("RELU", "relu"), "output_act": (None,)},
    ),
    "DiffusionModelUNet": Peer(
        MonaiUNet3D,
        "unet",
        _UNET,
        _UNET_DEFAULTS,
        UNET,
        "down_blocks.",
        "monai.networks.nets.diffusion_model_unet",
        UNUSED_UNET,
    ),
    "DiffusionModelUNetMaisi": Peer(
        MonaiUNet3D,
        "unet",
        _UNET | {"include_spacing_input": "takes_spacing"},
        _UNET_DEFAULTS | {"attention_output": False},
        UNET,
        "down_blocks.",
        f"{_MAISI_NETWORKS}.diffusion_model_unet_maisi",
    ),
    med_ddpm.PEER: Peer(
        MedDDPMUNet3D,
        "unet",
        {name: name for name in med_ddpm.WHOLE_HEAD.arguments},
        {},
        med_ddpm.RENAMES,
        "denoise_fn.",
        "https://github.com/mobaidoctor/med-ddpm",
        fixed={},
    ),
    "ControlNetMaisi": Peer(
        MonaiControlNet3D,
        "controlnet",
        _CONTROLNET,
        _UNET_DEFAULTS | {"attention_output": False, "embedding_channels": [16, 32, 96, 256]},
        CONTROLNET,
        "controlnet_cond_embedding.",
        f"{_MAISI_NETWORKS}.controlnet_maisi",
        fixed=FIXED | {"conditioning_embedding_in_channels": (BITS,)},
    ),
}


def peer_of(arguments: Mapping[str, Any], among: Sequence[str]) -> str:
    """Return the class that `arguments` are of: by `_target_`, or the first of `among`.

    Raises: ValueError for a class that is not one of `among`.
    """
    target = arguments.get("_target_", among[0])
    name = target.rpartition(".")[2] if isinstance(target, str) else ""
    if name not in among:
        raise ValueError(f"_target_ is {target!r:.80}; it is {' or '.join(among)}")
    return name


def config_of(peer: Peer, arguments: Mapping[str, Any]) -> dict[str, object]:
    """Return the config of our class for the arguments that MONAI's class had.

    Those of a U-Net may say beside them how it was trained (`TRAINED`), and its conditions (`CONDITIONS`).

    Raises: ValueError for an argument that it does not have, for one that would make another network than ours, and for
        expressions, which are never evaluated.
    """
    given = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT | peer.ignored}
    for name, values in peer.fixed.items():
        if given.pop(name, values[0]) not in values:
            raise ValueError(f"{name} is {arguments[name]!r:.80}; only {values[0]!r} can be converted")
    beside = (*TRAINED, *CONDITIONS) if peer.folder == "unet" else ()
    trained = {name: given.pop(name) for name in beside if name in given}
    if trained.get("objective") in ("epsilon", "v_prediction") and "beta_schedule" not in trained:
        raise ValueError(
            f"objective {trained['objective']}: give beta_schedule, beta_start and beta_end of its training"
        )
    texts = {name: value for name, value in given.items() if _has_text(value)}
    if plain := {name: value for name, value in texts.items() if not str(value).startswith(("$", "@", "%"))}:
        name, value = next(iter(plain.items()))
        raise ValueError(f"{name} is {value!r:.80}: text where a number belongs; write it without quotation marks")
    if expressions := list(texts):
        raise ValueError(
            f"{', '.join(expressions)}: expressions and references are not evaluated; write the values out"
        )
    regions = [given.pop(f"include_{end}_region_index_input", None) or False for end in ("top", "bottom")]
    attends, transposed = given.pop("with_conditioning", None), given.pop("use_convtranspose", False)
    if attends is not None and attends != (given.get("cross_attention_dim") is not None):
        raise ValueError("with_conditioning and cross_attention_dim belong together; give both or neither")
    if "channels" in given and "num_channels" in given:
        raise ValueError("channels and num_channels are the same argument; give one")
    if unknown := sorted(given.keys() - peer.arguments.keys()):
        raise ValueError(f"{', '.join(unknown)}: not an argument of this class; it takes {', '.join(peer.arguments)}")
    defaults = dict(peer.defaults)
    if str(arguments.get("_target_")).startswith(GENERATIVE) and "include_fc" in peer.arguments:
        defaults["attention_output"] = given.get("cross_attention_dim") is not None  # never after self-attention
    config: dict[str, object] = {
        **defaults,
        **{peer.arguments[name]: value for name, value in given.items()},
    }
    if regions != [False, False]:
        if regions != [True, True] or "takes_spacing" not in peer.arguments.values():
            raise ValueError(
                "include_top_region_index_input and include_bottom_region_index_input: give both or neither"
            )
        config["takes_regions"] = True
    if transposed:
        config["upsampling"] = "transposed_3" if config.get("upsampling") in OF_MAISI else "transposed"
    if isinstance(count := config.get("num_class_embeds"), int) and peer.folder == "unet":
        config |= {"classes": {"label": [str(label) for label in range(count)]}, "class_labels": [*range(count)]}
    for name in ("num_res_blocks", "num_head_channels", "num_res_channels", *LEVELS):
        one = isinstance(value := config.get(name), int) or (name in LEVELS and _are_numbers(value))
        if one and isinstance(levels := config.get("channels"), list | tuple):
            config[name] = [value] * len(levels)
    numbers, inputs = trained.get("context_numbers"), config.get("in_channels")
    if trained.get("numbers_as_channels") and isinstance(numbers, list) and isinstance(inputs, int):
        config["in_channels"] = inputs - len(numbers)  # MONAI's class counts them as channels of the latents
    return {**config, **trained}


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, int) for one in value)


def peer_name(model: VolumeModel) -> str:
    """Return the class of MONAI whose weights a model of ours holds. Raises: ValueError if there is none."""
    config = model.config
    if isinstance(model, MonaiAutoencoderKL):
        return "AutoencoderKlMaisi" if config["upsampling"] in OF_MAISI else "AutoencoderKL"
    if isinstance(model, MonaiUNet3D):
        is_maisi = config["takes_spacing"] or config["takes_regions"]
        return "DiffusionModelUNetMaisi" if is_maisi else "DiffusionModelUNet"
    if isinstance(model, MonaiControlNet3D):
        return "ControlNetMaisi"
    if isinstance(model, MonaiVQVAE):
        raise ValueError("a VQVAE is not written back; keep the file that it was converted from")
    raise ValueError(f"{type(model).__name__} is not a network of MONAI; export it with --to torch-export")


def arguments_of(name: str, config: Mapping[str, Any]) -> dict[str, object]:
    """Return the arguments of MONAI's class for the config of ours: the inverse of `config_of`.

    `_target_` says which class it is, as MONAI's configs do.
    """
    peer = PEERS[name]
    widths = {"channels", "num_channels"} - {"num_channels" if peer.path.startswith("monai.networks") else "channels"}
    known = {theirs: ours for theirs, ours in peer.arguments.items() if ours != "channels"}
    arguments: dict[str, object] = {"_target_": f"{peer.path}.{name}", "spatial_dims": 3}
    arguments |= {theirs: config[ours] for theirs, ours in known.items()} | {widths.pop(): config["channels"]}
    if config.get("numbers_as_channels"):
        arguments["in_channels"] = config["in_channels"] + len(config["context_numbers"])
    if peer.folder == "vae":
        arguments["use_convtranspose"] = config["upsampling"] in ("transposed", "transposed_3")
        if logits := config.get("label_logits"):
            arguments["out_channels"] = len(logits) + 1
    elif peer.folder == "unet":
        arguments["with_conditioning"] = config["cross_attention_dim"] is not None
    else:
        arguments["conditioning_embedding_in_channels"] = BITS
    if name == "DiffusionModelUNetMaisi":
        arguments |= {f"include_{end}_region_index_input": config["takes_regions"] for end in ("top", "bottom")}
    return arguments


def monai_state(name: str, model: VolumeModel) -> dict[str, torch.Tensor]:
    """Return the weights of a model of ours under MONAI's names, in the order of MONAI's class."""
    peer, state = PEERS[name], model.state_dict()
    arguments = arguments_of(name, model.config)
    arguments.pop("_target_")
    with torch.device("meta"):
        theirs = getattr(importlib.import_module(peer.path), name)(**arguments).state_dict()
    ours = {key: renamed(key, peer.renames) for key in theirs}
    assert set(ours.values()) == state.keys()
    return {key: state[of_ours].contiguous() for key, of_ours in ours.items()}


def _has_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(map(_has_text, value)))


def expected_shapes(peer: Peer, config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of our class with this config. Nothing is allocated."""
    return {name: tuple(tensor.shape) for name, tensor in build_empty(peer, config).state_dict().items()}


def build_empty(peer: Peer, config: Mapping[str, object]) -> VolumeModel:
    """Build a model of our class without memory for its weights."""
    with torch.device("meta"):
        return peer.model(**config)


def renamed(name: str, renames: Renames) -> str:
    """Return our name of a tensor."""
    for pattern, ours in renames:
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return name

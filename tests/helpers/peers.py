"""Networks of MONAI with random weights, narrow, and files in the layout in which their owners write them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import nn

from interop import formats

NARROW_VAE = {**formats._MAISI_VAE, "num_channels": [8, 16], "norm_num_groups": 8, "num_res_blocks": [1, 1]}
NARROW_VAE["attention_levels"] = [False, False]
NARROW_UNET = {"num_channels": [8, 16], "norm_num_groups": 8, "num_head_channels": [0, 8], "num_res_blocks": 1}
NARROW_UNET["attention_levels"] = [False, True]
NARROW_EMBEDDING = {"conditioning_embedding_num_channels": [8, 16]}  # of two levels, as the narrow autoencoder


def random_weights(network: nn.Module, seed: int = 0) -> Any:
    """The network with weights that all matter, also where MONAI starts them at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return network.eval()


def maisi_autoencoder(seed: int = 0, **changes: Any) -> AutoencoderKlMaisi:
    """MAISI's autoencoder, on one piece of the volume at a time."""
    return random_weights(AutoencoderKlMaisi(**{**NARROW_VAE, **changes}, num_splits=1, save_mem=False), seed)


def maisi_unet(name: str, seed: int = 1) -> DiffusionModelUNetMaisi:
    """MAISI's U-Net of a format."""
    return random_weights(DiffusionModelUNetMaisi(**{**formats.FORMATS[name].parts[1].arguments, **NARROW_UNET}), seed)


def maisi_controlnet(name: str, seed: int = 2) -> ControlNetMaisi:
    """MAISI's ControlNet of a format."""
    arguments = {**formats.FORMATS[name].parts[2].arguments, **NARROW_UNET, **NARROW_EMBEDDING}
    return random_weights(ControlNetMaisi(**arguments, use_checkpointing=False), seed)


def narrow(monkeypatch: Any, name: str) -> None:
    """Make a format of MAISI expect narrow networks."""
    kind = formats.FORMATS[name]
    vae, unet, *others = kind.parts
    parts = [
        replace(vae, arguments=NARROW_VAE),
        replace(unet, arguments={**(unet.arguments or {}), **NARROW_UNET}),
        *(replace(one, arguments={**(one.arguments or {}), **NARROW_UNET, **NARROW_EMBEDDING}) for one in others),
    ]
    monkeypatch.setitem(formats.FORMATS, name, replace(kind, parts=parts))


def write_controlnet(folder: Path, name: str) -> ControlNetMaisi:
    """Write the ControlNet of a format of MAISI as its training script does, in models/. Returns it."""
    controlnet = maisi_controlnet(name)
    content = {"epoch": 3, "loss": 0.5, "controlnet_state_dict": controlnet.state_dict()}
    torch.save(content, folder / "models" / formats.FORMATS[name].parts[2].files[0])
    return controlnet


def write_maisi(folder: Path, name: str, scale_factor: float = 1.25) -> tuple[nn.Module, nn.Module]:
    """Write the files of a format of MAISI as its scripts do, in models/, without the ControlNet. Returns the networks
    in them."""
    vae, unet = maisi_autoencoder(), maisi_unet(name)
    (folder / "models").mkdir(parents=True)
    torch.save(vae.state_dict(), folder / "models" / formats.FORMATS[name].parts[0].files[0])
    content = {"epoch": 7, "loss": 0.25, "num_train_timesteps": 1000, "scale_factor": torch.tensor(scale_factor)}
    content["unet_state_dict"] = unet.state_dict()
    torch.save(content, folder / "models" / formats.FORMATS[name].parts[1].files[0])
    return vae, unet


def write_masks(folder: Path, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Write MAISI's mask autoencoder, of so many outputs, and its mask diffusion as its scripts do. Returns them."""
    vae, unet = (part.arguments or {} for part in formats.FORMATS["maisi-masks"].parts)
    vae = random_weights(AutoencoderKlMaisi(**{**vae, "out_channels": outputs}, num_splits=1, save_mem=False), 3)
    unet = random_weights(DiffusionModelUNet(**unet), 4)
    (folder / "models").mkdir(parents=True)
    torch.save(vae.state_dict(), folder / "models/mask_generation_autoencoder.pt")
    content = {"unet_state_dict": unet.state_dict(), "scale_factor": 1.0055984258651733}
    torch.save(content, folder / "models/mask_generation_diffusion_unet.pt")
    return vae, unet


def narrow_masks(monkeypatch: Any, outputs: int) -> None:
    """Make the format of MAISI's masks expect narrow networks, of so many outputs."""
    kind = formats.FORMATS["maisi-masks"]
    vae, unet = kind.parts
    narrow_vae = {**(vae.arguments or {}), "out_channels": outputs, "num_channels": [8, 16], "norm_num_groups": 8}
    narrow_vae |= {"num_res_blocks": [1, 1], "attention_levels": [False, False]}
    narrow_unet = {**(unet.arguments or {}), **NARROW_UNET, "channels": NARROW_UNET["num_channels"]}
    del narrow_unet["num_channels"]
    parts = [replace(vae, arguments=narrow_vae), replace(unet, arguments=narrow_unet)]
    monkeypatch.setitem(formats.FORMATS, "maisi-masks", replace(kind, parts=parts))
    monkeypatch.setattr("interop.maisi_masks.OUTPUTS", outputs)


def old_name(key: str) -> str:
    """The name that MONAI Generative gave a tensor of today's."""
    key = key.replace(".postconv.", ".conv.").replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_")
    return key.replace("attn1.out_proj.", "attn1.to_out.0.").replace("attn2.out_proj.", "attn2.to_out.0.")


def old_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network as MONAI Generative stored them, with the layers of its self-attention that it never
    used."""
    state = {old_name(key): value for key, value in network.state_dict().items()}
    unused = {key.replace(".to_q.", ".proj_attn."): value * 3 for key, value in state.items() if ".to_q." in key}
    return state | {key: value for key, value in unused.items() if "transformer_blocks" not in key and key not in state}

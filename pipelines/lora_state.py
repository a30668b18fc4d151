"""LoRAs that are attached to a U-Net: their tensors, their settings, and the fingerprint of the active ones."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoencoder.identity import is_same, stamps_of
from diffusion import LatentDenoiser
from pipelines.storage.lora_files import FACTORS
from pipelines.storage.provenance import tensor_digest


def attached_lora(unet: LatentDenoiser, adapter_name: str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Return the tensors by layer and peft's settings of the LoRA `adapter_name` of `unet`. Raises: ValueError if there
    is none.
    """
    from peft import get_peft_model_state_dict

    attached = getattr(unet, "peft_config", {})
    if adapter_name not in attached:
        raise ValueError(f"no LoRA {adapter_name!r} is attached; attached: {list(attached)}")
    return get_peft_model_state_dict(unet, adapter_name=adapter_name), attached[adapter_name].to_dict()


def lora_digest(unet: nn.Module) -> str | None:
    """Fingerprint of the LoRAs that act on `unet` now, fused or not, with their scales; None if none does. For a
    loaded one the tensors of its file count, so that half precision changes nothing, unless it was changed since."""
    digests = defaultdict(hashlib.sha256)
    unet = getattr(unet, "_orig_mod", unet)  # beneath torch.compile
    layers: list[tuple[str, Any]] = list(unet.named_modules())
    stored: dict[str, Mapping[str, torch.Tensor]] = {}
    for adapter, (tensors, stamps) in getattr(unet, "lora_origins", {}).items():
        if is_same(stamps, stamps_of(lora_factors(unet, adapter))):
            stored[adapter] = tensors
    for name, layer in layers:
        if not hasattr(layer, "lora_A"):
            continue
        for adapter in layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters):
            if adapter in layer.lora_A and layer.scaling[adapter]:
                digests[adapter].update(f"{name} {float(layer.scaling[adapter])}".encode())
                own = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
                for end, factor in zip(FACTORS, own, strict=True):
                    tensor_digest(digests[adapter], "", stored.get(adapter, {}).get(name + end, factor))
    return " ".join(sorted(digest.hexdigest() for digest in digests.values())) or None


def lora_factors(unet: nn.Module, adapter_name: str) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of an attached LoRA, by the names that they have in its file."""
    layers: list[Any] = [(name, layer) for name, layer in unet.named_modules() if hasattr(layer, "lora_A")]
    return [
        (name + end, factors[adapter_name].weight)
        for name, layer in layers
        for end, factors in zip(FACTORS, (layer.lora_A, layer.lora_B), strict=True)
        if adapter_name in factors
    ]


def check_hotswap(unet: LatentDenoiser, tensors: Mapping[str, torch.Tensor], adapter_name: str | None) -> None:
    """Raise ValueError unless a LoRA of this name is attached to the same layers: diffusers would lose it."""
    attached = list(getattr(unet, "peft_config", {}))
    if adapter_name is None or adapter_name not in attached:
        raise ValueError(f"hotswap: no LoRA {adapter_name!r} is attached; adapter_name is one of {attached}")
    own, other = (
        sorted({key.rpartition(".lora_")[0] for key in keys})
        for keys in (attached_lora(unet, adapter_name)[0], tensors)
    )
    if own != other:
        raise ValueError(
            f"hotswap: the LoRA {adapter_name!r} changes {len(own)} layers, the new one {len(other)}, not the same: "
            f"{', '.join(sorted(set(own) ^ set(other))[:4])}; load it beside the other, under another name"
        )

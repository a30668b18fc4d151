"""The settings in the file of a LoRA: an allow-list of peft's settings with their types and ranges, checked before peft
sees them.

peft treats names of layers in a file as regular expressions, which can run forever. It allocates what a rank asks for,
and computes with an alpha of any kind. Here names are plain, names and ranks must be those of the tensors, and peft
gets exact settings.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch

from cli.settings import Range, ShareBelowOne, faults_of

Rank = Annotated[int, Range(1, 65536)]
Alpha = Annotated[float, Range(0, 1e6, above=True)]
SETTINGS: Mapping[str, Any] = {  # types, as `faults_of` takes them
    "r": Rank,
    "lora_alpha": Alpha,
    "lora_dropout": ShareBelowOne,
    "target_modules": list[str],
    "rank_pattern": dict[str, Rank],
    "alpha_pattern": dict[str, Alpha],
    "use_rslora": bool,
}
# Settings of peft that would make another model of the same tensors, and the values that leave them out.
OTHERS = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices", "bias"),
)
WITHOUT = (None, False, "none", [], {})
NAME = re.compile(r"\w{1,64}(?:\.\w{1,64}){0,15}", re.ASCII)
MOST_LAYERS = 10_000
SHOWN = 60  # letters of a name or value in a message


def check_tensors(tensors: Mapping[str, torch.Tensor], source: object) -> None:
    """Check the factors of a LoRA by themselves; `lora.check_lora` compares them with a U-Net.

    Raises: ValueError naming a tensor that is not of two dimensions or more, empty, not of floating point, or not
    finite.
    """
    if len(tensors) > 2 * MOST_LAYERS:
        raise ValueError(f"{source}: has {len(tensors)} tensors, more than any LoRA")
    for name, tensor in tensors.items():
        problem = None
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2 or not tensor.numel():
            problem = "is not a matrix, or is empty"
        elif not tensor.is_floating_point() or tensor.itemsize < 2:
            problem = f"is of {tensor.dtype}; floating point of 16 bits or more is expected"
        elif not torch.isfinite(tensor).all():
            problem = "holds values that are not finite (NaN or infinite)"
        if problem:
            raise ValueError(f"{source}: {name[:SHOWN]!r} {problem}")


def check_settings(
    header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: object
) -> Mapping[str, Any] | None:
    """Check peft's settings of a LoRA, and return them as peft accepts them; None for a header without any.

    Args:
        header: peft's settings by name, as a file has them; settings without effect on the result are omitted.
        tensors: the LoRA's, by layer ("down_blocks.0.0.conv1.lora_A.weight").
    Returns: r, lora_alpha, lora_dropout, use_rslora, target_modules as they are; patterns by whole names of layers, as
        far as these differ from r and lora_alpha.
    Raises: ValueError naming a setting that is missing, is of another type or out of range, is not in `SETTINGS` and
        would change the model, names layers by anything but plain names, or does not fit the tensors.
    """
    settings = {name: header[name] for name in SETTINGS if header.get(name) is not None}
    if acting := [name for name in OTHERS if header.get(name) not in WITHOUT]:
        raise ValueError(f"{source}: sets {acting[0]}={repr(header[acting[0]])[:SHOWN]}, which LoRAs here do not have")
    if not settings:
        return None
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in settings]:
        raise ValueError(f"{source}: is not a LoRA as train_ldm.py writes it: its settings lack {', '.join(missing)}")
    for name, value in settings.items():
        if isinstance(value, list | dict) and len(value) > MOST_LAYERS:
            raise ValueError(f"{source}: {name} names {len(value)} layers, more than any U-Net has")
        if wrong := next(faults_of(SETTINGS[name], value, name), None):
            raise ValueError(f"{source}: {wrong}")
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        if odd := [one for one in settings.get(name, ()) if not NAME.fullmatch(one.removeprefix("^"))]:
            raise ValueError(
                f"{source}: {name} names the layer {odd[0][:SHOWN]!r}; plain names such as qkv or "
                "down_blocks.0.0.conv1 are read"
            )
    return _exact(settings, tensors, source)


def _exact(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: object) -> Mapping[str, Any]:
    """Return the settings by whole names of layers. Raises: ValueError unless layers and ranks are those of the
    tensors.
    """
    ranks = {
        key.removesuffix(".lora_A.weight"): len(one) for key, one in tensors.items() if key.endswith(".lora_A.weight")
    }
    targets = set(settings["target_modules"])
    named = {layer: targets.intersection(_names(layer)) for layer in ranks}
    if left := [layer for layer, names in named.items() if not names]:
        raise ValueError(f"{source}: target_modules does not name {left[0][:SHOWN]!r}, but there are tensors of it")
    if unused := sorted(targets.difference(*named.values())):
        raise ValueError(f"{source}: target_modules names {unused[0]!r}, but there are no tensors of it")
    patterns: dict[str, dict[str, int | float]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for name, usual in (("rank_pattern", settings["r"]), ("alpha_pattern", settings["lora_alpha"])):
        pattern = settings.get(name, {})
        for layer in ranks:
            value = next((pattern[one] for one in _names(layer) if one in pattern), usual)
            if name == "rank_pattern" and value != ranks[layer]:
                raise ValueError(
                    f"{source}: has the rank {value} for {layer!r}, whose tensors are of rank {ranks[layer]}"
                )
            if value != usual:
                patterns[name][f"^{layer}"] = value
    return {**settings, **patterns}


def _names(layer: str) -> list[str]:
    """Return a layer's names in settings: its whole name, with or without peft's mark for that, or its last parts."""
    parts = layer.split(".", 16)
    return [f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))]


def plain_settings(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """Return settings of an attached LoRA, or of a user's, as a file may have them: peft's regular expressions are
    written out as names of layers.
    """
    plain = {name: settings[name] for name in (*SETTINGS, *OTHERS) if settings.get(name) is not None}
    layers = sorted({key.rpartition(".lora_")[0] for key in tensors})
    if isinstance(targets := plain.get("target_modules"), str | set | tuple):
        plain["target_modules"] = layers if isinstance(targets, str) else sorted(targets)
    for name in ("rank_pattern", "alpha_pattern"):
        given = plain.get(name) or {}
        if any(not NAME.fullmatch(str(key).removeprefix("^")) for key in given):
            from peft.utils.other import get_pattern_key

            keys = {layer: get_pattern_key(list(given), layer) for layer in layers}
            plain[name] = {f"^{layer}": given[key] for layer, key in keys.items() if key in given}
    return plain

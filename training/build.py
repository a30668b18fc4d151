"""Build models from a config section, and initialize them from a trained model."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cli.settings import faults, refuse
from files.paths import refuse_special


def build_model(section: Mapping[str, Any], gradient_checkpointing: bool = False) -> Any:
    """Build the model of a config section `class: package.Name` plus that class's constructor arguments.

    Raises: ValueError for a class that cannot be imported, an unknown argument or one of the wrong type, naming it.
    """
    arguments = dict(section)
    path = arguments.pop("class", None)
    if not isinstance(path, str) or "." not in path:
        raise ValueError(
            f"the model section needs `class: package.Name`, for example autoencoder.AutoencoderKL3D; got {path!r}"
        )
    module_name, _, name = path.rpartition(".")
    try:
        model_class: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model class {path}: {error}") from error
    refuse(faults(model_class, arguments, "model.", raw=True), f"{path}: ")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(model_class, as_group=False)  # pyright: ignore[reportArgumentType]
    try:
        checked = parser.parse_object(arguments)
    except Exception as error:  # jsonargparse raises several kinds, each with the argument's name in its message
        raise ValueError(f"model section does not fit {path}: {error}") from error
    model = model_class(**{k: checked[k] for k in arguments})
    if gradient_checkpointing and list(model.parameters()):
        model.enable_gradient_checkpointing()
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a saved model's folder (one or several safetensors files).

    Raises: ValueError if there are none, or if a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"--init_from {folder}: no .safetensors file there; give a model's folder, like RUN/vae or PIPELINE/unet"
        )
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            refuse_special(file)
            weights |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"--init_from {file}: truncated or corrupt safetensors file ({error}); download or save it again"
            ) from error
    return weights


def initialize_from(
    model: nn.Module,
    folder: str | Path,
    new: str | None = None,
    moved: Mapping[str, str | None] | None = None,
    own: str | None = None,
    longer: str | None = None,
) -> list[str]:
    """Load a trained model's weights into `model`, for fine-tuning. Layers of another shape stay as initialized.

    A layer is the module that directly holds a parameter: if a convolution's weight has another shape, its bias stays
    fresh as well.

    Args:
        new: a submodule that the trained model may lack, entirely or in part; parameters that it lacks start at zero.
        own: the same, but they stay as initialized.
        moved: layers of the trained model that have another name in this one, or None for layers to skip.
        longer: a parameter that has more rows than the trained model's; those that it lacks start at zero.
    Returns: names of the layers that stay fresh, such as "encoder.0", sorted.
    Raises: ValueError if keys are missing or unexpected, or if no layer fits.
    """
    weights, current = {}, model.state_dict()
    for key, tensor in read_weights(Path(folder)).items():
        layer, _, name = key.rpartition(".")
        if (target := (moved or {}).get(layer, layer)) is not None:
            weights[f"{target}.{name}" if target else name] = tensor
    if longer in weights and longer in current:
        missing_rows = len(current[longer]) - len(weights[longer])
        if missing_rows > 0 and weights[longer].shape[1:] == current[longer].shape[1:]:
            zeros = weights[longer].new_zeros((missing_rows, *weights[longer].shape[1:]))
            weights[longer] = torch.cat([weights[longer], zeros])
    lacking = current.keys() - weights.keys()
    added = {key for key in lacking if new and key.startswith(f"{new}.")}
    kept_own = {key for key in lacking if own and key.startswith(f"{own}.")}
    missing, unexpected = sorted(lacking - added - kept_own), sorted(weights.keys() - current.keys())
    if missing or unexpected:
        raise ValueError(
            f"--init_from {folder}: weights of another architecture (missing {missing[:5]}, unexpected "
            f"{unexpected[:5]}, {len(missing) + len(unexpected)} in all); only the numbers of labels and channels may "
            "differ"
        )
    fresh = {
        key.rpartition(".")[0] for key in current if key not in weights or current[key].shape != weights[key].shape
    }
    kept = {key: tensor for key, tensor in weights.items() if key.rpartition(".")[0] not in fresh}
    if not kept:
        raise ValueError(f"--init_from {folder}: no layer has the same shape as in this model; compare the two configs")
    model.load_state_dict(kept | {key: torch.zeros_like(current[key]) for key in added}, strict=False)
    return sorted(fresh)

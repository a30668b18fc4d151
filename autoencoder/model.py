"""What the project's models share: strict loading, safetensors only, and the memory format that they are fast in."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin


class VolumeModel(ModelMixin, ConfigMixin):
    """A diffusers model over volumes (B, C, X, Y, Z)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own, but strict: diffusers only warns of a missing key and leaves the parameter unset.

        Loading also drops the memory format that the constructor chose; it is restored here.
        Raises: ValueError on missing, unexpected or misshapen tensors, and on `use_safetensors=False`.
        """
        if kwargs.pop("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False is refused: a pickle can run any code when it is read")
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
        )
        model, info = loaded
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if wrong or info.get("mismatched_keys"):
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights are not those of a {cls.__name__} with this config: "
                f"{wrong or info['mismatched_keys']}"
            )
        model.to(memory_format=torch.channels_last_3d)
        return (model, info) if with_info else model

"""The base class of all models: strict loading, safetensors only, and the fast memory format."""

import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from cli.settings import faults, hints_of, refuse
from files.documents import FileError

from .identity import RECORD, remember_files, weights_record
from .weights import (
    HUB,
    LOADING,
    UPLOAD,
    check_keywords,
    check_weights,
    find_folder,
    folder_to_save,
    loading_keywords,
    not_on_the_hub,
    weight_files,
)

RECORDS = (
    "data",
    "license",
    "subjects",
)  # of a config: what is known of the training, which changes nothing that a model computes


def deciding(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the entries of a model's config that decide its output: no private ones (versions, paths), none that are
    None (so an argument that a later version adds does not rename models that do not use it), no `RECORDS`."""
    return {k: v for k, v in config.items() if not k.startswith("_") and v is not None and k not in RECORDS}


def check_finite(model: torch.nn.Module, source: object) -> None:
    """Raise ValueError naming the tensors of a model in memory that hold NaN or infinity. The cause is a damaged file,
    or numbers too large for the type that they were loaded in. Only `model_hash` detects other damage.
    """
    state = model.state_dict()
    wrong = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.device.type != "meta"
        if not torch.isfinite(tensor).all()
    ]
    if wrong:
        types = sorted({str(state[name].dtype).removeprefix("torch.") for name in wrong})
        raise ValueError(
            f"{source}: {len(wrong)} of its {len(state)} tensors are not finite in {', '.join(types)} "
            f"({', '.join(wrong[:4])}); download the weights again, or load them in another dtype"
        )


class VolumeModel(ModelMixin, ConfigMixin):
    """A diffusers model over volumes (B, C, X, Y, Z). Its constructor's arguments are checked against their
    annotations.

    Raises: ValueError for an argument outside its range, or of another type.
    """

    memory_format: torch.memory_format = torch.channels_last_3d  # of the weights

    def __init__(self) -> None:
        super().__init__()  # after `register_to_config`, so the arguments are known
        arguments = {name: value for name, value in self.config.items() if name in hints_of(type(self))}
        refuse(faults(type(self), arguments), f"{type(self).__name__}: ")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a model from a config, as diffusers does. Arguments of the constructor in `kwargs` replace the
        config's.

        Raises: TypeError for other keywords, unless `return_unused_kwargs` is set.
        """
        if not return_unused_kwargs:
            check_keywords("from_config", kwargs, {*inspect.signature(cls.__init__).parameters} - {"self"})
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a model, as diffusers does, but strictly: diffusers only warns of a missing key and leaves the parameter
        unset.

        Loading also drops the memory format that the constructor chose; it is restored here.
        Raises: ValueError on missing, unexpected or misshapen tensors, and on `use_safetensors=False`; FileError (a
        ValueError and an OSError) for a missing folder and for damaged files; TypeError for unknown keywords.
        """
        if not kwargs.get("use_flashpack"):  # set by diffusers' pipelines
            kwargs.pop("use_flashpack", None)
        check_keywords("from_pretrained", kwargs, (*HUB, *LOADING, "output_loading_info", "subfolder"))
        kwargs = loading_keywords(kwargs)
        place = find_folder(pretrained_model_name_or_path)
        if place is not None:  # of a Hub repository, what was downloaded is checked below
            check_weights(place / (kwargs.get("subfolder") or ""), cls, kwargs.get("variant"))
            pretrained_model_name_or_path = str(place)
        with_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (OSError, HFValidationError) as error:
            if place is not None or isinstance(error, FileError):
                raise
            raise not_on_the_hub(pretrained_model_name_or_path, error) from error
        model, info = loaded
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if wrong or info.get("mismatched_keys"):
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights are not those of a {cls.__name__} with this config: "
                f"{wrong or info['mismatched_keys']}"
            )
        check_finite(model, pretrained_model_name_or_path)
        own_weights(model, cls.memory_format)
        remember_files(model, _loaded_files(pretrained_model_name_or_path, kwargs))
        return (model, info) if with_info else model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply `fn` as PyTorch does for `.to()`. Weights that are cast or moved stay the same weights (`identity`)."""
        recorded = RECORD in self.__dict__
        if recorded:
            weights_record(self)  # detects earlier changes first
        result = super()._apply(fn, recurse)
        if recorded:
            weights_record(self)
        return result

    def save_pretrained(  # diffusers' pipelines pass what they find in the signature
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as diffusers does, but as safetensors only, and without the path that the model came from.

        Raises: ValueError on `safe_serialization=False`, and while a LoRA is attached, which would be mixed into the
        weights; FileError (a ValueError and an OSError) if `save_directory` is a file; TypeError for unknown keywords.
        """
        check_keywords("save_pretrained", kwargs, UPLOAD if push_to_hub else ())
        if not safe_serialization:
            raise ValueError("safe_serialization=False is refused: weights are saved as safetensors only")
        self.check_no_lora()
        folder = folder_to_save(save_directory)
        self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "_name_or_path"})
        super().save_pretrained(
            folder,
            is_main_process=is_main_process,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )

    def check_no_lora(self) -> None:
        """Raise ValueError while a layer is wrapped for LoRAs, whose weights would be saved under other names."""
        if any(hasattr(module, "base_layer") for module in self.modules()):
            raise ValueError(
                "a LoRA is attached: save it separately (save_lora_weights), or unload it first (unload_lora_weights); "
                "fuse_lora before that keeps it in the weights"
            )

    def enable_group_offload(self, onload_device: torch.device, **kwargs: Any) -> None:
        """Offload as diffusers does. On disk (`offload_to_disk_path`) each model has its own subfolder, and its weights
        lose the memory format, which safetensors cannot hold: a little slower on CPUs.

        Raises: ValueError if that folder holds files already: diffusers would load those in place of these weights.
        """
        path = kwargs.get("offload_to_disk_path")
        if path is not None:
            folder = Path(path).expanduser() / type(self).__name__
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(
                    f"offload_to_disk_path: {folder} holds offloaded weights already; give an empty folder"
                )
            kwargs["offload_to_disk_path"] = str(folder)
            self.offloaded_to_disk = folder
            self.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        super().enable_group_offload(onload_device, **kwargs)


def own_weights(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Copy the weights of a loaded model into memory of its own, in a memory format.

    Safetensors maps the file. A single small tensor that stayed in it would hold the whole file in memory, beside the
    copies; and a file that is written over would change the model, or end the process.
    """
    tensors = [*model.parameters(), *model.buffers()]
    mapped = {tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu"}
    model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]  # copies most of them
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.data_ptr() in mapped:
            tensor.data = tensor.data.clone()


def _loaded_files(source: Any, options: Mapping[str, Any]) -> list[Path]:
    """Return the files from which diffusers loaded a model: in a folder, or in the cache of a Hub repository."""
    folder = Path(source, options.get("subfolder") or "")
    if not folder.is_dir():
        name = str(Path(options.get("subfolder") or "", "config.json"))
        config = try_to_load_from_cache(str(source), name, options.get("cache_dir"), options.get("revision"))
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return weight_files(folder, options.get("variant"))

"""Saving and loading a pipeline, safetensors only, and the hash by which every sidecar names its model."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HFValidationError

from autoencoder.weights import weight_files
from diffusion import fit_scheduler

from .loading import check_folder
from .lora import lora_digest
from .provenance import content_hash, memory_tensors, stored_tensors

COMPONENTS = ("vae", "unet")


class StoredPipeline(DiffusionPipeline):
    """What `MedVolumePipeline` is as a folder of files."""

    _files: dict[str, tuple[object, list[Path]]]  # component: the module that was loaded, and from what
    _hashed: dict[tuple[str, ...], tuple[list[object], str]]  # components: of these modules, their hash

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> Self:
        """Load a pipeline folder or a Hub repository as `DiffusionPipeline.from_pretrained` does, safetensors only.

        Raises: ValueError on a missing, extra or misshapen tensor, on a damaged file or a pickle in place of
        safetensors, on a folder that is no pipeline, on a name that is neither a folder nor on the Hub.
        """
        if kwargs.pop("use_safetensors", True) is not True:
            raise ValueError("use_safetensors=False is refused: a pickle can run any code when it is read")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(cls.download(str(pretrained_model_name_or_path), use_safetensors=True, **kwargs))
            except (OSError, HFValidationError) as error:
                raise ValueError(f"{folder}: no such folder here, nor is it found on the Hub: {error}") from error
        check_folder(folder, kwargs)
        try:
            pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"{folder}: {error}") from error
        if "scheduler" not in kwargs:
            try:
                fit_scheduler(pipe.scheduler, pipe.unet.config["objective"], pipe.unet.train_steps)
            except ValueError as error:
                raise ValueError(f"{folder / 'scheduler'}: {error}; or load it with scheduler=...") from error
        for name in COMPONENTS:
            if name not in kwargs:
                pipe._files[name] = getattr(pipe, name), weight_files(folder / name, kwargs.get("variant"))
        return pipe

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does: safetensors only, and not the path it came from; the scheduler
        with the options in effect, for a file does not tell those that somebody set from a class's defaults.

        Raises: ValueError on `safe_serialization=False`, while a LoRA is attached, and for a scheduler that does not fit
        the model, before anything is written.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError("safe_serialization=False is refused: weights are saved as safetensors only")
        self.unet.check_no_lora()
        own = self.scheduler
        self.scheduler = fit_scheduler(own, self.unet.config["objective"], self.unet.train_steps)
        try:
            for part in (self, self.scheduler):  # the models do it themselves
                part._internal_dict = FrozenDict({k: v for k, v in part.config.items() if k != "_name_or_path"})
            super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)
        finally:
            self.scheduler = own

    def enable_group_offload(self, onload_device: torch.device, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own; `model_hash` is computed first, while the weights are at hand."""
        _ = self.model_hash
        super().enable_group_offload(onload_device, *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own; `model_hash` is computed first, while the weights are at hand."""
        _ = self.model_hash
        super().enable_sequential_cpu_offload(*args, **kwargs)

    @property
    def data(self) -> dict[str, Any]:
        """What the model was trained on: labels, spacing, intensity scales, shapes (`volumes.describe`)."""
        return self.config["data"]

    @property
    def model_hash(self) -> str:
        """sha256 over configs and weights of autoencoder and U-Net and over `data`: the model's name in every sidecar.

        Of a loaded component the stored tensors count, so that half precision and offloading change nothing. Kept
        until a component is replaced; training a component in place afterwards is not noticed. LoRAs that act, and
        their scales, count as well.
        """
        weights = self._hash_of(COMPONENTS)
        loras = lora_digest(self.unet)
        return weights if loras is None else hashlib.sha256(f"{weights} {loras}".encode()).hexdigest()

    @property
    def unet_hash(self) -> str:
        """sha256 over the U-Net's config and weights, without LoRAs: what a LoRA's file names as its base."""
        return self._hash_of(("unet",))

    def _hash_of(self, names: tuple[str, ...]) -> str:
        parts = [getattr(getattr(self, name), "_orig_mod", getattr(self, name)) for name in names]  # beneath compile
        kept, value = self._hashed.get(names, ([], ""))
        if len(kept) != len(parts) or any(a is not b for a, b in zip(kept, parts, strict=True)):
            contents: dict[str, Any] = {"data": (self.data, ())} if names == COMPONENTS else {}
            for name, part in zip(names, parts, strict=True):
                loaded, files = self._files.get(name, (None, []))
                contents[name] = (part.config, stored_tensors(files) if loaded is part else memory_tensors(part))
            value = content_hash(contents)
            self._hashed[names] = parts, value
        return value

    def _dtypes(self) -> str:
        """Every type that weights are computed or stored in: more than one if only a part was cast."""
        models: list[Any] = [getattr(self, name) for name in COMPONENTS]
        types = {model.dtype for model in models} | {p.dtype for model in models for p in model.parameters()}
        return " ".join(sorted(str(one).removeprefix("torch.") for one in types))

"""Saving and loading a pipeline, safetensors only, and the hash by which every sidecar names its model."""

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from autoencoder.identity import moves_weights, weights_record
from autoencoder.weights import (
    HUB,
    LOADING,
    UPLOAD,
    check_keywords,
    find_folder,
    folder_to_save,
    loading_keywords,
    not_on_the_hub,
)
from diffusion import LatentDenoiser, MonaiControlNet3D, check_guidance
from diffusion.denoise import set_timesteps
from diffusion.distillation import check_guidance_of_student
from diffusion.monai.controlnet import controlled
from diffusion.monai.maisi_steps import with_maisi_steps
from files.atomic import atomic_parts, refuse_link
from files.paths import refuse_special
from pipelines.inputs.masks import replaced_labels
from pipelines.lora_state import lora_digest
from volumes.description import DataDescription

from .documents import CARD, DOCUMENTS, hub_card, read_documents, write_documents
from .loading import COMPONENTS as PARTS
from .loading import OPTIONAL, check_autoguidance, check_folder, check_weak, load_unet
from .provenance import Tensors, content_hash, memory_tensors, stored_tensors
from .sampling_settings import (
    REMEDY,
    SAMPLING,
    SamplingSettings,
    check_conditioning_scale,
    read_sampling,
    write_sampling,
)

COMPONENTS = ("vae", "unet")  # that the model's hash names, with the ControlNet if there is one
CONTROLNET = "controlnet"
WEIGHTS = (*COMPONENTS, *OPTIONAL)
INDEX = "model_index.json"
_hashes: dict[str, str] = {}  # by configs and weights, of whatever pipelines
_lock = threading.RLock()


class PipelineIOMixin(DiffusionPipeline):
    """What `MedVolumePipeline` is as a folder of files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> Self:
        """Load a pipeline folder or a Hub repository as `DiffusionPipeline.from_pretrained` does, safetensors only.

        Args:
            kwargs: components instead of the folder's (vae, unet, scheduler, unet_weak, controlnet; None: the
                folder's), `data`, and those of diffusers' keywords that are about reading weights
                (`autoencoder.weights.LOADING`) or downloading them.
        Raises: ValueError on a missing, extra or misshapen tensor, on a folder that is not a pipeline; FileError, which
        is a ValueError and an OSError, on a damaged file, a pickle in place of safetensors, a name that is neither a
        folder nor on the Hub; TypeError for keywords that it does not read.
        """
        if kwargs.pop("custom_pipeline", None) is not None or kwargs.pop("trust_remote_code", False):
            raise ValueError("custom_pipeline and trust_remote_code are refused: code of a model is never run")
        check_keywords("from_pretrained", kwargs, (*HUB, *LOADING, *PARTS, "data"))
        kwargs = loading_keywords(kwargs, parts=WEIGHTS)
        folder = find_folder(pretrained_model_name_or_path)
        if folder is None:
            try:
                folder = Path(cls.download(str(pretrained_model_name_or_path), use_safetensors=True, **kwargs))
                of_hub = {name: kwargs[name] for name in HUB if name in kwargs}  # diffusers leaves these files out
                ours = [SAMPLING, *DOCUMENTS]
                snapshot_download(str(pretrained_model_name_or_path), allow_patterns=ours, **of_hub)
            except (OSError, HFValidationError) as error:
                raise not_on_the_hub(str(pretrained_model_name_or_path), error) from error
        check_folder(folder, kwargs)
        settings = read_sampling(folder)
        try:
            pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"{folder}: {error}") from error
        if kwargs.get("scheduler") is None:
            try:
                pipe.unet.fitted(pipe.scheduler)
            except ValueError as error:
                raise ValueError(f"{folder / 'scheduler'}: {error}; or load it with scheduler=...") from error
        pipe.sampling_settings = settings
        pipe.documents = {} if _others(kwargs) else read_documents(folder)
        try:
            pipe._check_sampling(with_steps=kwargs.get("scheduler") is None)
        except ValueError as error:
            raise ValueError(f"{folder / SAMPLING}: {error}; {REMEDY}") from error
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of the components of another one, which share their memory, as `DiffusionPipeline.from_pipe`; it
        has the same `sampling_settings`.

        Args:
            kwargs: vae, unet, scheduler or data instead of the other's; dtype, to which the components are cast,
                also in the other pipeline. Without it they stay as they are; diffusers would cast them to float32.
        Raises: ValueError if they do not fit each other, or if `pipeline` lacks one, or is not a pipeline; TypeError
        for other keywords.
        """
        check_keywords("from_pipe", kwargs, (*PARTS, "data", "dtype", "torch_dtype"))
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"from_pipe takes a pipeline, got {pipeline!r:.80}; of a folder use from_pretrained")
        kwargs = loading_keywords(kwargs)
        dtypes = [kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs]
        parts = {name: getattr(pipeline, name, None) for name in PARTS}
        pipe = cls(**{"data": pipeline.config.get("data"), **parts, **kwargs})
        pipe.sampling_settings = getattr(pipeline, "sampling_settings", pipe.sampling_settings)
        pipe.documents = {} if _others(kwargs) else getattr(pipeline, "documents", {})
        return pipe.to(dtypes[-1]) if dtypes else pipe

    def save_pretrained(  # the order of diffusers' own
        self,
        save_directory: str | PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does: safetensors only, and not the path it came from; the
        scheduler with the options in effect, for a file does not tell those that somebody set from a class's defaults,
        `sampling_settings` as sampling.json, and the `documents`. A new folder appears in one step; in an older one
        other files stay, and killed in between it has no model_index.json (`files.atomic.atomic_parts`).

        Raises: ValueError on `safe_serialization=False`, while a LoRA is attached, and for a scheduler or sampling
        settings that do not fit the model, FileError if `save_directory` is a file, TypeError for keywords that it does
        not read, before anything is written.
        """
        check_keywords("save_pretrained", kwargs, UPLOAD if push_to_hub else ())
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)  # diffusers' default would be the unfinished folder
        if not safe_serialization:
            raise ValueError("safe_serialization=False is refused: weights are saved as safetensors only")
        self.unet.check_no_lora()
        self._check_sampling()
        folder = Path(folder_to_save(save_directory))
        for name in PARTS:
            refuse_link(folder / name)
        own = self.scheduler
        self.scheduler = self.unet.fitted(own)
        try:
            for part in (self, self.scheduler):  # the models do it themselves
                part._internal_dict = FrozenDict({k: v for k, v in part.config.items() if k != "_name_or_path"})
            with atomic_parts(folder, INDEX) as unfinished:
                for name in PARTS:  # what is there of another variant stays
                    if getattr(self, name) is not None:
                        _copy_files(folder / name, unfinished / name)
                if self.sampling_settings != SamplingSettings() or (folder / SAMPLING).exists():
                    write_sampling(self.sampling_settings, unfinished)
                new = {name: content for name, content in self.documents.items() if not (folder / name).exists()}
                write_documents(new, unfinished)  # what was edited there stays
                super().save_pretrained(
                    str(unfinished),
                    variant=variant,
                    max_shard_size=max_shard_size,
                    push_to_hub=push_to_hub,
                    **kwargs,
                )
        finally:
            self.scheduler = own

    def _upload_folder(self, working_dir: str | PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload a saved folder, for `push_to_hub` and `save_pretrained`, with a card of the pipeline's in place of the
        one that diffusers wrote into it: its own, or else the repository's, or a short one; each with the license."""
        place = Path(working_dir) / CARD
        if place.is_file():  # diffusers writes none into a subfolder
            card = self.documents.get(CARD) or place.read_bytes()
            place.write_text(hub_card(card.decode(errors="replace"), self.data, self.license), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def enable_group_offload(self, onload_device: torch.device, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; `model_hash` is computed first, while the weights are in memory."""
        _ = self.model_hash
        super().enable_group_offload(onload_device, *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; `model_hash` is computed first, while the weights are in memory."""
        _ = self.model_hash
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def _check_sampling(self, *, with_steps: bool = True) -> None:
        """Raises: ValueError for settings of its own by which the model cannot sample: a guidance scale of conditions
        that training never dropped, and steps that the scheduler does not have."""
        settings, schema = self.sampling_settings, self.denoiser.condition_schema
        check_guidance(settings.guidance_scale, schema.dropout, schema.names)
        check_autoguidance(settings.autoguidance_scale, self.unet_weak)
        own = settings.guidance_scale, settings.autoguidance_scale, settings.guidance_without
        check_guidance_of_student(self.unet, *own)
        replaced_labels(self.denoiser, self.data.labels, settings.guidance_without or {})
        check_conditioning_scale(settings.controlnet_conditioning_scale, self.controlnet)
        if settings.maisi_steps and with_steps:
            with_maisi_steps(self.unet.fitted(self.scheduler))
        if with_steps and settings.num_inference_steps is not None:
            scheduler = self.unet.fitted(self.scheduler)
            set_timesteps(scheduler, settings.num_inference_steps, None, torch.device("cpu"))

    def load_unet_weak(self, folder: str | PathLike) -> None:
        """Load the weaker U-Net of autoguidance from a folder (a U-Net's, or a pipeline's), in place of the pipeline's
        own; it gets the type and the device of the pipeline's U-Net. `save_pretrained` saves it with the pipeline.
        After `enable_model_cpu_offload` it is moved like the others.

        Raises: FileError if there is none; ValueError if it does not fit the pipeline's U-Net, beside a ControlNet, and
        after an offload whose hooks it would not have.
        """
        if self.controlnet is not None:
            raise ValueError("load_unet_weak: the pipeline has a ControlNet, which would not steer a weaker U-Net")
        offloaded = bool(getattr(self, "_all_hooks", None))  # by enable_model_cpu_offload
        if not offloaded and moves_weights(self.unet):
            raise ValueError(
                "load_unet_weak: the pipeline's U-Net is offloaded, and the weaker one would not be; load it first, "
                "then call enable_sequential_cpu_offload or enable_group_offload"
            )
        weak = load_unet(str(folder))
        weak.to(self.unet.device, self.unet.dtype)
        check_weak(self.unet, weak)
        self.register_modules(unet_weak=weak)
        if offloaded:
            self.maybe_free_model_hooks()  # hooks all components again

    sampling_settings: SamplingSettings
    documents: dict[str, bytes]
    controlnet: MonaiControlNet3D | None
    _data: DataDescription

    @property
    def data(self) -> DataDescription:
        """The description of the training set: labels, spacing, intensity scales, shapes (`volumes.describe`)."""
        return self._data

    @property
    def license(self) -> str | None:
        """The license of the weights, where generated volumes must name it; None for weights without such terms."""
        models = [getattr(self, name) for name in (*COMPONENTS, CONTROLNET)]
        return next((text for model in models if model is not None and (text := model.config.get("license"))), None)

    @property
    def denoiser(self) -> LatentDenoiser:
        """The network that the conditions of a call are for: the U-Net, with the ControlNet if there is one."""
        return controlled(self.unet, self.controlnet)

    @property
    def model_hash(self) -> str:
        """sha256 over configs and weights of autoencoder, U-Net and ControlNet, and over `data`: the model's name in
        every sidecar.

        Of a loaded component the stored tensors count, so that half precision and offloading change nothing, whichever
        pipelines it is in. Of one that was changed in place since (trained, a LoRA fused for good) those in memory do;
        what is noticed says `autoencoder.identity`. LoRAs that act, and their scales, count as well.
        """
        weights = self._hash_of(COMPONENTS if self.controlnet is None else (*COMPONENTS, CONTROLNET))
        loras = lora_digest(self.unet)
        return weights if loras is None else hashlib.sha256(f"{weights} {loras}".encode()).hexdigest()

    @property
    def unet_hash(self) -> str:
        """sha256 over the U-Net's config and weights, without LoRAs: what a LoRA's file names as its base."""
        return self._hash_of(("unet",))

    @property
    def unet_weak_hash(self) -> str:
        """The `unet_hash` of the weaker U-Net."""
        return self._hash_of(("unet",), self.unet_weak)

    def _hash_of(self, names: tuple[str, ...], part: Any = None) -> str:
        """The hash of these components, or of `part` under the only name."""
        given = {name: getattr(self, name) if part is None else part for name in names}
        parts = {name: getattr(one, "_orig_mod", one) for name, one in given.items()}  # beneath compile
        configs = {name: dict(part.config) for name, part in parts.items()}
        if names[:2] == COMPONENTS:
            configs = {"data": self.config["data"], **configs}
        with _lock:  # of several calls one computes it
            records = {name: weights_record(part) for name, part in parts.items()}
            key = json.dumps(
                [configs, {name: record.key for name, record in records.items()}], sort_keys=True, default=str
            )
            if key not in _hashes:
                contents: dict[str, tuple[Mapping[str, Any], Tensors]]
                contents = {name: (config, ()) for name, config in configs.items()}
                for name, part in parts.items():
                    files = records[name].intact_files
                    contents[name] = configs[name], stored_tensors(files) if files else memory_tensors(part)
                _hashes[key] = content_hash(contents)
            return _hashes[key]

    def _dtypes(self) -> str:
        """Every type that weights are computed or stored in: more than one if only a part was cast."""
        parts = [getattr(self, name) for name in (*COMPONENTS, CONTROLNET)]
        models: list[Any] = [part for part in parts if part is not None]
        types = {model.dtype for model in models} | {p.dtype for model in models for p in model.parameters()}
        return " ".join(sorted(str(one).removeprefix("torch.") for one in types))


def _others(given: Mapping[str, Any]) -> bool:
    """Return whether one of these components has other weights than the folder's, whose documents are not about it."""
    return any(given.get(name) is not None for name in (*COMPONENTS, CONTROLNET))


def _copy_files(source: Path, target: Path) -> None:
    """Copy the files of a component's folder, if it is there; of a link what it leads to."""
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        refuse_special(file)
        if file.is_file():
            target.mkdir(exist_ok=True)
            shutil.copy2(file, target / file.name)

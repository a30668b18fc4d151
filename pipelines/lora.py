"""LoRA (Hu et al. 2022) on the latent U-Net, through peft: attach, save, load, fuse."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from torch import nn

from autoencoder import VolumeAutoencoder
from autoencoder.identity import keep_record, stamps_of
from diffusion import LatentDenoiser
from pipelines.inputs.arguments import listed, real_number
from pipelines.lora_state import attached_lora, check_hotswap, lora_digest, lora_factors
from pipelines.storage.lora_files import (
    FACTORS,
    find_lora,
    unet_tensors,
    write_lora,
)
from volumes.data.preprocessing import described_preprocessing, refuse_differences
from volumes.data.subjects import join_records
from volumes.description import DataDescription

logger = logging.getLogger(__name__)


def require_peft() -> None:
    """Raise ValueError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError('LoRA needs peft, which is not installed: pip install -e ".[lora]" -c constraints.txt')


def target_weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that can have a LoRA, by layer: of linear layers and of convolutions. Pointwise ones are
    excluded, as peft up to 0.21 cannot fuse them (its issue 3768).
    """
    layers = {name: getattr(layer, "base_layer", layer) for name, layer in unet.named_modules()}
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv3d)}
    return {name: weight for name, weight in weights.items() if weight.shape[2:4] != (1, 1)}


def add_lora(
    unet: LatentDenoiser, *, rank: int, alpha: float, target_modules: Sequence[str], dropout: float = 0.0
) -> None:
    """Attach a LoRA that changes nothing yet, and freeze all other weights.

    Args:
        rank, alpha: each layer W becomes W + alpha / rank * B A (Hu et al. 2022, section 4.1).
        target_modules: last parts of the names of the layers that get a LoRA (`target_weights`): qkv, out, time, conv1,
            ...
        dropout: dropout of the LoRA's input, in training.
    Raises: ValueError if peft is not installed, or if no layer has one of these names (the error lists the existing
        ones).
    """
    require_peft()
    from peft import LoraConfig

    weights = target_weights(unet)
    layers = {name.rpartition(".")[2] for name in weights}
    if not target_modules or set(target_modules) - layers:
        raise ValueError(f"target_modules {list(target_modules)}: layers that can have a LoRA are {sorted(layers)}")
    unet.requires_grad_(False)
    targets = list(target_modules)
    named = [name for name, _ in unet.named_modules() if name.rpartition(".")[2] in targets]
    if any(name not in weights for name in named):  # peft would give one to those, too: whole names leave them out
        targets = [name for name in named if name in weights]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)  # pyright: ignore[reportArgumentType]
    )


def save_lora(
    unet: LatentDenoiser,
    folder: str | PathLike,
    base: str,
    adapter_name: str = "default",
    *,
    trained_on: Mapping[str, Any] | None = None,
) -> Path:
    """Write the LoRA `adapter_name` of `unet`. Returns the file.

    Args:
        base: `unet_hash` of the U-Net without it.
        trained_on: {"data": how its volumes were prepared (`volumes.data.preprocessing`), "subjects": records of the
            training subjects (`volumes.data.subjects`), including those of the base}.
    """
    return write_lora(*attached_lora(unet, adapter_name), base, folder, trained_on=trained_on)


def check_lora(unet: LatentDenoiser, tensors: Mapping[str, torch.Tensor], path: object) -> None:
    """Check that every factor has its layer, its shape and its partner.

    Raises: ValueError naming the layers that do not fit.
    """
    weights, wrong = target_weights(unet), []
    for name in sorted({key.removesuffix(end) for key in tensors for end in FACTORS if key.endswith(end)}):
        weight, (a, b) = weights.get(name), (tensors.get(name + end) for end in FACTORS)
        fits = (
            weight is not None
            and a is not None
            and b is not None
            and a.ndim == b.ndim == weight.ndim
            and a.shape[1:] == weight.shape[1:]
            and (b.shape[0], b.shape[1]) == (weight.shape[0], a.shape[0])
        )
        if not fits:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{path}: is a LoRA of another U-Net: {len(wrong)} of its layers do not fit this one "
            f"({', '.join(wrong[:4])})"
        )


def check_scales(scales: Any) -> None:
    """Raise ValueError unless these are scales of LoRAs: a finite number, None, or lists and dicts of them."""
    if isinstance(scales, Mapping | list | tuple):
        for one in scales.values() if isinstance(scales, Mapping) else scales:
            check_scales(one)
    elif scales is not None:
        real_number("adapter_weights", scales)


class _OfPipelineOrClass:
    """A classmethod, as in diffusers, that also receives the pipeline when it is called on one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # pyright: ignore[reportArgumentType]

    def __get__(self, pipe: "LoraMixin | None", owner: type) -> Callable[..., Any]:
        return functools.partial(self.function, pipe)


class LoraMixin(LoraBaseMixin):
    """LoRAs of a pipeline's U-Net; `get_active_adapters` and the like are diffusers' own."""

    _lora_loadable_modules = ["unet"]
    vae: VolumeAutoencoder
    unet_name = "unet"
    unet: LatentDenoiser
    unet_weak: LatentDenoiser | None
    data: DataDescription
    unet_hash: str
    model_hash: str

    @property
    def fused_loras(self) -> set[str]:
        """Names of the LoRAs that are fused: the U-Net's own, whichever pipeline fused them."""
        unet: nn.Module = getattr(self.unet, "_orig_mod", self.unet)  # beneath torch.compile
        layers: list[Any] = [layer for layer in unet.modules() if hasattr(layer, "lora_A")]
        return {name for layer in layers for name in layer.merged_adapters}

    @property
    def num_fused_loras(self) -> int:
        """How many LoRAs are fused."""
        return len(self.fused_loras)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Any, *, return_lora_metadata: bool = False, **source: Any
    ) -> Any:
        """Read the tensors of a LoRA by their names in its file ("unet.<layer>.lora_A.weight"). With
        `return_lora_metadata` also return peft's settings ("unet.r", ...), None for a file without any. Arguments and
        errors: as `load_lora_weights`.
        """
        found = find_lora(pretrained_model_name_or_path_or_dict, **source)
        named = {f"unet.{key}": tensor for key, tensor in found.tensors.items()}
        metadata = None if found.settings is None else {f"unet.{key}": value for key, value in found.settings.items()}
        return (named, metadata) if return_lora_metadata else named

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        low_cpu_mem_usage: bool = False,
        **source: Any,
    ) -> None:
        """Attach a LoRA. It is active at once, beside the active ones.

        Args:
            pretrained_model_name_or_path_or_dict: its file, its folder, a Hub repository, or a state dict as diffusers
                has it.
            adapter_name: for `set_adapters` and others; default: default_0, default_1, ...
            hotswap: replace the attached LoRA `adapter_name`, which must have the same layers; nothing is compiled
                again.
            low_cpu_mem_usage: do not initialize what is then overwritten.
            source: of a folder or repository weight_name (the file) and subfolder; of a repository revision, cache_dir,
                token, force_download and local_files_only: see `find_lora`.
        Raises: ValueError if peft is not installed, or if it belongs to another architecture; FileError (a ValueError
            and an OSError) if it is not found or not a safetensors file; TypeError for unknown keywords. A LoRA that
            was trained on other weights of the same architecture is loaded with a warning. So is one without settings;
            alpha is then taken to be the rank, as in diffusers.
        """
        require_peft()
        if adapter_name is not None and not (
            isinstance(adapter_name, str) and adapter_name and "." not in adapter_name
        ):
            raise ValueError(f"adapter_name is a text without dots; got {adapter_name!r}")
        self._check_not_fused("load_lora_weights")
        self._check_changeable("load_lora_weights")
        found = find_lora(pretrained_model_name_or_path_or_dict, **source)
        tensors, settings, base = found.tensors, found.settings, found.base
        in_memory = isinstance(pretrained_model_name_or_path_or_dict, Mapping)
        name = "the LoRA" if in_memory else str(pretrained_model_name_or_path_or_dict)
        check_lora(self.unet, tensors, name)
        remedy = "Load it into a pipeline of such volumes, or train it on this pipeline's"
        refuse_differences(found.data, described_preprocessing(self.data), name, remedy)
        _ = self.model_hash  # keeps that of the weights as they are, before anything is fused into them
        before = set(getattr(self.unet, "peft_config", {}))
        if hotswap:
            check_hotswap(self.unet, tensors, adapter_name)
        elif adapter_name in before:
            raise ValueError(
                f"adapter_name: a LoRA {adapter_name!r} is attached already; give another name, or hotswap=True"
            )
        if settings is None:
            logger.warning("%s: does not state its alpha, which is taken to be its rank, as in diffusers", name)
        if base is None and not in_memory:
            logger.warning("%s: does not say which U-Net it was trained on", name)
        elif base is not None and base != self.unet_hash:
            logger.warning("%s: was trained on another U-Net of this architecture (%s)", name, base)
        disabled = any(hasattr(layer, "lora_A") and layer.disable_adapters for layer in self.unet.modules())
        acting = [] if disabled or not before else self.get_active_adapters()
        self.unet.load_lora_adapter(
            {
                key: tensor.detach().clone() for key, tensor in tensors.items()
            },  # peft swaps some of them for the old ones
            prefix=None,  # pyright: ignore[reportArgumentType]
            metadata=settings,
            adapter_name=adapter_name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )
        put = {str(adapter_name)} if hotswap else set(self.unet.peft_config) - before
        self.unet.set_adapter([*acting, *put.difference(acting)])
        known = self._lora_subjects() | dict.fromkeys(put, found.subjects)
        self.unet.lora_subjects = known
        origins = {one: (tensors, stamps_of(lora_factors(self.unet, one))) for one in put}
        self.unet.lora_origins = getattr(self.unet, "lora_origins", {}) | origins  # pyright: ignore[reportArgumentType]
        self.unet.enable_lora()
        self.unet.requires_grad_(False)

    @_OfPipelineOrClass
    def save_lora_weights(
        self: "LoraMixin | None",
        save_directory: str | PathLike,
        unet_lora_layers: Mapping[str, torch.Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        save_function: None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
    ) -> Path:
        """Write a LoRA, as diffusers does: an attached one if it is called on a pipeline, or a state dict.

        Args:
            save_directory: the file's folder, which is created.
            unet_lora_layers: peft's state dict (`get_peft_model_state_dict`); without it, an attached LoRA is written.
            is_main_process: False writes nothing.
            weight_name: the file's name.
            unet_lora_adapter_metadata: peft's settings of `unet_lora_layers` (`unet.peft_config[name].to_dict()`).
                Without them alpha is taken to be the rank when the file is loaded.
            adapter_name: the attached LoRA; optional if there is only one.
        Returns: the file. Raises: ValueError if it is unclear which LoRA to write, and for options that would write a
            pickle.
        """
        if not safe_serialization or save_function is not None:
            raise ValueError("safe_serialization=False and save_function are refused: a LoRA is saved as safetensors")
        folder = Path(save_directory).expanduser()
        if folder.is_file():
            raise ValueError(f"{folder}: is a file; give a folder")
        if unet_lora_layers is None:
            if unet_lora_adapter_metadata is not None:
                raise ValueError("unet_lora_adapter_metadata is for unet_lora_layers; give both, or neither")
            if self is None:
                raise ValueError("give unet_lora_layers, or call save_lora_weights on a pipeline with a LoRA")
            attached = list(getattr(self.unet, "peft_config", {}))
            if adapter_name is None and len(attached) != 1:
                raise ValueError(
                    f"which LoRA is to be saved? adapter_name is one of {attached}, or give unet_lora_layers"
                )
            name = adapter_name or attached[0]
            tensors, settings = attached_lora(self.unet, name)
            base = self.unet_hash
            trained_on = {"data": self.vae.config.get("data"), "subjects": self._lora_subjects().get(name)}
        elif adapter_name is not None:
            raise ValueError("give unet_lora_layers, or the adapter_name of an attached LoRA, not both")
        else:
            state = unet_lora_layers.state_dict() if isinstance(unet_lora_layers, nn.Module) else unet_lora_layers
            if not isinstance(state, Mapping):
                raise ValueError(f"unet_lora_layers is a state dict or a module; got {type(state).__name__}")
            tensors = unet_tensors({f"unet.{key}": tensor for key, tensor in state.items()}, "unet_lora_layers")
            settings, base, trained_on = unet_lora_adapter_metadata, None, None
        if not is_main_process:
            return folder / weight_name
        return write_lora(tensors, settings, base, folder, weight_name, trained_on=trained_on)

    def fuse_lora(
        self,
        components: Sequence[str] = ("unet",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add the active LoRAs to the weights, as diffusers does: the same result up to rounding, without their cost.

        Raises: ValueError without a LoRA, if one is fused already, and on `lora_scale`: diffusers would keep that scale
        after unfusing.
        """
        self._check_not_fused("fuse_lora")
        self._check_changeable("fuse_lora")
        if lora_scale != 1.0:
            raise ValueError("set the scale first (set_adapters(name, scale)), then fuse_lora() without lora_scale")
        if lora_digest(self.unet) is None:
            raise ValueError("no LoRA acts on the U-Net; load one with load_lora_weights")
        names = None if adapter_names is None else listed("adapter_names", adapter_names)
        if unknown := [name for name in names or [] if name not in self.unet.peft_config]:
            raise ValueError(f"fuse_lora: no LoRA {unknown[0]!r} is attached; attached: {list(self.unet.peft_config)}")
        super().fuse_lora(list(components), safe_fusing=safe_fusing, adapter_names=names)

    def unfuse_lora(self, components: Sequence[str] = ("unet",)) -> None:
        """Take fused LoRAs out of the weights again, to rounding."""
        self._check_changeable("unfuse_lora")
        super().unfuse_lora(list(components))
        keep_record(self.unet)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Choose which LoRAs act, and at which scale: one number for all, or a list with a number (None: 1) or a dict
        of diffusers' by block for each. Raises: ValueError while they are fused, and for scales that are not finite
        numbers.
        """
        self._check_not_fused("set_adapters")
        check_scales(adapter_weights)
        super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """Switch off all LoRAs until `enable_lora`. Raises: ValueError while one is fused."""
        self._check_not_fused("disable_lora")
        super().disable_lora()

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._check_not_compiled("enable_lora")
        super().enable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Detach some LoRAs. Raises: ValueError while one is fused, and for a name that none has."""
        self._check_not_fused("delete_adapters")
        attached = list(getattr(self.unet, "peft_config", {}))
        given = [adapter_names] if isinstance(adapter_names, str) else listed("adapter_names", adapter_names)
        if unknown := [name for name in given if name not in attached]:
            raise ValueError(f"delete_adapters: no LoRA {unknown[0]!r} is attached; attached: {attached}")
        super().delete_adapters(adapter_names)
        if not getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()  # diffusers leaves the layers wrapped

    def unload_lora_weights(self) -> None:
        """Detach all LoRAs. What was fused stays in the weights, and makes a new model of them."""
        self._check_changeable("unload_lora_weights")
        fused = self.num_fused_loras
        records = [self._lora_subjects()[name] for name in self.fused_loras] if fused else []
        super().unload_lora_weights()
        self.unet.lora_subjects, self.unet.lora_origins = {}, {}  # pyright: ignore[reportArgumentType]
        if fused:
            self.unet.register_to_config(subjects=join_records(self.unet.config["subjects"], *records))
            self._merged_adapters = set()

    def _lora_subjects(self) -> dict[str, Sequence[Any] | None]:
        """Return records of the training subjects of each attached LoRA; None for one without a record."""
        known = getattr(self.unet, "lora_subjects", {})
        return {name: known.get(name) for name in getattr(self.unet, "peft_config", None) or {}}

    @property
    def training_subjects(self) -> Sequence[Mapping[str, Any]]:
        """Records of the training subjects of autoencoder, U-Nets and attached LoRAs, see `volumes.data.subjects`."""
        models = [self.vae, self.unet, *([] if self.unet_weak is None else [self.unet_weak])]
        parts = [model.config.get("subjects") for model in models]
        return join_records(*parts, *self._lora_subjects().values())

    def _check_not_compiled(self, what: str) -> None:
        """Raise ValueError for a compiled U-Net, where diffusers would do nothing."""
        if not isinstance(self.unet, LatentDenoiser):
            raise ValueError(f"{what} before torch.compile, or with pipe.unet set to the U-Net that was compiled")

    def _check_not_fused(self, what: str) -> None:
        self._check_not_compiled(what)
        if self.num_fused_loras:
            raise ValueError(f"{what}: {sorted(self.fused_loras)} are fused into the weights; unfuse_lora() first")

    def _check_changeable(self, what: str) -> None:
        """Raise ValueError where diffusers would do nothing, or leave the weights in pieces."""
        self._check_not_compiled(what)
        if hasattr(self.unet, "offloaded_to_disk"):
            raise ValueError(f"{what} before offloading to disk: the files there are not written again")
        if any(parameter.dtype.itemsize == 1 for parameter in self.unet.parameters()):
            raise ValueError(f"{what} before enable_layerwise_casting: eight-bit weights cannot be changed")

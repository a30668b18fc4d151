"""LoRA (Hu et al. 2022) on the latent U-Net, through peft: attach, save, load, fuse.

A LoRA file is diffusers' `pytorch_lora_weights.safetensors`: tensors `unet.<layer>.lora_A.weight` (rank, in, ...) and
`lora_B.weight` (out, rank, ...), and in its header, as JSON, peft's settings and the hash of the U-Net it was trained on.
"""

import hashlib
import importlib.util
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from autoencoder import VolumeAutoencoder
from diffusion import LatentUNet3D
from volumes.preprocessing import check_preprocessing, described_preprocessing, refuse_differences
from volumes.subjects import check_subjects, join_records

from .provenance import tensor_digest

logger = logging.getLogger(__name__)
BASE = "base.unet_sha256"  # beside peft's settings, which are `unet.<name>`
TRAINED_ON = "training."  # data and subjects
SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
FACTORS = (".lora_A.weight", ".lora_B.weight")


def require_peft() -> None:
    """Raises: ValueError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError('LoRA needs peft, which is not installed: pip install -e ".[lora]" -c constraints.txt')


def target_weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that can have a LoRA, by layer: of linear layers and of convolutions. Not of pointwise ones, which
    peft up to 0.21 cannot fuse (its issue 3768)."""
    layers = {name: getattr(layer, "base_layer", layer) for name, layer in unet.named_modules()}
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv3d)}
    return {name: weight for name, weight in weights.items() if weight.shape[2:4] != (1, 1)}


def add_lora(
    unet: LatentUNet3D, *, rank: int, alpha: float, target_modules: Sequence[str], dropout: float = 0.0
) -> None:
    """Attach a LoRA that changes nothing yet, and freeze all other weights.

    Args:
        rank, alpha: each layer W becomes W + alpha / rank * B A (Hu et al. 2022, section 4.1).
        target_modules: last names of the layers that get one (`target_weights`): qkv, out, time, conv1, ...
        dropout: of the LoRA's input, in training.
    Raises: ValueError if peft is not installed, or if there is no layer of one of these names (those that there are,
    are listed).
    """
    require_peft()
    from peft import LoraConfig

    layers = {name.rpartition(".")[2] for name in target_weights(unet)}
    if not target_modules or set(target_modules) - layers:
        raise ValueError(f"target_modules {list(target_modules)}: layers that can have a LoRA are {sorted(layers)}")
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=dropout)  # pyright: ignore[reportArgumentType]
    )


def save_lora(
    unet: LatentUNet3D,
    folder: str | PathLike,
    base: str,
    adapter_name: str = "default",
    *,
    trained_on: Mapping[str, Any] | None = None,
) -> Path:
    """Write the LoRA `adapter_name` of `unet`. Returns the file.

    Args:
        base: `unet_hash` of the U-Net without it.
        trained_on: {"data": how its volumes were prepared (`volumes.preprocessing`), "subjects": records of whose they were
            (`volumes.subjects`), those of the base among them}.
    """
    from peft import get_peft_model_state_dict

    if adapter_name not in getattr(unet, "peft_config", {}):
        raise ValueError(f"no LoRA {adapter_name!r} is attached; attached: {list(getattr(unet, 'peft_config', {}))}")
    config = unet.peft_config[adapter_name].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    settings = {f"unet.{key}": plain[key] for key in SETTINGS} | {BASE: base}
    settings |= {f"{TRAINED_ON}{key}": value for key, value in (trained_on or {}).items() if value is not None}
    tensors = get_peft_model_state_dict(unet, adapter_name=adapter_name)
    path = Path(folder) / LORA_WEIGHT_NAME_SAFE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    save_file(
        {f"unet.{key}": tensor.detach().contiguous() for key, tensor in tensors.items()},
        partial,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=1, sort_keys=True)},
    )
    os.replace(partial, path)
    return path


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], str | None]:
    """Tensors by layer ("down_blocks.0.0.conv1.lora_A.weight"), peft's settings, and the hash of the base U-Net.

    Raises: ValueError if the file is no safetensors file with a U-Net's LoRA and its settings: without them the scale
    alpha / rank would be a guess.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no LoRA in safetensors ({error}); pickles are not read") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: is no LoRA: its settings are {type(header).__name__}")
    settings = {name: header[f"unet.{name}"] for name in SETTINGS if f"unet.{name}" in header}
    foreign = sorted(key for key in tensors if not key.startswith("unet.") or not key.endswith(FACTORS))
    if foreign or not tensors or not {"r", "lora_alpha", "target_modules"} <= settings.keys():
        raise ValueError(
            f"{path}: is no LoRA of a latent U-Net as train_ldm.py writes it (its settings are {sorted(settings)}, "
            f"tensors that do not belong: {foreign[:4]})"
        )
    return {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}, settings, header.get(BASE)


def read_trained_on(path: Path) -> tuple[dict[str, Any] | None, list[Any] | None]:
    """How a LoRA's training volumes were prepared, and records of whose they were; None where its file does not say.

    Raises: ValueError for a file that is no LoRA, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        data, subjects = header.get(f"{TRAINED_ON}data"), header.get(f"{TRAINED_ON}subjects")
        check_preprocessing(data)
        check_subjects(subjects)
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is no LoRA in safetensors, or damaged ({error})") from error
    return data, subjects


def check_lora(unet: LatentUNet3D, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
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
            f"{path}: is a LoRA of another U-Net: {len(wrong)} of its layers do not fit this one ({', '.join(wrong[:4])})"
        )


def lora_digest(unet: nn.Module) -> str | None:
    """Fingerprint of the LoRAs that act on `unet` now, fused or not, with their scales; None if none does."""
    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    layers: dict[str, Any] = dict(getattr(unet, "_orig_mod", unet).named_modules())  # beneath torch.compile
    for name, layer in layers.items():
        if not hasattr(layer, "lora_A"):
            continue
        for adapter in layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters):
            if adapter in layer.lora_A and layer.scaling[adapter]:
                digests[adapter].update(f"{name} {float(layer.scaling[adapter])}".encode())
                for factor in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
                    tensor_digest(digests[adapter], "", factor)
    return " ".join(sorted(digest.hexdigest() for digest in digests.values())) or None


class LoraMixin(LoraBaseMixin):
    """LoRAs of a pipeline's U-Net; `get_active_adapters` and the like are diffusers' own."""

    _lora_loadable_modules = ["unet"]
    vae: VolumeAutoencoder
    unet: LatentUNet3D
    data: dict[str, Any]
    unet_hash: str
    model_hash: str
    _files: dict[str, Any]
    _hashed: dict[Any, Any]

    def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        source: str | PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        **download: Any,
    ) -> None:
        """Attach a LoRA; it acts at once, beside those that act already.

        Args:
            source: its file, its folder, or a Hub repository.
            adapter_name: for `set_adapters` and others; default: default_0, default_1, ...
            weight_name: the file in the folder or repository.
            download: revision, token, cache_dir, ...: of `huggingface_hub.hf_hub_download`.
        Raises: ValueError if peft is not installed, if it is not found, is no safetensors file, or belongs to another
        architecture. One that was trained on other weights of the same architecture is loaded with a warning.
        """
        require_peft()
        self._check_not_fused("load_lora_weights")
        self._check_changeable("load_lora_weights")
        path = Path(source)
        if path.is_dir():
            path = path / weight_name
        elif not path.is_file():
            try:
                path = Path(hf_hub_download(str(source), weight_name, **download))
            except (OSError, HFValidationError) as error:
                raise ValueError(f"{source}: no LoRA here, nor is it found on the Hub: {error}") from error
        tensors, settings, base = read_lora(path)
        check_lora(self.unet, tensors, path)
        prepared, subjects = read_trained_on(path)
        remedy = "Load it into a pipeline of such volumes, or train it anew on this pipeline's"
        refuse_differences(prepared, described_preprocessing(self.data), str(path), remedy)
        _ = self.model_hash  # keeps that of the weights as they are, before anything is fused into them
        if base != self.unet_hash:
            logger.warning("%s: was trained on another U-Net of this architecture (%s)", path, base)
        disabled = any(hasattr(layer, "lora_A") and layer.disable_adapters for layer in self.unet.modules())
        acting = [] if disabled or not hasattr(self.unet, "peft_config") else self.get_active_adapters()
        before = set(getattr(self.unet, "peft_config", {}))
        self.unet.load_lora_adapter(
            tensors,
            prefix=None,  # pyright: ignore[reportArgumentType]
            metadata=settings,
            adapter_name=adapter_name,
            _pipeline=self,
        )
        added = set(self.unet.peft_config) - before
        self.unet.set_adapter([*acting, *added])
        self.unet.lora_subjects = self._lora_subjects() | dict.fromkeys(added, subjects)
        self.unet.enable_lora()
        self.unet.requires_grad_(False)

    def save_lora_weights(self, folder: str | PathLike, adapter_name: str | None = None) -> Path:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write one of the attached LoRAs; the name may be left out where there is one. Returns the file."""
        attached = list(getattr(self.unet, "peft_config", {}))
        if adapter_name is None and len(attached) != 1:
            raise ValueError(f"which LoRA is to be saved? adapter_name is one of {attached}")
        name = adapter_name or attached[0]
        trained_on = {"data": self.vae.config.get("data"), "subjects": self._lora_subjects().get(name)}
        return save_lora(self.unet, folder, self.unet_hash, name, trained_on=trained_on)

    def fuse_lora(self, components: Sequence[str] = ("unet",), **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add the acting LoRAs to the weights: the same result to rounding, without their cost. As diffusers' own.

        Raises: ValueError without a LoRA, if one is fused already, and on `lora_scale`: diffusers would keep that scale
        after unfusing.
        """
        self._check_not_fused("fuse_lora")
        self._check_changeable("fuse_lora")
        if kwargs.get("lora_scale", 1.0) != 1.0:
            raise ValueError("set the scale first (set_adapters(name, scale)), then fuse_lora() without lora_scale")
        if lora_digest(self.unet) is None:
            raise ValueError("no LoRA acts on the U-Net; load one with load_lora_weights")
        super().fuse_lora(list(components), **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("unet",), **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take fused LoRAs out of the weights again, to rounding."""
        self._check_changeable("unfuse_lora")
        super().unfuse_lora(list(components), **kwargs)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Which LoRAs act, and at which scale. As diffusers' own. Raises: ValueError while they are fused."""
        self._check_not_fused("set_adapters")
        super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self) -> None:
        """No LoRA acts until `enable_lora`. Raises: ValueError while one is fused."""
        self._check_not_fused("disable_lora")
        super().disable_lora()

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._check_not_compiled("enable_lora")
        super().enable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Detach some LoRAs. Raises: ValueError while one is fused."""
        self._check_not_fused("delete_adapters")
        super().delete_adapters(adapter_names)
        if not getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()  # diffusers leaves the layers wrapped

    def unload_lora_weights(self) -> None:
        """Detach all LoRAs. What was fused stays in the weights, and makes a new model of them."""
        self._check_changeable("unload_lora_weights")
        fused = self.num_fused_loras
        records = [self._lora_subjects()[name] for name in self.fused_loras] if fused else []
        super().unload_lora_weights()
        self.unet.lora_subjects = {}
        if fused:
            self.unet.register_to_config(subjects=join_records(self.unet.config["subjects"], *records))
            self._merged_adapters = set()
            self._files.pop("unet", None)
            self._hashed.clear()

    def _lora_subjects(self) -> dict[str, Sequence[Any] | None]:
        """Records of the training subjects of each attached LoRA; None for one that has none."""
        known = getattr(self.unet, "lora_subjects", {})
        return {name: known.get(name) for name in getattr(self.unet, "peft_config", None) or {}}

    @property
    def training_subjects(self) -> list[dict[str, Any]]:
        """Records of whose volumes autoencoder, U-Net and attached LoRAs were trained on, see `volumes.subjects`."""
        parts = [self.vae.config.get("subjects"), self.unet.config.get("subjects")]
        return join_records(*parts, *self._lora_subjects().values())

    def _check_not_compiled(self, what: str) -> None:
        """Raises: ValueError where diffusers would do nothing."""
        if not isinstance(self.unet, LatentUNet3D):
            raise ValueError(f"{what} before torch.compile, or with pipe.unet set to the U-Net that was compiled")

    def _check_not_fused(self, what: str) -> None:
        self._check_not_compiled(what)
        if self.num_fused_loras:
            raise ValueError(f"{what}: {sorted(self.fused_loras)} are fused into the weights; unfuse_lora() first")

    def _check_changeable(self, what: str) -> None:
        """Raises: ValueError where diffusers would do nothing, or leave the weights in pieces."""
        self._check_not_compiled(what)
        if hasattr(self.unet, "offloaded_to_disk"):
            raise ValueError(f"{what} before offloading to disk: the files there are not written again")
        if any(parameter.dtype.itemsize == 1 for parameter in self.unet.parameters()):
            raise ValueError(f"{what} before enable_layerwise_casting: there is no arithmetic in eight bits")

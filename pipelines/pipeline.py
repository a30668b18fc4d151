"""MedVolumePipeline: masks to volumes by autoencoder, latent U-Net and scheduler. Axes: (B, C, X, Y, Z)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub.errors import HFValidationError

from autoencoder import AutoencoderKL3D
from autoencoder.weights import weight_files
from diffusion import LatentUNet3D, denoise, fit_scheduler, fold_mask
from diffusion.attention import check_attention_backend
from volumes import nifti_path

from .loading import check_folder
from .lora import LoraMixin, lora_digest
from .masks import LabelMap, MaskLike, as_list, describe_mask
from .output import MedVolumePipelineOutput
from .provenance import content_hash, header_description, memory_tensors, software, stored_tensors, synthetic_file
from .sampling import equal_batches, initial_latents, sample_generators, sample_seed
from .volume_processor import OUTPUT_TYPES, Canvas, VolumeProcessor

COMPONENTS = ("vae", "unet")
CELL_PLANES = 16  # of the latent grid, whose mask is folded and embedded at once
EndOfStep = Callable[["MedVolumePipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class MedVolumePipeline(DiffusionPipeline, LoraMixin):
    """Generates volumes from masks (or, for a model without masks, of a given shape), each on its mask's own grid.

    Runs in float32, bfloat16 or float16 (`from_pretrained(..., dtype=torch.bfloat16)` or
    `pipe.to(torch.bfloat16)`): noise is drawn in float32 whatever the type, results are float32. bfloat16 works on
    CPUs too, and is slow on those without AVX512-BF16 or AMX. A result that is not finite raises.

    Args:
        vae: trained autoencoder, with its latent statistics set.
        unet: trained latent U-Net; its config holds objective and number of labels.
        scheduler: any of diffusers' that speaks the objective, see `diffusion.fit_scheduler`.
        data: what the model was trained on, as `volumes.describe` writes it; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self, vae: AutoencoderKL3D, unet: LatentUNet3D, scheduler: SchedulerMixin, data: dict[str, Any] | None = None
    ):
        super().__init__()
        if data is None:  # diffusers takes an argument without a default for a module
            raise ValueError("MedVolumePipeline needs `data`, the description of the training set (volumes.describe)")
        _check_fit(vae, unet, data)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(data=json.loads(json.dumps(data)))
        self.volume_processor = VolumeProcessor(data, vae.stride)
        self._files: dict[str, tuple[object, list[Path]]] = {}  # component: the module that was loaded, and from what
        self._hashed: dict[tuple[str, ...], tuple[list[object], str]] = {}  # components: of these modules, their hash

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
        variant = kwargs.get("variant")
        check_folder(folder, variant)
        pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        loaded = [name for name in COMPONENTS if name not in kwargs]
        pipe._files = {name: (getattr(pipe, name), weight_files(folder / name, variant)) for name in loaded}
        return pipe

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does: safetensors only, and not the path it came from.

        Raises: ValueError on `safe_serialization=False`.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError("safe_serialization=False is refused: weights are saved as safetensors only")
        for part in (self, self.scheduler):  # the models do it themselves
            part._internal_dict = FrozenDict({k: v for k, v in part.config.items() if k != "_name_or_path"})
        super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)

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

    def provenance(
        self,
        mask: Mapping[str, Any] | None,
        *,
        seed: int | None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        label_map: LabelMap | None = None,
    ) -> dict[str, Any]:
        """The record of one volume, ready for JSON; everything but `software` decides the voxels.

        Args:
            mask: what `describe_mask` says of it; None for a model without masks.
            seed: of the volume's own generator; None if its noise came from elsewhere (latents, or a generator
                already drawn from).
        """
        scheduler = json.loads(fit_scheduler(self.scheduler, self.unet.config["objective"]).to_json_string())  # pyright: ignore[reportAttributeAccessIssue]
        return {
            "synthetic": True,
            "software": software(),
            "model": self.model_hash,
            "seed": seed,
            "num_inference_steps": num_inference_steps if sigmas is None else len(sigmas),
            "sigmas": None if sigmas is None else [float(sigma) for sigma in sigmas],
            "scheduler": {"class": scheduler["_class_name"]} | {k: v for k, v in scheduler.items() if k[0] != "_"},
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "mask": None if mask is None else dict(mask),
            "label_map": None if not label_map else {str(value): target for value, target in label_map.items()},
        }

    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        shape: Sequence[int] | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        num_volumes_per_mask: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: EndOfStep | None = None,
        label_map: LabelMap | None = None,
        batch_size: int = 8,
        paths: str | PathLike | Sequence[str | PathLike] | None = None,
    ) -> MedVolumePipelineOutput:
        """Generate volumes.

        Args:
            mask: path, nibabel image, `Volume`, array or tensor (X, Y, Z) of label values as in the training files;
                or a list of them, of any shapes. -1 marks voxels outside the field of view. A path or image keeps its
                grid; an array lies on the model's template.
            shape: (X, Y, Z) in voxels, in place of a mask, for a model that no mask conditions.
            num_inference_steps: steps of the scheduler.
            sigmas: noise levels to visit instead, in (0, 1] and falling (FlowMatch schedulers); from 1, unless the
                `latents` are less noisy.
            num_volumes_per_mask: how many of each mask.
            generator: one a volume (mask by mask), or a single one from which a seed a volume is drawn: see
                `sampling.sample_generators`. A volume depends on its own generator alone, not on what is generated
                beside it, to rounding.
            latents: initial noise instead, one (C, h, w, d) a volume, as a list or a tensor (B, C, h, w, d).
            output_type: "nifti", "np", "pt" or "latent": see `MedVolumePipelineOutput`.
            return_dict: False gives the tuple `(volumes,)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each step of each
                batch; "latents" in the dict that it returns replace the batch's.
            label_map: how to read label values that the model does not know: {value: known value or name}.
            batch_size: most volumes denoised together; only volumes with equal padded grids share a batch.
            paths: a .nii.gz or .nii file for each volume, e.g. `pipe(mask="ct.nii.gz", paths="out/ct_000.nii.gz")`.
                Each is written as soon as it is decoded, slab by slab, with its sidecar beside it (as
                `write_synthetic` does), so that no volume is ever held whole; `volumes` are the paths then. The files
                hold what is returned without `paths`. Volumes that must be resampled to their mask's spacing are held.

        Raises: ValueError naming what cannot be used and the remedy: the mask, its labels, the generators, the sigmas,
        the output type, the scheduler.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        if num_volumes_per_mask < 1 or batch_size < 1:
            raise ValueError(
                f"num_volumes_per_mask ({num_volumes_per_mask}) and batch_size ({batch_size}) must be 1 or more"
            )
        check_attention_backend(self.unet, self._execution_device)
        scheduler = fit_scheduler(self.scheduler, self.unet.config["objective"])
        canvases, masks = self._canvases(mask, shape, label_map)
        owner = [i for i in range(len(canvases)) for _ in range(num_volumes_per_mask)]  # volume -> its canvas
        if latents is not None and len(latents) != len(owner):
            raise ValueError(f"{len(latents)} latents for {len(owner)} volumes; give one a volume")
        files = _check_paths(paths, len(owner), output_type)
        generators = sample_generators(generator, len(owner))
        seeds = [sample_seed(own) if latents is None else None for own in generators]
        records = [
            self.provenance(
                masks[i], seed=seed, num_inference_steps=num_inference_steps, sigmas=sigmas, label_map=label_map
            )
            for i, seed in zip(owner, seeds, strict=True)
        ]

        volumes: list[Any] = [None] * len(owner)
        for batch in equal_batches([canvases[i].shape for i in owner], batch_size):
            own = [generators[i] for i in batch]
            drawn_on = [canvases[owner[i]] for i in batch]
            given = None if latents is None else [latents[i] for i in batch]
            grid = self._latent_shape(drawn_on[0])
            denoised = denoise(
                self.unet,
                initial_latents(own, given, grid, self._execution_device, self.unet.dtype),
                scheduler,
                self._conditions(drawn_on),
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                generator=own,
                callback=self._step_callback(callback_on_step_end),
                progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
            )
            for i, latent in zip(batch, denoised, strict=True):
                volumes[i] = self._finish(latent, canvases[owner[i]], output_type, records[i], files[i])
        self.maybe_free_model_hooks()
        if not return_dict:
            return (volumes,)  # pyright: ignore[reportReturnType]
        return MedVolumePipelineOutput(volumes=volumes, provenance=records)

    def _canvases(
        self, mask: MaskLike | Sequence[MaskLike] | None, shape: Sequence[int] | None, label_map: LabelMap | None
    ) -> tuple[list[Canvas], list[dict[str, Any] | None]]:
        """What to draw on, and what each sidecar says of the mask."""
        if self.unet.config["num_labels"] == 0:
            if mask is not None or shape is None:
                raise ValueError("no mask conditions this model: give shape=(X, Y, Z), and no mask")
            return [self.volume_processor.preprocess_shape(shape)], [None]
        if mask is None or shape is not None:
            raise ValueError("this model is conditioned on a mask: give mask=..., which also sets the shape")
        masks = as_list(mask)
        canvases = [self.volume_processor.preprocess(one, label_map) for one in masks]
        return canvases, [describe_mask(one) for one in masks]

    def _latent_shape(self, canvas: Canvas) -> tuple[int, int, int, int]:
        """(C, h, w, d) of the latents of a canvas."""
        h, w, d = (n // s for n, s in zip(canvas.shape, self.vae.stride, strict=True))
        return self.vae.config["latent_channels"], h, w, d

    def _conditions(self, canvases: Sequence[Canvas]) -> dict[str, torch.Tensor]:
        """The U-Net's keyword arguments for one batch of equal grids."""
        labels = [canvas.labels for canvas in canvases if canvas.labels is not None]
        if not labels:
            return {}
        planes, embedded = CELL_PLANES * self.vae.stride[2], []
        for start in range(0, labels[0].shape[2], planes):  # folded ids are far larger than labels and embedding
            part = torch.from_numpy(np.stack([one[..., start : start + planes] for one in labels]))
            ids = fold_mask(part.to(self._execution_device), self.vae.stride, self.unet.config["num_labels"])
            embedded.append(self.unet.embed_mask(ids))
        return {"mask": torch.cat(embedded, dim=4)}  # once, not at every step

    def _step_callback(self, callback: EndOfStep | None) -> Callable[[int, torch.Tensor, torch.Tensor], Any] | None:
        """diffusers' callback as the one that `denoise` takes."""
        if callback is None:
            return None

        def call(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
            return (callback(self, step, timestep, {"latents": latents}) or {}).get("latents")

        return call

    def _finish(
        self, latent: torch.Tensor, canvas: Canvas, output_type: str, record: Mapping[str, Any], path: Path | None
    ) -> Any:
        """Decode one volume, alone: memory does not grow with the batch. Raises: ValueError if it is not finite."""
        if output_type == "latent":
            return next(_finite([latent], record))
        slabs, description = _finite(self._decoded(latent), record), header_description(record)
        if path is None:
            return self.volume_processor.postprocess(slabs, canvas, output_type, description)
        with synthetic_file(record, path) as unfinished:
            self.volume_processor.write(slabs, canvas, unfinished, description)
        return path

    def _decoded(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        """The slabs (C, X, Y, z) of one volume: as the autoencoder streams them, or a single one where it does not."""
        latents = latent[None].to(self.vae.dtype)
        if self.vae.tiles([n * s for n, s in zip(latent.shape[1:], self.vae.stride, strict=True)]):
            for slab in self.vae.decode_slabs(latents):
                yield slab[0]
        else:
            yield self.vae.decode(latents, return_dict=False)[0][0]


def _finite(slabs: Iterable[torch.Tensor], record: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The same. Raises: ValueError naming the volume's seed if a value is not finite."""
    for slab in slabs:
        if not torch.isfinite(slab).all():
            raise ValueError(
                f"the volume of seed {record['seed']} is not finite in {record['dtype']}; use bfloat16 or float32"
            )
        yield slab


def _check_paths(paths: str | PathLike | Sequence[str | PathLike] | None, count: int, output_type: str) -> list[Any]:
    """One path a volume; None for each without `paths`. Raises: ValueError for what cannot be written there."""
    if paths is None:
        return [None] * count
    files = [nifti_path(path) for path in ([paths] if isinstance(paths, (str, PathLike)) else paths)]
    if output_type != "nifti":
        raise ValueError(f"paths are of NIfTI files: leave output_type at 'nifti', not {output_type!r}")
    if len(files) != count or len(set(files)) < count:
        raise ValueError(f"{len(set(files))} different paths for {count} volumes; give one a volume")
    return files


def _check_fit(vae: AutoencoderKL3D, unet: LatentUNet3D, data: Mapping[str, Any]) -> None:
    """Raises: ValueError if autoencoder, U-Net and data do not belong together."""
    if unet.config["in_channels"] != vae.config["latent_channels"]:
        raise ValueError(
            f"the U-Net takes {unet.config['in_channels']} channels, the autoencoder gives {vae.config['latent_channels']}"
        )
    if vae.config["latents_std"] is None:
        raise ValueError("the autoencoder has no latent statistics; train_vae.py measures them when it ends")
    if len(data["intensity"]) != vae.config["out_channels"]:
        raise ValueError(
            f"data describes {len(data['intensity'])} channels, the autoencoder makes {vae.config['out_channels']}"
        )
    if unet.config["num_labels"] == 0:
        return
    if unet.config["num_labels"] != len(data["labels"]):
        raise ValueError(
            f"the U-Net knows {unet.config['num_labels']} labels, data names {len(data['labels'])}: {data['labels']}"
        )
    if tuple(unet.mask_stride) != tuple(vae.stride):
        raise ValueError(
            f"the U-Net folds masks by {unet.mask_stride}, the autoencoder's stride is {vae.stride}; they must agree"
        )

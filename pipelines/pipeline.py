"""MedVolumePipeline: masks to volumes by autoencoder, latent U-Net and scheduler. Axes: (B, C, X, Y, Z)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from autoencoder.residual_noise import ResidualNoiseModel
from diffusion import LatentUNet3D, check_guidance, denoise, fit_scheduler
from diffusion.attention import check_attention_backend
from diffusion.denoise import set_timesteps
from diffusion.guidance import Guidance, guidance_in_effect
from diffusion.scheduler_options import MIN_NOISE
from pipelines.inputs.arguments import (
    flag,
    grid_shape,
    names,
    noise_levels,
    plain,
    real_number,
    translation,
    whole_number,
)
from pipelines.inputs.conditions import (
    Classes,
    Numbers,
    check_conditions,
    condition_tensors,
    edited_latents,
    image_condition,
    rows_of,
)
from pipelines.inputs.images import (
    ImageLike,
    Images,
    check_images,
    describe_images,
)
from pipelines.inputs.inpainting import (
    BLEND_MARGIN_MM,
    EditRequest,
    by_channel,
    edit_requested,
    resolve_edits,
)
from pipelines.inputs.masks import (
    LabelMap,
    MaskLike,
    as_list,
    describe_mask,
    identity,
)
from pipelines.storage.loading import (
    check_components,
    check_fit,
    register_packages,
    register_pipeline,
)
from pipelines.storage.output import MedVolumePipelineOutput, check_paths
from pipelines.storage.provenance import (
    header_description,
    recorded_guidance,
    software,
    synthetic_files,
    volume_files,
)
from pipelines.storage.serialization import PipelineIOMixin
from volumes import VoxelError
from volumes.description import DataDescription

from .call import CallState, PipelineCalls, StepCallback, callback_inputs, one_at_a_time
from .lora import LoraMixin
from .sampling import equal_batches, given_latents, initial_latents, sample_generators, sample_seed
from .volume_processor import OUTPUT_TYPES, PreparedVolume, VolumeProcessor


class NotFinite(VoxelError):
    """What the autoencoder decoded is not finite."""


EndOfStep = Callable[["MedVolumePipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class MedVolumePipeline(PipelineCalls, PipelineIOMixin, LoraMixin):
    """Generates volumes from masks (or, for a model that needs none, of a given shape), each on its mask's own grid, and
    of given classes, numbers and images (some channels, from which it makes the others) if the model knows any.

    Runs in float32, bfloat16 or float16 (`from_pretrained(..., dtype=torch.bfloat16)` or
    `pipe.to(torch.bfloat16)`): noise is drawn in float32 whatever the type, results are float32. bfloat16 works on
    CPUs too, and is slow on those without AVX512-BF16 or AMX. A result that is not finite raises.

    Several threads may call one pipeline, or pipelines that share components: each call has its own scheduler, callbacks,
    guidance and progress bar. Calls wait for each other where weights are offloaded or cast by hooks, or code is compiled.

    Args:
        vae: trained autoencoder, with its latent statistics set.
        unet: trained latent U-Net; its config holds objective and number of labels.
        scheduler: any of diffusers' that speaks the objective, see `diffusion.fit_scheduler`.
        data: the description of the training set (`volumes.describe`), or its JSON, which model_index.json keeps.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL3D | VQGAN3D | SpaceToDepth3D,  # by name: `DiffusionPipeline.from_pipe` compares exact types
        unet: LatentUNet3D,
        scheduler: SchedulerMixin,
        data: DataDescription | Mapping[str, object] | None = None,
    ):
        super().__init__()
        check_components({"vae": vae, "unet": unet, "scheduler": scheduler})
        if data is None:  # diffusers takes an argument without a default for a module
            raise ValueError(
                "MedVolumePipeline needs `data`, the description of the training set (volumes.describe): give data=pipe.data of "
                "the pipeline that the components are of, or use MedVolumePipeline.from_pipe(pipe)"
            )
        self._data = data if isinstance(data, DataDescription) else DataDescription.from_json(data)
        check_fit(vae, unet, self._data)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(data=self._data.to_json())
        self.volume_processor = VolumeProcessor(self._data, vae.stride)
        self.noise_model = None if self._data.residual_noise is None else ResidualNoiseModel(self._data.residual_noise)
        self._running, self._last = [], CallState()

    def provenance(
        self,
        mask: Mapping[str, Any] | None,
        *,
        shape: Sequence[int] | None = None,
        seed: int | None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        guidance_scale: Guidance = 1.0,
        label_map: LabelMap | None = None,
        classes: Mapping[str, str] | None = None,
        numbers: Mapping[str, float] | None = None,
        images: Mapping[str, Mapping[str, Any]] | None = None,
        residual_noise: bool = True,
        edit: EditRequest | None = None,
    ) -> dict[str, Any]:
        """The record of one volume, ready for JSON; everything but `software` decides the voxels.

        Args:
            mask: what `describe_mask` says of it; None without a mask, where `shape` takes its place.
            classes, numbers: as `pipelines.check_conditions` gives them back.
            images: what `pipelines.describe_images` says of those that are given.
            residual_noise: whether the model's noise is added; recorded if the model has any.
            edit: what is changed of which image; without one the record has no such entry.
            seed: of the volume's own generator; None if its noise came from elsewhere (latents, or a generator
                already drawn from).
        Raises: ValueError naming what no sidecar can hold.
        """
        shape = None if shape is None else grid_shape(shape)
        sigmas = None if sigmas is None else noise_levels(sigmas)
        steps = whole_number("num_inference_steps", num_inference_steps)
        label_map = translation(label_map)
        fitted = fit_scheduler(self.scheduler, self.unet.config["objective"], self.unet.train_steps)
        scheduler = json.loads(fitted.to_json_string(), parse_constant=str)  # -Infinity, which JSON lacks, as text
        record = {
            "synthetic": True,
            "software": software(),
            "model": self.model_hash,
            "seed": None if seed is None else whole_number("seed", seed, None),
            "num_inference_steps": steps if sigmas is None else len(sigmas),
            "sigmas": sigmas,
            "guidance_scale": recorded_guidance(guidance_scale),
            "scheduler": {"class": scheduler["_class_name"]} | {k: v for k, v in scheduler.items() if k[0] != "_"},
            "dtype": self._dtypes(),
            "mask": None if mask is None else dict(mask),
            "shape": shape,
            "label_map": None if not label_map else {str(value): target for value, target in label_map.items()},
            "classes": dict(classes) if classes else None,
            "numbers": dict(numbers) if numbers else None,
            "images": {name: dict(one) for name, one in images.items()} if images else None,
            "channels": self.volume_processor.generated(images or {}) or None,  # those that have a file each
            **({} if self.noise_model is None else {"residual_noise": flag("residual_noise", residual_noise)}),
            **({} if edit is None else {"edit": edit.record()}),
        }
        return plain(record, "the record")

    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        shape: Sequence[int] | None = None,
        classes: Classes | Sequence[Classes] | None = None,
        numbers: Numbers | Sequence[Numbers] | None = None,
        image: ImageLike | Images | Sequence[ImageLike | Images] | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        guidance_scale: Guidance = 1.0,
        num_volumes_per_mask: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: EndOfStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        label_map: LabelMap | None = None,
        batch_size: int = 8,
        paths: str | PathLike | Sequence[str | PathLike] | None = None,
        residual_noise: bool = True,
        strength: float | None = None,
        region: MaskLike | Sequence[MaskLike] | None = None,
        blend_margin: float = BLEND_MARGIN_MM,
        keep_channels: Sequence[str] = (),
    ) -> MedVolumePipelineOutput:
        """Generate volumes, or with `strength` or `region` change given ones.

        Args:
            mask: path, image of nibabel, SimpleITK, torchio or MONAI (MetaTensor), `Volume`, array or tensor (X, Y, Z) of
                label values as in the training files; or a list of them, of any shapes. -1 marks voxels outside the field
                of view. A path or image keeps its grid; a plain array or tensor lies on the model's template.
            shape: (X, Y, Z) in voxels, in place of a mask, for a model that no mask conditions, or that was trained to do
                without at times.
            classes: the value of each class, such as {"sex": "F"}: one dict for all masks, or a list of one a mask; with
                `shape`, of one a volume. A class may be left out if training left it out at times.
            numbers: the same of numbers, such as {"age": 63}. Those of the grid (spacing_x, size_x, ...) need not be given.
            image: the channels that are given, such as {"ct": "ct.nii.gz"}, in the units of the training files: one dict
                for all masks, or a list of one a mask. As a mask may be, and on the mask's grid (an array: its voxels in
                the order of the mask's file); without mask and shape its grid is the volume's.
                With `strength` or `region` it is what is changed: every channel that the model makes, of a model of one
                channel the image alone. The result is on its grid, in its units, and in a NIfTI of its type of voxels.
            num_inference_steps: steps of the scheduler.
            sigmas: noise levels to visit instead, in (0, 1] and falling (FlowMatch schedulers); from 1, unless the
                `latents` are less noisy.
            guidance_scale: classifier-free guidance: above 1, volumes follow their conditions more closely and differ
                less from each other; from 0 to 1, or None, it is none, as in diffusers. One number, or one per condition
                such as {"sex": 3.0}. For conditions that the model was trained without at times (`condition_dropout`).
            num_volumes_per_mask: how many of each mask (with `shape`, of each dict).
            generator: one a volume (mask by mask), or a single one: for a single volume as `[generator]`, for several
                volumes a seed each is drawn from it, see `sampling.sample_generators`. A volume depends on its own generator
                alone, not on what is generated beside it, to rounding. The record's seed, as
                `torch.Generator().manual_seed(seed)`, makes the volume again; it is None if numbers were drawn from the
                volume's generator before.
            latents: initial noise instead, one (C, h, w, d) a volume, as a list, a tensor or an array (B, C, h, w, d).
            output_type: "nifti", "np", "pt" or "latent": see `MedVolumePipelineOutput`.
            return_dict: False gives the tuple `(volumes,)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each step of each
                batch, or one of diffusers' `PipelineCallback`; "latents" in the dict that it returns replace the batch's. It
                may set `pipe._guidance_scale`, for the steps of the batch that follow, and `pipe._interrupt = True`, after
                which no step is made: the batch's volumes are as far as they came, those of later batches None (with
                `paths`: not written). The records say what it changed.
            callback_on_step_end_tensor_inputs: what the callback is given: "latents" or nothing.
            label_map: how to read label values that the model does not know: {value: known value or name}.
            batch_size: most volumes denoised together; only volumes with equal padded grids share a batch.
            paths: a .nii.gz or .nii file for each volume, e.g. `pipe(mask="ct.nii.gz", paths="out/ct_000.nii.gz")`; of
                several channels a file each, out/a.nii.gz becoming out/a_ct.nii.gz and out/a_pet.nii.gz.
                Each is written as soon as it is decoded, slab by slab, with its sidecar beside it (as
                `write_synthetic` does), so that no volume is ever held whole; `volumes` are the paths then. The files
                hold what is returned without `paths`. Volumes that must be resampled to their mask's spacing are held.
            residual_noise: add what the autoencoder leaves out of real volumes, for a model that measured it (`residual_noise: true` in the
                config of train_ldm.py): see `autoencoder.residual_noise`.
            strength: image to image: in (0, 1], how much of the image is changed. It is noised so far, and denoised under
                the conditions in that share of the steps; 1 (for which without a region only its grid counts) is
                generating anew.
            region: inpainting: a label map on the image's grid (or a list of one an image), not 0 where voxels are made
                anew. Everywhere else they are the image's own, bit for bit. With `strength`, to that degree.
            blend_margin: mm inside the region's border in which what is made is brought to what surrounds it, so that there is no
                edge; 0 leaves it as it is made.
            keep_channels: channels of an image that is changed which are left alone, and condition the others.

        Raises: ValueError naming what cannot be used and the remedy: the mask, its labels, classes, numbers, images, the
        guidance, the generators, the sigmas, the output type, the scheduler, the edit, the paths; all of it before the first
        step, but what a callback returns. VoxelError, which is one, if voxels are not finite or do not fit the type of the file;
        with `paths` once all other volumes are written.
        Warns: of numbers far outside the training range.
        """
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        steps = whole_number("num_inference_steps", num_inference_steps)
        sigmas = None if sigmas is None else noise_levels(sigmas)
        guidance_in_effect(guidance_scale)  # its names are checked where the conditions are known
        num_volumes_per_mask = whole_number("num_volumes_per_mask", num_volumes_per_mask)
        batch_size = whole_number("batch_size", batch_size)
        return_dict, residual_noise = flag("return_dict", return_dict), flag("residual_noise", residual_noise)
        shape, label_map = None if shape is None else grid_shape(shape), translation(label_map)
        strength = None if strength is None else real_number("strength", strength)
        blend_margin, keep_channels = real_number("blend_margin", blend_margin), names("keep_channels", keep_channels)
        known_inputs = self._callback_tensor_inputs
        inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs, known_inputs)
        check_attention_backend(self.unet, self._execution_device)
        scheduler = fit_scheduler(self.scheduler, self.unet.config["objective"], self.unet.train_steps)
        set_timesteps(scheduler, steps, sigmas, self._execution_device)  # what it refuses, it refuses here
        if sigmas and sigmas[0] < MIN_NOISE and latents is None and strength in (None, 1):
            raise ValueError(
                f"sigmas begin at {sigmas[0]:g}, which takes pure noise for an image; begin at 1, or give the `latents` (or an "
                "image and strength) that have so little noise"
            )
        masks = None if mask is None else as_list(mask)
        editing = edit_requested(
            strength, region, keep_channels, begins_from={"image": image, "shape": shape, "latents": latents}
        )
        of_channels: Any = by_channel(image, self.data) if editing else image
        asked = rows_of(classes, numbers, of_channels, None if masks is None else len(masks))
        masks, images = masks or [None] * len(asked), [one for *_, one in asked]
        edits: list[EditRequest | None] = [None] * len(asked)
        if editing:
            count = steps if sigmas is None else len(sigmas)
            settings = {
                "strength": strength,
                "blend_margin": blend_margin,
                "keep_channels": keep_channels,
                "num_inference_steps": count,
            }
            edits = [*resolve_edits(self.data, images, region, **settings)]  # pyright: ignore[reportArgumentType]
            images = [edit.conditions for edit in edits if edit is not None]
        keys = [
            (identity(one), edit and edit.identity, *sorted((str(name), identity(of)) for name, of in own.items()))
            for one, own, edit in zip(masks, images, edits, strict=True)
        ]
        distinct = dict(zip(keys, zip(masks, images, edits, strict=True), strict=True))
        read = {key: self.prepared(one, shape, label_map, own, edit) for key, (one, own, edit) in distinct.items()}
        prepared_volumes = [read[key] for key in keys]  # what is given twice is held once
        rows = [
            check_conditions(self.unet, self.data, *one[:2], prepared.grid)
            for one, prepared in zip(asked, prepared_volumes, strict=True)
        ]
        described = [None if one is None else describe_mask(one) for one in masks]
        image_records = [describe_images(one) for one in images]
        guiding = {name for row in [*rows, images] for part in row for name in part}
        guiding |= {"mask"} if mask is not None else set()
        owner = [i for i in range(len(prepared_volumes)) for _ in range(num_volumes_per_mask)]  # volume -> its canvas
        grids = [self._latent_shape(prepared) for prepared in prepared_volumes]
        latents = None if latents is None else given_latents(latents, [grids[i] for i in owner])

        def recorded(scale: Any) -> float | dict[str, float] | None:
            check_guidance(scale, self.unet.config["condition_dropout"] or {}, guiding)
            return recorded_guidance(scale)

        recorded(guidance_scale)
        generators = sample_generators(generator, len(owner))
        seeds = [sample_seed(own) if latents is None else None for own in generators]
        records = [
            self.provenance(
                described[i],
                shape=shape,
                seed=seed,
                num_inference_steps=steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                label_map=label_map,
                classes=rows[i][0],
                numbers=rows[i][1],
                images=image_records[i],
                residual_noise=residual_noise,
                edit=edits[i],
            )
            for i, seed in zip(owner, seeds, strict=True)
        ]
        sources = [*masks, *(one for own in images for one in own.values())]
        sources += [one for edit in edits if edit is not None for one in edit.files]
        files = check_paths(paths, records, output_type, sources)

        volumes: list[Any] = [None] * len(owner)
        unwritten: list[str] = []
        with self._call_state() as state, one_at_a_time(self.vae, self.unet):
            encoded, parts = {}, (self.vae, self.unet, self.volume_processor)
            if self.unet.config["images"]:
                encoded = {key: image_condition(*parts, one, self._execution_device) for key, one in read.items()}
            changed = {
                key: edited_latents(*parts, one, self._execution_device) for key, one in read.items() if one.edit
            }
            for batch in equal_batches([prepared_volumes[i].shape for i in owner], batch_size):
                if state.interrupt:
                    for i in batch:
                        records[i]["callback"] = {"interrupted_after": 0}
                    continue
                own = [generators[i] for i in batch]
                rows_here = [rows[owner[i]] for i in batch]
                noises = None if latents is None else [latents[i] for i in batch]
                canvases_here = [prepared_volumes[owner[i]] for i in batch]
                conditions = condition_tensors(self.unet, canvases_here, rows_here, self._execution_device)
                if encoded:
                    conditions = replace(conditions, image=torch.cat([encoded[keys[owner[i]]] for i in batch]))
                known = [changed[keys[owner[i]]] for i in batch] if changed else []
                inside = [cells for _, cells in known if cells is not None]
                state.guidance_scale = guidance_scale
                callback = StepCallback(self, state, callback_on_step_end, inputs, recorded)
                denoised = denoise(
                    self.unet,
                    initial_latents(own, noises, grids[owner[batch[0]]], self._execution_device, self.unet.dtype),
                    scheduler,
                    conditions,
                    guidance_scale=guidance_scale,
                    schema=self.unet.condition_schema,
                    num_inference_steps=steps,
                    sigmas=sigmas,
                    generator=own,
                    callback=callback,
                    progress=callback.bar,
                    image=torch.cat([image for image, _ in known]) if known else None,
                    strength=1.0 if strength is None else strength,
                    region=torch.cat(inside) if inside else None,
                )
                for i, latent in zip(batch, denoised, strict=True):
                    records[i] |= {"callback": plain(callback.changes, "the callback")} if callback.changes else {}
                    drawing = generators[i] if residual_noise else None
                    try:
                        volumes[i] = self._finish(
                            latent, prepared_volumes[owner[i]], output_type, records[i], files[i], drawing
                        )
                    except VoxelError as error:
                        if paths is None:
                            raise
                        unwritten.append(f"{files[i]}: {error}")
            self.maybe_free_model_hooks()
        if unwritten:  # all others are
            raise VoxelError("\n".join(unwritten))
        if not return_dict:
            return (volumes,)  # pyright: ignore[reportReturnType]
        return MedVolumePipelineOutput(volumes=volumes, provenance=records)

    def prepared(
        self,
        mask: MaskLike | None,
        shape: Sequence[int] | None,
        label_map: LabelMap | None = None,
        images: Images | None = None,
        edit: EditRequest | None = None,
    ) -> PreparedVolume:
        """What one volume is drawn on: the grid of its mask, or where the model does without a mask that of its images, or
        `shape`; with the images {channel: image} that are given. With `edit`, the grid of the image that is changed.

        Raises: ValueError if the model needs the one that is not given, and for a mask or an image that cannot be used.
        """
        images = images or {}
        check_images(self.unet, self.data, images)
        ways = (mask is not None) + (shape is not None) + (mask is None and bool(images or edit))  # to set the shape
        if self.unet.config["num_labels"] == 0:
            if mask is not None or ways != 1:
                raise ValueError(
                    "no mask conditions this model: give shape=(X, Y, Z), or an image in its place, and no mask"
                )
        elif not (self.unet.config["condition_dropout"] or {}).get("mask"):
            if mask is None or shape is not None:
                raise ValueError("this model is conditioned on a mask: give mask=..., which also sets the shape")
        elif ways != 1:
            raise ValueError("give a mask, which also sets the shape, or shape=(X, Y, Z) or an image to do without")
        prepared = None
        if mask is not None:
            prepared = self.volume_processor.preprocess(mask, label_map)
        elif shape is not None:
            prepared = self.volume_processor.preprocess_shape(shape)
        if edit is not None:
            prepared = self.volume_processor.preprocess_edit(edit, prepared)
        elif images:
            prepared = self.volume_processor.preprocess_images(images, prepared)
        assert prepared is not None
        return prepared

    def _latent_shape(self, prepared: PreparedVolume) -> tuple[int, int, int, int]:
        """(C, h, w, d) of the latents of a canvas."""
        h, w, d = (n // s for n, s in zip(prepared.shape, self.vae.stride, strict=True))
        return self.vae.config["latent_channels"], h, w, d

    def _finish(
        self,
        latent: torch.Tensor,
        prepared: PreparedVolume,
        output_type: str,
        record: Mapping[str, Any],
        path: Path | None,
        noise_from: torch.Generator | None,
    ) -> Any:
        """Decode one volume, alone: memory does not grow with the batch. Raises: VoxelError if it is not finite, or does not fit
        the type of its file."""
        if output_type == "latent":
            return next(_finite([latent], record))
        slabs, description = _finite(self._decoded(latent), record), header_description(record)
        if self.noise_model is not None and noise_from is not None:
            seed = torch.randint(2**63 - 1, (1,), generator=noise_from, device=noise_from.device)
            slabs = self.noise_model.add(slabs, int(seed))
        if path is None:
            with _of_seed(record):
                return self.volume_processor.postprocess(slabs, prepared, output_type, description)
        with synthetic_files(record, path) as unfinished, _of_seed(record):
            self.volume_processor.write(slabs, prepared, unfinished, description)
        written = volume_files(path, record)
        return dict(zip(record["channels"], written, strict=True)) if record["channels"] else path

    def _decoded(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        """The slabs (C, X, Y, z) of one volume: as the autoencoder streams them, or a single one where it does not."""
        latents = latent[None].to(self.vae.dtype)
        if self.vae.tiles([n * s for n, s in zip(latent.shape[1:], self.vae.stride, strict=True)]):
            for slab in self.vae.decode_slabs(latents):
                yield slab[0]
        else:
            yield self.vae.decode(latents, return_dict=False)[0][0]


def _finite(slabs: Iterable[torch.Tensor], record: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The same. Raises: VoxelError naming the volume's seed if a value is not finite."""
    for slab in slabs:
        if not torch.isfinite(slab).all():
            narrow = "float16" in record["dtype"].split()  # whose largest number is 65,504
            remedy = (
                "use bfloat16 or float32" if narrow else "look for NaN in the weights, the latents and the conditions"
            )
            raise NotFinite(f"the volume of seed {record['seed']} is not finite in {record['dtype']}; {remedy}")
        yield slab


@contextmanager
def _of_seed(record: Mapping[str, Any]) -> Iterator[None]:
    """Name the volume's seed in what is said of voxels in the units of its file."""
    try:
        yield
    except NotFinite:
        raise
    except VoxelError as error:
        raise VoxelError(f"the volume of seed {record['seed']}: {error}") from error


register_packages()
register_pipeline(MedVolumePipeline)

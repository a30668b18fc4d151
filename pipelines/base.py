"""What all pipelines share: requests are prepared once, then volumes are generated from them. Axes: (B, C, X, Y, Z)."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypedDict

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from autoencoder import VQGAN3D, AutoencoderKL3D, MonaiAutoencoderKL, MonaiVQVAE, SpaceToDepth3D
from autoencoder.residual_noise import ResidualNoiseModel
from diffusion import (
    Conditions,
    LatentDenoiser,
    LatentUNet3D,
    MedDDPMUNet3D,
    MonaiControlNet3D,
    MonaiUNet3D,
    check_guidance,
    denoise,
)
from diffusion.attention import check_attention_backend
from diffusion.denoise import Autoguidance
from diffusion.distillation import check_guidance_of_student
from diffusion.guidance import Guidance, autoguidance_in_effect, interval_in_effect
from diffusion.monai.controlnet import controlled
from diffusion.scheduler_options import Scheduler
from pipelines.inputs.conditions import (
    check_conditions,
    check_grid_source,
    condition_tensors,
    contrasts,
    has_labels,
    image_condition,
    replaced_by,
)
from pipelines.inputs.images import check_images, describe_images
from pipelines.inputs.masks import check_whole, describe_mask, source_name
from pipelines.inputs.prepared import EncodedGrid, PreparedGrid, PreparedVolume
from pipelines.inputs.request import VolumeRequest
from pipelines.storage.loading import check_autoguidance, check_components, check_control, check_fit, check_weak
from pipelines.storage.output import check_paths
from pipelines.storage.provenance import (
    recorded_guidance,
    software,
)
from pipelines.storage.record import GenerationRecord
from pipelines.storage.sampling_settings import SamplingSettings, check_conditioning_scale
from pipelines.storage.serialization import PipelineIOMixin
from volumes.description import DataDescription
from volumes.foreground import box_to_json

from .call import CallState, PipelineCalls, StepCallback, StepEnd, one_at_a_time
from .decoding import VolumeDecoder
from .lora import LoraMixin
from .sampling import (
    Sample,
    SamplingConfig,
    check_latents,
    equal_batches,
    initial_latents,
    recorded_scheduler,
    sample_seed,
    scheduler_of_call,
    timed,
)
from .volume_processor import OUTPUT_TYPES, VolumeProcessor


class Start(TypedDict, total=False):
    """The arguments of `denoise` that say where the steps begin; without any at noise."""

    image: torch.Tensor
    strength: float
    region: torch.Tensor | None


class VolumePipeline(PipelineCalls, PipelineIOMixin, LoraMixin):
    """Autoencoder, latent U-Net and scheduler: `prepare` reads and checks requests, `generate` turns them into volumes.

    `MedVolumePipeline` and `MedVolumeEditPipeline` give it their calls.
    """

    model_cpu_offload_seq = "unet->unet_weak->vae"
    _optional_components = ["unet_weak", "controlnet"]

    def __init__(
        self,
        # by name: `DiffusionPipeline.from_pipe` compares exact types
        vae: AutoencoderKL3D | VQGAN3D | SpaceToDepth3D | MonaiAutoencoderKL | MonaiVQVAE,
        unet: LatentUNet3D | MonaiUNet3D | MedDDPMUNet3D,
        scheduler: SchedulerMixin,
        data: DataDescription | Mapping[str, object] | None = None,
        unet_weak: LatentUNet3D | MonaiUNet3D | MedDDPMUNet3D | None = None,
        controlnet: MonaiControlNet3D | None = None,
    ):
        super().__init__()
        optional = {"unet_weak": unet_weak, "controlnet": controlnet}
        check_components({"vae": vae, "unet": unet, "scheduler": scheduler, **optional})
        if data is None:  # diffusers takes an argument without a default for a module
            name = type(self).__name__
            raise ValueError(
                f"{name} needs `data`, the description of the training set (volumes.describe): give data=pipe.data of "
                f"the pipeline of the components, or use {name}.from_pipe(pipe)"
            )
        self._data = data if isinstance(data, DataDescription) else DataDescription.from_json(data)
        if controlnet is not None:
            check_control(unet, unet_weak, controlnet, self._data)
        check_fit(vae, controlled(unet, controlnet), self._data)
        if unet_weak is not None:
            check_weak(unet, unet_weak)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, **optional)
        self.register_to_config(data=self._data.to_json())
        self.volume_processor = VolumeProcessor(self._data, [side * unet.stride for side in vae.stride])
        residual_noise = self._data.residual_noise
        self.noise_model = None if residual_noise is None else ResidualNoiseModel(residual_noise)
        self.sampling_settings = SamplingSettings()
        self.documents: dict[str, bytes] = {}  # README.md and the like of the folder that it was loaded from
        self._running, self._last = [], CallState()

    # Requests -> prepared volumes

    def prepare(self, requests: Sequence[VolumeRequest], sampling: SamplingConfig) -> list[PreparedVolume]:
        """Read and check what volumes are generated from, and write the record of each. Requests of the same files are
        read, hashed and held once. Where `sampling` has no steps or guidance, it is the pipeline's own that count
        (`sampling_settings`).

        Raises: ValueError naming what cannot be used, and the remedy: a mask, its labels, a class, a number, an image,
        the number of steps, the sigmas. Warns: of numbers far outside the training range.
        """
        self._check_requests(requests)
        sampling = sampling.filled(self.sampling_settings)
        check_autoguidance(sampling.autoguidance_scale, self.unet_weak)
        check_guidance_of_student(self.unet, sampling.guidance_scale, sampling.autoguidance_scale, sampling.without)
        check_conditioning_scale(sampling.controlnet_conditioning_scale, self.controlnet)
        denoiser = self.denoiser
        timed(self._scheduler(sampling), sampling, self._execution_device)
        replaced = replaced_by(denoiser, self.data.labels, sampling.without)
        read: dict[Any, tuple[PreparedGrid, GenerationRecord]] = {}
        volumes = []
        for request in requests:
            key = request.grid_key
            if key not in read:
                check_images(denoiser, self.data, request.images)
                check_grid_source(denoiser, request)
                grid = None
                if request.mask is not None:
                    of_box = request.image_of_box(self.data.crop)
                    grid = self.volume_processor.preprocess(request.mask, request.label_map, of_box)
                    if grid.labels is not None and not denoiser.takes_partial_masks:
                        check_whole(grid.labels, source_name(request.mask))
                elif request.shape is not None:
                    grid = self.volume_processor.preprocess_shape(request.shape, request.spacing)
                grid = self._add_images(request, grid)
                record = replace(
                    self.record(request, sampling), scheduler=recorded_scheduler(self._scheduler(sampling, grid))
                )
                if replaced and not has_labels(grid.labels, replaced):
                    interval = replace(sampling, guidance_without={}).interval
                    record = replace(record, guidance_without=None, guidance_interval=interval)
                read[key] = grid, record
            grid, record = read[key]
            classes, numbers = check_conditions(denoiser, self.data, request.classes, request.numbers, grid.grid)
            record = replace(record, classes=classes or None, numbers=numbers or None)
            box = None if grid.cropped is None else box_to_json(grid.cropped.box)
            record = replace(record, resampled=dict(grid.resampled) or None, box=box)
            volumes.append(PreparedVolume(request, grid, classes, numbers, sampling, record))
        return volumes

    def _check_requests(self, requests: Iterable[VolumeRequest]) -> None:
        """Raises: ValueError for requests that this class does not generate, or not in one call."""
        if any(request.edit is not None for request in requests):
            raise ValueError(
                "a request with an edit is for MedVolumeEditPipeline: use MedVolumeEditPipeline.from_pipe(pipe)"
            )

    def _add_images(self, request: VolumeRequest, grid: PreparedGrid | None) -> PreparedGrid:
        """The grid with the condition images; their own where there is none yet."""
        if request.images:
            return self.volume_processor.preprocess_images(request.images, grid)
        assert grid is not None
        return grid

    def record(self, request: VolumeRequest, sampling: SamplingConfig, seed: int | None = None) -> GenerationRecord:
        """The record of a request's volumes, but for what `prepare` adds: the classes and numbers in effect, and the
        shift of the timesteps on their grid. Everything but `software` decides the voxels. The files of the request are
        read and hashed."""
        sampling = sampling.filled(self.sampling_settings)
        label_map = {str(value): target for value, target in (request.label_map or {}).items()}
        of_box = None if request.mask is None else request.image_of_box(self.data.crop)
        of_box = of_box if of_box is request.box_image else None  # others are recorded as images
        autoguidance = autoguidance_in_effect(sampling.autoguidance_scale)
        return GenerationRecord(
            software=software(),
            model=self.model_hash,
            seed=seed,
            num_inference_steps=sampling.steps,
            sigmas=sampling.sigmas,
            guidance_scale=recorded_guidance(sampling.guidance_scale),
            guidance_interval=sampling.interval,
            autoguidance_scale=None if autoguidance == 1 else autoguidance,
            unet_weak=None if autoguidance == 1 else self.unet_weak_hash,
            guidance_without=sampling.without,
            controlnet_conditioning_scale=None if request.mask is None else sampling.control_scale,
            settings_from=sampling.settings_from,
            scheduler=recorded_scheduler(self._scheduler(sampling)),
            dtype=self._dtypes(),
            mask=None if request.mask is None else describe_mask(request.mask),
            shape=request.shape,
            spacing=request.spacing,
            label_map=label_map or None,
            images=describe_images(request.images) or None,
            box_image=None if of_box is None else describe_mask(of_box),
            channels=self.volume_processor.generated(request.images) or None,
            residual_noise=None if self.noise_model is None else sampling.residual_noise,
            license=self.license,
        )

    def check_guidance(self, scale: Guidance, volumes: Iterable[PreparedVolume]) -> None:
        """Raises: ValueError for a guidance scale that the model, or the conditions of these volumes together, cannot
        have."""
        names = {name for volume in volumes for name in volume.condition_names}
        check_guidance(scale, self.denoiser.condition_schema.dropout, names)
        check_guidance_of_student(self.unet, scale, None)

    # Prepared volumes -> latents -> volumes

    # Long: half are arguments, its own and those of `denoise`; the rest is the way of a batch, in order.
    @torch.no_grad()
    def generate(
        self,
        volumes: Sequence[PreparedVolume],
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        latents: Any = None,
        output_type: str = "nifti",
        paths: str | PathLike | Sequence[str | PathLike] | None = None,
        step_end: StepEnd | None = None,
    ) -> list[Sample]:
        """Generate one volume per prepared one, from its generator or its `latents`.

        Args:
            sampling: that of `prepare`.
            output_type, paths, step_end: as `MedVolumePipeline.__call__`.
        Returns: the volumes; one whose voxels no file can hold has a `fault`.
        Raises: ValueError for what cannot be used, before the first step, but for what a callback returns.
        """
        sampling = sampling.filled(self.sampling_settings)
        if any(volume.sampling.recorded != sampling.recorded for volume in volumes):
            raise ValueError(
                "the volumes were prepared for other sampling settings, which their records name; prepare them again"
            )
        networks = self._networks(sampling, volumes)
        parts = [self.vae, self.unet, *networks[1:], *([] if self.controlnet is None else [self.controlnet])]
        for unread in sampling.without_effect if step_end is None or step_end.callback is None else ():
            warnings.warn(f"{unread}; it is not used", stacklevel=2)
        for unet in networks:
            check_attention_backend(unet, self._execution_device)
        samples = self._samples(volumes, generators, latents, paths, output_type)
        grids = {sample.prepared.shape: sample.prepared.grid for sample in samples}
        device = self._execution_device
        schedulers = {shape: timed(self._scheduler(sampling, grid), sampling, device) for shape, grid in grids.items()}
        noise_model = self.noise_model if sampling.residual_noise else None
        decoder = VolumeDecoder(self.vae, self.volume_processor, noise_model, output_type)

        def in_effect(scale: Guidance) -> float | dict[str, float] | None:
            self.check_guidance(scale, volumes)
            return recorded_guidance(scale)

        in_effect(sampling.guidance_scale)
        with self._call_state() as state, one_at_a_time(*parts):
            encoded = {grid: self._encode(grid) for grid in dict.fromkeys(volume.grid for volume in volumes)}
            keys = [(sample.prepared.shape, sample.record.guidance_without is None) for sample in samples]
            for numbers in equal_batches(keys, sampling.batch_size):
                batch = [samples[number] for number in numbers]
                if state.interrupt:
                    for sample in batch:
                        sample.record = replace(sample.record, callback={"interrupted_after": 0})
                    continue
                state.guidance_scale = sampling.guidance_scale
                callback = StepCallback(self, state, step_end or StepEnd(), in_effect)
                images = [encoded[sample.prepared.grid].condition for sample in batch]
                prepared, calls = [sample.prepared for sample in batch], []
                conditions = [condition_tensors(unet, prepared, device, images) for unet in networks]
                denoised = denoise(
                    networks[0],
                    initial_latents(batch, self._latent_shape(batch[0].prepared.grid), device, self.unet.dtype),
                    schedulers[batch[0].prepared.shape],
                    conditions[0],
                    guidance_scale=sampling.guidance_scale,
                    guidance_interval=sampling.guidance_interval,
                    autoguidance=self._autoguidance(sampling, conditions),
                    contrasts=contrasts(
                        networks[0], self.data.labels, sampling.without, prepared, conditions[0], device
                    ),
                    schema=networks[0].condition_schema,
                    num_inference_steps=sampling.steps,
                    sigmas=sampling.sigmas,
                    generator=[sample.generator for sample in batch],
                    callback=callback,
                    progress=callback.bar,
                    count_calls=calls.append,
                    **self._start(batch, encoded),
                )
                noted: dict[str, Any] = {"callback": callback.changes or None, "network_calls": calls[0]}
                if "guidance_scale" in callback.changes:  # it may have begun to guide
                    noted["guidance_interval"] = interval_in_effect(sampling.guidance_interval)
                for sample, latent in zip(batch, denoised, strict=True):
                    sample.record = replace(sample.record, **noted)
                    decoder.finish(sample, latent)
            self.maybe_free_model_hooks()
        return samples

    def _networks(self, sampling: SamplingConfig, volumes: Sequence[PreparedVolume]) -> list[LatentDenoiser]:
        """The U-Nets of a call: the pipeline's, with its ControlNet, and with autoguidance the weaker one. Raises:
        ValueError if it is not the one that the records of the volumes name."""
        check_autoguidance(sampling.autoguidance_scale, self.unet_weak)
        if self.unet_weak is None or autoguidance_in_effect(sampling.autoguidance_scale) == 1:
            return [controlled(self.unet, self.controlnet, sampling.controlnet_conditioning_scale)]
        weak = self.unet_weak_hash
        if any(volume.record.unet_weak != weak for volume in volumes):
            raise ValueError("the volumes were prepared for another weaker U-Net (unet_weak); prepare them again")
        return [self.unet, self.unet_weak]

    def _autoguidance(self, sampling: SamplingConfig, conditions: Sequence[Conditions]) -> Autoguidance | None:
        """The guidance by the weaker U-Net, with the batch's conditions of each of `_networks`; None without it."""
        if self.unet_weak is None or len(conditions) == 1:
            return None
        return Autoguidance(self.unet_weak, conditions[1], autoguidance_in_effect(sampling.autoguidance_scale))

    def _samples(
        self,
        volumes: Sequence[PreparedVolume],
        generators: Sequence[torch.Generator],
        latents: Any,
        paths: str | PathLike | Sequence[str | PathLike] | None,
        output_type: str,
    ) -> list[Sample]:
        """The volumes of a call before the first step. Raises: ValueError for generators, latents, paths, and a type of
        output that cannot be used, and for requests of another pipeline."""
        self._check_call(volumes, generators, output_type)
        noises = check_latents(latents, [self._latent_shape(volume.grid) for volume in volumes])
        begun = zip(volumes, generators, noises, strict=True)
        seeds = [sample_seed(generator) if noise is None else None for _, generator, noise in begun]
        records = [replace(volume.record, seed=seed) for volume, seed in zip(volumes, seeds, strict=True)]
        files = [file for volume in volumes for file in volume.request.files]
        checked = check_paths(paths, records, output_type, files)
        return [Sample(*row) for row in zip(volumes, generators, noises, records, checked, strict=True)]

    def _check_call(
        self, volumes: Sequence[PreparedVolume], generators: Sequence[torch.Generator], output_type: str
    ) -> None:
        """Raises: ValueError for an unknown type of output, another number of generators, and requests of another
        pipeline."""
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        if len(volumes) != len(generators):
            raise ValueError(f"{len(volumes)} volumes and {len(generators)} generators; give one generator per volume")
        self._check_requests(volume.request for volume in volumes)

    def _scheduler(self, sampling: SamplingConfig, grid: PreparedGrid | None = None) -> Scheduler:
        """The scheduler of a call, on one grid: see `scheduler_of_call`."""
        sides = None if grid is None else self._latent_shape(grid)[1:]
        return scheduler_of_call(self.scheduler, self.unet, sampling, sides)

    def _latent_shape(self, grid: PreparedGrid) -> tuple[int, int, int, int]:
        """(C, h, w, d) of the latents of a grid."""
        h, w, d = (n // s for n, s in zip(grid.shape, self.vae.stride, strict=True))
        return self.vae.config["latent_channels"], h, w, d

    def _encode(self, grid: PreparedGrid) -> EncodedGrid:
        """The latents of the images on a grid."""
        if not self.unet.condition_schema.images:
            return EncodedGrid(None)
        device = self._execution_device
        return EncodedGrid(image_condition(self.vae, self.unet, self.volume_processor, grid, device))

    def _start(self, batch: Sequence[Sample], encoded: Mapping[PreparedGrid, EncodedGrid]) -> Start:
        """Where the steps of a batch begin: at noise."""
        return {}

"""MedVolumeEditPipeline: a part of an image, or all of it to a degree, is generated again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch

from diffusion.distillation import check_inpainting_of_student
from diffusion.guidance import Guidance
from pipelines.inputs.arguments import flag, names, real_number, whole_number
from pipelines.inputs.images import ImageLike, Images
from pipelines.inputs.inpainting import BLEND_MARGIN_MM, downsample_region, edit_requests, encoded
from pipelines.inputs.masks import LabelMap, MaskLike
from pipelines.inputs.prepared import EncodedGrid, PreparedGrid, PreparedVolume
from pipelines.inputs.request import Classes, Numbers, VolumeRequest, call_requests
from pipelines.storage.loading import register_pipeline
from pipelines.storage.output import MedVolumePipelineOutput
from pipelines.storage.record import GenerationRecord

from .base import Start, VolumePipeline
from .call import StepEnd
from .decoding import call_output
from .sampling import Generators, Sample, SamplingConfig, sample_generators

EndOfStep = Callable[
    ["MedVolumeEditPipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None
]


@dataclass(frozen=True)
class EncodedEdit(EncodedGrid):
    """The latents of an image that is edited.

    Attributes:
        image: (1, C, h, w, d).
        region: bool (1, 1, h, w, d), the latent voxels that the region reaches, even in part; None where everything is
            changed.
    """

    image: torch.Tensor
    region: torch.Tensor | None


class MedVolumeEditPipeline(VolumePipeline):
    """Edits images: image to image (`strength`), inpainting (`region`), or both. Its components are those of
    `MedVolumePipeline`, and so are its folders:

        edit = MedVolumeEditPipeline.from_pipe(pipe)  # shares the components of a pipeline
        edit = MedVolumeEditPipeline.from_pretrained("weights/hippocampus")

    Args: as `MedVolumePipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        image: ImageLike | Images | Sequence[ImageLike | Images] | None = None,
        region: MaskLike | Sequence[MaskLike] | None = None,
        strength: float | None = None,
        blend_margin: float = BLEND_MARGIN_MM,
        keep_channels: Sequence[str] = (),
        classes: Classes | Sequence[Classes] | None = None,
        numbers: Numbers | Sequence[Numbers] | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: Guidance = None,
        guidance_interval: Sequence[float] | None = None,
        autoguidance_scale: float | None = None,
        guidance_without: Mapping[str | int, str | int] | None = None,
        without_scale: float | None = None,
        num_volumes_per_mask: int = 1,
        generator: Generators = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: EndOfStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        label_map: LabelMap | None = None,
        batch_size: int = 8,
        paths: str | PathLike | Sequence[str | PathLike] | None = None,
        residual_noise: bool = True,
    ) -> MedVolumePipelineOutput:
        """Edit images. The result is on the grid of the image's file, in its units, and in a NIfTI of its type of
        voxels.

        Args:
            image: the image that is edited, whatever a mask may be; with several channels {channel: image} of every
                channel that the model generates; or a list of one per mask. Without a mask its grid is the volume's.
            region: inpainting: a label map on the image's grid (or a list of one per image), not 0 where voxels are
                generated. Everywhere else they are the image's own, bit for bit. With `strength`, they are changed to
                that degree.
            strength: image to image: in (0, 1], how much of the image is changed. It is noised to that degree, and
                denoised under the conditions in that share of the steps; 1 without a region leaves nothing of it but
                its grid.
                Default: 1, with a region.
            blend_margin: mm inside the region's border in which the generated voxels are blended with their
                surroundings, so that there is no edge; 0 for no blending.
            keep_channels: channels of the image that stay as they are, and condition the others.
            mask, classes, numbers, ...: as `MedVolumePipeline.__call__`.

        Raises: ValueError as `MedVolumePipeline.__call__`, and naming what cannot be edited.
        Warns: of numbers far outside the training range.
        """
        return_dict = flag("return_dict", return_dict)
        step_end = StepEnd(callback_on_step_end, callback_on_step_end_tensor_inputs)
        guidance: Any = {"guidance_interval": guidance_interval, "autoguidance_scale": autoguidance_scale}
        guidance |= {"guidance_without": guidance_without, "without_scale": without_scale}
        sampling = SamplingConfig(num_inference_steps, sigmas, guidance_scale, residual_noise, batch_size, **guidance)
        sampling = sampling.filled(self.sampling_settings)
        per_mask = whole_number("num_volumes_per_mask", num_volumes_per_mask)
        if image is None:
            raise ValueError("there is no image to edit: give image=...")
        if strength is None and region is None:
            raise ValueError("give strength (image to image), region (inpainting), or both")
        strength = 1.0 if strength is None else real_number("strength", strength)
        requests = call_requests(mask, None, classes, numbers, self._by_channel(image), label_map)
        edits = edit_requests(
            self.data,
            [request.images for request in requests],
            region,
            strength=strength,
            blend_margin=real_number("blend_margin", blend_margin),
            keep_channels=names("keep_channels", keep_channels),
            num_inference_steps=sampling.steps,
        )
        requests = [
            replace(request, images=edit.conditions, edit=edit) for request, edit in zip(requests, edits, strict=True)
        ]
        volumes = [volume for volume in self.prepare(requests, sampling) for _ in range(per_mask)]
        if strength == 1:
            sampling.check_start()
        generators = sample_generators(generator, len(volumes))
        samples = self.generate(volumes, sampling, generators, output_type=output_type, paths=paths, step_end=step_end)
        return call_output(samples, return_dict)

    def prepare(self, requests: Sequence[VolumeRequest], sampling: SamplingConfig) -> list[PreparedVolume]:
        """As `VolumePipeline.prepare`. Raises: also for a region that a student would fill in one call."""
        steps = sampling.filled(self.sampling_settings).steps
        for edit in (request.edit for request in requests):
            if edit is not None and edit.region is not None:
                check_inpainting_of_student(self.unet, edit.strength, steps)
        return super().prepare(requests, sampling)

    def _check_requests(self, requests: Iterable[VolumeRequest]) -> None:
        edits = [request.edit for request in requests]
        if any(edit is None for edit in edits):
            raise ValueError(
                "a request without an edit is for MedVolumePipeline: use MedVolumePipeline.from_pipe(pipe)"
            )
        if len({(edit.strength, edit.region is None) for edit in edits if edit is not None}) > 1:
            raise ValueError(
                "edits of one call have one strength, and all of them have a region or none; use several calls"
            )

    def record(self, request: VolumeRequest, sampling: SamplingConfig, seed: int | None = None) -> GenerationRecord:
        """As `VolumePipeline.record`, with the edit."""
        assert request.edit is not None
        return replace(super().record(request, sampling, seed), edit=request.edit.record())

    def _by_channel(self, image: Any) -> Any:
        """The images of a call as dicts {channel: image}: for a model of one channel each may be that image alone."""
        channels = self.data.channels
        if isinstance(image, (list, tuple)):
            return [self._by_channel(one) for one in image]
        if isinstance(image, Mapping) or len(channels) > 1:
            return image
        return {next(iter(channels)): image}

    def _add_images(self, request: VolumeRequest, grid: PreparedGrid | None) -> PreparedGrid:
        assert request.edit is not None
        return self.volume_processor.preprocess_edit(request.edit, grid)

    def _encode(self, grid: PreparedGrid) -> EncodedGrid:
        condition = super()._encode(grid).condition
        if grid.edit is None:  # nothing is left of the image but its grid
            return EncodedGrid(condition)
        device, processor = self._execution_device, self.volume_processor
        image = encoded(self.vae, processor.standardized_images(grid, grid.edit.images), device).to(self.unet.dtype)
        if grid.edit.region is None:
            return EncodedEdit(condition, image, None)
        region = downsample_region(processor.padded_region(grid, grid.edit.region), self.vae.stride)
        return EncodedEdit(condition, image, region.to(device))

    def _start(self, batch: Sequence[Sample], encoded: Mapping[PreparedGrid, EncodedGrid]) -> Start:
        """At the image, noised to its strength."""
        grids = [encoded[sample.prepared.grid] for sample in batch]
        edits = [grid for grid in grids if isinstance(grid, EncodedEdit)]
        if not edits:
            return {}
        request = batch[0].prepared.request.edit
        assert request is not None  # strength is one per call
        regions = [edit.region for edit in edits if edit.region is not None]
        region = torch.cat(regions) if regions else None
        return {"image": torch.cat([edit.image for edit in edits]), "strength": request.strength, "region": region}


register_pipeline(MedVolumeEditPipeline)

"""MedVolumePipeline: masks to volumes."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from diffusion.guidance import Guidance
from pipelines.inputs.arguments import flag, whole_number
from pipelines.inputs.images import ImageLike, Images
from pipelines.inputs.masks import LabelMap, MaskLike
from pipelines.inputs.request import Classes, Numbers, call_requests
from pipelines.storage.loading import register_packages, register_pipeline
from pipelines.storage.output import MedVolumePipelineOutput

from .base import VolumePipeline
from .call import StepEnd
from .decoding import call_output
from .sampling import Generators, SamplingConfig, sample_generators

EndOfStep = Callable[["MedVolumePipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class MedVolumePipeline(VolumePipeline):
    """Generates volumes from masks (or, for a model that needs none, of a given shape), each on its mask's own grid,
    and with given classes, numbers and images (channels that condition the others) if the model knows any.

    `MedVolumeEditPipeline.from_pipe(pipe)` edits images with the same components.

    Runs in float32, bfloat16 or float16 (`from_pretrained(..., dtype=torch.bfloat16)` or
    `pipe.to(torch.bfloat16)`): noise is sampled in float32 whatever the type, results are float32. bfloat16 works on
    CPUs too, and is slow on those without AVX512-BF16 or AMX. A result that is not finite raises.

    Several threads may call one pipeline, or pipelines that share components: each call has its own scheduler,
    callbacks, guidance and progress bar. Calls wait for each other where weights are offloaded or cast by hooks, or
    code is compiled.

    Args:
        vae: trained autoencoder, with its latent statistics set.
        unet: trained latent U-Net; its config holds objective and number of labels.
        scheduler: any of diffusers' that speaks the objective, see `diffusion.fit_scheduler`.
        data: the description of the training set (`volumes.describe`), or its JSON, which model_index.json keeps.
        unet_weak: a weaker version of the U-Net for `autoguidance_scale`, such as a smaller one, or an earlier
            checkpoint.
        controlnet: MAISI's ControlNet, by which masks condition a U-Net that was trained without (`interop`).
    """

    @torch.no_grad()
    def __call__(
        self,
        mask: MaskLike | Sequence[MaskLike] | None = None,
        shape: Sequence[int] | None = None,
        classes: Classes | Sequence[Classes] | None = None,
        numbers: Numbers | Sequence[Numbers] | None = None,
        image: Images | Sequence[Images] | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: Guidance = None,
        guidance_interval: Sequence[float] | None = None,
        autoguidance_scale: float | None = None,
        guidance_without: Mapping[str | int, str | int] | None = None,
        without_scale: float | None = None,
        num_volumes_per_mask: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: EndOfStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        label_map: LabelMap | None = None,
        batch_size: int = 8,
        paths: str | PathLike | Sequence[str | PathLike] | None = None,
        residual_noise: bool = True,
        box_image: ImageLike | Sequence[ImageLike] | None = None,
        spacing: Sequence[float] | None = None,
        controlnet_conditioning_scale: float | None = None,
    ) -> MedVolumePipelineOutput:
        """Generate volumes.

        Args:
            mask: path, image of nibabel, SimpleITK, torchio or MONAI (MetaTensor), `Volume`, array or tensor (X, Y, Z)
                of label values as in the training files; or a list of them, of any shapes. -1 marks voxels outside the
                field of view. A path or image keeps its grid; a plain array or tensor lies on the model's template.
            shape: (X, Y, Z) in voxels, in place of a mask, for a model that no mask conditions, or whose training
                dropped the mask at times.
            classes: the value of each class, such as {"sex": "F"}: one dict for all masks, or a list of one per mask;
                with `shape`, one per volume. A class may be left out if training dropped it at times.
            numbers: the same for numbers, such as {"age": 63}. Those of the grid (spacing_x, size_x, ...) have
                defaults.
            image: the condition channels, such as {"ct": "ct.nii.gz"}, in the units of the training files: one dict
                for all masks, or a list of one per mask. Each may be whatever a mask may be, on the mask's grid (an
                array: its voxels in the order of the mask's file); without mask and shape its grid is the volume's.
            num_inference_steps: steps of the scheduler. Default: those of the pipeline (`pipe.sampling_settings`, from
                sampling.json in its folder), or 20.
            sigmas: noise levels to visit instead, in (0, 1] and falling (Euler or UniPC of a flow); from 1, unless the
                `latents` are less noisy.
            guidance_scale: classifier-free guidance: above 1, volumes follow their conditions more closely and differ
                less from each other; from 0 to 1 there is no guidance, as in diffusers. One number, or one per
                condition such as {"sex": 3.0}. For conditions that training dropped at times (`condition_dropout`).
                Default: that of the pipeline, as for the steps, or 1.
            guidance_interval: noise levels (lo, hi] in which guidance acts, such as (0.2, 0.8), 1 being pure noise and
                0 clean; a step elsewhere is one network call (Kynkaanniemi et al. 2024). (0, 1) is all. Default: that
                of the pipeline, or all.
            autoguidance_scale: above 1, guidance away from the pipeline's weaker U-Net (`unet_weak`), under the same
                conditions (Karras et al. 2024); it adds to `guidance_scale`, and one network call to a step. Default:
                that of the pipeline, or 1, which is none.
            guidance_without: guidance away from the same mask without some labels, so that small structures show more
                clearly: {label: label in its place}, by name or value, such as {"lesion": "organ"}. It needs no
                training without the mask. It adds to `guidance_scale`, and one network call to each step of volumes
                with such labels. {} is none. Default: that of the pipeline, or none.
            without_scale: of `guidance_without`: 1 is none, 2 doubles the difference that the labels make. Default:
                that of the pipeline, or 2.
            num_volumes_per_mask: volumes per mask (with `shape`, per dict).
            generator: one per volume (mask by mask), or a single one: for a single volume as `[generator]`, for several
                volumes one seed each is taken from it, see `sampling.sample_generators`. A volume depends on its own
                generator alone, not on what is generated beside it, to rounding. The record's seed, as
                `torch.Generator().manual_seed(seed)`, generates the volume again; it is None if the volume's generator
                had produced numbers before.
            latents: initial noise instead, one (C, h, w, d) per volume, as a list, a tensor or an array (B, C, h, w,
                d).
            output_type: "nifti", "np", "pt" or "latent": see `MedVolumePipelineOutput`.
            return_dict: False gives the tuple `(volumes,)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each step of each
                batch, or one of diffusers' `PipelineCallback`; "latents" in the dict that it returns replace the
                batch's. It may set `pipe._guidance_scale`, for the following steps of the batch, and `pipe._interrupt =
                True`, after
                which there is no further step: the batch's volumes are as far as they came, those of later batches None
                    (with
                `paths`: not written). The records say what it changed.
            callback_on_step_end_tensor_inputs: the tensors that the callback is given: "latents" or none.
            label_map: how to read label values that the model does not know: {value: known value or name}.
            batch_size: volumes denoised together at most; only volumes with equal padded grids share a batch.
            paths: a .nii.gz or .nii file for each volume, e.g. `pipe(mask="ct.nii.gz", paths="out/ct_000.nii.gz")`;
                with several channels one file each, out/a.nii.gz becoming out/a_ct.nii.gz and out/a_pet.nii.gz. Each is
                written as soon as it is decoded, slab by slab, with its sidecar beside it (as `write_synthetic` does),
                so that no volume is ever held whole; `volumes` are the paths then. The files hold what is returned
                without `paths`. Volumes that must be resampled to their mask's spacing are held.
            residual_noise: add the texture that the autoencoder leaves out of real volumes, for a model that measured
                it (`residual_noise: true` in the config of train_ldm.py): see `autoencoder.residual_noise`.
            box_image: an image on the mask's grid whose foreground sets the box that is generated, for a model whose
                training cut its cases to one (`data.crop` with a value): one, or a list of one per mask. It conditions
                nothing. Without it the whole grid is generated, unless `image` has that channel.
            spacing: (x, y, z) in mm between the voxels of `shape`. Default: that of the model's template. A model of
                volumes of one spacing generates at its own, and the volume is resampled.
            controlnet_conditioning_scale: for a pipeline with a ControlNet: factor of what it adds to the U-Net, 0 or
                more; 1 is as trained. Default: that of the pipeline, or 1.

        Raises: ValueError naming what cannot be used and the remedy: the mask, its labels, classes, numbers, images,
        the guidance, the generators, the sigmas, the output type, the scheduler, the paths; all of it before the first
        step, but what a callback returns. VoxelError, which is one, if voxels are not finite or do not fit the type of
        the file, once all other volumes are finished. Warns: of numbers far outside the training range.
        """
        return_dict = flag("return_dict", return_dict)
        step_end = StepEnd(callback_on_step_end, callback_on_step_end_tensor_inputs)
        guidance: Any = {"guidance_interval": guidance_interval, "autoguidance_scale": autoguidance_scale}
        guidance |= {"guidance_without": guidance_without, "without_scale": without_scale}
        guidance |= {"controlnet_conditioning_scale": controlnet_conditioning_scale}
        sampling = SamplingConfig(num_inference_steps, sigmas, guidance_scale, residual_noise, batch_size, **guidance)
        per_mask = whole_number("num_volumes_per_mask", num_volumes_per_mask)
        requests = call_requests(mask, shape, classes, numbers, image, label_map, box_image, spacing)
        volumes = [volume for volume in self.prepare(requests, sampling) for _ in range(per_mask)]
        if latents is None:
            sampling.check_start()
        generators = sample_generators(generator, len(volumes))
        samples = self.generate(
            volumes, sampling, generators, latents=latents, output_type=output_type, paths=paths, step_end=step_end
        )
        return call_output(samples, return_dict)


register_packages()
register_pipeline(MedVolumePipeline)

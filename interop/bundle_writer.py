"""A MONAI bundle of a pipeline: a folder that `python -m monai.bundle run` turns masks into volumes with.

Its networks are programs (`interop.programs`), its sampler is a table (`interop.calls`) that scripts/sampler.py of the
bundle runs (`interop.bundle_sampler`).
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from diffusion.guidance import autoguidance_in_effect
from pipelines import MedVolumePipeline
from pipelines.sampling import SamplingConfig, scheduler_of_call
from pipelines.storage.provenance import software

from . import bundle_sampler
from .calls import sampling_table
from .programs import export_decoder, export_denoiser

SAMPLING = "configs/sampling.json"
PACKAGES = ("monai", "torch", "numpy", "nibabel")


def write_bundle(pipe: MedVolumePipeline, folder: Path, license: str) -> list[str]:
    """Write configs/, models/ and scripts/ of a bundle.

    Args:
        license: of the weights, for the metadata.
    Returns: what the pipeline does and the bundle does not, a sentence each.
    Raises: ValueError for a pipeline that a bundle cannot express, naming why.
    """
    if reasons := _inexpressible(pipe):
        raise ValueError(
            f"a bundle generates volumes from masks alone, and this pipeline {'; '.join(reasons)}; "
            "--to torch-export writes its networks"
        )
    settings = _sampling(pipe)
    notes = _left_out(pipe)
    for name in ("configs", "models", "scripts"):
        (folder / name).mkdir()
    for name, program in {"unet": export_denoiser(pipe.unet), "decoder": export_decoder(pipe.vae)}.items():
        torch.export.save(program, folder / f"models/{name}.pt2")
    shutil.copyfile(bundle_sampler.__file__, folder / "scripts/sampler.py")
    (folder / "scripts/__init__.py").write_text("", encoding="utf-8")
    _write_json(folder / SAMPLING, settings)
    _write_json(folder / "configs/inference.json", INFERENCE)
    _write_json(folder / "configs/metadata.json", _metadata(pipe, settings, license, notes))
    return notes


INFERENCE: Mapping[str, object] = {
    "bundle_root": ".",
    "mask": "mask.nii.gz",
    "output_dir": "$@bundle_root + '/out'",
    "seed": 0,
    "device": "cpu",
    "unet": {
        "_target_": "scripts.sampler.load_program",
        "path": "$@bundle_root + '/models/unet.pt2'",
        "device": "@device",
    },
    "decoder": {
        "_target_": "scripts.sampler.load_program",
        "path": "$@bundle_root + '/models/decoder.pt2'",
        "device": "@device",
    },
    "orientation": {"_target_": "Orientation", "axcodes": "RAS"},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImage", "image_only": True},
            {"_target_": "EnsureChannelFirst"},
            "@orientation",
        ],
    },
    "network": {
        "_target_": "scripts.sampler.MaskToVolume",
        "unet": "@unet",
        "decoder": "@decoder",
        "settings": f"$@bundle_root + '/{SAMPLING}'",
        "seed": "@seed",
        "device": "@device",
    },
    "saver": {
        "_target_": "SaveImage",
        "output_dir": "@output_dir",
        "output_postfix": "$'synthetic_' + str(@seed)",
        "separate_folder": False,
    },
    "run": ["$@saver(@orientation.inverse(@network(@preprocessing(@mask))))"],
}


def _sampling(pipe: MedVolumePipeline) -> dict[str, object]:
    """Return the content of configs/sampling.json. Raises: ValueError as `sampling_table`."""
    sampling = SamplingConfig().filled(pipe.sampling_settings)
    table = sampling_table(
        scheduler_of_call(pipe.scheduler, pipe.unet, sampling, None),
        sampling.steps,
        guidance_scale=sampling.guidance_scale,
        guidance_interval=sampling.guidance_interval,
        schema=pipe.unet.condition_schema,
        takes_next_timestep=pipe.unet.takes_next_timestep,
    )
    return {
        "labels": sorted(pipe.data.labels),
        "partial_masks": pipe.unet.takes_partial_masks,
        "spacing": pipe.data.spacing,
        "intensity": [[scale.low, scale.high] for scale in pipe.data.intensity],
        "stride": list(pipe.volume_processor.stride),
        "latent_stride": list(pipe.vae.stride),
        "latent_channels": pipe.vae.config["latent_channels"],
        **table,
    }


def _inexpressible(pipe: MedVolumePipeline) -> list[str]:
    """Return what a bundle cannot do without, of what this pipeline needs."""
    schema, data = pipe.unet.condition_schema, pipe.data
    others = [name for name in schema.names if name != "mask"]
    found = {
        "has a ControlNet": pipe.controlnet is not None,
        "is not conditioned on a mask": not schema.mask and pipe.controlnet is None,
        f"is conditioned on {', '.join(others)}": bool(others),
        "generates label maps": bool(data.image_labels),
        "cuts its cases to a box (data.crop)": data.crop is not None,
        "empties the background (data.empty_background)": data.background_threshold is not None,
        "shifts timesteps with the size of the volume (shift_voxels)": pipe.unet.config["shift_voxels"] is not None,
    }
    return [reason for reason, needed in found.items() if needed]


def _left_out(pipe: MedVolumePipeline) -> list[str]:
    """Return what the pipeline does by default and the bundle does not."""
    sampling = SamplingConfig().filled(pipe.sampling_settings)
    found = {
        "The residual noise of the autoencoder is not added (as residual_noise=False).": pipe.noise_model is not None,
        "Guidance by the weaker U-Net is left out (as autoguidance_scale=1).": autoguidance_in_effect(
            sampling.autoguidance_scale
        )
        != 1,
        "Guidance by labels is left out (as guidance_without={}).": sampling.without is not None,
        "Wrong headers are not corrected (data.reading).": bool(pipe.data.reading),
    }
    return [note for note, needed in found.items() if needed]


def _metadata(
    pipe: MedVolumePipeline, settings: Mapping[str, object], license: str, notes: list[str]
) -> dict[str, object]:
    """Return the content of configs/metadata.json."""
    data, channels = pipe.data, len(pipe.data.channels)
    labels = {str(index): data.labels[value] for index, value in enumerate(sorted(data.labels))}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    calls = settings["calls"]
    assert isinstance(calls, list)
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": f"written by {software()}"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"].partition("+")[0],
        "numpy_version": versions["numpy"],
        "required_packages_version": {"nibabel": versions["nibabel"]},
        "task": "generation of synthetic volumes from masks",
        "description": "Latent diffusion. Volumes are synthetic: for research, not for diagnosis.",
        "authors": "whoever trained the weights",
        "copyright": f"weights: {license}",
        "license": license,
        "synthetic": True,
        "model": pipe.model_hash,
        "sampler": f"{type(pipe.scheduler).__name__}, as a table of {len(calls)} calls of the U-Net ({SAMPLING})",
        "not_in_this_bundle": notes,
        "network_data_format": {
            "inputs": {"mask": _format("labels", 1, [min(data.labels), max(data.labels)], labels)},
            "outputs": {
                "pred": _format(
                    "intensities",
                    channels,
                    [min(scale.low for scale in data.intensity), max(scale.high for scale in data.intensity)],
                    dict(zip(map(str, range(channels)), data.channels, strict=True)),
                )
            },
        },
    }


def _format(what: str, channels: int, values: list[float], names: Mapping[str, str]) -> dict[str, object]:
    """Describe an input or output as MONAI's metadata does."""
    return {
        "type": "image",
        "format": what,
        "modality": "n/a",
        "num_channels": channels,
        "spatial_shape": ["*", "*", "*"],
        "dtype": "float32",
        "value_range": values,
        "is_patch_data": False,
        "channel_def": dict(names),
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""A pipeline small enough for a test: random weights everywhere, so that masks, noise and every layer matter."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from autoencoder import AutoencoderKL3D
from diffusion import LatentUNet3D, make_scheduler
from pipelines import MedVolumeEditPipeline, MedVolumePipeline
from volumes.description import DataDescription

LABELS = {"0": "background", "2": "anterior", "5": "posterior"}


def tiny_data(**changes: Any) -> DataDescription:
    """The description of a training set of one MR channel; changes are as in `tiny_json`."""
    return DataDescription.from_json(tiny_json(**changes))


def tiny_json(**changes: Any) -> dict[str, Any]:
    """`tiny_data` as it is stored."""
    data = {
        "channels": ["MR"],
        "labels": LABELS,
        "spacing": [1.0, 1.0, 1.0],
        "intensity": [{"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}],
        "shape_range": [[5, 5, 5], [16, 16, 16]],
        "affine": [[1.0, 0.0, 0.0, -7.0], [0.0, 1.0, 0.0, 3.0], [0.0, 0.0, 1.0, 11.0], [0.0, 0.0, 0.0, 1.0]],
        "description": "tiny",
    }
    return data | changes


def tiny_pipeline(
    seed: int = 0,
    *,
    num_labels: int = 3,
    objective: str = "rectified_flow",
    images: dict[str, int] | None = None,
    condition_dropout: dict[str, float] | None = None,
    partial_masks: float | None = None,
    **changes: Any,
):
    """A MedVolumePipeline without progress bars; further keyword arguments change its `data`. With `images` its
    autoencoder codes every channel by itself, in 4 latent channels."""
    torch.manual_seed(seed)
    data = tiny_data(**changes)
    channels = len(data.intensity)
    codes = channels if images else 1
    vae = AutoencoderKL3D(
        in_channels=channels,
        out_channels=channels,
        latent_channels=4 * codes,
        channels=(8, 8),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
        per_channel=True if images else None,
    )
    vae.set_latent_statistics([0.1, 0.0, -0.1, 0.2] * codes, [1.0, 0.5, 2.0, 1.5] * codes)
    unet = LatentUNet3D(
        in_channels=4 * codes,
        out_channels=4 * codes,
        channels=(16, 16),
        blocks=(1, 1),
        attention=(False, True),
        head_dim=8,
        num_labels=num_labels,
        mask_width=8,
        objective=objective,
        images=images,
        condition_dropout=condition_dropout,
        partial_masks=partial_masks,
    )
    with torch.no_grad():  # the last layer of a new U-Net is zero: nothing would depend on anything
        for parameter in (unet.conv_out.weight, *(block.conv2.weight for level in unet.down_blocks for block in level)):
            parameter.normal_(std=0.1)
    pipe = MedVolumePipeline(vae.eval(), unet.eval(), make_scheduler(objective), data)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def labels_of(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A label map (X, Y, Z) int16 of all three labels, without any symmetry."""
    values = np.array([0, 0, 2, 5], dtype=np.int16)
    return values[np.random.default_rng(seed).integers(0, 4, shape)]


def mask_image(shape: tuple[int, int, int], affine: np.ndarray | None = None, seed: int = 0) -> nib.Nifti1Image:
    """`labels_of` as a NIfTI image, by default with 1 mm voxels away from the origin."""
    return nib.Nifti1Image(labels_of(shape, seed), np.diag([1.0, 1, 1, 1]) if affine is None else affine)


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak of live tensors while `work` runs, on the CPU, by PyTorch's own account."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def seeded(*seeds: int) -> list[torch.Generator]:
    """A list of generators, one a seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def editor_of(pipe: MedVolumePipeline) -> MedVolumeEditPipeline:
    """The edit pipeline of the same components, without progress bars."""
    editor = MedVolumeEditPipeline.from_pipe(pipe)
    editor.set_progress_bar_config(disable=True)
    return editor

"""Each shipped pipeline generates the same volume as when its weights were published, from seed 0 in four steps.

A change of these values changes every volume that people generate: it needs a note in CHANGELOG.md.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import MedVolumePipeline
from volumes import read_mask

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
MASK = WEIGHTS / "hippocampus" / "masks" / "hippocampus_015.nii.gz"
TOLERANCE = 1e-3  # of the range of the values; equal on one thread and two


@pytest.fixture(autouse=True)
def one_thread():
    """Restore the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(name: str, **conditions) -> np.ndarray:
    """Generate one volume (C, X, Y, Z)."""
    pipe = MedVolumePipeline.from_pretrained(WEIGHTS / name)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**conditions, num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="np").volumes[
        0
    ]


def test_hippocampus_from_a_mask():
    (volume,) = generate("hippocampus", mask=MASK)
    labels = read_mask(MASK).array[0]
    span = TOLERANCE * (928.4489 - 27.9692)
    assert volume.shape == labels.shape == (42, 51, 28)
    voxels = [volume[10, 20, 15], volume[17, 25, 18], volume[25, 30, 12]]
    assert voxels == pytest.approx([430.0907, 585.3221, 690.6810], abs=span)
    means = [volume[labels == 0].mean(), volume[labels > 0].mean()]
    assert means == pytest.approx([475.8731, 367.0596], abs=span)


def test_a_student_of_the_hippocampus():
    (volume,) = generate("hippocampus-fast", mask=MASK)
    span = TOLERANCE * (928.4489 - 27.9692)
    voxels = [volume[10, 20, 15], volume[17, 25, 18], volume[25, 30, 12]]
    assert voxels == pytest.approx([439.2075, 630.8058, 579.5633], abs=span)


def test_masks_of_the_hippocampus():
    (volume,) = generate("hippocampus-masks", shape=(36, 52, 36))
    assert (volume[18, 33, 14], volume[19, 13, 24], volume[0, 0, 0]) == (1, 2, 0)
    assert np.bincount(volume.ravel()) == pytest.approx([64754, 2127, 511], rel=TOLERANCE, abs=2)
    assert np.argwhere(volume == 1).mean(0) == pytest.approx([17.7301, 34.9647, 11.0230], abs=0.01)


def test_adrenal_gland_of_a_diagnosis():
    (volume,) = generate("adrenal-shapes", shape=(64, 64, 64), classes={"diagnosis": "hyperplasia"})
    assert (volume[32, 30, 40], volume[32, 32, 33], volume[0, 0, 0]) == (1, 1, 0)
    assert np.bincount(volume.ravel()) == pytest.approx([258661, 3483], rel=TOLERANCE, abs=2)
    assert np.argwhere(volume == 1).mean(0) == pytest.approx([31.9239, 32.2061, 32.5656], abs=0.01)

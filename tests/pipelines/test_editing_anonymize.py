"""A real case's mask in, a volume of nobody out."""

import dataclasses

import numpy as np
import pytest
import torch
from blobs import SHAPE, blobs
from tiny import mask_image, tiny_data, tiny_pipeline

from evaluation.copies.anonymize import anonymized, copy_check_with
from evaluation.copies.fingerprints import CopyCheck
from evaluation.data.model_units import in_model_units
from volumes import Volume, to_nibabel


@pytest.fixture(scope="module")
def known() -> CopyCheck:
    """Of a training set that has nothing to do with the patient."""
    return dataclasses.replace(CopyCheck.of([*blobs(3, 0)], (8, 8, 8), block=2, shift=1), threshold=0.99)


def test_the_patient_is_refused_and_the_verdict_is_recorded(known):
    """The case's image is what the model makes of its mask with the first seed, moved by a voxel."""
    pipe, mask = tiny_pipeline(), mask_image(SHAPE)
    made = [pipe(mask, num_inference_steps=1, generator=[torch.Generator().manual_seed(s)]).volumes[0] for s in (7, 8)]
    moved = to_nibabel(Volume(np.roll(made[0].get_fdata(dtype=np.float32), 1, axis=0)[None], np.eye(4)))
    volume, record = anonymized(pipe, mask, moved, known, seed=7, num_inference_steps=1)
    assert np.array_equal(volume.get_fdata(), made[1].get_fdata()) and record["seed"] == 8
    (refused,) = record["rejected"]
    assert refused["seed"] == 7 and refused["patient_similarity"] > 0.99
    verdict = record["copy_check"]
    assert verdict["threshold"] == 0.99 > verdict["similarity"] >= verdict["patient_similarity"]
    alone = CopyCheck.of([in_model_units(moved, tiny_data())], known.crop, block=2, shift=1)
    assert verdict["patient_similarity"] == alone.check(in_model_units(volume, tiny_data())).similarity
    with pytest.raises(ValueError, match=r"each of 1 volumes from this mask was a copy \(similarity up to 1.000"):
        anonymized(pipe, mask, moved, known, seed=7, most=1, num_inference_steps=1)


def test_nothing_is_written_before_it_is_compared(known, tmp_path):
    with pytest.raises(ValueError, match="paths would be written before the comparison"):
        anonymized(tiny_pipeline(), mask_image(SHAPE), mask_image(SHAPE), known, paths=tmp_path / "a.nii.gz")
    assert not list(tmp_path.iterdir())


def test_a_training_volume_is_refused_too(known):
    own, training = (to_nibabel(Volume(200 * volume + 100, np.eye(4))) for volume in (blobs(1, 5)[0], blobs(3, 0)[1]))
    check = copy_check_with(known, own, tiny_data())
    (copied, found), (passed, _) = check.judge(training), check.judge(to_nibabel(Volume(blobs(1, 9)[0], np.eye(4))))
    assert copied and not passed
    assert found["similarity"] > 0.99 > found["patient_similarity"]
    assert "is a copy (similarity 1.000, threshold 0.990)" in f"it {check.reason(found)}"

"""Anonymized volumes: generate a volume from a real case's mask, and record its similarity to that case and to all
training volumes.

The mask is the patient's, and reveals something of the patient (docs/evaluation.md, re-identification); edit or deform
it where that matters. Images are compared, not masks: `CopyCheck`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evaluation.data.model_units import in_model_units
from pipelines import Check, GenerationRecord, MaskLike, MedVolumePipeline, Rejection
from pipelines.rejection import Attempt
from volumes.description import DataDescription

from .fingerprints import CopyCheck, check_unseen_subjects


def anonymized(
    pipe: MedVolumePipeline,
    mask: MaskLike,
    image: Any,
    known: CopyCheck,
    *,
    seed: int = 0,
    most: int = 10,
    **settings: Any,
) -> tuple[Any, Mapping[str, Any]]:
    """Generate a volume from a real case's mask alone that is a copy neither of that case nor of a training volume.

    Args:
        mask: of the case.
        image: of the case, in file units: a path or a NIfTI image, or a dict of them for several channels. It is
            compared, and sets the box that is generated, if the training cut its cases to one (`data.crop`). It does
            not condition the volume.
        known: fingerprints of the training volumes, with the threshold that real patients set
            (`python -m evaluation.copies.fingerprints`); the case is added to them.
        seed: of the first attempt; it rises by one with each attempt.
        most: maximum number of attempts.
        settings: further arguments of the pipeline, such as labels and num_inference_steps.
    Returns: the volume as the pipeline returns it ("nifti"), and its record, with "copy_check": {"threshold",
        "similarity" to the nearest of all, "patient_similarity" to the case}, and "rejected": the attempts that were
        copies.
    Raises: ValueError if every attempt was a copy, for `paths`, if the threshold of `known` was set with training
        volumes of the pipeline, and as `copy_check_with`.
    """
    if "paths" in settings:
        raise ValueError(
            "paths would be written before the comparison: write the returned volume by pipelines.write_synthetic"
        )
    check_unseen_subjects(known, pipe.training_subjects, "known")
    check = copy_check_with(known, image, pipe.data)
    rejection = Rejection([check], most)
    of_box = _box_image(image, pipe.data)

    def sample(_: Sequence[int], seeds: Sequence[int]) -> list[Attempt]:
        generators = [torch.Generator().manual_seed(own_seed) for own_seed in seeds]
        made = pipe(mask=mask, box_image=of_box, generator=generators, **settings)
        return [Attempt(made.volumes[0], GenerationRecord.from_json(made.provenance[0]))]

    (outcome,) = rejection.sample_until_accepted(1, sample, lambda number, rejections: seed + rejections)
    if outcome.accepted is None:
        similarity = max(refusal["similarity"] for refusal in outcome.rejected)
        raise ValueError(
            f"each of {most} volumes from this mask was a copy (similarity up to {similarity:.3f}, threshold "
            f"{known.threshold:.3f}); raise most, or edit the mask"
        )
    return outcome.accepted.image, outcome.accepted.record.to_json()


def copy_check_with(known: CopyCheck, image: Any, data: DataDescription) -> Check:
    """Refuse copies of the training volumes and of one more case, whose `image` is in file units.

    Raises: ValueError for an image with other channels than the model's `data`, and for a model whose training cut its
    volumes to the labels of their masks.
    """
    if data.crop is not None and data.crop.by_mask:
        raise ValueError(
            "this model was trained on the boxes of its masks' labels (data.crop.above: mask), and this check compares "
            "images without their masks: the patient's image would be compared whole, and copies not found; use a "
            "model without data.crop, or one whose data.crop.above is a value"
        )
    patient = CopyCheck.of(
        [in_model_units(image, data, crop=True)], known.crop, block=known.block, flips=known.flips, shift=known.shift
    )
    patient = dataclasses.replace(patient, threshold=known.threshold)

    def judge(generated: Any, in_box: bool = False) -> tuple[bool, dict[str, float]]:
        volume = in_model_units(generated, data, crop=not in_box)
        of_training, of_patient = known.check(volume), patient.check(volume)
        nearest = max(of_training.similarity, of_patient.similarity)
        return of_training.copy or of_patient.copy, {"similarity": nearest, "patient_similarity": of_patient.similarity}

    def reason(record: Mapping[str, Any]) -> str:
        return f"is a copy (similarity {record['similarity']:.3f}, threshold {known.threshold:.3f})"

    return Check("copy_check", judge, reason, {"threshold": known.threshold})


def _box_image(image: Any, data: DataDescription) -> Any:
    """The image of a case whose foreground sets the box of `data.crop`; None if no image does."""
    if data.crop is None or data.crop.channel is None:
        return None
    return image[data.crop.channel] if isinstance(image, Mapping) else image

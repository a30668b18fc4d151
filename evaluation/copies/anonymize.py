"""A real case's mask in, a volume of nobody out, and beside it how similar it is to that case and to all training volumes.

The mask is the patient's own, and gives some of the patient away by itself (docs/evaluation.md, re-identification); edit or
deform it where that matters. What is compared is the image: `copies.CopyCheck`.
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
) -> tuple[Any, dict[str, Any]]:
    """A volume made from a real case's mask alone that is a copy neither of that case nor of a training volume.

    Args:
        mask: of the case.
        image: of the case, in file units: a path or a NIfTI image, or of several channels a dict of them. It is compared and
            nothing else: the pipeline never sees it.
        known: fingerprints of the training volumes, with the threshold that real patients set
            (`python -m evaluation.copies.fingerprints`); the case is added to them.
        seed: of the first attempt, the next ones have the numbers that follow.
        most: attempts.
        settings: further arguments of the pipeline, such as labels and num_inference_steps.
    Returns: what the pipeline returns for the volume ("nifti"), and its record, with "copy_check": {"threshold", "similarity" to
        the nearest of all, "patient_similarity" to the case}, and "rejected": the attempts that were copies.
    Raises: ValueError if every attempt was a copy, for `paths`, and if `known` has its threshold from volumes that the pipeline
        learned from.
    """
    if "paths" in settings:
        raise ValueError(
            "paths would be written before they are compared: write what is returned, by pipelines.write_synthetic"
        )
    check_unseen_subjects(known, pipe.training_subjects, "known")
    check = copy_check_with(known, image, pipe.data)
    rejection = Rejection([check], most)

    def sample(_: Sequence[int], seeds: Sequence[int]) -> list[Attempt]:
        generators = [torch.Generator().manual_seed(own_seed) for own_seed in seeds]
        made = pipe(mask=mask, generator=generators, **settings)
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
    """Refuses copies of the training volumes and of one case more, whose `image` is in file units.

    Raises: ValueError for an image of other channels than the model's `data`.
    """
    own = CopyCheck.of(
        [in_model_units(image, data)], known.crop, block=known.block, flips=known.flips, shift=known.shift
    )
    own = dataclasses.replace(own, threshold=known.threshold)

    def judge(made: Any) -> tuple[bool, dict[str, Any]]:
        volume = in_model_units(made, data)
        of_training, of_patient = known.check(volume), own.check(volume)
        found = {"similarity": max(of_training.similarity, of_patient.similarity)}
        return of_training.copy or of_patient.copy, found | {"patient_similarity": of_patient.similarity}

    def reason(found: Mapping[str, Any]) -> str:
        return f"is a copy (similarity {found['similarity']:.3f}, threshold {known.threshold:.3f})"

    return Check("copy_check", judge, reason, {"threshold": known.threshold})

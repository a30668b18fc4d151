"""Decide what the trainings start from: random weights, shipped ones, or a LoRA of shipped ones."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from files.shipped import WEIGHTS

from .weights import NAME, Weights, find_weights, image_weights

if TYPE_CHECKING:
    from .sizing import Facts

SMALL = 20  # training subjects, below which an autoencoder starts from shipped weights, and a LoRA suffices
FEW = 50  # training subjects, below which a U-Net that fits is fine-tuned
THICK = 2.5  # ratio of voxel sizes, from which the long axis is not folded
NONE, LORA = "none", "lora"


@dataclass(frozen=True)
class Start:
    """What the trainings start from.

    Attributes:
        weights: of the autoencoder; None for random ones.
        unet: whether the U-Net starts from them, too.
        lora: whether only a LoRA of the U-Net is trained, and the autoencoder is used as it is.
        line: what was chosen, why, and what to type to choose otherwise.
    """

    weights: Weights | None = None
    unet: bool = False
    lora: bool = False
    line: str = ""


def choose_start(
    asked: str | None, facts: Facts, *, quick: bool = False, exactly: bool = False, folder: Path = WEIGHTS
) -> Start:
    """Decide what the trainings start from.

    Args:
        asked: "none"; the name of a shipped pipeline, to take the parts that fit; "NAME:lora"; None to propose.
        facts: of the data set.
        quick: a first picture is wanted.
        exactly: the user set the spacing, or to keep it, so volumes are not resampled to that of the weights.
        folder: of the shipped pipelines.

    Raises:
        ValueError: for a name that there is not, and for weights that do not fit.
    """
    name, colon, how = (NAME if asked is None else asked).partition(":")
    if asked == NONE:
        return Start(line="random weights, as asked")
    there = image_weights(folder)
    if asked is not None and (name not in there or (colon and how != LORA)):
        known = ", ".join(f"--from {one}, --from {one}:{LORA}" for one in there)
        raise ValueError(
            f"--from {shlex.quote(asked)}: no shipped weights for images are called so; say {known or '--from none'}"
        )
    subjects = f"{facts.subjects} subjects to train on"
    few = f"{subjects} are few" if facts.subjects < FEW else "--quick leaves little time"
    weights = find_weights(name, folder)
    if weights is None:
        return Start(line=f"random weights: this installation has no shipped ones (weights/ of the clone); {subjects}")
    if max(facts.spacing) >= THICK * min(facts.spacing):
        why = "no shipped weights fit voxels that are much longer than wide"
        if asked:
            raise ValueError(f"--from {asked}: {why}; say --from none, or --spacing X Y Z")
        return Start(line=f"random weights: {why}; {subjects}")
    misfits = weights.misfits(facts.kinds, len(facts.labels), facts.spacing, facts.shapes, exactly)
    for_lora = [*misfits, *(f"it does not know the condition {one}" for one in facts.conditions)]
    if how and for_lora:
        raise ValueError(
            f"--from {asked}: a LoRA needs a U-Net that fits as it is, and {'; '.join(for_lora)}; say --from {name}, "
            "which takes what fits, or --from none"
        )
    paired = "" if misfits else weights.paired(facts.labels)
    if how or (not asked and not quick and not for_lora and facts.subjects < SMALL):
        why = "as asked" if asked else f"{few}, and {name} fits ({weights.described})"
        line = f"{why}: a LoRA of its U-Net is trained, and its autoencoder is used as it is; {paired}"
        return Start(weights, True, True, f"{line}; --from {name} trains all weights, --from none random ones")
    if not misfits and (asked or (not quick and facts.subjects < FEW)):
        why = "as asked" if asked else f"{few}, and {name} fits ({weights.described})"
        line = f"{why}: its decoder and its U-Net are fine-tuned (docs/finetuning.md); {paired}"
        other = "" if for_lora else f"--from {name}:{LORA} trains a LoRA of a megabyte, "
        return Start(weights, True, False, f"{line}; {other}--from none starts from random ones")
    if asked or quick or facts.subjects < SMALL:
        each = ", each channel coded separately" if len(facts.channels) > 1 else ""
        unet = f"the U-Net starts from random ones, as {misfits[0]}" if misfits else "the U-Net starts from random ones"
        line = f"{'as asked' if asked else few}: the autoencoder starts from {name}'s weights{each}; {unet}"
        other = "" if misfits or asked else f"--from {name} starts both from them, "
        return Start(weights, line=f"{line}; {other}--from none starts both from random ones")
    return Start(line=f"random weights: {subjects}; --from {name} takes what fits of shipped ones")

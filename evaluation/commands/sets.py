"""What the commands that compare sets of volumes share: the sets, and the extractors of features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from autoencoder.perceptual import VGG16Features
from evaluation.data.volume_sets import VolumeSet, generated_set, real_set
from evaluation.metrics.features import (
    PLANES,
    EncoderStatistics,
    RandomStatistics,
    SliceStatistics,
)
from evaluation.studies.limits import check_command, check_sets
from pipelines.storage.loading import load_autoencoder
from volumes import load_cases


def load_sets(options: Namespace, command: str) -> tuple[dict[str, VolumeSet], dict[str, str]]:
    """ "training", "test" and "generated" volumes, and the files that were refused with the reason.

    Raises: ValueError for what the command cannot compare (`evaluation.studies.limits`), by the cases' counts before a volume is read, and
    once more by what is left of refused files.
    """
    cases = load_cases(options.data)
    check_command(command, cases, options.data, vars(options))
    sets, skipped = {}, {}
    for name, splits in (("training", ["train"]), ("test", options.unseen)):
        sets[name], refused = real_set(cases, options.data, splits)
        skipped |= refused
    sets["generated"], refused = generated_set([Path(folder) for folder in options.synthetic], cases, options.data)
    check_sets(command, sets, options.data, vars(options))
    return sets, skipped | refused


def load_extractors(options: Namespace, device: torch.device) -> dict[str, nn.Module]:
    """By name: "random", which needs no file, "encoder" with `--vae`, and those of `--extractor`; VGG-16 in three planes.

    Raises: ValueError for an entry that is no NAME=PATH, a name that is taken, and a file that cannot be used.
    """
    extractors: dict[str, nn.Module] = {"random": RandomStatistics()}
    if options.vae:
        extractors["encoder"] = EncoderStatistics(load_autoencoder(options.vae))
    for entry in options.extractor:
        name, _, path = entry.partition("=")
        if not name or not path or any(known.split(" ")[0] == name for known in extractors):
            raise ValueError(
                f"--extractor {entry}: give NAME=PATH, with a name that is not one of {sorted(extractors)}"
            )
        if Path(path).is_dir():
            extractors[name] = EncoderStatistics(load_autoencoder(path))
        else:
            network = VGG16Features(Path(path))
            extractors |= {f"{name} {plane}": SliceStatistics(network, axis) for plane, axis in PLANES.items()}
    return {name: extractor.to(device).eval() for name, extractor in extractors.items()}


def describe_sets(sets: dict[str, VolumeSet], splits: Sequence[str]) -> dict[str, Any]:
    """How many volumes and subjects each set has, which splits the unseen ones are of, and how many masks are known."""
    counts: dict[str, Any] = {
        name: {"volumes": len(part), "subjects": len(set(part.subjects))} for name, part in sets.items()
    }
    counts["test"]["splits"] = list(splits)
    masks = sets["generated"].masks or []
    for name in ("training", "test"):
        counts["generated"][f"of_{name}_masks"] = sum(mask in set(sets[name].names) for mask in masks)
    return counts

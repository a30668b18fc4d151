"""What the commands that compare sets of volumes share: loading the sets, and feature extractors."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import nn

from autoencoder.losses.perceptual import VGG16Features
from evaluation.data.volume_sets import VolumeSet, generated_set, real_set
from evaluation.metrics.features import (
    PLANES,
    EncoderStatistics,
    RandomStatistics,
    SliceStatistics,
)
from evaluation.metrics.scripted import SUFFIXES, load_scripted
from evaluation.studies.limits import check_command, check_sets
from pipelines.storage.loading import load_autoencoder
from volumes import load_cases


def load_sets(options: Namespace, command: str) -> tuple[dict[str, VolumeSet], dict[str, str]]:
    """Load the sets "training", "test" and "generated". Returns them, and the reason for each file that was refused.

    Raises: ValueError for sets that the command cannot compare (`evaluation.studies.limits`): by the number of cases,
    before a volume is read, and again without the refused files.
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
    """Load feature extractors by name: "random", which needs no file; "encoder" with `--vae`; and those of
    `--extractor`, 2-D networks in three planes.

    Raises: ValueError for an entry that is not NAME=PATH, a name that is taken, and a file that cannot be used.
    """
    extractors: dict[str, nn.Module] = {"random": RandomStatistics()}
    if options.vae:
        extractors["encoder"] = EncoderStatistics(load_autoencoder(options.vae))
    for entry in options.extractor:
        name, _, path = entry.partition("=")
        if not name or not path or any(taken.split(" ")[0] == name for taken in extractors):
            raise ValueError(
                f"--extractor {entry}: give NAME=PATH, with a name that is not one of {sorted(extractors)}"
            )
        if Path(path).is_dir():
            extractors[name] = EncoderStatistics(load_autoencoder(path))
        elif Path(path).suffix in SUFFIXES:
            extractors |= {f"{name}{plane}": one for plane, one in load_scripted(Path(path)).items()}
        else:
            network = VGG16Features(Path(path))
            extractors |= {f"{name} {plane}": SliceStatistics(network, axis) for plane, axis in PLANES.items()}
    return {name: extractor.to(device).eval() for name, extractor in extractors.items()}


def describe_sets(sets: dict[str, VolumeSet], splits: Sequence[str]) -> dict[str, dict[str, int | list[str]]]:
    """Count the volumes and subjects of each set. Adds the splits of the test set, and how many generated volumes come
    from the masks of each real set."""
    counts: dict[str, dict[str, int | list[str]]] = {
        name: {"volumes": len(volumes), "subjects": len(set(volumes.subjects))} for name, volumes in sets.items()
    }
    counts["test"]["splits"] = list(splits)
    masks = sets["generated"].masks or []
    for name in ("training", "test"):
        names = set(sets[name].names)
        counts["generated"][f"of_{name}_masks"] = sum(mask in names for mask in masks)
    return counts

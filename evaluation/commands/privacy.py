"""`evaluate.py privacy`: whether generated volumes reveal which subjects the generator was trained on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace

from autoencoder.weights import find_folder
from cli.live_bar import LiveBar
from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.nearest import (
    Space,
    common_crop,
    feature_space,
    latent_space,
)
from evaluation.studies.membership_losses import DRAWS, TIMES, denoising_losses
from evaluation.studies.privacy import pairs_figure, privacy_report
from files.atomic import atomic_file
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from volumes import VolumeDataset, load_cases

from .common import write_study
from .sets import describe_sets, load_extractors, load_sets

NAME = "privacy"
Losses = tuple[np.ndarray, np.ndarray]  # on the training set and on the test set, in the order of the sets


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Compare the sets in each space, in float32. Writes the closest pairs as PNG beside the report."""
    start = time.perf_counter()
    named = {"vae": options.vae or options.pipeline, "pipeline": options.pipeline}
    options = with_autoencoder(options)
    sets, skipped = load_sets(options, NAME)
    losses = measure_losses(options, sets, device) if options.pipeline else None
    spaces = make_spaces(options, sets, device)
    result = compare(options, sets, spaces, losses)
    study = {
        "volumes": describe_sets(sets, options.unseen),
        "pictures": write_pictures(options, sets, spaces, result["spaces"]) if options.pairs else {},
        "protocol": {
            "crop": list(next(iter(spaces.values())).crop),
            "flips": options.flips,
            "shift": {name: space.shift for name, space in spaces.items()},
            "losses": None if losses is None else {"times": list(TIMES), "draws": DRAWS},
        },
        "skipped": skipped,
        **named,
        "precision": "float32",
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, {**result, **study})
    print_summary(result)
    return report


def with_autoencoder(options: Namespace) -> Namespace:
    """Return the options with the autoencoder of `--pipeline` where `--vae` is missing, and without latents where
    neither is given.

    Raises: ValueError if no space is left.
    """
    options = options.clone()
    if options.pipeline and not options.vae:
        folder = find_folder(options.pipeline)
        options.vae = folder or MedVolumePipeline.download(options.pipeline, use_safetensors=True)
    if "latent" in options.spaces and not options.vae:
        options.spaces = [name for name in options.spaces if name != "latent"]
        if not options.spaces:
            raise ValueError(
                "--spaces latent: latents cannot be compared without --vae or --pipeline; give one of them"
            )
        print("note: latents are not compared, as neither --vae nor --pipeline is given")
    return options


def make_spaces(options: Namespace, sets: Mapping[str, VolumeSet], device: torch.device) -> dict[str, Space]:
    """Make the spaces of `--spaces`, on one crop. Features come from every 3-D extractor, as "features NAME"."""
    shapes = [shape for volume_set in sets.values() for shape in volume_set.shapes]
    crop = common_crop(shapes, tuple(options.crop) if options.crop else None)
    flips = tuple(options.flips)
    spaces: dict[str, Space] = {}
    if "image" in options.spaces:
        spaces["image"] = Space(crop, flips, options.shift, device=device)
    if "latent" in options.spaces:
        spaces["latent"] = latent_space(load_autoencoder(options.vae).to(device), crop, flips=flips)  # pyright: ignore[reportArgumentType]
    if "features" in options.spaces:
        for name, extractor in load_extractors(options, device).items():
            references = sets["training"].volumes
            spaces[f"features {name}"] = feature_space(extractor, references, crop, flips=flips, device=device)
    return spaces


def measure_losses(options: Namespace, sets: Mapping[str, VolumeSet], device: torch.device) -> Losses:
    """Measure the losses of the generator on the training set and on the test set."""
    pipe = MedVolumePipeline.from_pretrained(options.pipeline).to(device)
    cases = {case.name: case for case in load_cases(options.data)}

    def losses(name: str) -> np.ndarray:
        dataset = VolumeDataset([cases[case] for case in sets[name].names], options.data)
        if dataset.skipped:
            raise ValueError(
                f"{dataset.skipped[0]}: has an image but its mask cannot be used; the losses need one, so repair it"
            )
        with LiveBar(total=len(dataset), unit="volume", disable=None, desc=f"losses on {name} volumes") as progress:
            return denoising_losses(
                pipe, dataset, times=TIMES, draws=DRAWS, seed=options.seed, on_volume=progress.update
            )

    return losses("training"), losses("test")


def compare(
    options: Namespace, sets: Mapping[str, VolumeSet], spaces: Mapping[str, Space], losses: Losses | None
) -> Mapping[str, Any]:
    """Return `privacy_report` of the sets, with a progress bar over the pairs of volumes."""
    training, test, generated = sets["training"], sets["test"], sets["generated"]
    pairs = len(generated) * len(training) + len(test) * len(training) + len(generated) * len(test)
    with LiveBar(total=pairs * len(spaces), unit="pair", disable=None, desc="comparing") as progress:
        return privacy_report(
            training,
            test,
            generated,
            spaces,
            stand_ins=True,
            losses=losses,
            alpha=options.alpha,
            pairs=options.pairs,
            seed=options.seed,
            on_pairs=progress.update,
        )


def write_pictures(
    options: Namespace, sets: Mapping[str, VolumeSet], spaces: Mapping[str, Space], results: Mapping[str, Any]
) -> dict[str, str]:
    """Write the closest pairs of each space as PNG beside the report. Returns the file names by space."""
    output = Path(options.output)
    pictures = {}
    for name, space in spaces.items():
        path = output.with_name(f"{output.stem}_{name.replace(' ', '_')}.png")
        figure = pairs_figure(results[name].get("closest", []), sets["generated"], sets["training"], space)
        with atomic_file(path) as unfinished:
            figure.savefig(unfinished, dpi=110)
        pictures[name] = path.name
    return pictures


def print_summary(result: Mapping[str, Any]) -> None:
    """Print the memorized share and the membership attack of each space."""
    for name, space in result["spaces"].items():
        memory = space["memorized"]["similarity"]
        low, high = memory["interval_drawn"]
        print(
            f"{name}: {memory['fraction']:.1%} of generated volumes are memorized ({low:.1%} to {high:.1%}); by the "
            f"same threshold, {memory['false_positives']['fraction']:.1%} of held-out real volumes are. Membership AUC "
            f"{space['membership']['auc']:.3f}"
        )
    if "loss_membership" in result:
        print(f"membership by the generator's losses: AUC {result['loss_membership']['auc']:.3f}")

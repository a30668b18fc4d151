"""`evaluate.py privacy`: whether generated volumes give away whom the generator learned from."""

import dataclasses
import time
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
from evaluation.report import provenance, write_report
from evaluation.studies.membership_losses import DRAWS, TIMES, denoising_losses
from evaluation.studies.privacy import pairs_figure, privacy_report
from files.atomic import atomic_file
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from volumes import VolumeDataset, load_cases

from .sets import describe_sets, load_extractors, load_sets

NAME = "privacy"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Compare the sets in each space, in float32; writes the closest pairs as PNG beside the report."""
    start, vae = time.perf_counter(), options.vae
    if options.pipeline and not vae:
        options.vae = find_folder(options.pipeline) or MedVolumePipeline.download(
            options.pipeline, use_safetensors=True
        )
    if "latent" in options.spaces and not options.vae:
        options.spaces = [name for name in options.spaces if name != "latent"]
        if not options.spaces:
            raise ValueError("--spaces latent: there are no latents to compare without --vae or --pipeline; give one")
        print("note: without --vae or --pipeline there are no latents to compare")
    sets, skipped = load_sets(options, NAME)
    losses, losses_protocol = _losses(options, sets, device) if options.pipeline else (None, None)
    spaces = make_spaces(options, sets, device)
    training, unseen, generated = (sets[name] for name in ("training", "test", "generated"))
    compared = len(generated) * len(training) + len(unseen) * len(training) + len(generated) * len(unseen)
    with LiveBar(total=compared * len(spaces), unit="pair", disable=None, desc="comparing") as progress:
        found = privacy_report(
            training,
            unseen,
            generated,
            spaces,
            stand_ins=True,
            losses=losses,
            alpha=options.alpha,
            pairs=options.pairs,
            seed=options.seed,
            on_pairs=progress.update,
        )
    output = Path(options.output)
    pictures = {}
    for name, space in spaces.items() if options.pairs else ():
        path = output.with_name(f"{output.stem}_{name.replace(' ', '_')}.png")
        with atomic_file(path) as unfinished:
            pairs_figure(found["spaces"][name].get("closest", []), generated, training, space).savefig(
                unfinished, dpi=110
            )
        pictures[name] = path.name
    report = {
        "evaluation": NAME,
        **found,
        "volumes": describe_sets(sets, options.unseen),
        "pictures": pictures,
        "protocol": {
            "crop": list(next(iter(spaces.values())).crop),
            "flips": options.flips,
            "shift": {name: space.shift for name, space in spaces.items()},
            "losses": losses_protocol,
        },
        "skipped": skipped,
        "synthetic": options.synthetic,
        "vae": vae or options.pipeline,
        "pipeline": options.pipeline,
        "precision": "float32",
        "seconds": round(time.perf_counter() - start, 2),
        "data": dataclasses.asdict(options.data),
        **provenance(),
    }
    write_report(output, report)
    for name, of_space in report["spaces"].items():
        memory = of_space["memorized"]["similarity"]
        low, high = memory["interval_drawn"]
        print(
            f"{name}: {memory['fraction']:.1%} of generated volumes are memorized ({low:.1%} to {high:.1%}), "
            f"{memory['false_positives']['fraction']:.1%} of unseen real ones would be; membership AUC "
            f"{of_space['membership']['auc']:.3f}"
        )
    if "loss_membership" in report:
        print(f"membership by the generator's losses: AUC {report['loss_membership']['auc']:.3f}")
    print(f"report: {options.output}")
    return report


def make_spaces(options: Namespace, sets: dict[str, VolumeSet], device: torch.device) -> dict[str, Space]:
    """The spaces of `--spaces`, on one crop; features by every 3-D extractor there is, as "features NAME"."""
    every = [volume for part in sets.values() for volume in part.volumes]
    crop = common_crop(every, tuple(options.crop) if options.crop else None)
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


def _losses(
    options: Namespace, sets: dict[str, VolumeSet], device: torch.device
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, Any]]:
    """Losses of the generator on training and on unseen volumes, in the order of the sets, and how they were taken."""
    pipe = MedVolumePipeline.from_pretrained(options.pipeline).to(device)
    cases = {case.name: case for case in load_cases(options.data)}
    found = []
    for name in ("training", "test"):
        dataset = VolumeDataset([cases[one] for one in sets[name].names], options.data)
        if dataset.skipped:
            raise ValueError(f"{dataset.skipped[0]}: has an image but no usable mask, which the losses need; repair it")
        with LiveBar(total=len(dataset), unit="volume", disable=None, desc=f"losses on {name} volumes") as progress:
            found.append(denoising_losses(pipe, dataset, seed=options.seed, on_volume=progress.update))
    return (found[0], found[1]), {"times": list(TIMES), "draws": DRAWS}

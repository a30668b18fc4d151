"""Train tiny models on phantoms with lesions of 2 to 6 voxels, and measure how well generated lesions are seen.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.small_lesions --output docs/small_lesions.json --work output/lesions

A segmenter is trained on real phantoms. It is then tested on other real phantoms, on their reconstructions by
autoencoders that were trained with and without `loss_weights`, and on volumes that were generated from their masks, by
models that were trained with and without `loss_weights`, with and without `guidance_without`, and with
`partial_masks`. Autoencoders of one kind have the same steps and seeds, and so have diffusion models.

For each lesion, `dice` is that of the segmenter's lesion voxels within two voxels of it, and `contrast` is how far its
mean differs from that of the organ around it, as a fraction of the same on the real phantom. Partial masks know one
half of the volume; lesions in that half are counted. About a quarter of an hour on one free core; models are kept in
--work.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NotRequired, TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="trained models, kept for the next run")
    parser.add_argument("--vae_steps", type=Number(PositiveInt), default=1000, help="of each autoencoder (1000)")
    parser.add_argument("--steps", type=Number(PositiveInt), default=1000, help="of each diffusion model (1000)")
    parser.add_argument("--iterations", type=Number(PositiveInt), default=800, help="of the segmenter (800)")
    parser.add_argument("--count", type=Number(PositiveInt), default=96, help="phantoms of the test (96)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from scipy import ndimage
from torch import Tensor, nn

import train_ldm
import train_vae
from autoencoder import VolumeAutoencoder
from evaluation.networks.fit import brightened, fit
from evaluation.networks.segmenter import volume_dice
from evaluation.report import Provenance, check_report, provenance, write_report
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from volumes import PHANTOM_CLASSES, PHANTOM_LABELS, UNKNOWN, Volume, make_phantom
from volumes.phantom import LESION, ORGAN

SIDE, TOP = 16, 1100.0  # voxels, and the window's upper end
LESIONS = {"lesion_voxels": (2, 6), "lesions": 1}
TRAINING, SEGMENTED, TESTED = 0, 10_000, 20_000  # numbers of the first phantoms
COUNT, BATCH, SAMPLING_STEPS = 200, 8, 20
LESION_WEIGHT = 3.0  # in the segmenter's loss
WIDTHS = (12, 12)  # channels of the segmenter's layers
AROUND = 5  # voxels along each side of the cube whose mean the segmenter sees beside each voxel
NEAR = 2  # voxels around a lesion in which the segmenter's lesion voxels count
LEAST = 0.95  # Dice of the segmenter on each kind of real lesion, without which it can judge no others
LABELS = len(PHANTOM_LABELS)

DATA = (
    f"{{phantom: {{count: {COUNT}, shape: [{SIDE}, {SIDE}, {SIDE}], seed: {TRAINING}, lesion_voxels: [2, 6], "
    "lesions: 1}, validation_fraction: 0.05, intensity: {kind: window, low: 0, high: 1100}, "
    "classes: {class: [dark lesion, bright lesion]}}"
)
QUIET = ["--loop.preview_every=0", "--loop.checkpoint_every=0", "--loop.workers=0", "--loop.trackers=[]"]
AUTOENCODERS = {  # by stride: 4 is the default
    2: "{class: autoencoder.AutoencoderKL3D, channels: [32], strides: [], encoder_blocks: [1], decoder_blocks: [1]}",
    4: "{class: autoencoder.AutoencoderKL3D, channels: [32, 64], encoder_blocks: [1, 1], decoder_blocks: [1, 1]}",
}
UNET = (
    "class: diffusion.LatentUNet3D, channels: [24, 48], head_dim: 24, blocks: [1, 1], attention: [false, true], "
    "mask_width: 32, objective: rectified_flow"
)
WEIGHTS = {"vae": "{lesion: 30}", "ldm": "{lesion: 100}"}
MODELS = {"plain": ("{}", ""), "weighted": (WEIGHTS["ldm"], ""), "partial": (WEIGHTS["ldm"], ", partial_masks: 0.5")}
WITHOUT = (1.0, 2.0)  # scales of the guidance away from the mask without its lesions


class Phantoms(TypedDict):
    """Images (N, 1, X, Y, Z) in [0, 1], label indices (N, X, Y, Z), and the name of the lesions' class of each."""

    images: Tensor
    labels: Tensor
    classes: list[str]


class OfSize(TypedDict):
    """Means over the lesions of one size."""

    lesions: int
    dice: float
    contrast: float


class Figures(TypedDict):
    """What the segmenter sees.

    `labels` is the Dice of whole volumes by label, `kinds` that of lesions by class; `by_voxels` is by lesion size.
    """

    dice: float
    contrast: float
    labels: dict[str, float]
    kinds: dict[str, float]
    by_voxels: dict[str, OfSize]


class Report(Provenance):
    """The JSON file. The figures are by set of volumes: `real` has the set "real" alone."""

    real: dict[str, Figures]
    autoencoders: NotRequired[dict[str, Figures]]
    generated: NotRequired[dict[str, Figures]]
    steps: dict[str, int]
    loss_weights: dict[str, str]
    side: int
    test_phantoms: int
    load: float


def phantoms(first: int, count: int) -> Phantoms:
    """Draw phantoms."""
    drawn = [make_phantom(first + number, (SIDE, SIDE, SIDE), **LESIONS) for number in range(count)]
    return {
        "images": torch.from_numpy(np.stack([image.array for image, _, _ in drawn]) / TOP).float().clamp(0, 1),
        "labels": torch.from_numpy(np.stack([mask.array[0] for _, mask, _ in drawn])),
        "classes": [PHANTOM_CLASSES[kind] for _, _, kind in drawn],
    }


class Segmenter(nn.Module):
    """Convolutions without strides, which map images (N, 1, X, Y, Z) in [0, 1] to scores (N, LABELS, X, Y, Z).

    The segmenter of `evaluate.py` sees volumes at half their resolution first, and found half of these lesions on real
    phantoms. With one score for both kinds of lesions, this one learned dark lesions, whose contrast is twice that of
    bright ones, and never bright ones. So `kinds` has a score for each kind, in the order of `PHANTOM_CLASSES` after
    those of the other labels.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = list[nn.Module]()
        for before, width in pairwise((2, *WIDTHS)):
            layers += [nn.Conv3d(before, width, 3, padding=1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(WIDTHS[-1], LESION + len(PHANTOM_CLASSES), 1))

    def kinds(self, images: Tensor) -> Tensor:
        """Return the scores of the labels, (N, LESION + kinds of lesions, X, Y, Z)."""
        around = F.avg_pool3d(images, AROUND, 1, AROUND // 2, count_include_pad=False)
        return self.layers(torch.cat([4 * images - 2, 4 * (images - around)], 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, with the higher one of the kinds for lesions."""
        scores = self.kinds(images)
        return torch.cat([scores[:, :LESION], scores[:, LESION:].amax(1, keepdim=True)], 1)


def train_segmenter(learned: Phantoms, iterations: int) -> nn.Module:
    """Train a segmenter."""
    torch.manual_seed(0)
    network = Segmenter()
    weight = torch.ones(LESION + len(PHANTOM_CLASSES))
    weight[LESION:] = LESION_WEIGHT
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, weight=weight)
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([PHANTOM_CLASSES.index(name) for name in learned["classes"]])
    labels = learned["labels"].long()
    labels = torch.where(labels == LESION, LESION + kind[:, None, None, None], labels)

    def batch_loss() -> Tensor:
        chosen = torch.randint(0, len(labels), (BATCH,), generator=generator)
        batch = brightened(learned["images"][chosen], generator)
        batch = batch + 0.01 * torch.randn(batch.shape, generator=generator)
        return criterion(network.kinds(batch), labels[chosen][:, None])

    fit(network, batch_loss, iterations=iterations, learning_rate=5e-3, weight_decay=1e-4)
    return network.eval()


def lesions(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each lesion of a label map (X, Y, Z): its voxels and those near it, both bool (X, Y, Z)."""
    around = np.ones((3, 3, 3), bool)
    components, count = ndimage.label(labels == LESION, around)  # pyright: ignore[reportGeneralTypeIssues]
    found = []
    for number in range(1, count + 1):
        voxels = components == number
        found.append((voxels, ndimage.binary_dilation(voxels, around, iterations=NEAR)))
    return found


def contrast(image: np.ndarray, labels: np.ndarray, voxels: np.ndarray, near: np.ndarray) -> float:
    """Return by how much a lesion is brighter than the organ around it."""
    return float(image[voxels].mean() - image[near & (labels == ORGAN)].mean())


@torch.inference_mode()
def measure(segmenter: nn.Module, images: Tensor, real: Phantoms, known: np.ndarray | None = None) -> Figures:
    """Measure images (N, 1, X, Y, Z) of the masks of real phantoms.

    Args:
        known: bool (X, Y, Z), where the mask was given; only lesions in it count.
    """
    predicted = torch.cat([segmenter(part).argmax(1) for part in images.split(BATCH)]).numpy()
    rows: list[tuple[int, float, float]] = []
    kinds: dict[str, list[float]] = {name: [] for name in sorted(set(real["classes"]))}
    arrays = images[:, 0].numpy(), real["labels"].numpy(), predicted == LESION, real["images"][:, 0].numpy()
    for image, labels, shown, original, kind in zip(*arrays, real["classes"], strict=True):
        for voxels, near in lesions(labels):
            if known is not None and not known[near].all():
                continue
            hit, both = (shown & voxels).sum(), (shown & near).sum() + voxels.sum()
            share = contrast(image, labels, voxels, near) / contrast(original, labels, voxels, near)
            rows.append((int(voxels.sum()), float(2 * hit / both), share))
            kinds[kind].append(rows[-1][1])
    table = np.array(rows)
    whole = volume_dice(segmenter, images, real["labels"], LABELS) if known is None else []
    return {
        "dice": float(table[:, 1].mean()),
        "contrast": float(np.median(table[:, 2])),
        "labels": {PHANTOM_LABELS[label]: float(one.nanmean()) for label, one in enumerate(whole, 1)},
        "kinds": {name: float(np.mean(found)) for name, found in kinds.items() if found},
        "by_voxels": {
            str(int(size)): {
                "lesions": int((table[:, 0] == size).sum()),
                "dice": float(table[table[:, 0] == size, 1].mean()),
                "contrast": float(np.median(table[table[:, 0] == size, 2])),
            }
            for size in np.unique(table[:, 0])
        },
    }


def train(script: ModuleType, output: Path, result: str, *args: str) -> Path:
    """Train a model unless it is there. Returns its folder."""
    folder = output / result
    if not folder.is_dir():
        script.main([f"--output={output}", f"--data={DATA}", *QUIET, *args])
    return folder


def train_autoencoder(work: Path, stride: int, weighted: bool, steps: int) -> Path:
    """Train an autoencoder, with or without weights for lesions."""
    return train(
        train_vae,
        work / f"vae_{stride}_{'weighted' if weighted else 'plain'}",
        "vae",
        f"--model={AUTOENCODERS[stride]}",
        f"--crops={{shape: [{SIDE}, {SIDE}, {SIDE}], flip_axes: [0]}}",
        "--losses={l1: 0.25, mse: 8.0, gradient: 0.25}",
        *([f"--loss_weights={WEIGHTS['vae']}"] if weighted else []),
        "--optimizer={learning_rate: 2e-3, warmup_steps: 20}",
        f"--loop.max_steps={steps}",
        "--loop.batch_size=4",
        "--loop.ema_decay=0.99",
        "--loop.validate_every=200",
    )


def train_model(work: Path, vae: Path, name: str, steps: int) -> Path:
    """Train a diffusion model of `MODELS`."""
    weights, extra = MODELS[name]
    return train(
        train_ldm,
        work / f"ldm_{name}",
        "pipeline",
        f"--vae={vae}",
        f"--model={{{UNET}{extra}}}",
        f"--loss_weights={weights}",
        "--cache={versions: 4, flip_axes: [0], shift: true}",
        "--optimizer={learning_rate: 1e-3, warmup_steps: 20}",
        f"--loop.max_steps={steps}",
        f"--loop.batch_size={BATCH}",
        "--loop.ema_decay=0.995",
        "--loop.validate_every=400",
    )


@torch.inference_mode()
def reconstructed(vae: VolumeAutoencoder, images: Tensor) -> Tensor:
    """Encode and decode images (N, 1, X, Y, Z) in [0, 1]."""
    parts = [vae(part * 2 - 1, return_dict=False)[0] for part in images.split(BATCH)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def generated(pipe: MedVolumePipeline, real: Phantoms, scale: float = 1.0, known: np.ndarray | None = None) -> Tensor:
    """Generate a volume from the mask and the class of each phantom, with the same noise for all models.

    Args:
        known: bool (X, Y, Z), False where the label is unknown.
    """
    masks = real["labels"].numpy()
    masks = masks if known is None else np.where(known, masks, np.int16(UNKNOWN))
    volumes = pipe(
        [Volume(mask[None], np.array(pipe.data.affine)) for mask in masks],
        classes=[{"class": one} for one in real["classes"]],
        num_inference_steps=SAMPLING_STEPS,
        guidance_without={"lesion": "organ"},
        without_scale=scale,
        generator=[torch.Generator().manual_seed(number) for number in range(len(masks))],
        output_type="pt",
        batch_size=16,
    ).volumes
    return torch.stack(volumes) / TOP


def main(args: Sequence[str] | None = None) -> None:
    """Train and measure, and write the report after each part."""
    options = parse(args)
    check_report(options.output)
    report: dict[str, object] = {
        "steps": {"autoencoder": options.vae_steps, "diffusion": options.steps, "sampling": SAMPLING_STEPS},
        "loss_weights": WEIGHTS,
        "side": SIDE,
        "test_phantoms": options.count,
        "load": os.getloadavg()[0],
        **provenance(),
    }

    def note(part: str, figures: Mapping[str, Figures]) -> None:
        report[part] = dict(figures)
        for name, one in list(figures.items())[-1:]:
            print(f"{part} {name}: dice {one['dice']:.4f}, contrast {one['contrast']:.3f}", flush=True)
        write_report(options.output, report)

    learned, real = phantoms(SEGMENTED, COUNT), phantoms(TESTED, options.count)
    segmenter = train_segmenter(learned, options.iterations)
    yardstick = measure(segmenter, real["images"], real)
    note("real", {"real": yardstick})
    if min(yardstick["kinds"].values()) < LEAST:
        raise ValueError(f"the segmenter's Dice on real phantoms is {yardstick['kinds']}: raise --iterations")
    coded: dict[str, Figures] = {}

    def code(stride: int) -> None:
        for weighted in (False, True):
            vae = load_autoencoder(train_autoencoder(options.work, stride, weighted, options.vae_steps))
            name = f"stride {stride}, {'weighted' if weighted else 'plain'}"
            coded[name] = measure(segmenter, reconstructed(vae, real["images"]), real)
            note("autoencoders", coded)

    code(2)
    half = np.zeros((SIDE, SIDE, SIDE), bool)
    half[: SIDE // 2] = True
    vae, found = options.work / "vae_2_weighted" / "vae", {}
    for name in MODELS:
        pipe = MedVolumePipeline.from_pretrained(train_model(options.work, vae, name, options.steps))
        pipe.set_progress_bar_config(disable=True)
        for scale in WITHOUT if name != "partial" else WITHOUT[:1]:
            guided = f", without its lesions {scale:g}" if scale != 1 else ""
            found[name + guided] = measure(segmenter, generated(pipe, real, scale), real)
            note("generated", found)
        if name == "partial":
            found["partial, half a mask"] = measure(segmenter, generated(pipe, real, known=half), real, half)
            note("generated", found)
    code(4)

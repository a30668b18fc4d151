"""Propose patches, models, batches and steps, from the volumes, the number of subjects and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .machine import STARTUP, Machine, autoencoder_flops, unet_flops
from .starts import SMALL, THICK, Start
from .weights import Weights

Settings = dict[str, Any]  # of a section, as YAML has them

LEAST_CELLS = 3  # latent voxels of a patch along an axis
PATCH_VOXELS = {"quick": 40_000, "cpu": 70_000, "gpu": 2_200_000}  # of a patch: 34^3, 41^3, 130^3
VOLUME_VOXELS = {"quick": 600_000, "cpu": 1_500_000, "gpu": 17_000_000}  # of a volume: 84^3, 114^3, 257^3
BIG_GPU = 20 * 2**30  # bytes, for which the gpu's figures hold; others in proportion
PADDED = 75  # percentile of the sizes that a batch of volumes of several sizes is padded to
SHIFT_VOXELS = 32**3  # latent voxels above which timesteps are shifted: the base size of MAISI's rectified flow
LONG = 0.5  # of the steps, after which the preview is drawn
PASSES = {"vae": 40, "ldm": 180}  # patches, or latents, of each volume in a training on a CPU
GPU_PASSES = 20  # times as many on a GPU, whose models are larger
STEPS = {"vae": (600, 20_000), "ldm": (1_000, 40_000)}  # fewest and most on a CPU
QUICK_STEPS = {"vae": (60, 400), "ldm": (120, 1_000)}
QUICK_SECONDS = {"vae": 90.0, "ldm": 180.0}  # of the steps, as estimated
SIDED = ("left", "right", "links", "rechts")


@dataclass(frozen=True)
class Facts:
    """What sizes depend on.

    Attributes:
        channels: names.
        kinds: of the channels' intensity scaling.
        labels: names of the masks' labels; empty without masks.
        shapes: (n, 3) voxels as the model sees them.
        spacing: mm as the model sees it.
        subjects, volumes: to train on.
        conditions: names of classes and numbers.
    """

    channels: Sequence[str]
    kinds: Sequence[str]
    labels: Sequence[str]
    shapes: np.ndarray
    spacing: Sequence[float]
    subjects: int
    volumes: int
    conditions: Sequence[str] = ()


@dataclass
class Plan:
    """Proposed sections of vae.yaml and ldm.yaml, with the reason of each value.

    Attributes:
        vae, ldm: {section: settings}.
        start: what they start from. With a LoRA, the autoencoder is not trained.
        why: {"vae.crops": reason, ...}.
        seconds: {"vae": estimate, "ldm": estimate}; None if nothing was measured on such a machine.
        unsure: what the user should look at.
    """

    vae: Settings = field(default_factory=dict)
    ldm: Settings = field(default_factory=dict)
    start: Start = field(default_factory=Start)
    why: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float | None] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)

    @property
    def trainings(self) -> list[tuple[str, Settings]]:
        """The trainings to run, in their order: ("vae", its sections), unless a LoRA is trained, and ("ldm", its)."""
        return [*([] if self.start.lora else [("vae", self.vae)]), ("ldm", self.ldm)]


def volume_limit(machine: Machine, quick: bool) -> int:
    """Return the most voxels of a volume that this machine can learn whole latents of in sensible time."""
    return int(VOLUME_VOXELS[_kind(machine, quick)] * _scale(machine))


def propose(facts: Facts, machine: Machine, start: Start, *, quick: bool, mirror: bool = True) -> Plan:
    """Propose both trainings.

    Args:
        facts: of the data set.
        machine: that trains.
        start: what they start from.
        quick: a tiny model and few steps, for a first picture.
        mirror: whether patches may be mirrored from left to right.
    """
    plan = Plan(start=start)
    patch_size = [1 if ratio >= THICK else 2 for ratio in np.array(facts.spacing) / min(facts.spacing)]
    stride = [2 * size for size in patch_size]
    if start.weights is not None:
        plan.vae["init_from"], plan.why["vae.init_from"] = start.weights.part("vae"), start.line
    model = _autoencoder(plan, facts, machine, start.weights, patch_size, quick)
    sided = [name for name in (*facts.labels, *facts.conditions) if any(word in name.lower() for word in SIDED)]
    flips = [0] if mirror and not sided else []
    if flips:
        plan.unsure.append("volumes are mirrored from left to right in training; say --no_mirror if their sides differ")
    plan.why["flip"] = (
        f"no mirroring: {sided[0]} has a side" if sided
        else "mirrored from left to right; wrong if the sides differ, as in the abdomen" if flips
        else "no mirroring, as asked"
    )  # fmt: skip
    patch = patch_shape(facts.shapes, stride, int(PATCH_VOXELS[_kind(machine, quick)] * _scale(machine)))
    plan.vae["crops"] = {"shape": patch, "flip_axes": flips}
    smallest = facts.shapes.min(axis=0)
    size = " x ".join(map(str, smallest))
    plan.why["vae.crops"] = f"voxels of a patch: a multiple of the stride {stride}, within the smallest volume ({size})"
    if padded := [axis for axis in range(3) if smallest[axis] < patch[axis]]:
        axes = " and ".join("xyz"[axis] for axis in padded)
        plan.why["vae.crops"] = (
            f"voxels of a patch: a multiple of the stride {stride}, of {LEAST_CELLS} latent voxels at least; the "
            f"smallest volume ({size}) is padded along {axes}"
        )
        share = 1 - np.prod(np.minimum(smallest, patch)) / np.prod(patch)
        plan.unsure.append(
            f"the smallest volume has {size} voxels, fewer than a patch along {axes}: {share:.0%} of its patch is "
            "padding, which teaches nothing; give larger volumes, or none so thin"
        )
    plan.vae["losses"] = {"l1": 0.25, "mse": 8.0, "gradient": 0.25, "kl": 1e-4}
    _vae_training(plan, facts, machine, model, patch, quick)
    _unet(plan, facts, machine, start, stride, model["latent_channels"], flips, quick)
    return plan


def patch_shape(shapes: np.ndarray, stride: Sequence[int], most: int) -> list[int]:
    """Return the largest patch within all volumes that is a multiple of the stride and has at most so many voxels."""
    least = np.array(stride) * LEAST_CELLS
    steps = np.array(stride)
    patch = np.maximum(shapes.min(axis=0) // steps * steps, least)
    while patch.prod() > most and (patch > least).any():
        axis = int(np.argmax(np.where(patch > least, patch, 0)))
        patch[axis] -= steps[axis]
    return patch.tolist()


def _kind(machine: Machine, quick: bool) -> str:
    return "gpu" if machine.accelerator else "quick" if quick else "cpu"


def _scale(machine: Machine) -> float:
    return min(machine.accelerator_memory / BIG_GPU, 4.0) if machine.accelerator else 1.0


def _autoencoder(
    plan: Plan, facts: Facts, machine: Machine, weights: Weights | None, patch_size: list[int], quick: bool
) -> Settings:
    count = len(facts.channels)
    if weights is not None:
        layers = dict(weights.vae)
        why = "the layers of the shipped weights"
    elif quick:
        layers = {"latent_channels": 4, "channels": [16, 48], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}
        why = "tiny, for a first picture (--quick)"
    elif machine.accelerator:
        layers = {"latent_channels": 4, "channels": [48, 160], "encoder_blocks": [1, 1], "decoder_blocks": [2, 4]}
        why = "for a GPU, as configs/real_sizes"
    else:
        layers = {"latent_channels": 6, "channels": [32, 128], "encoder_blocks": [1, 1], "decoder_blocks": [1, 3]}
        why = "small enough for a CPU, as configs/hippocampus"
    layers["strides"], layers["patch_size"] = [2], patch_size if len(set(patch_size)) > 1 else patch_size[0]
    layers["latent_channels"] *= count
    model: Settings = {"class": "autoencoder.AutoencoderKL3D"}
    if count > 1:
        model |= {"in_channels": count, "out_channels": count, "per_channel": True}
        why += "; each channel is coded separately, so one may be missing, or be generated from another"
    if len(set(patch_size)) > 1:
        why += "; the long axis of the voxels is folded less"
    plan.vae["model"] = model | layers
    plan.why["vae.model"] = why
    return plan.vae["model"]


def _vae_training(plan: Plan, facts: Facts, machine: Machine, model: Settings, patch: list[int], quick: bool) -> None:
    count, batch = len(facts.channels), 4 if machine.accelerator else 2
    size = model["patch_size"]
    flops = count * autoencoder_flops(
        float(np.prod(patch)), model["channels"], model["encoder_blocks"], model["decoder_blocks"],
        size if isinstance(size, list) else [size] * 3, model["latent_channels"] // count,
    )  # fmt: skip
    step = machine.seconds(flops * batch)
    parts = float(np.clip(np.median(facts.shapes.prod(axis=1)) / np.prod(patch), 1, 8))
    _training(plan, "vae", facts, machine, batch, step, PASSES["vae"] * parts, quick)


def _unet(
    plan: Plan, facts: Facts, machine: Machine, start: Start, stride: Sequence[int], latents: int,
    flips: list[int], quick: bool,
) -> None:  # fmt: skip
    cells = float(np.percentile(np.ceil(facts.shapes / np.array(stride)), PADDED, axis=0).prod())
    if quick:
        layers = {"channels": [48, 96], "strides": [2], "blocks": [1, 1], "attention": [False, True], "mask_width": 16}
        why = "tiny, for a first picture (--quick)"
    elif machine.accelerator and cells > 20_000:
        layers = {
            "channels": [128, 256, 512],
            "strides": [2, 2],
            "blocks": [2, 3, 3],
            "attention": [False, False, True],
        }
        layers["mask_width"] = 32
        why = "for a GPU, as configs/real_sizes; attention on the coarsest level only"
    else:
        layers = {"channels": [64, 160], "strides": [2], "blocks": [1, 2], "attention": [False, True], "mask_width": 32}
        why = "as configs/hippocampus"
    if cells / 8 > 3_000 and len(layers["channels"]) == 2:
        layers["attention"] = [False, False]
        why += "; without attention, which the many latent voxels would make slow"
    if start.weights is not None and start.unet:
        plan.ldm["init_from"], plan.why["ldm.init_from"] = start.weights.part("unet"), start.line
        plan.vae["freeze_encoder"] = True
        plan.why["vae.freeze_encoder"] = "so that the latents stay those that the shipped U-Net knows"
        layers, why = dict(start.weights.unet), "the layers of the shipped U-Net"
    if start.lora:
        plan.ldm["lora"] = {"rank": 16, "alpha": 16}
        plan.why["ldm.lora"] = "this alone is trained (docs/finetuning.md)"
    dropped = [*(["mask"] if facts.labels else []), *facts.conditions]
    plan.ldm["cache"] = {"versions": 4 if quick else 8 if facts.subjects < 50 else 4, "flip_axes": flips, "shift": True}
    plan.why["ldm.cache"] = "moved (and mirrored) versions of each volume, against learning them by heart"
    if not quick and facts.subjects < SMALL:
        plan.ldm["cache"] |= {"rotate": 8, "scale": 0.08, "deform": 1.2}
    if not quick and not start.lora:
        plan.ldm["residual_noise"] = True
        plan.why["ldm.residual_noise"] = "the texture that the autoencoder leaves out is added to generated volumes"
    model = {"class": "diffusion.LatentUNet3D", **layers, "objective": "rectified_flow"}
    if cells > SHIFT_VOXELS and "ldm.init_from" not in plan.why:
        model["shift_voxels"] = SHIFT_VOXELS
        why += f"; timesteps shifted toward noise, as {cells:.0f} latent voxels are many (docs/large_latents.md)"
    if dropped:
        model["condition_dropout"] = dict.fromkeys(dropped, 0.1)
    if not facts.labels:
        del model["mask_width"]
    plan.ldm["model"], plan.why["ldm.model"] = model, why
    batch = 4 if machine.accelerator or cells > 2_000 else 8
    flops = unet_flops(cells, layers["channels"], layers["blocks"], latents, layers["mask_width"])
    _training(plan, "ldm", facts, machine, batch, machine.seconds(flops * batch), PASSES["ldm"], quick)


def _training(
    plan: Plan, stage: str, facts: Facts, machine: Machine, batch: int, step: float | None, passes: float, quick: bool
) -> None:
    """Set optimizer and loop, and estimate the duration."""
    if quick and step is not None:
        fewest, most = QUICK_STEPS[stage]
        steps = int(np.clip(QUICK_SECONDS[stage] / step, fewest, most))
        why = f"--quick: about {QUICK_SECONDS[stage]:.0f} s of steps, {fewest} to {most} of them"
    else:
        fewest, most = (GPU_PASSES * n if machine.accelerator else n for n in STEPS[stage])
        if quick:
            fewest, most = QUICK_STEPS[stage]
        passes = GPU_PASSES * passes if machine.accelerator else passes
        steps = int(np.clip(passes * facts.volumes / batch, fewest, most))
        why = f"each of the {facts.volumes} training volumes {steps * batch / facts.volumes:.0f} times"
    steps = round(steps / 20) * 20
    section = plan.vae if stage == "vae" else plan.ldm
    fine = f"{stage}.init_from" in plan.why and stage == "ldm"
    rate = 3e-4 if fine and not plan.start.lora else 1e-3
    section["optimizer"] = {"learning_rate": rate, "warmup_steps": min(100, steps // 10)}
    if stage == "ldm" and plan.start.lora:
        section["optimizer"]["algorithm"] = "adamw"
    section["loop"] = {
        "max_steps": steps,
        "batch_size": batch,
        "mixed_precision": "auto" if machine.accelerator else "no",
        "ema_decay": next(decay for most, decay in EMA if steps <= most),
        "validate_every": max(steps // 5, 1),
        "preview_every": 0 if quick else max(int(LONG * steps), 1),
        "checkpoint_every": max(steps // 4, 1),
    }
    plan.why[f"{stage}.loop"] = f"{why}; float32 on a CPU" if not machine.accelerator else why
    plan.seconds[stage] = None if step is None else steps * step + STARTUP


EMA = ((300, 0.98), (700, 0.99), (2_000, 0.995), (20_000, 0.999), (10**9, 0.9999))  # most steps, decay

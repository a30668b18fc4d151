"""Make a plan fit into memory, by the doctor's estimate of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffusion.completion import complete_model
from evaluation.doctor.memory import training_bytes
from evaluation.doctor.models import Models, PlannedData, config_from_sections, with_precision
from training import build_model, ldm, vae
from volumes.data.config import DataConfig
from volumes.description import NumberStats

from .machine import Machine
from .sizing import LEAST_CELLS, Facts, Plan, Settings

SHARE = 0.6  # of the memory that a training may take
MOST_CHANGES = 12


def fit_memory(plan: Plan, facts: Facts, machine: Machine, data: DataConfig) -> None:
    """Lower batches, recompute activations, and shrink patches, until both trainings fit into the memory.

    Args:
        plan: is changed.
        facts: of the data set.
        machine: that trains.
        data: the data section.
    """
    room = SHARE * (machine.accelerator_memory or machine.memory)
    for stage, sections in plan.trainings:
        changes = []
        for _ in range(MOST_CHANGES):
            needed = step_bytes(plan, facts, data, stage, cpu=not machine.accelerator_memory)
            if needed <= room or not (change := _smaller(sections)):
                break
            changes.append(change)
        if needed > room:
            plan.unsure.append(
                f"{stage}.yaml needs about {needed / 2**30:.1f} GiB of memory, {room / 2**30:.1f} GiB are free for it; "
                "say --spacing X Y Z with larger voxels"
            )
        if changes:
            plan.why[f"{stage}.loop"] = f"{plan.why[f'{stage}.loop']}; to fit into memory: {', '.join(changes)}"


def step_bytes(plan: Plan, facts: Facts, data: DataConfig, stage: str, *, cpu: bool = False) -> int:
    """Return the bytes of a training: weights, optimizer, and a step at its peak, on a CPU with its workspace."""
    autoencoder: Any = build_model(plan.vae["model"])
    largest = facts.shapes[facts.shapes.prod(axis=1).argmax()]
    latent_shape = np.ceil(largest / np.array(autoencoder.stride)).astype(int).tolist()
    planned: Mapping[str, Any] = plan.vae if stage == "vae" else plan.ldm
    sections = {name: value for name, value in planned.items() if name not in ("init_from", "lora")}
    if stage == "vae":
        config: Any = with_precision(config_from_sections(sections, data))
        models = Models(config, autoencoder, None, vae.build_step(config, autoencoder))
    else:
        config = with_precision(config_from_sections({**sections, "vae": "."}, data))
        numbers = dict.fromkeys(data.numbers, NumberStats(mean=0.0, std=1.0, low=-1.0, high=1.0))
        config.model = complete_model(config.model, autoencoder, PlannedData.of(data, numbers), {})
        unet: Any = build_model(config.model, config.gradient_checkpointing)
        models = Models(config, autoencoder, unet, ldm.build_step(config, unet, autoencoder))
    assert models.step is not None
    return training_bytes(models.step, models.work(latent_shape, torch.device("cpu")), cpu=cpu)["total"]


def _smaller(sections: Settings) -> str:
    """Make a training smaller by one change, and say which; "" if there is none left."""
    loop = sections["loop"]
    if loop["batch_size"] > 1:
        loop["batch_size"] //= 2
        loop["max_steps"] *= 2
        return f"batch {loop['batch_size']}"
    if not sections.get("gradient_checkpointing"):
        sections["gradient_checkpointing"] = True
        return "gradient_checkpointing"
    if "crops" not in sections:
        return ""
    patch, size = sections["crops"]["shape"], sections["model"]["patch_size"]
    stride = [2 * n for n in (size if isinstance(size, list) else [size] * 3)]
    axis = int(np.argmax(patch))
    if patch[axis] <= LEAST_CELLS * stride[axis]:
        return ""
    patch[axis] -= stride[axis]
    return f"patches of {patch}"

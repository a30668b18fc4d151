"""Med-DDPM: a diffusion of voxels, from a label map or without (Dorjsembe et al. 2024; mobaidoctor/med-ddpm).

Its network, its diffusion and its training loop, with the settings of its train.py, on our volumes.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volumes import VolumeDataset

from .checkouts import imported, on
from .system import Settings, System, Trained
from .tasks import PaddedSet, Task, TimeUp, write_volume

MODULES = ("diffusion_model.trainer", "diffusion_model.unet")
REQUIRED = ("tensorboard", "einops", "PIL")
TIMESTEPS, WIDTH = 250, 64  # of its train.py, as are 1e-5, L1, batch 1, two batches a step, average 0.995
NEVER = 10**9


class MedDdpm(System):
    """Trains and samples with the code of a checkout."""

    name = "med_ddpm"
    takes_masks = True

    def __init__(self, dataset: VolumeDataset, task: Task, settings: Settings):
        self.dataset, self.task, self.settings = dataset, task, settings
        self.volumes = PaddedSet(dataset, task.shape)
        self.model: Any = None

    def train(self, seconds: float) -> Trained:
        """Train for so many seconds."""
        settings, (x, y, z) = self.settings, self.task.shape
        if x != y:
            raise ValueError(f"Med-DDPM takes volumes whose first two sides are equal, not {x} x {y}")
        assert settings.checkout is not None
        with (
            imported(settings.checkout, MODULES, REQUIRED) as (trainer_code, unet_code),
            on(settings.device, settings.folder),
        ):
            channels = self.volumes.labels if self.task.from_masks else 1  # the image, and each label but one
            network = unet_code.create_model(x, settings.width or WIDTH, 1, in_channels=channels, out_channels=1)
            diffusion = trainer_code.GaussianDiffusion(
                network.to(settings.device),
                image_size=x,
                depth_size=z,
                timesteps=settings.timesteps or TIMESTEPS,
                loss_type="l1",
                with_condition=self.task.from_masks,
                channels=1,
            ).cuda()
            trainer = trainer_code.Trainer(
                diffusion,
                _Items(self.volumes, self.task.from_masks),
                image_size=x,
                depth_size=z,
                train_batch_size=1,
                train_lr=1e-5,
                train_num_steps=NEVER,
                gradient_accumulate_every=2,
                ema_decay=0.995,
                fp16=False,
                with_condition=self.task.from_masks,
                save_and_sample_every=NEVER,
                results_folder=str(settings.folder / "results"),
            )
            start = time.perf_counter()
            trainer.dl = self._batches(start + seconds)
            with contextlib.suppress(TimeUp):
                trainer.train()
            spent = time.perf_counter() - start
        self.model = trainer.ema_model.eval()
        return {"steps": trainer.step, "seconds": spent, "parameters": sum(p.numel() for p in network.parameters())}

    def _batches(self, end: float) -> Iterator[Any]:
        for index in self.volumes.order():
            if time.perf_counter() >= end:
                raise TimeUp
            item = _Items(self.volumes, self.task.from_masks)[index]
            yield {key: value[None] for key, value in item.items()} if isinstance(item, dict) else item[None]

    def generate(self, index: int, seed: int, path: Path) -> None:
        """Write a volume, from the label map of a training volume if the task says so."""
        torch.manual_seed(seed)
        condition = self.volumes.mask(index)[None].to(self.settings.device) if self.task.from_masks else None
        with torch.inference_mode():
            volume = self.model.sample(batch_size=1, condition_tensors=condition)[0, 0]
        made = self.volumes.restored(volume, index)
        write_volume(made, self.dataset, index, path, self.name, seed, self.task.from_masks)


class _Items:
    """Its data set: volumes, or {"input": masks, "target": volume}."""

    def __init__(self, volumes: PaddedSet, from_masks: bool):
        self.volumes, self.from_masks = volumes, from_masks

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Tensor | dict[str, Tensor]:
        image = self.volumes.image(index)
        return {"input": self.volumes.mask(index), "target": image} if self.from_masks else image

"""Medical Diffusion: a VQ-GAN and a diffusion of its latents (Khader et al. 2023; FirasGit/medicaldiffusion).

It has no conditions. Its networks, its losses and its diffusion's training loop, with the settings that its README
gives for BraTS, on our volumes.

Left out: Lightning's Trainer (of an old version), which is two Adam steps a batch and a clipped gradient; float16 on
CPUs; and its perceptual loss, whose constructor downloads weights, unless `perceptual` asks for it.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from volumes import VolumeDataset

from .checkouts import imported, on
from .system import Settings, System, Trained
from .tasks import PaddedSet, Task, TimeUp, write_volume

MODULES = ("vq_gan_3d.model.vqgan", "ddpm.diffusion")
REQUIRED = ("pytorch_lightning", "einops", "einops_exts", "rotary_embedding_torch", "SimpleITK", "matplotlib")
CODES, EMBEDDING, HIDDEN = 16384, 8, 16
TIMESTEPS, BATCH = 300, 10
SHARE = 0.5  # of the time, for the VQ-GAN
NEVER = 10**9


class NoPerception(nn.Module):
    """Takes the place of the perceptual network, which is not called at weight 0."""


class MedicalDiffusion(System):
    """Trains and samples with the code of a checkout."""

    name = "medical_diffusion"
    takes_masks = False

    def __init__(self, dataset: VolumeDataset, task: Task, settings: Settings):
        self.dataset, self.task, self.settings = dataset, task, settings
        self.volumes = PaddedSet(dataset, task.shape)
        self.down = 2 if task.shape[0] <= 64 else 4
        self.model: Any = None

    def train(self, seconds: float) -> Trained:
        """Train for so many seconds, the VQ-GAN in the first half."""
        settings, (x, y, z) = self.settings, self.task.shape
        if x != y:
            raise ValueError(f"Medical Diffusion takes volumes whose first two sides are equal, not {x} x {y}")
        assert settings.checkout is not None
        with (
            imported(settings.checkout, MODULES, REQUIRED) as (vqgan_code, ddpm_code),
            on(settings.device, settings.folder),
        ):
            if not settings.perceptual:
                vars(vqgan_code)["LPIPS"] = NoPerception
            start = time.perf_counter()
            vqgan = vqgan_code.VQGAN(_vqgan_settings(settings, self.down)).to(settings.device)
            coded = self._train_vqgan(vqgan, start + SHARE * seconds)
            vqgan.eval()
            side = x // self.down
            network = ddpm_code.Unet3D(dim=settings.width or side, dim_mults=(1, 2, 4, 8), channels=EMBEDDING).cuda()
            diffusion = ddpm_code.GaussianDiffusion(
                network,
                vqgan_ckpt=None,
                image_size=side,
                num_frames=z // self.down,
                channels=EMBEDDING,
                timesteps=settings.timesteps or TIMESTEPS,
                loss_type="l1",
            ).cuda()
            diffusion.vqgan = vqgan  # what it loads from the file of a checkpoint
            trainer = ddpm_code.Trainer(
                diffusion,
                cfg=None,
                dataset=_Items(self.volumes),
                train_batch_size=BATCH,
                train_lr=1e-4,
                train_num_steps=NEVER,
                gradient_accumulate_every=2,
                ema_decay=0.995,
                save_and_sample_every=NEVER,
                results_folder=str(settings.folder / "results"),
                num_workers=0,
            )
            trainer.dl = self._batches(min(BATCH, len(self.volumes)), start + seconds)
            with contextlib.suppress(TimeUp):
                trainer.train()
            spent = time.perf_counter() - start
        self.model = trainer.ema_model.eval()
        count = sum(p.numel() for part in (vqgan, network) for p in part.parameters())
        return {"steps": trainer.step, "autoencoder_steps": coded, "seconds": spent, "parameters": count}

    def _train_vqgan(self, vqgan: Any, end: float) -> int:
        optimizers, _ = vqgan.configure_optimizers()
        vqgan.train()
        steps = 0
        try:
            for batch in self._batches(2, end):
                batch = {"data": batch["data"].to(self.settings.device)}
                for number, optimizer in enumerate(optimizers):
                    loss = vqgan.training_step(batch, steps, number)
                    vqgan.zero_grad(set_to_none=True)
                    if loss.requires_grad:
                        loss.backward()
                    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
                    optimizer.step()
                steps += 1
        except TimeUp:
            pass
        return steps

    def _batches(self, size: int, end: float) -> Iterator[dict[str, Tensor]]:
        order = self.volumes.order()
        while True:
            if time.perf_counter() >= end:
                raise TimeUp
            yield {"data": torch.stack([self.volumes.image(next(order)) for _ in range(size)])}

    def generate(self, index: int, seed: int, path: Path) -> None:
        """Write a volume on the grid of a training volume."""
        torch.manual_seed(seed)
        volume = self.model.sample(batch_size=1)[0, 0]
        made = self.volumes.restored(volume, index)
        write_volume(made, self.dataset, index, path, self.name, seed, from_mask=False)


class _Items:
    """Its data set, {"data": volume}."""

    def __init__(self, volumes: PaddedSet):
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"data": self.volumes.image(index)}


def _vqgan_settings(settings: Settings, down: int) -> SimpleNamespace:
    model = SimpleNamespace(
        embedding_dim=EMBEDDING,
        n_codes=CODES,
        n_hiddens=settings.hidden or HIDDEN,
        lr=3e-4 * (1 / 8) * (2 / 4),  # as its train_vqgan.py scales it for one GPU and batches of 2
        downsample=[down] * 3,
        disc_channels=64,
        disc_layers=3,
        discriminator_iter_start=10000,
        disc_loss_type="hinge",
        image_gan_weight=1.0,
        video_gan_weight=1.0,
        l1_weight=4.0,
        gan_feat_weight=4.0,
        perceptual_weight=4.0 if settings.perceptual else 0.0,
        restart_thres=1.0,
        no_random_restart=False,
        norm_type="group",
        padding_type="replicate",
        num_groups=min(32, settings.hidden or HIDDEN),
    )
    return SimpleNamespace(model=model, dataset=SimpleNamespace(image_channels=1))

"""Our recipe for the same minutes: train_vae.py, then train_ldm.py. Short trials tell how many steps fit."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState

import train_ldm
import train_vae
from pipelines import MedVolumePipeline
from volumes import VolumeDataset

from .system import Settings, System, Trained
from .tasks import Task

SHARE = 0.5  # of the time, for the autoencoder
TRIAL = (4, 12)  # steps


class Ours(System):
    """Trains with this repository's scripts, in this process.

    Args:
        more: further options of train_vae.py and train_ldm.py, for tests.
    """

    name = "ours"
    takes_masks = True

    def __init__(
        self,
        dataset: VolumeDataset,
        task: Task,
        settings: Settings,
        more: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ):
        self.dataset, self.task, self.settings, self.more = dataset, task, settings, more
        self.pipe: Any = None
        self.seconds = 0.0

    def train(self, seconds: float) -> Trained:
        """Train for so many seconds, the autoencoder in the first half."""
        self.seconds = seconds
        trials = self.settings.folder / "trials"
        first, second = (self._run(train_vae, steps, trials / f"vae_{steps}") for steps in TRIAL)
        coded = self._fitting(SHARE * seconds, second - first)
        spent = self._run(train_vae, coded, self.settings.folder / "vae")
        encoding = self._run(train_ldm, TRIAL[0], trials / "encoding")  # encodes the volumes, which later runs find
        first, second = (self._run(train_ldm, steps, trials / f"ldm_{steps}") for steps in TRIAL)
        encoding = max(encoding - first, 0.0)
        steps = self._fitting(seconds - spent - encoding, second - first)
        spent += encoding + self._run(train_ldm, steps, self.settings.folder / "ldm")
        pipe = MedVolumePipeline.from_pretrained(self.settings.folder / "ldm/pipeline")
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.settings.device)
        count = sum(p.numel() for part in (pipe.vae, pipe.unet) for p in part.parameters())
        return {"steps": steps, "autoencoder_steps": coded, "seconds": spent, "parameters": count}

    @staticmethod
    def _fitting(seconds: float, of_trial: float) -> int:
        return max(int(seconds / max(of_trial / (TRIAL[1] - TRIAL[0]), 1e-3)), 1)

    def _run(self, script: ModuleType, steps: int, folder: Path) -> float:
        """Train for so many steps; return the seconds, without the time to start."""
        diffusion = script is train_ldm
        options = {
            "config": f"{self.task.recipe}/{'ldm' if diffusion else 'vae'}.yaml",
            "output": folder,
            "data.root": self.settings.root,
            "loop.max_steps": steps,
            "loop.ema_decay": max(0.0, min(0.999, 1 - 10 / steps)),
            "loop.export": "last",
            "loop.trackers": "[]",
            "optimizer.warmup_steps": steps // 30,
            "loop.mixed_precision": "no" if self.settings.device == "cpu" else "bf16",
            **dict.fromkeys(("loop.validate_every", "loop.preview_every", "loop.checkpoint_every"), 0),
            **(
                {"cache.versions": max(int(self.seconds // 600), 1)} if diffusion else {}
            ),  # encoding takes its time, too
            **({"vae": self.settings.folder / "vae/vae"} if diffusion else {}),
        }
        args = [f"--{name}={value}" for name, value in options.items() if value is not None]
        AcceleratorState._reset_state(reset_partial_state=True)
        start = time.perf_counter()
        script.main([*args, *self.more[diffusion]])
        return time.perf_counter() - start

    def generate(self, index: int, seed: int, path: Path) -> None:
        """Write a volume, from the label map of a training volume if the task says so."""
        case = self.dataset.cases[index]
        asked: dict[str, object] = {"shape": self.dataset.shapes[index]}
        if self.task.from_masks:
            asked = {"mask": case.mask}
        self.pipe(**asked, generator=torch.Generator().manual_seed(seed), paths=path)

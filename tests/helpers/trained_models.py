"""Models trained for one step on phantoms as files, by the real scripts: for tests of what a model says of its
training."""

from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState

import train_ldm
import train_vae
from benchmarks.phantom_set import write_phantoms

SUBJECTS = [number // 2 for number in range(20)]  # ten of two volumes each
QUICK = [
    "--loop.max_steps=1",
    "--loop.batch_size=2",
    "--loop.mixed_precision=no",
    "--loop.validate_every=0",
    "--loop.preview_every=0",
    "--loop.checkpoint_every=0",
    "--loop.workers=0",
    "--loop.trackers=[]",
]
AUTOENCODERS = {
    "kl": "{class: autoencoder.AutoencoderKL3D, channels: [4, 8], encoder_blocks: [1, 1], decoder_blocks: [1, 1]}",
    "vq": "{class: autoencoder.VQGAN3D, channels: [4, 8], encoder_blocks: [1, 1], decoder_blocks: [1, 1], "
    "num_codes: 16}",
    "space_to_depth": "{class: autoencoder.SpaceToDepth3D, patch_size: 4}",
}
UNET = "{class: diffusion.LatentUNet3D, channels: [8, 16], blocks: [1, 1], head_dim: 8, mask_width: 4}"
WINDOW = {"kind": "window", "low": 0.0, "high": 1100.0}


def write_data(folder: Path, **options: Any) -> Path:
    """A data set of phantoms, a fifth of its subjects held out for testing; the path of its config."""
    split: dict[str, Any] = {"split": None, "test_fraction": 0.2, "intensity": WINDOW}
    write_phantoms(folder, SUBJECTS, 0, **split | options)
    return folder / "config.yaml"


def train(script: Any, config: Path, output: Path, *args: str) -> Path:
    """Run a script of one step; the folder of the model that it leaves."""
    AcceleratorState._reset_state(reset_partial_state=True)
    kind = "vae" if script is train_vae else "ldm"
    model = AUTOENCODERS["kl"] if kind == "vae" else UNET
    own = ["--crops.shape=[8, 8, 8]"] if kind == "vae" else ["--inference_steps=2"]
    section = yaml.safe_load(config.read_text())["data"]
    path = output.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"data": section}))
    script.main([f"--config={path}", f"--output={output}", f"--model={model}", *QUICK, *own, *args])
    AcceleratorState._reset_state(reset_partial_state=True)
    return next(output / name for name in ("vae", "pipeline", "lora") if (output / name).is_dir())


def train_both(config: Path, output: Path, *args: str) -> tuple[Path, Path]:
    """An autoencoder's folder and a pipeline's."""
    vae = train(train_vae, config, output / "a")
    return vae, train(train_ldm, config, output / "p", f"--vae={vae}", *args)

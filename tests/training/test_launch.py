"""Both scripts as users start them, on the phantom: thirty steps lower the loss, and the pipeline folder loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines import MedVolumePipeline

ROOT = Path(__file__).resolve().parents[2]
ONE_PROCESS = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
ONE_PROCESS += ["--mixed_precision=no", "--dynamo_backend=no"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # what accelerate starts on GPUs
SMALL = ["--data.phantom={count: 10, shape: [16, 16, 16]}", "--data.validation_fraction=0.2", "--loop.max_steps=30"]
SMALL += ["--loop.mixed_precision=no", "--loop.log_every=5", "--loop.previews=1", "--optimizer.warmup_steps=5"]


def launch(launcher: list[str], script: str, config: str, *args: str) -> list[float]:
    """Run a script on its phantom config, made small; returns the losses that it reported."""
    command = [sys.executable, *launcher, str(ROOT / script), f"--config=configs/phantom/{config}", *SMALL, *args]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"step \d+/30  loss ([\d.e-]+)", done.stderr)]
    assert len(losses) == 6, done.stderr[-4000:]
    return losses


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory) -> tuple[Path, list[float]]:
    output = tmp_path_factory.mktemp("vae")
    return output, launch(ONE_PROCESS, "train_vae.py", "vae.yaml", f"--output={output}", "--crops.shape=[16, 16, 16]")


def test_train_vae(vae_run):
    output, losses = vae_run
    assert losses[-1] < 0.8 * losses[0]
    assert {p.name for p in output.iterdir()} == {
        ".medvolume.lock",
        "best",
        "checkpoints",
        "config.yaml",
        "logs",
        "metrics.json",
        "metrics.jsonl",
        "volumes.json",
        "previews",
        "vae",
    }


def test_train_ldm_leaves_a_pipeline(vae_run, tmp_path):
    args = [f"--vae={vae_run[0] / 'vae'}", f"--output={tmp_path}", "--cache.versions=1", "--inference_steps=2"]
    losses = launch(ONE_PROCESS, "train_ldm.py", "ldm.yaml", *args)
    assert losses[-1] < 0.9 * losses[0]
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(16, 16, 16, dtype=torch.int16)
    mask[4:12, 4:12, 4:12] = 1
    out = pipe(mask=mask, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    assert out.volumes[0].shape == (1, 16, 16, 16)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each process takes its half of every batch, and of the codebook's cells; one set of files is written."""
    args = [f"--output={tmp_path}", "--crops.shape=[16, 16, 16]", "--loop.batch_size=2"]
    args += ["--model={class: autoencoder.VQGAN3D, channels: [8, 16], num_codes: 64}"]
    args += ["--adversarial={start_step: 10, channels: 4, layers: 1}"]
    losses = launch(TWO_PROCESSES, "train_vae.py", "vae.yaml", *args)
    assert losses[-1] < 0.8 * losses[0]
    names = {p.name for p in (tmp_path / "checkpoints/step_000030").iterdir()}
    assert {"rng_0.txt", "rng_1.txt", "random_states_0.pkl", "random_states_1.pkl", "state.json"} <= names
    assert (tmp_path / "vae/config.json").is_file()

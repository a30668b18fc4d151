"""Both scripts on the phantom: thirty steps lower the loss, and the pipeline folder loads. Slowly by launchers, too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import train_ldm
import train_vae
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
    return losses_in(done.stderr)


def losses_in(said: str) -> list[float]:
    losses = [float(loss) for loss in re.findall(r"step \d+/30  loss ([\d.e-]+)", said)]
    assert len(losses) == 6, said[-4000:]
    return losses


def train(main, config: str, caplog, *args: str) -> list[float]:
    """Train as `launch`, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level("INFO", logger="training"):
        main([f"--config={ROOT / 'configs/phantom' / config}", *SMALL, *args])
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses_in(caplog.text)


@pytest.mark.slow
def test_train_vae_as_users_start_it(tmp_path):
    losses = launch(ONE_PROCESS, "train_vae.py", "vae.yaml", f"--output={tmp_path}", "--crops.shape=[16, 16, 16]")
    assert losses[-1] < 0.8 * losses[0] and (tmp_path / "vae").is_dir()


def test_both_trainings_leave_a_pipeline(tmp_path, caplog):
    output = tmp_path / "vae"
    losses = train(train_vae.main, "vae.yaml", caplog, f"--output={output}", "--crops.shape=[16, 16, 16]")
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
    caplog.clear()
    args = [f"--vae={output / 'vae'}", f"--output={tmp_path / 'ldm'}", "--cache.versions=1", "--inference_steps=2"]
    losses = train(train_ldm.main, "ldm.yaml", caplog, *args)
    assert losses[-1] < 0.9 * losses[0]
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "ldm/pipeline")
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

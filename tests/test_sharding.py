"""Weights divided among two processes (FSDP) train as whole ones do. On a CPU, through gloo."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import forked
from benchmarks.processes import DATA, LDM, LOOP, VAE, losses_of
from training import LoopConfig
from training.loop import Loop
from training.sharding import check_sharding

STEPS = ["--loop.max_steps=4", "--loop.checkpoint_every=2", "--loop.keep_checkpoints=0", "--optimizer.warmup_steps=2"]


def trained(script, args, folder, processes):
    return losses_of(script, args, folder, processes, global_batch=4)[0]


def test_divided_weights_resume_exactly_and_are_saved_whole(tmp_path):
    """Checkpoints, the final folder and metrics are those of one process; the way back from a checkpoint is exact to the bit.
    Four volumes validate, and the first is drawn by one process alone."""
    vae = ["--loop.max_steps=1", *VAE, *DATA, *LOOP]
    trained("train_vae", vae, tmp_path / "vae", 1)
    ldm = [*LDM, *DATA, *LOOP, *STEPS, f"--vae={tmp_path / 'vae/run/vae'}", "--data.validation_fraction=0.4"]
    ldm += ["--loop.previews=1"]
    trained("train_ldm", ldm, tmp_path / "one", 1)
    trained("train_ldm", [*ldm, "--loop.shard=true"], tmp_path / "two", 2)
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    said = re.search(
        r"unet is divided: this process holds (\d+) of (\d+) weights", (tmp_path / "two/log.0").read_text()
    )
    assert said and 0.4 < int(said[1]) / int(said[2]) < 0.65
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    last = "checkpoints/step_000004"
    average, (final,) = load_file(two / last / "unet_ema.safetensors"), two.glob("pipeline/unet/*.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in load_file(final).items())
    for mine, other in (("unet.safetensors", "model.safetensors"), ("unet_ema.safetensors",) * 2):
        found, expected = load_file(two / last / mine), load_file(one / last / other)
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)

    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints/step_000004")
    args = [*ldm, "--loop.shard=true", "--loop.batch_size=2", f"--output={resumed}", "--resume=latest"]
    assert [forked.ended(one) for one in forked.start_two("train_ldm", args, tmp_path / "again.txt")] == [0, 0]
    for name in ("unet.safetensors", "unet_ema.safetensors"):
        before, after = (load_file(run / last / name) for run in (two, resumed))
        assert all(torch.equal(before[key], after[key]) for key in before)
    moments = [torch.load(run / last / "unet_optimizer.bin") for run in (two, resumed)]
    for name, state in moments[0]["state"].items():
        assert all(torch.equal(value, moments[1]["state"][name][key]) for key, value in state.items())


def test_where_it_cannot_run_it_is_refused():
    alone: Any = SimpleNamespace(num_processes=1, mixed_precision="no")
    half: Any = SimpleNamespace(num_processes=2, mixed_precision="fp16")
    with pytest.raises(ValueError, match="there is one process, and nothing to divide"):
        check_sharding(alone, compile=False)
    with pytest.raises(ValueError, match="use loop.mixed_precision bf16 or no"):
        check_sharding(half, compile=False)
    half.mixed_precision = "bf16"
    with pytest.raises(ValueError, match="set one of the two to false"):
        check_sharding(half, compile=True)
    config: Any = SimpleNamespace(loop=LoopConfig(shard=True))
    step: Any = SimpleNamespace(learners=(1, 2))
    with pytest.raises(ValueError, match="with an adversary it is not supported"):
        Loop(half, config, step, [], [])

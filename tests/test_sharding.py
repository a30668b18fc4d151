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


def test_divided_weights_train_as_whole_ones_and_resume_exactly(tmp_path):
    """Losses, checkpoints, the final folder, and the way back from a checkpoint, bit for bit."""
    common = [*DATA, *LOOP, *STEPS]
    vae = [*VAE, *common]
    whole, divided = trained("train_vae", vae, tmp_path / "vae1", 1), tmp_path / "vae2/run"
    assert trained("train_vae", [*vae, "--loop.shard=true"], tmp_path / "vae2", 2) == pytest.approx(whole, rel=1e-4)
    said = re.search(
        r"vae is divided: this process holds (\d+) of (\d+) weights", (tmp_path / "vae2/log.0").read_text()
    )
    assert said and 0.4 < int(said[1]) / int(said[2]) < 0.65

    ldm = [*LDM, *common, f"--vae={tmp_path / 'vae1/run/vae'}", "--data.validation_fraction=0.4"]  # 4 to validate
    one, two = trained("train_ldm", ldm, tmp_path / "ldm1", 1), tmp_path / "ldm2/run"
    assert trained("train_ldm", [*ldm, "--loop.shard=true"], tmp_path / "ldm2", 2) == pytest.approx(one, rel=1e-4)
    metrics = [json.loads((tmp_path / f"{run}/run/metrics.json").read_text()) for run in ("ldm1", "ldm2")]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    for run, name in ((divided, "vae"), (two, "unet")):
        undivided = tmp_path / ("vae1" if name == "vae" else "ldm1") / "run/checkpoints/step_000004"
        checkpoint, (final,) = run / "checkpoints/step_000004", run.glob(f"**/{name}/*.safetensors")
        average = load_file(checkpoint / f"{name}_ema.safetensors")
        assert all(torch.equal(value, average[key]) for key, value in load_file(final).items())
        for mine, other in ((f"{name}.safetensors", "model.safetensors"), (f"{name}_ema.safetensors",) * 2):
            found, expected = load_file(checkpoint / mine), load_file(undivided / other)
            assert found.keys() == expected.keys()
            for key in found:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)

    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints/step_000004")
    args = [*ldm, "--loop.shard=true", "--loop.batch_size=2", f"--output={resumed}", "--resume=latest"]
    assert [forked.ended(one) for one in forked.start_two("train_ldm", args, tmp_path / "again.txt")] == [0, 0]
    for name in ("unet.safetensors", "unet_ema.safetensors"):
        before, after = (load_file(run / "checkpoints/step_000004" / name) for run in (two, resumed))
        assert all(torch.equal(before[key], after[key]) for key in before)
    moments = [torch.load(run / "checkpoints/step_000004/unet_optimizer.bin") for run in (two, resumed)]
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

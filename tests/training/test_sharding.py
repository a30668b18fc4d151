"""Weights divided among two processes (FSDP) train as whole ones do. On a CPU, through gloo."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks import forked
from benchmarks.processes import DATA, LDM, LOOP, VAE, losses_of
from training import Learner, LoopConfig, OptimizerConfig
from training.engine import checkpoints
from training.engine.averages.power import STORED
from training.engine.averages.snapshots import Snapshots
from training.engine.loop import Loop
from training.engine.sharding import check_sharding, collect, on_main, restore, set_whole

STEPS = ["--loop.max_steps=4", "--loop.checkpoint_every=2", "--loop.keep_checkpoints=0", "--optimizer.warmup_steps=2"]


def trained(script, args, folder, processes):
    return losses_of(script, args, folder, processes, global_batch=4)[0]


@pytest.mark.slow
def test_divided_weights_resume_exactly_and_are_saved_whole(tmp_path):
    """Checkpoints, the final folder and metrics are those of one process; the way back from a checkpoint is exact to
    the bit. Four volumes validate, and the first is drawn by one process alone."""
    vae = [*VAE, *DATA, *LOOP, "--loop.max_steps=1"]
    trained("train_vae", vae, tmp_path / "vae", 1)
    ldm = [*LDM, *DATA, *LOOP, *STEPS, f"--vae={tmp_path / 'vae/run/vae'}", "--data.validation_fraction=0.4"]
    ldm += ["--loop.previews=1"]
    trained("train_ldm", ldm, tmp_path / "one", 1)
    trained("train_ldm", [*ldm, "--loop.fsdp=true"], tmp_path / "two", 2)
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    said = re.search(
        r"unet is sharded: this process holds (\d+) of (\d+) weights", (tmp_path / "two/log.0").read_text()
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

    resumed = tmp_path / "resumed/run"  # as deep as the run, for its config names the working directory from there
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints/step_000004")
    args = [*ldm, "--loop.fsdp=true", "--loop.batch_size=2", f"--output={resumed}", "--resume=latest"]
    assert [forked.ended(one) for one in forked.start_two("train_ldm", args, tmp_path / "again.txt")] == [0, 0]
    for name in ("unet.safetensors", "unet_ema.safetensors"):
        before, after = (load_file(run / last / name) for run in (two, resumed))
        assert all(torch.equal(before[key], after[key]) for key in before)
    moments = [torch.load(run / last / "unet_optimizer.bin") for run in (two, resumed)]
    for name, state in moments[0]["state"].items():
        assert all(torch.equal(value, moments[1]["state"][name][key]) for key, value in state.items())


VQ = (
    "--model={class: autoencoder.VQGAN3D, channels: [4, 12], encoder_blocks: [1, 1], decoder_blocks: [1, 1], "
    "num_codes: 16}"
)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["codebook", "lora", "bf16"])
def test_what_else_is_trained_has_the_same_losses_when_divided(tmp_path, what):
    args = [*VAE, *DATA, *LOOP, *STEPS]
    if what == "codebook":
        args += [VQ, "--losses.kl=0", "--losses.commitment=0.25"]
    if what == "bf16":
        args += ["--loop.mixed_precision=bf16", "--gradient_checkpointing=true"]
    script = "train_vae"
    if what == "lora":
        trained("train_vae", args, tmp_path / "vae", 1)
        args = [*LDM, *DATA, *LOOP, *STEPS, f"--vae={tmp_path / 'vae/run/vae'}"]
        trained("train_ldm", args, tmp_path / "base", 1)
        script = "train_ldm"
        args += ["--lora={rank: 2}", f"--init_from={tmp_path / 'base/run/pipeline/unet'}"]
    whole = trained(script, args, tmp_path / "two", 2)
    divided = trained(script, [*args, "--loop.fsdp=true"], tmp_path / "divided", 2)
    assert divided == pytest.approx(whole, rel=2e-3 if what == "bf16" else 1e-4)


def test_a_checkpoint_of_divided_weights_is_not_resumed_without(tmp_path):
    (tmp_path / "step_000003").mkdir()
    (tmp_path / "step_000003/state.json").write_text(json.dumps({"step": 3, "sharded": True, "processes": 1}))
    (tmp_path / "step_000003/digests.json").write_text(json.dumps(checkpoints.digest_files(tmp_path / "step_000003")))
    alone: Any = SimpleNamespace(num_processes=1, is_main_process=False)
    with pytest.raises(ValueError, match="step_000003: was written with loop.fsdp True; resume with the same"):
        checkpoints.Checkpointer(alone, [], tmp_path, 2).check(tmp_path / "step_000003")
    assert checkpoints.Checkpointer(alone, [], tmp_path, 2, sharded=True).check(tmp_path / "step_000003").step == 3


def test_where_it_cannot_run_it_is_refused():
    alone: Any = SimpleNamespace(num_processes=1, mixed_precision="no")
    half: Any = SimpleNamespace(num_processes=2, mixed_precision="fp16")
    with pytest.raises(ValueError, match="there is only one process"):
        check_sharding(alone, compile=False)
    with pytest.raises(ValueError, match="use loop.mixed_precision bf16 or no"):
        check_sharding(half, compile=False)
    half.mixed_precision = "bf16"
    with pytest.raises(ValueError, match="set one of them to false"):
        check_sharding(half, compile=True)
    config: Any = SimpleNamespace(loop=LoopConfig(fsdp=True))
    step: Any = SimpleNamespace(learners=(1, 2))
    with pytest.raises(ValueError, match="with a discriminator is not supported"):
        Loop(half, config, step, [], [])


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def group(accelerator):
    """A group of this process alone: its weights are divided into one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield accelerator
    dist.destroy_process_group()


def test_sharded_state_is_restored_and_missing_parts_refused(group):
    """Frozen weights, buffers and momentum come back."""

    def learner(seed: int) -> Learner:
        torch.manual_seed(seed)
        layers = [torch.nn.Conv3d(1, 16, 2), torch.nn.BatchNorm3d(16), torch.nn.Conv3d(16, 16, 2)]
        layers[0].requires_grad_(False)
        one = Learner("net", torch.nn.Sequential(*layers), OptimizerConfig(), ema_decay=0.9, max_steps=9)
        one.prepare(group, sharded=True)
        return one

    def held(one: Learner) -> dict[str, Any]:
        return collect(one.network, one.ema.module, one.optimizer)

    trained, fresh = learner(0), learner(1)
    for step in range(2):
        trained.backward(trained.model(torch.randn(2, 1, 4, 4, 4)).square().mean())
        assert trained.update(step)[0]
    saved = held(trained)
    assert saved["optimizer"]["state"].keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert saved["optimizer"]["state"]["2.weight"].keys() == {"momentum"}
    restore(fresh.network, fresh.ema.module, fresh.optimizer, saved)
    found, expected = held(fresh), held(trained)
    for part in ("model", "average"):
        assert found[part].keys() == expected[part].keys() and "1.running_mean" in found[part]
        assert all(torch.equal(value, expected[part][key]) for key, value in found[part].items())
    for name, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, found["optimizer"]["state"][name][key]) for key, value in state.items())
    for part, name in (("model", "0.weight"), ("average", "2.bias")):
        less = {**expected, part: {key: value for key, value in expected[part].items() if key != name}}
        with pytest.raises(ValueError, match=f"1 tensors are missing, such as {name}"):
            restore(fresh.network, fresh.ema.module, fresh.optimizer, less)


def test_sharded_averages_are_stored_whole(group, tmp_path):
    """Those that a length is computed from, in snapshots, and from a checkpoint's file back into a learner."""

    def learner(seed: int) -> Learner:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        one = Learner("net", net, OptimizerConfig(), ema_decay=0.9, max_steps=4, tracked=STORED)
        one.prepare(group, sharded=True)
        return one

    trained, fresh = learner(0), learner(1)
    for step in range(3):
        trained.backward(trained.model(torch.randn(5, 3)).sigmoid().mean())
        assert trained.update(step)[0]
    Snapshots(group, trained, tmp_path, 1, 3).take(3)
    for length in STORED:
        whole = on_main(trained.tracked[length].module)
        stored = load_file(tmp_path / "snapshots" / f"step_000003_{length:.2f}.safetensors")
        assert stored.keys() == whole.keys() and type(whole["0.weight"]) is torch.Tensor
        assert all(torch.equal(value, whole[name]) for name, value in stored.items())
        set_whole(fresh.tracked[length].module, stored)
        again = on_main(fresh.tracked[length].module)
        assert all(torch.equal(value, again[name]) for name, value in stored.items())
        with pytest.raises(ValueError, match="1 tensors are missing, such as 0.bias"):
            set_whole(fresh.tracked[length].module, {k: v for k, v in stored.items() if k != "0.bias"})
    rebuilt = Snapshots(group, trained, tmp_path, 1, 3).average_of(0.05)["0.weight"]
    torch.testing.assert_close(rebuilt, on_main(trained.tracked[0.05].module)["0.weight"])


def test_no_process_restores_a_checkpoint_others_find_damaged(accelerator, tmp_path, monkeypatch):
    """Divided weights are restored together: one that begins alone would wait for the others for ever."""
    learner = Learner("net", torch.nn.Linear(3, 2), OptimizerConfig(), ema_decay=0.9, max_steps=9)
    learner.prepare(accelerator)
    checkpointer = checkpoints.Checkpointer(accelerator, [learner], tmp_path, keep=2)
    for step in (1, 2):
        checkpointer.save(checkpoints.TrainState(step=step))
    heard, loaded, load_state = iter([["step_000002: damaged, for process 1"]]), [], accelerator.load_state
    monkeypatch.setattr(checkpoints, "gather_object", lambda own: [*own, *next(heard, [])])
    monkeypatch.setattr(accelerator, "load_state", lambda path: (loaded.append(path), load_state(path)))
    path, state = checkpointer.resume("latest")
    assert state.step == 1 and path.name == "step_000001"
    assert loaded == [str(path)]

"""Parts of the training loop whose answers are known."""

import csv
import itertools
import json
import os
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from accelerate.state import AcceleratorState
from line import LineData, LineStep, line_config, line_loop
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from training import (
    Learner,
    MovingAverage,
    OptimizerConfig,
    ResumableBatchSampler,
    TrainVaeConfig,
    build_model,
    config_changes,
    derive_seed,
    initialize_from,
    learning_rate,
    list_checkpoints,
    make_accelerator,
    open_run,
    parse_config,
    resolve_precision,
    save_model,
)
from training.engine.config import to_plain
from training.engine.loss_spikes import StandstillWatch
from training.engine.sampling_order import training_batches

# Data order


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def test_every_epoch_sees_every_sample_once():
    keys = list(itertools.chain(*take(ResumableBatchSampler(7, 3, seed=1), 14)))  # 42 samples: six epochs of 7
    for epoch in range(6):
        assert sorted(index for e, index in keys if e == epoch) == list(range(7))
    orders = {tuple(index for e, index in keys if e == epoch) for epoch in range(6)}
    assert len(orders) == 6


def test_a_stream_goes_on_where_it_stopped():
    assert take(ResumableBatchSampler(7, 3, seed=1), 9)[4:] == take(ResumableBatchSampler(7, 3, seed=1, start=12), 5)


def test_processes_share_the_stream_of_one():
    one = take(ResumableBatchSampler(7, 4, seed=1), 5)
    two = [take(ResumableBatchSampler(7, 2, seed=1, process=p, processes=2), 5) for p in range(2)]
    assert one == [a + b for a, b in zip(*two, strict=True)]


def test_a_data_set_smaller_than_a_batch():
    assert [len(batch) for batch in take(ResumableBatchSampler(2, 5, seed=0), 3)] == [5, 5, 5]


def test_an_empty_data_set_is_named():
    with pytest.raises(ValueError, match="training set is empty"):
        ResumableBatchSampler(0, 4, seed=0)


class EpochData(Dataset):
    """Samples that tell their epoch, as random crops do."""

    epoch = -1

    def __len__(self):
        return 5

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return torch.tensor([self.epoch, index])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_know_the_epoch(workers):
    stream = ResumableBatchSampler(5, 2, seed=3, start=4)
    batches = training_batches(EpochData(), stream, workers=workers, collate=torch.stack, pin_memory=False)
    got = [[tuple(key) for key in batch.tolist()] for batch in itertools.islice(batches, 6)]
    assert got == take(stream, 6)


def test_seeds_differ_by_position():
    assert len({derive_seed(0, a, b) for a in range(10) for b in range(10)}) == 100
    assert derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)
    assert len({derive_seed(*(1, 0, 0, 0)[:count]) for count in (1, 2, 3, 4)}) == 4


# Optimization


def test_learning_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 24, config) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down the cosine
    assert rates[24] == pytest.approx(0.2)


def test_moving_average():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    nn.init.zeros_(model[0].weight)
    average = MovingAverage(model, decay=0.5)
    nn.init.ones_(model[0].weight)
    model[1].running_mean.fill_(7.0)
    average.update(model, updates=1)  # decay (1 + 1) / (10 + 1)
    assert average.module[0].weight.item() == pytest.approx(1 - 2 / 11)
    assert average.module[1].running_mean.item() == 7.0  # buffers are copied
    average.update(model, updates=1000)
    assert average.module[0].weight.item() == pytest.approx(1 - 2 / 11 * 0.5)


def test_the_loop_learns_and_leaves_its_files(tmp_path):
    loop, _ = line_loop(
        line_config(tmp_path, "--loop.checkpoint_every=20", "--loop.keep_checkpoints=2", "--loop.preview_every=30")
    )
    metrics = loop.run()
    assert metrics["error"] < 0.1
    run = tmp_path / "run"
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_000040", "step_000060"]
    assert [p.name for p in sorted((run / "previews").iterdir())] == ["preview_000030.png", "preview_000060.png"]
    assert json.loads((run / "metrics.json").read_text())["error"] == metrics["error"]
    assert list((run / "logs").glob("events*"))
    read = parse_config(TrainVaeConfig, ["--config", str(run / "config.yaml")])
    assert read == replace(loop.config, output=os.path.relpath(run))


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    ends = []
    for batch, parts in ((4, 1), (2, 2)):
        args = [
            f"--output={tmp_path / str(parts)}",
            f"--loop.batch_size={batch}",
            f"--optimizer.gradient_accumulation={parts}",
        ]
        loop, step = line_loop(line_config(tmp_path, *args, "--loop.max_steps=10"))  # its noise is drawn per sample
        loop.run()
        ends.append(step.line.network.weight.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path):
    loop, step = line_loop(line_config(tmp_path, "--loop.max_steps=10"), poison=(4, 7))
    loop.run()
    assert step.weights[5] == step.weights[4] and step.weights[8] == step.weights[7]
    assert step.weights[6] != step.weights[5]
    assert loop.state.skipped == 2 and loop.state.skipped_in_a_row == 0 and step.line.updates == 8
    assert json.loads((tmp_path / "run/metrics.json").read_text())["skipped"] == 2


def test_scalars_go_to_a_table_beside_tensorboard(tmp_path):
    args = ["--loop.max_steps=10", "--loop.trackers=[tensorboard, csv]", "--loop.validate_every=5"]
    loop, _ = line_loop(line_config(tmp_path, *args))
    metrics = loop.run()
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"step", "name", "value"}
    errors = {int(row["step"]): float(row["value"]) for row in rows if row["name"] == "validation/error"}
    assert list(errors) == [5, 10] and errors[10] == metrics["error"]
    losses = [row for row in rows if row["name"] == "train/loss"]
    assert [row["step"] for row in losses] == ["5", "10"] and list((tmp_path / "run/logs").glob("events*"))


def test_the_table_of_a_resumed_run_has_every_step_once(tmp_path):
    args = ["--loop.trackers=[csv]", "--loop.max_steps=10", "--loop.checkpoint_every=5", "--loop.log_every=1"]
    line_loop(line_config(tmp_path, *args))[0].run()
    whole = (tmp_path / "run/metrics.csv").read_text()
    shutil.rmtree(tmp_path / "run/checkpoints/step_000010")  # as if it had been killed at step 10
    AcceleratorState._reset_state(reset_partial_state=True)
    line_loop(line_config(tmp_path, *args, "--resume=latest"))[0].run()

    def steps(text):
        return [line.split(",")[:2] for line in text.splitlines()]

    assert steps((tmp_path / "run/metrics.csv").read_text()) == steps(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    line_loop(line_config(tmp_path, *args, "--resume=latest"))[0].run()  # of a run that had ended
    assert steps((tmp_path / "run/metrics.csv").read_text()) == steps(whole)


def test_trackers_that_cannot_work_are_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="loop.trackers: tensorbord is unknown; choose from csv, .*wandb.*Installed: csv, tensorboard"
    ):
        make_accelerator(line_config(tmp_path, "--loop.trackers=[tensorbord]"))
    with pytest.raises(
        ValueError, match="comet_ml is not installed: pip install comet-ml; or choose from csv, tensorboard"
    ):
        make_accelerator(line_config(tmp_path, "--loop.trackers=[csv, comet_ml]"))

    def locked(*_, **__):
        raise RuntimeError("no login")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", locked)
    match = "could not be started .RuntimeError: no login.; set it up, or remove it"
    with pytest.raises(ValueError, match=match), open_run(line_config(tmp_path), "train_vae.py", []):
        pytest.fail("began")


def test_a_loss_that_begins_late_is_averaged_over_its_own_steps(tmp_path, monkeypatch):
    loop, _step = line_loop(line_config(tmp_path, "--loop.max_steps=5"))
    logged, original = [], LineStep.__call__

    def late(self, batch, generators):
        losses = original(self, batch, generators)
        return losses | ({"late": torch.tensor(2.0)} if self.calls > 3 else {})  # in the last two of five steps

    monkeypatch.setattr(LineStep, "__call__", late)
    monkeypatch.setattr(loop.accelerator, "log", lambda values, step: logged.append(values))
    loop.run()
    assert logged[0]["train/late"] == 2


def test_the_norm_of_no_gradients_lies_where_the_others_do():
    """A discriminator that has not begun has none; PyTorch gives their norm on the CPU."""
    learner = Learner("idle", nn.Linear(1, 1), OptimizerConfig(), ema_decay=0.0, max_steps=1)
    learner.accelerator = SimpleNamespace(device=torch.device("meta"), scaler=None, unscale_gradients=lambda _: None)
    assert learner.update(0)[1].device.type == "meta"


def test_a_run_of_them_stops(tmp_path):
    loop, _ = line_loop(line_config(tmp_path, "--loop.max_skipped=3"), poison=range(5, 60))
    with pytest.raises(RuntimeError, match="step 8: gradients were not finite for 3 steps in a row.*learning_rate"):
        loop.run()


def test_compiled_code_is_run(tmp_path):
    """With generated code, not only traced: the same line is found, and nothing in the checkpoint is called
    otherwise."""
    ends, keys = [], []
    for compiled in ("false", "true"):
        args = [f"--output={tmp_path / compiled}", f"--loop.compile={compiled}", "--loop.max_steps=5"]
        loop, step = line_loop(line_config(tmp_path, *args))
        loop.run()
        ends.append(step.line.network.weight.item())
        keys.append(load_file(tmp_path / compiled / "checkpoints/step_000005/model.safetensors").keys())
    assert ends[1] == pytest.approx(ends[0], rel=1e-5) and keys[0] == keys[1] == {"weight"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_without_a_compiler_the_run_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing compiled earlier is found
    with pytest.raises(
        ValueError, match="torch.compile does not work here.*install a C.. compiler.*loop.compile: false"
    ):
        make_accelerator(line_config(tmp_path, "--loop.compile=true"))
    torch._dynamo.reset()


class SlowData(LineData):
    """Takes 20 ms a sample."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.learning_rate=1e-12", "no weight of line moved in 10 steps: nothing was learned"),
        ("loop.ema_decay=0.5", None),
    ],
)
def test_a_run_that_did_not_move_says_so(tmp_path, caplog, setting, said):
    loop, _ = line_loop(line_config(tmp_path, f"--{setting}", "--loop.max_steps=10", "--optimizer.algorithm=adamw"))
    with caplog.at_level("WARNING", logger="training"):
        loop.run()
    assert said in caplog.text if said else "moved" not in caplog.text


def test_frozen_weights_do_not_count_as_still(tmp_path):
    """A frozen layer's weights are not looked at; a trained one's are, to the last bit."""
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    network[0].requires_grad_(False)
    learner = Learner("two", network, OptimizerConfig(), ema_decay=0.5, max_steps=4)
    before = learner.checksums()
    with torch.no_grad():
        network[0].weight.add_(1)
    assert learner.checksums() == before
    with torch.no_grad():
        network[1].bias.add_(1e-6)
    assert learner.checksums()[0] != before[0] and learner.checksums()[1] == before[1]


def test_what_is_said_of_losses_at_the_end():
    def verdict(losses, moved=(True, True), steps=100, adversarial=False):
        watch = StandstillWatch()
        for loss in losses:
            watch.note(loss)
        return " ".join(watch.verdict(steps, {"vae": moved}, adversarial))

    falling, rising, flat = [1 - 0.02 * i for i in range(24)], [1 + 0.1 * i for i in range(24)], [0.3] * 24
    noisy = [0.3 + 0.2 * (-1) ** i for i in range(24)]
    assert verdict(falling) == verdict(noisy) == verdict(rising[:8]) == verdict(rising, adversarial=True) == ""
    assert "the loss was 0.3 in all 24 reports" in verdict(flat)
    assert "the loss rose from 1.25 in the first quarter of the run to 3.05" in verdict(rising)
    assert "no weight of vae moved in 100 steps" in verdict(falling, moved=(False, False))
    assert "the averaged weights of vae" in verdict(falling, moved=(True, False))
    assert verdict(flat, moved=(False, False), steps=0) == ""  # a resume of a run that had ended
    assert verdict([-1.0, -2.0] * 12) == ""  # an adversary's part may be below 0


@pytest.mark.parametrize(("data", "low", "high"), [(LineData, 0, 0.7), (SlowData, 0.8, 1)])
def test_waiting_for_data_is_measured(tmp_path, monkeypatch, data, low, high):
    loop, _ = line_loop(line_config(tmp_path, "--loop.max_steps=10"))
    loop.data, logged = data(), []
    monkeypatch.setattr(loop.accelerator, "log", lambda values, step: logged.append(values))
    loop.run()
    waits = [values["train/data_wait"] for values in logged if "train/data_wait" in values]
    assert len(waits) == 2 and low < waits[1] < high


# Configs and models


def test_config_names_what_is_wrong(tmp_path):
    for argument, said in (
        ("--loop.max_stepz=3", "loop.max_stepz: is not a setting; did you mean loop.max_steps?"),
        ("--loop.batch_size=many", "loop.batch_size: got 'many' (text), expected a whole number, 1 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            line_config(tmp_path, argument)


def test_config_changes(tmp_path):
    old, new = line_config(tmp_path, "--loop.seed=1"), line_config(tmp_path, "--loop.seed=2", "--resume=latest")
    assert config_changes(to_plain(old), old) == {}
    assert config_changes(to_plain(old), new) == {"loop.seed": "1 -> 2"}
    earlier = to_plain(old)  # of a version that knew another setting, and not yet `timeout_minutes`
    del earlier["loop"]["timeout_minutes"]
    assert config_changes(earlier | {"gone": 1}, old) == {"gone": "1 -> (absent)"}
    slower = line_config(tmp_path, "--loop.seed=1", "--loop.timeout_minutes=5")
    assert config_changes(earlier, slower) == {"loop.timeout_minutes": "(absent) -> 5.0"}


def test_precision():
    assert resolve_precision("fp16") == "fp16"
    assert resolve_precision("auto") in ("bf16", "no")


VAE = {"class": "autoencoder.AutoencoderKL3D", "channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}


def test_model_section():
    assert build_model(VAE).config.channels == [4, 8]
    with pytest.raises(ValueError, match="chanels"):
        build_model(VAE | {"chanels": [4, 8]})
    with pytest.raises(ValueError, match="latent_channels"):
        build_model(VAE | {"latent_channels": "four"})
    with pytest.raises(ValueError, match="autoencoder.Missing"):
        build_model({"class": "autoencoder.Missing"})
    with pytest.raises(ValueError, match="needs `class"):
        build_model({"channels": [4, 8]})


def test_init_from_keeps_all_but_the_changed_layers(tmp_path):
    trained = build_model(VAE)
    save_model(trained, tmp_path / "vae")
    model = build_model(VAE | {"in_channels": 2})
    before = model.encoder[0].bias.clone()
    assert initialize_from(model, tmp_path / "vae") == ["encoder.0"]
    assert torch.equal(model.encoder[0].bias, before)  # of a changed layer nothing is kept
    for key, tensor in model.state_dict().items():
        if not key.startswith("encoder.0."):
            assert torch.equal(tensor, trained.state_dict()[key]), key


def test_init_from_names_what_does_not_fit(tmp_path):
    save_model(build_model(VAE), tmp_path / "vae")
    with pytest.raises(ValueError, match="another architecture"):
        initialize_from(build_model(VAE | {"decoder_blocks": [1, 2]}), tmp_path / "vae")
    with pytest.raises(ValueError, match="no .safetensors file there"):
        initialize_from(build_model(VAE), tmp_path)

"""An average of any length, computed after the training from snapshots of two, is the one that the training would have
kept."""

import json

import numpy as np
import pytest
import torch
from line import LineStep, fresh_accelerate, line_config, line_loop  # noqa: F401
from torch import nn

from cli.command import CannotContinue
from training.engine.averages.power import STORED, MovingAverage, coefficients, overlaps, power_of
from training.engine.averages.snapshots import Snapshots
from training.engine.validation.lengths import choose_length


def profile(time: int, length: float, steps: int) -> np.ndarray:
    """The weight of each of `steps` steps in the average of this length after `time` updates, by its definition."""
    power, weights = power_of(length), np.zeros(steps)
    for update in range(1, time + 1):
        decay = (1 - 1 / update) ** (power + 1)
        weights *= decay
        weights[update - 1] += 1 - decay
    return weights


def test_overlaps_are_integrals_of_products():
    times, lengths = [300.0, 700.0, 1000.0], [0.05, 0.1, 0.2]
    grid = (np.arange(2_000_000) + 0.5) / 2000
    curves = []
    for time, length in zip(times, lengths, strict=True):
        power = power_of(length)
        curves.append(np.where(grid < time, (power + 1) * (grid / time) ** power / time, 0))
    found = overlaps(times, [power_of(one) for one in lengths], times, [power_of(one) for one in lengths])
    assert found == pytest.approx(np.array([[(one * two).sum() / 2000 for two in curves] for one in curves]), rel=1e-4)


@pytest.mark.parametrize(
    ("length", "most"), [(0.03, 0.11), (0.04, 0.04), (0.05, 1e-6), (0.08, 0.02), (0.1, 1e-6), (0.15, 0.04), (0.2, 0.09)]
)
def test_any_length_is_rebuilt_from_eight_snapshots_of_two(length, most):
    """The relative error of the weight of each step is small; at the stored lengths there is none."""
    steps = 800
    stored = [(100 * (k + 1), one) for k in range(8) for one in STORED]
    shares = coefficients([time for time, _ in stored], [one for _, one in stored], steps, length)
    rebuilt = sum(share * profile(time, one, steps) for share, (time, one) in zip(shares, stored, strict=True))
    wanted = profile(steps, length, steps)
    assert shares.sum() == pytest.approx(1, abs=1e-9) and rebuilt.sum() == pytest.approx(1, abs=1e-6)
    error = np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted)
    assert error < most, error


class Walk:
    """A learner whose network walks at random."""

    def __init__(self, network: nn.Module):
        self.network, self.updates = network, 0
        self.tracked = {length: MovingAverage(network, 0.0, length) for length in STORED}


class Alone:
    is_main_process = True

    def wait_for_everyone(self):
        pass


def test_weights_are_those_of_a_brute_force_average(tmp_path):
    """Of a random walk, against the average over all of its steps. A buffer is the newest; frozen weights stay out."""
    torch.manual_seed(0)
    network = nn.BatchNorm1d(40)
    network.bias.requires_grad_(False)
    learner, steps = Walk(network), 400
    snapshots = Snapshots(Alone(), learner, tmp_path, 8, steps)
    lengths = (0.04, 0.1, 0.16)
    brute = {length: MovingAverage(network, 0.0, length) for length in lengths}
    for step in range(1, steps + 1):
        with torch.no_grad():
            network.weight.add_(torch.randn(40), alpha=0.05)
            network.running_mean.fill_(step)
        learner.updates += 1
        for average in (*learner.tracked.values(), *brute.values()):
            average.update(network, step)
        if snapshots.is_due(step):
            snapshots.take(step)
    assert [one.step for one in snapshots.stored()] == [step for step in range(50, 401, 50) for _ in STORED]
    size = sum(path.stat().st_size for path in (tmp_path / "snapshots").iterdir())
    assert size < 2 * 8 * (4 * 40 * 3 + 1000)  # two copies of each, and a header
    for length in lengths:
        rebuilt, expected = snapshots.average_of(length), brute[length].module
        assert set(rebuilt) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
        spread = (expected.weight - network.weight).abs().mean()
        assert (rebuilt["weight"] - expected.weight).abs().mean() < 0.06 * spread + 1e-5
        assert rebuilt["weight"].dtype == torch.float32 and (rebuilt["running_mean"] == steps).all()


def test_a_run_leaves_the_length_that_validates_best(tmp_path):
    """The weights it leaves are those of the length with the smallest error, as metrics.json says."""
    words = ["--loop.ema_snapshots=6", "--loop.export=posthoc", "--loop.ema_lengths=[0.05, 0.1, 0.25]"]
    words += ["--loop.validate_every=20", "--loop.checkpoint_every=20", "--loop.previews=0"]
    loop, step = line_loop(line_config(tmp_path, *words), noise=0.5)
    loop.run()
    output = tmp_path / "run"
    assert len(list((output / "snapshots").iterdir())) == 12
    written = json.loads((output / "metrics.json").read_text())
    found = written["lengths"]
    chosen = found.pop("chosen")
    assert written["error"] == min(found.values())  # of the average that is left
    assert set(found) == {"0.05", "0.1", "0.25"} and found[f"{chosen:g}"] == min(found.values())
    assert loop.measurements.validate()["error"] == pytest.approx(min(found.values()))
    expected = loop.snapshots.average_of(chosen)["weight"]
    assert torch.equal(step.line.average.weight, expected)
    for length, average in step.line.tracked.items():
        assert loop.snapshots.average_of(length)["weight"].item() == pytest.approx(average.module.weight.item())


def test_a_resumed_run_has_the_same_averages_and_snapshots(tmp_path):
    words = ["--loop.ema_snapshots=6", "--loop.validate_every=0", "--loop.checkpoint_every=25", "--loop.previews=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop, step = line_loop(line_config(whole, *words))
    loop.run()
    loop, _ = line_loop(line_config(parts, *words))
    loop.run()
    for newer in (parts / "run" / "checkpoints").glob("step_000060"):  # as if it had been killed after step 55
        newer.rename(newer.with_name("gone"))
    resumed, again = line_loop(line_config(parts, *words, "--resume=latest"))
    assert resumed.state.step == 50
    assert {one.step for one in resumed.snapshots.stored()} == {10, 20, 30, 40, 50}
    resumed.run()
    for length in STORED:
        assert torch.equal(again.line.tracked[length].module.weight, step.line.tracked[length].module.weight)
    files = [sorted((folder / "run" / "snapshots").iterdir()) for folder in (whole, parts)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 12


POSTHOC = ["--loop.ema_snapshots=6", "--loop.ema_lengths=[0.05, 0.25]", "--loop.previews=0", "--resume=latest"]
POSTHOC += ["--loop.validate_every=60", "--loop.checkpoint_every=60"]


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("*", r"step_000010_0.05.safetensors, step_000010_0.10.safetensors, .* and 8 more"),
        ("step_000030_0.10*", "lacks step_000030_0.10.safetensors, which the run stored"),
    ],
)
def test_snapshots_that_are_gone_are_named(gone, named, tmp_path):
    """Without them every length would be rebuilt from others, and be another average."""
    loop, _ = line_loop(line_config(tmp_path, *POSTHOC))
    loop.run()
    assert loop.state.snapshots == [10, 20, 30, 40, 50, 60]
    for path in (tmp_path / "run" / "snapshots").glob(gone):
        path.unlink()
    again, _ = line_loop(line_config(tmp_path, *POSTHOC, "--loop.export=posthoc"))
    with pytest.raises(CannotContinue, match=named):
        again.run()


def test_a_longer_run_has_the_snapshots_of_the_shorter_one(tmp_path):
    """Which were due at other steps than those of a run of its length."""
    line_loop(line_config(tmp_path, *POSTHOC))[0].run()
    longer = line_config(tmp_path, *POSTHOC, "--loop.max_steps=90", "--loop.export=posthoc", "--accept_changes=true")
    loop, _ = line_loop(longer)
    loop.run()
    assert loop.state.snapshots == [10, 20, 30, 40, 50, 60, 75, 90]


def test_a_metric_that_no_item_has_is_not_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(LineStep, "metrics", {"error": False, "error/rare": False})
    loop, _ = line_loop(line_config(tmp_path, *POSTHOC, "--loop.export=posthoc", "--loop.best_by=error/rare"))
    with pytest.raises(CannotContinue, match="loop.best_by error/rare: none of the held-out items has it.* error$"):
        loop.run()
    with pytest.raises(CannotContinue, match="none of the held-out items has it"):
        choose_length(loop.measurements, loop.snapshots)


def test_what_cannot_be_chosen_is_refused(tmp_path):
    config = line_config(tmp_path / "a", "--loop.export=posthoc", "--loop.previews=0", "--loop.validate_every=20")
    with pytest.raises(ValueError, match="loop.export posthoc: needs loop.ema_snapshots above 0"):
        line_loop(config)
    plain = ["--loop.previews=0", "--loop.validate_every=0", "--loop.checkpoint_every=20"]
    loop, _ = line_loop(line_config(tmp_path / "b", *plain))
    loop.run()
    later = line_config(tmp_path / "b", *plain, "--resume=latest", "--loop.ema_snapshots=4", "--accept_changes=true")
    with pytest.raises(ValueError, match="was written without loop.ema_snapshots"):
        line_loop(later)
    empty = Snapshots(Alone(), Walk(nn.Linear(1, 1)), tmp_path, 4, 10)
    with pytest.raises(CannotContinue, match="there are no snapshots"):
        empty.average_of(0.1)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "step_000001_0.05.safetensors").write_bytes(b"no")
    with pytest.raises(CannotContinue, match="step_000001_0.05.safetensors: is not a snapshot, or damaged"):
        empty.average_of(0.1)


def test_a_run_without_snapshots_writes_no_more_than_before(tmp_path):
    loop, step = line_loop(line_config(tmp_path, "--loop.previews=0", "--loop.checkpoint_every=20"))
    loop.run()
    assert not step.line.tracked and not (tmp_path / "run" / "snapshots").exists()
    assert not list((tmp_path / "run").rglob("*power*"))


def test_the_kernel_distance_chooses_if_it_is_asked_for(tmp_path, monkeypatch):
    """A step that generates is asked for samples; the length whose samples are nearest is left."""
    generates = {
        "distance": "kernel_distance",
        "max_samples": 4,
        "sample": lambda step, item, number, count, generator: step.line.average.weight.item(),
        "compare": lambda step, rows: {"kernel_distance": abs(sum(rows) / len(rows) - 1.0)},
    }
    for name, value in generates.items():
        monkeypatch.setattr(LineStep, name, value, raising=False)
    words = ["--loop.ema_snapshots=6", "--loop.export=posthoc", "--loop.ema_lengths=[0.05, 0.25]", "--loop.previews=0"]
    words += ["--loop.best_by=kernel_distance", "--loop.sample_every=30", "--loop.sample_volumes=4"]
    config = line_config(tmp_path, *words)
    loop, step = line_loop(config, items=4)
    loop.run()
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["lengths"]
    assert found.pop("chosen") == 0.25  # the weight goes from below 1 to 3, so the older it is the nearer
    weights = {length: loop.snapshots.average_of(length)["weight"].item() for length in (0.05, 0.25)}
    assert found == {f"{length:g}": pytest.approx(abs(weight - 1)) for length, weight in weights.items()}
    assert step.line.average.weight.item() == pytest.approx(weights[0.25])

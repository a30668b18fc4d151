"""A training of a line: a step whose answers are known by hand."""

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from accelerate.state import AcceleratorState
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.utils.data import Dataset

from training import (
    Learner,
    Loop,
    TrainVaeConfig,
    make_accelerator,
    parse_config,
)
from training.engine.averages.power import STORED
from training.engine.tracking import start_trackers


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process; every test makes its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class LineData(Dataset):
    """Points of y = 3 x."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.tensor([index / 8])
        return {"x": x, "y": 3 * x}


class LineStep:
    """Least squares; `poison` lists the calls whose loss is NaN."""

    metrics = {"error": False}

    def __init__(self, learner, poison=(), noise=0.01):
        self.line, self.learners, self.poison, self.noise, self.calls = learner, (learner,), set(poison), noise, 0
        self.weights = []

    def __call__(self, batch, generators):
        noise = randn_tensor(batch["x"].shape, generator=generators) * self.noise
        loss = ((self.line.model(batch["x"] + noise) - batch["y"]) ** 2).mean()
        if self.calls in self.poison:
            loss = loss * float("nan")
        self.calls += 1
        self.line.backward(loss)
        self.weights.append(self.line.network.weight.detach().clone())
        return {"loss": loss.detach()}

    def after_update(self, taken):
        self.taken = [*getattr(self, "taken", []), taken]

    def review(self, values):
        return []

    def validate(self, item, generator):
        return {"error": (self.line.average(item["x"]) - item["y"]).abs().item()}

    def preview(self, items):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([i["x"].item() for i in items], [i["y"].item() for i in items])
        return figure


def line_config(tmp_path, *args):
    """A run's config; the data and the model sections are not used."""
    base = ["--output", str(tmp_path / "run"), "--data.phantom.count=8", "--model={class: torch.nn.Linear}"]
    base += ["--loop.batch_size=3", "--loop.max_steps=60", "--loop.mixed_precision=no", "--loop.log_every=5"]
    base += ["--optimizer.learning_rate=0.1", "--optimizer.warmup_steps=2", "--loop.ema_decay=0.8"]
    return parse_config(TrainVaeConfig, [*base, *args])


def line_loop(config, items=3, **options):
    accelerator = make_accelerator(config)
    start_trackers(accelerator, config.loop)
    torch.manual_seed(0)
    learner = Learner(
        "line",
        nn.Linear(1, 1, bias=False),
        config.optimizer,
        ema_decay=config.loop.ema_decay,
        max_steps=config.loop.max_steps,
        tracked=STORED if config.loop.ema_snapshots else (),
    )
    step = LineStep(learner, **options)
    return Loop(accelerator, config, step, LineData(), [LineData()[i] for i in range(items)]), step

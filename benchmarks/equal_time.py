"""Compare autoencoders trained for equal time on equal patches with equal losses, on held-out volumes.

Part of `python -m benchmarks.speed.run`. Alone:

    python -m benchmarks.equal_time --minutes 6 --model maisi --output out/bench
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat

LEARNING_RATES = {"ours": (1e-3,), "monai": (1e-3, 1e-4), "maisi": (1e-3, 1e-4)}


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(LEARNING_RATES), required=True)
    parser.add_argument("--minutes", type=Number(PositiveFloat), default=6.0, help="minutes of training (6)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--data.root", dest="root", help="folder of the volumes; default: that of the config")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder import gradient_loss, kl_loss, l1_loss, mse_loss
from benchmarks.speed.jobs import autocast, build_autoencoder
from benchmarks.speed.measure import Work
from benchmarks.speed.models import (
    STRIDE,
    decode,
    encode,
    parameters,
    posterior,
)
from training import AutoencoderLosses, CropConfig, TrainVaeConfig, parse_config
from training.splits import PaddedVolumes, load_split
from volumes import CropDataset, DataConfig, PhantomConfig, VolumeDataset
from volumes.devices import find_device

CONFIG = "configs/hippocampus/vae.yaml"
WARMUP = 0.03  # of the time
# Ours: its config's rate. Peers: 1e-4 from MAISI's and MONAI's tutorials, and ours; the better one after this part of
# the time.
PILOT = 0.25
FINAL_RATE = 0.01  # part of the highest learning rate


def load(
    phantoms: bool, root: str | None = None
) -> tuple[VolumeDataset, VolumeDataset, CropConfig, AutoencoderLosses, int]:
    """Load training and held-out volumes, patches, loss weights and batch size of configs/hippocampus/vae.yaml.

    Args:
        phantoms: use phantoms instead of the volumes, for a quick test.
        root: folder of the volumes; default: that of the config.
    """
    config = parse_config(TrainVaeConfig, ["--config", CONFIG, *([f"--data.root={root}"] if root else [])])
    if phantoms:
        data = DataConfig(phantom=PhantomConfig(count=4, shape=(16, 16, 16)), validation_fraction=0.5)
        crops, config.loop.batch_size = CropConfig(shape=(16, 16, 16)), 1
    else:
        data, crops = config.data, config.crops
    train, held_out = load_split(data)
    assert held_out is not None
    return train, held_out, crops, config.losses, config.loop.batch_size


def training(
    model: str,
    minutes: float,
    device: str,
    precision: str,
    folder: str,
    *,
    root: str | None = None,
    phantoms: bool = False,
) -> Work:
    """Train `model` for `minutes`, save its weights to `folder`, and measure PSNR on validation volumes.

    Several learning rates each run for the first quarter of the time; the one with the higher PSNR continues to the
    end. Validation time does not count.
    """
    torch.manual_seed(0)
    train, held_out, crops, weights, batch_size = load(phantoms, root)
    dataset = CropDataset(train, crops.shape, seed=0, flip_axes=crops.flip_axes)
    volumes = PaddedVolumes(held_out, (STRIDE, STRIDE, STRIDE))
    first = build_autoencoder(model, device, "tf32" if device.startswith("cuda") else "float32", training=True)

    def run() -> dict[str, object]:
        trials = {}
        for rate in LEARNING_RATES[model]:
            trial = Run(copy.deepcopy(first), rate, 60 * minutes, device, precision, weights)
            trial.train(batches(dataset, batch_size), PILOT if len(LEARNING_RATES[model]) > 1 else 1.0)
            trials[rate] = (psnr(trial.net, volumes, device), trial)
        best = max(trials, key=lambda rate: trials[rate][0])
        winner = trials[best][1]
        if len(trials) > 1:
            winner.train(batches(dataset, batch_size, seed=1), 1.0)
        path = Path(folder) / f"{model.replace(' ', '_')}.safetensors"
        save_file({name: t.contiguous().cpu() for name, t in winner.net.state_dict().items()}, path)
        return {
            "psnr_db": psnr(winner.net, volumes, device),
            "steps": winner.steps,
            "seconds": winner.seconds,
            "learning_rate": best,
            "pilot_psnr_db": {str(rate): value for rate, (value, _) in trials.items()},
            "weights": path.name,
        }

    data = "phantoms" if phantoms else CONFIG
    known = {
        "data": data,
        "training_volumes": len(train),
        "held_out_volumes": len(held_out),
        "threads": torch.get_num_threads(),
    }
    return Work(run, {"parameters": parameters(first), "crops": list(crops.shape), "batch": batch_size, **known})


class Run:
    """A training run whose learning rate follows the clock: linear warm-up, then half a cosine."""

    def __init__(
        self, net: nn.Module, rate: float, limit: float, device: str, precision: str, weights: AutoencoderLosses
    ) -> None:
        self.net, self.rate, self.limit, self.weights = net, rate, limit, weights
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.seconds, self.steps = 0.0, 0

    def train(self, stream: Iterator[dict[str, Tensor]], until: float) -> None:
        """Train until the share `until` of the time is used."""
        self.net.train()
        with tqdm(total=round(until * self.limit), unit="s", desc=f"lr {self.rate:g}", disable=None) as bar:
            while self.seconds < until * self.limit:
                start = time.perf_counter()
                batch = next(stream)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * schedule(self.seconds / self.limit)
                with autocast(self.device, self.precision):
                    loss = losses(self.net, batch["image"].to(self.device), batch["fov"].to(self.device), self.weights)
                loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize()
                self.seconds += time.perf_counter() - start
                self.steps += 1
                bar.update(round(self.seconds) - bar.n)


def schedule(used: float) -> float:
    """Return the learning rate as a share of its maximum, when the share `used` of the time is used."""
    if used < WARMUP:
        return max(used / WARMUP, 0.02)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (used - WARMUP) / (1 - WARMUP))))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def losses(net: nn.Module, image: Tensor, fov: Tensor, weights: AutoencoderLosses) -> Tensor:
    """Compute the losses of train_vae.py for any of the autoencoders."""
    encoded = posterior(net, image)
    decoded = decode(net, encoded.sample()).float()
    parts = ((weights.l1, l1_loss), (weights.mse, mse_loss), (weights.gradient, gradient_loss))
    return weights.kl * kl_loss(encoded, fov) + sum(weight * loss(decoded, image, fov) for weight, loss in parts)


def batches(dataset: CropDataset, size: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield batches of random patches endlessly, the same for every model."""
    random = torch.Generator().manual_seed(seed)
    epoch = 1000 * seed
    while True:
        dataset.set_epoch(epoch)
        for indices in torch.randperm(len(dataset), generator=random).split(size):
            items = [dataset[int(i)] for i in indices]
            yield {key: torch.stack([item[key] for item in items]) for key in ("image", "fov")}
        epoch += 1


@torch.inference_mode()
def psnr(net: nn.Module, volumes: PaddedVolumes, device: str) -> float:
    """Return the mean PSNR in dB of whole volumes inside the field of view, for intensities in [0, 1]."""
    net.eval()
    values = []
    for item in volumes:
        image, fov = item["image"][None].to(device), item["fov"][None].to(device)
        mse = mse_loss(decode(net, encode(net, image)).clamp(-1, 1), image, fov).item() / 4  # from [-1, 1] to [0, 1]
        values.append(10 * math.log10(1 / max(mse, 1e-10)))
    return sum(values) / len(values)


def main(args: Sequence[str] | None = None) -> None:
    """Train one model and print its figures."""
    options = parse(args)
    options.output.mkdir(parents=True, exist_ok=True)
    find_device(options.device)  # raises if unknown
    sizes = (options.model, options.minutes, options.device, options.precision)
    work = training(*sizes, str(options.output), root=options.root)
    print(json.dumps({**work.facts, **(work.run() or {})}, indent=2))

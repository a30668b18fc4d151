"""Autoencoders trained for the same time on the same crops with the same loss:  who reconstructs held-out volumes best?

Part of `python -m benchmarks.speed.run`; by itself:  python -m benchmarks.equal_time --minutes 6 --model maisi --output
out/bench
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat

LEARNING_RATES = {"ours": (1e-3,), "monai": (1e-3, 1e-4), "maisi": (1e-3, 1e-4)}


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(LEARNING_RATES), required=True)
    parser.add_argument("--minutes", type=Number(PositiveFloat), default=6.0, help="of training (6)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
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
# Ours: its config's. Peers: MAISI's and MONAI's tutorials' 1e-4, and ours; a quarter of the time decides.
WARMUP, PILOT, FINAL_RATE = 0.03, 0.25, 0.01


def load(phantoms: bool) -> tuple[VolumeDataset, VolumeDataset, CropConfig, AutoencoderLosses, int]:
    """Training volumes, held-out ones, crops, weights of the losses and batch size of configs/hippocampus/vae.yaml;
    phantoms instead of its volumes for a quick look."""
    config = parse_config(TrainVaeConfig, ["--config", CONFIG])
    if phantoms:
        data = DataConfig(phantom=PhantomConfig(count=4, shape=(16, 16, 16)), validation_fraction=0.5)
        crops, config.loop.batch_size = CropConfig(shape=(16, 16, 16)), 1
    else:
        data, crops = config.data, config.crops
    train, held_out = load_split(data)
    assert held_out is not None
    return train, held_out, crops, config.losses, config.loop.batch_size


def training(model: str, minutes: float, device: str, precision: str, folder: str, *, phantoms: bool = False) -> Work:
    """Train `model` for `minutes`, save its weights to `folder`, and give its PSNR on held-out volumes (never the
    test split).

    Where several learning rates are to be tried, each runs the first quarter of the time, and the better one (by
    PSNR) goes on to the end. Validation is not on the clock.
    """
    torch.manual_seed(0)
    train, held_out, crops, weights, batch_size = load(phantoms)
    dataset = CropDataset(train, crops.shape, seed=0, flip_axes=crops.flip_axes)
    volumes = PaddedVolumes(held_out, (STRIDE, STRIDE, STRIDE))
    first = build_autoencoder(model, device, "tf32" if device.startswith("cuda") else "float32", training=True)

    def run() -> dict[str, Any]:
        tried = {}
        for rate in LEARNING_RATES[model]:
            trial = Run(copy.deepcopy(first), rate, 60 * minutes, device, precision, weights)
            trial.go_on(batches(dataset, batch_size), PILOT if len(LEARNING_RATES[model]) > 1 else 1.0)
            tried[rate] = (psnr(trial.net, volumes, device), trial)
        best = max(tried, key=lambda rate: tried[rate][0])
        winner = tried[best][1]
        if len(tried) > 1:
            winner.go_on(batches(dataset, batch_size, seed=1), 1.0)
        path = Path(folder) / f"{model.replace(' ', '_')}.safetensors"
        save_file({name: t.contiguous().cpu() for name, t in winner.net.state_dict().items()}, path)
        return {
            "psnr_db": psnr(winner.net, volumes, device),
            "steps": winner.steps,
            "seconds": winner.seconds,
            "learning_rate": best,
            "pilot_psnr_db": {str(rate): value for rate, (value, _) in tried.items()},
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

    def go_on(self, stream: Iterator[dict[str, Tensor]], until: float) -> None:
        """Train until `until` of the time is used."""
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
    """Part of the highest learning rate when `used` (0 to 1) of the time is used."""
    if used < WARMUP:
        return max(used / WARMUP, 0.02)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (used - WARMUP) / (1 - WARMUP))))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def losses(net: nn.Module, image: Tensor, fov: Tensor, weights: AutoencoderLosses) -> Tensor:
    """As train_vae.py's, for any of the autoencoders."""
    encoded = posterior(net, image)
    decoded = decode(net, encoded.sample()).float()
    parts = ((weights.l1, l1_loss), (weights.mse, mse_loss), (weights.gradient, gradient_loss))
    return weights.kl * kl_loss(encoded, fov) + sum(weight * loss(decoded, image, fov) for weight, loss in parts)


def batches(dataset: CropDataset, size: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Random crops without end, the same for every model."""
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
    """Mean PSNR in dB of whole volumes, inside the field of view, of intensities in [0, 1]."""
    net.eval()
    values = []
    for item in volumes:
        image, fov = item["image"][None].to(device), item["fov"][None].to(device)
        mse = mse_loss(decode(net, encode(net, image)).clamp(-1, 1), image, fov).item() / 4  # from [-1, 1] to [0, 1]
        values.append(10 * math.log10(1 / max(mse, 1e-10)))
    return sum(values) / len(values)


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    options.output.mkdir(parents=True, exist_ok=True)
    find_device(options.device)  # or it is refused
    work = training(options.model, options.minutes, options.device, options.precision, str(options.output))
    print(json.dumps(work.facts | dict(work.run() or {}), indent=2))

"""Measure the gain of each optimization, and of those that were tried and dropped.

    python -m benchmarks.speed.choices --output out/bench/choices.json

Each optimization is timed on and off, in turns, at the sizes of the shipped models; times are medians. CPU, float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=Number(PositiveInt), default=15, help="timed runs of each (15)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import AutoencoderKL3D
from autoencoder.layers import ChannelRMSNorm, Conv3d
from diffusion import LatentUNet3D, fold_mask
from diffusion.folding import FoldedMaskEmbedding
from evaluation.report import check_report, provenance, write_report


@dataclass(frozen=True)
class Choice:
    """Two versions of the same work; `kept` tells whether the code uses `chosen`."""

    name: str
    case: str
    without: Callable[[], Any]
    chosen: Callable[[], Any]
    kept: bool = True


def main(args: Sequence[str] | None = None) -> dict[str, object]:
    """Time all choices, write the report and return it."""
    options = parse(args)
    check_report(options.output)
    torch.manual_seed(0)
    rows = []
    for choice in (*inference(), *training()):
        without, chosen = milliseconds((choice.without, choice.chosen), options.repeats)
        rows.append(
            {
                "choice": choice.name,
                "case": choice.case,
                "kept": choice.kept,
                "without_ms": without,
                "with_ms": chosen,
            }
        )
        verdict = "kept" if choice.kept else "dropped"
        print(f"{choice.name} ({choice.case}): {without:.2f} -> {chosen:.2f} ms, {verdict}", flush=True)
    report = {"benchmark": "choices", "choices": rows, **provenance()}
    write_report(options.output, report)
    return report


def milliseconds(works: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the median time of each, after two untimed runs, taking turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 2):
        for work, seconds in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return [round(1000 * statistics.median(seconds[2:]), 3) for seconds in times]


def volume(channels: int, grid: Sequence[int], batch: int = 1) -> Tensor:
    """Return a random (B, C, h, w, d) tensor in channels_last_3d."""
    return torch.randn(batch, channels, *grid).contiguous(memory_format=torch.channels_last_3d)


def no_grad(work: Callable[[], Any]) -> Callable[[], Any]:
    """Disable gradients for `work`."""
    return torch.no_grad()(work)


def inference() -> Iterator[Choice]:
    """Yield the choices for inference: kernels, norms, memory format, streaming, the mask."""
    # the U-Net's two levels and the decoder's two levels for a volume of 36 x 52 x 36 voxels
    for channels, grid in ((64, (9, 13, 9)), (160, (5, 7, 5)), (128, (9, 13, 9)), (32, (18, 26, 18))):
        conv: Any = Conv3d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        x = volume(channels, grid)
        yield Choice(
            "oneDNN by name for one small volume",
            f"3^3 convolution, {channels} channels, {shape(grid)} cells",
            no_grad(lambda conv=conv, x=x: F.conv3d(x, conv.weight, conv.bias, padding=1)),
            no_grad(lambda conv=conv, x=x: conv(x)),
        )
    for channels, grid in ((32, (64, 64, 64)), (128, (32, 32, 32)), (128, (9, 13, 9))):
        norm, x = ChannelRMSNorm(channels), volume(channels, grid)
        rows, weight = x.permute(0, 2, 3, 4, 1), norm.weight
        case = f"{channels} channels, {shape(grid)} cells"
        stock = no_grad(lambda rows=rows, weight=weight: F.rms_norm(rows, (rows.shape[-1],), weight, 1e-6))
        ours = no_grad(lambda norm=norm, x=x: norm(x))
        yield Choice("RMSNorm in two passes over memory", case, stock, ours)
        yield Choice(
            "RMSNorm in parts that fit the cache",
            case,
            ours,
            no_grad(lambda r=rows, w=weight: norm_in_parts(r, w)),
            False,
        )
        yield Choice(
            "SiLU in place after the norm",
            case,
            no_grad(lambda norm=norm, x=x: F.silu(norm(x))),
            no_grad(lambda norm=norm, x=x: F.silu(norm(x), inplace=True)),
            False,
        )
    vae, latents = AutoencoderKL3D().eval(), volume(4, (16, 16, 16))
    plain: Any = AutoencoderKL3D().eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    yield Choice(
        "channels_last_3d",
        "decoding 64^3 voxels",
        no_grad(lambda: plain.decode(latents.contiguous())),
        no_grad(lambda: vae.decode(latents)),
    )
    large = volume(4, (32, 32, 32))
    for planes in (2, 8):
        yield Choice(
            f"streaming in slabs of {planes} of 32 planes (for memory, not for time)",
            "decoding 128^3 voxels",
            no_grad(lambda: vae.decode(large)),
            no_grad(lambda planes=planes: streamed(vae, large, planes)),
        )
    unet = LatentUNet3D(num_labels=3).eval()
    noise, ids = volume(4, (9, 13, 9)), folded(1)
    embedded = unet.embed_mask(ids).detach()
    yield Choice(
        "the mask embedded once, not at every step",
        "U-Net, 9 x 13 x 9 cells",
        no_grad(lambda: unet(noise, 500.0, ids)),
        no_grad(lambda: unet(noise, 500.0, embedded)),
    )


def training() -> Iterator[Choice]:
    """Yield the choices for training: forward and backward."""
    embedding, ids = FoldedMaskEmbedding(3, 64, 32), folded(8)
    bag = nn.EmbeddingBag(3 * 64 + 1, 32, mode="sum", padding_idx=0)

    def there_and_back(work: Callable[[], Tensor], *modules: nn.Module) -> None:
        work().square().sum().backward()
        for module in modules:
            module.zero_grad()

    yield Choice(
        "few labels embedded by one product, not by EmbeddingBag",
        "batch of 8 x 9 x 13 x 9 cells, there and back",
        lambda: there_and_back(lambda: bag(ids.flatten(0, 3)), bag),
        lambda: there_and_back(lambda: embedding(ids), embedding),
    )
    for channels, grid in ((32, (18, 26, 18)), (128, (9, 13, 9))):
        norm, x = ChannelRMSNorm(channels), volume(channels, grid, 2).requires_grad_()
        rows, weight = x.permute(0, 2, 3, 4, 1), norm.weight
        yield Choice(
            "RMSNorm in two passes over memory",
            f"{channels} channels, 2 x {shape(grid)} cells, there and back",
            lambda rows=rows, weight=weight: there_and_back(lambda: F.rms_norm(rows, (rows.shape[-1],), weight, 1e-6)),
            lambda norm=norm, x=x: there_and_back(lambda: norm(x)),
        )


def norm_in_parts(rows: Tensor, weight: Tensor, part: int = 1024) -> Tensor:
    """Compute RMSNorm of rows (..., C), 1024 at a time."""
    out = torch.empty_like(rows)
    for x, y in zip(rows.flatten(0, 3).split(part), out.flatten(0, 3).split(part), strict=True):
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + 1e-6)
        torch.mul(x, scale, out=y).mul_(weight)
    return out


def streamed(vae: AutoencoderKL3D, latents: Tensor, planes: int) -> None:
    """Decode in slabs of `planes` planes of latents."""
    sides = [n * s for n, s in zip(latents.shape[2:], vae.stride, strict=True)]
    vae.slab_bytes = planes * vae.activation_bytes((*sides[:2], vae.stride[2]))
    for _ in vae.decode_slabs(latents):
        pass


def folded(batch: int) -> Tensor:
    """Return the folded ids of a mask with three labels, (B, 9, 13, 9, 64)."""
    labels = torch.zeros(batch, 36, 52, 36, dtype=torch.int16)
    labels[:, 10:20, 15:40, 10:25], labels[:, 20:26, 15:40, 10:25] = 1, 2
    return fold_mask(labels, (4, 4, 4), 3)


def shape(grid: Sequence[int]) -> str:
    """Format a grid: 9 x 13 x 9."""
    return " x ".join(map(str, grid))

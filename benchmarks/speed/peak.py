"""Measure the machine's FLOP/s for convolutions and a matrix product, and the share that our autoencoder reaches."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .jobs import Shape, build_autoencoder, facts, meta_input, noise, set_precision
from .measure import Work, timed
from .models import AUTOENCODERS, decode, encode


def forward(shape: Shape, batch: int, device: str, precision: str) -> Work:
    """Encode and decode with our autoencoder."""
    net = build_autoencoder("ours", device, precision)
    volume = noise((1, *shape), device, batch).to(next(net.parameters()).dtype)

    def run() -> None:
        with torch.inference_mode():
            decode(net, encode(net, volume))

    def there_and_back(meta: nn.Module) -> None:
        decode(meta, encode(meta, meta_input((1, *shape), batch)))

    known = facts(net, there_and_back, AUTOENCODERS["ours"])
    return Work(run, known | {"flops": convolution_flops(AUTOENCODERS["ours"], there_and_back)})


def convolution_flops(build: Callable[[], nn.Module], run: Callable[[nn.Module], None]) -> int:
    """Count the FLOPs of the 3-D convolutions that `run` calls, without taps on padding.

    Kernels skip those taps, which on small grids are a large share of what FlopCounterMode counts.
    """
    with torch.device("meta"):
        net = build()
    total = 0

    def count(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        taps = [
            sum(min(o * s - p + k, n) - max(o * s - p, 0) for o in range(m))
            for n, m, k, s, p in zip(
                inputs[0].shape[2:], output.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True
            )
        ]
        total += 2 * len(output) * conv.in_channels // conv.groups * conv.out_channels * math.prod(taps)

    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    with torch.no_grad():
        run(net)
    return total


def forward_profile(shape: Shape, batch: int, device: str, precision: str) -> Work:
    """Profile `forward`: {"operator": share of the time}."""
    work = forward(shape, batch, device, precision)
    return Work(lambda: profile(work.run, device))


def profile(run: Callable[[], Any], device: str, count: int = 12) -> dict[str, float]:
    """Return the operators that take most of the time, with their share of it."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda := device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        run()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in recorded.key_averages()}
    total = sum(times.values())
    return {name: round(t / total, 4) for name, t in sorted(times.items(), key=lambda item: -item[1])[:count]}


def convolution_peak(device: str, precision: str, *, largest: float = 5e10) -> Work:
    """Find the fastest 3x3x3 convolution in channels_last_3d, over channels, grids and batches.

    Each has up to `largest` FLOPs, without taps on padding.
    """
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cases = [(c, n, b) for c in (32, 64, 128, 256, 512) for n in (8, 16, 32, 64) for b in (1, 2, 8)]
    cases = [(c, n, b) for c, n, b in cases if 1e8 <= 54 * c * c * b * n**3 <= largest]

    def run() -> dict[str, float]:
        rates = {case: _convolution_rate(case, device, dtype) for case in cases}
        best = max(rates, key=lambda case: rates[case])
        return {
            "flops_per_second": rates[best],
            "channels": best[0],
            "grid": best[1],
            "batch": best[2],
            "tried": len(cases),
        }

    return Work(run)


def _convolution_rate(case: tuple[int, int, int], device: str, dtype: torch.dtype) -> float:
    channels, grid, batch = case
    form: Any = {"device": device, "dtype": dtype}
    x = torch.randn(batch, channels, grid, grid, grid, **form).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, channels, 3, 3, 3, **form).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        best = min(timed(lambda: F.conv3d(x, weight, padding=1), device)[0] for _ in range(4))
    return 2 * channels**2 * batch * (3 * grid - 2) ** 3 / best


def matrix_peak(side: int, device: str, precision: str) -> Work:
    """Measure FLOP/s of a product of square matrices, the reference for model FLOP utilization."""
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def run() -> dict[str, float]:
        with torch.inference_mode():
            return {"flops_per_second": 2 * side**3 / min(timed(lambda: a @ b, device)[0] for _ in range(5))}

    return Work(run, {"side": side})

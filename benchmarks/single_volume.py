"""What PyTorch's choice of kernel costs a single small volume on a CPU:

python -m benchmarks.single_volume --output out/bench/single_volume.json

Times one 3x3x3 convolution of the sizes that the shipped models run, by nn.Conv3d and by autoencoder.layers.Conv3d.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autoencoder.layers import Conv3d
from evaluation import provenance, write_report

# channels, grid: the U-Net's two levels and the decoder's two levels for a volume of 36 x 52 x 36 voxels
SIZES = ((64, (9, 13, 9)), (160, (5, 7, 5)), (128, (9, 13, 9)), (32, (18, 26, 18)))


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Time, write the report and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (20)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    options = parser.parse_args(args)
    rows = []
    for channels, grid in SIZES:
        conv = Conv3d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        x = torch.randn(1, channels, *grid).contiguous(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            plain = milliseconds(lambda conv=conv, x=x: torch.nn.Conv3d.forward(conv, x), options.repeats)
            ours = milliseconds(lambda conv=conv, x=x: conv(x), options.repeats)
        rows.append({"channels": channels, "grid": list(grid), "nn.Conv3d_ms": plain, "ours_ms": ours})
        print(f"{channels:4} channels, {grid}: nn.Conv3d {plain:.2f} ms, ours {ours:.2f} ms, ratio {plain / ours:.1f}")
    report = {"benchmark": "single_volume", "convolutions": rows, **provenance()}
    write_report(options.output, report)
    return report


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of `work` after two untimed runs."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[2:]), 3)


if __name__ == "__main__":
    main()

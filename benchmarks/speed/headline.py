"""Write the main rows of bench.json into README.md, between two comments.

python -m benchmarks.speed.headline docs/performance.json --page README.md
"""

# pyright: reportTypedDictNotRequiredAccess=false

import argparse
from collections.abc import Iterator, Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return parse_page(__doc__, "bench.json", args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from .records import Record, find, short, whole_sample
from .report import read_bench

BEGIN = "<!-- performance: written by benchmarks.speed.headline -->"
END = "<!-- end of performance -->"
FLOAT32: dict[str, object] = {"precision": "float32"}


def rows(records: list[Record]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (job, ours, peer, ratio), one size per job; docs/performance.md has all sizes."""
    same = FLOAT32 | {"shape": (128,) * 3, "streamed": False}
    ours = find(records, "coding", "decoding", model="ours", **same)
    for model, name in (("maisi", "MAISI"), ("monai", "MONAI AutoencoderKL of our size")):
        peer = find(records, "coding", "decoding", model=model, **same)
        if ours and peer:
            yield _pair(f"decode 128³, against {name}", ours[0], peer[0])
    for job, name in (("training_autoencoder", "autoencoder"), ("training_unet", "U-Net")):
        for ours in find(records, "training", job, model="ours", checkpointing=False, **FLOAT32)[-1:]:
            same = FLOAT32 | {"shape": ours["shape"], "batch": ours["batch"]}
            peer = find(records, "training", job, model="monai", **same)
            if peer:
                sides = " x ".join(map(str, [ours["batch"], *ours["shape"]]))
                yield _pair(f"train the {name} one step, {sides}, against MONAI's", ours, peer[0])
    for ours in find(records, "sampling", "sampling", model="ours", **FLOAT32)[-1:]:
        if peer := find(records, "sampling", "sampling", model="monai", shape=ours["shape"], **FLOAT32):
            times = [whole_sample(r) for r in (ours, peer[0])]
            cells = " x ".join(map(str, ours["shape"]))
            what = f"sample in 20 steps, {cells} latents, against 50 DDIM steps of MONAI's"
            yield what, f"{short(times[0])} s", f"{short(times[1])} s", f"{times[1] / times[0]:.1f} x"
    ours, peer = (find(records, "equal_time", "training", model=m) for m in ("ours", "maisi"))
    if ours and peer:
        decibels = [r[0]["values"]["psnr_db"] for r in (ours, peer)]
        minutes = ours[0]["values"]["seconds"] / 60
        what = f"held-out PSNR after {minutes:.0f} minutes of training, against MAISI's"
        yield what, f"{decibels[0]:.2f} dB", f"{decibels[1]:.2f} dB", f"{decibels[0] - decibels[1]:+.2f} dB"


def _pair(what: str, ours: Record, peer: Record) -> tuple[str, str, str, str]:
    mine, theirs = (f"{short(r['seconds']['median'])} s, {short(r['memory']['above'] / 1e9)} GB" for r in (ours, peer))
    return what, mine, theirs, f"{peer['seconds']['median'] / ours['seconds']['median']:.1f} x"


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the table. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    measurements = read_bench(options.report)["measurements"]
    rewrite_between(options.page, BEGIN, END, table(["", "ours", "peer", ""], rows(measurements)))

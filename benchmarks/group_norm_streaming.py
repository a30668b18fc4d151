r"""Measure coding in slabs of an autoencoder with GroupNorm, MAISI's at full width, beside the whole and MONAI's own.

    python -m benchmarks.group_norm_streaming --output docs/group_norm_streaming.json
    python -m benchmarks.group_norm_page docs/group_norm_streaming.json --page docs/large_volumes.md

The weights are random (seed 0), the same in all networks, and so are the results, which are compared. Each coding runs
once, in its own process on one core. The report is written after each of them. CPU seconds are those of the process,
so other jobs on the machine hardly matter, except for the disk, for which only the elapsed seconds wait.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

SIDES = (64, 128, 96)
CHANNELS = (64, 128, 256)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = Number(PositiveInt)
    parser.add_argument("--sides", type=count, nargs="+", default=SIDES, help="of the cubes of voxels (64 128 96)")
    parser.add_argument("--large", type=count, nargs="*", default=(), help="of cubes that are decoded in slabs only")
    parser.add_argument("--channels", type=count, nargs=3, default=CHANNELS, help="of the levels (64 128 256)")
    parser.add_argument("--groups", type=count, default=32, help="of the norms (32)")
    parser.add_argument("--slab_mib", type=count, default=128, help="MiB that activations may take (128)")
    parser.add_argument("--timeout", type=count, default=240, help="minutes after which a coding is stopped (240)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import ctypes
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from torch import nn

from autoencoder import MonaiAutoencoderKL
from autoencoder.monai.spool import CHUNK, Spool
from evaluation.report import Provenance, check_report, provenance, write_report
from interop.formats import FORMATS
from interop.networks import PEERS, config_of, renamed

from .speed.measure import OK, Work, measure

NETWORKS = ("whole", "slabs", "monai")


class Row(TypedDict):
    """One coding of one volume."""

    job: str  # decoding or encoding
    network: str  # one of NETWORKS
    side: int
    status: str
    detail: NotRequired[str]
    seconds: NotRequired[float]
    cpu_seconds: NotRequired[float]
    memory_bytes: NotRequired[int]  # at the peak, above the weights and the input
    file_bytes: NotRequired[int]  # of the temporary file
    difference: NotRequired[float]  # largest from the whole, in its range


class Report(Provenance):
    """The JSON file."""

    benchmark: str
    note: str
    channels: list[int]
    parameters: int
    slab_bytes: int
    rows: list[Row]
    load_before: float
    load_after: float


def main(args: Sequence[str] | None = None) -> Report:
    """Measure, write the report and return it."""
    options = parse(args)
    check_report(options.output)
    arguments = maisi_arguments(options.channels, options.groups)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoencoderKlMaisi(**arguments).parameters())
    report: Report = {
        "benchmark": "group_norm_streaming",
        "note": "random weights; every coding once, in its own process; rows in the order in which they ran",
        "channels": list(options.channels),
        "parameters": parameters,
        "slab_bytes": options.slab_mib << 20,
        "rows": [],
        "load_before": os.getloadavg()[0],
        "load_after": os.getloadavg()[0],
        **provenance(),
    }
    todo = [(job, network, side) for job in ("decoding", "encoding") for side in options.sides for network in NETWORKS]
    todo += [("decoding", "slabs", side) for side in options.large]
    with tempfile.TemporaryDirectory() as folder:
        for job, network, side in todo:
            report["rows"].append(code(job, network, side, options, Path(folder)))
            report["load_after"] = os.getloadavg()[0]
            write_report(options.output, report)
            print(report["rows"][-1], flush=True)
    return report


def code(job: str, network: str, side: int, options: argparse.Namespace, folder: Path) -> Row:
    """Code one volume in a process of its own, and compare the result with the whole's."""
    output, whole = (folder / f"{job}-{name}-{side}.npy" for name in (network, "whole"))
    setup = {"job": job, "network": network, "side": side, "output": str(output)}
    setup |= {"channels": options.channels, "groups": options.groups, "slab_bytes": options.slab_mib << 20}
    found = measure(prepare, setup, repeats=0, timeout=60 * options.timeout)
    row = Row(job=job, network=network, side=side, status=found["status"])
    if found["status"] != OK:
        row["detail"] = found.get("detail", "")
        return row
    values = found.get("values", {})
    row.update(seconds=found["seconds"]["median"], memory_bytes=found["memory"]["above"], **values)  # pyright: ignore[reportTypedDictNotRequiredAccess]
    if whole.exists() and output != whole:
        expected, coded = np.load(whole), np.load(output)
        row["difference"] = float(np.abs(coded - expected).max() / np.ptp(expected))
    return row


def maisi_arguments(channels: Sequence[int], groups: int) -> Mapping[str, Any]:
    """Return the arguments of MAISI's autoencoder as published, with these widths, and in one piece."""
    published = FORMATS["maisi-rflow-ct"].parts[0].arguments
    assert published is not None
    changed = {"num_channels": list(channels), "norm_num_groups": groups, "num_splits": 1, "save_mem": False}
    return {**published, **changed}


def prepare(
    job: str, network: str, side: int, output: str, channels: Sequence[int], groups: int, slab_bytes: int
) -> Work:
    """Build one of the networks, and return the coding of a cube of `side` voxels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = maisi_arguments(channels, groups)
    theirs: nn.Module = AutoencoderKlMaisi(**arguments).eval()
    spools: list[Spool] = []
    net = theirs
    if network != "monai":
        peer = PEERS["AutoencoderKlMaisi"]
        net = ours = MonaiAutoencoderKL(**config_of(peer, arguments)).eval()  # pyright: ignore[reportArgumentType]
        ours.load_state_dict({renamed(key, peer.renames): value for key, value in theirs.state_dict().items()})
        ours.disable_tiling() if network == "whole" else ours.enable_tiling(slab_bytes)

        def spool() -> Spool:
            spools.append(Spool(slab_bytes // 4))
            return spools[-1]

        ours._spool = spool
    del theirs
    latent = side // 2 ** (len(channels) - 1)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn((1, 1, *[side] * 3) if job == "encoding" else (1, 4, *[latent] * 3), generator=generator)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # else memory freed here would be used again unseen
        trim(0)

    def run() -> dict[str, object]:
        start = time.process_time()
        with torch.inference_mode():
            if isinstance(net, MonaiAutoencoderKL):
                (posterior,) = net.encode(given, return_dict=False) if job == "encoding" else (None,)
                coded = net.decode(given, return_dict=False)[0] if posterior is None else posterior.raw_mean
            else:
                coded = net.decode(given) if job == "decoding" else net.encode(given)[0]
        seconds = time.process_time() - start
        np.save(output, coded.numpy())
        return {"cpu_seconds": seconds, "file_bytes": sum(CHUNK * one.chunks for one in spools)}

    return Work(run)


if __name__ == "__main__":
    run_command(main)

"""Write Markdown and plots from bench.json.

    python -m benchmarks.speed.report out/bench/bench.json --output docs/performance.md

The plots go beside the Markdown. Nothing in it is written by hand.
"""

# pyright: reportTypedDictNotRequiredAccess=false

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from cli.command import ArgumentParser, run_command
from files.documents import read_object


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("bench", type=Path, help="bench.json")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write; plots go beside it")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tools.markdown import table

from . import plots, targets
from .fits import deviation_from_proportional, power_law, rise
from .measure import OK
from .records import Record, find, gigabytes, median, result, seconds, shape_text, short, whole_sample

NAMES = {
    "ours": "ours",
    "monai": "MONAI AutoencoderKL",
    "maisi": "MAISI",
    "maisi 4 splits": "MAISI, 4 splits",
    "monai voxels": "MONAI DiffusionModelUNet, voxels",
}


def ratio(peer: float | None, ours: float | None) -> str:
    """Format how many times larger the peer's figure is."""
    return f"{peer / ours:.1f} x" if peer and ours else "-"


def coding(records: list[Record]) -> str:
    """Write decoding and encoding over cubes, and their growth."""
    text = ""
    for job, title in (("decoding", "Decoding"), ("encoding", "Encoding")):
        coded = [r for r in records if r["part"] == "coding" and r["job"] in (job, f"sliding_window_{job}")]
        rows = []
        for r in sorted(coded, key=lambda r: (r["precision"], math.prod(r["shape"]))):
            ours = median(
                find(records, "coding", job, model="ours", streamed=False, shape=r["shape"], precision=r["precision"])
            )
            faster = ratio(r["seconds"]["median"], ours) if r["status"] == OK else "-"
            rows.append([shape_text(r["shape"]), _coder(r), r["precision"], seconds(r), gigabytes(r), faster])
        text += (
            f"### {title}\n\n" + table(["voxels", "", "precision", "time", "peak memory", "time / ours"], rows) + "\n"
        )
    growth = []
    for precision in sorted({r["precision"] for r in records if r["part"] == "coding"}):
        for model, streamed in (
            ("ours", False),
            ("ours", True),
            ("monai", False),
            ("maisi", False),
            ("maisi 4 splits", False),
        ):
            series = find(records, "coding", "decoding", model=model, streamed=streamed, precision=precision)
            if len(series) < 2:
                continue
            sizes = [math.prod(r["shape"]) for r in series]
            time = power_law(sizes, [r["seconds"]["median"] for r in series])[1]
            memory = power_law(sizes, [max(r["memory"]["above"], 1) for r in series])[1]
            growth.append([_coder(series[0]), precision, f"{len(series)}", f"{time:.2f}", f"{memory:.2f}"])
    return (
        text
        + "Ours streams automatically if a volume's activations exceed 512 MiB, so the two rows of 256^3 are the "
        + "same work.\n\n"
        + "Growth of decoding as voxels ** exponent:\n\n"
        + table(["", "precision", "sizes", "time", "memory"], growth)
    )


def large_decoding(records: list[Record]) -> str:
    """Write decoding of whole CT volumes."""
    rows = []
    for r in (r for r in records if r["part"] == "large_decoding"):
        same = {k: r[k] for k in ("shape", "precision")}
        ours = median(find(records, "large_decoding", "decoding", model="ours", **same))
        faster = ratio(r["seconds"]["median"], ours) if r["status"] == OK else "-"
        rows.append([shape_text(r["shape"]), _coder(r), r["precision"], seconds(r), gigabytes(r), faster])
    return table(["voxels", "", "precision", "time", "peak memory", "time / ours"], rows)


def _coder(record: Record) -> str:
    name = NAMES[record["model"]] + (", streamed" if record.get("streamed") else "")
    return f"{name}, sliding window of {4 * record['window']}^3" if "window" in record else name


def long_axis(records: list[Record]) -> str:
    """Write memory and time along the third axis."""
    measured = [r for r in records if r["part"] == "long_axis"]
    rows = [[shape_text(r["shape"]), seconds(r), gigabytes(r), _resident(r)] for r in measured]
    text = table(["voxels", "time", "peak memory above baseline", "total resident memory"], rows)
    good = find(records, "long_axis", "decoding_to_disk")
    if len(good) > 1:
        depths = [r["shape"][2] for r in good]
        memory, resident = [[r["memory"][k] for r in good] for k in ("above", "peak")]
        off = deviation_from_proportional(depths, [r["seconds"]["median"] for r in good])
        text += (
            f"\nFrom {depths[0]} to {depths[-1]} planes, peak memory above the baseline rises by {rise(memory):.1%} "
            f"and resident memory by {rise(resident):.1%} (latents included); time is proportional to the number of "
            f"planes within {off:.1%}.\n"
        )
    return text


def _resident(record: Record) -> str:
    return f"{record['memory']['peak'] / 2**30:.2f} GiB" if record["status"] == OK else ""


def seam(records: list[Record]) -> str:
    """Write the errors of decoding in pieces."""
    rows = []
    for r in records:
        if r["part"] == "seam" and r["job"] == "seam":
            what = "in slabs" if r["model"] == "ours" else f"sliding window of {4 * r['window']}^3 voxels, overlap 0.25"
            how = "sliding_window_decoding" if r["model"] != "ours" else "decoding"
            memory = find(records, "seam", how, model=r["model"])
            errors = [f"{r['values'][k]:.1e}" for k in ("max", "rms")] if r["status"] == OK else [result(r), ""]
            weights = "trained" if r.get("weights") else "random"
            rows.append([NAMES[r["model"]], what, weights, *errors, gigabytes(memory[0]) if memory else ""])
    return table(["", "decoded", "weights", "largest error", "RMS error", "peak memory"], rows) + (
        "\nErrors are relative to the range of the volume decoded at once.\n"
    )


def training(records: list[Record]) -> str:
    """Write the training steps."""
    rows = []
    for r in (r for r in records if r["part"] == "training"):
        same = {k: r[k] for k in ("shape", "batch", "precision")}
        ours = median(find(records, "training", r["job"], model="ours", checkpointing=False, **same))
        name = {"ours": "ours", "monai": "MONAI"}[r["model"]] + (", checkpointed" if r["checkpointing"] else "")
        network = "autoencoder" if r["job"] == "training_autoencoder" else "U-Net"
        faster = ratio(r["seconds"]["median"], ours) if r["status"] == OK else "-"
        what = f"{r['batch']} x {shape_text(r['shape'])}"
        work = f"{gigaflops(r)}{utilization(records, r)}"
        rows.append([network, what, name, r["precision"], millions(r), work, seconds(r), gigabytes(r), faster])
    header = ["", "batch", "", "precision", "parameters", "work (utilization)", "time", "peak memory", "time / ours"]
    return table(header, rows) + "\n" + _arithmetic(records)


def _arithmetic(records: list[Record]) -> str:
    """Split a peer's longer time into more work and slower work."""
    text = ""
    for job, name in (("training_autoencoder", "autoencoder"), ("training_unet", "U-Net")):
        for ours in find(records, "training", job, model="ours", checkpointing=False):
            same = {k: ours[k] for k in ("shape", "batch", "precision")}
            peer = find(records, "training", job, model="monai", **same)
            if not peer:
                continue
            work = peer[0]["facts"]["flops"] / ours["facts"]["flops"]
            time = peer[0]["seconds"]["median"] / ours["seconds"]["median"]
            case = f"{ours['batch']} x {shape_text(ours['shape'])}, {ours['precision']}"
            text += (
                f"- {name}, {case}: MONAI's does {work:.2f} times our FLOPs and takes {time / work:.2f} times as long "
                "per FLOP.\n"
            )
    return text


def millions(record: Record) -> str:
    """Format the number of parameters."""
    return f"{record['facts']['parameters'] / 1e6:.2f} M" if record["status"] == OK else ""


def gigaflops(record: Record) -> str:
    """Format the FLOPs of a run."""
    return f"{record['facts']['flops'] / 1e9:.0f} GFLOP" if record["status"] == OK else ""


def utilization(records: list[Record], record: Record) -> str:
    """Format model FLOP utilization: FLOP/s relative to a matrix product of the same precision."""
    top = find(records, "peak", "matrix_peak", precision=record["precision"])
    if record["status"] != OK or not top:
        return ""
    return f" ({record['facts']['flops'] / record['seconds']['median'] / top[0]['values']['flops_per_second']:.0%})"


def sampling(records: list[Record]) -> str:
    """Write the time of a sample."""
    rows, ours = [], None
    for r in (r for r in records if r["part"] == "sampling"):
        if r["status"] != OK:
            rows.append([r["model"], r["precision"], shape_text(r["shape"]), "", result(r), "", ""])
            continue
        ours = whole_sample(r) if r["model"] == "ours" else ours  # each case begins with ours
        method = {"ours": "Euler", "monai": "DDIM", "monai voxels": "DDPM"}[r["model"]]
        counted = "" if r["facts"]["steps_run"] == r["facts"]["steps"] else f", {r['facts']['steps_run']} of them run"
        name = {"ours": "ours", "monai": "MONAI, latents", "monai voxels": "MONAI, voxels"}[r["model"]]
        steps = f"{r['facts']['steps']} {method}{counted}"
        rows.append(
            [
                name,
                r["precision"],
                shape_text(r["shape"]),
                steps,
                f"{short(whole_sample(r))} s",
                millions(r),
                ratio(whole_sample(r), ours),
            ]
        )
    return table(["", "precision", "grid", "steps", "time", "parameters", "time / ours"], rows)


def equal_time(records: list[Record]) -> str:
    """Write reconstruction after equal training time."""
    rows = []
    for r in (r for r in records if r["part"] == "equal_time"):
        if r["status"] != OK:
            rows.append([NAMES.get(r.get("model", ""), ""), "", "", "", result(r), ""])
            continue
        v = r["values"]
        rows.append(
            [
                NAMES[r["model"]],
                millions(r),
                f"{v['seconds'] / 60:.1f} min",
                str(v["steps"]),
                f"{v['psnr_db']:.2f} dB",
                f"{v['learning_rate']:g}",
            ]
        )
    text = table(["", "parameters", "trained", "steps", "PSNR", "learning rate"], rows)
    good = find(records, "equal_time", "training")
    if good:
        f = good[0]["facts"]
        text += (
            f"\nPSNR inside the field of view of {f['held_out_volumes']} held-out volumes; {f['training_volumes']} "
            f"training volumes ({f['data']}), patches {shape_text(f['crops'])}, batch {f['batch']}, AdamW, the same "
            f"losses, {f['threads']} CPU threads. "
            "Where two learning rates were tried, the better one after a quarter of the time continued.\n"
        )
    return text


def peak(records: list[Record]) -> str:
    """Write the share of the machine's convolution peak."""
    rows, text = [], ""
    for r in find(records, "peak", "forward"):
        top = find(records, "peak", "convolution_peak", precision=r["precision"])
        matrix = find(records, "peak", "matrix_peak", precision=r["precision"])
        product = f"{matrix[0]['values']['flops_per_second'] / 1e12:.3g} TFLOP/s" if matrix else ""
        rate = r["facts"]["flops"] / r["seconds"]["median"]
        best = top[0]["values"]["flops_per_second"] if top else None
        case = (
            f"{top[0]['values']['channels']} channels, {top[0]['values']['grid']}^3, batch {top[0]['values']['batch']}"
            if top
            else ""
        )
        rows.append(
            [
                r["precision"],
                product,
                f"{best / 1e12:.3g} TFLOP/s" if best else "",
                case,
                f"{rate / 1e12:.3g} TFLOP/s",
                f"{rate / best:.2f}" if best else "-",
            ]
        )
        for profiled in find(records, "peak", "forward_profile", precision=r["precision"]):
            shares = ", ".join(f"{name} {share:.0%}" for name, share in profiled["values"].items() if share >= 0.01)
            text += f"\nTime of that forward pass by operator ({r['precision']}): {shares}.\n"
    return (
        table(
            [
                "precision",
                "matrix product",
                "convolution peak",
                "measured with",
                "our encoder and decoder",
                "share of the convolution peak",
            ],
            rows,
        )
        + text
    )


def compile(records: list[Record]) -> str:
    """Write times with and without torch.compile."""
    rows = [
        [
            r["job"].replace("_", " "),
            shape_text(r["shape"]),
            r["precision"],
            "compiled" if r["compiled"] else "eager",
            seconds(r),
            gigabytes(r),
        ]
        for r in records
        if r["part"] == "compile"
    ]
    return table(["", "size", "precision", "", "time", "peak memory"], rows)


def attention(records: list[Record]) -> str:
    """Write the attention backends."""
    rows = [
        [r["backend"], r["precision"], seconds(r), f"{r['values']['relative_error']:.1e}" if r["status"] == OK else ""]
        for r in records
        if r["part"] == "attention"
    ]
    return table(["backend", "precision", "time", "error against _native_math"], rows)


def generation(records: list[Record]) -> str:
    """Write seconds per volume of the shipped pipeline."""
    rows = []
    for r in find(records, "generation", "generating"):
        parts = r["values"]["seconds_per_volume"]
        rows += [[name, f"{t['median']:.3f} s ({t['min']:.3f} to {t['max']:.3f})"] for name, t in parts.items()]
    return table(["", "time per volume"], rows)


def choices(records: list[Record]) -> str:
    """Write the gain of each optimization, and which were dropped."""
    rows = []
    for r in find(records, "choices", "timing_choices"):
        for c in r["values"]["choices"]:
            times = [f"{c[k]:.2f} ms" for k in ("without_ms", "with_ms")]
            gain = f"{c['without_ms'] / c['with_ms']:.2f} x"
            rows.append([c["choice"], c["case"], *times, gain, "kept" if c["kept"] else "dropped"])
    return table(["optimization", "case", "without", "with", "gain", ""], rows)


SECTIONS: tuple[tuple[str, str, Callable[[list[Record]], str]], ...] = (
    ("coding", "Encoding and decoding", coding),
    ("large_decoding", "Decoding whole CT volumes", large_decoding),
    ("long_axis", "Growth along the third axis, to disk", long_axis),
    ("seam", "Seams", seam),
    ("equal_time", "Reconstruction after equal training time", equal_time),
    ("training", "Training step", training),
    ("sampling", "Sampling", sampling),
    ("peak", "Share of the machine's peak", peak),
    ("compile", "torch.compile", compile),
    ("attention", "Attention backends", attention),
    ("generation", "The shipped pipeline", generation),
    ("choices", "Gain of each optimization", choices),
)


class BenchFile(TypedDict):
    """Content of bench.json."""

    environment: dict[str, Any]
    measurements: list[Record]


def runs(entries: list[dict[str, str]]) -> str:
    """Format the runs that measured: commands, dates, commits, minutes and notes."""
    texts = []
    for run in entries:
        more = [f"{run['minutes']} minutes"] if "minutes" in run else []
        more += [run["note"]] if "note" in run else []
        texts.append(f"`{run['command']}` ({', '.join([run['date'][:16], 'commit ' + run['commit'], *more])})")
    return "; ".join(texts)


def markdown(bench: BenchFile) -> str:
    """Write the whole document."""
    where, records = bench["environment"], bench["measurements"]
    machine, versions = where["machine"], where["versions"]
    device = machine.get("accelerator", "no GPU") if where["device"].startswith("cuda") else "CPU only"
    text = (
        "# Performance\n\n"
        f"Written by `python -m benchmarks.speed.report` from the measurements of {runs(where['runs'])}.\n\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{', '.join(machine['instructions'])}; {device}. "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + ".\n\n"
        "Every measurement runs in its own process.\nTimes are medians, with minimum and maximum.\n"
        "Memory is the peak above that of imports, weights and inputs.\nWeights are random unless noted.\n"
    )
    for name, state in where["precisions"].items():
        text += f"\n{name}: {state}.\n" if state != "measured" else ""
    text += "\n## Targets\n\n" + table(["target", "measured", ""], targets.check(records))
    for part, title, section in SECTIONS:
        measured = [r for r in records if r["part"] == part]
        if not measured:
            continue
        general = [r for r in measured if r["job"] == part and "precision" not in r and r["status"] != OK]
        text += f"\n## {title}\n\n" + (section(records) if len(general) < len(measured) else "")
        text += "".join(f"{result(r)}\n" for r in general)
    return text


def read_bench(path: Path) -> BenchFile:
    """Read a bench.json. Raises: ValueError if the file is not one."""
    bench = read_object(path)
    if not isinstance(bench.get("measurements"), list):
        raise ValueError(f"{path}: has no measurements; give a bench.json of python -m benchmarks.speed.run")
    return cast(BenchFile, bench)


def main(args: Sequence[str] | None = None) -> None:
    """Write the Markdown and the plots."""
    options = parse(args)
    bench = read_bench(options.bench)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(bench)
    for name in plots.draw(bench["measurements"], options.output.parent):
        text += f"\n![{name}]({name}.png)\n"
    options.output.write_text(text)
    print(f"{options.output}")

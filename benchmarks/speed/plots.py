"""Plot bench.json: growth with the volume, and along the third axis."""

# pyright: reportTypedDictNotRequiredAccess=false

import math
from pathlib import Path

from matplotlib.figure import Figure

from .measure import OK
from .records import Record

STYLES = {  # model, streamed: label, color, marker
    ("ours", False): ("ours", "tab:blue", "o"),
    ("ours", True): ("ours, streamed", "tab:cyan", "s"),
    ("monai", False): ("MONAI AutoencoderKL", "tab:orange", "^"),
    ("maisi", False): ("MAISI", "tab:red", "v"),
    ("maisi 4 splits", False): ("MAISI, 4 splits", "tab:pink", "<"),
}


def draw(records: list[Record], folder: Path) -> list[str]:
    """Draw the records; return the names of the PNG files without suffix."""
    good = [r for r in records if r["status"] == OK]
    names = []
    if any(r["part"] == "coding" for r in good):
        _growth(
            [r for r in good if r["job"] == "decoding" and r["part"] == "coding"], folder / "performance_growth.png"
        )
        names.append("performance_growth")
    if any(r["part"] == "long_axis" for r in good):
        _long_axis([r for r in good if r["part"] == "long_axis"], folder / "performance_long_axis.png")
        names.append("performance_long_axis")
    return names


def _growth(records: list[Record], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for (model, streamed), (label, color, marker) in STYLES.items():
        for precision, line in (("float32", "-"), ("bf16", "--")):
            series = [r for r in records if (r["model"], r["streamed"], r["precision"]) == (model, streamed, precision)]
            if not series:
                continue
            series.sort(key=lambda r: math.prod(r["shape"]))
            sides = [round(math.prod(r["shape"]) ** (1 / 3)) for r in series]
            look = {"label": f"{label}, {precision}", "color": color, "marker": marker, "linestyle": line}
            time.plot(sides, [r["seconds"]["median"] for r in series], **look)
            memory.plot(sides, [r["memory"]["above"] / 1e9 for r in series], **look)
    for axes, title in ((time, "decoding, seconds"), (memory, "decoding, peak GB")):
        ticks = sorted({round(math.prod(r["shape"]) ** (1 / 3)) for r in records})
        axes.set(xscale="log", yscale="log", title=title, xlabel="voxels")
        axes.set_xticks(ticks, [f"{n}³" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _long_axis(records: list[Record], path: Path) -> None:
    records = sorted(records, key=lambda r: r["shape"][2])
    depths = [r["shape"][2] for r in records]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    time.plot(depths, [r["seconds"]["median"] for r in records], marker="o")
    memory.plot(depths, [r["memory"]["peak"] / 2**30 for r in records], marker="o", label="resident")
    memory.plot(depths, [r["memory"]["above"] / 2**30 for r in records], marker="s", label="above baseline")
    x, y = records[0]["shape"][:2]
    for axes, title in ((time, "seconds"), (memory, "GiB")):
        axes.set(title=f"ours to disk: {title}", xlabel=f"planes of {x} x {y}", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=120)

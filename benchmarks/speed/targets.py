"""Compare a run with the targets for speed and memory: rows of (target, measured, yes | no | not measured)."""

# pyright: reportTypedDictNotRequiredAccess=false

from collections.abc import Iterator

from .fits import deviation_from_proportional, rise
from .measure import Forecast
from .records import Record, find, median, whole_sample

Row = tuple[str, str, str]
FLOAT32_OR_BF16 = ("float32", "bf16")


def check(records: list[Record]) -> list[Row]:
    """Return the rows of all targets."""
    return [
        *_decoding(records),
        *_long_axis(records),
        *_exact(records),
        *_training(records),
        *_sampling(records),
        *_others(records),
    ]


def at_least(target: str, value: float | None, least: float, note: str = "") -> Row:
    """Return a row for a figure that should reach `least`."""
    if value is None:
        return target, "-", "not measured"
    return target, f"{value:.3g}{note}", "yes" if value >= least else "no"


def at_most(target: str, value: float | None, most: float, text: str = "{:.3g}") -> Row:
    """Return a row for a figure that should stay below `most`."""
    if value is None:
        return target, "-", "not measured"
    return target, text.format(value), "yes" if value <= most else "no"


def _decoding(records: list[Record]) -> Iterator[Row]:
    for precision, least in zip(FLOAT32_OR_BF16, (10, 5), strict=True):
        for side in (128, 256):
            same: dict[str, object] = {"shape": (side,) * 3, "precision": precision, "streamed": False}
            ours, peer = (find(records, "coding", "decoding", model=m, **same) for m in ("ours", "maisi"))
            fast, slow, note = median(ours), median(peer), ""
            small, large = (r[-1]["memory"]["above"] if r else None for r in (ours, peer))
            if ours and not peer and (forecast := _forecast(records, side, precision)):
                slow, large, note = (
                    forecast["seconds"],
                    forecast["bytes"],
                    " (MAISI from its growth: it does not fit here)",
                )
            faster = slow / fast if slow and fast else None
            smaller = large / small if large and small else None
            what = f"decode {side}^3, {precision}"
            yield at_least(f"{what}: {least} times faster than MAISI", faster, least, note)
            yield at_least(f"{what}: an eighth of MAISI's peak memory", smaller, 8, note)


def _forecast(records: list[Record], side: int, precision: str) -> Forecast | None:
    for r in records:
        key = (r["part"], r["job"], r.get("model"), r.get("precision"), list(r.get("shape", ())))
        if key == ("coding", "decoding", "maisi", precision, [side] * 3) and "forecast" in r:
            return r["forecast"]
    return None


def _long_axis(records: list[Record]) -> Iterator[Row]:
    found = find(records, "long_axis", "decoding_to_disk")
    full = found if len(found) > 1 and found[-1]["shape"][2] == 768 else []
    depths = [r["shape"][2] for r in full]
    resident = full[-1]["memory"]["peak"] / 2**30 if full else None
    memory = rise([r["memory"]["above"] for r in full]) if full else None
    time = deviation_from_proportional(depths, [r["seconds"]["median"] for r in full]) if full else None
    yield at_most("512 x 512 x 768 within 6 GiB resident", resident, 6, "{:.2f} GiB")
    yield at_most("peak memory rises by less than 5 % along the third axis", memory, 0.05, "{:.1%}")
    yield at_most("time linear in planes within 10 %", time, 0.1, "{:.1%}")


def _exact(records: list[Record]) -> Iterator[Row]:
    ours, peer = (find(records, "seam", "seam", model=m) for m in ("ours", "monai"))
    target = "streamed equals whole within 1e-4 of the range"
    row = at_most(target, ours[0]["values"]["max"] if ours else None, 1e-4, "{:.1e}")
    yield (
        (row[0], f"{row[1]} (MONAI's sliding window {peer[0]['values']['max']:.1e})", row[2]) if peer and ours else row
    )


def _training(records: list[Record]) -> Iterator[Row]:
    for precision, least in zip(FLOAT32_OR_BF16, (3, 1.5), strict=True):
        for job, name in (("training_autoencoder", "autoencoder"), ("training_unet", "U-Net")):
            ratios = []
            for r in find(records, "training", job, model="ours", checkpointing=False, precision=precision):
                peer = find(
                    records, "training", job, model="monai", shape=r["shape"], batch=r["batch"], precision=precision
                )
                ratios += [peer[0]["seconds"]["median"] / r["seconds"]["median"]] if peer else []
            target = f"training step of the {name}, {precision}: {least:g} times MONAI's (smallest of the sizes)"
            yield at_least(target, min(ratios, default=None), least)


def _sampling(records: list[Record]) -> Iterator[Row]:
    for model, least in (("monai", 10), ("monai voxels", 50)):
        ratios = []
        for r in find(records, "sampling", "sampling", model="ours", precision="float32"):
            side = 1 if model == "monai" else 4
            shape = [side * n for n in r["shape"]]
            peer = find(records, "sampling", "sampling", model=model, shape=shape, precision="float32")
            ratios += [whole_sample(peer[0]) / whole_sample(r)] if peer else []
        what = "50 DDIM steps of MONAI's latent U-Net" if model == "monai" else "250 steps of a voxel U-Net"
        yield at_least(
            f"20 steps: {least} times faster than {what} (smallest of the sizes)", min(ratios, default=None), least
        )


def _others(records: list[Record]) -> Iterator[Row]:
    for r in find(records, "peak", "forward"):
        top = find(records, "peak", "convolution_peak", precision=r["precision"])
        part = r["facts"]["flops"] / r["seconds"]["median"] / top[0]["values"]["flops_per_second"] if top else None
        yield at_least(f"half of the convolution peak, {r['precision']}", part, 0.5)
    ours, peer = (find(records, "equal_time", "training", model=m) for m in ("ours", "maisi"))
    difference = ours[0]["values"]["psnr_db"] - peer[0]["values"]["psnr_db"] if ours and peer else None
    yield at_least("PSNR above MAISI's after equal time, dB", difference, 0)

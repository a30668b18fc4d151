"""Find oddities of a data set: counts, geometry, intensities, labels, conditions. From examined cases to findings."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from volumes import Case, DataConfig, IntensityScaling
from volumes.data.alignment import describe_resampling
from volumes.foreground import share_of
from volumes.plausible import gathered
from volumes.volume import GRID_NUMBERS

from .cases import (
    Examined,
    Finding,
    fail,
    names,
    ok,
    warn,
)

SPLITS = ("train", "validation", "test")
MADS = 6.0  # scaled median absolute deviations (a normal distribution's standard deviations) that make an outlier
SMALL_SET = 50  # subjects
THICK = 3.0  # voxels so many times longer than wide
RARE = 10  # volumes of a class
FLAT = 0.05  # fraction of a window that a volume should span
KEPT = 0.8  # of the box of the channel that others are resampled onto, that all should show
ALMOST_ALL, ALMOST_NOTHING = 0.95, 0.02  # of a volume's voxels that a crop should leave less, and more than
CLIPPED = 0.05  # fraction of a volume's voxels above its window, above which the window may be wrong
CAPPED = 2.0  # ratio of the maximum to the upper percentile, above which a volume loses its peaks


def outliers(values: Sequence[float] | np.ndarray, factor: float) -> list[int]:
    """Return the indices of positive `values` that lie both `MADS` scaled median absolute deviations, on a logarithmic
    scale, and a `factor` away from the median (Leys et al. 2013)."""
    logs = np.log(np.maximum(np.asarray(values, np.float64), 1e-12))
    if not len(logs):
        return []
    away = np.abs(logs - np.median(logs))
    return np.flatnonzero(away > max(MADS * 1.4826 * float(np.median(away)), math.log(factor))).tolist()


def check_found(
    cases: Sequence[Case], examined: Sequence[Examined], refused: Sequence[tuple[Case, str]], config: DataConfig
) -> list[Finding]:
    """Check cases, subjects and splits; name each refused file."""
    findings = []
    used = [item.case for item in examined]
    parts = []
    for split in SPLITS:
        cases_of = [case for case in used if case.split == split]
        parts.append(f"{split} {len(cases_of)} of {len({case.subject for case in cases_of})}")
    subjects, listed = len({case.subject for case in cases}), ", ".join(parts)
    if refused:
        text = f"{len(used)} of {len(cases)} volumes can be used ({subjects} subjects found): {listed}"
        findings.append(warn("cases", text, "see the others below"))
    else:
        text = f"{len(cases)} volumes of {subjects} subjects found, every file can be read: {listed}"
        findings.append(ok("cases", text))
    for case, reason in refused:
        file = str(next(iter(case.images.values()), case.name))
        if config.on_error == "raise":
            findings.append(fail("files", reason, "repair or remove it, or set data.on_error: skip", [file]))
        else:
            findings.append(warn("files", reason, "repair or remove it; it is skipped (data.on_error: skip)", [file]))
    of_split = Counter(item.case.split for item in examined)
    if not of_split["train"]:
        findings.append(fail("splits", "there is no volume to train on", "see data.split, and the refused files"))
    lost = {case.split for case, _ in refused}
    if not of_split["test"]:
        remedy = "set data.test_fraction: 0.2, or give a column by data.split"
        message = "no volume is held out for testing, so nothing can be shown"
        findings.append(warn("splits", message, "see the refused files" if "test" in lost else remedy))
    if not of_split["validation"]:
        remedy = "see the refused files" if "validation" in lost else "set data.validation_fraction: 0.1"
        findings.append(warn("splits", "there is no validation volume", remedy))
    if not (config.subject or config.group_by or config.phantom):
        remedy = "if subjects have several volumes, set data.subject or data.group_by, or they leak between splits"
        findings.append(warn("splits", "every volume counts as a separate subject", remedy))
    return findings


def check_size(examined: Sequence[Examined], start: str | None, latent: bool) -> list[Finding]:
    """Give advice for small sets, by the number of subjects to train on.

    Args:
        start: how to start from trained weights that fit the config; None if there are none.
        latent: whether a diffusion model is trained, not an autoencoder.
    """
    count = len({item.case.subject for item in examined if item.case.split == "train"})
    if not count or count >= SMALL_SET:
        return [ok("size", f"{count} subjects to train on")] if count else []
    advice = [start] if start else []
    if latent:
        advice += [
            "with fewer than about 20, fine-tune a trained U-Net by a LoRA (lora:, --init_from PIPELINE/unet) instead "
            "of training all weights",
            "use cache: {versions: 8, flip_axes: [0], shift: true} where anatomy may be mirrored",
        ]
    advice.append(
        "keep 20 % of the subjects for testing. Such a set cannot show that volumes are as varied as patients (it has "
        f"{count}), that rare findings are right, or that nobody is copied: run the privacy audit"
    )
    return [warn("size", f"{count} subjects to train on: fewer than {SMALL_SET}", "; ".join(advice))]


def check_geometry(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """Check spacing, shape, orientation and units: the spread, and outliers."""
    findings = []
    spacings, shapes = (np.array([getattr(item, name) for item in examined]) for name in ("spacing", "shape"))
    middle = np.median(spacings, axis=0)
    odd = sorted({i for axis in range(3) for i in outliers(spacings[:, axis], 1.25)})
    text = f"voxels {_range(spacings, '.3g')} mm, median {' x '.join(f'{mm:.3g}' for mm in middle)}"
    if odd:
        remedy = (
            "check their headers; data.spacing resamples all to one, data.numbers: [spacing_x, ...] conditions on it"
        )
        who = [f"{examined[i].file} ({' x '.join(f'{mm:.3g}' for mm in examined[i].spacing)})" for i in odd]
        findings.append(warn("spacing", f"{text}; unlike the others: {names(who)}", remedy, _files(examined, odd)))
    elif np.allclose(spacings, middle, rtol=0.01, atol=0) or config.spacing or set(config.numbers) & set(GRID_NUMBERS):
        findings.append(ok("spacing", text))
    else:
        remedy = (
            f"set data.spacing: {[round(float(mm), 3) for mm in middle]}, or data.numbers: [spacing_x, spacing_y, "
            "spacing_z]"
        )
        findings.append(warn("spacing", f"{text}: no single voxel size", remedy))
    used = np.asarray(config.spacing or middle, np.float64)
    if used.max() > THICK * used.min():
        remedy = "give strides by axis, such as patch_size: [2, 2, 1], so that latent voxels are about cubes in mm"
        findings.append(warn("spacing", f"voxels are {used.max() / used.min():.1f} times longer than wide", remedy))
    odd = sorted({i for axis in range(3) for i in outliers(shapes[:, axis], 1.5)})
    text = f"volumes {_range(shapes, 'g')} voxels, median {' x '.join(f'{n:g}' for n in np.median(shapes, axis=0))}"
    if odd:
        who = [f"{examined[i].file} ({' x '.join(map(str, examined[i].shape))})" for i in odd]
        remedy = "crop or pad them like the others, or remove them"
        findings.append(warn("shape", f"{text}; unlike the others: {names(who)}", remedy, _files(examined, odd)))
    else:
        findings.append(ok("shape", text))
    return findings + _check_grids(examined, config) + _check_boxes(examined, config) + _check_headers(examined)


def _check_grids(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """Check how much is lost where volumes are resampled onto one grid."""
    said = describe_resampling(
        [item.resampled for item in examined], [item.share for item in examined], str(config.resample_to)
    )
    if said is None:
        return []
    files = [item.file for item in examined if item.share < KEPT]
    if not files:
        return [ok("grids", said)]
    shares: dict[str, list[float]] = {}
    for one in (one for item in examined for one in item.resampled):
        shares.setdefault(one.name, []).append(one.share)
    least = min(shares, key=lambda name: float(np.mean(shares[name])))
    remedy = f"the least is shown by {least}; check its geometry"
    if least in config.patterns:
        remedy += f", or set data.resample_to: {least}, whose grid the others may show whole"
    return [warn("grids", f"{said}; less than {KEPT:.0%}: {names(files)}", remedy, files)]


def _check_boxes(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """Check how many voxels `data.crop` saves, and where it left almost all of a volume, or almost nothing."""
    shares = np.array([1.0 if item.box is None else share_of(item.box) for item in examined])
    if config.crop is None or not len(shares):
        return []
    ends = f"{shares.min():.0%} to {shares.max():.0%}"
    text = f"boxes hold {np.median(shares):.0%} of a volume's voxels ({ends}), the rest is left out"
    whole, little = np.flatnonzero(shares > ALMOST_ALL).tolist(), np.flatnonzero(shares < ALMOST_NOTHING).tolist()
    if not whole and not little:
        return [ok("crop", text)]
    findings, rule = [], config.crop
    if whole:
        files = [f"{examined[i].file} ({shares[i]:.0%})" for i in whole]
        remedy = "remove data.crop if the volumes are filled, or lower its margin"
        remedy += "" if rule.by_mask else "; if there is air or noise around, raise data.crop.above"
        findings.append(warn("crop", f"{text}; almost all is left of {names(files)}", remedy, _files(examined, whole)))
    if little:
        files = [f"{examined[i].file} ({shares[i]:.1%})" for i in little]
        remedy = "check these masks" if rule.by_mask else "check the units of these files, or lower data.crop.above"
        findings.append(warn("crop", f"{text}; little is left of {names(files)}", remedy, _files(examined, little)))
    return findings


def _check_headers(examined: Sequence[Examined]) -> list[Finding]:
    stored = [item for item in examined if item.orientation]
    if not stored:
        return []
    counts = Counter(item.orientation for item in stored)
    orientations = ", ".join(f"{code} {n}" for code, n in counts.most_common())
    findings = [ok("orientation", f"stored as {orientations}; read as RAS")]
    for oddity, files in gathered(found for item in examined for found in item.oddities):
        findings.append(warn(oddity.check, f"{oddity.what}: {names([*files.values()])}", oddity.remedy, [*files]))
    files = [item.file for item in stored if item.unit == "unknown"]
    if len(files) == len(stored):
        findings.append(ok("units", f"no header names a unit of length, so mm is assumed ({len(files)} files)"))
    elif files:
        findings.append(
            warn("units", f"the header names no unit, so mm is assumed: {names(files)}", "set xyzt_units to mm", files)
        )
    return findings


def check_intensity(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """Check by channel how much scaling cuts off, whether volumes use their window, and whether scales differ between
    volumes. Volumes without contrast after scaling are refused earlier (`IntensityScaling.fit`).
    """
    if config.image_labels:
        return []
    check = {"window": _check_window, "percentile": _check_percentiles}
    return [
        check[config.scaling(channel).kind](examined, index, channel, config.scaling(channel))
        for index, channel in enumerate(config.channels)
    ]


def _check_window(examined: Sequence[Examined], index: int, channel: str, scaling: IntensityScaling) -> Finding:
    clipped = float(np.median([item.clipped[index] for item in examined]))
    text = f"{channel}: median {clipped:.0%} of voxels outside {scaling.low:g} to {scaling.high:g}"
    if cut := [item for item in examined if item.highest[index] > scaling.high]:
        highest, above = max(item.highest[index] for item in cut), max(item.above[index] for item in cut)
        text += f"; above it up to {above:.2%}, and values up to {highest:.4g} become {scaling.high:g}"
    flat = [item.file for item in examined if item.covered[index] < FLAT]
    if flat:
        remedy = "check their units (HU, SUV), or narrow the window"
        return warn("intensity", f"{text}; span less than {FLAT:.0%} of it: {names(flat)}", remedy, flat)
    if (lost := float(np.median([item.above[index] for item in examined]))) > CLIPPED:
        remedy = "raise `high` of data.intensity, unless nothing above it matters (bone in a soft-tissue window)"
        return warn("intensity", f"{text}; a median of {lost:.0%} of a volume is clipped to the highest value", remedy)
    return ok("intensity", text)


def _check_percentiles(examined: Sequence[Examined], index: int, channel: str, scaling: IntensityScaling) -> Finding:
    widths = [item.high[index] - item.low[index] for item in examined]
    high, highest = (float(np.median([getattr(item, key)[index] for item in examined])) for key in ("high", "highest"))
    above = float(np.median([item.above[index] for item in examined]))
    text = f"{channel}: percentiles {scaling.low:g} to {scaling.high:g} span {min(widths):.4g} to {max(widths):.4g}"
    if above:
        text += f"; {above:.2g} of the voxels lie above, and maxima of {highest:.3g} become {high:.3g} (medians)"
    reaches = [(item.highest[index] - item.low[index]) / (item.high[index] - item.low[index]) for item in examined]
    if float(np.median(reaches)) >= CAPPED:
        highest = max(item.highest[index] for item in examined)
        remedy = (
            "harmless for values without a unit (most MR). If they are a quantity (SUV, HU, T1 in ms), each volume "
            f"has its own scale and loses its peaks: give a window, such as data.intensity: {{kind: window, low: 0, "
            f"high: {_round_up(highest):g}}}"
        )
        return warn("intensity", text, remedy)
    odd = outliers(widths, 10)
    if odd:
        remedy = "each volume has its own scale, so this may be harmless; check whether they are of another kind"
        return warn(
            "intensity", f"{text}; unlike the others: {names(_files(examined, odd))}", remedy, _files(examined, odd)
        )
    return ok("intensity", text)


def _round_up(value: float) -> float:
    """Round a positive number up to two digits: 27.3 -> 28, 1,234 -> 1,300."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def check_labels(examined: Sequence[Examined]) -> list[Finding]:
    """Check the volume of each label in ml: labels that no training or no test volume has, cases that lack one, and odd
    sizes."""
    findings = []
    split = {name: [item for item in examined if item.case.split == name] for name in SPLITS}
    for label in sorted({label for item in examined for label in item.labels}):
        having = [item for item in examined if item.labels[label] > 0]
        learned = [item for item in split["train"] if item.labels[label] > 0]
        if not learned:
            findings.append(_unlearned(label, having))
            continue
        lacking = [item for item in examined if item.labels[label] == 0]
        sizes = [item.labels[label] for item in having]
        text = (
            f"{label}: mean {np.mean(sizes):.3g} ml, {min(sizes):.3g} to {max(sizes):.3g}, in {len(having)} of "
            f"{len(examined)}"
        )
        odd = outliers(sizes, 3)
        if lacking:
            who = [item.case.name for item in lacking]
            remedy = "right if the anatomy lacks it; otherwise the mask is unfinished"
            if len(learned) == len(split["train"]):
                remedy += (
                    ". All training volumes have it, so a model cannot know what a volume without it looks like: put "
                    "some of these subjects into the training set"
                )
            findings.append(warn("labels", f"{text}; lacking in {names(who)}", remedy, who))
        if odd:
            remedy = "check these masks"
            who = _files(having, odd)
            findings.append(warn("labels", f"{text}; odd sizes: {names(who)}", remedy, who))
        if not lacking and not odd:
            findings.append(ok("labels", text))
        if split["test"] and not any(item.labels[label] for item in split["test"]):
            remedy = "hold out a subject with it (data.split, or another data.split_seed)"
            findings.append(warn("labels", f"{label}: in no test volume, so nothing can be shown about it", remedy))
    return findings


def _unlearned(label: str, having: Sequence[Examined]) -> Finding:
    """Report a label that no training volume has."""
    text = f"{label}: in no training volume, so a model cannot learn it"
    if not having:
        return fail("labels", text, "remove it from data.label_names, or correct data.label_map")
    who = [f"{item.case.name} ({item.case.split})" for item in having]
    remedy = (
        "put some of these subjects into the training set (data.split, or another data.split_seed), or map the label "
        "to another one (data.label_map)"
    )
    return fail("labels", f"{text}; only in {names(who)}", remedy, [item.case.name for item in having])


def check_conditions(examined: Sequence[Examined], config: DataConfig, dropout: dict[str, float]) -> list[Finding]:
    """Check the counts of each class value, the range of each number in training, and empty cells."""
    findings = []
    train = [item for item in examined if item.case.split == "train"]
    if not train:
        return findings
    columns: dict[str, list[bool]] = {}
    for index, (column, values) in enumerate(sorted(config.class_names.items())):
        counts = Counter(item.classes[index] for item in train)
        columns[column] = [item.classes[index] < 0 for item in train]
        text = f"{column}: " + ", ".join(f"{value} {counts[i]}" for i, value in enumerate(values))
        rare = [value for i, value in enumerate(values) if counts[i] < min(RARE, len(train) / (2 * len(values)))]
        remedy = f"remove {', '.join(rare)} from data.classes, or expect volumes that hardly follow it"
        findings.append(warn("classes", f"{text}; rare: {', '.join(rare)}", remedy) if rare else ok("classes", text))
    for index, column in enumerate(sorted(config.numbers)):
        values = np.array([item.numbers[index] for item in train])
        columns[column] = np.isnan(values).tolist()
        filled = values[~np.isnan(values)]
        if not len(filled) or filled.min() == filled.max():
            remedy = "remove it from data.numbers: training refuses it"
            findings.append(fail("numbers", f"{column}: all volumes are alike or empty", remedy))
            continue
        text = f"{column}: mean {filled.mean():.4g}, {filled.min():.4g} to {filled.max():.4g}"
        findings.append(ok("numbers", text))
    for column, empty in columns.items():
        if any(empty):
            who = [item.case.name for item, is_empty in zip(train, empty, strict=True) if is_empty]
            remedy = "fill them in if the values exist"
            if not dropout.get(column):
                remedy += f"; to generate with or without it, set model.condition_dropout: {{{column}: 0.1}}"
            findings.append(warn("conditions", f"{column}: {len(who)} empty cells, {names(who)}", remedy, who))
    return findings


def check_crops(examined: Sequence[Examined], crop: Sequence[int], stride: Sequence[int]) -> list[Finding]:
    """Compare an autoencoder's patches with the volumes. Patches that show little of a volume cost quality: on
    hippocampus MR an autoencoder reached 22.2 dB with 32 voxels per side and 23.9 with patches nearly as large as the
    volumes."""
    shapes = np.array([item.model_shape for item in examined if item.case.split == "train"])
    if not len(shapes):
        return []
    median = np.median(shapes, axis=0)
    advised = [int(max(n // s, 1) * s) for n, s in zip(median, stride, strict=True)]
    seen = float(np.prod(np.minimum(shapes, crop) / shapes, axis=1).mean())
    padded = float(1 - (np.prod(np.minimum(shapes, crop), axis=1) / np.prod(crop)).mean())
    text = f"patches of {list(crop)} show {seen:.0%} of a volume, {padded:.0%} of a patch is padding"
    if padded > 0.4:
        return [warn("crops", text, f"smaller ones, such as {advised}, cost less and learn the same")]
    if seen < 0.3:
        remedy = f"enlarge them as far as memory allows, at best near {advised}; lower loop.batch_size for it"
        return [warn("crops", text, remedy)]
    return [ok("crops", text)]


def check_padding(examined: Sequence[Examined], stride: Sequence[int]) -> list[Finding]:
    """Check the padding of whole volumes to the stride, and the fewest latent voxels along an axis."""
    shapes = np.array([item.model_shape for item in examined])
    latent_shapes = -(-shapes // np.array(stride))
    padding = float(1 - (shapes.prod(axis=1) / (latent_shapes * stride).prod(axis=1)).mean())
    fewest = int(latent_shapes.min())
    text = f"{padding:.0%} padding to the stride {list(stride)}, {_range(latent_shapes, 'g')} latent voxels"
    if fewest < 3:
        i = int(latent_shapes.min(axis=1).argmin())
        remedy = "use a smaller stride along that axis: levels need 3 voxels or more (bf16 gradients are wrong at 2)"
        return [warn("padding", f"{text}: {examined[i].file} has {fewest} along one axis", remedy)]
    if padding > 0.35:
        return [warn("padding", text, "crop the volumes to multiples of the stride, or use a smaller stride")]
    return [ok("padding", text)]


def _range(rows: np.ndarray, form: str) -> str:
    low, high = (" x ".join(format(float(v), form) for v in end) for end in (rows.min(axis=0), rows.max(axis=0)))
    return low if low == high else f"{low} to {high}"


def _files(examined: Sequence[Examined], indices: Sequence[int]) -> list[str]:
    return [examined[i].file for i in indices]

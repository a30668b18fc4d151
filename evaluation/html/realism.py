"""The page's sections on how generated volumes look: distances, diversity, intensities, and consistency between slices."""

from collections.abc import Mapping
from typing import Any

from .model import Claim, Row, Section, Table, auc_row, distance_row, overlap, pair
from .plots import interval_plot, line_plot

DISTANCES = (
    ("kernel", "kernel distance (KID), unbiased"),
    ("frechet", "Frechet distance, at equal counts"),
)


def realism_section(report: Mapping[str, Any]) -> Section:
    """Features, diversity and intensities of `evaluate.py realism`."""
    tables = []
    for extractor, found in report.get("features", {}).items():
        rows = [distance_row(title, found[name]) for name, title in DISTANCES]
        rows.append(auc_row("nearer to training than unseen real (AUC)", found["closer_to_training"]))
        note = f"{found['features']} features a volume; {found['kernel']['count']} volumes of each set a draw."
        if caveat := found["frechet"].get("caveat"):
            note += f" Caution: {caveat}."
        tables.append(Table(f"Features: {extractor}", note, rows))
    if found := report.get("diversity"):
        tables.append(Table("Diversity", _diversity_note(found), [_diversity(found)]))
    for channel, found in report.get("intensity", {}).items():
        rows = [distance_row("histogram, Wasserstein-1", found["histogram"])]
        rows += [distance_row(name, one["wasserstein"]) for name, one in found["statistics"].items()]
        note = "Distance of the histograms in units of intensity (black 0, white 1); of statistics in standard deviations of real volumes."
        picture = interval_plot(rows[1:], "Each statistic's distance from unseen real volumes", "standard deviations")
        tables.append(Table(f"Intensities: {channel}", note, rows, picture))
        tables.append(_spectrum(channel, found["spectrum_db"]))
    lead = (
        "Generated volumes beside unseen real ones, and as the floor real training volumes beside the same unseen ones. "
        "Distances are of halves of the smallest set, drawn anew many times."
    )
    return Section("Realistic", lead, tables)


def consistency_section(report: Mapping[str, Any]) -> Section:
    """Adjacent slices, of `evaluate.py realism`."""
    tables = []
    for channel, found in report["consistency"].items():
        rows = [distance_row(name, one["wasserstein"]) for name, one in found.items()]
        picture = interval_plot(rows, "Gray: real against real. Green within it, red outside.", "standard deviations")
        note = "Wasserstein-1 distance from unseen real volumes, in their standard deviations, of statistics of adjacent slices."
        tables.append(Table(f"Adjacent slices: {channel}", note, rows, picture))
    lead = "Whether slices fit to their neighbors along each axis as real ones do: no jumps, no drift, no blur."
    return Section("Consistent between slices", lead, tables)


def shapes_section(report: Mapping[str, Any]) -> Section:
    """Sizes, forms and neighborhoods of labels, of `evaluate.py shapes`."""
    found = report["shapes"]
    rows = [distance_row(name, one["wasserstein"]) for name, one in found["figures"].items()]
    picture = interval_plot(rows, "Gray: real against real. Green within it, red outside.", "standard deviations")
    note = "Wasserstein-1 distance from unseen real label maps, in their standard deviations."
    together = [
        distance_row("kernel distance, unbiased", found["kernel"]),
        auc_row("nearer to training than unseen real (AUC)", found["closer_to_training"]),
    ]
    tables = [
        Table("All figures together", "Of each map's figures below.", together),
        Table("Each figure", note, rows, picture),
    ]
    lead = (
        "Generated label maps beside unseen real ones, and as the floor real training maps beside the same unseen ones."
    )
    return Section("Shaped as real ones", lead, tables)


def realistic_claim(report: Mapping[str, Any] | None) -> Claim:
    """The kernel distance, by the trained encoder's features if there are any."""
    question = "Do they look like real volumes, all together?"
    if report is None or not report.get("features"):
        return Claim("Realistic", question, None, "Not measured: run evaluate.py realism.")
    name = "encoder" if "encoder" in report["features"] else next(iter(report["features"]))
    row = distance_row(f"kernel distance, {name} features", report["features"][name]["kernel"])
    told = "is not told apart from" if row.within else "is larger than"
    return Claim(
        "Realistic", question, row, f"Their distance from unseen real volumes {told} that of real training volumes."
    )


def consistent_claim(report: Mapping[str, Any] | None) -> Claim:
    """The statistic of adjacent slices that is farthest beyond its floor."""
    title, question = "Consistent between slices", "Do slices fit to their neighbors?"
    if report is None or not report.get("consistency"):
        return Claim(title, question, None, "Not measured: run evaluate.py realism.")
    every = [
        (one["wasserstein"]["excess"]["mean"], distance_row(f"{name} ({channel})", one["wasserstein"]))
        for channel, found in report["consistency"].items()
        for name, one in found.items()
    ]
    row = max(every, key=lambda item: item[0])[1]
    count = sum(bool(one.within) for _, one in every)
    sentence = (
        f"{count} of {len(every)} statistics of adjacent slices are within their floors; shown is the farthest beyond."
    )
    return Claim(title, question, row, sentence)


def _diversity(found: Mapping[str, Any]) -> Row:
    made, floor = found["generated_minus_test"], found["training_minus_test"]
    within = overlap(made["interval"], floor["interval"])
    name = "MS-SSIM of generated pairs less that of unseen real pairs"
    return Row(name, made["mean"], pair(made["interval"]), floor["mean"], pair(floor["interval"]), within, "signed")


def _diversity_note(found: Mapping[str, Any]) -> str:
    made, test, training = found["generated"], found["test"], found["training"]
    return (
        f"Generated pairs {made['mean']:.3f}, real pairs {test['mean']:.3f} (unseen) and {training['mean']:.3f} (training), at "
        f"{found['scales']} scales. Positive: generated "
        "volumes are more alike than real ones. Within if the two intervals overlap."
    )


def _spectrum(channel: str, found: Mapping[str, Any]) -> Table:
    made, floor = found["generated_over_test"], found["training_over_test"]
    rows = []
    for index, band in enumerate(found["bands"]):
        intervals = [(one["interval"][0][index], one["interval"][1][index]) for one in (made, floor)]
        values = made["mean"][index], floor["mean"][index]
        rows.append(
            Row(f"{band} cycles/voxel", values[0], intervals[0], values[1], intervals[1], overlap(*intervals), "signed")
        )
    lines = {
        "generated": [(row.value, row.interval) for row in rows],
        "real training": [(float(row.floor or 0), row.floor_interval) for row in rows],
    }
    picture = line_plot(
        lines, found["bands"], "Power over that of unseen real volumes, dB by frequency", "cycles/voxel"
    )
    return Table(
        f"Detail: {channel}",
        "Radial power over that of unseen real volumes, in dB. Negative: smoother than real.",
        rows,
        picture,
    )

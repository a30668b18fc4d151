"""The sections on the look of generated volumes: distances, diversity, intensities, and consistency between slices."""

from collections.abc import Mapping
from typing import Any

from .model import Claim, Row, Section, Table, auc_row, distance_row, overlap, pair
from .plots import interval_plot, line_plot

DISTANCES = (
    ("kernel", "kernel distance (KID), unbiased"),
    ("frechet", "Frechet distance, at equal counts"),
)
CLOSER = "nearer to training volumes than held-out real volumes are (AUC)"
COLORS = "Gray: real against real. Green: within it. Red: outside."


def realism_section(report: Mapping[str, Any]) -> Section:
    """Make the section on features, diversity and intensities from a report of `evaluate.py realism`."""
    tables = []
    for extractor, features in report.get("features", {}).items():
        rows = [distance_row(title, features[name]) for name, title in DISTANCES]
        rows += [distance_row(f"1 - {name}", score) for name, score in features.get("shortfall", {}).items()]
        if slices := features.get("frechet_slices"):
            rows.append(distance_row("Frechet distance of slices (FID of this plane)", slices))
        rows.append(auc_row(CLOSER, features["closer_to_training"]))
        note = (
            f"{features['features']} features per volume; {features['kernel']['count']} volumes of each set per "
            "resample."
        )
        if caveat := features["frechet"].get("caveat"):
            note += f" Caution: {caveat}."
        tables.append(Table(f"Features: {extractor}", note, rows))
    if diversity := report.get("diversity"):
        tables.append(Table("Diversity", _diversity_note(diversity), [_diversity(diversity)]))
    for channel, intensity in report.get("intensity", {}).items():
        rows = [distance_row("histogram, Wasserstein-1", intensity["histogram"])]
        rows += [distance_row(_plain(name), column["wasserstein"]) for name, column in intensity["statistics"].items()]
        note = (
            "Distances between histograms are in units of intensity (black 0, white 1). Distances between statistics "
            "are in standard deviations of real volumes."
        )
        picture = interval_plot(
            rows[1:], "Distance of each statistic from held-out real volumes", "standard deviations"
        )
        tables.append(Table(f"Intensities: {channel}", note, rows, picture))
        tables.append(_spectrum(channel, intensity["spectrum_db"]))
        if shares := intensity.get("hounsfield"):
            tables.append(_hounsfield(channel, shares))
    lead = (
        "Generated volumes are compared with held-out real volumes. As the floor, real training volumes are compared "
        "with the same held-out volumes. Each distance is a mean over many random subsets, half as large as the "
        "smallest set."
    )
    return Section("Realistic", lead, tables)


def consistency_section(report: Mapping[str, Any]) -> Section:
    """Make the section on adjacent slices from a report of `evaluate.py realism`."""
    tables = []
    for channel, columns in report["consistency"].items():
        rows = [distance_row(_plain(name), column["wasserstein"]) for name, column in columns.items()]
        picture = interval_plot(rows, COLORS, "standard deviations")
        note = (
            "Statistics of adjacent slices: Wasserstein-1 distance from held-out real volumes, in their standard "
            "deviations."
        )
        tables.append(Table(f"Adjacent slices: {channel}", note, rows, picture))
    lead = "Whether neighboring slices fit together along each axis as in real volumes: no jumps, no drift, no blur."
    return Section("Consistent between slices", lead, tables)


def shapes_section(report: Mapping[str, Any]) -> Section:
    """Make the section on sizes, shapes and neighborhoods of labels from a report of `evaluate.py shapes`."""
    shapes = report["shapes"]
    rows = [distance_row(name, column["wasserstein"]) for name, column in shapes["figures"].items()]
    picture = interval_plot(rows, COLORS, "standard deviations")
    note = "Wasserstein-1 distance from held-out real label maps, in their standard deviations."
    together = [
        distance_row("kernel distance, unbiased", shapes["kernel"]),
        auc_row(CLOSER, shapes["closer_to_training"]),
    ]
    tables = [
        Table("All figures together", "Computed from all figures of the table below.", together),
        Table("Each figure", note, rows, picture),
    ]
    lead = (
        "Generated label maps are compared with held-out real maps. As the floor, real training maps are compared "
        "with the same held-out maps."
    )
    return Section("Shaped like real label maps", lead, tables)


def realistic_claim(report: Mapping[str, Any] | None) -> Claim:
    """Claim realism by the kernel distance, of the trained encoder's features if there are any."""
    question = "Do they look like real volumes, taken together?"
    if report is None or not report.get("features"):
        return Claim("Realistic", question, None, "Not measured: run evaluate.py realism.")
    name = "encoder" if "encoder" in report["features"] else next(iter(report["features"]))
    row = distance_row(f"kernel distance, {name} features", report["features"][name]["kernel"])
    relation = "cannot be distinguished from" if row.within else "is larger than"
    sentence = f"Their distance from held-out real volumes {relation} the distance of real training volumes."
    return Claim("Realistic", question, row, sentence)


def consistent_claim(report: Mapping[str, Any] | None) -> Claim:
    """Claim consistency by the statistic of adjacent slices that is farthest beyond its floor."""
    title = "Consistent between slices"
    question = "Do neighboring slices fit together?"
    if report is None or not report.get("consistency"):
        return Claim(title, question, None, "Not measured: run evaluate.py realism.")
    rows = [
        (column["wasserstein"]["excess"]["mean"], distance_row(f"{_plain(name)} ({channel})", column["wasserstein"]))
        for channel, columns in report["consistency"].items()
        for name, column in columns.items()
    ]
    worst = max(rows, key=lambda item: item[0])[1]
    count = sum(bool(row.within) for _, row in rows)
    sentence = (
        f"{count} of {len(rows)} statistics of adjacent slices are within their floors. This is the one farthest "
        "beyond."
    )
    return Claim(title, question, worst, sentence)


def _plain(name: str) -> str:
    """Return the name of a statistic in words."""
    return name.replace("_", " ")


def _diversity(report: Mapping[str, Any]) -> Row:
    value, floor = report["generated_minus_test"], report["training_minus_test"]
    within = overlap(value["interval"], floor["interval"])
    name = "MS-SSIM of generated pairs minus that of held-out real pairs"
    return Row(name, value["mean"], pair(value["interval"]), floor["mean"], pair(floor["interval"]), within, "signed")


def _diversity_note(report: Mapping[str, Any]) -> str:
    generated, test, training = (report[name]["mean"] for name in ("generated", "test", "training"))
    return (
        f"Mean MS-SSIM at {report['scales']} scales: generated pairs {generated:.3f}, held-out real pairs {test:.3f}, "
        f"real training pairs {training:.3f}. If the difference is positive, generated volumes are more alike than "
        "real ones. It is within if the two intervals overlap."
    )


def _hounsfield(channel: str, shares: Mapping[str, Any]) -> Table:
    rows = []
    for name, share in shares.items():
        means = [f"{share[source]['mean']:.1%}" for source in ("generated", "test")]
        rows.append(distance_row(f"{name} ({means[0]} against {means[1]})", share["wasserstein"]))
    note = (
        "Share of the voxels in each range of Hounsfield units, of generated against held-out real volumes; distances "
        "in standard deviations of real volumes."
    )
    return Table(f"Hounsfield units: {channel}", note, rows)


def _spectrum(channel: str, report: Mapping[str, Any]) -> Table:
    power, floor = report["generated_over_test"], report["training_over_test"]
    rows = []
    for index, band in enumerate(report["bands"]):
        intervals = [(source["interval"][0][index], source["interval"][1][index]) for source in (power, floor)]
        values = power["mean"][index], floor["mean"][index]
        rows.append(
            Row(f"{band} cycles/voxel", values[0], intervals[0], values[1], intervals[1], overlap(*intervals), "signed")
        )
    lines = {
        "generated": [(row.value, row.interval) for row in rows],
        "real training": [(float(row.floor or 0), row.floor_interval) for row in rows],
    }
    picture = line_plot(
        lines, report["bands"], "Power relative to held-out real volumes, dB by frequency", "cycles/voxel"
    )
    return Table(
        f"Detail: {channel}",
        "Radial power relative to held-out real volumes, in dB. Negative values: smoother than real.",
        rows,
        picture,
    )

"""The sections on adherence: whether volumes are what was asked for, by class, number, map and tissue volumes."""

from collections.abc import Mapping
from typing import Any

from .model import Row, Section, Table, count_volumes, format_number, not_above, not_below, overlap, pair

ZERO = (0.0, 0.0)  # the interval of no difference


def conditions_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py conditions`: whether a classifier finds the requested class, or a
    regressor the number."""
    generated, real = report["generated"], report["real"]
    if "mae" in generated:
        return _numbers_section(report["column"], generated, real)
    row = Row(
        f"right about {report['column']}",
        generated["right"],
        pair(generated["interval"]),
        real["right"],
        pair(real["interval"]),
        not_below(generated["interval"], real["interval"][0]),
        "percent",
        "held-out real",
    )
    lead = "A classifier trained on real volumes predicts the class of generated and of held-out real volumes."
    return Section("Follows its classes", lead, [Table("Classifier", "Intervals over volumes.", [row])])


def _numbers_section(column: str, generated: Mapping[str, Any], real: Mapping[str, Any]) -> Section:
    rows = []
    for key, name, not_worse, end in (
        ("mae", f"mean absolute error of {column}", not_above, 1),
        ("correlation", "correlation of prediction and number", not_below, 0),
        ("r2", "R2 of the prediction", not_below, 0),
    ):
        value, floor = generated[key], real[key]
        within = not_worse(value["interval"], floor["interval"][end])
        interval, floor_interval = pair(value["interval"]), pair(floor["interval"])
        rows.append(
            Row(name, value["mean"], interval, floor["mean"], floor_interval, within, floor_name="held-out real")
        )
    note = (
        "Intervals over subjects. Always predicting the mean of the training set has an error of "
        f"{format_number(real['constant_mae'], 'number')} on real volumes."
    )
    lead = f"A regressor trained on real volumes predicts the {column} of generated and of held-out real volumes."
    return Section("Follows its numbers", lead, [Table("Regressor", note, rows)])


def adherence_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py adherence`: tissues of volumes against their label maps."""
    dice, real = report["dice"], report["dice"]["real"]["mean"]
    rows = []
    for source in ("generated", "reconstruction"):
        if source in dice:
            value = dice[source]["mean"]
            within = not_below(value["interval"], real["interval"][0])
            name = "Dice of generated volumes' tissues" if source == "generated" else "Dice of reconstructions' tissues"
            interval, floor = pair(value["interval"]), pair(real["interval"])
            rows.append(Row(name, value["mean"], interval, real["mean"], floor, within, floor_name="real"))
    for name, ratio in report["ratios"].items():
        within = not_below(ratio["interval"], 1.0)
        interval = pair(ratio["interval"])
        rows.append(Row(f"Dice, {name}", ratio["of_means"], interval, 1.0, None, within, floor_name="as good"))
    if to_real := report.get("reconstruction_to_real"):
        value = to_real["mean"]
        rows.append(
            Row("Dice of reconstructions against their originals' tissues", value["mean"], pair(value["interval"]))
        )
    tables = [Table("Tissues", f"Against {report['maps']} maps. Intervals over subjects.", rows)]
    if generated := report.get("outside", {}).get("generated"):
        floor = report["outside"]["real"]
        row = Row(
            "not empty outside of the map",
            generated["mean"],
            pair(generated["interval"]),
            floor["mean"],
            pair(floor["interval"]),
            not_above(generated["interval"], floor["interval"][1]),
            "percent",
            "real",
        )
        tables.append(Table("Background", "Share of the voxels that the map calls background.", [row]))
    lead = (
        "The intensities where a map has tissue are clustered, and the clusters compared with the map (split "
        f"{report['split']}). Real volumes against their own maps are the floor."
    )
    return Section("Follows its maps", lead, tables)


def morphometry_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py morphometry`: sizes of tissues by group and by number."""
    tables = []
    for group, figures in report["groups"].items():
        rows = []
        for tissue, sizes in figures["tissues"].items():
            value, floor = sizes["difference"], sizes["floor"]
            milliliters = [f"{sizes[source]['mean'] / 1000:.1f} ml" for source in ("generated", "real")]
            rows.append(
                Row(
                    f"{tissue}, {' against '.join(milliliters)}",
                    value["mean"],
                    pair(value["interval"]),
                    floor and floor["mean"],
                    floor and pair(floor["interval"]),
                    overlap(value["interval"], ZERO),
                    "signed",
                )
            )
        note = f"{count_volumes(figures['volumes'])} volumes. Difference of means in standard deviations of real ones."
        tables.append(Table(f"Sizes of tissues: {group}", note, rows))
    for number, tissues in report["numbers"].items():
        rows = [
            Row(
                tissue,
                found["generated"]["mean"],
                pair(found["generated"]["interval"]),
                found["real"]["mean"],
                pair(found["real"]["interval"]),
                overlap(found["difference"]["interval"], ZERO),
                "signed",
                "real",
            )
            for tissue, found in tissues.items()
        ]
        tables.append(Table(f"Correlation of sizes with {number}", "Intervals over subjects.", rows))
    lead = (
        "Tissues are clusters of intensity. Generated volumes are compared with all real ones; as the floor, held-out "
        "real volumes with real training volumes."
    )
    return Section("Sized like real tissues", lead, tables)

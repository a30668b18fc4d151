"""The page's sections on usefulness and obedience: Dice, few labels, pre-training, classes, and reconstructions."""

from collections.abc import Mapping
from typing import Any

from evaluation.stats.intervals import over_seeds
from evaluation.studies.few_labels import ANY, BOTH, REAL_LONGER

from .model import Claim, Row, Section, Table, between, not_below, pair
from .plots import line_plot

ARMS = {
    "real": "real",
    "real_longer": "real, as long as both",
    "synthetic": "synthetic",
    "both": "both",
    "scratch": "from scratch",
}
FAIR = f"{BOTH}/{REAL_LONGER}"  # of few labels: arms that take equally many steps
NOTE = "Intervals over seeds, of a single seed over subjects; outside: the gain is a loss."


def dice_section(report: Mapping[str, Any]) -> Section:
    """`evaluate.py dice`: one segmenter trained on each source, and whether volumes obey their masks."""
    spread = [result["dice"] for result in report["scores"].get("real", [])]
    floor, floor_interval = (sum(spread) / len(spread), pair(over_seeds(spread))) if spread else (None, None)
    rows = []
    for source, results in report["scores"].items():
        values = [result["dice"] for result in results]
        mean, interval = sum(values) / len(values), over_seeds(values)
        within = None if source == "real" or floor_interval is None else not_below(interval, floor_interval[0])
        title = f"trained on {source}"
        rows.append(Row(title, mean, pair(interval), floor, floor_interval, within, floor_name="trained on real"))
    volumes = ", ".join(f"{count} {name}" for name, count in report["volumes"].items())
    tables = [Table("Dice on unseen real volumes", f"Intervals over seeds. Volumes: {volumes}.", rows)]
    if ratios := [_ratio(name, found) for name, found in report.get("ratios", {}).items()]:
        tables.append(Table("Over training on real", "Seed by seed; 1 is as good as real.", ratios))
    if "adherence" in report:
        note = "The segmenter saw neither these volumes nor their masks; intervals over subjects."
        tables.append(Table("Do volumes obey their masks?", note, [_adherence(report["adherence"])]))
    lead = "A small fixed segmenter is trained on one source of volumes or another, and judged on real volumes of unseen subjects."
    return Section("Useful for training", lead, tables)


def budgets_section(report: Mapping[str, Any]) -> Section:
    """`evaluate.py few_labels` and `pretrain`: Dice by how many real volumes have labels."""
    few = report["evaluation"] == "few_labels"
    key, how = ("ratios", "ratio of Dice") if few else ("differences", "difference of Dice")
    tables = []
    for name, by_budget in report.get(key, {}).items():
        rows = []
        for labels, found in sorted(by_budget.items(), key=_size):
            interval = found["interval_seeds"] or found["interval_subjects"]
            floor = 1.0 if few else 0.0
            title = f"{labels} labeled volumes"
            within = not_below(interval, floor)
            rows.append(
                Row(
                    title,
                    found["of_means"],
                    pair(interval),
                    floor,
                    None,
                    within,
                    "number" if few else "signed",
                    "no gain",
                )
            )
        tables.append(Table(f"{name}: {how}", NOTE, rows))
    dice = report.get("dice", {})
    ticks, lines = budget_lines(dice)
    pictures = [line_plot(lines, ticks, "Dice on unseen real volumes", "labeled real volumes")] if ticks else []
    title = "Few labels" if few else "Pre-training without labels"
    lead = (
        "The segmenter learns from k labeled real volumes, from synthetic ones, and from both."
        if few
        else "The segmenter is pre-trained without labels, then fine-tuned on k labeled real volumes."
    )
    return Section(title, lead, tables, pictures)


def budget_lines(dice: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """The budgets, smallest first, and by arm (Dice, interval) at each: NaN where it was not measured, and of an arm that no
    budget changes the same at all."""
    found = {labels: None for by_budget in dice.values() for labels in by_budget if labels != ANY}
    ticks = [labels for labels, _ in sorted(found.items(), key=_size)]
    lines: dict[str, list[Any]] = {}
    for arm, by_budget in dice.items():
        cells = [by_budget.get(tick) or by_budget.get(ANY) for tick in ticks]
        points = [(cell["mean"], pair(cell["interval_seeds"])) if cell else (float("nan"), None) for cell in cells]
        lines[ARMS.get(arm) or str(arm)] = points
    return ticks, lines


def conditions_section(report: Mapping[str, Any]) -> Section:
    """`evaluate.py conditions`: whether a classifier names the class that was asked for."""
    made, real = report["generated"], report["real"]
    row = Row(
        f"right about {report['column']}",
        made["right"],
        pair(made["interval"]),
        real["right"],
        pair(real["interval"]),
        not_below(made["interval"], real["interval"][0]),
        "percent",
        "unseen real",
    )
    lead = (
        "A classifier that learned from real training volumes names the class of generated and of unseen real volumes."
    )
    return Section("Obeys its classes", lead, [Table("Classifier", "Intervals over volumes.", [row])])


def reconstruction_section(report: Mapping[str, Any]) -> Section:
    """`evaluate.py reconstruction`: what the autoencoder loses."""
    psnr = report["psnr_db"]
    rows = [
        Row("PSNR inside the field of view, dB, mean", psnr["mean"]),
        Row("sharpness over real (mean gradient)", report["sharpness"], floor=1.0, floor_name="real"),
    ]
    rows += [Row(f"Dice of {label}, mean", found["mean"]) for label, found in report.get("dice", {}).items()]
    lead = f"What the autoencoder alone loses, of {report['volumes']} volumes ({report['split']}). No generated volume is better."
    return Section("Reconstruction", lead, [Table("Autoencoder", "Means over volumes, without an interval.", rows)])


def useful_claim(reports: Mapping[str, Mapping[str, Any]]) -> Claim:
    """Synthetic over real Dice; else a budget's, obedience to masks or to classes."""
    title, question = "Obeys, and useful", "Can a network learn from them what it learns from real ones?"
    dice = reports.get("dice", {})
    if "synthetic/real" in dice.get("ratios", {}):
        row = _ratio("synthetic/real", dice["ratios"]["synthetic/real"])
        sentence = "Dice on unseen real volumes after training on generated ones only, over training on real ones."
        if found := dice.get("adherence"):
            gap = found["synthetic-real"]
            sentence += (
                f" Obedience: Dice against the masks {found['synthetic']:.3f}, {found['real']:.3f} on real ones (difference "
                f"{between(gap['interval_subjects'], 'signed')})."
            )
        return Claim(title, question, row, sentence)
    if "adherence" in dice:
        sentence = "Dice of a segmenter trained on real volumes: generated volumes against their masks, less real ones."
        return Claim(title, question, _adherence(dice["adherence"]), sentence)
    for name in ("few_labels", "pretrain"):
        tables = budgets_section(reports[name]).tables if name in reports else []
        if tables := sorted(tables, key=lambda table: not table.heading.startswith(FAIR)):  # else the first
            return Claim(title, question, tables[0].rows[0], f"{tables[0].heading}, at {tables[0].rows[0].name}.")
    if "conditions" in reports:
        section = conditions_section(reports["conditions"])
        return Claim(title, question, section.tables[0].rows[0], section.lead)
    return Claim(title, question, None, "Not measured: run evaluate.py dice.")


def _size(item: tuple[str, Any]) -> float:
    """Of (budget, figures), to sort by: "all" comes last."""
    return float(item[0]) if item[0].isdecimal() else float("inf")


def _ratio(name: str, found: Mapping[str, Any]) -> Row:
    interval = over_seeds(list(found["per_seed"].values()))
    within = not_below(interval, 1.0)
    return Row(f"Dice, {name}", found["of_means"], pair(interval), 1.0, None, within, floor_name="as good as real")


def _adherence(found: Mapping[str, Any]) -> Row:
    gap = found["synthetic-real"]
    within = not_below(gap["interval_subjects"], 0.0)
    name = f"Dice on generated less on real volumes, {found['masks']} masks"
    return Row(name, gap["of_means"], pair(gap["interval_subjects"]), 0.0, None, within, "signed", "as real")

"""The sections on utility: Dice, few labels, pre-training, and reconstructions."""

from collections.abc import Mapping
from typing import Any

from evaluation.stats.intervals import over_seeds
from evaluation.studies.few_labels import ANY, BOTH, REAL_LONGER

from .adherence import conditions_section
from .model import Claim, Row, Section, Table, count_volumes, format_interval, not_below, pair
from .plots import line_plot

ARMS = {
    "real": "real",
    "real_longer": "real, as long as both",
    "synthetic": "synthetic",
    "both": "both",
    "scratch": "from scratch",
}
FAIR = f"{BOTH}/{REAL_LONGER}"  # in few_labels: two arms with the same number of steps
NOTE = "Intervals over seeds, or over subjects if there is one seed. Outside means a loss."


def dice_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py dice`: a segmenter for each training set, and adherence to
    masks."""
    real = [result["dice"] for result in report["scores"].get("real", [])]
    floor = sum(real) / len(real) if real else None
    floor_interval = pair(over_seeds(real)) if real else None
    rows = []
    for source, results in report["scores"].items():
        values = [result["dice"] for result in results]
        mean, interval = sum(values) / len(values), over_seeds(values)
        within = None if source == "real" or floor_interval is None else not_below(interval, floor_interval[0])
        title = f"trained on {source}"
        rows.append(Row(title, mean, pair(interval), floor, floor_interval, within, floor_name="trained on real"))
    tables = [
        Table(
            "Dice on held-out real volumes", f"Intervals over seeds. Volumes: {count_volumes(report['volumes'])}.", rows
        )
    ]
    if ratios := [_ratio(name, ratio) for name, ratio in report.get("ratios", {}).items()]:
        tables.append(
            Table("Relative to training on real", "Ratio of Dice, seed by seed; 1 is as good as real.", ratios)
        )
    if "adherence" in report:
        note = "The segmenter was trained on neither these volumes nor their masks. Intervals over subjects."
        tables.append(Table("Do volumes follow their masks?", note, [_adherence(report["adherence"])]))
    lead = (
        "The same small segmenter is trained on real or generated volumes, and tested on real volumes of held-out "
        "subjects."
    )
    return Section("Useful for training", lead, tables)


def budgets_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py few_labels` or `pretrain`: Dice by the number of labeled
    volumes."""
    few = report["evaluation"] == "few_labels"
    key, how = ("ratios", "ratio of Dice") if few else ("differences", "difference of Dice")
    tables = []
    for name, by_budget in report.get(key, {}).items():
        rows = []
        for labels, compared in sorted(by_budget.items(), key=_size):
            interval = compared["interval_seeds"] or compared["interval_subjects"]
            floor = 1.0 if few else 0.0
            title = f"{labels} labeled volumes"
            within = not_below(interval, floor)
            rows.append(
                Row(
                    title,
                    compared["of_means"],
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
    pictures = [line_plot(lines, ticks, "Dice on held-out real volumes", "labeled real volumes")] if ticks else []
    title = "Few labels" if few else "Pre-training without labels"
    lead = (
        "The segmenter is trained on k labeled real volumes, on synthetic volumes, and on both."
        if few
        else "The segmenter is pre-trained without labels, then fine-tuned on k labeled real volumes."
    )
    return Section(title, lead, tables, pictures)


def budget_lines(dice: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the budgets, smallest first, and for each arm its (Dice, interval) at each budget. The Dice is NaN where
    it was not measured. An arm that no budget changes has the same Dice at all budgets."""
    budgets = {labels: None for by_budget in dice.values() for labels in by_budget if labels != ANY}
    ticks = [labels for labels, _ in sorted(budgets.items(), key=_size)]
    lines: dict[str, list[Any]] = {}
    for arm, by_budget in dice.items():
        means = [by_budget.get(tick) or by_budget.get(ANY) for tick in ticks]
        points = [(mean["mean"], pair(mean["interval_seeds"])) if mean else (float("nan"), None) for mean in means]
        lines[ARMS.get(arm) or str(arm)] = points
    return ticks, lines


def reconstruction_section(report: Mapping[str, Any]) -> Section:
    """Make the section from a report of `evaluate.py reconstruction`: what the autoencoder loses."""
    psnr = report["psnr_db"]
    rows = [
        Row("PSNR inside the field of view, dB, mean", psnr["mean"]),
        Row("sharpness over real (mean gradient)", report["sharpness"], floor=1.0, floor_name="real"),
    ]
    if foreground := report.get("psnr_foreground_db"):
        rows.append(Row("PSNR where masks are not background, dB, mean", foreground["mean"]))
    rows += [Row(f"Dice of {label}, mean", dice["mean"]) for label, dice in report.get("dice", {}).items()]
    lead = (
        f"What the autoencoder alone loses on {report['volumes']} volumes ({report['split']}). Generated volumes "
        "cannot be better."
    )
    return Section("Reconstruction", lead, [Table("Autoencoder", "Means over volumes, without intervals.", rows)])


def useful_claim(reports: Mapping[str, Mapping[str, Any]]) -> Claim:
    """Claim utility by the ratio of synthetic to real Dice, or else by few labels, adherence to masks or adherence to
    classes."""
    title = "Faithful and useful"
    question = "Can a network learn from them what it learns from real volumes?"
    dice = reports.get("dice", {})
    if "synthetic/real" in dice.get("ratios", {}):
        row = _ratio("synthetic/real", dice["ratios"]["synthetic/real"])
        sentence = (
            "Dice on held-out real volumes after training on generated volumes alone, divided by the Dice after "
            "training on real volumes."
        )
        if adherence := dice.get("adherence"):
            gap = adherence["synthetic-real"]
            sentence += (
                f" Mask adherence: Dice against the masks is {adherence['synthetic']:.3f} on generated and "
                f"{adherence['real']:.3f} on real volumes (difference "
                f"{format_interval(gap['interval_subjects'], 'signed')})."
            )
        return Claim(title, question, row, sentence)
    if "adherence" in dice:
        sentence = (
            "Dice of a segmenter trained on real volumes: on generated volumes against their masks, minus on real "
            "volumes."
        )
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
    """Sort key of (budget, figures): "all" comes last."""
    return float(item[0]) if item[0].isdecimal() else float("inf")


def _ratio(name: str, ratio: Mapping[str, Any]) -> Row:
    interval = over_seeds(list(ratio["per_seed"].values()))
    within = not_below(interval, 1.0)
    return Row(f"Dice, {name}", ratio["of_means"], pair(interval), 1.0, None, within, floor_name="as good as real")


def _adherence(adherence: Mapping[str, Any]) -> Row:
    gap = adherence["synthetic-real"]
    within = not_below(gap["interval_subjects"], 0.0)
    name = f"Dice on generated minus on real volumes, {adherence['masks']} masks"
    return Row(name, gap["of_means"], pair(gap["interval_subjects"]), 0.0, None, within, "signed", "as real")

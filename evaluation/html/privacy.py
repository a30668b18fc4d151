"""The section on privacy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .model import Claim, Picture, Row, Section, Table, auc_row, not_above, pair
from .plots import png

REAL_PATIENTS = "The lower row shows real patients: whoever receives this page receives their scans."
MASKS = "A mask alone describes its patient in part, so re-identification above chance need not be memorization"


def privacy_section(report: Mapping[str, Any], folder: Path) -> Section:
    """Make the section from a report of `evaluate.py privacy`; the pictures are beside the report in `folder`."""
    tables = [Table(f"Compared as {name}", _note(space), _rows(space)) for name, space in report["spaces"].items()]
    if attack := report.get("loss_membership"):
        rows = [auc_row("membership by the generator's losses (AUC)", attack)]
        note = "Losses on training volumes against losses on held-out volumes."
        tables.append(Table("Attack by a holder of the model", note, rows))
    pictures = [
        Picture(
            png(folder, path, f"pictures.{space}"),
            f"Closest pairs as {space}: a generated volume above its nearest training volume. {REAL_PATIENTS}",
        )
        for space, path in report.get("pictures", {}).items()
    ]
    alpha = next(iter(report["spaces"].values()))["memorized"]["similarity"]["alpha"]
    lead = (
        "Whether generated volumes are nearer to the training volumes than the volumes of held-out patients are. The "
        f"threshold of similarity is set so that {100 * alpha:.3g} % of held-out patients would count as memorized."
    )
    return Section("Private", lead, tables, pictures)


def private_claim(report: Mapping[str, Any] | None) -> Claim:
    """Claim privacy by the memorized fraction, in the space where it is farthest above the false positives."""
    question = "Do they reveal whom the generator was trained on?"
    if report is None:
        return Claim("Private", question, None, "Not measured: run evaluate.py privacy.")
    rows = {name: _memorized("similarity", space) for name, space in report["spaces"].items()}
    worst, row = max(rows.items(), key=lambda item: item[1].value - float(item[1].floor or 0))
    count = sum(bool(row.within) for row in rows.values())
    sentence = (
        f"The memorized share compared as {worst}, where it is highest above the false positives. {count} of "
        f"{len(rows)} comparisons are within their false positives."
    )
    return Claim("Private", question, row, sentence)


def _memorized(name: str, space: Mapping[str, Any]) -> Row:
    memory = space["memorized"][name]
    false_positives = memory["false_positives"]
    titles = {
        "similarity": "memorized",
        "ratio": "memorized, by the ratio of distances",
        "other_masks": "memorized, patient of its mask excluded",
    }
    within = not_above(memory["interval_drawn"], false_positives["interval"][1])
    return Row(
        titles[name],
        memory["fraction"],
        pair(memory["interval_drawn"]),
        false_positives["fraction"],
        pair(false_positives["interval"]),
        within,
        "percent",
        "held-out real",
    )


def _rows(space: Mapping[str, Any]) -> list[Row]:
    rows = [_memorized(name, space) for name in ("similarity", "ratio", "other_masks") if name in space["memorized"]]
    yoon = space["yoon_2023"]
    floor = yoon["unseen_interval"]
    rows.append(
        Row(
            "memorized by the rule of Yoon et al. 2023",
            yoon["fraction"],
            pair(yoon["interval"]),
            yoon["unseen"],
            pair(floor),
            not_above(yoon["interval"], floor[1]),
            "percent",
            "held-out real",
        )
    )
    rows.append(auc_row("membership of a training volume (AUC)", space["membership"]))
    if own := space.get("own_mask"):
        within = not_above(own["interval"], 0.0)
        title = "similarity to the volume of its mask, training minus held-out masks"
        rows.append(Row(title, own["difference"], pair(own["interval"]), 0.0, None, within, "signed", "no memory"))
    for top in ("top_1", "top_5"):
        if reidentified := space.get("reidentification"):
            rate = reidentified[top]
            within = not_above(rate["interval"], rate["chance"])
            title = f"patient of the mask among the nearest {top[4:]} of {reidentified['patients']}"
            rows.append(
                Row(title, rate["rate"], pair(rate["interval"]), rate["chance"], None, within, "percent", "chance")
            )
    return rows


def _note(space: Mapping[str, Any]) -> str:
    if own := space.get("own_mask"):
        means = own["training_masks"]["mean"], own["unseen_masks"]["mean"]
        return (
            f"Similarity to the real volume of the mask: {means[0]:.3f} for training masks, {means[1]:.3f} for "
            f"held-out masks. {MASKS}."
        )
    return f"{MASKS}. Volumes generated from held-out masks would allow a comparison."

"""The page's section on privacy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .model import Claim, Picture, Row, Section, Table, auc_row, not_above, pair
from .plots import png

REAL_PATIENTS = "The lower row shows real patients: whoever gets this page gets their scans."


def privacy_section(report: Mapping[str, Any], folder: Path) -> Section:
    """What `evaluate.py privacy` found; pictures lie beside the report in `folder`."""
    tables = [Table(f"Compared as {name}", _note(found), _rows(found)) for name, found in report["spaces"].items()]
    if found := report.get("loss_membership"):
        rows = [auc_row("membership by the generator's losses (AUC)", found)]
        tables.append(
            Table("Whoever holds the model", "Losses on training volumes against losses on unseen ones.", rows)
        )
    pictures = [
        Picture(
            png(folder, path, f"pictures.{space}"),
            f"Closest pairs as {space}: a generated volume above its nearest training volume. {REAL_PATIENTS}",
        )
        for space, path in report.get("pictures", {}).items()
    ]
    lead = (
        "Whether generated volumes are nearer to the training volumes than unseen patients' are. The threshold of similarity is "
        f"set so that {report['spaces'][next(iter(report['spaces']))]['memorized']['similarity']['alpha'] * 100:.3g} % of unseen patients "
        "would be called memorized."
    )
    return Section("Private", lead, tables, pictures)


def private_claim(report: Mapping[str, Any] | None) -> Claim:
    """The memorized fraction, of the space where it is farthest above the false positives."""
    question = "Do they give away whom the generator learned from?"
    if report is None:
        return Claim("Private", question, None, "Not measured: run evaluate.py privacy.")
    every = {name: _memorized("similarity", found) for name, found in report["spaces"].items()}
    space, row = max(every.items(), key=lambda item: item[1].value - float(item[1].floor or 0))
    count = sum(bool(one.within) for one in every.values())
    sentence = f"Memorized, compared as {space}, where it is most; within the false positives in {count} of {len(every)} comparisons."
    return Claim("Private", question, row, sentence)


def _memorized(name: str, found: Mapping[str, Any]) -> Row:
    memory = found["memorized"][name]
    wrong = memory["false_positives"]
    titles = {
        "similarity": "memorized",
        "ratio": "memorized, by the ratio of distances",
        "other_masks": "memorized, without the patient of its mask",
    }
    within = not_above(memory["interval_drawn"], wrong["interval"][1])
    return Row(
        titles[name],
        memory["fraction"],
        pair(memory["interval_drawn"]),
        wrong["fraction"],
        pair(wrong["interval"]),
        within,
        "percent",
        "unseen real",
    )


def _rows(found: Mapping[str, Any]) -> list[Row]:
    rows = [_memorized(name, found) for name in ("similarity", "ratio", "other_masks") if name in found["memorized"]]
    yoon = found["yoon_2023"]
    floor = yoon.get("unseen_interval")  # earlier reports have none, and get no verdict
    rows.append(
        Row(
            "memorized as Yoon et al. 2023 count",
            yoon["fraction"],
            pair(yoon["interval"]),
            yoon["unseen"],
            pair(floor),
            None if floor is None else not_above(yoon["interval"], floor[1]),
            "percent",
            "unseen real",
        )
    )
    rows.append(auc_row("membership of a training volume (AUC)", found["membership"]))
    if own := found.get("own_mask"):
        within = not_above(own["interval"], 0.0)
        title = "similarity to the volume of its mask, training less unseen masks"
        rows.append(Row(title, own["difference"], pair(own["interval"]), 0.0, None, within, "signed", "no memory"))
    for top in ("top_1", "top_5"):
        if again := found.get("reidentification"):
            rate = again[top]
            within = not_above(rate["interval"], rate["chance"])
            title = f"patient of the mask among the nearest {top[4:]} of {again['patients']}"
            rows.append(
                Row(title, rate["rate"], pair(rate["interval"]), rate["chance"], None, within, "percent", "chance")
            )
    return rows


def _note(found: Mapping[str, Any]) -> str:
    if own := found.get("own_mask"):
        means = own["training_masks"]["mean"], own["unseen_masks"]["mean"]
        return (
            f"Similarity to the real volume of the mask: {means[0]:.3f} for training masks, {means[1]:.3f} for unseen ones. A mask "
            "tells something of its patient by itself, so re-identification above chance need not be memory."
        )
    return (
        "A mask tells something of its patient by itself, so re-identification above chance need not be memory: generate from unseen "
        "masks too, and the two are compared."
    )

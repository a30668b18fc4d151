"""From reports to files: report.html, which needs nothing beside it, report.md and report.json."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from files.atomic import write_text

from ..report import provenance, write_report
from .model import RULE, Claim, Section
from .privacy import privacy_section, private_claim
from .realism import consistency_section, consistent_claim, realism_section, realistic_claim, shapes_section
from .usefulness import budgets_section, conditions_section, dice_section, reconstruction_section, useful_claim

ORDER = ("realism", "shapes", "dice", "few_labels", "pretrain", "conditions", "privacy", "reconstruction")


def build_page(paths: Sequence[Path]) -> dict[str, Any]:
    """Claims and sections from JSON reports of evaluate.py, one of each command at most.

    Returns: {"claims": [Claim], "sections": [Section], "reports": {command: the report}, "rule": how a figure is judged}.
    Raises: ValueError for a file that is no such report, for two of one command, and for a picture that is missing.
    """
    reports: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    for path in paths:
        report = read_report(path)
        name = report["evaluation"]
        if name in reports:
            raise ValueError(f"{path}: there is a report of {name} already; give one of each command")
        reports[name], folders[name] = report, path.parent
    sections: list[Section] = []
    for name in ORDER:
        if name in reports:
            sections += _sections(name, reports[name], folders[name])
    claims = [
        realistic_claim(reports.get("realism")),
        consistent_claim(reports.get("realism")),
        useful_claim(reports),
        private_claim(reports.get("privacy")),
    ]
    return {"claims": claims, "sections": sections, "reports": reports, "rule": RULE}


def read_report(path: Path) -> dict[str, Any]:
    """A JSON report of evaluate.py. Raises: ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such report")
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); give reports of evaluate.py") from error
    if not isinstance(report, dict) or report.get("evaluation") not in ORDER:
        raise ValueError(f"{path}: is no report of evaluate.py that a page can show; those are of {', '.join(ORDER)}")
    return report


def write_page(
    paths: Sequence[Path], output: Path, title: str, missing: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write report.html, report.md and report.json to `output`, and return what the last holds.

    Args:
        missing: commands that were to be on the page, and why they are not.
    """
    page = build_page(paths)
    output.mkdir(parents=True, exist_ok=True)
    missing = dict(missing or {})
    context = {**page, "title": title, "made": provenance(), "missing": missing}
    environment = Environment(
        loader=PackageLoader("evaluation.page", "."),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(context)
        write_text(output / name, text)
    figures = {
        "evaluation": "page",
        "title": title,
        "rule": page["rule"],
        "claims": [plain(claim) for claim in page["claims"]],
        "sections": [plain(section) for section in page["sections"]],
        "reports": page["reports"],
        "missing": missing,
        **provenance(),
    }
    write_report(output / "report.json", figures)
    return figures


def plain(part: Claim | Section) -> dict[str, Any]:
    """As JSON, without pictures."""
    found = dataclasses.asdict(part)
    found.pop("pictures", None)
    for table in found.get("tables", []):
        table.pop("picture")
    return found


def _sections(name: str, report: Mapping[str, Any], folder: Path) -> list[Section]:
    if name == "realism":
        looks = [realism_section(report)] if {"features", "diversity", "intensity"} & set(report) else []
        found = looks + ([consistency_section(report)] if "consistency" in report else [])
    elif name == "privacy":
        found = [privacy_section(report, folder)]
    elif name in ("few_labels", "pretrain"):
        found = [budgets_section(report)]
    else:
        make = {
            "dice": dice_section,
            "shapes": shapes_section,
            "conditions": conditions_section,
            "reconstruction": reconstruction_section,
        }[name]
        found = [make(report)]
    measured_on = {
        "command": report.get("command", "unknown"),
        "commit": report.get("commit") or "unknown",
        "date": report.get("date", "unknown"),
        "volumes": _counts(report.get("volumes")),
    }
    return [dataclasses.replace(section, measured_on=measured_on) for section in found]


def _counts(volumes: Any) -> str:
    """How many volumes of what, in words."""
    if not isinstance(volumes, Mapping):
        return "" if volumes is None else str(volumes)
    counted = {name: one.get("volumes") if isinstance(one, Mapping) else one for name, one in volumes.items()}
    return ", ".join(f"{count} {name}" for name, count in counted.items() if count is not None)

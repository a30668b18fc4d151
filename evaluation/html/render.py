"""From reports to files: report.html, which needs nothing beside it, report.md and report.json."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluation.report import provenance, write_report
from files.atomic import write_text
from files.documents import read_json
from files.paths import printable

from .model import RULE, Claim, Section
from .privacy import privacy_section, private_claim
from .realism import consistency_section, consistent_claim, realism_section, realistic_claim, shapes_section
from .usefulness import budgets_section, conditions_section, dice_section, reconstruction_section, useful_claim

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~!&$@]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
ORDER = ("realism", "shapes", "dice", "few_labels", "pretrain", "conditions", "privacy", "reconstruction")


def build_page(paths: Sequence[Path]) -> dict[str, Any]:
    """Claims and sections from JSON reports of evaluate.py, one of each command at most.

    Returns: {"claims": [Claim], "sections": [Section], "reports": {command: the report}, "rule": how a figure is judged}.
    Raises: ValueError for a file that is no such report, for two of one command, and for a picture that is missing.
    """
    reports: dict[str, dict[str, Any]] = {}
    paths_of: dict[str, Path] = {}
    for path in paths:
        report = read_report(path)
        name = report["evaluation"]
        if name in reports:
            raise ValueError(f"{path}: there is a report of {name} already; give one of each command")
        reports[name], paths_of[name] = report, path
    sections: list[Section] = []
    for name in ORDER:
        if name in reports:
            with naming(paths_of[name]):
                sections += _sections(name, reports[name], paths_of[name].parent)
    with naming(*paths):
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
    report = shown(read_json(path))
    name = report.get("evaluation") if isinstance(report, dict) else None
    if not isinstance(report, dict) or not isinstance(name, str) or name not in ORDER:
        raise ValueError(f"{path}: is no report of evaluate.py that a page can show; those are of {', '.join(ORDER)}")
    return report


def shown(value: Any) -> Any:
    """What somebody's JSON holds, its texts on one line and without characters that act or hide (`files.paths.printable`): they are
    shown on pages, in pictures and on terminals."""
    if isinstance(value, dict):
        return {shown(key): shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shown(one) for one in value]
    return " ".join(printable(str(value)).split()) if isinstance(value, str) else value


@contextmanager
def naming(*paths: Path) -> Iterator[None]:
    """Raises: ValueError naming the reports, for whatever goes wrong with one that was damaged, or was written by hand."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        names = ", ".join(map(str, paths))
        reason = (
            str(error)
            if type(error) is ValueError
            else f"it holds other figures than expected ({type(error).__name__}: {error})"
        )
        raise ValueError(f"{names}: cannot be shown: {reason}") from error


def markdown(value: Any) -> Any:
    """A value that goes into report.md, as text that means nothing in Markdown: no table, link, heading, list or HTML."""
    text = MARKDOWN.sub(r"\\\g<0>", " ".join(printable(str(value)).split()))
    return re.sub(
        r"^(?:[-+=]|\d{1,9}(?=[.)]))(?=[.)]?\s|[.)]?$)",
        lambda found: f"\\{found[0]}" if not found[0].isdecimal() else f"{found[0]}\\",
        text,
    )


def write_page(
    paths: Sequence[Path], output: Path, title: str, missing: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write report.html, report.md and report.json to `output`, and return what the last holds.

    Args:
        missing: commands that were to be on the page, and why they are not.
    """
    page = build_page(paths)
    output.mkdir(parents=True, exist_ok=True)
    title, missing, made = shown(title), shown(dict(missing or {})), shown(provenance())
    context = {**page, "title": title, "made": made, "missing": missing}
    for name, finalize in (("report.html", None), ("report.md", markdown)):
        environment = Environment(
            loader=PackageLoader("evaluation.html", "."),
            autoescape=name.endswith(".html"),
            finalize=finalize,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
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

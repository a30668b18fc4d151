"""Write reports as files: report.html, which is self-contained, report.md and report.json."""

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

from .adherence import adherence_section, conditions_section, morphometry_section
from .model import Page, Section, count_volumes
from .privacy import privacy_section, private_claim
from .realism import consistency_section, consistent_claim, realism_section, realistic_claim, shapes_section
from .utility import budgets_section, dice_section, reconstruction_section, useful_claim

MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~!&$@]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
ORDER = (
    *("realism", "shapes", "morphometry", "dice", "few_labels", "pretrain", "adherence", "conditions"),
    *("privacy", "reconstruction"),
)


def build_page(paths: Sequence[Path]) -> Page:
    """Build claims and sections from JSON reports of evaluate.py, at most one per command.

    Raises: ValueError for a file that is not such a report, for two reports of one command, and for a missing picture.
    """
    reports: dict[str, Mapping[str, Any]] = {}
    paths_of: dict[str, Path] = {}
    for path in paths:
        report = read_report(path)
        name = report["evaluation"]
        if name in reports:
            raise ValueError(f"{path}: there is a report of {name} already; give one report per command")
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
    return Page(claims, sections, reports)


def read_report(path: Path) -> Mapping[str, Any]:
    """Read a JSON report of evaluate.py. Raises: ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such report")
    report = shown(read_json(path))
    name = report.get("evaluation") if isinstance(report, dict) else None
    if not isinstance(report, dict) or not isinstance(name, str) or name not in ORDER:
        raise ValueError(f"{path}: not a report of evaluate.py that a page can show; these are {', '.join(ORDER)}")
    return report


def shown(value: Any) -> Any:
    """Make the texts of a foreign JSON document safe to show on pages, in pictures and on terminals: on one line,
    without control characters and invisible characters (`files.paths.printable`)."""
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    return " ".join(printable(str(value)).split()) if isinstance(value, str) else value


@contextmanager
def naming(*paths: Path) -> Iterator[None]:
    """Name the reports in errors. Raises: ValueError for any error that a damaged or hand-written report causes."""
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
    """Escape a value for report.md, so that Markdown reads it as plain text: no table, link, heading, list or HTML."""
    text = MARKDOWN.sub(r"\\\g<0>", " ".join(printable(str(value)).split()))
    return re.sub(
        r"^(?:[-+=]|\d{1,9}(?=[.)]))(?=[.)]?\s|[.)]?$)",
        lambda match: f"\\{match[0]}" if not match[0].isdecimal() else f"{match[0]}\\",
        text,
    )


def write_page(page: Page, output: Path, title: str, missing: Mapping[str, str] | None = None) -> dict[str, object]:
    """Write report.html, report.md and report.json to `output`. Returns the content of the last.

    Args:
        missing: commands that the page lacks, with the reason for each.
    """
    output.mkdir(parents=True, exist_ok=True)
    title, missing = shown(title), shown(dict(missing or {}))
    made_by = shown(provenance())
    context = {
        "claims": page.claims,
        "sections": page.sections,
        "rule": page.rule,
        "title": title,
        "missing": missing,
        "made_by": made_by,
    }
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
    report = {
        "evaluation": "page",
        "title": title,
        "rule": page.rule,
        "claims": [dataclasses.asdict(claim) for claim in page.claims],
        "sections": [without_pictures(section) for section in page.sections],
        "reports": page.reports,
        "missing": missing,
        **provenance(),
    }
    write_report(output / "report.json", report)
    return report


def without_pictures(section: Section) -> dict[str, object]:
    """Convert a section for JSON."""
    values = dataclasses.asdict(section)
    values.pop("pictures")
    for table in values["tables"]:
        table.pop("picture")
    return values


def _sections(name: str, report: Mapping[str, Any], folder: Path) -> list[Section]:
    if name == "realism":
        sections = [realism_section(report)] if {"features", "diversity", "intensity"} & set(report) else []
        sections += [consistency_section(report)] if "consistency" in report else []
    elif name == "privacy":
        sections = [privacy_section(report, folder)]
    elif name in ("few_labels", "pretrain"):
        sections = [budgets_section(report)]
    else:
        make = {
            "dice": dice_section,
            "shapes": shapes_section,
            "conditions": conditions_section,
            "adherence": adherence_section,
            "morphometry": morphometry_section,
            "reconstruction": reconstruction_section,
        }[name]
        sections = [make(report)]
    measured_on = {
        "command": report.get("command", "unknown"),
        "commit": report.get("commit") or "unknown",
        "date": report.get("date", "unknown"),
        "volumes": count_volumes(report.get("volumes")),
    }
    return [dataclasses.replace(section, measured_on=measured_on) for section in sections]

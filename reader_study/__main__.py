"""Let people tell generated volumes from real ones, and rate both: folders for the readers, and the analysis.

    medvolume reader-study create --real scans/ --generated out/generated --output study --readers 3
    medvolume reader-study create --real scans/ --pipeline weights/hippocampus --masks masks/ --output study
    medvolume reader-study analyze --key study/key.json --answers answers/ --output study_report
    medvolume reader-study plan --readers 2 3 5 --volumes 40 80 --skill 0.5

`create` writes one offline folder for each reader, and key.json, which readers must not get. With --pipeline it first
generates the volumes, one of each mask, into OUTPUT-generated; the same command resumes. `analyze` (or `analyse`)
reads what they send back. docs/reader_study.md explains both.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, console_program, run_command
from cli.settings import (
    FiniteFloat,
    InnerShare,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Share,
    TwoOrMore,
)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(prog=console_program(), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_create(commands.add_parser("create", help="write a folder for each reader"))
    _add_analyze(commands.add_parser("analyze", aliases=["analyse"], help="read the answers, write a report"))
    _add_plan(commands.add_parser("plan", help="how many readers and volumes are needed, by simulation"))
    options = parser.parse_args(args)
    if options.command == "create" and not (options.generated or options.pipeline):
        parser.error("give --generated (folders of volumes), --pipeline (which generates them), or both")
    if options.command == "create" and options.masks and not options.pipeline:
        parser.error(f"--masks {' '.join(options.masks)}: are for --pipeline; leave them out")
    return options


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", type=Path, nargs="+", required=True, metavar="DIR", help="folders of real volumes")
    parser.add_argument("--generated", nargs="+", default=[], metavar="[NAME=]DIR", help="folders of generated ones")
    parser.add_argument(
        "--pipeline", nargs="+", default=[], metavar="[NAME=]DIR", help="pipelines that generate volumes for the study"
    )
    masks_help = "that --pipeline generates from (the examples in its folder)"
    parser.add_argument("--masks", nargs="+", default=[], metavar="DIR_OR_GLOB", help=masks_help)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--title", default="Readers' study", help="of the page (Readers' study)")
    parser.add_argument("--readers", type=Number(PositiveInt), default=2, help="number of readers (2)")
    parser.add_argument("--most", type=Number(PositiveInt), help="volumes of each source, training included (all)")
    parser.add_argument("--training", type=Number(NonNegativeInt), default=4, help="training cases (4)")
    parser.add_argument("--without_feedback", action="store_true", help="do not show the truth of training cases")
    parser.add_argument("--repeats", type=Number(Share), default=0.15, help="share that comes twice (0.15)")
    parser.add_argument("--pairs", type=Number(NonNegativeInt), default=10, help="forced choices, at most (10)")
    parser.add_argument(
        "--spacing", nargs=3, type=Number(PositiveFloat), metavar="MM", help="voxel size, right anterior superior"
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=Number(FiniteFloat),
        metavar=("LOW", "HIGH"),
        help="in file units (percentiles)",
    )
    parser.add_argument("--noise", type=Number(Share), default=0.01, help="of the window, on every volume (0.01)")
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="of choice, order and --pipeline (0)")


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="key.json of the study")
    parser.add_argument("--answers", type=Path, nargs="+", required=True, metavar="PATH", help="files, or their folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--margin", type=Number(InnerShare), default=0.1, help="of equivalence to 0.5 (0.1)")
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="of the bootstrap (0)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readers", type=Number(TwoOrMore), nargs="+", default=[2, 3, 5, 8], help="(2 3 5 8)")
    parser.add_argument("--volumes", type=Number(TwoOrMore), nargs="+", default=[40, 80, 160], help="(40 80 160)")
    parser.add_argument("--skill", type=Number(InnerShare), default=0.5, help="the readers' true accuracy (0.5)")
    parser.add_argument("--margin", type=Number(InnerShare), default=0.1, help="of equivalence (0.1)")
    parser.add_argument("--reader_sd", type=Number(NonNegativeFloat), default=0.15, help="of d' between readers (0.15)")
    parser.add_argument("--case_share", type=Number(Share), default=0.3, help="of the noise that readers share (0.3)")
    parser.add_argument("--power", type=Number(InnerShare), default=0.8, help="that is wanted (0.8)")
    parser.add_argument("--trials", type=Number(PositiveInt), default=500, help="simulated studies of each size (500)")
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="of the simulation (0)")


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import logging

from reader_study.design import Plan
from reader_study.kit import KEY, check_new, collect_cases, create_study


def main(args: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    logging.basicConfig(format="%(message)s")
    options = parse(args)
    {"create": run_create, "analyze": run_analyze, "analyse": run_analyze, "plan": run_plan}[options.command](options)


def run_create(options: argparse.Namespace) -> None:
    """Write the folders of the readers."""
    from reader_study.voxels import Look

    generated: dict[str, list[Path]] = {}
    for name, folder in map(_named, options.generated):
        generated.setdefault(name, []).append(Path(folder).expanduser())
    if options.pipeline:
        for name, folder in _generate(options, set(generated)).items():
            generated[name] = [folder]
    low, high = options.window or (0.5, 99.5)
    look = Look(
        tuple(options.spacing) if options.spacing else None,
        "window" if options.window else "percentile",
        low,
        high,
        options.noise,
    )
    plan = Plan(options.readers, options.seed, options.training, options.repeats, options.pairs)
    cases = collect_cases(options.real, generated, options.most, options.seed)
    key = create_study(
        cases, options.output, plan=plan, look=look, title=options.title, feedback=not options.without_feedback
    )
    for reader, items in key.readers.items():
        count = {section: sum(item.section == section for item in items) for section in ("training", "single", "pair")}
        again = sum(item.repeat_of is not None for item in items)
        print(
            f"{options.output / reader}: {count['training']} training cases, {count['single']} volumes "
            f"({again} of them repeats), {count['pair']} pairs"
        )
    print(f"give each reader one folder; keep {options.output / KEY}, which tells real from generated")


def _named(word: str) -> tuple[str, str]:
    """Return the name and the folder of NAME=DIR; that of a lone folder is "generated"."""
    name, equals, folder = word.rpartition("=")
    return name if equals else "generated", folder


def _generate(options: argparse.Namespace, taken: set[str]) -> dict[str, Path]:
    """Generate the volumes of --pipeline. Returns: the folder of each model's. Errors as `generate_for_study`."""
    from reader_study.generated import generate_for_study

    check_new(options.output)  # before hours of work
    pipelines: dict[str, str] = {}
    for name, folder in map(_named, options.pipeline):
        if name in taken or name in pipelines:
            raise ValueError(f"--pipeline {folder}: another set is called {name}; name it: --pipeline NAME={folder}")
        pipelines[name] = folder
    return generate_for_study(pipelines, options.masks, options.output, options.seed)


def run_analyze(options: argparse.Namespace) -> None:
    """Read the answers and write the report."""
    from reader_study.analysis import analyze
    from reader_study.answers import read_answers
    from reader_study.kit import read_key
    from reader_study.report import write_study_report

    key = read_key(options.key)
    readings = read_answers(options.answers, key)
    write_study_report(analyze(readings, key, margin=options.margin, seed=options.seed), readings, options.output)
    print(f"the report is {options.output / 'report.html'}")


def run_plan(options: argparse.Namespace) -> None:
    """Print a table of power."""
    from reader_study.plan import Setting, power_table

    setting = Setting(options.skill, options.reader_sd, options.case_share)
    table = power_table(options.readers, options.volumes, setting, options.margin, options.trials, options.seed)
    print(table.text(options.power))

"""Write docs/goals.md: what was asked of the project, what was measured, and by which command.

    python -m tools.goals_page

Figures are read from the reports, and "met" is computed from them. Where there is no report, the table says so.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/goals.md"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return ArgumentParser(description=__doc__).parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from benchmarks.speed.targets import check
from evaluation.html.model import distance_row
from files.atomic import write_text
from files.documents import read_object
from tools.figures.table import FIGURES, Figure
from tools.markdown import table

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One thing that was asked for.

    Attributes:
        asked: what.
        reports: where the figure is from, as `tools.figures` names them without folder and ending; () if nowhere.
        measure: the figure, from the reports.
        form: how figure and target are written.
        least, most: the target: not below, not above.
        test: which holds the goal in place of a report.
        why: it is short, or there is no report; not written where the goal is met.
    """

    asked: str
    reports: tuple[str, ...] = ()
    measure: Callable[..., float] | None = None
    form: str = "{:.4g}"
    least: float | None = None
    most: float | None = None
    test: str = ""
    why: str = ""


def ratio(report: Report, arms: str = "synthetic/real") -> float:
    """Return the mean ratio of two arms of evaluate.py dice."""
    return report["ratios"][arms]["of_means"]


def off_by(report: Report, highest: float) -> float:
    """Return the largest difference of a reconstruction's power up to a frequency, in dB."""
    power = report["spectrum"]["ratio_db"]
    return max(abs(value) for band, value in power.items() if float(band.partition("-")[2]) <= highest)


def memorized(report: Report) -> float:
    """Return by how much the share of copies is above that of unseen volumes, by the worst measure, in points."""
    found = [one for space in report["spaces"].values() for one in space["memorized"].values() if isinstance(one, dict)]
    return 100 * max(one["fraction"] - one["false_positives"]["fraction"] for one in found)


def outside(comparisons: Iterator[Report]) -> int:
    """Return how many comparisons are above their floor."""
    return sum(not distance_row("", one).within for one in comparisons)


def statistics(report: Report, part: str) -> Iterator[Report]:
    """Yield the comparisons of statistics of slices, or of intensity."""
    for channel in report[part].values():
        yield from (one["wasserstein"] for one in channel.get("statistics", channel).values())


def faults(report: Report) -> int:
    """Return how many files were corrupt, lost or different after kills."""
    return sum(len(job[kind]) for job in report["jobs"].values() for kind in ("corrupt_files", "lost_or_different"))


def generating(report: Report) -> Report:
    """Return what benchmarks.speed.run measured of the shipped pipeline."""
    return next(one["values"] for one in report["measurements"] if one["part"] == "generation")


def rows_of(report: Report, network: str, side: int) -> Report:
    """Return the decoding of one network and size in group_norm_streaming."""
    return next(
        row for row in report["rows"] if (row["job"], row["network"], row["side"]) == ("decoding", network, side)
    )


TEACHER, STUDENT, SHAPES = "hippocampus", "hippocampus-fast", "hippocampus-masks"
NEVER = "no report of a measurement is in the repository"
AT_HAND = "seen by the people who did it, and not written to a report"
BRAINS = "no trained model is shipped; docs/brains.md has the recipe"
OLD = ", with an earlier decoder and sampler"
GOALS: dict[str, tuple[Goal, ...]] = {
    "The spine (2)": (
        Goal(
            "Dice of a segmenter trained on generated volumes, over real ones",
            (f"{TEACHER}/dice",),
            ratio,
            "{:.4f}",
            least=0.98,
        ),
        Goal(
            "PSNR of reconstructions before anything adversarial, dB",
            (f"{TEACHER}/reconstruction_before",),
            lambda report: report["psnr_db"]["mean"],
            "{:.2f}",
            least=24.5,
        ),
        Goal(
            "their power off by, up to 0.3 cycles a voxel, dB",
            (f"{TEACHER}/reconstruction_before",),
            lambda report: off_by(report, 0.3),
            "{:.1f}",
            most=1.5,
        ),
        Goal(
            f"seconds a volume from mask to image on two cores{OLD}",
            ("docs/performance",),
            lambda report: generating(report)["seconds_per_volume"]["whole"]["median"],
            "{:.2f}",
            most=0.5,
            why="most of it is the network, which runs near the machine's peak; a student needs one or two calls",
        ),
        Goal("`make test` under ten minutes on two cores", why="the tests have grown; the last whole run took longer"),
    ),
    "Several architectures (4)": (
        Goal(
            "VQ-GAN: share of the codebook in use",
            ("docs/vqgan",),
            lambda report: report["codebook"]["usage"],
            "{:.2f}",
            least=0.5,
        ),
        Goal(
            "generated by the retrained weights, synthetic / real, one volume a mask",
            (f"{TEACHER}/dice",),
            ratio,
            "{:.4f}",
            least=0.99,
        ),
        Goal(
            "power of sharpened reconstructions off by, up to 0.45 cycles, dB",
            (f"{TEACHER}/reconstruction",),
            lambda report: off_by(report, 0.45),
            "{:.1f}",
            most=1.5,
        ),
        Goal(
            "PSNR that sharpening costs, dB",
            (f"{TEACHER}/reconstruction_before", f"{TEACHER}/reconstruction"),
            lambda before, after: before["psnr_db"]["mean"] - after["psnr_db"]["mean"],
            "{:.2f}",
            most=0.7,
        ),
        Goal(
            "a classifier of real shapes on generated minus real ones, points",
            ("adrenal-shapes/conditions",),
            lambda report: report["difference_points"]["right"],
            "{:.1f}",
            least=-5,
        ),
    ),
    "Evidence (5)": (
        Goal(
            "one volume a mask, synthetic / real",
            (f"{TEACHER}/dice",),
            ratio,
            "{:.4f}",
            least=0.995,
            why="the cause is not known; the earlier decoder and sampler were as far from it",
        ),
        Goal("four volumes a mask, synthetic / real" + OLD, (f"{TEACHER}/dice_four",), ratio, "{:.4f}", least=1.0),
        Goal(
            "trained on real, Dice on generated minus real volumes" + OLD,
            (f"{TEACHER}/dice_earlier",),
            lambda report: abs(report["adherence"]["synthetic-real"]["of_means"]),
            "{:.4f}",
            most=0.01,
        ),
        Goal(
            "both / real at 32 labels" + OLD,
            (f"{TEACHER}/few_labels",),
            lambda report: report["ratios"]["both/real"]["32"]["of_means"],
            "{:.3f}",
            least=1.02,
        ),
        Goal(
            "both / real at all labels" + OLD,
            (f"{TEACHER}/dice_both",),
            lambda report: ratio(report, "both/real"),
            "{:.4f}",
            least=1.0,
        ),
        Goal(
            "correlation with the volume of its mask, training minus test masks: lower end of the interval",
            (f"{TEACHER}/privacy",),
            lambda report: report["spaces"]["image"]["own_mask"]["interval"][0],
            "{:.3f}",
            most=0.0,
        ),
        Goal(
            "MS-SSIM of generated minus real test pairs",
            (f"{TEACHER}/realism",),
            lambda report: abs(report["diversity"]["generated_minus_test"]["mean"]),
            "{:.3f}",
            most=0.02,
            why="residual noise makes generated volumes less alike than real ones (docs/evidence.md)",
        ),
    ),
    "Masks from nothing, editing, fine-tuning (6)": (
        Goal(
            f"trained on pairs from nothing, synthetic / real{OLD}",
            (f"{SHAPES}/dice",),
            ratio,
            "{:.4f}",
            least=0.97,
        ),
        Goal(
            f"inpainting: voxels changed outside of the region{OLD}",
            ("docs/editing",),
            lambda report: sum(one["changed_outside"] for one in report["regions"].values()),
            "{:.0f}",
            most=0,
        ),
        Goal(
            f"inpainting: jump at the border, worse of two kinds of regions{OLD}",
            ("docs/editing",),
            lambda report: max(one["jump"]["mean"] for one in report["regions"].values()),
            "{:.3f}",
            most=1.1,
        ),
        Goal(
            f"fine-tuned minus from scratch, 16 volumes, Dice: lower end over the seeds{OLD}",
            ("docs/finetuning",),
            lambda report: report["less_from_scratch"]["fine-tuned"]["interval_seeds"][0],
            "{:.4f}",
            least=0.0,
        ),
    ),
    "Robust (7, 16)": (
        Goal(
            "losses of several processes off by, relative",
            ("docs/processes",),
            lambda report: max(
                value
                for script in ("train_vae", "train_ldm")
                for value in report[script]["largest_relative_difference"].values()
            ),
            "{:.1e}",
            most=1e-4,
        ),
        Goal("corrupt or lost files after 30 kills", ("docs/survival",), faults, "{:.0f}", most=0, why=NEVER),
        Goal(
            "findings of 10,000 damaged files",
            ("docs/fuzz",),
            lambda report: len(report["findings"]),
            "{:.0f}",
            most=0,
            why="one of an earlier commit is in docs/security.md, without its report",
        ),
        Goal(
            "planted faults that the tests notice, at least 95 % in every package",
            why="`make mutants` writes out/mutants.jsonl, which is not kept",
        ),
        Goal("an interrupted and resumed training equals an uninterrupted one", test="tests/training/test_resume.py"),
    ),
    "The house (17)": (
        Goal("mask to NIfTI in at most 15 functions and 12 files", test="tests/project/test_walk.py"),
        Goal(
            "long functions have a reason, folders and dicts of anything are few", test="tests/project/test_limits.py"
        ),
        Goal("imports point one way", test="tests/project/test_imports.py"),
        Goal("README of at most 100 short lines", test="tests/project/test_readme.py"),
        Goal("shipped pipelines make the voxels that they made", test="tests/pipelines/test_golden.py"),
        Goal("not slower than before the redesign (`benchmarks.speed.before_after`)", why=AT_HAND),
        Goal("no pair of logic", why=AT_HAND),
    ),
    "The first hour (18)": (
        Goal(
            "minutes from a folder of 16 patients to the first picture",
            ("docs/quickstart",),
            lambda report: report["minutes"]["picture"],
            "{:.1f}",
            most=10,
        ),
        Goal("the six commands on twelve layouts", test="tests/recipes/test_six_commands.py"),
        Goal("`pipe(mask)` samples as sampling.json says", test="tests/pipelines/test_sampling_settings.py"),
    ),
    "Any number of volumes (19)": (
        Goal(
            "memory of a training at 2,000 volumes over that at 100, larger of both",
            ("docs/prepared",),
            lambda report: max(
                report["memory"][f"{name}_2000"]["peak_mib"] / report["memory"][f"{name}_100"]["peak_mib"]
                for name in ("vae", "ldm")
            ),
            "{:.2f}",
            most=1.1,
        ),
        Goal(
            "second start at 2,000 volumes to the end of the first step, seconds",
            ("docs/prepared",),
            lambda report: report["memory"]["second_start_2000"]["first_step_s"],
            "{:.1f}",
            most=10,
            why="most of it is the imports of torch and diffusers",
        ),
        Goal(
            "share of a step that waits for data, %",
            ("docs/prepared",),
            lambda report: 100 * report["wait"]["data_wait"],
            "{:.1f}",
            most=2,
        ),
        Goal(
            "preparation in two processes on two cores, times as fast as in one on one",
            ("docs/prepared",),
            lambda report: report["preparation"]["speedup"],
            "{:.2f}",
            least=1.7,
        ),
        Goal(
            "memory of the evaluation at 2,000 and 2,000 volumes, GiB",
            ("docs/evaluation_size",),
            lambda report: max(one["peak_mib"] for one in report["costs"]["2000"].values()) / 1024,
            "{:.2f}",
            most=4,
        ),
        Goal(
            "largest size of a cache limited to 1 GiB, GiB",
            ("docs/cohort",),
            lambda report: report["limited"]["limited"]["largest_cache"] / 2**30,
            "{:.2f}",
            most=1,
            why=NEVER,
        ),
        Goal(
            "the same losses with that cache (1: yes)",
            ("docs/cohort",),
            lambda report: report["limited"]["same_losses"],
            "{:.0f}",
            least=1,
            why=NEVER,
        ),
    ),
    "Fewer steps (20)": (
        Goal(
            "student at 2 calls, synthetic / real",
            (f"{STUDENT}/dice",),
            ratio,
            "{:.4f}",
            least=0.995,
            why="it is a little below its teacher, which is below this too",
        ),
        Goal("student at 1 call, synthetic / real", (f"{STUDENT}/dice_one_call",), ratio, "{:.4f}", least=0.99),
        Goal(
            "the worse of both below the teacher by",
            (f"{TEACHER}/dice", f"{STUDENT}/dice", f"{STUDENT}/dice_one_call"),
            lambda teacher, *students: ratio(teacher) - min(map(ratio, students)),
            "{:.4f}",
            most=0.005,
        ),
        Goal(
            "seconds of network a volume at 1 call on two cores",
            (f"{STUDENT}/generation_one_call",),
            lambda report: report["seconds_per_volume"]["denoising"]["median"],
            "{:.2f}",
            most=0.06,
            why="measured on one core",
        ),
        Goal(
            "60 times as fast as 50 DDIM steps of MONAI's at 1 call, 35 times at 2",
            why="the benchmark compares 20 steps; students are not in it",
        ),
        Goal(
            "teacher, one volume a mask, synthetic / real",
            (f"{TEACHER}/dice",),
            ratio,
            "{:.4f}",
            least=1.0,
            why="the cause is not known; four volumes a mask reached it with an earlier sampler",
        ),
        Goal(
            "power of generated volumes off by, to 0.5 cycles a voxel, dB",
            (f"{TEACHER}/realism",),
            lambda report: max(map(abs, report["intensity"]["image"]["spectrum_db"]["generated_over_test"]["mean"])),
            "{:.1f}",
            most=0.8,
            why="above 0.35 cycles; it comes with the decoder and the residual noise",
        ),
        Goal(
            "statistics of slices above their floor",
            (f"{TEACHER}/realism",),
            lambda report: outside(statistics(report, "consistency")),
            "{:.0f}",
            most=0,
        ),
        Goal(
            "mean, spread and quantiles of intensity above their floor",
            (f"{TEACHER}/realism",),
            lambda report: outside(one for name in ("intensity",) for one in statistics(report, name)),
            "{:.0f}",
            most=0,
            why="the darkest percent is darker than that of real volumes",
        ),
        Goal(
            "kernel distances above their floor, of two",
            (f"{TEACHER}/realism",),
            lambda report: outside(one["kernel"] for one in report["features"].values()),
            "{:.0f}",
            most=0,
        ),
        *(
            Goal(
                f"{who}: share of copies above that of unseen real volumes, worst of all measures, points",
                (report,),
                memorized,
                "{:.1f}",
                most=0,
                why="by the ratio of distances in the encoder's features alone",
            )
            for who, report in (
                ("teacher", f"{TEACHER}/privacy"),
                ("student at 2 calls", f"{STUDENT}/privacy"),
                ("student at 1 call", f"{STUDENT}/privacy_one_call"),
            )
        ),
        Goal(
            "pre-trained on generated volumes minus from scratch, 8 labels, Dice" + OLD,
            (f"{TEACHER}/pretrain",),
            lambda report: report["differences"]["synthetic-scratch"]["8"]["of_means"],
            "{:.3f}",
            least=0.03,
            why="perhaps 1,200 steps of pre-training are too few, which was not tested; the control was not run",
        ),
        Goal(
            "lesions of 2 to 6 voxels: Dice on generated below that on real phantoms by, best model",
            ("docs/small_lesions",),
            lambda report: report["real"]["real"]["dice"] - max(one["dice"] for one in report["generated"].values()),
            "{:.3f}",
            most=0.01,
            why="docs/small_structures.md says what is built; the benchmark has no report yet",
        ),
        Goal(
            "generated masks: rows of shape features above their floor, of 19",
            (f"{SHAPES}/shapes",),
            lambda report: outside(
                iter(
                    [*(one["wasserstein"] for one in report["shapes"]["figures"].values()), report["shapes"]["kernel"]]
                )
            ),
            "{:.0f}",
            most=0,
            why="the weights are those of an earlier training, which scaled and bent the maps (the model card)",
        ),
        Goal(
            "generated masks: at most one in ten is rejected",
            why="two in five are, says the model card, without a report",
        ),
        Goal(
            "generated masks: share of copies above that of unseen masks, worst of two spaces, points",
            (f"{SHAPES}/privacy",),
            memorized,
            "{:.1f}",
            most=0,
            why="by features of a random network; by voxels there is none, and which is right was not studied",
        ),
    ),
    "Whole brains, and the seeds on the same work (21)": (
        Goal("29 dB inside the brain on unseen subjects, and its spectrum", why=BRAINS),
        Goal("adherence to the tissue map, the background, slices, copies, tissue volumes", why=BRAINS),
        Goal("a whole brain in 6 s on two cores, 2 s with a student", why=BRAINS),
        Goal(
            "against Med-DDPM and Medical Diffusion in the same 30 minutes (`python -m benchmarks.seeds`)",
            why="the comparison is built; " + NEVER,
        ),
    ),
    "Others' weights (22)": (
        Goal("networks, samplers and whole runs equal to MONAI's classes, for what is converted", test="tests/interop"),
        Goal("wrong, missing and extra keys and code are refused by name", test="tests/interop"),
        Goal(
            "MAISI's autoencoder in slabs off by, in the range",
            ("docs/group_norm_streaming",),
            lambda report: max(
                row["difference"] for row in report["rows"] if row["network"] == "slabs" and "difference" in row
            ),
            "{:.1e}",
            most=1e-5,
            why=NEVER,
        ),
        Goal(
            "its memory to decode 128^3, GB",
            ("docs/group_norm_streaming",),
            lambda report: rows_of(report, "slabs", 128)["memory_bytes"] / 1e9,
            "{:.2f}",
            most=0.5,
            why=NEVER,
        ),
        Goal(
            "its time over that of the whole",
            ("docs/group_norm_streaming",),
            lambda report: rows_of(report, "slabs", 128)["cpu_seconds"] / rows_of(report, "whole", 128)["cpu_seconds"],
            "{:.1f}",
            most=3,
            why=NEVER,
        ),
        Goal("tuning steps and a resume on narrow copies", test="tests/training/test_maisi_training.py"),
    ),
    "Studio and readers' study (23)": (
        Goal(
            "seconds from the command to the first volume, median",
            ("docs/studio_times",),
            lambda report: report["seconds"]["command_to_first_volume"]["median"],
            "{:.1f}",
            most=15,
        ),
        Goal(
            "seconds from a stroke to the new volume, median",
            ("docs/studio_times",),
            lambda report: report["seconds"]["stroke_to_volume"]["median"],
            "{:.2f}",
            most=1.5,
        ),
        Goal(
            "scales, forced choice and statistics on 40 cases and 3 readers", test="tests/reader_study/test_analysis.py"
        ),
        Goal("paint, generate, compare and take home in a real browser", test="tests/studio/test_browser.py"),
        Goal("a study of at most 4 MB without volumes", test="tests/reader_study/test_kit.py"),
        Goal("screenshots of each view, looked at", why=AT_HAND),
    ),
    "Release 0.1 (24)": (
        Goal("`import medvolume` within 0.3 s", test="tests/cli/test_first_screen.py"),
        Goal("each report names commit, machine and date; pages agree with them", test="tests/project/test_figures.py"),
        Goal("the site builds with every page", test="tests/project/test_site.py"),
        Goal("a fresh clone: demo, tests and site as README says", why=AT_HAND),
        Goal("tests pass with the lowest versions that pyproject.toml allows (`make test-lowest`)", why=NEVER),
    ),
}
# Rows of benchmarks.speed.targets that are not met, by the beginning of their names.
SPEED = {
    "training step of the U-Net, float32": "both do nearly the same arithmetic (docs/performance.md)",
    "20 steps: 10 times": "20 steps stand against 50 of nearly the same arithmetic",
}
HEAD = """# Goals: asked, measured, by which command

`python -m tools.goals_page` writes this page from the reports of `python -m tools.figures`.
Its `--list` says of which commit each report is, and how far the code has moved since.
Numbers in brackets are those of the project's issues.
"Short" is a figure that misses its target, "open" a goal without a report in the repository.
A goal that a test holds needs no report.
A distance is above its floor if it exceeds that of real training volumes beyond the 95 % interval.
The tests run in CI, but for those that are marked slow.

"""


def main(args: Sequence[str] | None = None) -> None:
    """Write the page."""
    parse(args)
    write_text(PAGE, page())
    print(PAGE)


def page() -> str:
    """Return the page as Markdown."""
    parts = {title: [row(goal) for goal in goals] for title, goals in GOALS.items()}
    titles = list(parts)
    parts = {titles[0]: parts[titles[0]], "Exact and fast (3)": list(speed_rows()), **parts}
    states = [cells[4].partition(":")[0] for rows in parts.values() for cells in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("met", "short", "open"))
    header = ("asked", "target", "measured", "by", "state")
    return f"{HEAD}{counts}.\n" + "".join(f"\n## {title}\n\n{table(header, rows)}" for title, rows in parts.items())


def row(goal: Goal) -> tuple[str, str, str, str, str]:
    """Return the cells of a goal."""
    if goal.test:
        return goal.asked, "", "by a test", f"`pytest {goal.test}`", "met"
    bound = goal.least if goal.most is None else goal.most
    target = "" if bound is None else f"at {'least' if goal.most is None else 'most'} {goal.form.format(bound)}"
    figures = [figure_of(name) for name in goal.reports]
    paths = [ROOT / figure.report for figure in figures]
    by = ", ".join(dict.fromkeys(f"`{program(figure)}`" for figure in figures))
    if goal.measure is None or bound is None or not all(path.is_file() for path in paths):
        return goal.asked, target, "not in a report", by, f"open: {goal.why}"
    value = goal.measure(*map(read_object, paths))
    met = value >= bound if goal.most is None else value <= bound
    named = ", ".join(figure.report for figure in figures)
    return goal.asked, target, goal.form.format(value), f"{by} ({named})", "met" if met else f"short: {goal.why}"


def figure_of(name: str) -> Figure:
    """Return a figure of the table by its short name, such as docs/prepared or hippocampus/dice."""
    folder, _, report = name.partition("/")
    path = f"{name}.json" if folder == "docs" else f"weights/{folder}/results/{report}.json"
    return next(figure for figure in FIGURES if figure.report == path)


def program(figure: Figure) -> str:
    """Return what measures a figure, without its options; for a figure that is not measured again, evaluate.py."""
    lines = [line for line in figure.commands if not line.startswith("cp ")]
    words = lines[-1].split() if lines else ["python", "evaluate.py", "dice"]
    words = words[words.index("python") :]
    return " ".join(words[:3] if words[1] in ("-m", "evaluate.py") else words[:2])


def speed_rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the rows of the targets for speed, which name themselves."""
    figure = figure_of("docs/performance")
    for target, measured, answer in check(read_object(ROOT / figure.report)["measurements"]):
        why = next((why for start, why in SPEED.items() if target.startswith(start)), "")
        state = {"yes": "met", "no": f"short: {why}", "not measured": "open: no bf16 hardware on this machine"}[answer]
        yield target, "", measured, f"`{program(figure)}` ({figure.report})", state

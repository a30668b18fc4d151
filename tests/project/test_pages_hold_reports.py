"""Pages whose figures are written by programs are what these write, and those written by hand agree with the reports.

Others are held beside what writes them: test_pages, test_scale_page, test_cluster, test_quickstart, test_benchmarks,
test_small_lesions, test_learning_per_step, test_studio_times.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import group_norm_page
from benchmarks.distillation import page as distillation
from benchmarks.speed import headline
from benchmarks.speed.report import markdown, read_bench
from files.documents import read_object
from tools import evidence, goals_page, robust_page
from tools.markdown import table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def docs(name: str) -> Any:
    """A report in docs/."""
    return read_object(DOCS / f"{name}.json")


def results(name: str, report: str) -> Any:
    """A report of a shipped pipeline."""
    return read_object(ROOT / "weights" / name / "results" / f"{report}.json")


def between(path: Path, begin: str, end: str) -> str:
    """What stands between two comments."""
    return path.read_text().partition(begin)[2].partition(end)[0]


def test_evidence_and_cards_are_written_from_the_reports():
    said = "run python -m tools.evidence"
    assert (DOCS / "evidence.md").read_text() == evidence.page(ROOT / "weights/hippocampus/results"), said
    assert set(evidence.CARDS) == {path.parent.name for path in ROOT.glob("weights/*/README.md")}
    for path, text in evidence.cards().items():
        assert path.read_text() == text, said


def test_goals_are_written_from_the_reports():
    assert (DOCS / "goals.md").read_text() == goals_page.page(), "run python -m tools.goals_page"


def test_goals_that_are_short_or_open_say_why():
    goals = [goal for part in goals_page.GOALS.values() for goal in part]
    for goal in goals:
        assert not (goal.test and goal.reports) and (not goal.test or (ROOT / goal.test).exists())
        cells = goals_page.row(goal)
        assert cells[4] == "met" or cells[4].partition(": ")[2], goal.asked
    assert [cells for cells in goals_page.speed_rows() if cells[4].endswith(": ")] == []


def test_a_goal_is_met_by_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(goals_page, "ROOT", tmp_path)
    goal = goals_page.Goal("less", ("docs/vqgan",), lambda report: report["x"], "{:.1f}", most=2.0, why="so")
    assert goals_page.row(goal)[1:3] == ("at most 2.0", "not in a report") and goals_page.row(goal)[4] == "open: so"
    (tmp_path / "docs").mkdir()
    for value, state in ((2.0, "met"), (2.1, "short: so")):
        (tmp_path / "docs/vqgan.json").write_text(f'{{"x": {value}}}')
        by = "`python evaluate.py reconstruction` (docs/vqgan.json)"
        assert goals_page.row(goal) == ("less", "at most 2.0", str(value), by, state)


def test_performance_is_written_from_its_report():
    report = DOCS / "performance.json"
    bench = read_bench(report)
    text, _, pictures = (DOCS / "performance.md").read_text().partition("\n![")
    assert text == markdown(bench), f"run python -m benchmarks.speed.report {report} --output docs/performance.md"
    assert pictures.count("performance_") == 4 and pictures.count(".png)") == 2
    rows = table(["", "ours", "peer", ""], headline.rows(bench["measurements"]))
    assert between(ROOT / "README.md", headline.BEGIN, headline.END) == f"\n{rows}", "run benchmarks.speed.headline"


def test_distillation_is_written_from_its_reports():
    expected = distillation.losses_text(docs("distillation"))
    if (DOCS / "distillation_student.json").is_file():
        expected += distillation.student_text(docs("distillation_student"))
    text = between(DOCS / "distillation.md", distillation.BEGIN, distillation.END)
    assert text == f"\n\n{expected}\n", "run python -m benchmarks.distillation.page"


def test_slabs_of_group_norm_are_written_from_their_report():
    there = (DOCS / "group_norm_streaming.json").is_file()
    expected = f"\n{group_norm_page.page_text(docs('group_norm_streaming'))}" if there else "\n"
    text = between(DOCS / "large_volumes.md", group_norm_page.BEGIN, group_norm_page.END)
    assert text == expected, "run python -m benchmarks.group_norm_page"


def test_kills_and_damaged_files_are_written_from_their_reports(tmp_path, monkeypatch):
    """The pages of the repository, and pages of small reports."""
    said = "run python -m tools.robust_page"
    for path, text in robust_page.pages().items():
        assert between(path, robust_page.BEGIN, robust_page.END) == f"\n\n{text}\n", said
    for name in ("many_machines", "security"):
        text = (DOCS / f"{name}.md").read_text()
        assert text.count(robust_page.BEGIN) == text.count(robust_page.END) == 1
        (tmp_path / f"{name}.md").write_text(text)
    where = {"command": "it", "date": "2026-01-02T03", "commit": "abc", "machine": {"processor": "p", "cores": 2}}
    job = {"kills": 3, "corrupt_files": ["a"], "lost_or_different": ["b", "c"], "damaged_entries": ["d"]}
    counts = {"counts": {"read": 1, "refused": 1999}, "peak_bytes": 2_000_000_000}
    fuzzed = {
        "targets": {"x": counts, "y": {"counts": {}, "peak_bytes": 1}},
        "cases": 2000,
        "findings": [1],
        "seconds": 9,
    }
    (tmp_path / "survival.json").write_text(json.dumps({"jobs": {"train_vae": job}, **where}))
    (tmp_path / "fuzz.json").write_text(json.dumps({**fuzzed, **where}))
    monkeypatch.setattr(robust_page, "DOCS", tmp_path)
    robust_page.main([])
    kills, files = ((tmp_path / f"{name}.md").read_text() for name in ("many_machines", "security"))
    assert "| `train_vae` | 3 | 1 | 2 |\n\n1 entries of caches" in kills and "two damaged latents" not in kills
    assert "2,000 cases, 1 findings; 1,999 refused, 1 read; at most 2.00 GB" in files and "--seed 6" not in files
    assert "`it`, 2 cores of an p, commit abc, 2026-01-02" in kills and "`it`, 2 cores" in files


def share(report: Any) -> str:
    """A Dice and its share of the real one, as in README."""
    found = [sum(run["dice"] for run in runs) / len(runs) for runs in report["scores"].values()]
    return f"{found[1]:.3f} ({100 * report['ratios']['synthetic/real']['of_means']:.1f} % of real) | {found[0]:.3f} |"


def test_readme_has_the_results_of_the_cards():
    text = (ROOT / "README.md").read_text()
    copies = results("hippocampus", "privacy")["spaces"]["image"]["memorized"]["similarity"]
    assert f"one generated volume per mask | {share(results('hippocampus', 'dice'))}" in text
    assert f"two network calls a volume | {share(results('hippocampus-fast', 'dice'))}" in text
    unseen = copies["false_positives"]["fraction"]
    assert f"other subjects) | {100 * copies['fraction']:.1f} % | {100 * unseen:.1f} % |" in text


def spectrum(report: Any) -> str:
    """The power by band from 0.2 to 0.45 cycles a voxel, as cells."""
    power = report["spectrum"]["ratio_db"]
    return " | ".join(f"{power[f'0.{band}-0.{band + 5}']:+.1f}" for band in (20, 25, 30, 35, 40))


def finetuning() -> list[str]:
    report = docs("finetuning")
    names = {"fine-tuned": "volumes of the fine-tuned U-Net", "from scratch": "volumes of a U-Net from scratch"}
    names |= {"LoRA": "volumes of the LoRA", "16 real volumes": "the 16 real volumes"}
    lines = []
    for name, title in names.items():
        dice = report["dice"][name]
        seeds = ", ".join([f"{value:.4f}" for value in dice["per_seed"]] + ["-"] * (3 - len(dice["per_seed"])))
        lines.append(f"| {title} | {dice['mean']:.4f} | {seeds} |")
    for name, mean in (("fine-tuned", "**{:+.4f}**"), ("16 real volumes", "{:+.4f}")):
        less = report["less_from_scratch"][name]
        low, high = less["interval_seeds"]
        lines.append(f"{mean.format(less['mean'])} ({low:+.4f} to {high:+.4f}) |")
    return [*lines, f"| {report['less_from_scratch']['LoRA']['mean']:+.4f} (two seeds) |"]


def editing() -> list[str]:
    lines = []
    for one in docs("editing")["regions"].values():
        jump, (low, high) = one["jump"], one["jump"]["interval"]
        lines.append(
            f"| {jump['mean']:.3f} ({low:.3f} to {high:.3f}) | {one['untouched']['mean']:.3f} | {jump['largest']:.3f} "
            f"| {one['changed_outside']} |"
        )
    assert [one["voxels changed outside"] for one in docs("conditions/edits")["measured"].values()] == [0.0] * 5
    return [*lines, "No voxel outside a region differs."]


def full_size() -> list[str]:
    lines = []
    for one in docs("full_size")["parts"].values():
        if one["status"] == "ok" and one["stage"] == "training":
            estimate, found = one["estimate"]["total"], one["measured"]
            cells = f"{estimate / 2**30:.2f} | {found / 2**30:.2f} | {found / estimate:.2f} | {one['seconds']:.0f} |"
            lines.append(f"losses and gradients | {cells}")
    return lines


def autoencoders() -> list[str]:
    reports = [results("hippocampus", "reconstruction_before"), results("hippocampus", "reconstruction"), docs("vqgan")]
    lines = [f"| {one['psnr_db']['mean']:.2f} dB | {one['sharpness']:.3f} | {spectrum(one)} |" for one in reports]
    codes = reports[2]["codebook"]
    lines.append(
        f"{codes['bits_per_cell']:.0f} bits ({codes['entropy_bits_per_cell']:.2f} by the entropy of their use)"
    )
    lines.append(f"{100 * codes['usage']:.0f} % of the codes, with a perplexity of {codes['perplexity']:.0f}.")
    return lines


def mask() -> list[str]:
    cells = list(docs("conditions/mask")["measured"].values())
    inside, around = ([one[name] for one in cells] for name in ("mean inside the mask", "mean outside"))
    return [f"{min(inside):.0f} to {max(inside):.0f} inside, {min(around):.0f} to {max(around):.0f} outside"]


def classes() -> list[str]:
    volume = {name: one["mean volume in ml"] for name, one in docs("conditions/classes")["measured"].items()}
    report = results("adrenal-shapes", "conditions")
    real, generated, points = report["real"], report["generated"], report["difference_points"]
    low, high = points["interval"]
    return [
        f"{volume['hyperplasia, guided by 3']:.1f} ml on average instead of {volume['hyperplasia']:.1f}.",
        f"{generated['right']:.3f} of 1,000 generated shapes (at scale 1) and on {real['right']:.3f} of the 298 real",
        f"{points['right']:.1f} points (95 % interval {low:.1f} to {high:.1f})",
        f"it is {generated['balanced']:.3f} against {real['balanced']:.3f}.",
    ]


def numbers() -> list[str]:
    found = docs("conditions/numbers")["measured"]
    lines = []
    for asked in (80, 115, 150):
        cells = []
        for kind in ("dark", "bright"):
            one = found[f"{kind} lesion, {asked} voxels asked"]
            cells.append(f"{one['mean']:.0f} ({one['lowest']:.0f} to {one['highest']:.0f})")
            cells.append(f"{one['of real ones the autoencoder leaves']:.0f}")
        lines.append(f"| {asked} | {' | '.join(cells)} |")
    return lines


def images() -> list[str]:
    titles = {"PET from CT": "PET from CT, mask and sex", "PET from mask and sex": "PET from mask and sex"}
    titles |= {"the training PETs' mean": "the training PETs' mean inside and outside the tumor"}
    cells = docs("conditions/images")["measured"]
    whole, tumor = "mean absolute error in SUV", "mean absolute error of the tumor's mean SUV"
    return [f"| {titles[name]} | {one[whole]:.3f} | {one[tumor]:.2f} |" for name, one in cells.items()]


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("finetuning", finetuning),
        ("editing", editing),
        ("recipes", full_size),
        ("autoencoders", autoencoders),
        ("conditions/mask", mask),
        ("conditions/classes", classes),
        ("conditions/numbers", numbers),
        ("conditions/images", images),
    ],
)
def test_a_page_that_is_written_by_hand_agrees(page, lines):
    text, expected = (DOCS / f"{page}.md").read_text(), lines()
    assert expected and [line for line in expected if line not in text] == []

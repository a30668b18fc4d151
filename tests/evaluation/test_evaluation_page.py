"""evaluate.py all and report: parts are run once, verdicts follow the rule, and the page needs nothing beside it."""

import json
import re

import numpy as np
import pytest
from generated_sets import write_sets

import evaluate
from evaluation.commands.run_all import plan_part
from evaluation.html import build_page
from evaluation.html.model import (
    Row,
    distance_row,
    format_number,
    not_above,
    not_below,
    overlap,
)
from evaluation.html.privacy import _rows, private_claim
from evaluation.html.utility import budget_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def everything(folder, *more: str, made: str = "fresh") -> dict:
    args = ["all", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / made), "--device", "cpu"]
    return evaluate.main([*args, "--precision", "no", "--output", str(folder / "out"), *more])


def compared(made: float, floor: float, excess: tuple[float, float]) -> dict:
    """What `compare_sets` gives, of these means."""
    return {
        "generated_to_test": {"mean": made, "interval": [made - 1, made + 1]},
        "training_to_test": {"mean": floor, "interval": [floor - 1, floor + 1]},
        "excess": {"mean": made - floor, "interval": list(excess)},
    }


def dice_report(synthetic: list[float]) -> dict:
    real = [0.8, 0.8, 0.8]
    scores = {
        name: [{"seed": seed, "dice": value} for seed, value in enumerate(values)]
        for name, values in (("real", real), ("synthetic", synthetic))
    }
    per_seed = {str(seed): value / 0.8 for seed, value in enumerate(synthetic)}
    ratios = {"synthetic/real": {"of_means": sum(synthetic) / 2.4, "per_seed": per_seed}}
    return {"evaluation": "dice", "scores": scores, "ratios": ratios, "volumes": {"judge": 2, "real": 4}}


def test_a_figure_is_within_if_its_interval_reaches_the_floor():
    assert not_above((3, 7), 4) and not_above((4.5, 7), 4) is False and not_above(None, 4) is None
    assert not_below((3, 7), 6) and not_below((3, 5.5), 6) is False and not_below(None, 5) is None
    assert overlap((0, 1), (1, 2)) and not overlap((0, 1), (1.1, 2))
    assert distance_row("a", compared(3, 2, (-0.1, 2))).verdict == "within"
    row = distance_row("a", compared(3, 2, (0.1, 2)))
    assert row.verdict == "outside" and row.floor == 2 and row.interval == (2, 4)
    assert Row("a", 1.0).verdict == "" and Row("a", 1.0).interval_text == ""
    assert [format_number(0.1234, style) for style in ("number", "percent", "signed")] == ["0.123", "12.3 %", "+0.123"]
    assert format_number(0.00012345, "number") == "0.000123" and format_number(12345.0, "number") == "1.23e+04"


@pytest.mark.parametrize(("synthetic", "verdict"), [([0.80, 0.81, 0.78], "within"), ([0.70, 0.71, 0.70], "outside")])
def test_usefulness_is_judged_by_its_interval_over_seeds(tmp_path, synthetic, verdict):
    path = tmp_path / "dice.json"
    path.write_text(json.dumps(dice_report(synthetic)))
    page = build_page([path])
    titles = [claim.title for claim in page.claims]
    assert titles == ["Realistic", "Consistent between slices", "Faithful and useful", "Private"]
    useful = page.claims[2].row
    assert useful.verdict == verdict and useful.value == pytest.approx(sum(synthetic) / 2.4)
    assert page.claims[0].row is None and "evaluate.py realism" in page.claims[0].sentence


def test_one_training_has_no_interval_and_no_verdict(tmp_path):
    """0.795 against 0.8 of one seed each is nobody's evidence."""
    report = dice_report([0.795])
    report["scores"]["real"] = report["scores"]["real"][:1]
    path = tmp_path / "dice.json"
    path.write_text(json.dumps(report))
    page = build_page([path])
    rows = [row for table in page.sections[0].tables for row in table.rows]
    assert len(rows) == 3 and [row.verdict for row in rows] == [""] * 3 and page.claims[2].row == rows[2]


def test_a_floor_that_is_measured_has_an_interval_too():
    """None of 30 unseen patients and 3 of 100 generated volumes: chance alone would do so."""

    def verdict(fraction: float, low: float) -> str:
        memory = {
            "fraction": 0.0,
            "interval_drawn": [0, 0],
            "false_positives": {"fraction": 0.0, "interval": [0, 0.11]},
        }
        yoon = {"fraction": fraction, "interval": [low, 1.0], "unseen": 0.0, "unseen_interval": [0.0, 0.11]}
        attack = {"auc": 0.5, "interval": [0.4, 0.6]}
        rows = _rows({"memorized": {"similarity": memory}, "yoon_2023": yoon, "membership": attack})
        return next(row for row in rows if "Yoon" in row.name).verdict

    assert verdict(0.03, 0.01) == "within" and verdict(0.4, 0.3) == "outside"


def test_memorized_fraction_is_judged_beside_false_positives():
    def row(fraction: list[float]) -> Row:
        wrong = {"fraction": 0.02, "interval": [0.002, 0.17]}
        memory = {"fraction": fraction[1], "interval_drawn": [fraction[0], fraction[2]], "false_positives": wrong}
        claim = private_claim({"spaces": {"image": {"memorized": {"similarity": memory}}}})
        assert claim.row is not None
        return claim.row

    assert row([0.04, 0.09, 0.15]).verdict == "within"  # 17 % of unseen patients may be called memorized too
    assert row([0.18, 0.30, 0.40]).verdict == "outside"


def test_budgets_are_drawn_and_judged(tmp_path):
    def of(value: float, low: float, high: float) -> dict:
        return {"of_means": value, "interval_seeds": [low, high], "interval_subjects": [0.0, 2.0]}

    cells = {"8": {"mean": 0.6, "interval_seeds": [0.5, 0.7]}, "all": {"mean": 0.8, "interval_seeds": None}}
    dice = {"real": cells, "synthetic": {"any": cells["8"]}}
    ratios = {"both/real": {"8": of(1.05, 1.01, 1.09), "all": of(0.97, 0.95, 0.99)}}
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"evaluation": "few_labels", "dice": dice, "ratios": ratios}))
    page = build_page([path])
    rows = page.sections[0].tables[0].rows
    assert [(row.name, row.verdict) for row in rows] == [
        ("8 labeled volumes", "within"),
        ("all labeled volumes", "outside"),
    ]
    assert page.sections[0].pictures[0].source.startswith("data:image/svg+xml;base64,")
    assert page.claims[2].row == rows[0]


def test_unmeasured_budgets_are_not_drawn_and_the_control_leads(tmp_path):
    """The claim compares with the fair control, the longer training on real volumes."""

    def cell(mean: float) -> dict:
        return {"mean": mean, "interval_seeds": None}

    dice = {"real": {"all": cell(0.8), "16": cell(0.7), "8": cell(0.6)}, "both": {"8": cell(0.65)}}
    ticks, lines = budget_lines(dice | {"synthetic": {"any": cell(0.5)}})
    assert ticks == ["8", "16", "all"]
    values = {name: [value for value, _ in points] for name, points in lines.items()}
    assert values["real"] == [0.6, 0.7, 0.8] and values["synthetic"] == [0.5] * 3
    assert values["both"][0] == 0.65 and np.isnan(values["both"][1:]).all()

    def of(value: float) -> dict:
        return {"of_means": value, "interval_seeds": [value, value], "interval_subjects": [value, value]}

    ratios = {"both/real": {"16": of(1.2), "8": of(1.1)}, "both/real_longer": {"16": of(1.0), "8": of(0.9)}}
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"evaluation": "few_labels", "dice": dice, "ratios": ratios}))
    claim = build_page([path]).claims[2]
    assert claim.row is not None and (claim.row.name, claim.row.value) == ("8 labeled volumes", 0.9)
    assert "both/real_longer" in claim.sentence


def test_all_runs_what_is_not_there_and_writes_one_page(folder, capsys):
    """Of volumes that are copies: not told from real ones by their looks, and not private."""
    settings = ["privacy.alpha=0.34", "privacy.spaces=image", "privacy.shift=0", "privacy.pairs=1"]
    settings += ["realism.parts=consistency features", "privacy.flips=0"]
    args = ["--parts", "realism", "privacy", "--title", "<b>Copies & co", "--set", *settings]
    page = everything(folder, *args, made="copies")
    claims = {claim["title"]: claim for claim in page["claims"]}
    assert claims["Realistic"]["row"]["within"] and claims["Consistent between slices"]["row"]["within"]
    assert claims["Private"]["row"]["value"] == 1 and not claims["Private"]["row"]["within"]
    assert "evaluate.py dice" in claims["Faithful and useful"]["sentence"]
    out = folder / "out"
    assert json.loads((out / "report.json").read_text())["claims"] == json.loads(json.dumps(page["claims"]))
    html = (out / "report.html").read_text()
    assert "&lt;b&gt;Copies &amp; co" in html and "<b>Copies" not in html
    assert "http" not in html and "<script" not in html
    sources = re.findall(r'src="([^"]{20})', html)
    assert len(sources) == 2 and sources[0].startswith("data:image/svg+xml") and sources[1].startswith("data:image/png")
    markdown = (out / "report.md").read_text()
    assert "| Private | memorized | 100.0 % (" in markdown and "outside |" in markdown
    assert "not measured again" not in capsys.readouterr().out

    times = {name: (out / f"{name}.json").stat().st_mtime_ns for name in ("realism", "privacy")}
    settings[0] = "privacy.alpha=0.4"
    again = everything(folder, *args[:-6], *settings, made="copies")
    assert (out / "realism.json").stat().st_mtime_ns == times["realism"]  # the same inputs: kept
    assert (out / "privacy.json").stat().st_mtime_ns > times["privacy"]  # another alpha: measured
    assert again["reports"]["privacy"]["spaces"]["image"]["memorized"]["similarity"]["alpha"] == 0.4
    assert capsys.readouterr().out.count("not measured again") == 1


def test_dice_of_generated_volumes_is_on_the_page(folder):
    settings = ["--set", "dice.seeds=1", "dice.iterations=1", "dice.shape=16 16 16"]
    page = everything(folder, "--parts", "dice", *settings)
    (section,) = page["sections"]
    assert [row["name"] for row in section["tables"][0]["rows"]] == [
        "trained on real",
        "trained on synthetic",
        "trained on both",
    ]
    assert page["claims"][2]["row"]["name"] == "Dice, synthetic/real"
    assert section["measured_on"]["volumes"] == "8 test, 10 real, 10 synthetic, 20 both"


def test_what_cannot_be_shown_or_set_is_refused(folder, tmp_path):
    path = tmp_path / "dice.json"
    path.write_text(json.dumps(dice_report([0.8, 0.8, 0.8])))
    with pytest.raises(ValueError, match="there is a report of dice already"):
        build_page([path, path])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json: not a report of evaluate.py"):
        build_page([tmp_path / "other.json"])
    with pytest.raises(ValueError, match="nowhere.json: no such report"):
        build_page([tmp_path / "nowhere.json"])
    with pytest.raises(ValueError, match="dice.sides=3: dice has no option sides"):
        everything(folder, "--parts", "dice", "--set", "dice.sides=3")
    for option in ("data.root=elsewhere", "precision=bf16", "device=cuda:1"):  # of `all`, for every part
        with pytest.raises(ValueError, match=f"dice.{option}: dice has no option .* that can be set"):
            everything(folder, "--parts", "dice", "--set", f"dice.{option}")
    with pytest.raises(ValueError, match=r"--set names \['privacy'\], which is not among --parts"):
        everything(folder, "--parts", "dice", "--set", "privacy.alpha=0.1")
    with pytest.raises(ValueError, match="reconstruction: the following arguments are required: --vae$"):
        everything(folder, "--parts", "reconstruction")
    with pytest.raises(ValueError, match="dice: .*seeds"):
        everything(folder, "--parts", "dice", "--set", "dice.seeds=many")
    with pytest.raises(ValueError, match="dice takes one folder of --synthetic, not 2"):
        args = ["all", "--config", str(folder / "ldm.yaml"), "--output", str(tmp_path), "--parts", "dice"]
        evaluate.main([*args, "--synthetic", str(folder / "fresh"), str(folder / "copies")])


def test_the_report_command_takes_reports_of_several_runs(tmp_path, capsys):
    path = tmp_path / "dice.json"
    path.write_text(json.dumps(dice_report([0.7, 0.71, 0.7])))
    page = evaluate.main(["report", str(path), "--output", str(tmp_path / "page"), "--title", "One"])
    assert page["title"] == "One" and "Faithful and useful: outside" in capsys.readouterr().out
    assert (tmp_path / "page/report.html").read_text().count('class="claim ') == 4


def test_what_a_table_says_and_files_in_options_are_inputs_too(tmp_path):
    """Another split, subject or file at the same path is another measurement."""
    folder = write_sets(tmp_path)
    weights = folder / "vgg.safetensors"
    weights.write_text("some")

    args = ["all", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / "fresh"), "--output", "out"]
    options = evaluate.parse([*args, "--set", f"realism.extractor=vgg={weights}"])["all"]

    def inputs() -> str:
        return plan_part("realism", options, folder / "out").digest

    table = folder / "subjects.csv"
    seen, text = [inputs(), inputs()], table.read_text()
    table.write_text(text.replace("case_8,S4,train", "case_8,S4,test").replace("case_9,S4,train", "case_9,S4,test"))
    seen.append(inputs())
    table.write_text(text.replace("case_9,S4", "case_9,S99"))
    seen.append(inputs())
    table.write_text(text)
    weights.write_text("other")
    seen.append(inputs())
    assert seen[0] == seen[1] and len(set(seen)) == 4

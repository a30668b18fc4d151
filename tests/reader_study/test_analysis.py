"""Answers of simulated readers, from the exported files to the report."""

import json

import numpy as np
import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("krippendorff")
pytest.importorskip("pingouin")

from simulated_readers import study_key, write_answers

from reader_study.agreement import intra_reader_kappa
from reader_study.analysis import analyze
from reader_study.answers import read_answers
from reader_study.plan import Setting, power_table
from reader_study.readers_and_cases import accuracy_covariance, equivalence, mean_figure, unlike_chance
from reader_study.report import number, write_study_report


def analyzed(tmp_path, skill, seed=0, of_each=20, readers=3):
    key = study_key(of_each, readers)
    write_answers(tmp_path / f"a{seed}", key, Setting(skill, 0.0, 0.0), np.random.default_rng(seed))
    readings = read_answers([tmp_path / f"a{seed}"], key)
    return analyze(readings, key, margin=0.1, seed=0), readings


@pytest.mark.parametrize("skill", [0.5, 0.7, 0.85])
def test_the_skill_of_readers_is_recovered(tmp_path, monkeypatch, skill):
    """40 cases, 3 readers: the intervals of ten studies hold the true accuracy in nine at least."""
    monkeypatch.setattr("reader_study.agreement.RESAMPLES", 4)  # of agreement, which is not looked at here
    held = {"hillis": 0, "bootstrap": 0, "one reader": 0}
    for seed in range(10):
        result, _ = analyzed(tmp_path, skill, seed)
        together = result["together"]
        for name, (low, high) in (
            ("hillis", together["accuracy"]["interval"]),
            ("bootstrap", together["accuracy_bootstrap"]),
            ("one reader", result["readers"]["reader_1"]["accuracy"]["interval"]),
        ):
            held[name] += low <= skill <= high
    assert min(held.values()) >= 8 and held["hillis"] >= 9, held


def test_every_statistic_is_in_the_report(tmp_path):
    result, readings = analyzed(tmp_path, 0.8)
    write_study_report(result, readings, tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    for word in ("Wilson", "d′", "ROC AUC", "Fleiss", "Krippendorff", "ICC(2,k)", "weighted kappa", "Forced choice"):
        assert word in page, word
    assert "Anatomic region recognizable, but major parts of the images exhibit anatomic incorrectness" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page
    found = json.loads((tmp_path / "report/report.json").read_text())
    together = found["together"]
    assert together["difference_p"] < 0.05 and together["readers"] == 3
    accuracy = together["accuracy"]
    assert f"<td>{accuracy['standard_error']:.3f}</td><td>{accuracy['freedom']:.1f}</td>" in page
    assert f"<td>ROC AUC</td><td>{together['auc']['value']:.2f}</td>" in page
    assert sum(found["scales"]["appearance"]["counts"]["reader_1"]["generated"]) == 20
    assert found["repeats"]["reader_1"]["decision"]["value"] == 1  # the simulated evidence is that of the first time
    assert len((tmp_path / "report/answers.csv").read_text().splitlines()) == 1 + 3 * (40 + 6 + 8)


def test_the_first_sentence_names_what_is_shown(tmp_path, monkeypatch):
    """Decisions that are not unlike chance do not hide a confidence that is."""
    monkeypatch.setattr("reader_study.agreement.RESAMPLES", 4)  # of agreement, which is not looked at here
    result, readings = analyzed(tmp_path, 0.8)
    result["together"] |= {"difference_p": 0.2, "equivalence_p": 0.5, "auc_difference_p": 0.01}
    write_study_report(result, readings, tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    assert "The study is too small to say" in page
    assert f"its ROC AUC is {result['together']['auc']['value']:.2f}, which is not chance (p 0.010)" in page


def test_numbers_have_no_negative_zero():
    assert [number(value) for value in (-0.001, -0.006, 0.0, None)] == ["0.00", "-0.01", "0.00", "not defined"]


def test_text_of_readers_is_only_text(tmp_path):
    key = study_key(4, 1, pairs=0)
    write_answers(tmp_path / "a", key, Setting(), np.random.default_rng(0))
    file = tmp_path / "a/reader_1.json"
    content = json.loads(file.read_text())
    next(iter(content["answers"].values()))["comment"] = "=cmd() <script>alert(1)</script>\x1b[2J"
    file.write_text(json.dumps(content))
    readings = read_answers([file], key)
    write_study_report(analyze(readings, key, margin=0.1, seed=0), readings, tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "'=cmd()" in (tmp_path / "report/answers.csv").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(study="another"), "holds no answers to this study"),
        (lambda c: c.update(reader="reader_9"), "is not in the key"),
        (lambda c: c["answers"].update(unknown={}), "was not shown"),
        (lambda c: next(iter(c["answers"].values()))["answers"].update(decision="X"), "decision is 'X'"),
        (lambda c: next(iter(c["answers"].values()))["answers"].pop("anatomy"), "answers {"),
        (lambda c: next(iter(c["answers"].values())).update(milliseconds="soon"), "has no times"),
        (lambda c: c["answers"].update(dict.fromkeys(c["answers"], "text")), "is 'text', not an object"),
        (lambda c: c["answers"].update(dict.fromkeys(c["answers"], 5)), "is 5, not an object"),
    ],
)
def test_edited_answers_are_refused(tmp_path, change, said):
    key = study_key(4, 1, pairs=0)
    write_answers(tmp_path / "a", key, Setting(), np.random.default_rng(0))
    file = tmp_path / "a/reader_1.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        read_answers([file], key)


def test_one_answer_for_all_is_chance(tmp_path):
    """Three models: plain accuracy would be 75 % for readers who call every volume generated."""
    key = study_key(12, 3, models=("a", "b", "c"))
    write_answers(tmp_path / "a", key, Setting(0.5, 0.0, 0.0), np.random.default_rng(0), bias=20)
    result = analyze(read_answers([tmp_path / "a"], key), key, margin=0.1, seed=0)
    together, own = result["together"], result["readers"]["reader_1"]
    assert together["accuracy"]["value"] == own["accuracy"]["value"] == 0.5
    assert own["generated_found"]["rate"] == 1 and own["real_found"]["rate"] == 0
    assert together["difference_p"] == 1
    assert together["accuracy_bootstrap"] is None


def test_bias_of_several_models_is_not_skill(tmp_path):
    """Who often says "generated", and only guesses, is not found to differ from chance (three models, 36 to 12)."""
    key = study_key(12, 3, models=("a", "b", "c"))
    found = []
    for seed in range(10):
        write_answers(tmp_path / f"a{seed}", key, Setting(0.5, 0.0, 0.0), np.random.default_rng(seed), bias=1)
        readings = read_answers([tmp_path / f"a{seed}"], key)
        correct = np.array([[one.correct for one in readings if one.first and one.reader == r] for r in key.readers])
        generated = np.array([one.generated for one in readings if one.first and one.reader == "reader_1"])
        assert correct.mean() > 0.6
        figure = mean_figure(*accuracy_covariance(correct, generated))
        found.append(unlike_chance(figure) < 0.05)
    assert sum(found) <= 1


def test_few_equal_readers_show_nothing(tmp_path):
    """8 volumes, two readers of the same accuracy: equivalence is not shown, and the interval is not a point."""
    correct = np.array([[1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]], bool)
    generated = np.arange(8) < 4
    figure = mean_figure(*accuracy_covariance(correct, generated))
    assert figure["value"] == 0.5 and figure["standard_error"] > 0.1
    assert equivalence(figure, 0.1) > 0.05
    low, high = figure["interval"]
    assert low < 0.3 and high > 0.7
    assert equivalence(mean_figure(np.array([0.5, 0.5]), np.zeros((2, 2))), 0.1) == 1


def test_perfect_readers_are_not_chance():
    """All right in all of 2 x 4 cases: unlike chance, with an interval that has a width and stays below 1."""
    figure = mean_figure(*accuracy_covariance(np.ones((3, 8), bool), np.arange(8) < 4))
    assert figure["value"] == 1 and unlike_chance(figure) < 0.05
    assert figure["interval"][0] < 0.95 and figure["interval"][1] == 1


def test_equivalence_is_found_too_often_nowhere():
    """Readers whose true accuracy is at the margin: 5 % at most, give or take two standard errors of 400 trials."""
    sizes = [8, 16, 40]
    table = power_table([2, 3], sizes, Setting(0.6, 0.0, 0.0), 0.1, 400, 0)
    assert max(row[2] for row in table.rows) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400), table.rows
    with pytest.raises(ValueError, match="--volumes 3"):
        power_table([2], [3], Setting(), 0.1, 1, 0)


def test_intervals_stay_within_their_range(tmp_path):
    """Good readers of few cases: accuracy and area at most 1, kappa from -1 to 1."""
    result, readings = analyzed(tmp_path, 0.97, of_each=6)
    together = result["together"]
    for interval in (together["accuracy"]["interval"], together["auc"]["interval"]):
        assert interval is None or 0 <= interval[0] < interval[1] <= 1
    figure = mean_figure(np.array([0.9, 0.95, 1.0]), np.full((3, 3), 0.002))
    assert figure["interval"][1] == 1
    first, again = [0] * 9 + [1] * 9, [0] * 9 + [1] * 8 + [0]
    low, high = intra_reader_kappa(first, again, 2, ordinal=False)["interval"]
    assert low > 0 and high == 1
    assert intra_reader_kappa(first, first, 2, ordinal=False)["interval"] is None
    write_study_report(result, readings, tmp_path / "report")
    assert "cut at the ends of their range" in (tmp_path / "report/report.html").read_text()


def test_half_an_emoji_is_written(tmp_path):
    """A page cuts long comments, at times between the two halves of a character."""
    key = study_key(4, 1, pairs=0)
    write_answers(tmp_path / "a", key, Setting(), np.random.default_rng(0))
    content = json.loads((tmp_path / "a/reader_1.json").read_text())
    next(iter(content["answers"].values()))["comment"] = "odd \ud83d"
    (tmp_path / "a/reader_1.json").write_text(json.dumps(content))
    readings = read_answers([tmp_path / "a"], key)
    write_study_report(analyze(readings, key, margin=0.1, seed=0), readings, tmp_path / "report")
    assert "odd" in (tmp_path / "report/report.html").read_text("utf-8")
    assert "odd ?" in (tmp_path / "report/answers.csv").read_text("utf-8")


def test_a_reader_who_has_only_begun_is_left_out(tmp_path, caplog):
    key = study_key(8, 3, pairs=0)
    write_answers(tmp_path / "a", key, Setting(), np.random.default_rng(0))
    file = tmp_path / "a/reader_2.json"
    content = json.loads(file.read_text())
    for entry in list(content["answers"].values())[1:]:
        entry["done"] = False
    file.write_text(json.dumps(content))
    readings = read_answers([tmp_path / "a"], key)
    result = analyze(readings, key, margin=0.1, seed=0)
    assert list(result["readers"]) == ["reader_1", "reader_3"] and result["together"]["cases"] == 16
    assert str(file) in caplog.text and "reader_2 answered" in caplog.text
    write_study_report(result, readings, tmp_path / "report")
    assert "reader_2.json: reader_2 answered" in (tmp_path / "report/report.html").read_text()
    with pytest.raises(ValueError, match=r"two real and two generated(.|\n)*reader_2.json"):
        analyze([one for one in readings if one.reader == "reader_2"], key, margin=0.1, seed=0)


def test_power_grows_with_the_study():
    """And by chance alone, a difference is found in about 5 % of studies."""
    rows = {row[:2]: row[2:] for row in power_table([3, 8], [40, 200], Setting(0.5, 0.0, 0.0), 0.1, 200, 0).rows}
    assert rows[3, 40][0] < rows[8, 200][0] and rows[8, 200][0] > 0.9
    assert all(different < 0.12 for _, different in rows.values())
    skilled = power_table([3], [80], Setting(0.7, 0.1, 0.2), 0.1, 100, 0)
    assert skilled.rows[0][3] > 0.9 and skilled.rows[0][2] < 0.1
    assert "3 readers and 80 volumes" in skilled.text(0.8)

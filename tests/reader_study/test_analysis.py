"""Answers of simulated readers, from the exported files to the report."""

import json

import numpy as np
import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("krippendorff")
pytest.importorskip("pingouin")

from simulated_readers import study_key, write_answers

from reader_study.analysis import analyze
from reader_study.answers import read_answers
from reader_study.plan import Setting, power_table
from reader_study.report import write_study_report


def analyzed(tmp_path, skill, seed=0, of_each=20, readers=3):
    key = study_key(of_each, readers)
    write_answers(tmp_path / f"a{seed}", key, Setting(skill, 0.0, 0.0), np.random.default_rng(seed))
    readings = read_answers([tmp_path / f"a{seed}"], key)
    return analyze(readings, key, margin=0.1, seed=0), readings


@pytest.mark.parametrize("skill", [0.5, 0.7, 0.85])
def test_the_skill_of_readers_is_recovered(tmp_path, monkeypatch, skill):
    """40 cases, 3 readers: the intervals of ten studies hold the true accuracy in nine at least."""
    monkeypatch.setattr("reader_study.agreement.RESAMPLES", 4)  # of agreement, which is not looked at here
    held = {"hillis": 0, "bootstrap": 0, "wilson": 0}
    for seed in range(10):
        result, _ = analyzed(tmp_path, skill, seed)
        together = result["together"]
        for name, (low, high) in (
            ("hillis", together["accuracy"]["interval"]),
            ("bootstrap", together["accuracy_bootstrap"]),
            ("wilson", result["readers"]["reader_1"]["accuracy"]["wilson"]),
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
    assert found["together"]["difference_p"] < 0.05 and found["together"]["readers"] == 3
    assert sum(found["scales"]["appearance"]["counts"]["reader_1"]["generated"]) == 20
    assert found["repeats"]["reader_1"]["decision"]["value"] == 1  # the simulated evidence is that of the first time
    assert len((tmp_path / "report/answers.csv").read_text().splitlines()) == 1 + 3 * (40 + 6 + 8)


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


def test_power_grows_with_the_study():
    """And by chance alone, a difference is found in about 5 % of studies."""
    rows = {row[:2]: row[2:] for row in power_table([3, 8], [40, 200], Setting(0.5, 0.0, 0.0), 0.1, 200, 0).rows}
    assert rows[3, 40][0] < rows[8, 200][0] and rows[8, 200][0] > 0.9
    assert all(different < 0.12 for _, different in rows.values())
    skilled = power_table([3], [80], Setting(0.7, 0.1, 0.2), 0.1, 100, 0)
    assert skilled.rows[0][3] > 0.9 and skilled.rows[0][2] < 0.1
    assert "3 readers and 80 volumes" in skilled.text(0.8)

"""Readers of known skill, whose answers are files as the page exports them."""

import json

import numpy as np

from reader_study.answers import FORMAT
from reader_study.design import REAL, Plan, StudyCase, order_cases
from reader_study.kit import StudyKey
from reader_study.plan import simulate_evidence

STUDY = "0123456789abcdef"


def study_key(cases_of_each, readers, seed=0, pairs=8, models=("generated",)):
    """A key without volumes; each generated volume has the mask of a real one."""
    cases = [StudyCase(f"c{i}", f"real/c{i}.nii.gz", REAL) for i in range(cases_of_each)]
    cases += [
        StudyCase(f"c{i}_000", f"{name}/c{i}_000.nii.gz", name, f"c{i}")
        for name in models
        for i in range(cases_of_each)
    ]
    plan = Plan(readers, seed, training=0, repeats=0.15, pairs=pairs)
    return StudyKey(STUDY, cases, order_cases(cases, plan, b"salt"))


def write_answers(folder, key, setting, random, bias=0.0):
    """Write the answers of simulated readers to `folder`, one file each. `bias` is added to all evidence."""
    folder.mkdir()
    generated = np.array([case.source != REAL for case in key.cases])
    evidence = simulate_evidence(len(key.readers), generated, setting, random) + bias
    for row, (reader, items) in enumerate(key.readers.items()):
        answers = {}
        for item in items:
            strengths = [evidence[row, case] for case in item.cases]
            if item.section == "pair":
                given = {"choice": "L" if strengths[0] < strengths[1] else "R", "confidence": "3"}
            else:
                letter = "ABCD"[int(np.clip(3 - strengths[0] - random.normal() * 0.3, 0, 3))]
                given = {
                    "decision": "G" if strengths[0] > 0 else "R",
                    "confidence": str(min(1 + int(2 * abs(strengths[0])), 5)),
                    **dict.fromkeys(("appearance", "consistency", "anatomy"), letter),
                }
            answers[item.id] = {"answers": given, "comment": "", "milliseconds": 5000, "visits": 1, "done": True}
        content = {"format": FORMAT, "version": 1, "study": key.study, "reader": reader, "answers": answers}
        (folder / f"{reader}.json").write_text(json.dumps(content))

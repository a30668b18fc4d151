"""What two subjects should not have in common: voxels, appearance, or the step of their intensities."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .cases import (
    Examined,
    Finding,
    fail,
    names,
    ok,
    warn,
)

ALIKE = 0.98  # correlation of thumbnails from which two volumes may be one scan
CLOSER = 0.2  # of the usual distance (1 - correlation) to the nearest other subject
SAME_STEP = 1e-6  # relative
FEW = 3  # subjects; a step that more of them share is a scanner's or a program's
CHUNK = 1024


def check_leaks(examined: Sequence[Examined]) -> list[Finding]:
    """Exact and near duplicates, and subjects of different splits whose intensities have one step."""
    findings = _duplicates(examined) + _near_duplicates(examined)
    if not findings:
        findings.append(ok("duplicates", "no two volumes are equal, and no two subjects look like one scan"))
    return findings + _steps(examined)


def _duplicates(examined: Sequence[Examined]) -> list[Finding]:
    groups: dict[str, list[Examined]] = {}
    for one in examined:
        groups.setdefault(one.digest, []).append(one)
    findings = []
    for group in groups.values():
        if len(group) < 2:
            continue
        files, splits = [one.file for one in group], sorted({one.case.split for one in group})
        if len(splits) > 1:
            message = f"equal voxels in {' and '.join(splits)}: {names(files)}"
            findings.append(fail("duplicates", message, "remove all but one: the test is not of unseen volumes", files))
        else:
            findings.append(
                warn("duplicates", f"equal voxels in {splits[0]}: {names(files)}", "remove all but one", files)
            )
    return findings


def near_duplicates(thumbnails: np.ndarray, subjects: Sequence[str]) -> list[tuple[int, int, float, bool]]:
    """Pairs (i, j, correlation, mirrored) of volumes of different subjects that look like one scan: their thumbnails
    correlate `ALIKE` or more, and they are `CLOSER` times as far apart as volumes usually are from their nearest other
    subject, which keeps data sets whose volumes all look alike from being accused.

    `thumbnails` (N, 2, K): see `doctor_cases.thumbnail_of`. Scaled or noisy copies and mirror images along X are found;
    volumes that were moved on their grid by more than a few voxels are not (see evaluation.metrics.nearest).
    """
    count, labels = len(thumbnails), np.asarray(subjects)
    nearest, pairs = np.full(count, -1.0), []
    for start in range(0, count, CHUNK):
        straight = thumbnails[start : start + CHUNK, 0] @ thumbnails[:, 0].T
        mirrored = thumbnails[start : start + CHUNK, 1] @ thumbnails[:, 0].T
        other = labels[start : start + CHUNK, None] != labels
        best = np.where(other, np.maximum(straight, mirrored), -1)
        nearest[start : start + CHUNK] = best.max(axis=1, initial=-1)
        for row, j in np.argwhere(best >= ALIKE):
            if start + row < j:
                pairs.append((int(start + row), int(j), float(best[row, j]), bool(mirrored[row, j] > straight[row, j])))
    if not pairs:
        return []
    usual = 1 - float(np.median(nearest))
    return sorted((pair for pair in pairs if 1 - pair[2] <= CLOSER * usual), key=lambda pair: -pair[2])


def _near_duplicates(examined: Sequence[Examined]) -> list[Finding]:
    findings = []
    thumbnails = np.stack([one.thumbnail for one in examined])
    for i, j, similarity, mirrored in near_duplicates(thumbnails, [one.case.subject for one in examined]):
        a, b = examined[i], examined[j]
        if a.digest == b.digest:
            continue
        of = f"{a.case.split}, {a.case.subject} and {b.case.split}, {b.case.subject}"
        how = "mirror images" if mirrored else "copies"
        message = f"{a.file} and {b.file} look like {how} of one scan (correlation {similarity:.4f}; {of})"
        remedy = "if so, give both one subject (data.subject), or remove one"
        findings.append(warn("duplicates", message, remedy, [a.file, b.file]))
    return findings


def shared_steps(examined: Sequence[Examined]) -> list[list[Examined]]:
    """Volumes of 2 to `FEW` subjects that share the step of their intensities, where it is no round number."""
    rows: list[tuple[float, Examined]] = []
    for one in examined:
        rows += [(step, one) for step in one.step[:1] if step is not None and not _round(step)]
    rows.sort(key=lambda row: row[0])
    groups: list[list[tuple[float, Examined]]] = []
    for step, one in rows:
        if groups and step - groups[-1][-1][0] <= SAME_STEP * step:
            groups[-1].append((step, one))
        else:
            groups.append([(step, one)])
    shared = [[one for _, one in group] for group in groups]
    return [group for group in shared if 2 <= len({one.case.subject for one in group}) <= FEW]


def _steps(examined: Sequence[Examined]) -> list[Finding]:
    shared = shared_steps(examined)
    across = [group for group in shared if len({one.case.split for one in group}) > 1]
    findings = []
    for group in across:
        pairs: list[Any] = [pair for pair in combinations(group, 2) if pair[0].case.split != pair[1].case.split]
        who = ", ".join(f"{one.file} ({one.case.subject}, {one.case.split})" for one in group)
        step = group[0].step[0]
        message = f"{who}: intensities are multiples of the same {step:.7g}, as of volumes that were scaled together"
        remedy = "see whether they are of one patient; then give both one subject"
        findings.append(warn("steps", message, remedy, sorted({one.file for pair in pairs for one in pair})))
    if not across:
        known = sum(one.step[0] is not None and not _round(one.step[0]) for one in examined)
        message = f"{known} of {len(examined)} volumes have an intensity step of their own"
        together = f", {len(shared)} of which subjects of one split share" if shared else ""
        findings.append(ok("steps", f"{message}{together}; none is shared by subjects of different splits"))
    return findings


def _round(step: float) -> bool:
    """Whether a step is a whole number, one over a whole number, or of at most three decimals: such are common."""
    return any(abs(value - round(value)) <= SAME_STEP * max(value, 1) for value in (step, 1 / step, 1000 * step))

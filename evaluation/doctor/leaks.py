"""Find what two subjects should not have in common: voxels, appearance, or the step of their intensities."""

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

ALIKE = 0.98  # correlation of thumbnails above which two volumes may be one scan
CLOSER = 0.2  # of the usual distance (1 - correlation) to the nearest other subject
SAME_STEP = 1e-6  # relative
FEW = 3  # subjects; a step that more subjects share comes from a scanner or a program
CHUNK = 1024


def check_leaks(examined: Sequence[Examined]) -> list[Finding]:
    """Find exact and near duplicates, and subjects of different splits whose intensities have the same step."""
    findings = _duplicates(examined) + _near_duplicates(examined)
    if not findings:
        findings.append(ok("duplicates", "no two volumes are equal, and no two subjects look like the same scan"))
    return findings + _steps(examined)


def _duplicates(examined: Sequence[Examined]) -> list[Finding]:
    groups: dict[str, list[Examined]] = {}
    for item in examined:
        groups.setdefault(item.digest, []).append(item)
    findings = []
    for group in groups.values():
        if len(group) < 2:
            continue
        files, splits = [item.file for item in group], sorted({item.case.split for item in group})
        if len(splits) > 1:
            message = f"equal voxels in {' and '.join(splits)}: {names(files)}"
            findings.append(
                fail("duplicates", message, "remove all but one: the test set must hold unseen volumes", files)
            )
        else:
            findings.append(
                warn("duplicates", f"equal voxels in {splits[0]}: {names(files)}", "remove all but one", files)
            )
    return findings


def near_duplicates(thumbnails: np.ndarray, subjects: Sequence[str]) -> list[tuple[int, int, float, bool]]:
    """Return pairs (i, j, correlation, mirrored) of volumes of different subjects that look like one scan.

    Their thumbnails correlate by `ALIKE` or more, and they are `CLOSER` times as far apart as volumes usually are from
    their nearest other subject, so that data sets in which all volumes look alike raise no alarm. Scaled or noisy
    copies and mirror images along X are found; volumes shifted by more than a few voxels are not (see
    evaluation.metrics.nearest).

    Args:
        thumbnails: (N, 2, K), see `cases.thumbnail_of`.
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
    thumbnails = np.stack([item.thumbnail for item in examined])
    for i, j, similarity, mirrored in near_duplicates(thumbnails, [item.case.subject for item in examined]):
        a, b = examined[i], examined[j]
        if a.digest == b.digest:
            continue
        of = f"{a.case.split}, {a.case.subject} and {b.case.split}, {b.case.subject}"
        how = "mirror images" if mirrored else "copies"
        message = f"{a.file} and {b.file} look like {how} of the same scan (correlation {similarity:.4f}; {of})"
        remedy = "if so, give both the same subject (data.subject), or remove one"
        findings.append(warn("duplicates", message, remedy, [a.file, b.file]))
    return findings


def shared_steps(examined: Sequence[Examined]) -> list[list[Examined]]:
    """Return volumes of 2 to `FEW` subjects that share the step of their intensities, unless it is a round number."""
    rows: list[tuple[float, Examined]] = []
    for item in examined:
        rows += [(step, item) for step in item.step[:1] if step is not None and not _is_round(step)]
    rows.sort(key=lambda row: row[0])
    groups: list[list[tuple[float, Examined]]] = []
    for step, item in rows:
        if groups and step - groups[-1][-1][0] <= SAME_STEP * step:
            groups[-1].append((step, item))
        else:
            groups.append([(step, item)])
    shared = [[item for _, item in group] for group in groups]
    return [group for group in shared if 2 <= len({item.case.subject for item in group}) <= FEW]


def _steps(examined: Sequence[Examined]) -> list[Finding]:
    shared = shared_steps(examined)
    across = [group for group in shared if len({item.case.split for item in group}) > 1]
    findings = []
    for group in across:
        pairs: list[Any] = [pair for pair in combinations(group, 2) if pair[0].case.split != pair[1].case.split]
        who = ", ".join(f"{item.file} ({item.case.subject}, {item.case.split})" for item in group)
        step = group[0].step[0]
        message = f"{who}: intensities are multiples of the same {step:.7g}, as in volumes that were scaled together"
        remedy = "check whether they are the same patient; if so, give both the same subject"
        findings.append(warn("steps", message, remedy, sorted({item.file for pair in pairs for item in pair})))
    if not across:
        count = sum(item.step[0] is not None and not _is_round(item.step[0]) for item in examined)
        message = f"{count} of {len(examined)} volumes have an individual intensity step"
        together = f"; subjects of the same split share {len(shared)} of them" if shared else ""
        findings.append(ok("steps", f"{message}{together}; subjects of different splits share none"))
    return findings


def _is_round(step: float) -> bool:
    """Return whether a step is an integer, the reciprocal of one, or has at most three decimals: these are common."""
    return any(abs(value - round(value)) <= SAME_STEP * max(value, 1) for value in (step, 1 / step, 1000 * step))

"""Everything that is computed from the answers of a study, as one JSON document."""

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .agreement import Agreement, fleiss_kappa, icc_2k, intra_reader_kappa, krippendorff_alpha, over_volumes
from .answers import Reading
from .design import REAL
from .detection import auc, d_prime, d_prime_of_choice, equivalence_p, rate, roc
from .kit import StudyKey
from .plan import FEWEST
from .questions import LETTERS, SCALES
from .readers_and_cases import (
    accuracy_covariance,
    bootstrap_mean,
    delong_covariance,
    difference,
    equivalence,
    mean_figure,
    unlike_chance,
)
from .voxels import sources_of

Table = dict[str, object]
logger = logging.getLogger(__name__)


def analyze(readings: Sequence[Reading], key: StudyKey, *, margin: float, seed: int) -> Table:
    """Analyze the answers to a study.

    Args:
        readings: of all readers.
        key: the study's key.
        margin: balanced accuracy within this of 0.5 counts as equivalent to chance.
        seed: of the bootstrap.

    Readers who have answered fewer than two real or two generated volumes are left out, and listed under "left_out".

    Raises: ValueError if there is no other reader.
    """
    random = np.random.default_rng(seed)
    first = [reading for reading in readings if reading.first]
    readers = [reader for reader in key.readers if any(reading.reader == reader for reading in first)]
    by_reader = {reader: [reading for reading in first if reading.reader == reader] for reader in readers}
    left_out = _pop_beginners(by_reader)
    if not by_reader:
        raise ValueError(
            "no reader has answered two real and two generated volumes of the study; training cases do not count"
            + "".join(f"\n{line}" for line in left_out)
        )
    readers = list(by_reader)
    common = sorted(set.intersection(*({reading.item.cases[0] for reading in own} for own in by_reader.values())))
    return {
        "margin": margin,
        "left_out": left_out,
        "volumes": dict(Counter(key.cases[number].source for number in common)),
        "readers": {reader: _of_reader(own, margin) for reader, own in by_reader.items()},
        "together": _together(by_reader, common, key, margin, random),
        "models": _models(by_reader, common, key),
        "scales": {scale.name: _scale(scale.name, by_reader, common, key, random) for scale in SCALES},
        "decision_agreement": _agreement(
            _matrix(by_reader, common, lambda one: one.answers["decision"] == "G"), random
        ),
        "repeats": {reader: _repeats([one for one in readings if one.reader == reader]) for reader in readers},
        "pairs": _pairs([reading for reading in readings if reading.item.section == "pair"], margin),
        "comments": [
            {"reader": one.reader, "case": key.cases[one.item.cases[0]].name, "source": one.source, "text": one.comment}
            for one in readings
            if one.comment.strip()
        ],
    }


def _pop_beginners(by_reader: dict[str, list[Reading]]) -> list[str]:
    """Remove the readers who have only begun from `by_reader`. Returns: a line for each."""
    lines = []
    for reader, own in list(by_reader.items()):
        counts = Counter(reading.generated for reading in own)
        if min(counts[True], counts[False]) < FEWEST:
            lines.append(
                f"{own[0].file}: {reader} answered {counts[False]} real and {counts[True]} generated volumes: fewer "
                f"than {FEWEST} of a kind, and is left out; ask for the finished answers"
            )
            logger.warning("%s", lines[-1])
            del by_reader[reader]
    return lines


def _called_generated(reading: Reading) -> bool:
    return reading.answers["decision"] == "G"


def _of_reader(own: Sequence[Reading], margin: float) -> Table:
    generated = np.array([reading.generated for reading in own])
    scores = np.array([reading.score for reading in own])
    called = np.array([_called_generated(reading) for reading in own])
    hits, alarms = int((called & generated).sum()), int((called & ~generated).sum())
    signals, noises = int(generated.sum()), int((~generated).sum())
    sensitivity, criterion = d_prime(hits, signals, alarms, noises)
    accuracy = mean_figure(*accuracy_covariance((called == generated)[None], generated))
    area = mean_figure(*delong_covariance(scores[None], generated))
    false, true = roc(scores, generated)
    seconds = {kind: [one.seconds for one in own if one.generated == kind] for kind in (False, True)}
    return {
        "accuracy": accuracy,
        "generated_found": rate(hits, signals),
        "real_found": rate(noises - alarms, noises),
        "d_prime": sensitivity,
        "criterion": criterion,
        "auc": auc(scores, generated),
        "auc_interval": area["interval"],
        "equivalence_p": equivalence(accuracy, margin),
        "roc": [false, true],
        "median_seconds": {"real": float(np.median(seconds[False])), "generated": float(np.median(seconds[True]))},
    }


def _matrix(by_reader: dict[str, list[Reading]], common: Sequence[int], value: Any) -> np.ndarray:
    """Return (readers, cases) of a value of each first reading."""
    rows = []
    for own in by_reader.values():
        of_case = {reading.item.cases[0]: value(reading) for reading in own}
        rows.append([float(of_case[number]) for number in common])
    return np.array(rows)


def _together(
    by_reader: dict[str, list[Reading]],
    common: Sequence[int],
    key: StudyKey,
    margin: float,
    random: np.random.Generator,
) -> Table | None:
    """Return the means over readers, of the cases that all of them answered."""
    generated = np.array([key.cases[number].source != REAL for number in common])
    if min(generated.sum(), (~generated).sum()) < FEWEST:
        return None
    correct = _matrix(by_reader, common, lambda reading: reading.correct).astype(bool)
    scores = _matrix(by_reader, common, lambda reading: reading.score)
    accuracy = mean_figure(*accuracy_covariance(correct, generated))
    area = mean_figure(*delong_covariance(scores, generated))
    return {
        "readers": len(by_reader),
        "cases": len(common),
        "accuracy": accuracy,
        "accuracy_bootstrap": bootstrap_mean(correct, generated, random),
        "equivalence_p": equivalence(accuracy, margin),
        "difference_p": unlike_chance(accuracy),
        "auc": area,
        "auc_equivalence_p": equivalence(area, margin),
        "auc_difference_p": unlike_chance(area),
    }


def _models(by_reader: dict[str, list[Reading]], common: Sequence[int], key: StudyKey) -> Table:
    """Compare models, if there are several: the area under the curve of real volumes against those of each."""
    models = sources_of(key.cases)
    if len(models) < 2 or len(by_reader) < 2:
        return {}
    scores = _matrix(by_reader, common, lambda reading: reading.score)
    source = np.array([key.cases[number].source for number in common])
    found: Table = {}
    for first, second in combinations(models, 2):
        counts = [int((source == name).sum()) for name in (REAL, first, second)]
        if min(counts) < FEWEST:
            continue
        # Both share the real cases and have generated ones of their own, so only the real cases' part covaries.
        areas, whole = [], np.zeros((2 * len(scores),) * 2)
        parts = []
        for place, model in enumerate((first, second)):
            used = (source == REAL) | (source == model)
            area, covariance = delong_covariance(scores[:, used], source[used] == model)
            areas.append(area)
            rows = slice(place * len(scores), (place + 1) * len(scores))
            whole[rows, rows] = covariance
            ours, real = scores[:, source == model], scores[:, source == REAL]
            wins = (ours[:, :, None] > real[:, None, :]) + 0.5 * (ours[:, :, None] == real[:, None, :])
            parts.append(wins.mean(axis=1))
        shared = np.cov(np.concatenate(parts))[: len(scores), len(scores) :] / counts[0]
        whole[: len(scores), len(scores) :] = shared
        whole[len(scores) :, : len(scores)] = shared.T
        found[f"{first} - {second}"] = difference(areas[0], areas[1], whole)
    return found


def _agreement(ratings: np.ndarray, random: np.random.Generator, ordinal: bool = False) -> Table | None:
    if len(ratings) < 2 or ratings.shape[1] < FEWEST:
        return None
    found: Table = {"fleiss_kappa": over_volumes(fleiss_kappa, ratings, random)}
    if ordinal:
        found["krippendorff_alpha"] = over_volumes(krippendorff_alpha, ratings, random)
        found["icc_2k"] = icc_2k(ratings)
    return found


def _scale(
    name: str, by_reader: dict[str, list[Reading]], common: Sequence[int], key: StudyKey, random: np.random.Generator
) -> Table:
    counts = {}
    for reader, own in by_reader.items():
        for source in (REAL, *sources_of(key.cases)):
            given = Counter(one.answers[name] for one in own if one.source == source)
            counts.setdefault(reader, {})[source] = [given[letter] for letter in LETTERS]
    ratings = _matrix(by_reader, common, lambda reading: LETTERS.index(reading.answers[name]) + 1)
    return {"counts": counts, "agreement": _agreement(ratings, random, ordinal=True)}


def _repeats(own: Sequence[Reading]) -> dict[str, Agreement] | None:
    """Return the kappas of a reader's two readings of the repeated volumes."""
    first = {reading.item.id: reading for reading in own}
    both = [(first[one.item.repeat_of], one) for one in own if one.item.repeat_of in first]
    if len(both) < FEWEST:
        return None
    decisions = [["RG".index(one.answers["decision"]) for one in pair] for pair in both]
    found = {"decision": intra_reader_kappa(*np.transpose(decisions), levels=2, ordinal=False)}
    for scale in SCALES:
        levels = [[LETTERS.index(one.answers[scale.name]) for one in pair] for pair in both]
        found[scale.name] = intra_reader_kappa(*np.transpose(levels), levels=len(LETTERS), ordinal=True)
    return found


def _pairs(readings: Sequence[Reading], margin: float) -> Table:
    """Return the forced choices of each reader: right is the real one."""
    found: Table = {}
    for reader in dict.fromkeys(reading.reader for reading in readings):
        own = [reading for reading in readings if reading.reader == reader]
        right = sum(_chose_real(reading) for reading in own)
        found[reader] = {
            "correct": rate(right, len(own)),
            "d_prime": d_prime_of_choice(right, len(own)),
            "equivalence_p": equivalence_p(right, len(own), margin),
        }
    return found


def _chose_real(reading: Reading) -> bool:
    return reading.answers["choice"] == reading.real_side

"""Figures of evaluation that a calculation by hand knows: rates and attacks by subject, caveats by their limits."""

import numpy as np
import pytest

from evaluation.metrics.memorization import attack
from evaluation.metrics.set_distances import frechet_caveat
from evaluation.stats.bootstrap import subject_mean


def test_rates_are_means_over_subjects():
    """Subject a has one volume of one, subject b none of three."""
    assert subject_mean(np.array([1.0, 0, 0, 0]), ["a", "b", "b", "b"]) == pytest.approx(0.5)


def test_true_positives_at_a_rate_of_false_ones():
    """Of 20 others none may be taken at a rate of 0.01, two at 0.1: members must exceed 19, or 17. Member a has two
    volumes."""
    found = attack(np.array([19.5, 19, 17.5, 17]), np.arange(20.0), ["a", "a", "b", "c"], range(20))["true_positives"]
    assert found == {"0.01": pytest.approx(0.5 / 3), "0.1": pytest.approx(2 / 3)}


def test_the_interval_of_an_attack_is_over_members_and_others():
    """Every member exceeds the one other and not the second: of both drawn twice, the answer is 0 or 1."""
    found = attack(np.full(10, 0.5), np.array([0.0, 1.0]), range(10), ["x", "y"])
    assert found["auc"] == 0.5 and found["interval"] == [0, 1]
    found = attack(np.array([0.0, 1.0]), np.full(10, 0.5), ["x", "y"], range(10))
    assert found["auc"] == 0.5 and found["interval"] == [0, 1]


def test_a_covariance_takes_more_volumes_than_features():
    assert frechet_caveat(11, 10) is None and "10 volumes" in str(frechet_caveat(10, 10))

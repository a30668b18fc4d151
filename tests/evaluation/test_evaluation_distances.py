"""Distances of sets: exact for Gaussians whose distance is known, unbiased where they claim so, with honest floors."""

import numpy as np
import pytest

from evaluation.metrics.set_distances import (
    closer_than_test,
    compare_columns,
    compare_sets,
    frechet_caveat,
    frechet_distance,
    kernel_distance,
    nearest,
    standardize,
    wasserstein1,
)


def gaussian(count: int, mean, covariance, seed: int = 0) -> np.ndarray:
    """A sample that has exactly this mean and covariance (divided by count - 1)."""
    white = np.random.default_rng(seed).standard_normal((count, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return np.asarray(mean) + white @ np.linalg.cholesky(np.asarray(covariance)).T


def test_frechet_of_gaussians_whose_covariances_commute():
    first = gaussian(50, [1.0, 2.0, 3.0], np.diag([1.0, 4.0, 9.0]))
    second = gaussian(31, [1.0, 0.0, 6.0], np.diag([4.0, 4.0, 1.0]), seed=1)
    assert frechet_distance(first, second) == pytest.approx(4 + 9 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


def test_frechet_of_gaussians_whose_covariances_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    # of 2 x 2 matrices, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = frechet_distance(gaussian(20, [0, 0], a), gaussian(20, [0, 0], b, seed=1))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root)


def test_frechet_with_few_samples_uses_singular_covariances():
    """There are fewer samples than features."""
    # along different axes each: nothing in common, so the traces add up
    first, second = np.zeros((3, 8)), np.zeros((4, 8))
    first[:, 2], second[:, 5] = [-1, 0, 1], [-3, -3, 3, 3]
    assert frechet_distance(first, second) == pytest.approx(1 + 12)
    assert "3 volumes do not determine the covariance of 8 features" in str(frechet_caveat(3, 8))
    assert frechet_caveat(9, 8) is None


def test_kernel_distance_by_hand():
    # F = 1: k(x, y) = (x y + 1)^3; within: k(0, 1) = 1 and k(2, 3) = 343; across: 1, 1, 27, 64
    found = kernel_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    assert found == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_kernel_distance_is_unbiased_where_frechet_is_not():
    """Frechet's distance is biased at small counts."""
    random = np.random.default_rng(0)
    samples = [(random.standard_normal((5, 6)), random.standard_normal((12, 6))) for _ in range(100)]
    kernel = np.array([kernel_distance(*pair) for pair in samples])
    assert abs(kernel.mean()) < 3 * kernel.std() / 10
    assert np.mean([frechet_distance(*pair) for pair in samples]) > 2  # of two equal distributions


def test_wasserstein_of_columns():
    values = np.random.default_rng(0).random((40, 2))
    assert wasserstein1(values, values + np.array([0.25, -3])) == pytest.approx([0.25, 3])
    # half the mass moves from 0 to 1, whatever the counts
    assert wasserstein1(np.zeros((3, 1)), np.array([[0.0], [1.0], [0.0], [1.0]])) == pytest.approx([0.5])


def test_standardizing_scales_all_but_nearly_constant_columns():
    rows = np.array([[0.0, 5.0, 10.0], [2.0, 5.0, 30.0]])  # standard deviations 1, 0, 10
    of = {"training": rows, "test": rows + np.array([1, 0.5, 0])}
    plain = standardize(of, "training")
    assert plain["training"] == pytest.approx(np.array([[-1.0, 0, -1], [1, 0, 1]]))
    assert plain["test"][0] == pytest.approx([0, 0.5, -1])
    least = 0.5 * np.sqrt(101 / 3)
    assert standardize(of, "training", 0.5)["test"][0] == pytest.approx([0, 0.5 / least, -1])


def test_a_rarely_active_feature_does_not_dominate_the_kernel():
    """The kernel distance still sees the other features."""
    random = np.random.default_rng(0)
    of = {name: random.standard_normal((20, 10)) for name in ("training", "test", "generated")}
    for rows in of.values():
        rows[:, 9] = 0
    of["training"][0, 9], of["test"][0, 9] = 1e-4, 0.5
    drowned, kept = (standardize(of, "training", least) for least in (0.0, 0.1))
    assert abs(kernel_distance(drowned["generated"], drowned["test"])) > 100
    assert abs(kernel_distance(kept["generated"], kept["test"])) < 1


def sets(generated: np.ndarray, count: int = 40) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "training": random.standard_normal((2 * count, 4)),
        "test": random.standard_normal((count, 4)),
        "generated": generated,
    }


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_equal_distributions_are_at_the_floor_and_moved_above(distance):
    fresh = np.random.default_rng(2).standard_normal((60, 4))
    good = compare_sets(distance, sets(fresh), subsets=50)
    assert good["count"] == 20
    low, high = good["excess"]["interval"]
    assert low < 0 < high
    bad = compare_sets(distance, sets(fresh + 1), subsets=50)
    assert bad["excess"]["interval"][0] > 0
    assert bad["training_to_test"] == good["training_to_test"]  # the same draws


def test_the_whole_distance_is_of_all_volumes():
    of = sets(np.random.default_rng(3).standard_normal((9, 4)))
    assert compare_sets(kernel_distance, of, subsets=2)["whole"] == kernel_distance(of["generated"], of["test"])


def test_volumes_of_a_subject_are_drawn_together():
    """With pairs of equal volumes, halves that split pairs would have rows in common."""
    random = np.random.default_rng(0)
    test = np.repeat(random.standard_normal((10, 1)), 2, axis=0)
    of = {"training": random.standard_normal((20, 1)), "test": test, "generated": random.standard_normal((20, 1))}

    def shared(first: np.ndarray, second: np.ndarray) -> float:
        return float(len(np.intersect1d(first, second)))

    apart = compare_sets(shared, of, subjects={"test": [f"s{i // 2}" for i in range(20)]})
    assert apart["test_halves"]["mean"] == 0
    assert compare_sets(shared, of)["test_halves"]["mean"] > 2
    with pytest.raises(ValueError, match="3 subjects for 20 volumes"):
        compare_sets(shared, of, subjects={"test": ["a", "b", "c"]})


def test_columns_are_compared_in_the_spread_of_test_volumes():
    random = np.random.default_rng(0)
    real = random.standard_normal((3, 30, 2)) * [1, 100]
    of = {"training": real[0], "test": real[1], "generated": real[2] + [3, 0]}
    report = compare_columns(of, ["moved", "same"])
    spread = real[1][:, 0].std()
    assert report["moved"]["shift"] == pytest.approx((of["generated"][:, 0].mean() - real[1][:, 0].mean()) / spread)
    assert report["moved"]["wasserstein"]["whole"] == pytest.approx(wasserstein1(of["generated"], real[1])[0] / spread)
    assert report["moved"]["wasserstein"]["excess"]["interval"][0] > 1.5
    low, high = report["same"]["wasserstein"]["excess"]["interval"]
    assert low < 0 < high and report["same"]["test"]["std"] == pytest.approx(real[1][:, 1].std())


def test_copies_are_closer_to_training_than_unseen_volumes():
    random = np.random.default_rng(0)
    training, test, fresh = (random.standard_normal((n, 6)) for n in (50, 30, 30))
    copies = {"training": training, "test": test, "generated": training[:30]}
    found = closer_than_test(copies)
    assert found["auc"] == 1 and found["interval"] == pytest.approx([1, 1])
    low, high = closer_than_test({**copies, "generated": fresh})["interval"]
    assert low < 0.5 < high
    assert closer_than_test({**copies, "generated": fresh + 50})["auc"] == 0
    half = closer_than_test({**copies, "generated": np.concatenate([training[:15], fresh[:15]])})
    assert 0.6 < half["auc"] < 0.9 and half["interval"][0] > 0.5


def test_intervals_of_closeness_count_subjects_not_volumes():
    """Three times the same volumes of the same subjects tell no more than once."""
    random = np.random.default_rng(0)
    training, test, fresh = (random.standard_normal((n, 6)) for n in (50, 20, 20))
    once = {"training": training, "test": test, "generated": fresh}
    thrice = {**once, "test": np.tile(test, (3, 1)), "generated": np.tile(fresh, (3, 1))}
    subjects = dict.fromkeys(("test", "generated"), list(range(20)) * 3)

    def width(found: dict) -> float:
        return found["interval"][1] - found["interval"][0]

    of_once, of_thrice = closer_than_test(once), closer_than_test(thrice, subjects=subjects)
    assert of_thrice["auc"] == pytest.approx(of_once["auc"]) and width(of_thrice) == pytest.approx(
        width(of_once), rel=0.1
    )
    assert width(closer_than_test(thrice)) < 0.7 * width(of_once)


def test_the_nearest_is_found_across_chunks():
    random = np.random.default_rng(0)
    queries, reference = random.standard_normal((7, 3)), random.standard_normal((5, 3))
    slow = np.linalg.norm(queries[:, None] - reference, axis=2).min(1)
    assert nearest(queries, reference, chunk=2) == pytest.approx(slow)


def test_what_cannot_be_compared_is_refused():
    good = np.zeros((5, 2))
    with pytest.raises(ValueError, match="both must be"):
        frechet_distance(good, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="two of each"):
        kernel_distance(good, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="NaN"):
        wasserstein1(good, np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match="3 test volumes are too few"):
        compare_sets(frechet_distance, {"training": good, "test": good[:3], "generated": good})

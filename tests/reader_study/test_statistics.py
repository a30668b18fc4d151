"""The statistics of readers' studies against published examples."""

from math import gamma
from statistics import NormalDist

import numpy as np
import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("krippendorff")
pytest.importorskip("pingouin")

from reader_study.agreement import fleiss_kappa, icc_2k, intra_reader_kappa, krippendorff_alpha
from reader_study.detection import auc, d_prime, d_prime_of_choice, equivalence_p, rate
from reader_study.readers_and_cases import (
    delong_covariance,
    difference,
    difference_of_squares,
    equivalence,
    mean_figure,
    unlike_chance,
)

NONE = np.nan


def test_wilson_and_clopper_pearson():
    """Newcombe 1998, Statistics in Medicine 17:857, Table I: 81 of 263, 15 of 148, and 0 of 20 and 1 of 29."""
    for count, of, wilson, exact in (
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1611), (0.0, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ):
        found = rate(count, of)
        assert found["wilson"] == pytest.approx(wilson, abs=5.1e-5)
        assert found["clopper_pearson"] == pytest.approx(exact, abs=5.1e-5)


def test_wilson_by_its_formula():
    """Wilson 1927 by hand for 8 of 10: (p + z2/2n -+ z sqrt(p q/n + z2/4n2)) / (1 + z2/n)."""
    z = 1.959963984540054
    middle, root = 0.8 + z**2 / 20, z * np.sqrt(0.016 + z**2 / 400)
    assert rate(8, 10)["wilson"] == pytest.approx(
        ((middle - root) / (1 + z**2 / 10), (middle + root) / (1 + z**2 / 10)), abs=1e-9
    )


def test_fleiss_kappa():
    """Fleiss 1971 by way of its usual example: 14 raters, 10 subjects, 5 categories; kappa 0.20993 (0.210)."""
    table = np.array(
        [
            *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
            *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
        ]
    )
    ratings = np.array([np.repeat(np.arange(5), row) for row in table], float).T
    # By hand: P-bar 0.37802197..., Pe-bar 0.21275510...
    agreement = ((table**2).sum(1) - 14) / (14 * 13)
    chance = ((table.sum(0) / 140) ** 2).sum()
    assert fleiss_kappa(ratings) == pytest.approx((agreement.mean() - chance) / (1 - chance), abs=1e-9)
    assert fleiss_kappa(ratings) == pytest.approx(0.20993, abs=5e-6)


def test_krippendorff_alpha_of_ordinal_ratings():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: 4 observers, 12 units."""
    ratings = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
            [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
        ]
    )
    assert krippendorff_alpha(ratings) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(ratings) == pytest.approx(0.8153880, abs=1e-6)


def test_icc_2k():
    """Shrout and Fleiss 1979, Table 2: 6 targets, 4 judges; mean squares 11.24, 32.49, 1.02, so ICC(2,4) = 0.62."""
    table = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    found = icc_2k(table.T)
    rows, columns = table.mean(1), table.mean(0)
    between = 4 * ((rows - table.mean()) ** 2).sum() / 5
    judges = 6 * ((columns - table.mean()) ** 2).sum() / 3
    error = ((table - rows[:, None] - columns + table.mean()) ** 2).sum() / 15
    assert found["value"] == pytest.approx((between - error) / (between + (judges - error) / 6), abs=1e-6)
    assert found["value"] == pytest.approx(0.62, abs=5e-3)
    assert found["interval"] and found["interval"][0] < 0.62 < found["interval"][1]


def test_intra_reader_kappa():
    """Cohen 1960 by hand: 20 yes-yes, 5, 10, 15 no-no of 50 gives 0.4."""
    first = [1] * 25 + [0] * 25
    again = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert intra_reader_kappa(first, again, 2, ordinal=False)["value"] == pytest.approx(0.4, abs=1e-9)
    # One step off in 4 levels costs 1/9 of the worst: 1 - observed / expected disagreement.
    table = np.array([[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1]]) / 10
    weights = (np.subtract.outer(np.arange(4), np.arange(4)) / 3) ** 2
    expected = np.outer(table.sum(1), table.sum(0))
    first = np.repeat([0, 0, 1, 2, 2, 3], [2, 1, 2, 3, 1, 1])
    again = np.repeat([0, 1, 1, 2, 3, 3], [2, 1, 2, 3, 1, 1])
    kappa = 1 - (weights * table).sum() / (weights * expected).sum()
    assert intra_reader_kappa(first, again, 4, ordinal=True)["value"] == pytest.approx(kappa, abs=1e-9)


def test_d_prime():
    """Macmillan and Creelman 2005, ch. 1: 20 hits of 25, 10 false alarms of 25 have d' 1.095; here log-linear."""
    sensitivity, criterion = d_prime(20, 25, 10, 25)
    z_hit, z_false = NormalDist().inv_cdf(20.5 / 26), NormalDist().inv_cdf(10.5 / 26)
    assert sensitivity == pytest.approx(z_hit - z_false, abs=1e-9)
    assert criterion == pytest.approx(-(z_hit + z_false) / 2, abs=1e-9)
    assert d_prime(200_000, 250_000, 100_000, 250_000)[0] == pytest.approx(1.0949683, abs=1e-5)
    assert np.isfinite(d_prime(25, 25, 0, 25)[0]) and d_prime(12, 25, 12, 25)[0] == pytest.approx(0, abs=1e-12)
    assert d_prime_of_choice(10, 20) == pytest.approx(0, abs=1e-12)


def test_auc_counts_ties_half():
    scores = np.array([1, 2, 2, 3, 5])
    generated = np.array([False, True, False, True, True])
    assert auc(scores, generated) == pytest.approx((1 + 0.5 + 1 + 1 + 1 + 1) / 6, abs=1e-12)
    areas, covariance = delong_covariance(scores[None], generated)
    assert areas[0] == pytest.approx(auc(scores, generated), abs=1e-12)
    # Placements by hand: 0.75, 1, 1 of the generated; 1, 5/6 of the real: variances 1/48 and 1/72.
    assert covariance[0, 0] == pytest.approx(1 / 48 / 3 + 1 / 72 / 2, abs=1e-12)


def test_obuchowski_rockette_of_one_model():
    """Van Dyke et al. 1993, as R's MRMCaov 0.3 analyzes them: 5 readers, 114 cases, DeLong; each treatment alone."""
    for mean, between, shared, error, freedom, low, high in (
        (0.8970370, 0.003082629, 0.0004775239, 0.03307642, 12.59597, 0.8253461, 0.9687280),
        (0.9408374, 0.001304602, 0.0002015292, 0.02150464, 12.56530, 0.8942155, 0.9874592),
    ):
        spread = np.array([-2, -1, 0, 1, 2.0])
        figures = mean + spread * np.sqrt(between / spread.var(ddof=1))
        found = mean_figure(figures, np.full((5, 5), shared))
        assert found["standard_error"] == pytest.approx(error, abs=1e-6)
        assert found["freedom"] == pytest.approx(freedom, abs=2e-4)
        assert found["interval"] == pytest.approx((low, high), abs=1e-6)


def test_obuchowski_rockette_of_two_models():
    """The same data: the test that the treatments do not differ."""
    found = difference_of_squares(-0.04380032, 0.004796171, 0.0005510306, 0.0003395265, 0.0002358497, 5)
    assert found["f"] == pytest.approx(4.484854, abs=5e-6)
    assert found["freedom"] == pytest.approx(15.06611, abs=5e-5)
    assert found["p"] == pytest.approx(0.05123303, abs=1e-6)
    assert found["standard_error"] == pytest.approx(0.0206825, abs=1e-6)
    assert found["interval"] == pytest.approx((-0.0878671960, 0.0002665519), abs=1e-6)


def test_obuchowski_rockette_of_ratings_by_hand():
    """Two readers, five cases: from the ratings to the interval, in fractions.

    Placements of the generated volumes: (3/4, 1, 1) and (0, 1/4, 1/2); of the real ones: (1, 5/6) and (1/2, 0). So the
    areas are 11/12 and 1/4, their variances 1/48/3 + 1/72/2 = 1/72 and 1/16/3 + 1/8/2 = 1/12, and their covariance
    1/32/3 + 1/24/2 = 1/32. Between the readers the variance is (2/3)^2/2 = 2/9.
    """
    scores = np.array([[1, 2, 2, 3, 5], [2, 4, 1, 2, 3.0]])
    areas, covariance = delong_covariance(scores, np.array([False, False, True, True, True]))
    assert areas == pytest.approx([11 / 12, 1 / 4], abs=1e-12)
    assert covariance == pytest.approx(np.array([[1 / 72, 1 / 32], [1 / 32, 1 / 12]]), abs=1e-12)
    found = mean_figure(areas, covariance)
    assert found["value"] == pytest.approx(7 / 12, abs=1e-12)
    assert found["standard_error"] == pytest.approx(np.sqrt(41 / 288), abs=1e-12)  # (2/9 + 2/32) / 2
    assert found["freedom"] == pytest.approx(1681 / 1024, abs=1e-12)  # (2/9 + 2/32)^2 / (2/9)^2
    ratio = (1 / 12) / np.sqrt(41 / 288)
    assert unlike_chance(found) == pytest.approx(2 * (1 - student_t(ratio, 1681 / 1024)), abs=1e-6)


def student_t(at, freedom):
    """Student's distribution function by its density alone, summed up by Simpson's rule."""
    places = np.linspace(0, at, 2001)
    density = (1 + places**2 / freedom) ** (-(freedom + 1) / 2)
    scale = gamma((freedom + 1) / 2) / (np.sqrt(freedom * np.pi) * gamma(freedom / 2))
    weights = np.array([1, *[4, 2] * 999, 4, 1])
    return 0.5 + scale * float((weights * density).sum()) * at / 2000 / 3


def test_two_models_by_hand():
    """Areas 11/12 and 1/4 with one model, 1/2 and 1/4 with the other: MS(T) = MS(T:R) = 25/576; Cov2 - Cov3 = 1/96."""
    own, other, across = np.full((2, 2), 1 / 48), np.full((2, 2), 1 / 96), 1 / 32
    np.fill_diagonal(own, 1 / 24)
    np.fill_diagonal(other, across)
    found = difference(np.array([11 / 12, 1 / 4]), np.array([1 / 2, 1 / 4]), np.block([[own, other], [other, own]]))
    assert found["value"] == pytest.approx(5 / 24, abs=1e-12)
    assert found["f"] == pytest.approx(25 / 37, abs=1e-12)  # 25/576 / (25/576 + 2/96)
    assert found["freedom"] == pytest.approx((37 / 25) ** 2, abs=1e-12)
    assert found["standard_error"] == pytest.approx(np.sqrt(37 / 576), abs=1e-12)
    assert found["p"] == pytest.approx(2 * (1 - student_t(np.sqrt(25 / 37), (37 / 25) ** 2)), abs=1e-6)


def test_equivalence_is_two_one_sided_tests():
    """With 150 of 300 right, both exact one-sided tests against 0.4 and 0.6 are P(X >= 150 | 300, 0.4)."""
    from scipy.stats import binom

    assert equivalence_p(150, 300, 0.1) == pytest.approx(binom.sf(149, 300, 0.4), abs=1e-9)
    assert equivalence_p(180, 300, 0.1) > 0.5
    figure = mean_figure(np.array([0.5]), np.array([[0.0025]]))
    assert equivalence(figure, 0.1) == pytest.approx(0.02275013, abs=1e-6)  # z = 2

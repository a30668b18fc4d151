"""Clusters of intensity, Dice of tissues, and sizes of tissues, with known answers."""

import itertools
import math

import numpy as np
import pytest

from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.morphometry import compare_sizes, tissue_sizes
from evaluation.metrics.tissues import cluster, outside_share, tissue_dice, tissue_map
from evaluation.stats.intervals import correlations


def best_split(values: np.ndarray, count: int) -> float:
    """The smallest sum of squares about the means of `count` intervals of sorted values."""
    values = np.sort(values)
    cuts = itertools.combinations(range(1, len(values)), count - 1)
    parts = (np.split(values, cut) for cut in cuts)
    return min(sum(((part - part.mean()) ** 2).sum() for part in split) for split in parts)


def test_clusters_are_the_best_of_all():
    random = np.random.default_rng(0)
    for _ in range(20):
        values = np.concatenate([random.normal(center, 0.1, 7) for center in (0.2, 0.8, 1.6)])
        random.shuffle(values)
        index = cluster(values, 3)
        error = sum(((values[index == k] - values[index == k].mean()) ** 2).sum() for k in range(3))
        assert error == pytest.approx(best_split(values, 3))
        assert (
            values[index == 0].max() < values[index == 1].min() <= values[index == 1].max() < values[index == 2].min()
        )


def test_clusters_do_not_depend_on_the_scale_of_intensity():
    values = np.random.default_rng(1).gamma(2.0, size=5000)
    assert np.array_equal(cluster(values, 3), cluster(40 * values - 1000, 3))


def test_few_values_and_none_have_clusters():
    assert cluster(np.full(4, 2.0), 3).tolist() == [0, 0, 0, 0]
    dark, bright = cluster(np.array([5.0, 1.0]), 3)[::-1]
    assert dark < bright  # one of three clusters is empty
    assert cluster(np.zeros(0), 3).shape == (0,)
    assert cluster(np.array([5.0, 1.0, 5.0, 1.0]), 2).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="without a finite intensity"):
        cluster(np.array([1.0, np.nan]), 2)
    with pytest.raises(ValueError, match="give 2 or more"):
        cluster(np.ones(3), 1)


def test_a_map_is_clustered_inside_alone():
    volume = np.array([[[0.9, 0.1, 0.5, 0.52, 0.12, 1.0]]])
    inside = np.array([[[True, True, True, True, True, False]]])
    assert tissue_map(volume, inside, 3).tolist() == [[[3, 1, 2, 2, 1, 0]]]


def test_dice_of_tissues_by_hand():
    """Label 1: 2 of 3 and 2 voxels agree; label 2 is not in the map; unknown voxels do not count."""
    expected = np.array([[[1, 1, 0, 3, -2, -1]]])
    tissues = np.array([[[1, 1, 1, 3, 3, 3]]])
    found = tissue_dice(tissues, expected, 3)
    assert found[0] == pytest.approx(4 / 5) and math.isnan(found[1]) and found[2] == 1


def test_what_is_not_empty_outside_is_counted():
    volume = np.array([[[0.0, 0.001, 0.5, 0.0]]])
    assert outside_share(volume, np.array([[[True, True, False, True]]])) == pytest.approx(1 / 3)
    assert outside_share(volume, np.zeros((1, 1, 4), bool)) == 0


def test_correlations_are_those_of_numpy():
    random = np.random.default_rng(2)
    x, y = random.standard_normal((2, 30))
    counts = random.integers(0, 4, (5, 30))
    expected = [np.corrcoef(np.repeat(x, count), np.repeat(y, count))[0, 1] for count in counts]
    np.testing.assert_allclose(correlations(x, y, counts), expected)
    assert correlations(np.full(30, 0.1), y, counts).tolist() == [0] * 5


def brain(dark: int, bright: int) -> np.ndarray:
    """(1, 8, 8, 8) with so many voxels of 0.3 and of 0.9; the others are empty."""
    values = np.zeros(512, np.float32)
    values[:dark], values[dark : dark + bright] = 0.3, 0.9
    return values.reshape(1, 8, 8, 8)


def test_sizes_are_in_cubic_millimeters():
    assert tissue_sizes(brain(100, 50)[0], (1.0, 2.0, 3.0), 2).tolist() == [600, 300, 900]
    assert tissue_sizes(brain(0, 0)[0], (1.0, 1.0, 1.0), 2).tolist() == [0, 0, 0]


def grown(count: int, seed: int, *, shift: int = 0, sexes: str = "FM", subjects: str = "") -> VolumeSet:
    """Volumes whose bright tissue grows with age, 20 voxels larger for M; dark tissue is smaller with age."""
    random = np.random.default_rng(seed)
    volumes, rows = [], []
    for number in range(count):
        age, sex = 20 + int(random.integers(0, 40)), sexes[number % len(sexes)]
        volumes.append(brain(200 - age + shift, 60 + age + 20 * (sex == "M")))
        rows.append({"sex": sex, "age": str(age)})
    return VolumeSet(volumes, subjects=[f"{subjects}{n}" for n in range(count)], metadata=rows)


def compare(generated: VolumeSet):
    sets = {"training": grown(20, 1, subjects="a"), "test": grown(12, 2, subjects="b"), "generated": generated}
    return compare_sizes(sets, ["dark", "bright"], {"sex": ["F", "M", "X"]}, ["age", "weight"])


def test_equal_populations_have_equal_sizes():
    found = compare(grown(30, 3, subjects="c"))
    assert [*found["groups"]] == ["all", "sex F", "sex M"]  # nobody is X
    assert found["groups"]["sex F"]["volumes"] == {"training": 10, "test": 6, "generated": 15}
    for group in found["groups"].values():
        for tissue in ("dark", "bright"):  # the whole is the same for all of one sex
            low, high = group["tissues"][tissue]["difference"]["interval"]
            assert low < 0 < high and group["tissues"][tissue]["floor"] is not None
    assert [*found["numbers"]] == ["age"]  # nobody has a weight
    by_age = found["numbers"]["age"]
    assert by_age["dark"]["real"]["mean"] == pytest.approx(-1) == by_age["dark"]["generated"]["mean"]
    assert 0.7 < by_age["bright"]["generated"]["mean"] < 1
    assert by_age["whole"]["real"]["interval"][0] < by_age["whole"]["real"]["mean"]


def test_a_difference_is_in_standard_deviations_of_real_volumes():
    generated = grown(30, 3, shift=-30, subjects="c")
    sizes = compare(generated)["groups"]["all"]["tissues"]["dark"]
    real = np.array([volume.size for volume in generated.volumes])  # of the same shape
    assert len({*real}) == 1
    expected = (sizes["generated"]["mean"] - sizes["real"]["mean"]) / sizes["real"]["std"]
    assert sizes["difference"]["mean"] == pytest.approx(expected) and expected < -2
    assert sizes["difference"]["interval"][1] < -1.5


def test_a_small_group_has_no_floor_or_is_left_out():
    few = {"training": grown(20, 1, subjects="a"), "test": grown(4, 2, subjects="b"), "generated": grown(4, 3)}
    found = compare_sizes(few, ["dark", "bright"], {"sex": ["F", "M"]}, [])
    assert [*found["groups"]] == ["all"] and found["groups"]["all"]["tissues"]["dark"]["floor"] is not None
    few["generated"] = grown(6, 3)
    found = compare_sizes(few, ["dark", "bright"], {"sex": ["F", "M"]}, [])
    assert found["groups"]["sex F"]["tissues"]["dark"]["floor"] is None

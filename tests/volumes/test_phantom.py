"""The phantom: drawn from its seed alone, nested, with a class that can be seen."""

import time
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from volumes import PHANTOM_LABELS, DataConfig, PhantomConfig, VolumeDataset, load_cases, make_phantom
from volumes.phantom import phantom_lesion


def test_the_seed_alone_decides():
    first, again, other = make_phantom(3), make_phantom(3), make_phantom(4)
    np.testing.assert_array_equal(first[0].array, again[0].array)
    np.testing.assert_array_equal(first[1].array, again[1].array)
    assert first[2] == again[2]
    assert not np.array_equal(first[1].array, other[1].array)


@pytest.mark.parametrize("shape", [(32, 32, 32), (17, 24, 21)])
def test_ellipsoids_are_nested(shape):
    for seed in range(10):
        image, mask, _ = make_phantom(seed, shape)
        labels = mask.array[0]
        assert image.shape == mask.shape == shape
        assert set(np.unique(labels)) == set(PHANTOM_LABELS)
        for inner in (1, 2, 3):
            ring = np.zeros(shape, bool)
            for axis in range(3):
                for step in (-1, 1):
                    ring |= np.roll(labels == inner, step, axis)
            assert labels[ring].min() >= inner - 1


def test_small_lesions_leave_the_rest_as_it_is():
    """Lesions of 2 to 6 voxels in the organ, apart from each other; the same phantom otherwise."""
    for seed in range(10):
        image, mask, lesion_class = make_phantom(seed, lesion_voxels=(2, 6), lesions=3)
        large, large_mask, same_class = make_phantom(seed)
        labels = mask.array[0]
        assert lesion_class == same_class
        components, count = ndimage.label(labels == 3, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        assert count == 3 and sizes.min() >= 2 and sizes.max() <= 6
        assert phantom_lesion(seed, (32, 32, 32), (2, 6), 3) == (lesion_class, sizes.sum())
        around = ndimage.binary_dilation(labels == 3, np.ones((3, 3, 3))) & (labels != 3)
        assert (labels[around] == 2).all()
        outside = (labels != 3) & (large_mask.array[0] != 3)
        assert np.array_equal(image.array[0][outside], large.array[0][outside])


def test_small_lesions_are_set_in_the_config():
    dataset = VolumeDataset(*phantom_cases(lesion_voxels=(2, 4), lesions=2))
    counts = [facts.mask.counts[3] for facts in dataset.facts]
    assert all(4 <= count <= 8 for count in counts) and counts != [
        facts.mask.counts[3] for facts in VolumeDataset(*phantom_cases()).facts
    ]
    for wrong in ({"lesion_voxels": (6, 2)}, {"lesions": 2}):
        with pytest.raises(ValueError, match="phantom.lesion"):
            PhantomConfig(**wrong)


def phantom_cases(**changes):
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(24, 24, 24), **changes))
    return load_cases(config), config


def test_the_class_is_the_lesions_brightness():
    classes = set()
    for seed in range(20):
        image, mask, lesion_class = make_phantom(seed)
        organ, lesion = (image.array[mask.array == label].mean() for label in (2, 3))
        assert (lesion > organ) == (lesion_class == 1)
        classes.add(lesion_class)
    assert classes == {0, 1}


def test_the_origin_is_the_center():
    image, _, _ = make_phantom(0, (10, 12, 14), spacing=(1, 2, 3))
    assert image.spacing == (1, 2, 3)
    np.testing.assert_allclose(image.affine @ [4.5, 5.5, 6.5, 1], [0, 0, 0, 1])


def test_the_body_lies_where_the_seed_puts_it():
    """Its center, the first that is drawn, in units of half a side from the middle of the grid, faces at -1 and 1."""
    for seed, shape in ((0, (24, 24, 24)), (1, (20, 24, 28))):
        _, mask, _ = make_phantom(seed, shape)
        centroid = (np.argwhere(mask.array[0] > 0).mean(0) + 0.5) / shape * 2 - 1
        expected = np.random.default_rng(seed).uniform(-0.08, 0.08, 3)
        np.testing.assert_allclose(centroid, expected, atol=0.015)


def test_a_data_set_without_files():
    config = DataConfig(phantom=PhantomConfig(count=8, shape=(12, 12, 16), seed=100), validation_fraction=0.25)
    cases = load_cases(config)
    assert [case.split for case in cases].count("validation") == 2
    dataset = VolumeDataset(cases, config)
    assert dataset.num_labels == 4
    item = dataset[2]
    assert item["name"] == "phantom_0102"
    _, mask, lesion_class = make_phantom(102, (12, 12, 16))
    np.testing.assert_array_equal(item["mask"], mask.array[0])
    assert item["metadata"]["class"] == ("dark lesion", "bright lesion")[lesion_class]


def test_voxels_are_those_of_the_formula():
    """Of three ellipsoids on a grid of positions, drawn in this order from the seed."""
    for seed, shape in ((0, (32, 32, 32)), (5, (17, 24, 21)), (9, (40, 9, 30))):
        random = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in shape], indexing="ij"))
        body = random.uniform(-0.08, 0.08, 3)
        organ = body + random.uniform(-0.06, 0.06, 3)
        lesion = organ + random.uniform(-0.06, 0.06, 3)
        kind, mask = int(random.integers(2)), np.zeros(shape, np.int16)
        for label, center, limits in ((1, body, (0.75, 0.88)), (2, organ, (0.42, 0.56)), (3, lesion, (0.14, 0.24))):
            radii = random.uniform(*limits, 3)[:, None, None, None]
            mask[(((grid - center[:, None, None, None]) / radii) ** 2).sum(0) <= 1] = label
        image = np.array([0.0, 400.0, 700.0, (150.0, 1000.0)[kind]])[mask]
        image = image * (1 + np.tensordot(random.uniform(-0.1, 0.1, 3), grid, axes=1)) + random.normal(0, 20, shape)
        drawn, labels, found = make_phantom(seed, shape)
        np.testing.assert_array_equal(drawn.array[0], image.astype(np.float32))
        np.testing.assert_array_equal(labels.array[0], mask)
        assert found == kind


def test_the_lesion_is_known_without_drawing_it():
    random = np.random.default_rng(0)
    for seed in range(60):
        x, y, z = random.integers(8, 40, 3).tolist()
        _, mask, kind = make_phantom(seed, (x, y, z))
        assert phantom_lesion(seed, (x, y, z)) == (kind, int((mask.array == 3).sum()))


def test_a_cohort_of_full_size_is_listed_at_once():
    """Drawing it takes an hour."""
    start = time.process_time()
    cases = load_cases(DataConfig(phantom=PhantomConfig(count=1251, shape=(240, 240, 155)), validation_fraction=0.1))
    assert time.process_time() - start < 60
    assert Counter(case.split for case in cases) == {"train": 1126, "validation": 125}
    volumes = [case.metadata["lesion_volume"] for case in cases]
    assert len(set(volumes)) > 1200 and 10_000 < min(volumes) < max(volumes) < 70_000


def test_too_small():
    with pytest.raises(ValueError, match="8 voxels or more"):
        make_phantom(0, (4, 32, 32))

"""Padding and cropping: they record themselves, are undone, and padding is not background."""

import itertools

import numpy as np
import pytest
import torch

from volumes import Placement, pad_or_crop, pad_to_multiple


def test_padding_goes_to_both_sides_the_odd_voxel_to_the_end():
    placement = pad_to_multiple((5, 8, 9), 4)
    assert placement == Placement(shape=(5, 8, 9), target=(8, 8, 12), start=(-1, 0, -1))
    padded = placement.apply(np.arange(5 * 8 * 9).reshape(5, 8, 9), -7)
    assert (padded[0] == -7).all() and (padded[6:] == -7).all()
    np.testing.assert_array_equal(padded[1:6, :, 1:10], np.arange(5 * 8 * 9).reshape(5, 8, 9))


@pytest.mark.parametrize(
    ("shape", "target", "offset"), [((5, 6, 9), (8, 8, 12), None), ((5, 6, 9), (4, 8, 5), (1, 0, 2))]
)
def test_planes_one_after_the_other_are_the_whole(shape, target, offset):
    """Undone slab by slab: padding disappears wherever the slabs are cut; what was cropped away stays away."""
    placement = pad_or_crop(shape, target, offset=offset)
    window = np.random.default_rng(0).normal(size=(2, *target))
    bounds = [0, 1, 2, 4, target[2]]
    parts = [placement.planes(a, b).undo(window[..., a:b], 7) for a, b in itertools.pairwise(bounds)]
    first = max(placement.start[2], 0)
    expected = placement.undo(window, 7)[..., first : first + target[2]]
    np.testing.assert_array_equal(np.concatenate(parts, axis=3), expected)


def test_strides_may_differ_by_axis():
    assert pad_to_multiple((5, 5, 5), (2, 4, 1)).target == (6, 8, 5)


def test_cropping_is_centerd():
    placement = pad_or_crop((10, 7, 4), (4, 4, 4))
    assert placement.start == (3, 1, 0)
    array = np.random.default_rng(0).normal(size=(2, 10, 7, 4))
    np.testing.assert_array_equal(placement.apply(array, 0), array[:, 3:7, 1:5])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_undone_exactly(kind):
    random = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(random.integers(1, 9, 3).tolist())
        target = tuple(random.integers(1, 9, 3).tolist())
        placement = pad_or_crop(shape, target, offset=tuple(random.integers(-9, 9, 3).tolist()))
        array = kind(random.integers(1, 100, (2, *shape)))
        window = placement.apply(array, 0)
        assert type(window) is type(array) and window.dtype == array.dtype
        assert tuple(window.shape) == (2, *target)
        back = placement.undo(window, 0)
        seen = placement.undo(kind(np.broadcast_to(placement.field_of_view, (2, *target)).copy()), False)
        # every voxel that the window showed comes back, the others are filled
        np.testing.assert_array_equal(np.asarray(back), np.where(np.asarray(seen), np.asarray(array), 0))
        # what is in the field of view is the volume (values from 1), what is not is the fill
        np.testing.assert_array_equal(np.asarray(window[0]) > 0, placement.field_of_view)


def test_padding_alone_loses_nothing():
    array = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    placement = pad_to_multiple((5, 6, 7), 8)
    np.testing.assert_array_equal(placement.undo(placement.apply(array, -1)), array)
    assert placement.field_of_view.sum() == 5 * 6 * 7


def test_the_affine_moves_with_the_window():
    affine = np.array([[0, 2.0, 0, 5], [-1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    placement = pad_or_crop((10, 10, 10), (4, 20, 10), offset=(3, -5, 0))
    window_voxel, grid_voxel = (1, 9, 2), (4, 4, 2)
    np.testing.assert_allclose(placement.shift(affine) @ [*window_voxel, 1], affine @ [*grid_voxel, 1])


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"takes arrays of \(4, 4, 4\)"):
        pad_to_multiple((4, 4, 4), 8).apply(np.zeros((4, 4, 5)), 0)

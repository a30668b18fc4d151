"""Lesions in label maps, and the regions to generate again."""

import numpy as np
import pytest
from tiny import editor_of, seeded, tiny_pipeline

from volumes import PADDING, Volume
from volumes.lesions import (
    ellipsoid,
    grown,
    insert_lesion,
    remove_lesion,
)

AFFINE = np.diag([1.0, 2.0, 4.0, 1.0])


def organ() -> Volume:
    """An organ (2) in background (0), the last planes outside the field of view."""
    values = np.zeros((1, 12, 10, 8), np.int16)
    values[0, 2:10, 2:8, 1:6] = 2
    values[..., 7] = PADDING
    return Volume(values, AFFINE)


def test_a_ball_has_its_diameter_in_mm():
    ball = ellipsoid(8, (1, 2, 4))
    assert ball.shape == (9, 5, 3) and ball[4, 2].tolist() == [True] * 3
    assert [int(ball.any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))] == [9, 5, 3]
    fine = ellipsoid((10, 20, 30), (0.5, 0.5, 0.5))
    assert fine.sum() * 0.125 == pytest.approx(np.pi / 6 * 10 * 20 * 30, rel=0.02)
    with pytest.raises(ValueError, match="diameters are lengths in mm above 0, got 0"):
        ellipsoid(0, (1, 1, 1))


def test_a_lesion_is_where_it_was_put_and_the_region_around_it():
    mask = organ()
    edited, region = insert_lesion(mask, np.ones((1, 3, 1)), (5, 4, 3), 5, margin=2)
    expected = mask.array.copy()
    expected[0, 5, 3:6, 3] = 5
    assert np.array_equal(edited.array, expected) and np.array_equal(edited.affine, AFFINE)
    around = np.zeros((12, 10, 8), bool)  # 2 mm are 2 voxels along x, 1 along y, none along z
    around[3:8, 3:6, 3] = True
    around[5, 2:7, 3] = True
    assert np.array_equal(region.array[0] > 0, around)
    assert mask.array[0, 5, 4, 3] == 2  # the mask that was given is as it was


def test_a_lesion_stays_in_organ_volume_and_field_of_view():
    mask, ball = organ(), ellipsoid(12, (1, 2, 4))
    edited, region = insert_lesion(mask, ball, (2, 2, 5), 5, within=[2])
    assert (edited.array == 5).any() and (mask.array[edited.array == 5] == 2).all()
    corner, of_corner = insert_lesion(mask, ball, (0, 0, 6), 5)
    assert (corner.array[..., 7] == PADDING).all() and not of_corner.array[..., 7].any()
    assert (corner.array == 5).sum() < ball.sum() and corner.array[0, 0, 0, 6] == 5
    assert ((region.array > 0) >= (edited.array != mask.array)).all()


def test_an_inserted_lesion_is_removed_alone_or_with_its_kind():
    mask = organ()
    one, region = insert_lesion(mask, np.ones((2, 2, 2)), (4, 4, 3), 5)
    two, _ = insert_lesion(one, np.ones((1, 1, 1)), (8, 6, 4), 5)
    back, same = remove_lesion(one, 5, 2)
    assert np.array_equal(back.array, mask.array) and np.array_equal(same.array, region.array)
    assert np.array_equal(remove_lesion(two, 5, 2)[0].array, mask.array)
    alone, of_alone = remove_lesion(two, 5, 2, position=(8, 6, 4), margin=0)
    assert np.array_equal(alone.array, one.array) and of_alone.array.sum() == 1
    diagonal, _ = insert_lesion(one, np.ones((1, 1, 1)), (5, 5, 4), 5)  # touches by a corner: one lesion
    assert np.array_equal(remove_lesion(diagonal, 5, 2, position=(5, 5, 4))[0].array, mask.array)


def test_what_changes_nothing_is_named():
    mask = organ()
    for arguments, message in (
        (((5, 4, 30), 5), "changes no voxel .* it lies outside"),
        (((5, 4, 3), 2), "or on voxels that are 2 already; move it"),
        (((5, 4, 7), 5), "changes no voxel"),
    ):
        with pytest.raises(ValueError, match=message):
            insert_lesion(mask, np.ones((1, 1, 1)), *arguments)
    with pytest.raises(ValueError, match=r"none of them is of the labels \[0\]; move it"):
        insert_lesion(mask, np.ones((1, 1, 1)), (5, 4, 3), 5, within=[0])
    with pytest.raises(ValueError, match=r"no voxel changes from 5 to 2: the mask holds \[-1, 0, 2\]"):
        remove_lesion(mask, 5, 2)
    with pytest.raises(ValueError, match=r"the voxel \(0, 0, 0\) is 0, not of label 2"):
        remove_lesion(mask, 2, 0, position=(0, 0, 0))
    with pytest.raises(ValueError, match="outside the mask, not of label 2"):
        remove_lesion(mask, 2, 0, position=(99, 0, 0))
    with pytest.raises(ValueError, match="one label map of integers, got float32"):
        remove_lesion(Volume(mask.array.astype(np.float32), AFFINE), 2, 0)
    with pytest.raises(ValueError, match="margin is a length in mm, 0 or more, got -1"):
        grown(mask.array[0] > 0, -1, mask.spacing)


def test_mask_and_region_go_into_the_pipeline_as_they_are():
    scale = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [5.0, 95.0]}
    pipe, mask = tiny_pipeline(intensity=[scale]), Volume(organ().array, np.eye(4))
    image = Volume(np.random.default_rng(0).uniform(100, 300, (1, 12, 10, 8)).astype(np.float32), np.eye(4))
    edited, region = insert_lesion(mask, ellipsoid(3, (1, 1, 1)), (5, 4, 3), 5, margin=1)
    settings = {"num_inference_steps": 2, "generator": seeded(0), "output_type": "np"}
    made = editor_of(pipe)(mask=edited, image=image, region=region, **settings).volumes[0]
    changed = made != image.array
    assert changed.any() and not changed[region.array == 0].any()

"""Resampling: functions of the place in the patient are reproduced at that place, on any grid."""

import numpy as np
import pytest
import torch

from volumes import Volume, resample, resample_to
from volumes.resampling import _smooth


def affine_of(spacing, angle=0.0, origin=(5.0, -7.0, 11.0)):
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = origin
    return affine


def positions(shape, affine):
    """(X, Y, Z, 3) places of the voxels in mm."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ramp(shape, affine):
    """A volume whose value is linear in the place: linear interpolation knows it exactly."""
    return Volume((positions(shape, affine) @ [1.0, -2.0, 3.0] + 10).astype(np.float32)[None], affine)


@pytest.mark.parametrize("spacing", [(0.7, 0.9, 1.1), (2.0, 2.0, 2.0), (1.0, 5.0, 3.0), (3.1, 0.5, 2.9)])
def test_a_linear_function_is_reproduced(spacing):
    volume = ramp((24, 30, 26), affine_of((1.0, 1.5, 2.0), angle=0.3))
    result = resample(volume, spacing)
    np.testing.assert_allclose(result.spacing, spacing)
    expected = positions(result.shape, result.affine) @ [1.0, -2.0, 3.0] + 10
    # away from the border, where the edge is repeated and the blur of coarser grids reaches beyond it
    edge = tuple(slice(2, -2) if n > 6 else slice(1, -1) for n in result.shape)
    np.testing.assert_allclose(result.array[0][edge], expected[edge], rtol=0, atol=0.05)


def test_extent_and_center_are_kept():
    volume = ramp((24, 30, 26), affine_of((1.0, 1.5, 2.0), angle=0.3))
    result = resample(volume, (2.0, 3.0, 1.0))
    assert result.shape == (12, 15, 52)
    center = [*(np.array(volume.shape) - 1) / 2, 1], [*(np.array(result.shape) - 1) / 2, 1]
    np.testing.assert_allclose(volume.affine @ center[0], result.affine @ center[1], atol=1e-9)


def test_the_extent_is_kept_to_the_nearest_voxel():
    """10 mm are 7.7 voxels of 1.3 mm, so 8; spacings that differ by 5 % are two."""
    volume = ramp((10, 20, 10), np.eye(4))
    assert resample(volume, (1.3, 1.05, 4.5)).shape == (8, 19, 2)
    assert resample(volume, (1.0, 1.05, 1.0)).shape == (10, 19, 10)


def test_the_same_spacing_changes_nothing():
    volume = ramp((6, 7, 8), affine_of((1.0, 1.5, 2.0)))
    assert resample(volume, volume.spacing) is volume
    again = resample_to(volume, volume.shape, volume.affine)
    np.testing.assert_allclose(again.array, volume.array, atol=1e-4)


def test_a_rotated_grid_finds_the_same_places():
    volume = ramp((30, 30, 20), affine_of((1.0, 1.0, 1.0), origin=(0, 0, 0)))
    affine = affine_of((0.8, 0.8, 0.8), angle=0.4, origin=(12, 8, 3))
    result = resample_to(volume, (10, 12, 14), affine)
    np.testing.assert_allclose(result.array[0], positions((10, 12, 14), affine) @ [1.0, -2.0, 3.0] + 10, atol=2e-3)


def test_outside_the_field_of_view_is_filled():
    volume = Volume(np.full((1, 4, 4, 4), 7, np.float32), np.eye(4))
    wider = np.eye(4)
    wider[:3, 3] = -2
    result = resample_to(volume, (8, 8, 8), wider, fill=-3)
    expected = np.full((8, 8, 8), -3.0)
    expected[2:6, 2:6, 2:6] = 7
    np.testing.assert_array_equal(result.array[0], expected)
    labels = Volume(np.full((1, 4, 4, 4), 2, np.int16), np.eye(4))
    np.testing.assert_array_equal(resample_to(labels, (8, 8, 8), wider, nearest=True).array[0] == 2, expected == 7)


def test_a_volume_has_its_own_values_up_to_its_outer_faces():
    """A voxel reaches half its side beyond its center: there is nothing of the fill, beyond is the fill alone."""
    volume = Volume(np.full((1, 4, 5, 6), 7, np.float32), np.eye(4))
    for reach, expected in ((0.4, 7), (0.6, -3)):
        for axis, last in enumerate((3, 4, 5)):
            for place in (-reach, last + reach):
                affine = np.eye(4)
                affine[:3, 3] = 1
                affine[axis, 3] = place
                assert resample_to(volume, (1, 1, 1), affine, fill=-3).array.item() == pytest.approx(expected)


def test_outside_is_the_lowest_value_or_label_0():
    """The lowest value outside an image, label 0 outside a mask."""
    far = np.eye(4)
    far[:3, 3] = 50
    image = Volume(np.array([60.0, 50.0, 80.0], np.float32).reshape(1, 3, 1, 1), np.eye(4))
    assert resample_to(image, (2, 2, 2), far).array.tolist() == np.full((1, 2, 2, 2), 50).tolist()
    mask = Volume(np.array([3, 4, 5], np.int16).reshape(1, 3, 1, 1), np.eye(4))
    assert not resample_to(mask, (2, 2, 2), far, nearest=True).array.any()


def test_integers_are_rounded_to_the_nearest():
    """Values 0, 3, 6, ... 0.6 voxels on: 1.8, 4.8, ... become 2, 5, ..."""
    volume = Volume((3 * np.arange(6, dtype=np.int16)).reshape(1, 6, 1, 1), np.eye(4))
    affine = np.eye(4)
    affine[0, 3] = 0.6
    result = resample_to(volume, (5, 1, 1), affine)
    assert result.array.dtype == np.int16 and result.array.ravel().tolist() == [2, 5, 8, 11, 14]


def test_labels_stay_labels_and_keep_their_size():
    place = positions((40, 40, 40), affine_of((1.0, 1.0, 1.0), origin=(-19.5, -19.5, -19.5)))
    ball = (np.linalg.norm(place, axis=-1) < 12).astype(np.int16) * 5
    mask = Volume(ball[None], affine_of((1.0, 1.0, 1.0), origin=(-19.5, -19.5, -19.5)))
    result = resample(mask, (1.5, 0.8, 2.0), nearest=True)
    assert result.array.dtype == np.int16
    assert set(np.unique(result.array)) == {0, 5}
    volume_mm3 = (result.array == 5).sum() * np.prod(result.spacing)
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.02)


def test_nothing_aliases_on_a_coarser_grid():
    """Stripes of one voxel average out on a grid three times coarser; picked voxels would keep their full swing."""
    stripes = np.broadcast_to(np.arange(60)[:, None, None] % 2, (60, 6, 6)).astype(np.float32)
    result = resample(Volume(stripes[None], np.eye(4)), (3.0, 1.0, 1.0))
    assert np.abs(result.array[0, 2:-2] - 0.5).max() < 0.05


def test_the_blur_is_along_the_old_axes_that_become_coarser():
    """The new grid is turned by 90 degrees: its X runs along the old Y, in steps of three old voxels."""
    stripes = np.broadcast_to(np.arange(60)[None, :, None] % 2, (6, 60, 6)).astype(np.float32)
    turned = np.array([[0.0, 1, 0, 0], [3, 0, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1]])
    result = resample_to(Volume(stripes[None], np.eye(4)), (20, 6, 6), turned)
    assert np.abs(result.array[0, 2:-2] - 0.5).max() < 0.05


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_the_blur_has_the_width_between_the_two_voxel_sizes(factor):
    """Squares of full widths at half maximum add up, so its variance is (factor^2 - 1) / (8 ln 2) old voxels
    squared."""
    point = torch.zeros(1, 41, 3, 3)
    point[0, 20] = 1
    line = _smooth(point, np.array([factor, 1.0, 1.0]))[0, :, 1, 1].double()
    assert line.sum().item() == pytest.approx(1)
    variance = (line * (torch.arange(41) - 20) ** 2).sum().item()
    assert variance == pytest.approx((factor**2 - 1) / (8 * np.log(2)), rel=0.03)


def test_large_volumes_go_through_in_slabs(monkeypatch):
    volume = ramp((9, 8, 7), np.eye(4))
    whole = resample(volume, (0.6, 0.7, 0.8))
    monkeypatch.setattr("volumes.resampling.SLAB_VOXELS", 1)
    np.testing.assert_array_equal(resample(volume, (0.6, 0.7, 0.8)).array, whole.array)


def test_impossible_spacings_are_refused():
    with pytest.raises(ValueError, match="three positive lengths"):
        resample(ramp((4, 4, 4), np.eye(4)), (1.0, 0.0, 1.0))

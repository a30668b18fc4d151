"""The slices figure shows the planes through the mask, upright and in proportion."""

import numpy as np
import pytest
import torch

from volumes import shapes_figure, slices_figure


def test_planes_through_the_mask_in_proportion():
    image = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    mask = np.zeros((6, 8, 10), np.int16)
    mask[3:6, 2:5, 7:10] = 2  # centre (4, 3, 8)
    column = {"title": "case", "images": {"real": image}, "mask": mask, "spacing": torch.tensor([1.0, 2.0, 4.0])}
    figure = slices_figure([column, {**column, "images": {"real": torch.from_numpy(image)[None]}, "mask": None}])
    axes = np.array(figure.axes).reshape(6, 2)
    assert axes[0, 0].get_title() == "case"
    expected = [image[:, :, 8].T, image[:, 3].T, image[4].T]
    aspects = [2.0, 4.0, 2.0]  # height of a voxel over its width: y/x, z/x, z/y
    for panel, plane, aspect in zip(axes[3:, 0], expected, aspects, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), plane)
        assert panel.images[0].origin == "lower" and panel.get_aspect() == aspect
        assert len(panel.collections) == 1  # the outline of the one label
    np.testing.assert_array_equal(axes[0, 0].images[0].get_array(), mask[:, :, 8].T)
    # without a mask: through the middle, no outline, no mask row
    np.testing.assert_array_equal(axes[3, 1].images[0].get_array(), image[:, :, 5].T)
    assert not axes[3, 1].collections and not axes[0, 1].images


def test_one_grey_scale_for_a_column():
    image = np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    figure = slices_figure([{"title": "", "images": {"real": image, "made": image * 3}}])
    limits = {panel.images[0].get_clim() for panel in figure.axes}
    assert len(limits) == 1
    assert next(iter(limits)) == pytest.approx((-0.99, 0.99), abs=1e-5)


def test_an_image_may_have_its_own_window():
    image = np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    column = {"images": {"ct": image, "pet": image}, "windows": {"pet": (0, 5)}}
    limits = [panel.images[0].get_clim() for panel in slices_figure([column]).axes]
    assert limits[:3] == [pytest.approx((-0.99, 0.99), abs=1e-5)] * 3 and limits[3:] == [(0, 5)] * 3


def test_shapes_are_seen_from_the_front_and_lit_from_above():
    ball = sum((np.arange(24).reshape(shape) - 11.5) ** 2 for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1))) < 64
    hollow = ball.copy()
    hollow[:, :12] = False  # its back half is gone: from the front nothing changes but the rim
    figure = shapes_figure({"balls": [ball, torch.from_numpy(hollow)[None]], "one": [ball]})
    seen, without_back = (panel.images[0].get_array().T for panel in figure.axes[:2])
    assert (seen > 0).sum() == ball.any(axis=1).sum() and not figure.axes[3].images
    assert seen[11, 17] > seen[11, 6] + 0.2 and seen[6, 14] > seen[17, 14]  # above and left are bright
    np.testing.assert_array_equal(seen[8:16, 8:16], without_back[8:16, 8:16])


def test_nothing_to_show():
    with pytest.raises(ValueError, match="at least one shape"):
        shapes_figure({"empty": []})
    with pytest.raises(ValueError, match="at least one column"):
        slices_figure([])
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 4, 4\)"):
        slices_figure([{"title": "", "images": {"real": np.zeros((2, 4, 4, 4))}}])

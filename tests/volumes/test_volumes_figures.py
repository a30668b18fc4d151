"""The slices figure shows the planes through the mask, upright and in proportion."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from volumes import shapes_figure, slices_figure
from volumes.figures import LABEL_COLORS


def grid_of(figure, rows):
    """Panels (rows, columns)."""
    return np.array(figure.axes).reshape(rows, -1)


def test_planes_through_the_mask_in_proportion():
    """A row a case; axial, coronal and sagittal, the mask beside the images in each."""
    image = np.random.default_rng(0).normal(size=(6, 8, 10)).astype(np.float32)
    mask = np.zeros((6, 8, 10), np.int16)
    mask[3:6, 2:5, 7:10] = 2  # center (4, 3, 8)
    case = {"title": "case", "images": {"real": image}, "mask": mask, "spacing": torch.tensor([1.0, 2.0, 4.0])}
    figure = slices_figure([case, {**case, "images": {"real": torch.from_numpy(image)[None]}, "mask": None}])
    axes = grid_of(figure, 2)
    assert [panel.get_title().split() for panel in axes[0]] == [
        ["axial", "mask"], ["real"], ["coronal", "mask"], ["real"], ["sagittal", "mask"], ["real"],
    ]  # fmt: skip
    assert axes[0, 0].get_ylabel().startswith("case\n")
    expected = [image[:, :, 8].T, image[:, 3].T, image[4].T]
    aspects = [2.0, 4.0, 2.0]  # height of a voxel over its width: y/x, z/x, z/y
    for panel, plane, aspect in zip(axes[0, 1::2], expected, aspects, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), plane)
        assert panel.images[0].origin == "lower" and panel.get_aspect() == aspect
        assert len(panel.collections) == 1  # the outline of the one label, in its color
        assert to_hex(panel.collections[0].get_edgecolor()[0]) == LABEL_COLORS[2]
        assert panel.get_xlim() == (-0.5, plane.shape[1] - 0.5)  # which widens nothing
    np.testing.assert_array_equal(axes[0, 0].images[0].get_array(), mask[:, :, 8].T)
    # without a mask: through the middle, no outline, no picture of a mask
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), image[:, :, 5].T)
    assert not axes[1, 1].collections and not axes[1, 0].images


def test_every_channel_has_a_row_and_its_window_in_its_units():
    images = np.stack([np.full((4, 4, 4), 40.0), np.linspace(0, 20, 64).reshape(4, 4, 4)])
    case = {"title": "a", "images": {"real": images, "made": images / 2}, "channels": ["CT", "PET"]}
    axes = grid_of(slices_figure([{**case, "windows": {"CT": (-1000, 1000), "PET": (0, 20)}}, case]), 4)
    assert [panel.get_ylabel() for panel in axes[:2, 0]] == ["a\nCT\n-1000 to 1000", "a\nPET\n0 to 20"]
    assert {panel.images[0].get_clim() for panel in axes[0]} == {(-1000, 1000)}
    assert {panel.images[0].get_clim() for panel in axes[1]} == {(0, 20)}
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), images[1, :, :, 2].T / 2)
    assert axes[3, 0].images[0].get_clim() == pytest.approx(tuple(np.percentile(images[1], [0.5, 99.5])))


@pytest.mark.parametrize(("axes", "letters", "said"), [
    (("R", "A", "S"), ["L", "R", "L", "R", "P", "A"], "right is on the right (neurological"),
    (("L", "P", "S"), ["R", "L", "R", "L", "A", "P"], "left is on the right (radiological"),
])  # fmt: skip
def test_the_sides_of_the_patient_are_marked(axes, letters, said):
    figure = slices_figure([{"images": {"real": np.zeros((4, 4, 4))}, "axes": axes}])
    assert [text.get_text() for panel in figure.axes for text in panel.texts] == letters
    assert [text.get_position()[0] for panel in figure.axes for text in panel.texts] == [0.02, 0.98] * 3
    assert said in " ".join(figure.get_supxlabel().split())


def test_panels_are_in_millimeters_and_long_ones_stay_readable():
    """64 x 32 voxels of 2 mm beside 20 of 8 mm; a body 30 times as long as wide."""
    figure = slices_figure([{"images": {"real": np.zeros((64, 32, 20))}, "spacing": (2, 2, 8)}])
    grid = figure.axes[0].get_gridspec()
    assert list(grid.get_width_ratios()) == [128, 128, 64] and list(grid.get_height_ratios()) == [160]
    for shape in ((16, 16, 480), (16, 16, 1600)):
        figure = slices_figure([{"images": {"real": np.zeros(shape)}}] * 4)
        width, height = figure.get_size_inches()
        assert 1 < width < 26 and height < 26


def test_label_maps_are_drawn_as_such():
    labels = np.zeros((4, 4, 4), np.int16)
    labels[1:3] = 2
    figure = slices_figure([{"title": "a", "images": {"real": labels}, "labels": True}])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), labels[:, :, 2].T)
    assert figure.axes[0].images[0].get_clim() == (0, 8) and figure.axes[0].get_ylabel() == "a"


def test_one_gray_scale_for_a_row():
    image = np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    figure = slices_figure([{"title": "", "images": {"real": image, "made": image * 3}}])
    limits = {panel.images[0].get_clim() for panel in figure.axes}
    assert len(limits) == 1
    assert next(iter(limits)) == pytest.approx((-0.99, 0.99), abs=1e-5)


def test_an_image_may_have_its_own_window():
    image = np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    column = {"images": {"ct": image, "pet": image}, "windows": {"pet": (0, 5)}}
    limits = [panel.images[0].get_clim() for panel in slices_figure([column]).axes]
    assert limits[::2] == [pytest.approx((-0.99, 0.99), abs=1e-5)] * 3 and limits[1::2] == [(0, 5)] * 3


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
    with pytest.raises(ValueError, match="at least one case"):
        slices_figure([])
    with pytest.raises(ValueError, match=r"got shape \(2, 2, 4, 4, 4\)"):
        slices_figure([{"title": "", "images": {"real": np.zeros((2, 2, 4, 4, 4))}}])
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 4, 4\)"):
        shapes_figure({"two": [np.zeros((2, 4, 4, 4))]})

"""The contact sheet: planes through the largest label, marked and in the units of the files, a column per case."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from volumes.contact_sheet import central_voxel, contact_sheet
from volumes.figures import LABEL_COLORS


def case(name="a", shape=(6, 8, 10), **changes):
    image = np.random.default_rng(0).normal(size=shape)
    mask = np.zeros(shape, np.int16)
    mask[4, 2, 3] = 1
    mask[1:4, 3:6, 6:9] = 2  # the largest: center (2, 4, 7)
    return {"title": name, "images": {"generated": image}, "mask": mask, "spacing": (1, 2, 3), **changes}


def texts(figure):
    return [text.get_text() for text in figure.texts]


def panels(figure):
    """Panels by row and column of the page: sorted from the top, then from the left."""
    rows: dict[int, list] = {}
    for panel in figure.axes:
        rows.setdefault(round(1000 * panel.get_position().y1), []).append(panel)
    return [sorted(row, key=lambda panel: panel.get_position().x0) for _, row in sorted(rows.items(), reverse=True)]


def test_planes_go_through_the_center_of_the_largest_label():
    one = case()
    figure = contact_sheet([one, case("b")], {1: "tumor", 2: "liver"})
    rows, image = panels(figure), one["images"]["generated"]
    assert [len(row) for row in rows] == [2] * 6
    planes = [image[:, :, 7].T, image[:, 4].T, image[2].T]
    for number, plane in enumerate(planes):
        outlined, alone = rows[2 * number][0], rows[2 * number + 1][0]
        for panel in (outlined, alone):
            np.testing.assert_array_equal(panel.images[0].get_array(), plane)
        assert [to_hex(one.get_edgecolor()[0]) for one in outlined.collections] == [LABEL_COLORS[2]]
        assert not alone.collections
    assert "a" in texts(figure) and "b" in texts(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 tumor", "2 liver"]
    assert [text.get_text() for text in rows[0][0].texts] == ["L", "R"]
    assert [text.get_text() for text in rows[4][0].texts] == ["P", "A"]


def test_all_panels_have_one_scale_and_voxels_their_proportions():
    figure = contact_sheet([case(), case("b", (5, 8, 10))])
    rows = panels(figure)
    width, height = figure.get_size_inches()
    sizes = [[(box.width * width, box.height * height) for box in (p.get_position() for p in row)] for row in rows]
    (wide, tall), (narrow, _) = sizes[0]
    assert wide / narrow == pytest.approx(6 / 5) and tall / wide == pytest.approx(16 / 6)  # 6 x 16 mm, and 5 mm wide
    assert sizes[2][0][1] / wide == pytest.approx(30 / 6)  # 30 mm up
    assert rows[0][0].get_aspect() == 2


def test_a_block_of_rows_per_channel_with_its_window():
    images = {"generated": np.stack([np.full((4, 4, 4), 40.0), np.linspace(0, 20, 64).reshape(4, 4, 4)])}
    windows = {"CT": (-1000, 1000), "PET": (0, 20)}
    two = {"images": images, "channels": ["CT", "PET"], "windows": windows}
    figure = contact_sheet([{"title": "a", **two}])
    assert [len(row) for row in panels(figure)] == [1] * 6
    shown = texts(figure)
    assert "CT\n-1000 to 1000\naxial" in shown and "PET\n0 to 20\naxial" in shown and "coronal" in shown
    assert panels(figure)[0][0].images[0].get_clim() == (-1000, 1000)
    assert panels(figure)[3][0].images[0].get_clim() == (0, 20)
    # windows that differ stand below the columns
    figure = contact_sheet([{"title": "a", **two}, {"title": "b", **two, "windows": {"CT": (0, 80), "PET": (0, 20)}}])
    shown = texts(figure)
    assert {"CT\naxial", "a\nCT -1000 to 1000", "b\nCT 0 to 80", "PET\n0 to 20\naxial"} <= set(shown)


def test_a_channel_that_a_case_lacks_is_left_blank():
    one = {"title": "a", "images": {"generated": np.zeros((1, 4, 4, 4))}, "channels": ["PET"]}
    both = {"title": "b", "images": {"generated": np.zeros((2, 4, 4, 4))}, "channels": ["PET", "CT"]}
    assert [len(row) for row in panels(contact_sheet([one, both]))] == [2, 2, 2, 1, 1, 1]


def test_an_edit_shows_before_after_and_the_region():
    region = np.zeros((6, 8, 10), bool)
    region[0:2, 0:2, 0:2] = True
    images = {"before": np.zeros((6, 8, 10)), "edited": np.random.default_rng(0).normal(size=(6, 8, 10))}
    figure = contact_sheet([case(images=images, region=region)])
    rows = panels(figure)
    assert len(rows) == 9  # outlines, before, edited
    cut = central_voxel(region)[2]
    np.testing.assert_array_equal(rows[0][0].images[0].get_array(), images["edited"][:, :, cut].T)
    assert [to_hex(one.get_edgecolor()[0]) for one in rows[0][0].collections] == ["#ffffff"]
    assert "White: the region that was generated." in " ".join(" ".join(texts(figure)).split())


def test_label_maps_are_colored_and_seen_from_the_front():
    labels = np.zeros((4, 5, 6), np.int16)
    labels[1:3, 2, 3] = 2
    figure = contact_sheet([{"title": "a", "images": {"labels": labels}, "labels": True}])
    rows = panels(figure)
    assert len(rows) == 4 and "from the front" in texts(figure)
    np.testing.assert_array_equal(rows[0][0].images[0].get_array(), labels[:, :, 3].T)
    assert (rows[3][0].images[0].get_array() > 0).sum() == 2


def test_the_central_voxel_is_one_of_the_label():
    ring = np.zeros((7, 7, 1), int)
    ring[1:6, 1:6] = 3
    ring[2:5, 2:5] = 0
    assert ring[central_voxel(ring)] == 3
    assert central_voxel(np.zeros((2, 2, 2), int)) is None
    with pytest.raises(ValueError, match="at least one case"):
        contact_sheet([])


def test_cases_are_taken_one_after_the_other():
    """Only slices are held: a case's voxels are gone before the next case is asked for."""
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def cases():
        for number in range(3):
            gc.collect()
            assert not any(one() is not None for one in alive)
            image = np.zeros((4, 4, 4)) + number
            alive.append(weakref.ref(image))
            yield {"title": str(number), "images": {"generated": image}}
            del image

    contact_sheet(cases())

"""The measure of how an edit shows at its border."""

import json

import numpy as np
import pytest

from evaluation.studies.edit_borders import (
    border_jump,
    box_region,
    face_differences,
    labeled_region,
    main,
)
from volumes import Volume


def inner() -> np.ndarray:
    region = np.zeros((16, 16, 16), bool)
    region[5:11, 4:12, 6:10] = True
    return region


def test_differences_are_those_across_the_faces_of_the_border():
    region = inner()
    volume = np.where(region, 3.0, 0.0)
    across = face_differences(volume, region)
    assert across.size == 2 * (8 * 4 + 6 * 4 + 6 * 8) and (across == 3).all()
    for steps in (-2, -1, 1):
        beside = face_differences(volume, region, steps)
        assert beside.size == across.size and not beside.any(), steps
    at_the_side = np.zeros((8, 8, 8), bool)
    at_the_side[:4] = True
    assert face_differences(np.zeros((8, 8, 8)), at_the_side).size == 64  # the volume's edge is not a border
    ramp = np.broadcast_to(np.arange(8.0)[:, None, None] ** 2, (8, 8, 8))
    assert set(face_differences(ramp, at_the_side)) == {7.0}  # 16 - 9
    assert set(face_differences(ramp, at_the_side, 1)) == {5.0} and set(face_differences(ramp, at_the_side, -1)) == {
        9.0
    }


def test_an_untouched_volume_has_no_border_and_an_edited_has():
    region, random = inner(), np.random.default_rng(0)
    volume = random.standard_normal((16, 16, 16))
    assert border_jump(volume, region) == pytest.approx(1, abs=0.15)
    assert border_jump(volume + 5 * region, region) > 3
    assert border_jump(2 * volume + 7, region) == pytest.approx(border_jump(volume, region))
    with pytest.raises(ValueError, match="the region has no border, or the volume is constant"):
        border_jump(volume, np.ones_like(region))


def test_regions_lie_inside():
    mask = Volume(np.zeros((1, 12, 16, 9), np.int16), np.diag([1.0, 1, 3, 1]))
    mask.array[0, 6, 8, 4] = 2
    box = box_region(mask)
    assert box.sum() == 6 * 8 * 4 and box[3:9, 4:12, 2:6].all()
    labeled = labeled_region(mask)
    assert labeled[6, 8, [3, 5]].all() and labeled[[3, 9], 8, 4].all() and not labeled[[2, 10], 8, 4].any()


def test_data_without_files_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  phantom: {count: 4, shape: [16, 16, 16]}\n")
    with pytest.raises(ValueError, match="no case of split 'test' has files of image and mask"):
        main(["--config", str(tmp_path / "c.yaml"), "--pipeline", "none", "--output", str(tmp_path / "r.json")])


def test_the_command_measures_shipped_weights_on_a_real_volume(hippocampus, tmp_path, monkeypatch):
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    arguments = ["--config", "configs/hippocampus/ldm.yaml", "--pipeline", "weights/hippocampus", "--count", "1"]
    output = tmp_path / "report.json"
    main([*arguments, "--data.root", str(hippocampus), "--regions", "box", "--steps", "2", "--output", str(output)])
    box = json.loads(output.read_text())["regions"]["box"]
    assert box["volumes"] == 1 and box["changed_outside"] == 0 and box["changed_inside"] > 0.9
    assert 0.8 < box["jump"]["mean"] < 1.2

"""The benchmark of small lesions: what it counts for each lesion, and the page that holds its figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.learning import lesions_page, small_lesions
from volumes.phantom import LESION


class Rounded(nn.Module):
    """A segmenter that sees label n where the image is n / 4."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, image):
        return -(image * self.scale - torch.arange(4.0).view(1, 4, 1, 1, 1)).abs()


def planted() -> small_lesions.Phantoms:
    """Two volumes of organ, with lesions of two and of three voxels in the first and of two in the second."""
    labels = torch.full((2, 16, 16, 16), 2)
    labels[0, 3, 3, 3:5] = labels[0, 10, 10, 3:6] = labels[1, 3, 3, 3:5] = LESION
    return {"images": labels[:, None] / 4.0, "labels": labels, "classes": ["bright lesion", "dark lesion"]}


def test_each_lesion_counts_by_itself():
    """One voxel of the lesion of three is missed, one beside the last lesion is seen; far ones do not count."""
    real = planted()
    images = real["images"].clone()
    images[0, 0, 10, 10, 5] = 0.5
    images[1, 0, 3, 3, 5] = images[1, 0, 12, 12, 12] = 0.75
    found = small_lesions.measure(Rounded(), images, real)
    assert found["by_voxels"]["2"]["lesions"] == 2 and found["by_voxels"]["3"]["lesions"] == 1
    assert found["by_voxels"]["2"]["dice"] == pytest.approx((1 + 4 / 5) / 2)
    assert found["by_voxels"]["3"]["dice"] == pytest.approx(4 / 5)
    assert found["dice"] == pytest.approx((1 + 4 / 5 + 4 / 5) / 3)
    assert found["kinds"] == {"bright lesion": pytest.approx(9 / 10), "dark lesion": pytest.approx(4 / 5)}
    assert found["by_voxels"]["3"]["contrast"] == pytest.approx(2 / 3)
    whole = small_lesions.measure(Rounded(), real["images"], real)
    assert whole["dice"] == 1 and whole["contrast"] == pytest.approx(1) and whole["labels"]["lesion"] == 1
    known = np.zeros((16, 16, 16), bool)
    known[:8] = True
    assert small_lesions.measure(Rounded(), images, real, known)["by_voxels"].keys() == {"2"}


def test_phantoms_have_a_lesion_of_the_sizes():
    drawn = small_lesions.phantoms(0, 8)
    sizes = [int(voxels.sum()) for labels in drawn["labels"].numpy() for voxels, _ in small_lesions.lesions(labels)]
    assert len(sizes) == 8 and min(sizes) >= 2 and max(sizes) <= 6


def test_the_page_holds_the_report():
    """Else run python -m benchmarks.learning.lesions_page docs/small_lesions.json --page docs/small_structures.md."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    report = docs / "small_lesions.json"
    missing = "\nThe benchmark has not been run to its end yet, so there are no figures here.\n"
    expected = f"\n{lesions_page.page_text(json.loads(report.read_text()))}" if report.exists() else missing
    text = (docs / "small_structures.md").read_text()
    assert text.partition(lesions_page.BEGIN)[2].partition(lesions_page.END)[0] == expected


def test_the_page_shows_each_set_beside_real_phantoms(tmp_path):
    """Half a mask has no Dice of whole volumes, and not all sizes."""
    real = small_lesions.measure(Rounded(), planted()["images"], planted())
    worse = {**real, "dice": 0.9, "contrast": 0.5, "labels": {}, "by_voxels": {"2": real["by_voxels"]["2"]}}
    machine, steps = {"processor": "a CPU"}, {"autoencoder": 10, "diffusion": 20}
    report = {"real": {"real": real}, "generated": {"plain": worse}, "steps": steps, "test_phantoms": 2}
    report |= {"machine": machine, "command": "a command", "date": "2026-01-02T03", "commit": None, "versions": {}}
    report |= {"loss_weights": {}, "side": 16, "load": 1.0}
    (tmp_path / "r.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{lesions_page.BEGIN}\nold\n{lesions_page.END}\nafter\n")
    lesions_page.main([str(tmp_path / "r.json"), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "\nold" not in text
    assert "| real phantoms | 1.000 | 0.000 | 1.00 | 1.000 | 1.000 | 1.000 |" in text
    assert "| generated volumes: plain | 0.900 | 0.100 | 0.50 | 1.000 | - | - |" in text
    assert "2 of 2, 1 of 3 voxels" in text and "a CPU (2026-01-02" in text

"""`out.show()`: what reaches NiiVue is the volume, voxel for voxel, on its grid."""

import sys

import nibabel as nib
import numpy as np
import pytest

from pipelines import MedVolumePipelineOutput
from pipelines.storage.notebook import layers, nifti_bytes

OBLIQUE = np.array([[0.0, -1.2, 0.1, 5.0], [-0.9, 0.0, 0.0, 7.0], [0.0, 0.1, 2.5, -3.0], [0.0, 0.0, 0.0, 1.0]])


def image(seed=0):
    array = np.random.default_rng(seed).normal(size=(4, 5, 6)).astype(np.float32)
    return nib.Nifti1Image(array, OBLIQUE)


def output(*volumes):
    return MedVolumePipelineOutput(volumes=list(volumes), provenance=[{}] * len(volumes))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_viewer_gets_the_same_voxels(tmp_path, suffix):
    volume = image()
    nib.save(volume, tmp_path / f"a{suffix}")
    for shown in (volume, tmp_path / f"a{suffix}"):
        back = nib.Nifti1Image.from_bytes(nifti_bytes(shown))
        assert np.array_equal(back.get_fdata(), volume.get_fdata())
        assert np.allclose(back.affine, OBLIQUE, atol=1e-6)


def test_a_mask_lies_over_the_volume():
    below, above = layers({"ct": image(0), "pet": image(1)}), layers(image(0), image(2))
    assert [one["name"] for one in below] == ["ct.nii", "pet.nii"]
    assert above[-1]["name"] == "mask.nii" and 0 < above[-1]["opacity"] < 1 and "opacity" not in above[0]
    assert np.array_equal(nib.Nifti1Image.from_bytes(above[-1]["data"]).get_fdata(), image(2).get_fdata())


def test_what_cannot_be_shown_is_named(tmp_path):
    for volume, message in ((np.zeros((1, 2, 2, 2)), "got ndarray"), (None, "got NoneType"), ("a.png", "a.png")):
        with pytest.raises(ValueError, match=message):
            output(volume).show()
    (tmp_path / "cut.nii").write_bytes(image().to_bytes()[:400])
    for mask, message in ((tmp_path / "nowhere.nii.gz", "no such file"), (tmp_path / "cut.nii", "cut.nii: its voxels")):
        with pytest.raises(ValueError, match=message):
            output(image()).show(mask=mask)
    with pytest.raises(ValueError, match="no volume 1; the output holds 1"):
        output(image()).show(1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[studio\]' -c constraints.txt"):
        output(image()).show()


def test_the_widget_holds_the_chosen_volume():
    pytest.importorskip("ipyniivue", reason="ipyniivue is not installed (extra studio)")
    widget = output(image(0), image(1)).show(1, mask=image(2), height=300)
    assert widget.height == 300 and [one.name for one in widget.volumes] == ["volume.nii", "mask.nii"]
    shown = nib.Nifti1Image.from_bytes(widget.volumes[0].data)
    assert np.array_equal(shown.get_fdata(), image(1).get_fdata())

"""Volumes of two runs, compared."""

import nibabel as nib
import numpy as np


def voxels(folder):
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def assert_same(folder, other):
    ours, theirs = voxels(folder), voxels(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=0.01, err_msg=name)  # of a range of 200

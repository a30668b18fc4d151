"""Volumes as the page's viewer gets them."""

import nibabel as nib
import numpy as np

from volumes import Volume


def view_bytes(volume: Volume) -> bytes:
    """Return the first channel of a volume as an uncompressed NIfTI file on a straight grid in RAS+ order.

    The grid has the voxel size of the volume, but neither its origin nor its obliqueness.
    The viewer has nothing to permute or to flip then, so that the bytes of a drawing on it mean our own voxels.
    """
    straight = np.diag([*volume.spacing, 1.0])
    return nib.Nifti1Image(np.asarray(volume.array[0], np.float32), straight).to_bytes()

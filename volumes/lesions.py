"""Insert lesions into label maps, and remove them. Each function returns the edited mask and the region to generate
again so that the image matches, for `editor(mask=edited, image=image, region=region)`.

Masks are volumes (1, X, Y, Z) of label values in RAS+ order, as `volumes.read_mask` reads them; positions are voxels of
that grid, counted from 0; lengths are in mm.
"""

from collections.abc import Collection, Sequence

import numpy as np
from scipy import ndimage

from . import PADDING, Volume

# Around what changed: the blending (`pipelines.inputs.inpainting.BLEND_MARGIN_MM`), and what a lesion does to its
# surroundings.
REGION_MARGIN_MM = 6.0


def ellipsoid(diameters: float | Sequence[float], spacing: Sequence[float]) -> np.ndarray:
    """Make a lesion's shape: bool (x, y, z), odd sides, an ellipsoid with these diameters in mm (one number: a ball).

    Raises: ValueError for a diameter that is not positive.
    """
    radii = np.broadcast_to(np.asarray(diameters, float), 3) / 2
    if not (radii > 0).all():
        raise ValueError(f"diameters are lengths in mm above 0, got {diameters}")
    reach = [int(radius / mm) for radius, mm in zip(radii, spacing, strict=True)]
    axes = [np.arange(-n, n + 1) * mm / radius for n, mm, radius in zip(reach, spacing, radii, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 <= 1


def insert_lesion(
    mask: Volume,
    shape: np.ndarray,
    position: Sequence[int],
    label: int,
    *,
    within: Collection[int] | None = None,
    margin: float = REGION_MARGIN_MM,
) -> tuple[Volume, Volume]:
    """Insert a lesion into a mask. Returns the mask with `label` where the lesion is, and the region to generate again.

    Args:
        shape: the lesion's (x, y, z) on the mask's voxels, not 0 inside; its center goes to `position`.
        label: the lesion's label, which the model must know.
        within: labels that the lesion may replace, such as the organ's, so that it stays there; None: all.
        margin: mm by which the region exceeds the voxels that changed.

    Voxels outside the field of view (-1) stay unchanged. Raises: ValueError if no voxel changes.
    """
    values = _values(mask).copy()
    if shape.ndim != 3 or len(position) != 3:
        raise ValueError(f"a lesion's shape is (x, y, z) and its position 3 numbers, got {shape.shape} and {position}")
    voxels = np.argwhere(shape != 0) - np.array(shape.shape) // 2 + np.asarray(position, int)
    inside = ((voxels >= 0) & (voxels < values.shape)).all(axis=1)
    changed = np.zeros(values.shape, bool)
    changed[tuple(voxels[inside].T)] = True
    changed &= (values != label) & (values != PADDING)
    if within is not None:
        changed &= np.isin(values, list(within))
    if not changed.any():
        where = "" if within is None else f", or none of them is of the labels {sorted(within)}"
        raise ValueError(
            f"a lesion of shape {shape.shape} at {tuple(position)} changes no voxel of a mask of {values.shape}: it "
            f"lies outside, or on voxels that are {label} already{where}; move it"
        )
    values[changed] = label
    return mask.replace(values[None]), _region(mask, changed, margin)


def remove_lesion(
    mask: Volume,
    label: int,
    replacement: int,
    *,
    position: Sequence[int] | None = None,
    margin: float = REGION_MARGIN_MM,
) -> tuple[Volume, Volume]:
    """Remove a lesion from a mask. Returns the mask with `replacement` in place of `label`, and the region to generate
    again.

    Args:
        position: a voxel of the lesion that is removed, the connected component (26 neighbors) of `label` that holds
            it; None: all voxels of that label.
        margin: mm by which the region exceeds the voxels that changed.

    Raises: ValueError if the mask has no such label, or another one at `position`.
    """
    values = _values(mask).copy()
    changed = values == label
    if label == replacement or not changed.any():
        raise ValueError(f"no voxel changes from {label} to {replacement}: the mask holds {np.unique(values).tolist()}")
    if position is not None:
        place = tuple(int(n) for n in position)
        within = len(place) == 3 and all(0 <= n < side for n, side in zip(place, values.shape, strict=True))
        if not within or not changed[place]:
            found = values[place] if within else "outside the mask"
            raise ValueError(f"the voxel {place} is {found}, not of label {label}; name a voxel of the lesion")
        components: np.ndarray = ndimage.label(changed, np.ones((3, 3, 3)))[0]  # pyright: ignore[reportIndexIssue]
        changed = components == components[place]
    values[changed] = replacement
    return mask.replace(values[None]), _region(mask, changed, margin)


def grown(inside: np.ndarray, margin: float, spacing: Sequence[float]) -> np.ndarray:
    """Grow a region: bool (X, Y, Z), the voxels whose center is at most `margin` mm from that of one of `inside`."""
    if margin < 0:
        raise ValueError(f"margin is a length in mm, 0 or more, got {margin}")
    return np.asarray(ndimage.distance_transform_edt(~inside, sampling=spacing)) <= margin + 1e-6


def _values(mask: Volume) -> np.ndarray:
    if not isinstance(mask, Volume):
        raise ValueError(f"a mask is a Volume here, got {type(mask).__name__}; give volumes.read_mask(mask)")
    if len(mask.array) != 1 or mask.array.dtype.kind not in "iu":
        raise ValueError(f"a mask is one label map of integers, got {mask.array.dtype} of shape {mask.array.shape}")
    return mask.array[0]


def _region(mask: Volume, changed: np.ndarray, margin: float) -> Volume:
    region = grown(changed, margin, mask.spacing) & (mask.array[0] != PADDING)
    return mask.replace(region[None].astype(np.uint8))

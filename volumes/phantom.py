"""A phantom for tests and for runs without data: nested ellipsoids with a lesion, its mask and its class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .volume import Volume

PHANTOM_LABELS = {0: "background", 1: "body", 2: "organ", 3: "lesion"}
ORGAN, LESION = 2, 3
PHANTOM_CLASSES = ("dark lesion", "bright lesion")
INTENSITY = {"background": 0.0, "body": 400.0, "organ": 700.0}
APART = 3  # voxels between small lesions, at least
ATTEMPTS = 50  # at a place for each small lesion
LESION_INTENSITY = (150.0, 1000.0)  # by class


def make_phantom(
    seed: int,
    shape: tuple[int, int, int] = (32, 32, 32),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    lesion_voxels: tuple[int, int] | None = None,
    lesions: int = 1,
) -> tuple[Volume, Volume, int]:
    """Draw phantom number `seed`.

    Args:
        lesion_voxels: smallest and largest number of voxels of a lesion; None: one lesion, a small ellipsoid.
        lesions: how many of `lesion_voxels` there are, in the organ, apart from each other; fewer where it has no room.
    Returns the image (float32, about 0 to 1,000, with a smooth bias field and noise), its mask (int16,
    `PHANTOM_LABELS`), both (1, X, Y, Z) with the origin at the center, and the class of its lesion (index into
    `PHANTOM_CLASSES`).
    """
    axes = _axes(shape)
    random = np.random.default_rng(seed)
    lesion_class, ellipsoids = _draw_shapes(random)
    mask = np.zeros(shape, dtype=np.int16)
    for label, (center, radii) in ellipsoids.items():
        if label != LESION or lesion_voxels is None:
            mask[_ellipsoid(axes, center, radii)] = label
    if lesion_voxels is not None:
        for voxels in _small_lesions(seed, mask == ORGAN, lesion_voxels, lesions):
            mask[tuple(voxels.T)] = LESION
    image = np.array([*INTENSITY.values(), LESION_INTENSITY[lesion_class]])[mask]
    tilt = random.uniform(-0.1, 0.1, 3)
    position = np.empty((3, *shape))
    for index, axis in enumerate(axes):
        position[index] = axis.reshape([-1 if index == one else 1 for one in range(3)])
    image *= 1 + np.tensordot(tilt, position, axes=1)
    del position
    image += random.normal(0, 20, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Volume(image.astype(np.float32)[None], affine), Volume(mask[None], affine), lesion_class


def phantom_lesion(
    seed: int, shape: tuple[int, int, int], lesion_voxels: tuple[int, int] | None = None, lesions: int = 1
) -> tuple[int, int]:
    """Return the class of the lesions of phantom number `seed`, and their voxels, without drawing the phantom."""
    lesion_class, ellipsoids = _draw_shapes(np.random.default_rng(seed))
    if lesion_voxels is not None:
        organ = _ellipsoid(_axes(shape), *ellipsoids[ORGAN])
        return lesion_class, sum(len(one) for one in _small_lesions(seed, organ, lesion_voxels, lesions))
    center, radii = ellipsoids[LESION]
    near = [
        axis[abs(axis - middle) <= 1.01 * radius]
        for axis, middle, radius in zip(_axes(shape), center, radii, strict=True)
    ]
    return lesion_class, int(_ellipsoid(near, center, radii).sum())


def _small_lesions(seed: int, organ: np.ndarray, voxels: tuple[int, int], count: int) -> list[np.ndarray]:
    """Return the voxels (n, 3) of up to `count` compact lesions that are surrounded by the organ, bool (X, Y, Z): of
    each the n voxels that are nearest to a random point, with n from `voxels`."""
    random = np.random.default_rng((seed, LESION))  # of its own: the rest of a phantom stays as it is
    inside = np.argwhere(ndimage.binary_erosion(organ, np.ones((3, 3, 3))))
    found: list[np.ndarray] = []
    for _ in range(count * ATTEMPTS if len(inside) else 0):
        if len(found) == count:
            break
        size = int(random.integers(*voxels, endpoint=True))
        point = inside[random.integers(len(inside))] + random.uniform(-0.5, 0.5, 3)
        lesion = inside[np.argsort(((inside - point) ** 2).sum(1), kind="stable")[:size]]
        if all(np.abs(lesion[:, None] - other).max(-1).min() > APART for other in found):
            found.append(lesion)
    return found


def _axes(shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Return the positions of voxels along each axis, in -1..1."""
    if min(shape) < 8:
        raise ValueError(f"a phantom needs 8 voxels or more on every axis, got {shape}")
    return [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]


def _draw_shapes(random: np.random.Generator) -> tuple[int, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Return the class of the lesion, and center and radii of the ellipsoid of each label; later ones lie on top."""
    body_center = random.uniform(-0.08, 0.08, 3)
    organ_center = body_center + random.uniform(-0.06, 0.06, 3)
    lesion_center = organ_center + random.uniform(-0.06, 0.06, 3)
    lesion_class = int(random.integers(len(PHANTOM_CLASSES)))
    body = body_center, random.uniform(0.75, 0.88, 3)
    organ = organ_center, random.uniform(0.42, 0.56, 3)
    return lesion_class, {1: body, 2: organ, LESION: (lesion_center, random.uniform(0.14, 0.24, 3))}


def _ellipsoid(axes: Sequence[np.ndarray], center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return bool (X, Y, Z): True inside the axis-aligned ellipsoid."""
    x, y, z = (((axis - middle) / radius) ** 2 for axis, middle, radius in zip(axes, center, radii, strict=True))
    return (x[:, None, None] + y[:, None]) + z <= 1

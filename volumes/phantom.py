"""A phantom for tests and for runs without data: nested ellipsoids with a lesion, its mask and its class."""

from __future__ import annotations

import numpy as np

from .volume import Volume

PHANTOM_LABELS = {0: "background", 1: "body", 2: "organ", 3: "lesion"}
LESION = 3
PHANTOM_CLASSES = ("dark lesion", "bright lesion")
INTENSITY = {"background": 0.0, "body": 400.0, "organ": 700.0}
LESION_INTENSITY = (150.0, 1000.0)  # by class


def make_phantom(
    seed: int, shape: tuple[int, int, int] = (32, 32, 32), spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> tuple[Volume, Volume, int]:
    """Draw phantom number `seed`.

    Returns the image (float32, about 0 to 1,000, with a smooth bias field and noise), its mask (int16,
    `PHANTOM_LABELS`), both (1, X, Y, Z) with the origin at the center, and the class of its lesion (index into
    `PHANTOM_CLASSES`).
    """
    if min(shape) < 8:
        raise ValueError(f"a phantom needs 8 voxels or more on every axis, got {shape}")
    random = np.random.default_rng(seed)
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]
    position = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z), each in -1..1
    body_center = random.uniform(-0.08, 0.08, 3)
    organ_center = body_center + random.uniform(-0.06, 0.06, 3)
    lesion_center = organ_center + random.uniform(-0.06, 0.06, 3)
    lesion_class = int(random.integers(len(PHANTOM_CLASSES)))
    mask = np.zeros(shape, dtype=np.int16)
    mask[_ellipsoid(position, body_center, random.uniform(0.75, 0.88, 3))] = 1
    mask[_ellipsoid(position, organ_center, random.uniform(0.42, 0.56, 3))] = 2
    mask[_ellipsoid(position, lesion_center, random.uniform(0.14, 0.24, 3))] = LESION
    image = np.array([*INTENSITY.values(), LESION_INTENSITY[lesion_class]])[mask]
    tilt = random.uniform(-0.1, 0.1, 3)
    image = image * (1 + np.tensordot(tilt, position, axes=1)) + random.normal(0, 20, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Volume(image.astype(np.float32)[None], affine), Volume(mask[None], affine), lesion_class


def _ellipsoid(position: np.ndarray, center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return bool (X, Y, Z): True inside the axis-aligned ellipsoid."""
    return (((position - center[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(axis=0) <= 1

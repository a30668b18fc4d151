"""The shift of timesteps by the number of latent voxels, in training and in sampling.

A fraction t of noise hides less of a large grid than of a small one, because neighbors that show the same structure
average the noise out. Of a constant image of n values, seen at noise t, the value is known up to
t / (1 - t) / sqrt(n). Equal uncertainty on grids of n and m values needs t_m = s t_n / (1 + (s - 1) t_n) with
s = sqrt(m / n) (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2, Eq. 23).

That argument counts values, not sides. So in 3-D all latent voxels count, and s is the square root of their ratio.
MAISI takes the cube root instead (MONAI's `timestep_transform`, n = 32^3): the ratio of sides, which in 2-D is Eq. 23,
and shifts less in 3-D. Channels do not count: they are not observations of one value.

In training the shift moves the density of t: sigmoid(N(0, 1)) becomes sigmoid(N(log s, 1)). The loss at each t keeps
its weight of 1, so this density is all of the weighting by t; a weight beside it would apply the shift twice.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Values = TypeVar("Values", float, Tensor)
MAX_SHIFT_VOXELS = 10**9


def shift_of(sides: Sequence[int], base: int | None) -> float:
    """Return s = sqrt(m / n) of a grid of m = h w d latent voxels; 1 without a shift.

    Args:
        sides: (h, w, d).
        base: n, the number of latent voxels at which timesteps are not shifted (the U-Net's `shift_voxels`); None: they
            never are.
    """
    return 1.0 if base is None else math.sqrt(math.prod(sides) / base)


def shifted(timesteps: Values, shift: float | Tensor, end: float) -> Values:
    """Shift timesteps from 0 (clean) to `end` (noise), both of which stay (Esser et al. 2024, Eq. 23). A shift of 1
    changes no bit."""
    return shift * timesteps / (1 + (shift - 1) * (timesteps / end))  # pyright: ignore[reportReturnType]

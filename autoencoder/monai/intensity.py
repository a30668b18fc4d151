"""Intensities of networks that others trained."""

from collections.abc import Sequence


def intensity_scale(value_range: Sequence[float]) -> tuple[float, float]:
    """Return scale and shift from our intensities, [-1, 1], to those that the original takes for them.

    Raises: ValueError unless `value_range` is the lowest and the highest of these.
    """
    if len(value_range) != 2 or value_range[0] >= value_range[1]:
        raise ValueError(f"value_range is {value_range!r}; give two numbers, the smaller one first")
    low, high = value_range
    return (high - low) / 2, (high + low) / 2

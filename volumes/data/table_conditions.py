"""Classes and numbers of cases: the table's cells, and their statistics over the training volumes.

Columns are in alphabetical order everywhere: saved configs are sorted. Numbers with a name in `GRID_NUMBERS` need no
column: they are those of the volume's own grid.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from volumes.description import NumberStats
from volumes.volume import Volume, VolumeError, grid_numbers

from .cases import Case
from .config import DataConfig
from .tables import read_number

NO_CLASS = -1  # an empty cell; of a number it is NaN
ROUNDING = 1e-6  # relative: oblique grids of one spacing differ by as much
REMEDY = "leave the cell empty where it is not known"


def read_classes(case: Case, config: DataConfig) -> list[int]:
    """Read the index of the case's value among the names of each class, -1 for an empty cell. Raises: VolumeError for
    other values.
    """
    indices = []
    for column, known in sorted(config.class_names.items()):
        value, values = case.metadata.get(column), config.classes[column]
        if value not in (None, "") and str(value) not in known:
            expected, remedy = ", ".join(known), REMEDY
            if isinstance(values, dict):
                expected = ", ".join(dict.fromkeys([*values, *known]))
                remedy += f", or say what it is called, such as data.classes.{column}: {{{value}: {known[0]}}}"
            raise VolumeError(f"{case.name}: {column} is {value!r}, expected one of {expected}; {remedy}")
        indices.append(NO_CLASS if value in (None, "") else known.index(str(value)))
    return indices


def read_numbers(case: Case, numbers: Sequence[str], grid: Volume) -> list[float]:
    """Read the case's numbers, NaN for an empty cell. Numbers of `GRID_NUMBERS` without a column are those of the grid.

    Raises: VolumeError unless each is a finite number.
    """
    values, cells = [], {**grid_numbers(grid), **case.metadata}
    for column in sorted(numbers):
        cell = cells.get(column)
        try:
            value = math.nan if cell in (None, "") else read_number(cell)
        except TypeError:
            value = math.inf
        except ValueError as error:
            raise VolumeError(
                f"{case.name}: {column} is {cell!r}, which is not a finite number: {error}; {REMEDY}"
            ) from error
        if math.isinf(value) or (math.isnan(value) and cell not in (None, "")):
            raise VolumeError(f"{case.name}: {column} is {cell!r}, which is not a finite number; {REMEDY}")
        values.append(value)
    return values


def describe_numbers(
    names: Sequence[str], values: Sequence[Sequence[float]], constant: Collection[str] = ()
) -> dict[str, NumberStats]:
    """Compute statistics of each number over the volumes that have it, from one row of `values` per volume.

    Args:
        constant: numbers that may be the same for all volumes, for a model that learned them elsewhere; their standard
            deviation is then given as 1.
    Raises: ValueError for a number that no volume has, or that is the same for all.
    """
    described = {}
    for name, column in zip(sorted(names), np.array(values, dtype=np.float64).T, strict=True):
        known = column[~np.isnan(column)]
        if len(known) and name in constant and np.ptp(known) <= ROUNDING * abs(known).max():
            described[name] = NumberStats(float(known[0]), 1.0, float(known.min()), float(known.max()))
            continue
        if not len(known) or np.ptp(known) <= ROUNDING * abs(known).max():
            found = f"is {known[0]:g} for all" if len(known) else "is empty for all"
            raise ValueError(f"data: the number {name!r} {found} training volumes; remove it from data.numbers")
        described[name] = NumberStats(float(known.mean()), float(known.std()), float(known.min()), float(known.max()))
    return described

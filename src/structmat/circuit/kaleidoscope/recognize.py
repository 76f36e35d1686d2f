"""Levels of a circuit that are butterfly factors as they stand."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import Ints, Numbers
from structmat.circuit.kaleidoscope.stage import Stage, is_power_of_two


def in_place_stage(size: int, rows: Ints, columns: Ints, values: Numbers) -> Stage | None:
    """The butterfly factor with these entries, or None where there is none.

    It exists where all entries off the diagonal couple two coordinates that differ in one bit, the same for all, and no
    place occurs twice. ``size`` is a power of two that holds all entries.
    """
    distance = rows ^ columns
    strides = np.unique(distance[distance != 0])
    if len(strides) > 1 or (len(strides) == 1 and not is_power_of_two(int(strides[0]))):
        return None
    if len(np.unique(rows * size + columns)) < len(rows):
        return None
    stride = int(strides[0]) if len(strides) else 1
    weight = np.zeros((size // (2 * stride), 2, 2, stride), dtype=values.dtype)
    weight[rows // (2 * stride), rows // stride % 2, columns // stride % 2, rows % stride] = values
    return Stage.of(weight)

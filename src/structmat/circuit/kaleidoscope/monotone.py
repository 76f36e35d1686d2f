"""Broadcasts that keep the order, and sums of contiguous segments: one butterfly matrix each.

Source: the construction behind the sparse lemma of Dao et al., "Kaleidoscope" (arXiv 2012.14966), theorem 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Ints
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.errors import CircuitError
from structmat.sizes import is_power_of_two


def broadcast(source: ArrayLike) -> ButterflyProduct:
    """``y[t] = x[source[t]]`` in B*, for sources that begin at 0 and grow by 0 or 1: strides n / 2, .., 1.

    Args:
        source: (n,), n a power of two, at least 2.

    Cost: O(n log n).

    Raises:
        CircuitError: the sources are of another kind.
    """
    need = require_monotone(source)
    size = len(need)
    if size < 2 or not is_power_of_two(size):
        raise CircuitError(
            f"A butterfly matrix has a power of two of places, at least 2; got {size}. Repeat the last source to fill "
            "up."
        )
    stages = []
    half = size // 2
    while half:
        # What a half block needs is an interval of at most `half` values, so no two share a place modulo `half`.
        by_half = need.reshape(-1, 2, half)
        weight = np.zeros((size // (2 * half), 2, 2, half), dtype=np.bool_)
        block, row = np.arange(len(by_half))[:, None, None], np.arange(2)[None, :, None]
        weight[block, row, by_half // half, by_half % half] = True
        stages.append(Stage.of(weight))
        need = need % half
        half //= 2
    return ButterflyProduct(size, tuple(stages))


def segment_sums(segment: ArrayLike) -> ButterflyProduct:
    """``y[r] = sum of x[t] over t with segment[t] == r`` in B, for segments that begin at 0 and grow by 0 or 1.

    The transpose of :func:`broadcast`: strides 1, .., n / 2. Places beyond the last segment receive 0.

    Raises:
        CircuitError: the segments are of another kind.
    """
    return broadcast(segment).transpose()


def require_monotone(source: ArrayLike) -> Ints:
    """The sources as integers.

    Raises:
        CircuitError: they are no integers that begin at 0 and grow by 0 or 1.
    """
    array = np.asarray(source)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise CircuitError(
            f"The sources of a monotone broadcast are integers; got {array.dtype} of shape {array.shape}. Pass one for "
            "each place."
        )
    steps = np.diff(array.astype(np.int64))
    if array[0] != 0 or np.any((steps != 0) & (steps != 1)):
        raise CircuitError(
            "The sources of a monotone broadcast begin at 0 and grow by 0 or 1 from one to the next. Sort them, and "
            "number the distinct ones."
        )
    return array.astype(np.int64)

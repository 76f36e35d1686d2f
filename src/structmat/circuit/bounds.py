"""Lower bounds: how many gates, and how deep, any circuit of a matrix must be."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from structmat.errors import CircuitError
from structmat.sizes import is_power_of_two


def morgenstern(matrix: ArrayLike, largest_weight: float = 1.0) -> float:
    """Gates that any linear circuit of a matrix needs whose weights are at most ``largest_weight`` in absolute value.

    A gate ``alpha * g + beta * h`` multiplies the largest minor by at most ``2 c``, so there are at least
    ``log |minor| / log(2 c)`` gates, with ``c = max(1, largest_weight)``. For the unnormalised Hadamard and Fourier
    matrices and ``c = 1`` that is ``n / 2 * log2 n``, half of what the fast transforms take.

    The minor is the determinant; of a rectangular matrix one that rows and columns chosen by pivoting give. Any minor
    gives a true bound.

    Source: Morgenstern, "Note on a lower bound of the linear complexity of the fast Fourier transform" (J. ACM 1973).

    Returns:
        The bound, at least 0; a count of gates is at least its ceiling.
    """
    array = _matrix(matrix)
    factor = math.log(2 * max(1.0, largest_weight))
    return max(0.0, _log_minor(array) / factor)


def _log_minor(matrix: np.ndarray) -> float:
    rows, columns = matrix.shape
    if rows > columns:
        matrix = matrix.T
    if rows != columns:
        pivots = linalg.qr(matrix, mode="r", pivoting=True)[1]
        matrix = matrix[:, pivots[: len(matrix)]]
    return float(np.linalg.slogdet(matrix)[1])


def counting(dimension: int, constants_per_gate: int = 2) -> int:
    """Gates that almost all members of a family of matrices need, by counting dimensions.

    Circuits of ``g`` gates ``alpha * g + beta * h`` have ``2 g`` constants, so their matrices lie in finitely many sets
    of dimension at most ``2 g``. A family of larger dimension is not covered: for all ``m x n`` matrices,
    ``counting(m * n)`` gates.
    """
    return -(-dimension // constants_per_gate)


def fan_in_depth(matrix: ArrayLike) -> int:
    """Depth in gates of two operands that the longest row needs: ``ceil(log2 of its non-zeros)``, one gate for others.

    A row that is one input unchanged needs none.
    """
    array = _matrix(matrix)
    terms = int(np.count_nonzero(array, axis=1).max(initial=0))
    if terms > 1:
        return math.ceil(math.log2(terms))
    return int(np.any((array != 0) & (array != 1)))


def hadamard_rigidity(size: int, rank: int) -> float:
    """Entries that must change before the Sylvester-Hadamard matrix has rank at most ``rank``: ``size^2 / (4 rank)``.

    For powers of two and ``rank <= size / 2``: each of the ``(size / 2 rank)^2`` blocks is a Hadamard matrix of full
    rank ``2 rank``, in which at least ``rank`` entries must change. Hence sparse plus low rank, of ``2 size * rank``
    numbers and the changed entries, takes more than ``size^1.5`` numbers whatever the rank.

    Raises:
        CircuitError: a size is no power of two, or the rank is too large.
    """
    if size < 2 or not is_power_of_two(size) or not is_power_of_two(rank) or 2 * rank > size:
        raise CircuitError(
            f"The bound holds for powers of two with 1 <= rank <= size / 2; got size {size} and rank {rank}."
        )
    return size**2 / (4 * rank)


def _matrix(matrix: ArrayLike) -> np.ndarray:
    array = np.asarray(matrix)
    if array.ndim != 2 or 0 in array.shape:
        raise CircuitError(f"A bound needs a matrix with rows and columns; got shape {array.shape}.")
    if array.dtype == object or array.dtype.kind in "biu":
        array = array.astype(np.float64)
    return array

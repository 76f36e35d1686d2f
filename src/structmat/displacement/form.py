"""Generators of matrices in the forms that turn into Cauchy-like ones."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor


class Side(enum.Enum):
    """What stands between a matrix and its Cauchy-like form, on one side."""

    PLAIN = "nothing: the operator is diagonal"
    SHIFT = "a Fourier transform: the operator is Z_1"
    TWISTED = "a Fourier transform of signs in between: the operator is Z_-1"


@dataclass(frozen=True, eq=False)
class CauchyForm:
    """``A M - M B = G H^T`` with A and B diagonal or a cyclic shift, and M square.

    Args:
        left, right: the kind of A and of B.
        rows, columns: s and t, (n,), the eigenvalues of A and B; those of a shift follow from its size.
        left_generator, right_generator: G and H, (n, r).
        reversed_rows: M has its rows in reverse order (a Hankel-like matrix).
    """

    left: Side
    right: Side
    left_generator: Tensor
    right_generator: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    reversed_rows: bool = False


_TOO_NEAR = 1e-3
"""Differences of nodes and eigenvalues of a shift below this would cost more than three digits."""


def twisted_distance(nodes: Tensor, size: int) -> Tensor | None:
    """``1 + nodes**size``, which vanishes where a node is an eigenvalue of ``Z_-1``; None if one nearly is."""
    apart = 1 + nodes**size
    return apart if bool((apart.abs() > _TOO_NEAR).all()) else None


def of_toeplitz(first: Tensor, *, hankel: bool = False) -> CauchyForm:
    """Generators of the Toeplitz matrix with the entries ``first[i - j + n - 1]``, exact and without arithmetic but
    sums of two entries; of the Hankel matrix ``first[i + j]`` too, by its rows in reverse order."""
    size = (len(first) + 1) // 2
    # Rows in reverse order make the Hankel matrix first[i + j] the Toeplitz matrix first[n - 1 - i + j].
    diagonals = first.flip(0) if hankel else first
    column, row = diagonals[size - 1 :], diagonals[:size].flip(0)  # of the first column and the first row
    # Z_1 T - T Z_-1 vanishes but in the first row and the last column.
    left, right = first.new_zeros(size, 2), first.new_zeros(size, 2)
    top, side = first.new_zeros(size), first.new_zeros(size)
    # The first row: T[n-1, j] - T[0, j+1], and T[n-1, n-1] + T[0, 0] at its end.
    below = diagonals.flip(0)[:size]  # the last row: T[n-1, j] = diagonals[2 n - 2 - j]
    top[: size - 1] = below[: size - 1] - row[1:]
    top[size - 1] = below[size - 1] + row[0]
    # The last column from the second row on: T[i-1, n-1] + T[i, 0].
    side[1:] = diagonals[: size - 1] + column[1:]
    left[0, 0], right[:, 0] = 1.0, top
    left[:, 1], right[size - 1, 1] = side, 1.0
    return CauchyForm(Side.SHIFT, Side.TWISTED, left, right, reversed_rows=hankel)

"""Sparse matrices as kaleidoscope matrices: at most n entries in size n have width 4.

Source: Dao et al., "Kaleidoscope" (arXiv 2012.14966), theorems 2 and 3; the factors here are sorting, broadcasting,
multiplying and summing the entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Ints, Numbers, numbers
from structmat.circuit.kaleidoscope.benes import permutation, permutation_starred
from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.monotone import broadcast, segment_sums
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.sums import total
from structmat.errors import CircuitError
from structmat.sizes import power_of_two


@dataclass(frozen=True, eq=False)
class SparseFactors:
    """``S = P1 H P2 V P3`` for a matrix S with at most as many entries as its size.

    Attributes:
        gather: P3, as an order: the used columns first.
        spread: V in B*: each used column to all its entries.
        sort: P2, as an order: the entries by row.
        combine: H in B: multiplied by their values and summed by row.
        scatter: P1, as an order: the sums to their rows.
    """

    gather: Ints
    spread: ButterflyProduct
    sort: Ints
    combine: ButterflyProduct
    scatter: Ints


@dataclass(frozen=True, eq=False)
class SortedEntries:
    """The entries of a matrix in the slots of the lemma: sorted by column first, then by row.

    Attributes:
        gather: (size,) an order: the used columns first.
        source: (size,) which of them each slot reads, ascending.
        sort: (size,) an order: the slots by row.
        scale: (size,) the value of each slot, 0 where it is unused.
        segment: (size,) which sum each slot is added to, ascending.
        scatter: (size,) an order: the sums to their rows.
    """

    gather: Ints
    source: Ints
    sort: Ints
    scale: Numbers
    segment: Ints
    scatter: Ints


def sorted_entries(rows: ArrayLike, columns: ArrayLike, values: ArrayLike, size: int) -> SortedEntries:
    """The orders and runs of the lemma for the matrix with these entries, in any size.

    Raises:
        CircuitError: there are more entries than ``size``, or an entry is outside.
    """
    row, column, value = np.asarray(rows, np.int64), np.asarray(columns, np.int64), numbers(values)
    count = len(row)
    if count > size or not row.shape == column.shape == value.shape:
        raise CircuitError(
            f"The lemma takes at most {size} entries in size {size}, as three arrays of one length; got rows "
            f"{row.shape}, columns {column.shape}, values {value.shape}. Use sparse_sum, or a larger size."
        )
    require_inside(row, column, (size, size))
    by_column = np.argsort(column, kind="stable")
    row, column, value = row[by_column], column[by_column], value[by_column]
    by_row = np.argsort(row, kind="stable")
    used_columns, source = _ranks(column, size)
    used_rows, segment = _ranks(row[by_row], size)
    scale = np.zeros(size, dtype=value.dtype)
    scale[:count] = value[by_row]
    return SortedEntries(
        gather=completed(used_columns, size),
        source=source,
        sort=np.concatenate([by_row, np.arange(count, size)]),
        scale=scale,
        segment=segment,
        scatter=inverse_of(completed(used_rows, size)),
    )


def sparse_factors(rows: ArrayLike, columns: ArrayLike, values: ArrayLike, size: int) -> SparseFactors:
    """The five factors of the matrix with these entries; equal places are summed.

    Cost: O(size log size).

    Raises:
        CircuitError: there are more entries than ``size``, or an entry is outside.
    """
    entries = sorted_entries(rows, columns, values, size)
    sums = segment_sums(entries.segment)
    combine = ButterflyProduct(size, (sums.stages[0].columns_scaled(entries.scale), *sums.stages[1:]))
    return SparseFactors(entries.gather, broadcast(entries.source), entries.sort, combine, entries.scatter)


def sparse(
    rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int], *, size: int | None = None
) -> Kaleidoscope:
    """The matrix with these entries in ``(B B*)^4``.

    Args:
        rows: of the entries.
        columns: of the entries.
        values: numbers.
        shape: of the matrix.
        size: of the butterfly matrices, a power of two; by default the least that holds the shape and the entries.

    Raises:
        CircuitError: the entries do not fit the shape or the size.
    """
    row, column = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    require_inside(row, column, shape)
    chosen = max(2, power_of_two(max(*shape, len(row)))) if size is None else size
    if chosen < max(shape):
        raise CircuitError(f"A matrix of shape {shape} does not fit size {chosen}.")
    parts = sparse_factors(row, column, values, chosen)
    product = permutation(parts.scatter) @ parts.combine @ permutation_starred(parts.sort)
    product = product @ parts.spread @ permutation(parts.gather)
    return Kaleidoscope(product, shape[1], shape[0])


def sparse_sum(rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int]) -> Kaleidoscope:
    """The matrix with s entries in ``(B B*)^(4 ceil(s / n))`` of size 4 n, n the power of two that holds the shape.

    The entries are split in ceil(s / n) parts that are summed. :func:`sparse` in a larger size is usually smaller.

    Raises:
        CircuitError: an entry lies outside of the shape.
    """
    row, column, value = np.asarray(rows, np.int64), np.asarray(columns, np.int64), numbers(values)
    require_inside(row, column, shape)
    size = max(2, power_of_two(max(shape)))
    begins = range(0, max(len(row), 1), size)
    parts = [slice(begin, begin + size) for begin in begins]
    return total([sparse(row[part], column[part], value[part], shape, size=size) for part in parts])


def require_inside(row: Ints, column: Ints, shape: tuple[int, int]) -> None:
    """Raises :class:`CircuitError` where an entry lies outside of the shape."""
    outside = (row < 0) | (row >= shape[0]) | (column < 0) | (column >= shape[1])
    if outside.any():
        entry = int(np.flatnonzero(outside)[0])
        raise CircuitError(f"Entry ({row[entry]}, {column[entry]}) lies outside of a matrix of shape {shape}.")


def _ranks(values: Ints, size: int) -> tuple[Ints, Ints]:
    """The distinct ones of sorted values, and for ``size`` places the rank of the value there, the last repeated."""
    first = np.ones(len(values), dtype=np.bool_)
    first[1:] = values[1:] != values[:-1]
    ranks = np.zeros(size, dtype=np.int64)
    ranks[: len(values)] = np.cumsum(first) - 1
    ranks[len(values) :] = ranks[len(values) - 1] if len(values) else 0
    return values[first], ranks


def completed(chosen: Ints, size: int) -> Ints:
    """An order of all indices that begins with the chosen ones."""
    free = np.ones(size, dtype=np.bool_)
    free[chosen] = False
    return np.concatenate([chosen, np.flatnonzero(free)])


def inverse_of(order: Ints) -> Ints:
    """The inverse of a permutation."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse

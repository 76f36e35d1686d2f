"""Small operations on arrays of segments (CSR), which all passes over circuits share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from structmat.errors import CircuitError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Numbers = NDArray[Any]
"""Integers, floats, complex numbers, or Python objects (int, Fraction)."""


def starts(counts: Ints) -> Ints:
    """Where the segments of these lengths begin, and after the last one where it ends: one entry more."""
    result = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=result[1:])
    return result


def is_order(places: Ints) -> bool:
    """Whether they are 0, 1, 2, ..."""
    return bool(np.array_equal(places, np.arange(len(places))))


def spread(first: Ints, counts: Ints) -> Ints:
    """``first[0], first[0] + 1, ...`` (``counts[0]`` of them), then from ``first[1]``, and so on."""
    begin = starts(counts)
    return np.repeat(first - begin[:-1], counts) + np.arange(begin[-1])


def owners(start: Ints) -> Ints:
    """The segment that each entry belongs to."""
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def consumers(start: Ints, operand: Ints) -> tuple[Ints, Ints]:
    """The edges that read each node: edge numbers grouped by operand, as (start, edges). Linear time."""
    nodes = len(start) - 1
    reading = operand >= 0
    if reading.all():
        edges, columns = np.arange(len(operand)), operand
    else:
        edges = np.flatnonzero(reading)
        columns = operand[edges]
    # One row that holds all edges, transposed: SciPy's counting sort.
    matrix = sparse.csr_array((edges, columns, np.array([0, len(edges)])), shape=(1, nodes)).tocsc()
    return matrix.indptr.astype(np.int64), matrix.data


def reachable(start: Ints, neighbor: Ints, sources: Ints) -> Bools:
    """The sources, and all nodes that paths along the edges lead to. Linear time, whatever the length of the paths.

    Args:
        start: (nodes + 1,) segments of the edges that leave each node.
        neighbor: the node that each edge leads to, or -1 for none.
        sources: nodes, which may repeat.
    """
    nodes = len(start) - 1
    real = neighbor >= 0
    begin = start if real.all() else np.append(0, np.cumsum(real))[start]
    # One node more, from which edges lead to all sources.
    columns = np.concatenate([neighbor[real], sources])
    rows = np.append(begin, len(columns))
    graph = sparse.csr_array((np.ones(len(columns)), columns, rows), shape=(nodes + 1, nodes + 1))
    found = np.zeros(nodes + 1, dtype=np.bool_)
    found[csgraph.breadth_first_order(graph, nodes, directed=True, return_predecessors=False)] = True
    return found[:-1]


def is_unit(weight: Numbers) -> Bools:
    """Which numbers are 1 or -1: they cost no multiplication."""
    return np.asarray((weight == 1) | (weight == -1), dtype=np.bool_)


def common_type(*arrays: Numbers) -> np.dtype[Any]:
    """A type that holds the numbers of all arrays: objects stay objects, so that fractions stay exact."""
    if any(a.dtype == object for a in arrays):
        return np.dtype(object)
    return np.result_type(*arrays)


def joined(arrays: list[Numbers]) -> Numbers:
    """Arrays of numbers one after the other, in their common type. Empty ones have no say in the type."""
    filled = [a for a in arrays if a.size]
    if not filled:
        return np.zeros(0, dtype=np.int64)
    dtype = common_type(*filled)
    return np.concatenate([a.astype(dtype, copy=False) for a in filled])


def exact_product(first: Numbers, second: Numbers) -> Numbers:
    """Elementwise; integers whose product may leave 64 bits become Python's."""
    integers = first.dtype.kind == second.dtype.kind == "i"
    if integers and int(np.abs(first).max(initial=0)) * int(np.abs(second).max(initial=0)) >= 1 << 62:
        first = first.astype(object)
    return np.asarray(first * second)


def indices(values: object, what: str) -> Ints:
    """Anything that NumPy takes as an array of integers.

    Raises:
        CircuitError: it is something else, such as floats, which would be cut to integers without a word.
    """
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise CircuitError(f"{what} are integers; got an array of {array.dtype}.")
    return np.asarray(array, dtype=np.int64)


def numbers(values: object) -> Numbers:
    """Anything that NumPy takes as an array of numbers; booleans become integers, small floats and integers wide.

    Raises:
        CircuitError: it is no array of numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "buifcO":
        raise CircuitError(f"Numbers are needed; got an array of {array.dtype}.")
    if array.dtype.kind in "bui":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.dtype.kind == "c":
        return array.astype(np.complex128)
    return array.astype(object)

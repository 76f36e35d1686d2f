"""The pieces of the universality theorem in Monarch products, of any size ``n = k b``.

Permutations are three-stage Clos networks, routed by coloring the edges of a regular bipartite graph: the route of an
element is the block that it passes through. Source: Clos, "A study of non-blocking switching networks" (1953).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Ints, Numbers, is_order, joined, numbers, owners
from structmat.circuit.circuit import Circuit
from structmat.circuit.evaluate import require_linear
from structmat.circuit.kaleidoscope.benes import require_permutation
from structmat.circuit.kaleidoscope.coloring import edge_colors
from structmat.circuit.kaleidoscope.monarch import MonarchProduct, MonarchStage
from structmat.circuit.kaleidoscope.monotone import require_monotone
from structmat.circuit.kaleidoscope.planning import layer_values, planned
from structmat.circuit.kaleidoscope.sparse import require_inside, sorted_entries
from structmat.errors import CircuitError
from structmat.sizes import round_up


def monarch_permutation(order: ArrayLike, block: int) -> MonarchProduct:
    """``y[i] = x[order[i]]`` in M M*, with blocks of any size that divides the number of places.

    Raises:
        CircuitError: it is no permutation, or ``block`` does not divide its size.
    """
    checked = require_permutation(order)
    _require_block(len(checked), block)
    return MonarchProduct.packed(len(checked), block, _routed(checked, block, across=True))


def monarch_permutation_starred(order: ArrayLike, block: int) -> tuple[MonarchStage, ...]:
    """The same in M* M: three factors within, across and within the blocks.

    Raises:
        CircuitError: it is no permutation, or ``block`` does not divide its size.
    """
    checked = require_permutation(order)
    _require_block(len(checked), block)
    return _routed(checked, block, across=False)


def monarch_broadcast(source: ArrayLike, block: int) -> tuple[MonarchStage, MonarchStage]:
    """``y[t] = x[source[t]]`` in M*, for sources that begin at 0 and grow by 0 or 1: across, then within the blocks.

    Raises:
        CircuitError: the sources are of another kind, or ``block`` does not divide their number.
    """
    need = require_monotone(source)
    size = len(need)
    _require_block(size, block)
    # What a block needs is an interval of at most `block` values, so no two share a place in a block.
    slot = np.arange(size) // block * block + need % block
    row, first = np.unique(slot, return_index=True)
    across = MonarchStage.of_entries(size, block, True, row, need[first])
    return across, MonarchStage.of_entries(size, block, False, np.arange(size), slot)


def monarch_segment_sums(segment: ArrayLike, block: int) -> tuple[MonarchStage, MonarchStage]:
    """``y[r] = sum of x[t] over t with segment[t] == r`` in M: the transpose of :func:`monarch_broadcast`.

    Raises:
        CircuitError: the segments are of another kind, or ``block`` does not divide their number.
    """
    across, within = monarch_broadcast(segment, block)
    return within.transpose(), across.transpose()


def monarch_sparse(
    rows: ArrayLike, columns: ArrayLike, values: ArrayLike, shape: tuple[int, int], *, block: int, size: int
) -> MonarchProduct:
    """The matrix with these entries, at most ``size``, in ``(M M*)^4``.

    Raises:
        CircuitError: the entries do not fit the shape or the size, or ``block`` does not divide the size.
    """
    _require_block(size, block)
    row, column = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    require_inside(row, column, shape)
    if size < max(shape):
        raise CircuitError(f"A matrix of shape {shape} does not fit size {size}.")
    stream = _Stream(size, block)
    stream.entries(row, column, numbers(values), always=True)
    stream.route(always=True)
    return stream.finished(shape[1], shape[0])


def monarch_total(terms: Sequence[MonarchProduct]) -> MonarchProduct:
    """The sum of matrices of one shape, size and block, of width the sum of the widths, in three times the size.

    Three copies hold the input, the work and the total so far. A factor across the blocks mixes the copies as well, so
    the sum takes no factors of its own.

    Raises:
        CircuitError: there are no terms, one has width 0, or they differ in shape, size or block.
    """
    if not terms:
        raise CircuitError("A sum of no Monarch products has no shape. Give at least one term.")
    kinds = {(term.out_features, term.in_features, term.size, term.block) for term in terms}
    if len(kinds) > 1 or any(term.width == 0 for term in terms):
        raise CircuitError(f"Terms have one shape, size and block, and a width of at least 1; got {sorted(kinds)}.")
    size, block = terms[0].size, terms[0].block
    every = np.arange(size)
    stages = []
    for number, term in enumerate(terms):
        for place, stage in enumerate(term.stages):
            row, column = owners(stage.start), stage.operand
            begins, ends = place == 0, place == len(term.stages) - 1
            if not (begins or ends):
                keeps, into, source = [0, 2], 1, 1
            elif begins:
                keeps, into, source = [0, 2], 1, 0
            else:
                keeps, into, source = [0, 2], 2, 1
            kept = np.concatenate([every + copy * size for copy in keeps])
            target, read, value = row + into * size, column + source * size, stage.value
            if ends and number == len(terms) - 1:  # the total becomes the output, and the input is dropped
                target, kept = row, every + 2 * size
                kept_row = every
            else:
                kept_row = kept
            row, column = np.concatenate([kept_row, target]), np.concatenate([kept, read])
            one = np.ones(len(kept), dtype=np.int64)
            stages.append(MonarchStage.of_entries(3 * size, block, stage.across, row, column, joined([one, value])))
    return MonarchProduct(3 * size, block, tuple(stages), terms[0].in_features, terms[0].out_features)


def monarch(circuit: Circuit, *, block: int | None = None, keep_all: bool = False) -> MonarchProduct:
    """The matrix of a linear circuit as a Monarch product, exactly, of width at most ``3 d + 1``.

    Parameters enter with their present values. Nothing is recognized; identity permutations are dropped.

    Args:
        circuit: linear, of depth d (``circuit.wide.depth``, at least 1).
        block: size of the blocks, by default about the root of the size that the layers need, with which the
            parameters are the fewest.
        keep_all: keep every value to the end, as in the proof.

    Raises:
        CircuitError: the circuit is not linear, or the block is smaller than 1.
    """
    require_linear(circuit, "monarch")
    layers, _, _ = planned(circuit, recognize=False, keep_all=keep_all)
    needed = max(1, circuit.in_features, *(max(layer.rows, layer.columns, layer.nonzeros) for layer in layers))
    chosen = max(1, round(needed**0.5)) if block is None else block
    if chosen < 1:
        raise CircuitError(f"The block of a Monarch product has at least one place; got {chosen}.")
    stream = _Stream(round_up(needed, chosen), chosen)
    for layer in layers:
        stream.entries(owners(layer.start), layer.column, layer_values(circuit, layer))
    stream.route()
    result = stream.finished(circuit.in_features, circuit.out_features)
    assert result.width <= 3 * len(layers) + 1
    return result


class _Stream:
    """Factors in order of application; permutations wait until a factor follows, and are then routed as one."""

    def __init__(self, size: int, block: int) -> None:
        self.size, self.block = size, block
        self.stages: list[MonarchStage] = []
        self.waiting = np.arange(size)

    def entries(self, row: Ints, column: Ints, value: Numbers, *, always: bool = False) -> None:
        """A sparse matrix after what is there; identity permutations are routed only if ``always``."""
        found = sorted_entries(row, column, value, self.size)
        self.waiting = self.waiting[found.gather]
        self.route(always=always)
        self.stages += monarch_broadcast(found.source, self.block)
        if always or not is_order(found.sort):
            self.stages += _routed(found.sort, self.block, across=False)
        within, across = monarch_segment_sums(found.segment, self.block)
        self.stages += [within.columns_scaled(found.scale), across]
        self.waiting = found.scatter

    def route(self, *, always: bool = False) -> None:
        """The permutation that waits."""
        if always or not is_order(self.waiting):
            self.stages += _routed(self.waiting, self.block, across=True)
        self.waiting = np.arange(self.size)

    def finished(self, in_features: int, out_features: int) -> MonarchProduct:
        """The product of all factors."""
        return MonarchProduct.packed(self.size, self.block, self.stages, in_features, out_features)


def _require_block(size: int, block: int) -> None:
    if block < 1 or size % block:
        raise CircuitError(f"Blocks of {block} do not divide size {size}. Pad the size to a multiple of the block.")


def _routed(order: Ints, block: int, *, across: bool) -> tuple[MonarchStage, MonarchStage, MonarchStage]:
    """A permutation as three factors: across, within, across the blocks, or within, across, within.

    An element from ``(c, d)`` to ``(c', d')`` goes by a place m: ``(c, d) -> (m, d) -> (m, d') -> (c', d')``, where no
    two elements of one d, and none of one d', may share m: a proper edge coloring. In the other form the digits are
    exchanged.
    """
    size = len(order)
    every = np.arange(size)
    blocks = size // block
    if across:
        middle = edge_colors(order % block, every % block, blocks)
        after, between = middle * block + order % block, middle * block + every % block
    else:
        middle = edge_colors(order // block, every // block, block)
        after, between = order // block * block + middle, every // block * block + middle
    first = MonarchStage.of_entries(size, block, across, after, order)
    second = MonarchStage.of_entries(size, block, not across, between, after)
    return first, second, MonarchStage.of_entries(size, block, across, every, between)

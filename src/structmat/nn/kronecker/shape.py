"""The sizes of a Kronecker block, and everything that can be counted from them."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from structmat.errors import ShapeError, StructureError
from structmat.projection.kronecker import Pairs, application_cost, application_order, balanced_pairs

Order = tuple[int, ...]
"""The axes of the input array in the order in which a term's factors contract them."""

AUTO, LEFT, RIGHT = "auto", "left", "right"

SHORTEST = 8
"""Contraction length from which on a stage of more than two factors is followed by an activation."""


class Bias(enum.Enum):
    """Which biases a block has.

    The published one is ``FULL``: an array of its own for the outcome of every stage, as many numbers as the weights
    of a balanced block. ``AXIS``: inside, one number for each row (column) that a left (right) factor makes. ``OUTER``:
    only that of the outcome. ``NONE``: none.
    """

    FULL = "full"
    AXIS = "axis"
    OUTER = "outer"
    NONE = "none"


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a Kronecker block: its input is an array of shape ``inputs``, its output one of shape ``outputs``.

    Term t contracts the axes in the order ``orders[t]``, axis i by a matrix ``(outputs[i], inputs[i])``. All counts are
    exact and for one sample; multiply-adds are those of the linear parts.

    Args:
        in_features, out_features: what is used of the arrays, flattened row-major; the rest is padding.
        inputs, outputs: shapes of the arrays, equally long.
        orders: one for each term.
        bias: which biases there are.
        activated: whether an activation (and a bias) follows each stage but the last.
    """

    in_features: int
    out_features: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    orders: tuple[Order, ...]
    bias: Bias
    activated: tuple[bool, ...]

    @property
    def terms(self) -> int:
        """Products that are added."""
        return len(self.orders)

    @property
    def pairs(self) -> Pairs:
        """Sizes (m_i, n_i) of the factors."""
        return tuple(zip(self.outputs, self.inputs, strict=True))

    @cached_property
    def groups(self) -> tuple[tuple[Order, int], ...]:
        """The distinct orders, and how many terms have each, in order of appearance."""
        return tuple((order, self.orders.count(order)) for order in dict.fromkeys(self.orders))

    # ------------------------------------------------------------------------------------------------- parameters

    @property
    def weights(self) -> int:
        """Numbers in the factors."""
        return self.terms * sum(m * n for m, n in self.pairs)

    @property
    def inner_biases(self) -> int:
        """Numbers in the biases between stages."""
        if self.bias not in (Bias.FULL, Bias.AXIS):
            return 0
        total = 0
        for order in self.orders:
            for place, made in enumerate(self.hidden(order)):
                if self.activated[place]:
                    total += math.prod(made) if self.bias is Bias.FULL else self.outputs[order[place]]
        return total

    @property
    def outer_biases(self) -> int:
        """Numbers in the bias of the outcome."""
        return 0 if self.bias is Bias.NONE else self.out_features

    @property
    def parameters(self) -> int:
        """All learned numbers, slopes of activations not counted."""
        return self.weights + self.inner_biases + self.outer_biases

    @property
    def source_parameters(self) -> int:
        """As published networks are counted: every term has an outer bias of its own, of which only the sum matters."""
        return self.weights + self.inner_biases + (0 if self.bias is Bias.NONE else self.terms * self.outer_array)

    @property
    def idle_weights(self) -> int:
        """Numbers in the factors of the first axis that only ever meet padding."""
        rows = (math.prod(self.outputs) - self.out_features) // math.prod(self.outputs[1:])
        columns = (math.prod(self.inputs) - self.in_features) // math.prod(self.inputs[1:])
        m, n = self.pairs[0]
        return self.terms * (m * n - (m - rows) * (n - columns))

    @property
    def outer_array(self) -> int:
        """Numbers in the output array, padding included."""
        return math.prod(self.outputs)

    @property
    def degrees_of_freedom(self) -> int:
        """Dimension of the set of linear maps ``sum of Kronecker products``: ``k (m n + p q - k)`` for two factors.

        For more factors ``k (sum of m_i n_i - K + 1)``, which it is in general (each term has K - 1 free scales).
        """
        sizes = [m * n for m, n in self.pairs]
        if len(sizes) == 2:
            terms = min(self.terms, *sizes)
            return terms * (sum(sizes) - terms)
        return min(self.terms * (sum(sizes) - len(sizes) + 1), math.prod(sizes))

    # ------------------------------------------------------------------------------------------------- operations

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        return sum(application_cost(self.pairs, order) for order in self.orders)

    def backward_macs(self, *, first: bool = False) -> int:
        """Multiply-adds of the backward pass; the first block of a network needs no gradient of its input."""
        spared = sum(math.prod(self.inputs) * self.outputs[order[0]] for order in self.orders)
        return 2 * self.macs - (spared if first else 0)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of a dense layer of the same size."""
        return self.in_features * self.out_features

    @property
    def additions(self) -> int:
        """Additions of the linear parts as a scalar circuit, biases not counted."""
        inside = 0
        last = 0
        for order in self.orders:
            made = self.hidden(order)
            inside += sum(math.prod(m) * (self.inputs[axis] - 1) for m, axis in zip(made, order, strict=False))
            last += self.inputs[order[-1]]
        return inside + self.outer_array * (last - 1)

    @property
    def depth(self) -> int:
        """Levels of gates of the linear parts, sums as binary trees."""
        one = max(
            sum(1 + math.ceil(math.log2(self.inputs[axis])) for axis in order[:-1]) + 1 for order in dict(self.groups)
        )
        return one + math.ceil(math.log2(sum(self.inputs[order[-1]] for order in self.orders)))

    @property
    def activations(self) -> int:
        """Values that pass an activation: the hidden ones and the outcome."""
        return sum(self._activated_hidden(order) for order in self.orders) + self.out_features

    @property
    def saved(self) -> int:
        """Numbers a sample that plain automatic differentiation keeps: input, what is activated inside, outcome."""
        return math.prod(self.inputs) + self.activations

    def _activated_hidden(self, order: Order) -> int:
        made = self.hidden(order)
        return sum(math.prod(m) for m, active in zip(made, self.activated, strict=True) if active)

    def hidden(self, order: Order) -> tuple[tuple[int, ...], ...]:
        """Shapes of a term's array after each stage but the last, axes in their natural order."""
        return tuple(self._after(order))[:-1]

    def _after(self, order: Order) -> Iterator[tuple[int, ...]]:
        sizes = list(self.inputs)
        for axis in order:
            sizes[axis] = self.outputs[axis]
            yield tuple(sizes)


def block_shape(
    in_features: int,
    out_features: int,
    terms: int = 1,
    *,
    in_shape: Sequence[int] | None = None,
    out_shape: Sequence[int] | None = None,
    factors: int = 2,
    order: str | Sequence[object] = AUTO,
    bias: Bias | str = Bias.FULL,
    activated: Sequence[bool] | None = None,
) -> BlockShape:
    """The sizes of a block, what is not given chosen; the arguments are those of :class:`KroneckerBlock`.

    Raises:
        ShapeError: the shapes of the arrays have different lengths, or hold fewer numbers than the features.
        StructureError: an order is no permutation of the axes, or there are too many terms.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ShapeError(f"{name} is at least 1; got {size}.")
    count = len(in_shape or out_shape or ()) or factors
    if count < 2:
        raise StructureError(f"A Kronecker product has at least two factors; got {count}. For one, use nn.Linear.")
    chosen = balanced_pairs((out_features, in_features), count)
    inputs = _array(in_shape, "in_shape", in_features, tuple(n for _, n in chosen))
    outputs = _array(out_shape, "out_shape", out_features, tuple(m for m, _ in chosen))
    if len(inputs) != len(outputs):
        raise ShapeError(
            f"in_shape {inputs} has {len(inputs)} axes, out_shape {outputs} has {len(outputs)}. Give as many: each "
            "factor turns one axis of the input into one of the output."
        )
    pairs = tuple(zip(outputs, inputs, strict=True))
    _check_terms(terms, pairs)
    orders = _orders(order, pairs, terms)
    active = _places(inputs, orders) if activated is None else tuple(bool(a) for a in activated)
    if len(active) != count - 1:
        raise StructureError(
            f"A block of {count} factors has {count - 1} places between stages; got activated={active} of length "
            f"{len(active)}."
        )
    return BlockShape(in_features, out_features, inputs, outputs, orders, Bias(bias), active)


def _array(given: Sequence[int] | None, name: str, features: int, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    if given is None:
        return otherwise
    found = tuple(int(n) for n in given)
    if min(found) < 1 or math.prod(found) < features:
        raise ShapeError(
            f"{name} {found} holds {math.prod(found)} numbers, the block has {features} on that side. Give sizes whose "
            f"product is at least {features}, such as {otherwise}."
        )
    return found


def _check_terms(terms: int, pairs: Pairs) -> None:
    sizes = [m * n for m, n in pairs]
    most = math.prod(sizes) // max(sizes)
    if not 1 <= terms <= most:
        raise StructureError(
            f"A sum of Kronecker products of sizes {pairs} has 1 to {most} terms, which already give every matrix; "
            f"got {terms}."
        )


def _orders(order: str | Sequence[object], pairs: Pairs, terms: int) -> tuple[Order, ...]:
    """One order a term, from a word, one permutation, or one of these for each term."""
    if isinstance(order, str) or all(isinstance(axis, int) for axis in order):
        return (_order(order, pairs),) * terms
    if len(order) != terms:
        raise StructureError(f"There are {terms} terms; got {len(order)} orders. Give one for each, or one for all.")
    return tuple(_order(one, pairs) for one in order)


def _order(order: object, pairs: Pairs) -> Order:
    count = len(pairs)
    words = {AUTO: application_order(pairs), LEFT: tuple(range(count)), RIGHT: tuple(reversed(range(count)))}
    if isinstance(order, str) and order in words:
        return words[order]
    found = tuple(order) if isinstance(order, Sequence) and not isinstance(order, str) else ()
    if sorted(map(str, found)) != sorted(map(str, range(count))):
        raise StructureError(
            f"{order!r} is no order of {count} factors. Give 'left', 'right', 'auto' (fewest operations), or a "
            f"permutation of {tuple(range(count))}."
        )
    return tuple(int(str(axis)) for axis in found)


def _places(inputs: tuple[int, ...], orders: tuple[Order, ...]) -> tuple[bool, ...]:
    """Where activations go by default: between the stages of two factors; of more, not after short contractions."""
    if len(inputs) == 2:
        return (True,)
    found = []
    length = 1
    for place in range(len(inputs) - 1):
        length *= min(inputs[order[place]] for order in orders)
        found.append(length >= SHORTEST)
        if length >= SHORTEST:
            length = 1
    return tuple(found)

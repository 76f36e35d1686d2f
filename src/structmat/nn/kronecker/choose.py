"""Factor shapes for a budget: of one block, and of all blocks of a network together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from structmat.errors import StructureError
from structmat.nn.kronecker.shape import LEFT, RIGHT, Bias, BlockShape, block_shape
from structmat.projection.kronecker import factor_pairs, padded_factors

MOST_UNEVEN = 16
"""Shapes with a larger ratio of sizes come near low rank; they are proposed only where nothing else fits."""

_POINTS = 2048
"""Of the trade-off of several layers, at most so many points are kept: budgets are then met to about 0.1 %."""


def choose(
    in_features: int,
    out_features: int,
    *,
    parameters: int | None = None,
    macs: int | None = None,
    bias: Bias | str = Bias.FULL,
) -> list[BlockShape]:
    """Blocks of two factors within a budget, the most degrees of freedom first, then the most even ones.

    All factorings of the (padded) sizes are tried, both orders, each with the most terms that fit; shapes with an axis
    of size 1 come last, among them the low-rank corner (M, 1) x (1, N), which needs the fewest operations for a term.
    Terms beyond those that give every matrix, or that cost more than a dense layer, are never proposed.

    Args:
        in_features, out_features: of the layer.
        parameters: at most so many learned numbers, biases counted; or
        macs: at most so many multiply-adds a sample.
        bias: which biases are counted.

    Raises:
        StructureError: both or no budget is given, or not even one term of any shape fits.
    """
    if (parameters is None) == (macs is None):
        raise StructureError("A block is chosen for one budget. Give parameters= or macs=, not both.")
    budget = parameters if macs is None else macs
    assert budget is not None
    single = list(_singles(in_features, out_features, Bias(bias)))
    found = []
    for one in single:
        terms = _most_terms(one, budget, parameters is not None)
        if terms:
            found.append(_repeat(one, terms))
    if not found:
        unit = "parameters" if macs is None else "multiply-adds"
        least = min(_cost(one, parameters is not None) for one in single)
        raise StructureError(
            f"No Kronecker block {in_features} -> {out_features} has {budget} {unit} or less; the smallest has "
            f"{least}. Use a larger budget, or bias='axis', 'outer' or 'none'."
        )
    return sorted(found, key=_preference)


def choose_all(
    sizes: Sequence[int], *, parameters: int | None = None, macs: int | None = None, bias: Bias | str = Bias.FULL
) -> list[BlockShape]:
    """The blocks of a network of given sizes within one budget for all of them.

    Another factoring of the same length is a free reshape, so each block has shapes of its own. Chosen is what has the
    largest product of degrees of freedom: their sum would leave some blocks with next to nothing. Solved by dynamic
    programming over the layers, on trade-offs thinned to about 0.1 % of the budget.

    Raises:
        StructureError: as for :func:`choose`; the message names the smallest network.
    """
    if (parameters is None) == (macs is None):
        raise StructureError("A network is chosen for one budget. Give parameters= or macs=, not both.")
    budget = parameters if macs is None else macs
    assert budget is not None
    by_parameters = macs is None
    fronts = [_front(a, b, budget, by_parameters, Bias(bias)) for a, b in itertools.pairwise(sizes)]
    total = [_Point(0, 0.0, ())]
    for front in fronts:
        made = [
            _Point(a.cost + b.cost, a.value + b.value, (*a.shapes, *b.shapes))
            for a in total
            for b in front
            if a.cost + b.cost <= budget
        ]
        total = _pruned(made, budget)
    if not total:
        unit = "parameters" if by_parameters else "multiply-adds"
        least = sum(
            min(_cost(one, by_parameters) for one in _singles(a, b, Bias(bias))) for a, b in itertools.pairwise(sizes)
        )
        raise StructureError(
            f"No Kronecker network of sizes {tuple(sizes)} has {budget} {unit} or less; the smallest has {least}. "
            "Use a larger budget, or smaller biases."
        )
    return list(max(total, key=lambda point: (point.value, -point.cost)).shapes)


@dataclass(frozen=True)
class _Point:
    """A choice for the first layers: what it costs, and the sum of the logarithms of degrees of freedom."""

    cost: int
    value: float
    shapes: tuple[BlockShape, ...]


def _singles(in_features: int, out_features: int, bias: Bias) -> Iterator[BlockShape]:
    """All blocks of one term."""
    inputs = factor_pairs(math.prod(padded_factors(in_features, 2)))
    outputs = factor_pairs(math.prod(padded_factors(out_features, 2)))
    for n in inputs:
        for m in outputs:
            for order in (LEFT, RIGHT):
                yield block_shape(in_features, out_features, in_shape=n, out_shape=m, order=order, bias=bias)


def _repeat(one: BlockShape, terms: int) -> BlockShape:
    return BlockShape(
        one.in_features, one.out_features, one.inputs, one.outputs, one.orders * terms, one.bias, one.activated
    )


def _cost(shape: BlockShape, by_parameters: bool) -> int:
    return shape.parameters if by_parameters else shape.macs


def _most_terms(one: BlockShape, budget: int, by_parameters: bool) -> int:
    fixed = one.outer_biases if by_parameters else 0
    each = _cost(one, by_parameters) - fixed
    useful = min(m * n for m, n in one.pairs)
    dense = max(1, one.dense_macs // one.weights)
    return max(0, min((budget - fixed) // each, useful, dense))


def _preference(shape: BlockShape) -> tuple[bool, int, float, int]:
    sizes = (*shape.inputs, *shape.outputs)
    uneven = max(sizes) / min(sizes)
    return (min(sizes) < 2 or uneven > MOST_UNEVEN, -shape.degrees_of_freedom, uneven, shape.macs)


def _front(in_features: int, out_features: int, budget: int, by_parameters: bool, bias: Bias) -> list[_Point]:
    """The best blocks of one layer at every cost."""
    points = []
    singles = list(_singles(in_features, out_features, bias))
    even = [one for one in singles if not _preference(one)[0]] or singles
    for one in even:
        most = _most_terms(one, budget, by_parameters)
        counts = sorted(
            {*range(1, min(most, 64) + 1), *(round(64 * 1.05**i) for i in range(200) if 64 * 1.05**i <= most)}
        )
        for terms in counts:
            shape = _repeat(one, terms)
            points.append(_Point(_cost(shape, by_parameters), math.log(shape.degrees_of_freedom), (shape,)))
    return _pruned(points, budget)


def _pruned(points: list[_Point], budget: int) -> list[_Point]:
    """Without what costs more and gives less, and thinned."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.value)):
        if not kept or point.value > kept[-1].value:
            kept.append(point)
    thin: dict[int, _Point] = {}
    for point in kept:  # the best of each bin of costs: the last one
        thin[point.cost * _POINTS // max(1, budget)] = point
    cheapest = kept[:1]
    return list(dict.fromkeys([*cheapest, *thin.values()]))

"""Widths of windows within a budget: the nearest real ones, and whole ones that use it up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.errors import BudgetError
from structmat.nn.windows import WindowedLinear


def soft_threshold(values: Tensor, amount: float | Tensor) -> Tensor:
    """``sign(x) max(|x| - amount, 0)``: the proximal map ``argmin_y amount |y| + (y - x)^2 / 2``, entry by entry."""
    return values.sign() * (values.abs() - amount).clamp(min=0.0)


def project_widths(
    widths: Sequence[Tensor],
    prices: Sequence[float],
    budget: float,
    floors: Sequence[float] = (),
    weights: Sequence[float] = (),
) -> list[Tensor]:
    """The nearest widths in [0, 1] with ``sum price * width <= budget``, by a weighted distance over all tensors.

    The solution shifts every width by ``mu * price / weight`` and clips: bisection on ``mu``. With ``floors`` each
    tensor keeps at least that cost (or what it had): its own shift is then smaller.

    Args:
        widths: one tensor a group, any shapes.
        prices: cost of a unit of width in each group.
        budget: of all together.
        floors: a cost for each group, 0 if not given.
        weights: of each group's squares in the distance, 1 if not given. Weights equal to the prices take the same
            share of a side from all widths.

    Raises:
        BudgetError: the floors exceed the budget.
    """
    floors = list(floors) if floors else [0.0] * len(widths)
    paces = [price / weight for price, weight in zip(prices, weights or [1.0] * len(widths), strict=True)]
    clipped = [w.detach().clamp(0.0, 1.0) for w in widths]
    lowest = [min(f, price * float(w.sum())) for f, price, w in zip(floors, prices, clipped, strict=True)]
    if sum(lowest) > budget:
        raise BudgetError(f"The floors of the layers hold {sum(lowest):.0f} numbers, the budget is {budget:.0f}.")

    def cost(index: int, mu: float) -> float:
        return prices[index] * float((clipped[index] - mu * paces[index]).clamp(min=0.0).sum())

    def total(mu: float) -> float:
        return sum(max(cost(i, mu), lowest[i]) for i in range(len(clipped)))

    if total(0.0) <= budget:
        return clipped
    mu = _bisect(total, budget, max(1.0 / p for p in paces))
    found = []
    for i, (w, pace) in enumerate(zip(clipped, paces, strict=True)):
        own = mu if cost(i, mu) >= lowest[i] else _bisect(lambda s, i=i: cost(i, s), lowest[i], mu, above=True)
        found.append((w - own * pace).clamp(min=0.0))
    return found


def raise_widths(
    widths: Sequence[Tensor],
    prices: Sequence[float],
    budget: float,
    tops: Sequence[float] = (),
    weights: Sequence[float] = (),
) -> list[Tensor]:
    """The nearest widths in [0, 1] with ``sum price * width >= budget`` where widths of 0 stay 0, as far as they can.

    Every other width rises by ``mu * price / weight``, up to 1: bisection on ``mu``. A group rises to its cost in
    ``tops`` at most. Without it gradients that ask for narrower windows would leave a part of the budget unused.

    Args:
        widths: one tensor a group, any shapes.
        prices: cost of a unit of width in each group.
        budget: of all together.
        tops: a cost for each group, none if not given.
        weights: of each group's squares in the distance, 1 if not given.
    """
    tops = list(tops) if tops else [math.inf] * len(widths)
    paces = [price / weight for price, weight in zip(prices, weights or [1.0] * len(widths), strict=True)]
    clipped = [w.detach().clamp(0.0, 1.0) for w in widths]

    def cost(index: int, mu: float) -> float:
        width = clipped[index]
        return prices[index] * float(torch.where(width > 0, width + mu * paces[index], width).clamp(max=1.0).sum())

    most = [max(top, cost(i, 0.0)) for i, top in enumerate(tops)]

    def missing(mu: float) -> float:
        return budget - sum(min(cost(i, mu), most[i]) for i in range(len(clipped)))

    if missing(0.0) <= 0:
        return clipped
    mu = _bisect(missing, 0.0, max(1.0 / p for p in paces), above=True)
    found = []
    for i, (width, pace) in enumerate(zip(clipped, paces, strict=True)):
        own = mu if cost(i, mu) <= most[i] else _bisect(lambda s, i=i: most[i] - cost(i, s), 0.0, mu, above=True)
        found.append(torch.where(width > 0, width + own * pace, width).clamp(max=1.0))
    return found


def _bisect(cost: Any, wanted: float, high: float, *, above: bool = False) -> float:
    """The shift at which a non-increasing cost reaches ``wanted``: at most that, or at least with ``above``."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > wanted else (low, middle)
    return low if above else high


def fit_exactly(layers: Sequence[WindowedLinear], budget: int) -> None:
    """Shrink the windows of the layers so that they hold at most ``budget`` numbers, and as many as fit, in place.

    All widths lose the same number of places, found by bisection on the true count; what is then left is given back to
    single widths, those first that were nearest to keeping a place.
    """
    sizes = [torch.tensor(layer.sizes, dtype=torch.float64)[:, None] for layer in layers]
    real = [layer.widths.detach().double() * size for layer, size in zip(layers, sizes, strict=True)]

    def count(places: Sequence[Tensor]) -> int:
        return sum(int((p * (p > 0).all(0)).sum()) for p in places)

    def cut(mu: float) -> list[Tensor]:
        return [
            (r - mu * size / size.max()).round().clamp(min=0.0).minimum(size)
            for r, size in zip(real, sizes, strict=True)
        ]

    places = cut(0.0)
    if count(places) > budget:
        mu = _bisect(lambda s: count(cut(s)), float(budget), max(float(size.max()) for size in sizes) * 2)
        low, places = cut(max(0.0, mu - 1.0)), cut(mu)
        left = budget - count(places)
        wishes = []
        for at, (own, more, r) in enumerate(zip(places, low, real, strict=True)):
            grows = torch.nonzero((more > own) & (own > 0).all(0))
            values = (r - own)[grows[:, 0], grows[:, 1]].tolist()
            wishes += [(-value, at, *where) for value, where in zip(values, grows.tolist(), strict=True)]
        for _, at, side, k in sorted(wishes)[: max(0, left)]:
            places[at][side, k] += 1
        _top_up(places, sizes, max(0, left - len(wishes)))
    elif sum(float(r.sum()) for r in real) > 0.95 * budget:  # at the budget, but for rounding
        _top_up(places, sizes, budget - count(places))
    for layer, own, size in zip(layers, places, sizes, strict=True):
        layer.widths.copy_((own / size).to(layer.widths))


def _top_up(places: Sequence[Tensor], sizes: Sequence[Tensor], left: int) -> None:
    """Where a whole term had to go, its numbers go to the windows that are left, the widest first, one place each."""
    while left > 0:
        open_ = [
            (-float(own[side, k] / size[side, 0]), at, side, k)
            for at, (own, size) in enumerate(zip(places, sizes, strict=True))
            for side, k in torch.nonzero((own > 0).all(0) & (own < size)).tolist()
        ]
        if not open_:
            return
        for _, at, side, k in sorted(open_)[:left]:
            places[at][side, k] += 1
        left -= min(left, len(open_))

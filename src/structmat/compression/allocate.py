"""One candidate for each layer: the least loss within the budget."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from structmat.compression.budget import Budget, Memory, Parameters, limit
from structmat.compression.candidates import Candidate, LayerScreen, Screening
from structmat.compression.quiet import without_lines
from structmat.errors import BudgetError
from structmat.structure import Shape, Structure, resolve
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

SECONDS = 20.0
"""Time that the solver may take; then its best solution is used, and said to be inexact."""


@dataclass(frozen=True)
class Limit:
    """At most so much of something, over some layers.

    Args:
        budget: what the user asked for.
        most: the most that may be spent.
        dense: what the layers cost when dense.
        spend: the cost of a layer (by its site's name) that becomes a candidate; 0 for layers that do not count.
        pattern: glob pattern of the layers that count, for messages; "" for all.
        beside: what is spent whatever is chosen, such as bytes of what is not compressed; part of ``dense`` and of
            ``most``.
    """

    budget: Budget | Memory
    most: float
    dense: float
    spend: Callable[[str, Candidate], float]
    pattern: str = ""
    beside: float = 0.0

    @property
    def unit(self) -> str:
        """What is counted, and of which layers."""
        return self.budget.unit + (f" of {self.pattern}" if self.pattern else "")


def whole(screening: Screening, budget: Budget) -> Limit:
    """The limit of one budget for all layers of a screening in its unit."""
    dense = sum(layer.keep.cost for layer in screening.values())
    return Limit(budget, limit(budget, dense), dense, lambda _, candidate: candidate.cost)


@dataclass(frozen=True)
class Spent:
    """What became of one limit: ``cost`` of at most ``most`` is spent; dense, all would cost ``dense``."""

    limit: Limit
    cost: float

    @property
    def left(self) -> float:
        """What is not spent."""
        return self.limit.most - self.cost


@dataclass(frozen=True)
class Allocation:
    """The chosen candidates.

    Args:
        chosen: by the sites' names.
        spent: of every limit, in their order.
        loss: the sum of the chosen candidates' losses.
        bound: no choice within the budget has a smaller sum (equal to ``loss`` but for the solver's tolerance).
        exact: whether the solver proved the choice optimal.
    """

    chosen: Mapping[str, Candidate]
    spent: tuple[Spent, ...]
    loss: float
    bound: float
    exact: bool

    @property
    def cost(self) -> float:
        """Of all chosen together, in the unit of the first limit."""
        return self.spent[0].cost

    @property
    def limit(self) -> float:
        """The most that could be spent, by the first limit."""
        return self.spent[0].limit.most

    @property
    def dense_cost(self) -> float:
        """What the dense layers cost, in the unit of the first limit."""
        return self.spent[0].limit.dense

    def left(self, name: str) -> float:
        """How much more one layer could cost, in the unit of its candidates' cost: the least that any limit leaves,
        where the layer's cost in the limit's unit grows in proportion."""
        chosen = self.chosen[name]
        found = math.inf
        for spent in self.spent:
            own = spent.limit.spend(name, chosen)
            if own > 0:
                found = min(found, spent.left * chosen.cost / own)
        return max(0.0, found)


def allocate(
    screening: Screening,
    budget: Budget | Sequence[Limit],
    *,
    fixed: Mapping[str, Structure] | None = None,
    floor: float = 0.0,
) -> Allocation:
    """Solve the multiple-choice knapsack: one candidate a layer, least summed loss, every limit kept.

    By the branch-and-bound solver HiGHS (``scipy.optimize.milp``; Huangfu and Hall 2018) on what is left after
    candidates that another of the same layer beats in every respect are dropped. No limit is ever exceeded.

    Args:
        screening: candidates with losses.
        budget: one budget, in the unit of the candidates' cost, for all layers; a fraction refers to the dense cost of
            all layers of the screening, fixed ones too. Or any number of limits, which are all kept.
        fixed: structures of layers that are not chosen freely; each must be among the layer's candidates.
        floor: candidates below this share of their layer's dense cost are not considered.

    Raises:
        BudgetError: even the cheapest choice exceeds a budget, or no choice keeps all of them; the message names the
            smallest feasible one.
    """
    layers = list(screening.values())
    limits = (whole(screening, budget),) if isinstance(budget, Budget) else tuple(budget)
    assert limits, "an allocation without a limit keeps every layer: there is nothing to solve"
    menus = [_menu(layer, limits, (fixed or {}).get(layer.name), floor) for layer in layers]
    for number, one in enumerate(limits):
        _check_feasible(one, sum(min(item.costs[number] for item in menu) for menu in menus))
    most = np.array([one.most - one.beside for one in limits])
    items, bound, exact = _solve(menus, most, limits)
    costs = _total(items)
    assert bool((costs <= most * (1 + 1e-12)).all()), f"spent {costs} of {most}"
    by_name = {layer.name: item.candidate for layer, item in zip(layers, items, strict=True)}
    spent = tuple(Spent(one, float(cost) + one.beside) for one, cost in zip(limits, costs, strict=True))
    loss = sum(item.candidate.loss for item in items)
    return Allocation(by_name, spent, loss, min(bound, loss), exact)


@dataclass(frozen=True)
class _Item:
    """A candidate and what it costs under every limit."""

    candidate: Candidate
    costs: tuple[float, ...]

    @property
    def loss(self) -> float:
        return self.candidate.loss


_Menus = Sequence[Sequence[_Item]]


def _total(items: Sequence[_Item]) -> np.ndarray:
    # Summed one by one, as everybody who adds up the costs of a plan does.
    return np.array([sum(column) for column in zip(*(item.costs for item in items), strict=True)])


def _check_feasible(one: Limit, least: float) -> None:
    if least + one.beside <= one.most * (1 + 1e-12):
        return
    needed, name = least + one.beside, type(one.budget).__name__
    share = f", {needed / one.dense:.4f} of the dense layers" if one.dense and not one.beside else ""
    beside = f" (with {one.beside:.6g} of what is not compressed)" if one.beside else ""
    remedy = (
        f"{name}({math.ceil(needed / one.dense * 1e4) / 1e4:.4f})"
        if isinstance(one.budget.amount, float) and needed < one.dense
        else f"{name}({math.ceil(needed)})"
    )
    raise BudgetError(
        f"The budget of {one.most:.6g} {one.unit} can't be met: the cheapest candidates take {needed:.6g}{share}"
        f"{beside}. Use {remedy} or more, allow more structures{', or compress more layers' if beside else ''}."
    )


def _menu(layer: LayerScreen, limits: Sequence[Limit], fixed: Structure | None, floor: float) -> list[_Item]:
    """The candidates that may be chosen, without those that another beats in every respect."""
    allowed = [c for c in layer.candidates if isinstance(c.structure, Dense) or c.cost >= floor * layer.keep.cost]
    if fixed is not None:
        wanted = resolve(fixed, layer.shape)
        allowed = [c for c in layer.candidates if c.structure == wanted][:1]
        if not allowed:
            raise BudgetError(
                f"{layer.name} is to become {wanted}, which is not among its {len(layer.candidates)} candidates. "
                f"Screen the layer with this override."
            )
    items = [_Item(c, tuple(one.spend(layer.name, c) for one in limits)) for c in allowed]
    frontier: list[_Item] = []
    for item in sorted(items, key=lambda item: (item.costs, item.loss)):
        beaten = any(
            other.loss <= item.loss and all(a <= b for a, b in zip(other.costs, item.costs, strict=True))
            for other in (frontier[-1:] if len(limits) == 1 else frontier)
        )
        if not beaten:
            frontier.append(item)
    return frontier


def _solve(menus: _Menus, most: np.ndarray, limits: Sequence[Limit]) -> tuple[list[_Item], float, bool]:
    """The best choice, a lower bound on the loss, and whether the two were proved to agree."""
    richest = [min(menu, key=lambda item: (item.loss, item.costs)) for menu in menus]
    if bool((_total(richest) <= most).all()):
        return richest, sum(item.loss for item in richest), True
    cheapest = _within_reach(menus, most, limits)
    # The solver's tolerances are absolute. A first pass finds the size of the optimum; the second is scaled by it, and
    # candidates that alone cost more loss than the first solution can't be in a better one.
    worst = max(item.loss for menu in menus for item in menu)
    rough, _, _ = _milp(menus, most, 1e6 / worst, 1e-3, cheapest)
    found = sum(item.loss for item in rough)
    if found == 0.0:
        return rough, 0.0, True
    fewer = [[item for item in menu if item.loss <= found] for menu in menus]
    best, bound, exact = _milp(fewer, most, 1e4 / found, 0.0, cheapest)
    return (best, bound, exact) if sum(item.loss for item in best) <= found else (rough, bound, False)


def _within_reach(menus: _Menus, most: np.ndarray, limits: Sequence[Limit]) -> list[_Item]:
    """A choice that keeps every limit.

    Raises:
        BudgetError: there is none, though each limit alone can be kept; says by how much all of them must grow.
    """
    if len(most) == 1:
        return [min(menu, key=lambda item: item.costs) for menu in menus]
    # The smallest t such that some choice costs at most t times every limit.
    items, one_each = _columns(menus)
    costs = np.array([item.costs for item in items]).T / most[:, None]
    rows = scipy.sparse.hstack([one_each, scipy.sparse.csr_array((len(menus), 1))])
    within = np.hstack([costs, -np.ones((len(most), 1))])
    result = _solved(
        np.append(np.zeros(len(items)), 1.0),
        constraints=[LinearConstraint(rows, 1, 1), LinearConstraint(within, -np.inf, 0.0)],
        integrality=np.append(np.ones(len(items)), 0),
        bounds=Bounds(0, np.append(np.ones(len(items)), np.inf)),
        options={"time_limit": SECONDS},
    )
    chosen = _chosen(menus, result.x) if result.x is not None else None
    if chosen is not None and bool((_total(chosen) <= most).all()):
        return chosen
    factor = float((_total(chosen) / most).max()) if chosen is not None else math.inf
    names = ", ".join(f"{one.most:.6g} {one.unit}" for one in limits)
    remedy = f"Raise each of them to {factor:.4f} of what it is" if chosen is not None else "Raise one of them"
    raise BudgetError(
        f"No choice was found that keeps all budgets at once ({names}), though each alone can be met. {remedy}, or "
        f"allow more structures."
    )


def _solved(*given: Any, **options: Any) -> Any:
    """``scipy.optimize.milp`` without a line that HiGHS writes, even where it is told to be silent (jump-dev/HiGHS.jl,
    issue 312)."""
    with without_lines(b"HighsMipSolverData::"):
        return milp(*given, **options)


def _columns(menus: _Menus) -> tuple[list[_Item], scipy.sparse.csr_array]:
    """All items in a row, and the matrix that says to which layer each belongs."""
    items = [item for menu in menus for item in menu]
    rows = np.repeat(np.arange(len(menus)), [len(menu) for menu in menus])
    shape = (len(menus), len(items))
    return items, scipy.sparse.csr_array((np.ones(len(items)), (rows, np.arange(len(items)))), shape=shape)


def _chosen(menus: _Menus, x: np.ndarray) -> list[_Item]:
    chosen, start = [], 0
    for menu in menus:
        chosen.append(menu[int(np.argmax(x[start : start + len(menu)]))])
        start += len(menu)
    return chosen


def _milp(
    menus: _Menus, most: np.ndarray, scale: float, gap: float, otherwise: list[_Item]
) -> tuple[list[_Item], float, bool]:
    items, one_each = _columns(menus)
    losses = np.array([item.loss for item in items]) * scale
    costs = np.array([item.costs for item in items]).T / most[:, None]
    room = 1.0
    while True:
        result = _solved(
            losses,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, room)],
            integrality=np.ones(len(items)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": SECONDS},
        )
        if result.x is None:
            # Feasible by what was checked before, so only the tightened room or the time limit ends here.
            logger.warning("The solver stopped without a solution: %s", result.message)
            return otherwise, 0.0, False
        chosen = _chosen(menus, result.x)
        if bool((_total(chosen) <= most).all()):
            bound = result.mip_dual_bound / scale if result.mip_dual_bound is not None else 0.0
            return chosen, float(bound), result.status == 0
        room -= 1e-7  # the solver's tolerance let it exceed the budget by rounding


# ------------------------------------------------------------------------------------------------ prices


def curve(
    screening: Screening, *, fixed: Mapping[str, Structure] | None = None, floor: float = 0.0
) -> list[Mapping[str, Candidate]]:
    """Choices from the cheapest to the richest, each the best of all that cost no more, in the candidates' unit.

    For a price of a unit of cost, each layer takes the candidate of the least loss plus price times cost: the choice is
    optimal for what it spends (Everett 1963). Lowering the price visits the lower convex hull of each layer's
    candidates, so that all choices are found by sorting the hulls' slopes. Neighbours differ in one layer.
    """
    layers = list(screening.values())
    one = (whole(screening, Parameters(0.5)),)  # only its costs are used
    hulls = [_hull(_menu(layer, one, (fixed or {}).get(layer.name), floor)) for layer in layers]
    steps = sorted(
        (
            ((after.loss - before.loss) / (after.costs[0] - before.costs[0]), number, after.candidate)
            for number, hull in enumerate(hulls)
            for before, after in itertools.pairwise(hull)
        ),
        key=lambda step: step[:2],
    )
    chosen = {layer.name: hull[0].candidate for layer, hull in zip(layers, hulls, strict=True)}
    found: list[Mapping[str, Candidate]] = [dict(chosen)]
    for _, number, candidate in steps:
        chosen[layers[number].name] = candidate
        found.append(dict(chosen))
    return found


def _hull(menu: Sequence[_Item]) -> list[_Item]:
    """The lower convex hull of a menu that rises in cost and falls in loss."""
    hull: list[_Item] = []
    for item in menu:
        while len(hull) > 1:
            (a, b), c = hull[-2:], item
            # b lies on or above the line from a to c
            if (b.loss - a.loss) * (c.costs[0] - a.costs[0]) >= (c.loss - a.loss) * (b.costs[0] - a.costs[0]):
                hull.pop()
            else:
                break
        hull.append(item)
    return hull


# ------------------------------------------------------------------------------------------ closed form, low rank


def water_filling(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    most: int,
    weights: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Ranks of truncated singular value decompositions under one budget of parameters, in closed form.

    Singular values are kept in decreasing order of ``w s**2 / (out + in)`` until the budget is spent: optimal for a sum
    of weighted squared errors, since each layer's gains never increase. Equal gains are kept or dropped together, so
    that equal layers get equal ranks.

    Args:
        spectra: singular values of each layer, in its norm, decreasing.
        shapes: ``(out, in)`` of each layer.
        most: parameters to spend; a rank costs ``out + in``.
        weights: how much each layer's squared error counts; 1 by default.
    """
    gains = sorted(
        (
            (-(weights or {}).get(name, 1.0) * float(s) ** 2 / sum(shapes[name]), name)
            for name, values in spectra.items()
            for s in values
        ),
        key=lambda pair: pair[0],
    )
    ranks = dict.fromkeys(spectra, 0)
    closed: set[str] = set()
    spent = start = 0
    while start < len(gains):
        end = start
        while end < len(gains) and gains[end][0] == gains[start][0]:
            end += 1
        group = [name for gain, name in gains[start:end] if gain < 0 and name not in closed]
        price = sum(sum(shapes[name]) for name in group)
        if spent + price <= most:
            spent += price
            for name in group:
                ranks[name] += 1
        else:
            closed.update(group)
        start = end
    return ranks

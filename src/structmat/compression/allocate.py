"""One candidate for each layer: the least loss within the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from structmat.compression.budget import Budget, limit
from structmat.compression.candidates import Candidate, LayerScreen, Screening
from structmat.errors import BudgetError
from structmat.structure import Shape, Structure, resolve
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

SECONDS = 20.0
"""Time that the solver may take; then its best solution is used, and said to be inexact."""


@dataclass(frozen=True)
class Allocation:
    """The chosen candidates.

    Args:
        chosen: by the sites' names.
        cost: of all chosen together, in the budget's unit.
        limit: the most that could be spent.
        dense_cost: what the dense layers cost.
        loss: the sum of the chosen candidates' losses.
        bound: no choice within the budget has a smaller sum (equal to ``loss`` but for the solver's tolerance).
        exact: whether the solver proved the choice optimal.
    """

    chosen: Mapping[str, Candidate]
    cost: float
    limit: float
    dense_cost: float
    loss: float
    bound: float
    exact: bool


def allocate(
    screening: Screening,
    budget: Budget,
    *,
    fixed: Mapping[str, Structure] | None = None,
    floor: float = 0.0,
) -> Allocation:
    """Solve the multiple-choice knapsack: one candidate a layer, least summed loss, cost within the budget.

    By the branch-and-bound solver HiGHS (``scipy.optimize.milp``; Huangfu and Hall 2018) on what is left after
    candidates that another of the same layer beats in both respects are dropped. The budget is never exceeded.

    Args:
        screening: candidates with losses.
        budget: a fraction refers to the dense cost of all layers of the screening, fixed ones too.
        fixed: structures of layers that are not chosen freely; each must be among the layer's candidates.
        floor: candidates below this share of their layer's dense cost are not considered.

    Raises:
        BudgetError: even the cheapest choice exceeds the budget; the message names the smallest feasible one.
    """
    layers = list(screening.values())
    dense = sum(layer.keep.cost for layer in layers)
    most = limit(budget, dense)
    menus = [_menu(layer, (fixed or {}).get(layer.name), floor) for layer in layers]
    least = sum(min(c.cost for c in menu) for menu in menus)
    if least > most * (1 + 1e-12):
        share = f", {least / dense:.4f} of the dense layers" if dense else ""
        remedy = (
            f"{type(budget).__name__}({math.ceil(least / dense * 1e4) / 1e4:.4f})"
            if isinstance(budget.amount, float) and least < dense
            else f"{type(budget).__name__}({math.ceil(least)})"
        )
        raise BudgetError(
            f"The budget of {most:.6g} {budget.unit} can't be met: the cheapest candidates take {least:.6g}{share}. "
            f"Use {remedy} or more, or allow more structures."
        )
    chosen, bound, exact = _solve(menus, most)
    spent, loss = sum(c.cost for c in chosen), sum(c.loss for c in chosen)
    assert spent <= most * (1 + 1e-12), f"spent {spent} of {most}"
    by_name = {layer.name: candidate for layer, candidate in zip(layers, chosen, strict=True)}
    return Allocation(by_name, spent, most, dense, loss, min(bound, loss), exact)


def _menu(layer: LayerScreen, fixed: Structure | None, floor: float) -> list[Candidate]:
    """The candidates that may be chosen, without those that another beats in both respects."""
    if fixed is not None:
        wanted = resolve(fixed, layer.shape)
        found = [c for c in layer.candidates if c.structure == wanted]
        if not found:
            raise BudgetError(
                f"{layer.name} is to become {wanted}, which is not among its {len(layer.candidates)} candidates. "
                f"Screen the layer with this override."
            )
        return found
    allowed = [c for c in layer.candidates if isinstance(c.structure, Dense) or c.cost >= floor * layer.keep.cost]
    frontier: list[Candidate] = []
    for candidate in sorted(allowed, key=lambda c: (c.cost, c.loss)):
        if not frontier or candidate.loss < frontier[-1].loss:
            frontier.append(candidate)
    return frontier


def _solve(menus: Sequence[Sequence[Candidate]], most: float) -> tuple[list[Candidate], float, bool]:
    """The best choice, a lower bound on the loss, and whether the two were proved to agree."""
    richest = [min(menu, key=lambda c: (c.loss, c.cost)) for menu in menus]
    if sum(c.cost for c in richest) <= most:
        return richest, sum(c.loss for c in richest), True
    # The solver's tolerances are absolute. A first pass finds the size of the optimum; the second is scaled by it, and
    # candidates that alone cost more loss than the first solution can't be in a better one.
    worst = max(c.loss for menu in menus for c in menu)
    rough, _, _ = _milp(menus, most, 1e6 / worst, gap=1e-3)
    found = sum(c.loss for c in rough)
    if found == 0.0:
        return rough, 0.0, True
    fewer = [[c for c in menu if c.loss <= found] for menu in menus]
    best, bound, exact = _milp(fewer, most, 1e4 / found, gap=0.0)
    return (best, bound, exact) if sum(c.loss for c in best) <= found else (rough, bound, False)


def _milp(
    menus: Sequence[Sequence[Candidate]], most: float, scale: float, gap: float
) -> tuple[list[Candidate], float, bool]:
    items = [c for menu in menus for c in menu]
    losses = np.array([c.loss for c in items]) * scale
    costs = np.array([c.cost for c in items]) / most
    rows = np.repeat(np.arange(len(menus)), [len(menu) for menu in menus])
    columns = np.arange(len(items))
    one_each = scipy.sparse.csr_array((np.ones(len(items)), (rows, columns)), shape=(len(menus), len(items)))
    room = 1.0
    while True:
        result = milp(
            losses,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None], -np.inf, room)],
            integrality=np.ones(len(items)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": SECONDS},
        )
        if result.x is None:
            # Feasible by what was checked before, so only the tightened room or the time limit ends here.
            logger.warning("The solver stopped without a solution: %s", result.message)
            return [min(menu, key=lambda c: c.cost) for menu in menus], 0.0, False
        chosen = []
        start = 0
        for menu in menus:
            chosen.append(menu[int(np.argmax(result.x[start : start + len(menu)]))])
            start += len(menu)
        if sum(c.cost for c in chosen) <= most:
            bound = result.mip_dual_bound / scale if result.mip_dual_bound is not None else 0.0
            return chosen, float(bound), result.status == 0
        room -= 1e-7  # the solver's tolerance let it exceed the budget by rounding


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

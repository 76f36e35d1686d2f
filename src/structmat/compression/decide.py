"""From goals to one choice, and the curve beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structmat.compression import budget as budgets
from structmat.compression.allocate import Allocation, Limit, allocate, curve, whole
from structmat.compression.budget import Quality
from structmat.compression.build import Builder, Built
from structmat.compression.candidates import Candidate, Screening, with_losses
from structmat.compression.choose import Chooser
from structmat.compression.confirm import confirm
from structmat.compression.figures import Clock
from structmat.compression.frontier import ANCHORS, Point, merged, point_of, predicted
from structmat.compression.goals import Goals
from structmat.compression.limits import limits_of
from structmat.compression.plan import Plan
from structmat.compression.scan import Site
from structmat.compression.seek import Judge, Size, Tried, judge_of, seek
from structmat.errors import BudgetError

APART = 1.5
"""What a contest found is good enough for costs within this factor."""


@dataclass(frozen=True)
class Decision:
    """What was decided, and how.

    Args:
        chooser: what was chosen from, after contests.
        limits: that were kept, but for the size that was sought for a quality.
        screening, allocation: the choice.
        tried: models that were built in search of a quality.
        judge: of that quality.
        built: the accepted model, if it was built now and not read from the folder.
        quality: of the accepted model.
        points: of the frontier, of what was tried.
    """

    chooser: Chooser
    limits: tuple[Limit, ...]
    screening: Screening
    allocation: Allocation
    tried: tuple[Tried, ...] = ()
    judge: Judge | None = None
    built: Built | None = None
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    points: tuple[Point, ...] = ()


def decide(chooser: Chooser, goals: Goals, builder: Builder, before: Mapping[str, float], clock: Clock) -> Decision:
    """The choice that the goals ask for.

    Args:
        chooser: what is chosen from.
        goals: as they were read.
        builder: for models that are tried.
        before: the original's quality, where one is to be kept.
        clock: that counts the steps.

    Raises:
        BudgetError: the goals can't be met.
        DataError: what ``evaluate`` says contradicts the direction that was given.
    """
    limits = limits_of(goals, chooser.sites, chooser.screening, chooser.seen, chooser.model)
    if goals.quality is not None:
        return _smallest(chooser, goals, goals.quality, limits, builder, before, clock)
    with clock("allocate"):
        allocation = chooser.allocated(limits)
    with clock("contest"):
        chooser = chooser.contested(allocation)
    with clock("confirm"):
        chooser, screening, allocation = confirm(chooser, limits)
    return Decision(chooser, limits, screening, allocation)


def _smallest(
    chooser: Chooser,
    goals: Goals,
    quality: Quality,
    limits: tuple[Limit, ...],
    builder: Builder,
    before: Mapping[str, float],
    clock: Clock,
) -> Decision:
    """The smallest choice whose model is accepted."""
    judge = judge_of(quality, before)
    with clock("contest"):
        chooser = _contested(chooser, ANCHORS)
    with clock("confirm"):
        chooser = _confirmed(chooser, ANCHORS)
    losses, sites = chooser.losses(), chooser.sites
    full = whole(losses, quality.spends)
    along = curve(losses, fixed=chooser.fixed, floor=chooser.floor)
    sizes = [(_sum(chosen, "cost"), _sum(chosen, "loss")) for chosen in along]
    if limits:  # the least cost within the other limits: costs in the place of losses
        as_losses = {n: with_losses(layer, [c.cost for c in layer.candidates]) for n, layer in losses.items()}
        least = allocate(as_losses, limits, fixed=chooser.fixed, floor=chooser.floor).loss
        sizes = [(least, sizes[0][1]), *(pair for pair in sizes if pair[0] > least)]
    made: dict[str, tuple[Screening, Allocation]] = {}
    held: dict[str, Built] = {}
    tried: list[Tried] = []

    def size(within: float) -> Size:
        most = max(within, sizes[0][0])
        screening, allocation = chooser.filled((dataclasses.replace(full, most=most), *limits))
        key = builder.key(plan_of(allocation.chosen, sites, goals, chooser.seed))
        made[key] = screening, allocation
        return Size(allocation.cost, allocation.loss, key)

    def attempt(chosen: Size) -> Mapping[str, float]:
        # Models are large: of those before only the one that may be the result is held.
        best = _best(tried)
        for key in [k for k in held if best is None or k != best.key]:
            del held[key]
        plan = plan_of(made[chosen.key][1].chosen, sites, goals, chooser.seed)
        found = builder.quality(plan, recovered=True)
        if builder.last is not None:
            held[chosen.key] = builder.last
        return found

    with clock("seek"):
        judge, cost = seek(
            judge, sizes, size, attempt, tried, dense_is_allowed=all(one.dense <= one.most for one in limits)
        )
        best = _best(tried)
        screening, allocation = made[size(cost).key if best is None else best.key]
    points = tuple(point_of(made[t.key][1].chosen, sites, chooser, full.dense, t.quality) for t in tried)
    return Decision(
        chooser,
        limits,
        screening,
        allocation,
        tuple(tried),
        judge,
        held.get(best.key) if best is not None else None,
        best.quality if best is not None else before,
        points,
    )


def _best(tried: Sequence[Tried]) -> Tried | None:
    return min((t for t in tried if t.accepted), key=lambda t: t.cost, default=None)


def _sum(chosen: Mapping[str, Candidate], what: str) -> float:
    return float(sum(getattr(candidate, what) for candidate in chosen.values()))


def _contested(chooser: Chooser, shares: Sequence[float]) -> Chooser:
    """After contests at several shares of the dense cost, one after the other, where there was none near."""
    for share in shares:
        one = whole(chooser.losses(), chooser.unit)
        if any(cost / APART <= share * one.dense <= cost * APART for cost in chooser.fought):
            continue
        try:
            allocation = chooser.allocated((dataclasses.replace(one, most=share * one.dense),))
        except BudgetError:  # what is fixed, or a floor, takes more
            continue
        chooser = chooser.contested(allocation)
    return chooser


def _confirmed(chooser: Chooser, shares: Sequence[float]) -> Chooser:
    """After measuring what is chosen at several shares of the dense cost."""
    for share in shares:
        one = whole(chooser.losses(), chooser.unit)
        try:
            chooser, _, _ = confirm(chooser, (dataclasses.replace(one, most=share * one.dense),))
        except BudgetError:  # as above
            continue
    return chooser


def frontier_of(decision: Decision, builder: Builder, shares: Sequence[float]) -> tuple[Point, ...]:
    """The curve, measured where a quality was sought and at some shares of the dense cost.

    Raises:
        BudgetError: a share can't be met.
    """
    chooser, found = decision.chooser, list(decision.points)
    if shares:
        chooser = _contested(chooser, [a for a in ANCHORS if any(a / 2 <= share <= 2 * a for share in shares)])
    one = whole(chooser.losses(), chooser.unit)
    for share in shares:
        chosen = chooser.allocated((dataclasses.replace(one, most=share * one.dense),)).chosen
        point = point_of(chosen, chooser.sites, chooser, one.dense)
        found.append(dataclasses.replace(point, quality=builder.quality(point.plan, recovered=False)))
    return merged(predicted(chooser, chooser.sites, one.dense), found)


def with_result(
    points: Sequence[Point], decision: Decision, allocation: Allocation, quality: Mapping[str, float] | None
) -> tuple[Point, ...]:
    """The curve with the size of the result, and its quality if it is known."""
    chooser = decision.chooser
    dense = sum(layer.keep.cost for layer in decision.screening.values())
    own = point_of(allocation.chosen, chooser.sites, chooser, dense, quality)
    return merged(points, (dataclasses.replace(own, chosen=True),))


def plan_of(chosen: Mapping[str, Candidate], sites: Sequence[Site], goals: Goals, seed: int) -> Plan:
    """The plan of a choice."""
    layers = {name: candidate.structure for name, candidate in chosen.items()}
    return Plan(layers, {site.name: site.shape for site in sites}, goals.simplest, seed)


def budget_facts(goals: Goals, allocation: Allocation, judge: Judge | None) -> dict[str, Any]:
    """What was asked for and spent, for the report: of the first limit, and of each where there are several."""
    first = goals.quality if goals.quality is not None else goals.limits[0][0]
    facts: dict[str, Any] = budgets.to_json(first)
    limits = [
        {
            **budgets.to_json(one.limit.budget),
            "layers": one.limit.pattern,
            "unit": one.limit.unit,
            "limit": one.limit.most,
            "spent": one.cost,
            "dense": one.limit.dense,
        }
        for one in allocation.spent
    ]
    facts |= {name: limits[0][name] for name in ("unit", "limit", "spent", "dense")}
    if judge is not None:
        facts |= {"of": judge.name, "before": judge.before, "better": judge.better, "allowed": judge.allowed}
        limits = limits[1:]
    if judge is not None or len(limits) > 1:
        facts["goals"] = limits
    return facts

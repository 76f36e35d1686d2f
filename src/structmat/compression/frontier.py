"""The whole curve of quality against size, from one screening."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structmat.compression.allocate import curve
from structmat.compression.candidates import Candidate
from structmat.compression.choose import Chooser
from structmat.compression.plan import Plan
from structmat.compression.scan import Site
from structmat.structure import Structure

POINTS = 24
"""Of the predicted curve, evenly in the logarithm of the cost."""

ANCHORS = (0.5, 0.2)
"""Shares at which contests are held for choices at any size: what they find holds for costs within a factor of 2."""


@dataclass(frozen=True)
class Point:
    """One size that the model could have.

    Args:
        cost: of the compressible layers, in the unit of the budget.
        share: of what they cost when dense.
        predicted_loss: the sum over the layers.
        plan: that makes it: ``compress(model, plan=point.plan, ...)``; with the same folder what is fitted already is
            read from there.
        quality: what ``evaluate`` returned, where the model was built (before recovery, but for models that were tried
            for a quality); else None.
        chosen: whether it is the size of the result.
    """

    cost: float
    share: float
    predicted_loss: float
    plan: Plan
    quality: Mapping[str, float] | None = None
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values without the plan."""
        return {
            "cost": self.cost,
            "share": self.share,
            "predicted_loss": self.predicted_loss,
            "quality": None if self.quality is None else dict(self.quality),
            "chosen": self.chosen,
        }


def predicted(chooser: Chooser, sites: Sequence[Site], dense: float) -> tuple[Point, ...]:
    """At most ``POINTS`` choices from the smallest to the dense model, each the best of all that cost no more.

    Cost: sorting the candidates. Layers that are fixed are so in all of them; limits on other units do not count.
    """
    found = curve(chooser.losses(), fixed=chooser.fixed, floor=chooser.floor)
    costs = [sum(c.cost for c in chosen.values()) for chosen in found]
    low, high = math.log(costs[0]), math.log(costs[-1])
    wanted = [math.exp(low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)] if high > low else [costs[0]]
    nearest = sorted({min(range(len(costs)), key=lambda i: abs(costs[i] - w)) for w in wanted})
    return tuple(point_of(found[i], sites, chooser, dense) for i in nearest)


def point_of(
    chosen: Mapping[str, Candidate],
    sites: Sequence[Site],
    chooser: Chooser,
    dense: float,
    quality: Mapping[str, float] | None = None,
) -> Point:
    """The point of a choice."""
    layers = {name: candidate.structure for name, candidate in chosen.items()}
    plan = Plan(layers, {site.name: site.shape for site in sites}, None, chooser.seed)
    cost = sum(c.cost for c in chosen.values())
    return Point(cost, cost / dense, sum(c.loss for c in chosen.values()), plan, quality)


def merged(points: Sequence[Point], known: Sequence[Point]) -> tuple[Point, ...]:
    """All points by rising cost, one of each plan: what is known better takes the place of others, the last first."""
    found = {_key(point): point for point in (*points, *known)}
    return tuple(sorted(found.values(), key=lambda p: (p.cost, p.predicted_loss)))


def _key(point: Point) -> frozenset[tuple[str, Structure]]:
    return frozenset(point.plan.layers.items())


def write_plans(points: Sequence[Point], folder: Path) -> None:
    """Write the plan of every point into a folder, in place of those that are there: ``00.json`` is the smallest."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9].json"):
        old.unlink()
    for number, point in enumerate(points):
        point.plan.write(folder / f"{number:02d}.json")

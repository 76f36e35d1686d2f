"""From a screening to a choice: allocate, contest, fill; for one set of limits or for many."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from structmat.compression.allocate import Allocation, Limit, allocate
from structmat.compression.budget import Budget
from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import Candidate, Kind, Screening, Variant, with_losses
from structmat.compression.contest import Outcome, contest
from structmat.compression.effects import Effects
from structmat.compression.fill import fill
from structmat.compression.scan import Site
from structmat.compression.score import Measurement, corrected
from structmat.compression.workfolder import WorkFolder
from structmat.structure import Structure


class Check(NamedTuple):
    """One member of a family in the place of a layer, measured: what it costs, and by what its loss is to be multiplied
    so that it is what was found."""

    cost: float
    factor: float


@dataclass(frozen=True)
class Chooser:
    """All that choices are made from.

    Args:
        model: with its layers as they were; read only.
        sites: the layers.
        screening: with the quadratic predictions of the loss, not corrected ones.
        measured: what :func:`structmat.compression.score.score` measured.
        unit: in which candidates' costs are stated.
        seen: calibration.
        kinds: what each layer may try, by the sites' names.
        fixed, floor, sweeps, seed: as for :func:`structmat.compress`.
        work, key: where finished work is kept, and the digest of what all of it depends on.
        progress: show progress bars.
        outcomes: of contests so far.
        effects: for measuring further layers; None where nothing is measured.
        factors: by which the losses of a layer's candidates of one family are multiplied; 1 where none is given.
        checks: further factors, of members that were measured, by rising cost.
        fought: costs of the allocations around which contests were held.
    """

    model: nn.Module
    sites: Sequence[Site]
    screening: Screening
    measured: Mapping[str, tuple[Measurement, ...]]
    unit: Budget
    seen: Calibration | None
    kinds: Mapping[str, Sequence[Kind]]
    fixed: Mapping[str, Structure]
    floor: float
    sweeps: int
    seed: int
    work: WorkFolder
    key: str
    progress: bool
    outcomes: Mapping[str, Sequence[Outcome]] = field(default_factory=dict)
    effects: Effects | None = None
    factors: Mapping[tuple[str, Variant], float] = field(default_factory=dict)
    checks: Mapping[tuple[str, Variant], tuple[Check, ...]] = field(default_factory=dict)
    fought: tuple[float, ...] = ()

    def losses(self) -> Screening:
        """The screening with losses as well as they are known."""
        found = corrected(self.screening, self.measured)
        return {
            name: with_losses(layer, [c.loss * self.factor(name, c) for c in layer.candidates])
            for name, layer in found.items()
        }

    def factor(self, name: str, candidate: Candidate) -> float:
        """What the predicted loss of a layer's candidate is multiplied by: between two checks of its family a power of
        the cost, beyond them that of the nearest."""
        key = name, candidate.variant
        return self.factors.get(key, 1.0) * between(self.checks.get(key, ()), candidate.cost)

    def allocated(self, limits: Sequence[Limit]) -> Allocation:
        """The least loss within limits. Raises as :func:`structmat.compression.allocate.allocate`."""
        return allocate(self.losses(), limits, fixed=self.fixed, floor=self.floor)

    def contested(self, allocation: Allocation) -> Chooser:
        """The same after a contest of what came close to an allocation."""
        screening, outcomes = contest(
            self.model,
            self.sites,
            self.screening,
            allocation,
            self.unit,
            calibration=self.seen,
            fixed=self.fixed,
            sweeps=self.sweeps,
            seed=self.seed,
            folder=self.work,
            key=self.key,
            progress=self.progress,
        )
        # The latest first: they are nearest to what is filled next.
        merged = {n: (*outcomes.get(n, ()), *self.outcomes.get(n, ())) for n in {**self.outcomes, **outcomes}}
        cost = sum(c.cost for c in allocation.chosen.values())
        return dataclasses.replace(self, screening=screening, outcomes=merged, fought=(*self.fought, cost))

    def filled(self, limits: Sequence[Limit]) -> tuple[Screening, Allocation]:
        """The least loss within limits, what is left spent too; and the screening with what was tried for that."""
        losses = self.losses()
        return fill(
            self.model,
            self.sites,
            losses,
            allocate(losses, limits, fixed=self.fixed, floor=self.floor),
            self.unit,
            limits=limits,
            calibration=self.seen,
            measured=self.measured,
            outcomes=self.outcomes,
            factor=self.factor,
            kinds=self.kinds,
            fixed=self.fixed,
            floor=self.floor,
            seed=self.seed,
        )

    def scaled(self, factors: Mapping[tuple[str, Variant], float]) -> Chooser:
        """The same with losses multiplied by further factors."""
        which = {*self.factors, *factors}
        merged = {key: self.factors.get(key, 1.0) * factors.get(key, 1.0) for key in which}
        return dataclasses.replace(self, factors=merged)


def between(checks: Sequence[Check], cost: float) -> float:
    """The factor at a cost, interpolated in the logarithms; 1 without checks."""
    if not checks:
        return 1.0
    place = bisect.bisect_left([check.cost for check in checks], cost)
    if place in (0, len(checks)):
        return checks[min(place, len(checks) - 1)].factor
    low, high = checks[place - 1], checks[place]
    share = math.log(cost / low.cost) / math.log(high.cost / low.cost)
    return math.exp((1 - share) * math.log(low.factor) + share * math.log(high.factor))

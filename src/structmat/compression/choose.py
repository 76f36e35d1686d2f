"""From a screening to a choice: allocate, contest, fill; for one set of limits or for many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from structmat.compression.allocate import Allocation, Limit, allocate
from structmat.compression.budget import Budget
from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import Kind, Screening, with_losses
from structmat.compression.contest import Outcome, contest
from structmat.compression.fill import fill
from structmat.compression.scan import Site
from structmat.compression.score import Measurement, corrected
from structmat.compression.workfolder import WorkFolder
from structmat.structure import Structure


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
        factors: by which the losses of each layer's candidates are multiplied; 1 where none is given.
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
    factors: Mapping[str, float] = field(default_factory=dict)
    fought: tuple[float, ...] = ()

    def losses(self) -> Screening:
        """The screening with losses as well as they are known."""
        found = corrected(self.screening, self.measured)
        return {
            name: with_losses(layer, [c.loss * self.factors[name] for c in layer.candidates])
            if name in self.factors
            else layer
            for name, layer in found.items()
        }

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
            factors=self.factors,
            kinds=self.kinds,
            fixed=self.fixed,
            floor=self.floor,
            seed=self.seed,
        )

    def scaled(self, factors: Mapping[str, float]) -> Chooser:
        """The same with losses multiplied by further factors."""
        names = {*self.factors, *factors}
        merged = {n: self.factors.get(n, 1.0) * factors.get(n, 1.0) for n in names}
        return dataclasses.replace(self, factors=merged)

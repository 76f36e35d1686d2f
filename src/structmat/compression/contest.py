"""What contenders can do when they are fitted in earnest: cheap fits undervalue families that gain from many sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from structmat.compression.allocate import Allocation
from structmat.compression.budget import Budget, Latency
from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import (
    Candidate,
    LayerScreen,
    Screening,
    Variant,
    candidate_from_json,
    candidate_to_json,
    expecting,
)
from structmat.compression.scan import Site
from structmat.compression.screen import layer_worker
from structmat.compression.workers import side_by_side
from structmat.compression.workfolder import WorkFolder, digest
from structmat.projection.project import DEFAULT_SWEEPS
from structmat.projection.target import Certificate
from structmat.structure import Structure
from structmat.structure import to_json as structure_to_json
from structmat.structures.dense import Dense

REACH = 1.35
"""A contender's loss is at most this many times the least at its cost."""

NEAR = 2.0
"""Its cost is at most this many times the chosen one's, and at least the chosen one's divided by it."""

MOST = 3
"""Contenders of a layer."""


@dataclass(frozen=True)
class Outcome:
    """One contender, fitted in earnest.

    Args:
        before: as the screening had it.
        after: with the error and the loss of the final fit.
        gain: the loss of the final fit as a share of that of a fit without sweeps.
    """

    before: Candidate
    after: Candidate
    gain: float


Outcomes = Mapping[str, Sequence[Outcome]]
"""By the sites' names."""


def contest(
    model: nn.Module,
    sites: Sequence[Site],
    screening: Screening,
    allocation: Allocation,
    budget: Budget,
    *,
    calibration: Calibration | None = None,
    fixed: Mapping[str, Structure] | None = None,
    sweeps: int = DEFAULT_SWEEPS,
    seed: int = 0,
    folder: WorkFolder | None = None,
    key: str = "",
    progress: bool = False,
) -> tuple[Screening, Outcomes]:
    """Fit what came close to being chosen as the final fits would, so that allocating again is fair to it.

    Of each layer that is not kept or fixed, each family without optimal fits may send the candidate that comes nearest
    to the least loss at its cost, if it is within ``REACH`` of it and costs about as much as the chosen one. What the
    final fit gains is expected of all candidates of that family at like costs. Cost: up to ``MOST`` final fits a layer.

    Args:
        model, calibration: from the steps before.
        sites: the layers.
        screening: with the quadratic predictions of the loss, not corrected ones.
        allocation: what would be chosen so far.
        budget: whose unit counts.
        fixed: layers that are not chosen freely.
        sweeps, seed: of the final fits.
        folder, key: where finished layers are kept, and the digest of what all of them depend on.
        progress: show a progress bar on stderr.

    Returns:
        The screening with better losses, and what was fitted.
    """
    folder = folder or WorkFolder(None)

    def work(item: tuple[int, Site]) -> list[Outcome]:
        number, site = item
        chosen = contenders(screening[site.name], allocation.chosen[site.name])
        if not chosen:
            return []
        own = digest(key, site.name, [structure_to_json(c.structure) for c in chosen], sweeps, seed)
        piece = f"contest/{number:04d}-{own[:8]}"
        kept = folder.load(piece, own)
        if kept is not None:
            return [outcome_from_json(o) for o in kept[0]["outcomes"]]
        found = []
        worker = layer_worker(model, site, budget, calibration, sweeps=sweeps, seed=seed)
        for before in chosen:
            quick, after = worker.fitted(before, swept=False), worker.fitted(before, swept=True)
            if not (math.isfinite(after.loss) and quick.loss > 0):
                continue
            found.append(Outcome(before, after, after.loss / quick.loss))
        folder.store(piece, own, {"outcomes": [outcome_to_json(o) for o in found]})
        return found

    fought = [
        (number, site)
        for number, site in enumerate(sites)
        if site.name not in (fixed or {}) and not isinstance(allocation.chosen[site.name].structure, Dense)
    ]
    results = side_by_side(work, fought, "contest", progress=progress, alone=isinstance(budget, Latency))
    outcomes = {site.name: found for (_, site), found in zip(fought, results, strict=True)}
    better = {name: improved(layer, outcomes.get(name, ())) for name, layer in screening.items()}
    return better, outcomes


def contenders(layer: LayerScreen, chosen: Candidate) -> list[Candidate]:
    """The nearest candidate of each family without optimal fits, the nearest first."""
    best: dict[Variant, tuple[float, Candidate]] = {}
    for candidate in layer.candidates:
        if isinstance(candidate.structure, Dense) or candidate.certificate == Certificate.OPTIMAL.value:
            continue
        if not chosen.cost / NEAR <= candidate.cost <= chosen.cost * NEAR:
            continue
        variant = candidate.variant
        others = (c for c in layer.candidates if c.cost <= candidate.cost and c.variant != variant)
        least = min((c.loss for c in others), default=math.inf)
        ratio = candidate.loss / least if least > 0 else math.inf
        if ratio <= REACH and (variant not in best or ratio < best[variant][0]):
            best[variant] = ratio, candidate
    return [candidate for _, candidate in sorted(best.values(), key=lambda pair: pair[0])[:MOST]]


def improved(layer: LayerScreen, outcomes: Sequence[Outcome]) -> LayerScreen:
    """The layer's candidates with what the contest showed."""
    candidates = list(layer.candidates)
    for outcome in outcomes:
        variant = outcome.before.variant
        share = outcome.after.loss / outcome.before.loss if outcome.before.loss > 0 else 1.0
        for index, candidate in enumerate(candidates):
            if candidate.structure == outcome.before.structure:
                candidates[index] = outcome.after
            elif candidate.variant == variant and (
                outcome.before.cost / NEAR <= candidate.cost <= outcome.before.cost * NEAR
            ):
                candidates[index] = expecting(candidate, share)
    return replace(layer, candidates=tuple(sorted(candidates, key=lambda c: (c.cost, c.loss))))


def outcome_to_json(outcome: Outcome) -> dict[str, object]:
    """Plain JSON values."""
    return {
        "before": candidate_to_json(outcome.before),
        "after": candidate_to_json(outcome.after),
        "gain": outcome.gain,
    }


def outcome_from_json(data: Mapping[str, object]) -> Outcome:
    """Read what :func:`outcome_to_json` wrote."""
    before, after, gain = data["before"], data["after"], data["gain"]
    assert isinstance(before, Mapping) and isinstance(after, Mapping) and isinstance(gain, float)  # noqa: PT018
    return Outcome(candidate_from_json(before), candidate_from_json(after), gain)

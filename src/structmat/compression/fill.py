"""Between the sizes of the screening, which lie on a coarse grid, and beyond: the budget does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from structmat.compression.allocate import Allocation, Limit, allocate
from structmat.compression.budget import Budget
from structmat.compression.calibrate import Calibration
from structmat.compression.candidates import Candidate, Kind, LayerScreen, Screening
from structmat.compression.contest import Outcomes
from structmat.compression.scan import Site
from structmat.compression.score import Correction, Measurement
from structmat.compression.screen import SWEEPS, LayerWorker, layer_worker
from structmat.compression.stacks import within
from structmat.structure import Structure
from structmat.structures.dense import Dense
from structmat.structures.stacked import Stacked

ENOUGH = 0.005
"""An allocation that leaves every layer less than this share of what all cost is left alone."""

ROUNDS = 3
"""How often at most."""

NEAR = 1.1
"""Two sizes of a family whose costs differ by less than this factor have none between them."""


def fill(
    model: nn.Module,
    sites: Sequence[Site],
    screening: Screening,
    allocation: Allocation,
    budget: Budget,
    *,
    kinds: Mapping[str, Sequence[Kind]],
    limits: Sequence[Limit] = (),
    calibration: Calibration | None = None,
    measured: Mapping[str, Sequence[Measurement]] | None = None,
    outcomes: Outcomes | None = None,
    factor: Callable[[str, Candidate], float] | None = None,
    fixed: Mapping[str, Structure] | None = None,
    floor: float = 0.0,
    seed: int = 0,
) -> tuple[Screening, Allocation]:
    """Try members of the chosen families that are a little larger or smaller, and allocate again.

    For each layer that is not kept or fixed, the chosen family is asked what it would do half way to its next smaller
    and its next larger size that was tried (of iterative fits those are a tenth of the dense numbers apart, and what
    several layers would rather have lies between), and with the layer's share and all, half or a quarter of what is
    left. Losses between two sizes are interpolated, powers of the cost; of larger members they are predicted and
    corrected as all others. So the allocation can only get better. Cost: at most five fits without sweeps a layer and
    round.

    Args:
        model, sites, screening, allocation, calibration: from the steps before.
        budget: in whose unit the candidates' costs are.
        kinds: what each layer may try, by the sites' names; what was given as a single structure stays it.
        limits: that the allocation keeps; none for the budget alone.
        measured: what :func:`structmat.compression.score.score` measured.
        outcomes: what :func:`structmat.compression.contest.contest` fitted: the same gains are expected here.
        factor: by which the predicted loss of a layer's candidate is to be multiplied besides; 1 by default.
        fixed, floor: as for :func:`structmat.compression.allocate.allocate`.
        seed: of fits with random starts.

    Returns:
        The screening with the new candidates, and the allocation.
    """
    workers: dict[str, LayerWorker] = {}  # a layer's decompositions serve all rounds
    for _ in range(ROUNDS):
        spent = sum(c.cost for c in allocation.chosen.values())
        grown = dict(screening)
        for site in sites:
            chosen, left = allocation.chosen[site.name], allocation.left(site.name)
            name = chosen.form or type(chosen.structure).__name__
            kind = next((kind for kind in kinds[site.name] if kind.name == name), None)
            stacks = isinstance(chosen.structure, Stacked) and bool(screening[site.name].parts)
            if site.name in (fixed or {}) or isinstance(chosen.structure, Dense) or (kind is None and not stacks):
                continue
            pairs = [(m.predicted, m.measured) for m in (measured or {}).get(site.name, ())]
            gains = [o.gain for o in (outcomes or {}).get(site.name, ()) if o.after.variant == chosen.variant]
            gain = gains[0] if gains else 1.0
            layer = screening[site.name]
            if site.name not in workers:
                workers[site.name] = layer_worker(model, site, budget, calibration, sweeps=SWEEPS, seed=seed)
            worker = workers[site.name]
            found = [] if kind is None else _between(worker, site, chosen, kind, layer)
            if left > ENOUGH * spent:
                found += _larger(
                    worker, site, chosen, kind, left, layer, pairs, gain, partial(factor or _one, site.name)
                )
            ordered = sorted((*layer.candidates, *found), key=lambda c: (c.cost, c.loss))
            grown[site.name] = replace(layer, candidates=tuple(ordered))
        if all(len(grown[s.name].candidates) == len(screening[s.name].candidates) for s in sites):
            break
        screening = grown
        allocation = allocate(screening, limits or budget, fixed=fixed, floor=floor)
    return screening, allocation


def _between(worker: LayerWorker, site: Site, chosen: Candidate, kind: Kind, layer: LayerScreen) -> list[Candidate]:
    """New candidates of the chosen family between the chosen one and its neighbours in size."""
    worker.seen |= {c.structure for c in layer.candidates}
    best: dict[float, Candidate] = {}
    for candidate in layer.candidates:
        if candidate.variant == chosen.variant and candidate.loss <= best.get(candidate.cost, candidate).loss:
            best[candidate.cost] = candidate
    like = sorted((c for c in best.values() if c.cost > 0), key=lambda c: c.cost)
    places = [place for place, candidate in enumerate(like) if candidate.cost == chosen.cost]
    found: list[Candidate] = []
    for place in places:
        for small, large in itertools.pairwise(like[max(0, place - 1) : place + 2]):
            if large.cost <= NEAR * small.cost or not small.loss >= large.loss > 0:
                continue
            share = math.sqrt(small.parameters * large.parameters) / site.numbers
            for candidate in worker.try_share(kind, share, {chosen.variant}):
                if not small.cost < candidate.cost < large.cost:
                    continue
                part = math.log(candidate.cost / small.cost) / math.log(large.cost / small.cost)
                loss = small.loss ** (1 - part) * large.loss**part
                error = small.error ** (1 - part) * large.error**part
                found.append(replace(candidate, error=error, loss=loss))
    return found


def _larger(
    worker: LayerWorker,
    site: Site,
    chosen: Candidate,
    kind: Kind | None,
    left: float,
    layer: LayerScreen,
    pairs: Sequence[tuple[float, float]],
    gain: float,
    factor: Callable[[Candidate], float],
) -> list[Candidate]:
    """New candidates of the chosen family whose cost is at most the chosen one's and what is left; None for stacks of
    what the layer's parts could be."""
    worker.seen |= {c.structure for c in layer.candidates}
    curve = Correction(pairs)
    numbers_a_unit = chosen.parameters / chosen.cost if chosen.cost > 0 else 0.0
    found: list[Candidate] = []
    for part in (1.0, 0.5, 0.25):
        if kind is None:
            combination = within(layer.parts, chosen.cost + part * left)
            stack = None if combination is None else worker.try_stack(combination)
            tried = [] if stack is None else [stack]
        else:
            share = min(chosen.parameters + part * left * numbers_a_unit, site.numbers - site.copies) / site.numbers
            tried = worker.try_share(kind, share, {chosen.variant})
        for candidate in tried:
            if chosen.cost < candidate.cost <= chosen.cost + left:
                loss = factor(candidate) * curve(candidate.loss * gain)
                found.append(replace(candidate, error=candidate.error * gain**0.5, loss=loss))
    return found


def _one(_name: str, _candidate: Candidate) -> float:
    return 1.0

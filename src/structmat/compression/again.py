"""Search beyond one pass: what each layer loses is measured in the compressed model, and the choice made again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.allocate import Allocation, Limit
from structmat.compression.candidates import Screening, Variant
from structmat.compression.choose import Chooser
from structmat.compression.effects import Probe
from structmat.compression.running import Forward, Loss
from structmat.compression.scan import parent_and_child
from structmat.compression.watched import as_called
from structmat.structure import Structure
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

TRUST = 0.5
"""The power of measured by predicted that losses are multiplied by: a layer's effect depends on the others' losses,
which the new choice changes."""

MOST = 4.0
"""Losses change at most by this factor in one round, up or down."""

Factors = dict[tuple[str, Variant], float]
"""What the losses of one layer's candidates of one family are multiplied by."""


@dataclass(frozen=True)
class Round:
    """One choice that was built and measured: the distance of its output from the original's, and whether it is better
    than the best before."""

    distance: float
    better: bool


def choose_again(
    chooser: Chooser,
    limits: Sequence[Limit],
    screening: Screening,
    allocation: Allocation,
    build: Callable[[Allocation], nn.Module],
    original: nn.Module,
    loader: Iterable[Any],
    rounds: int,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> tuple[Screening, Allocation, tuple[Round, ...]]:
    """Build the chosen model, measure what each layer costs in it, correct the predictions, choose again; the nearest
    to the original's output is kept.

    Layers are put in one after the other, as they are called, and what each adds to the distance is compared with what
    was predicted of it: layers that are fitted behind others make up for what these lost, so that to take one of them
    out says nothing. What is found of a layer's family counts for that family there; other families of the layer are
    corrected by what layers have in common. Where the distance falls with a layer, it makes up for others, and its
    prediction stands. Cost of a round: a build, and a pass over a part of the calibration data for each replaced layer.

    Args:
        chooser, limits, screening, allocation: the choice so far, and what it was made from.
        build: the model of an allocation, as a copy.
        original: with all layers as they were.
        loader, forward, loss: as for :func:`structmat.compression.score.score`.
        rounds: at most so many; fewer where a choice comes back.

    Returns:
        The best choice that was built, and how each of them did.
    """
    probe = Probe(original, loader, forward, loss, 1.0 if chooser.seen is None else chooser.seen.temperature)
    model = build(allocation)
    least = probe.distance(model)
    found = [Round(least, True)]
    best = screening, allocation
    built = [_structures(allocation)]
    for _ in range(rounds):
        chooser = chooser.scaled(_factors(chooser, screening, allocation, model, original, probe))
        screening, allocation = chooser.filled(limits)
        if _structures(allocation) in built:
            break
        built.append(_structures(allocation))
        model = build(allocation)
        reached = probe.distance(model)
        found.append(Round(reached, reached < least))
        logger.info("chosen again: distance %.6g, the least before %.6g", reached, least)
        if reached < least:
            best, least = (screening, allocation), reached
    return *best, tuple(found)


def _structures(allocation: Allocation) -> dict[str, Structure]:
    return {name: candidate.structure for name, candidate in allocation.chosen.items()}


def _factors(
    chooser: Chooser,
    screening: Screening,
    allocation: Allocation,
    model: nn.Module,
    original: nn.Module,
    probe: Probe,
) -> Factors:
    """By what the losses of candidates are to be multiplied after what the layers of a model were found to add."""
    added = _added(chooser, allocation, model, original, probe)
    factors: Factors = {}
    for name, more in added.items():
        candidate = allocation.chosen[name]
        if more > 0:
            factor = (more / candidate.loss) ** TRUST
            factors[name, candidate.variant] = min(max(factor, 1 / MOST), MOST)
    if not factors:
        return factors
    common = math.exp(sum(map(math.log, factors.values())) / len(factors))
    return {
        (name, candidate.variant): factors.get((name, candidate.variant), common)
        for name in {name for name, _ in factors}
        for candidate in screening[name].candidates
    }


def _added(
    chooser: Chooser, allocation: Allocation, model: nn.Module, original: nn.Module, probe: Probe
) -> dict[str, float]:
    """What each replaced layer adds to the distance when it is put in behind those that are called before it."""
    replaced = [
        site.name
        for site in as_called(chooser.sites, chooser.seen)
        if not isinstance(allocation.chosen[site.name].structure, Dense) and allocation.chosen[site.name].loss > 0
    ]
    held = {name: model.get_submodule(name) for name in replaced}
    try:
        for name in replaced:
            _put(model, name, original.get_submodule(name))
        distance, added = probe.distance(model), dict[str, float]()
        for name in replaced:
            _put(model, name, held[name])
            further = probe.distance(model)
            added[name], distance = further - distance, further
        return added
    finally:
        for name in replaced:
            _put(model, name, held[name])


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, child = parent_and_child(model, name)
    setattr(parent, child, layer)

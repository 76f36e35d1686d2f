"""Search beyond one pass: what each layer loses is measured in the compressed model, and the choice made again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.allocate import Allocation, Limit
from structmat.compression.candidates import Screening
from structmat.compression.choose import Chooser
from structmat.compression.running import Forward, Loss
from structmat.compression.scan import parent_and_child
from structmat.compression.score import Probe
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

TRUST = 0.5
"""The power of measured by predicted that a layer's losses are multiplied by: a layer's effect depends on the others'
losses, which the new choice changes."""

MOST = 4.0
"""Losses change at most by this factor in one round, up or down."""


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
    """Build the chosen model, measure what each layer costs in it, correct the predictions, choose again; repeat while
    the distance of the output from the original's falls.

    The effect of a layer is the distance that goes when the layer alone is put back. Cost of a round: a build, and a
    pass over a part of the calibration data for each replaced layer.

    Args:
        chooser, limits, screening, allocation: the choice so far, and what it was made from.
        build: the model of an allocation, as a copy.
        original: with all layers as they were.
        loader, forward, loss: as for :func:`structmat.compression.score.score`.
        rounds: at most so many.

    Returns:
        The best choice that was built, and how each of them did.
    """
    probe = Probe(original, loader, forward, loss, 1.0 if chooser.seen is None else chooser.seen.temperature)
    model = build(allocation)
    distance = probe.distance(model)
    found = [Round(distance, True)]
    best = screening, allocation
    for _ in range(rounds):
        factors = {}
        for name, candidate in best[1].chosen.items():
            if isinstance(candidate.structure, Dense) or candidate.loss <= 0:
                continue
            parent, child = parent_and_child(model, name)
            layer = getattr(parent, child)
            setattr(parent, child, original.get_submodule(name))
            try:
                gained = distance - probe.distance(model)
            finally:
                setattr(parent, child, layer)
            ratio = max(gained, 1e-3 * candidate.loss) / candidate.loss
            factors[name] = min(max(ratio**TRUST, 1 / MOST), MOST)
        chooser = chooser.scaled(factors)
        screening, allocation = chooser.filled(limits)
        before = {name: c.structure for name, c in best[1].chosen.items()}
        if {name: c.structure for name, c in allocation.chosen.items()} == before:
            break
        candidate_model = build(allocation)
        reached = probe.distance(candidate_model)
        found.append(Round(reached, reached < distance))
        logger.info("chosen again: distance %.6g after %.6g", reached, distance)
        if reached >= distance:
            break
        best, model, distance = (screening, allocation), candidate_model, reached
    return *best, tuple(found)

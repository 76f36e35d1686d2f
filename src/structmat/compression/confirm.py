"""What is chosen is measured; where it does what was not predicted, the choice is made again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from structmat.compression.allocate import Allocation, Limit
from structmat.compression.candidates import Screening
from structmat.compression.choose import Check, Chooser
from structmat.compression.progress import Progress
from structmat.compression.workfolder import digest
from structmat.structure import to_json as structure_to_json
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

ROUNDS = 6
"""Choices that are measured at most."""

NEAR = 1.15
"""A member whose cost is within this factor of one that was measured need not be measured itself."""

LEAST = 1e-6
"""By what a loss is multiplied at least: an effect may be nothing at all."""

_CLEAR = 10.0
"""How many times what rounding can do an effect is at least to say that a prediction was too low."""


def confirm(chooser: Chooser, limits: Sequence[Limit]) -> tuple[Chooser, Screening, Allocation]:
    """Choose, measure each chosen layer alone, correct the predictions of its family by that, and choose again, until
    all that is chosen was measured.

    The predictions of a layer are corrected by a few measurements of its best candidates at some costs. A member of
    another family, or a much smaller one, can do what these do not tell: of ResNet-20's last convolution a butterfly
    matrix was predicted to cost .06 and cost 1.66. A choice among many predictions finds the wrong ones. Cost: a fit
    and a pass over a part of the calibration data for each layer that is replaced, and in further rounds for those
    that changed.

    Returns:
        The chooser with what was measured; the screening and the allocation.
    """
    screening, allocation = chooser.filled(limits)
    if chooser.effects is None:
        return chooser, screening, allocation
    tried: list[tuple[float, Screening, Allocation]] = []
    with Progress(chooser.progress) as bar:
        for _ in range(ROUNDS):
            if not _unknown(chooser, allocation):
                return chooser, screening, allocation
            chooser, total = _measured(chooser, allocation, bar)
            tried.append((total, screening, allocation))
            logger.info("confirm: predicted loss %.4g, measured %.4g", allocation.loss, total)
            screening, allocation = chooser.filled(limits)
    if _unknown(chooser, allocation):
        _, screening, allocation = min(tried, key=lambda one: one[0])
    return chooser, screening, allocation


def _unknown(chooser: Chooser, allocation: Allocation) -> list[str]:
    """The layers whose choice was not measured."""
    return [
        name
        for name, candidate in allocation.chosen.items()
        if name not in chooser.fixed
        and not isinstance(candidate.structure, Dense)
        and not any(
            check.cost / NEAR <= candidate.cost <= check.cost * NEAR
            for check in chooser.checks.get((name, candidate.variant), ())
        )
    ]


def _measured(chooser: Chooser, allocation: Allocation, bar: Progress) -> tuple[Chooser, float]:
    """The chooser with the effects of what was not measured before; and the sum of all effects."""
    unknown = set(_unknown(chooser, allocation))
    checks = dict(chooser.checks)
    total = sum(c.loss for name, c in allocation.chosen.items() if name not in unknown)
    sites = [(number, site) for number, site in enumerate(chooser.sites) if site.name in unknown]
    for number, site in bar.track(sites, "confirm"):
        candidate = allocation.chosen[site.name]
        own = digest(chooser.key, site.name, structure_to_json(candidate.structure), chooser.sweeps, chooser.seed)
        piece = f"confirm/{number:04d}-{own[:8]}"
        kept = chooser.work.load(piece, own)
        if kept is None:
            assert chooser.effects is not None, "nothing measures"
            effect, noise = chooser.effects.of(site, [candidate.structure])[0], chooser.effects.noise
            chooser.work.store(piece, own, {"effect": effect, "noise": noise})
        else:
            effect, noise = float(kept[0]["effect"]), float(kept[0]["noise"])
        if effect <= _CLEAR * noise:  # what was predicted to be less may be so
            effect = min(effect, candidate.loss)
        total += effect
        key = site.name, candidate.variant
        # What it is corrected by already is part of what was predicted.
        factor = chooser.factor(site.name, candidate) * effect / candidate.loss if candidate.loss > 0 else 1.0
        factor = max(factor, LEAST)
        known = [check for check in checks.get(key, ()) if check.cost != candidate.cost]
        checks[key] = tuple(sorted([*known, Check(candidate.cost, factor)]))
    return dataclasses.replace(chooser, checks=checks), total

"""Which structures the parts of a layer's rows get at a cost: combinations of what each part could be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from structmat.compression.candidates import Candidate, LayerScreen

Combination = tuple[Candidate, ...]
"""A candidate for each part."""

MOST = 24
"""Combinations of a layer that are fitted and judged as a whole."""


def combinations(parts: Sequence[LayerScreen], most: int = MOST) -> list[Combination]:
    """At most so many combinations from the cheapest to the dearest, each of the least loss at its cost.

    Losses and costs of parts add up, so these are the vertices of the lower convex hull of all combinations: from the
    cheapest on, the step that gains most for its cost is taken, whichever part it is of.
    """
    found = list(_vertices(parts))
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def within(parts: Sequence[LayerScreen], cost: float) -> Combination | None:
    """The best vertex that costs at most so much, with what is left spent on the parts one after the other; None if
    even the cheapest costs more."""
    fitting = [found for found in _vertices(parts) if _cost(found) <= cost]
    if not fitting:
        return None
    chosen = list(fitting[-1])
    for _ in parts:
        left = cost - _cost(chosen)
        better = [
            (chosen[i].loss - candidate.loss, i, candidate)
            for i, part in enumerate(parts)
            for candidate in part.candidates
            if candidate.cost - chosen[i].cost <= left and candidate.loss < chosen[i].loss
        ]
        if not better:
            break
        _, place, candidate = max(better, key=lambda step: step[0])
        chosen[place] = candidate
    return tuple(chosen)


def scaled(screen: LayerScreen, share: float) -> LayerScreen:
    """A screen with losses multiplied by a number: what a part's relative error means to the whole."""
    return replace(screen, candidates=tuple(replace(c, loss=share * c.loss) for c in screen.candidates))


def _cost(combination: Sequence[Candidate]) -> float:
    return sum(candidate.cost for candidate in combination)


def _vertices(parts: Sequence[LayerScreen]) -> Iterator[Combination]:
    hulls = [hull(part.candidates) for part in parts]
    steps = [
        ((after.loss - before.loss) / (after.cost - before.cost), place, after)
        for place, own in enumerate(hulls)
        for before, after in itertools.pairwise(own)
    ]
    chosen = [own[0] for own in hulls]
    yield tuple(chosen)
    for _, place, after in sorted(steps, key=lambda step: step[:2]):  # stable: steps of a part stay in order
        chosen[place] = after
        yield tuple(chosen)


def hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull of losses over costs, from the cheapest candidate to that of the least loss."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, c.loss)):
        if found and candidate.loss >= found[-1].loss:
            continue
        while len(found) >= 2 and _above(found[-2], found[-1], candidate):
            found.pop()
        found.append(candidate)
    return found


def _above(first: Candidate, second: Candidate, third: Candidate) -> bool:
    """Whether the second lies on or above the line between the others."""
    rise = (third.loss - first.loss) * (second.cost - first.cost)
    return (second.loss - first.loss) * (third.cost - first.cost) >= rise

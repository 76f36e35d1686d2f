"""Goals as limits on choices from a screening."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from structmat.compression.allocate import Limit
from structmat.compression.budget import Budget, Memory, limit, to_json
from structmat.compression.calibrate import Calibration, load_of
from structmat.compression.candidates import Candidate, Screening
from structmat.compression.goals import Goals
from structmat.compression.layers import cost_of
from structmat.compression.scan import Site, matching
from structmat.errors import ModelError
from structmat.io import StoredSize
from structmat.structure import Structure
from structmat.structures.dense import Dense


def limits_of(
    goals: Goals,
    sites: Sequence[Site],
    screening: Screening,
    seen: Calibration | None,
    model: nn.Module,
) -> tuple[Limit, ...]:
    """The goals' budgets as limits on choices from a screening.

    A fraction of a group's budget refers to what the group's layers cost when dense. Layers of no group are not
    limited, so they stay as they are.

    Args:
        goals: as :func:`read_goals` read them.
        sites: the layers that take part.
        screening: of them, in the unit of the goals.
        seen: calibration, which knows how many rows each layer sees.
        model: with its layers as they were, whose stored size :class:`Memory` counts.

    Raises:
        ModelError: the pattern of a group matches no layer.
        BudgetError: even without the compressible layers the model takes more bytes than allowed.
    """
    return tuple(_limit(goals, b, pattern, sites, screening, seen, model) for b, pattern in goals.limits)


def _limit(
    goals: Goals,
    budget: Budget | Memory,
    pattern: str,
    sites: Sequence[Site],
    screening: Screening,
    seen: Calibration | None,
    model: nn.Module,
) -> Limit:
    counted = {site.name: site for site in (matching_sites(pattern, sites) if pattern else sites)}
    if isinstance(budget, Memory):
        return _memory(budget, counted, model)
    unit = goals.unit
    is_unit = {k: v for k, v in to_json(budget).items() if k != "amount"} == {
        k: v for k, v in to_json(unit).items() if k != "amount"
    }

    def spend(name: str, candidate: Candidate) -> float:
        if name not in counted:
            return 0.0
        if is_unit:
            return candidate.cost
        return cost_of(budget, counted[name], candidate.structure, load_of(counted[name], seen))

    dense = sum(spend(name, screening[name].keep) for name in counted)
    return Limit(budget, limit(budget, dense), dense, spend, pattern)


def _memory(budget: Memory, counted: Mapping[str, Site], model: nn.Module) -> Limit:
    size = StoredSize(model, [(site.name, site.aliases) for site in counted.values()])
    cached: dict[tuple[str, Structure], float] = {}

    def spend(name: str, candidate: Candidate) -> float:
        key = name, candidate.structure
        if key not in cached:
            site = counted[name]
            if isinstance(candidate.structure, Dense):
                cached[key] = float(size.dense(name))
            else:
                cached[key] = float(size.structured(site, candidate.structure))
        return cached[key]

    dense = size.beside + sum(size.dense(name) for name in counted)
    most = limit(budget, dense)  # type: ignore[arg-type]  # it has an amount, and that is all that counts here
    return Limit(budget, most, dense, spend, beside=float(size.beside))


def matching_sites(pattern: str, sites: Sequence[Site]) -> list[Site]:
    """The sites that a group's pattern matches.

    Raises:
        ModelError: it matches none; the message names what is near.
    """
    names = set(matching(pattern, sites))
    if not names:
        near = difflib.get_close_matches(pattern.strip("*"), [s.name for s in sites], 3, 0.0)
        raise ModelError(
            f"The pattern {pattern!r} of a budget matches none of the {len(sites)} layers that are compressed, such as "
            f"{', '.join(near)}."
        )
    return [site for site in sites if site.name in names]

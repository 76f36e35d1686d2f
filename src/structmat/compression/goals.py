"""What a user asks for, read: one budget, several at once, budgets of groups of layers, a quality to keep."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.compression.allocate import Limit
from structmat.compression.budget import Budget, Flops, Latency, Memory, Parameters, Quality, from_json, limit, to_json
from structmat.compression.calibrate import Calibration, load_of
from structmat.compression.candidates import Candidate, Screening
from structmat.compression.layers import cost_of
from structmat.compression.scan import Site, matching
from structmat.errors import BudgetError, FormatError, ModelError
from structmat.io import StoredSize
from structmat.structure import Structure
from structmat.structures.dense import Dense

Group = Budget | Sequence[Budget]
Goal = Budget | Memory | Quality | Mapping[str, Group] | Sequence[Budget | Memory | Quality | Mapping[str, Group]]
"""What ``budget=`` of :func:`structmat.compress` may be."""

_KINDS = "Parameters(0.4), Flops(0.4), Latency(0.5), Memory('20MB') or Quality(loss=0.01)"


@dataclass(frozen=True)
class Goals:
    """All that is asked for at once.

    Args:
        limits: each with the glob pattern of its layers, "" for all.
        quality: to keep, if any; then the first limit but for these is sought.
    """

    limits: tuple[tuple[Budget | Memory, str], ...]
    quality: Quality | None = None

    @property
    def unit(self) -> Budget:
        """In whose unit candidates' costs are stated; its amount means nothing."""
        if self.quality is not None:
            return self.quality.spends
        return next((b for b, _ in self.limits if isinstance(b, Budget)), Parameters(0.5))

    @property
    def is_plain(self) -> bool:
        """Whether this is one budget for all layers."""
        return self.quality is None and len(self.limits) == 1 and not self.limits[0][1]

    @property
    def simplest(self) -> Budget | Goals:
        """The budget itself, if there is only one in the unit of its candidates."""
        first = self.limits[0][0] if self.is_plain else None
        return first if isinstance(first, Budget) else self

    def to_json(self) -> dict[str, Any]:
        """Plain values; those of the budget itself if there is only one."""
        items = [to_json(b) | ({"layers": pattern} if pattern else {}) for b, pattern in self.limits]
        if self.quality is not None:
            items.insert(0, to_json(self.quality))
        return items[0] if len(items) == 1 else {"budget": "several", "goals": items}

    @classmethod
    def from_json(cls, data: object) -> Goals:
        """Read what :meth:`to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
        several = isinstance(data, Mapping) and data.get("budget") == "several"
        items = data.get("goals") if several and isinstance(data, Mapping) else [data]
        if not isinstance(items, list) or not items:
            raise FormatError(f"Several budgets are a list 'goals' of one or more; got {items!r}.")
        limits, quality = [], None
        for item in items:
            pattern = str(item.get("layers", "")) if isinstance(item, Mapping) else ""
            own = {k: v for k, v in item.items() if k != "layers"} if isinstance(item, Mapping) else item
            found = from_json(own)
            if isinstance(found, Quality):
                quality = found
            else:
                limits.append((found, pattern))
        return cls(tuple(limits), quality)


def read_goals(goal: object) -> Goals:
    """What a user gave as ``budget=``, checked.

    Raises:
        BudgetError: it is none of the kinds of goals, is empty, or says something twice.
    """
    if isinstance(goal, Goals):
        return goal
    limits: list[tuple[Budget | Memory, str]] = []
    qualities: list[Quality] = []
    for item in goal if isinstance(goal, Sequence) and not isinstance(goal, str) else [goal]:
        if isinstance(item, Quality):
            qualities.append(item)
        elif isinstance(item, Mapping):
            limits += _groups(item)
        elif isinstance(item, Budget | Memory):
            limits.append((item, ""))
        else:
            raise BudgetError(f"A budget is {_KINDS}, several of them, or a dict from layers to budgets; got {item!r}.")
    if len(qualities) > 1:
        raise BudgetError(
            f"{len(qualities)} qualities are to be kept; give one, and let evaluate return what it needs."
        )
    if not limits and not qualities:
        raise BudgetError(f"The budget is empty. Give {_KINDS}.")
    return Goals(tuple(limits), qualities[0] if qualities else None)


def _groups(groups: Mapping[Any, Any]) -> Iterator[tuple[Budget, str]]:
    for pattern, given in groups.items():
        if not isinstance(pattern, str) or not pattern:
            raise BudgetError(f"The layers of a group are named by a glob pattern such as '*attn*'; got {pattern!r}.")
        for budget in given if isinstance(given, Sequence) else [given]:
            if not isinstance(budget, Parameters | Flops | Latency):
                raise BudgetError(
                    f"The budget of the layers {pattern!r} is Parameters, Flops or Latency; got {budget!r}. "
                    f"Memory and Quality are of the whole model."
                )
            yield budget, pattern


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
    if most < size.beside:
        raise BudgetError(
            f"The budget of {most:.6g} bytes can't be met: what is not compressed takes {size.beside:,} bytes by "
            f"itself. Compress more layers, or use Memory({size.beside}) or more."
        )
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

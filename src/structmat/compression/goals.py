"""What a user asks for, read: one budget, several at once, budgets of groups of layers, a quality to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structmat.compression.budget import Budget, Flops, Latency, Memory, Parameters, Quality, from_json, to_json
from structmat.errors import BudgetError, FormatError

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

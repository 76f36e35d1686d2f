"""Rows of a layer that may get structures of their own: fused projections and gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from structmat.errors import ModelError
from structmat.structure import Shape, Structure
from structmat.structures.stacked import Stacked

Split = int | Sequence[int] | str | Mapping[str, object]
"""How a user says it; :func:`parts_of` reads it."""

GATES = "gates"


@dataclass(frozen=True)
class Parts:
    """How the rows of a matrix are split: as in :class:`structmat.structures.stacked.Stacked`.

    Args:
        rows: of each part, in one group.
        groups: how often this repeats from top to bottom.
    """

    rows: tuple[int, ...]
    groups: int = 1

    def shapes(self, columns: int) -> tuple[Shape, ...]:
        """Of the parts."""
        return tuple((self.groups * rows, columns) for rows in self.rows)

    def stacked(self, parts: Sequence[Structure]) -> Stacked:
        """The structure of the whole matrix."""
        return Stacked(tuple(parts), self.rows, self.groups)


def parts_of(asked: Split, name: str, rows: int, gates: int = 1) -> Parts | None:
    """What a user asked for, read.

    Args:
        asked: a number of equal parts; the rows of each part; ``"gates"``, of a recurrent net; or a mapping with
            ``rows``, which is one of these, and ``groups``: how often these rows repeat from top to bottom, where the
            queries, keys and values of each group of heads lie together.
        name: of the layer.
        rows: that its matrix has.
        gates: that its rows are made of.

    Returns:
        None for a matrix of a single gate.

    Raises:
        ModelError: it is none of these, or not the layer's rows; the message names the layer and its rows.
    """
    groups: object = 1
    given: object = asked
    if isinstance(asked, Mapping):
        if "rows" not in asked or not set(asked) <= {"rows", "groups"}:
            raise ModelError(
                f"{name} was asked to be split by {dict(asked)!r}. Give 'rows', and 'groups' if they repeat."
            )
        given, groups = asked["rows"], asked.get("groups", 1)
    if not _is_count(groups) or rows % groups:
        raise ModelError(f"{name} has {rows} outputs, which are not {groups!r} equal groups. Give a divisor of {rows}.")
    own = rows // groups
    within = f", {own} in each of {groups} groups" if groups > 1 else ""
    if given == GATES:
        if gates == 1:
            return None
        given = gates
    if _is_count(given):
        if given == 1 or own % given:
            raise ModelError(
                f"{name} has {rows} outputs{within}, which are not {given} equal parts of two or more. Give a divisor "
                f"of {own} above 1, or the outputs of each part, which are {own} in all."
            )
        return Parts((own // given,) * given, groups)
    if isinstance(given, Sequence) and not isinstance(given, str) and all(_is_count(size) for size in given):
        sizes = tuple(int(size) for size in given)
        if sum(sizes) != own or len(sizes) < 2:
            raise ModelError(
                f"{name} has {rows} outputs{within}; {len(sizes)} parts of {list(sizes)} are {sum(sizes)}. Give two or "
                f"more parts that are {own} in all."
            )
        return Parts(sizes, groups)
    raise ModelError(
        f"{name}, which has {rows} outputs, was asked to be split by {asked!r}. Give a number of equal parts, a list "
        f"of the outputs of each part, or {GATES!r} for a matrix of a recurrent net."
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

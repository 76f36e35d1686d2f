"""Cutting an index that runs over axes into parts of given sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar


class Sized(Protocol):
    """An axis of so many positions."""

    @property
    def size(self) -> int:
        """How many."""


Axis = TypeVar("Axis", bound=Sized)


def cut(
    axes: Iterable[Axis], sizes: Sequence[int], split: Callable[[Axis, int], tuple[Axis, Axis] | None]
) -> list[tuple[Axis, ...]] | None:
    """The axes that make up parts of these sizes, or None where a part ends within an axis that can't be split.

    Args:
        axes: outermost first.
        sizes: of the parts, outermost first; their product is that of the axes' sizes.
        split: of an axis and a divisor of its size, the outer axis of that size and the inner one; None if it is whole.
    """
    rest, parts = [*axes], []
    for size in sizes:
        part: list[Axis] = []
        while size > 1:
            axis = rest.pop(0)
            if size % axis.size == 0:
                part.append(axis)
                size //= axis.size
                continue
            halves = split(axis, size) if axis.size % size == 0 else None
            if halves is None:
                return None
            part.append(halves[0])
            rest.insert(0, halves[1])
            size = 1
        parts.append(tuple(part))
    return parts

"""What a stage is, and what many stages share: a square shape, no learned tensors, a matrix applied either way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self, cast


def binary_depth(terms: int) -> int:
    """Levels of fan-in-2 gates that a weighted sum of ``terms`` values takes (a scaling alone is one gate)."""
    return max(1, math.ceil(math.log2(terms))) if terms > 0 else 0


class Remembering:
    """What is found out about a program and kept with it, under names that begin with an underscore, is no part of it:
    it is neither copied nor pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}


class Stage(Remembering, ABC):
    """One linear map of a chain. Subclasses are frozen dataclasses and final."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Numbers that come in."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Numbers that go out."""

    @abstractmethod
    def transpose(self) -> Stage:
        """The transposed map (not conjugated), reading the same tensors."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, int]:
        """The learned tensors that the stage reads: name and number of entries."""

    @property
    def indices(self) -> tuple[str, ...]:
        """The fixed integer tensors that the stage reads."""
        return ()

    @abstractmethod
    def rename(self, name: Callable[[str], str]) -> Stage:
        """The same stage reading tensors under other names."""

    @property
    @abstractmethod
    def multiplications(self) -> int:
        """For one vector, in the arithmetic of its values."""

    @property
    @abstractmethod
    def additions(self) -> int:
        """Likewise."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Levels of gates ``alpha * g + beta * h``."""

    @abstractmethod
    def __str__(self) -> str:
        """A line that says what it is, with its sizes."""


class Square(Stage):
    """Of as many numbers out as in: subclasses have a field ``size``."""

    size: int

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size


class Turned(Stage):
    """A matrix (height, width) that is applied as it is, or transposed: subclasses have these fields."""

    height: int
    width: int
    transposed: bool

    @property
    def in_features(self) -> int:
        return self.height if self.transposed else self.width

    @property
    def out_features(self) -> int:
        return self.width if self.transposed else self.height

    def transpose(self) -> Self:
        turned: Self = replace(cast("Any", self), transposed=not self.transposed)
        return turned


class Unweighted(Stage):
    """What the stages without learned tensors share."""

    @property
    def weights(self) -> Mapping[str, int]:
        return {}

    def rename(self, name: Callable[[str], str]) -> Stage:
        return self

    @property
    def multiplications(self) -> int:
        return 0

    @property
    def additions(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 0

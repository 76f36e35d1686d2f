"""What compression must know of one kind of module: an adapter.

Two kinds of adapters are enough. A :class:`Layer` treats a module that multiplies by one matrix, or by several of one
form (the groups of a convolution): it finds the matrix, the rows that it multiplies, and builds the structured module.
A :class:`Splitter` treats a module that holds several matrices (a recurrent net, attention): it puts an equal module in
its place whose matrices are modules of their own, which then are layers like all others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from structmat.matrix import StructuredMatrix
from structmat.structure import Shape, Structure

Members = Callable[[int], Iterator[Structure]]
"""Members of a family, or of a form, with at most so many stored numbers."""


class Described(Protocol):
    """What adapters read of a :class:`structmat.compression.scan.Site`."""

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def copies(self) -> int: ...

    @property
    def detail(self) -> Hashable: ...


@dataclass(frozen=True)
class Load:
    """What a layer does for one sample.

    Args:
        rows: that each of its matrices multiplies.
        sizes: of its input, where the cost depends on these: height and width.
        lookups: rows of its matrix that are taken.
    """

    rows: float = 1.0
    sizes: tuple[int, ...] = ()
    lookups: float = 1.0


@dataclass(frozen=True)
class Content:
    """What a structured module holds.

    Args:
        structure, shape: of each of its matrices.
        copies: how many these are.
        dtype: of their numbers.
    """

    structure: Structure
    shape: Shape
    copies: int
    dtype: torch.dtype


class Layer(ABC):
    """How compression treats modules that multiply by one matrix, or by several of one form. Subclasses are final and
    have no state."""

    kinds: ClassVar[tuple[str, ...]]
    """All that :meth:`kind` may say."""

    looks_up: ClassVar[bool] = False
    """Whether rows of the matrix are taken instead of it being multiplied by. Then inputs are positions, and
    :meth:`rows` yields these, (copies, rows)."""

    form_names: ClassVar[tuple[str, ...]] = ()
    """All names that :meth:`forms` may have."""

    @abstractmethod
    def kind(self, module: nn.Module) -> str | None:
        """What the dense module is called in reports, or None if it is no business of this adapter."""

    @abstractmethod
    def is_structured(self, module: nn.Module) -> bool:
        """Whether :meth:`build` made it, or could have."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why a dense module can't be replaced whoever asks, or None."""
        return None

    def doubt(self, module: nn.Module) -> str | None:
        """Why a dense module is kept unless asked for, or None."""
        return None

    def declines(self, site: Described, structure: Structure) -> str | None:
        """Why a structure is none for this kind of module, or None."""
        return None

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, Shape]:
        """How many matrices a dense module has, and the shape ``(out, in)`` of each."""

    def detail(self, module: nn.Module) -> Hashable:
        """What else costs depend on; prints what it is, since results on disk are found by it."""
        return None

    @abstractmethod
    def matrices(self, module: nn.Module) -> Tensor:
        """The matrices of a dense module, (copies, out, in)."""

    @abstractmethod
    def assign(self, module: nn.Module, matrices: Tensor) -> None:
        """Write other matrices into a dense module."""

    @abstractmethod
    def rows(self, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
        """What the matrices of a dense or a structured module multiply in an input: (copies, rows, in), in parts."""

    @abstractmethod
    def output_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        """An output, or a gradient in it, by rows: (copies, rows, out)."""

    def sizes(self, module: nn.Module, x: Tensor) -> tuple[int, ...]:
        """Of an input, where the cost depends on them."""
        return ()

    def overlap(self, module: nn.Module) -> int:
        """Among so many rows of an input one is new: neighbouring patches overlap."""
        return 1

    @abstractmethod
    def build(self, module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
        """The structured module that takes the place of a dense one, with its bias, on its device."""

    def tied(self, layer: nn.Module, head: nn.Module) -> nn.Module:
        """What takes the place of a dense linear layer that held the weight of the module whose place ``layer`` took;
        asked of kinds that look up only."""
        raise NotImplementedError(f"{type(self).__name__} has no tied layers")

    @abstractmethod
    def empty(self, module: nn.Module, structure: Structure, dtype: torch.dtype, **more: Any) -> nn.Module:
        """The same without values, on the meta device; ``module`` may be structured already. ``more`` is what
        :meth:`saved` said."""

    @abstractmethod
    def content(self, module: nn.Module) -> Content:
        """What a structured module holds."""

    def paths(self, module: nn.Module) -> Mapping[str, str]:
        """Where a structured module keeps tensors that are not its own attributes: the structure's name to the path in
        the module. Files know the structure's names alone."""
        return {}

    def saved(self, module: nn.Module) -> Mapping[str, Any]:
        """What a file must hold of a structured module beside this, as JSON values."""
        return {}

    def longest_saved(self) -> Mapping[str, Any]:
        """Values that take no less room in a file than any that :meth:`saved` says."""
        return {}

    @abstractmethod
    def to_dense(self, module: nn.Module) -> nn.Module:
        """The dense module with the outputs of a structured one."""

    @abstractmethod
    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module:
        """A structured module for deployment."""

    def nonlinear(self) -> bool:
        """Whether a layer may become one that is not linear (:mod:`structmat.structures.nonlinear`)."""
        return False

    def stacks(self) -> bool:
        """Whether rows of the matrix may get structures of their own, in a ``Stacked``."""
        return False

    def forms(self, site: Described) -> Mapping[str, Members]:
        """Families that only this kind of module has, by name."""
        return {}

    @abstractmethod
    def flops(self, site: Described, structure: Structure, load: Load) -> float:
        """Operations for one sample."""

    @abstractmethod
    def microseconds(self, site: Described, structure: Structure, load: Load, samples: int) -> float:
        """Time on this machine for so many samples at once."""


class Splitter(ABC):
    """How compression treats modules that hold several matrices. Subclasses are final and have no state."""

    name: ClassVar[str]
    """In files."""

    @abstractmethod
    def splits(self, module: nn.Module) -> bool:
        """Whether it is a module that this adapter takes apart."""

    @abstractmethod
    def is_split(self, module: nn.Module) -> bool:
        """Whether it is what :meth:`split` makes."""

    @abstractmethod
    def split(self, module: nn.Module) -> nn.Module:
        """An equal module whose matrices are modules of their own. It shares the memory of the given one."""

    @abstractmethod
    def join(self, module: nn.Module) -> nn.Module:
        """The module that :meth:`split` takes, with the outputs of a split one: matrices written out."""

    def gates(self, module: nn.Module, part: str) -> int:
        """Of so many equal blocks of rows the matrix of a part of a split module is made."""
        return 1

    def feeds_back(self, part: str) -> bool:
        """Whether what a part multiplies depends on its own earlier outputs, as a state does."""
        return False

    @abstractmethod
    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module | None:
        """A split module for deployment; None if its parts are frozen one by one."""

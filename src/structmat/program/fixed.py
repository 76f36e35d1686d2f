"""Stages without tensors: fixed transforms, and permutations that follow from a size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from structmat.program.stage import Square, Unweighted, binary_depth
from structmat.sizes import is_power_of_two


@dataclass(frozen=True)
class Hadamard(Square, Unweighted):
    """The Sylvester-Hadamard matrix (entries 1 and -1), its own transpose: ``size * log2(size)`` additions."""

    size: int

    def __post_init__(self) -> None:
        assert self.size >= 1, self
        assert is_power_of_two(self.size), self

    @property
    def levels(self) -> int:
        return self.size.bit_length() - 1

    def transpose(self) -> Hadamard:
        return self

    @property
    def additions(self) -> int:
        return self.size * self.levels

    @property
    def depth(self) -> int:
        return self.levels

    def __str__(self) -> str:
        return "Hadamard"


@dataclass(frozen=True)
class Cosine(Square, Unweighted):
    """The orthonormal cosine transform of type II, ``C[k, j] = s_k cos(pi k (2 j + 1) / 2n)``; or its inverse, which is
    its transpose (type III). Cost model: half of that of a complex Fourier transform, and n rotations.
    """

    size: int
    inverse: bool = False

    def transpose(self) -> Cosine:
        return replace(self, inverse=not self.inverse)

    @property
    def multiplications(self) -> int:
        return round(self.size * math.log2(self.size)) + 2 * self.size

    @property
    def additions(self) -> int:
        return round(1.5 * self.size * math.log2(self.size)) + self.size

    @property
    def depth(self) -> int:
        return 2 * binary_depth(self.size) + 2

    def __str__(self) -> str:
        return "Inverse cosine transform" if self.inverse else "Cosine transform"


def cosine_entries(size: int) -> Tensor:
    """The orthonormal cosine transform of type II as a matrix in float64."""
    rows, columns = torch.arange(size), torch.arange(size)
    angle = (rows[:, None] * (2 * columns + 1)) % (4 * size)
    matrix = torch.cos(angle.to(torch.float64) * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


@runtime_checkable
class Order(Protocol):
    """A permutation that follows from sizes. Implementations are frozen dataclasses."""

    @property
    def size(self) -> int: ...

    def index(self) -> Tensor:
        """``p`` (size,) with ``y[i] = x[p[i]]``."""
        ...


@dataclass(frozen=True)
class Reorder(Unweighted):
    """``y[i] = x[p[i]]`` for a permutation that follows from sizes, so that nothing is stored."""

    order: Order
    inverse: bool = False

    @property
    def size(self) -> int:
        return self.order.size

    @property
    def in_features(self) -> int:
        return self.order.size

    @property
    def out_features(self) -> int:
        return self.order.size

    def transpose(self) -> Reorder:
        return replace(self, inverse=not self.inverse)

    def __str__(self) -> str:
        return f"Reorder by {self.order}{', inverse' if self.inverse else ''}"


def index_entries(stage: Reorder) -> Tensor:
    """The index tensor of the stage, on the CPU."""
    index = stage.order.index()
    return torch.argsort(index) if stage.inverse else index


@lru_cache(maxsize=256)
def index_of(stage: Reorder) -> Tensor:
    """The same, made once; compilers do not trace what is kept."""
    with torch.inference_mode(False):  # what is made in inference mode can't be used with gradients later
        return index_entries(stage)


@dataclass(frozen=True)
class EvensFirst:
    """In every block of ``block`` the even places, then the odd ones."""

    size: int
    block: int

    def index(self) -> Tensor:
        inner = torch.arange(self.block)
        return _in_blocks(torch.cat([inner[::2], inner[1::2]]), self.size)


@dataclass(frozen=True)
class HalfReversed:
    """In every block of ``block`` the first half, or the second, the other way round."""

    size: int
    block: int
    second: bool = False

    def index(self) -> Tensor:
        first, second = torch.arange(self.block).split([(self.block + 1) // 2, self.block // 2])
        inner = [first, second.flip(0)] if self.second else [first.flip(0), second]
        return _in_blocks(torch.cat(inner), self.size)


@dataclass(frozen=True)
class Exchanged:
    """Blocks of ``width`` neighbours: those whose numbers differ in the binary digit ``stride`` change places."""

    size: int
    width: int
    stride: int

    def index(self) -> Tensor:
        blocks = torch.arange(self.size // self.width) ^ self.stride
        return (blocks[:, None] * self.width + torch.arange(self.width)).flatten()


def _in_blocks(inner: Tensor, size: int) -> Tensor:
    return (torch.arange(0, size, len(inner))[:, None] + inner).flatten()

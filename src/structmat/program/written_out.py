"""Stages that are a function of their tensors: of rows and tensors, or from the tensors to a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from structmat.program.stage import Turned, binary_depth

if TYPE_CHECKING:
    from structmat.program.combinators import Program


@dataclass(frozen=True)
class Call(Turned):
    """Any linear PyTorch function ``function(x, *tensors)`` of rows ``x`` (batch, width), with a stated cost.

    ``function`` is a module-level function (so that equal stages compare equal). The transpose is its vector-Jacobian
    product. It has no native kernel: this is how an idea works on its first day.
    """

    function: Callable[..., torch.Tensor]
    tensors: tuple[tuple[str, int], ...]
    height: int
    width: int
    forward_multiplications: int
    forward_additions: int
    forward_depth: int
    transposed: bool = False

    @property
    def weights(self) -> Mapping[str, int]:
        return dict(self.tensors)

    def rename(self, name: Callable[[str], str]) -> Call:
        return replace(self, tensors=tuple((name(n), size) for n, size in self.tensors))

    @property
    def multiplications(self) -> int:
        return self.forward_multiplications

    @property
    def additions(self) -> int:
        """By the transposition principle the transpose of a p x q circuit takes p - q additions more."""
        change = self.height - self.width if self.transposed else 0
        return max(0, self.forward_additions + change)

    @property
    def depth(self) -> int:
        return self.forward_depth

    def __str__(self) -> str:
        return f"Call {self.function.__name__}{', transposed' if self.transposed else ''}"


@dataclass(frozen=True)
class Generated(Turned):
    """One product with a matrix whose entries are a function of the tensors: it is written out at each call, and then
    multiplied by.

    The explicit and stable form of what has faster forms only where these are stable: Cauchy, Vandermonde and Krylov
    matrices, values of polynomials. ``function(*tensors, *fixed, *arguments)`` is a module-level function that gives
    the matrix (height, width), differentiable, in the dtype of the tensors; its own operations are not counted, since
    they serve a whole batch.

    Args:
        function: makes the matrix.
        tensors: names and numbers of entries, in the order of its arguments.
        arguments: further ones, plain values.
        height, width: of the matrix.
        fixed: names of integer tensors, which come after the others.
        linear: names of the tensors in each of which the matrix is linear.
        signed: names of those that count with their sign in ``size``.
        roundings: relative errors, in units of the precision, that an entry may have against ``size``.
        size: what rounding errors of the entries are proportional to, like ``function`` but of the moduli of the
            tensors; ``function`` itself if None, as is right for sums of products.
        fast: what stands for the stage when its tensors are fixed, where that is stable; None writes the matrix out.
    """

    function: Callable[..., torch.Tensor]
    tensors: tuple[tuple[str, int], ...]
    arguments: tuple[int | float | str, ...]
    height: int
    width: int
    fixed: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()
    roundings: int = 4
    size: Callable[..., torch.Tensor] | None = None
    fast: Callable[..., tuple[Program, dict[str, torch.Tensor]] | None] | None = None
    transposed: bool = False

    @property
    def weights(self) -> Mapping[str, int]:
        return dict(self.tensors)

    def rename(self, name: Callable[[str], str]) -> Generated:
        tensors = tuple((name(n), size) for n, size in self.tensors)
        fixed, linear, signed = (tuple(map(name, names)) for names in (self.fixed, self.linear, self.signed))
        return replace(self, tensors=tensors, fixed=fixed, linear=linear, signed=signed)

    @property
    def indices(self) -> tuple[str, ...]:
        return self.fixed

    @property
    def multiplications(self) -> int:
        return self.height * self.width

    @property
    def additions(self) -> int:
        return self.out_features * (self.in_features - 1)

    @property
    def depth(self) -> int:
        return binary_depth(self.in_features)

    def __str__(self) -> str:
        return f"{self.function.__name__.replace('_', ' ').capitalize()} written out{', transposed' * self.transposed}"

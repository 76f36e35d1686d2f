"""What is to be approximated, and what a family answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from structmat.structure import Shape

_RELATIVE_RANK_TOLERANCE = 1e-12
"""Eigenvalues of a second moment below this share of the largest are rounding: inputs that never occur."""


class Certificate(enum.Enum):
    """What is known about the distance of a projection from the best member of its family."""

    OPTIMAL = "optimal"
    """No member is nearer in the norm of the target: a theorem."""

    BOUND = "bound"
    """No member is nearer than ``lower_bound``, which is proved."""

    NONE = "none"
    """A descent that ended; nothing is known but that it is no worse than its start."""


@dataclass(frozen=True)
class Fit:
    """A family's answer to a target.

    Args:
        tensors: by name, in the dtype of the target's weight.
        certificate: what is known about optimality.
        lower_bound: no member of the family has a smaller error in the target's norm (absolute; for a padded target,
            before padding), 0 if nothing is known.
        method: how it was found, in a few words.
    """

    tensors: Mapping[str, Tensor]
    certificate: Certificate
    lower_bound: float
    method: str


@dataclass(frozen=True)
class Target:
    """A matrix to approximate in the norm ``||B^(1/2) (W - S) C^(1/2)||_F``, with the identity for a moment of None.

    A family sees an ``output_moment`` only if it declares that it weighs outputs; otherwise its fit for the identity is
    refined afterwards (:mod:`structmat.projection.refine_outputs`).

    Args:
        weight: (out, in), float64 or complex128, padded with zeros to the family's native shape.
        second_moment: (in, in) symmetric positive semidefinite, or None for the identity. Zero rows and columns stand
            for padding: what a member does there is free.
        shape: the shape before padding. Rows from ``shape[0]`` on are not part of the problem.
        sweeps: how many sweeps of an iterative fit may be spent. 0 asks for the closed-form start alone.
        seed: for fits with random starts; equal seeds give equal results.
        output_moment: (out, out) symmetric positive semidefinite ``B``, such as the second moment of a loss's gradients
            in the outputs (the squared norm is then the Kronecker-factored quadratic model of the loss: Martens and
            Grosse 2015), or None for the identity.
    """

    weight: Tensor
    second_moment: Tensor | None
    shape: Shape
    sweeps: int = 20
    seed: int = 0
    output_moment: Tensor | None = None

    @property
    def native(self) -> Shape:
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def is_padded(self) -> bool:
        return self.native != self.shape

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def replace_weight(self, weight: Tensor) -> Target:
        """The same norm and options for another matrix; what was computed from the second moment is kept."""
        return self._keeping_norm(replace(self, weight=weight))

    def replace_sweeps(self, sweeps: int) -> Target:
        """The same problem with another number of sweeps; what was computed from the second moment is kept."""
        return self._keeping_norm(replace(self, sweeps=sweeps))

    def _keeping_norm(self, other: Target) -> Target:
        for name in ("_eigen", "root", "inverse_root", "_output_eigen", "output_root", "inverse_output_root"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def unweighted(self) -> Target:
        """The same matrix in the Frobenius norm. Always the same object, so that its decomposition is shared."""
        if self.second_moment is None and self.output_moment is None:
            return self
        if "plain" not in self._derived:
            self._derived["plain"] = replace(self, second_moment=None, output_moment=None)
        return self._derived["plain"]

    def without_output_moment(self) -> Target:
        """The same target with all outputs weighing the same."""
        if self.output_moment is None:
            return self
        if "inputs" not in self._derived:
            other = replace(self, output_moment=None)
            for name in ("_eigen", "root", "inverse_root"):
                if name in self.__dict__:
                    other.__dict__[name] = self.__dict__[name]
            self._derived["inputs"] = other
        return self._derived["inputs"]

    def padded(self, native: Shape) -> Target:
        """The target embedded in a larger shape. In a weighted norm what is padded has moment zero."""
        if native == self.native:
            return self
        if native not in self._derived:
            weight = self.weight.new_zeros(native)
            weight[: self.native[0], : self.native[1]] = self.weight
            inputs, outputs = _embed(self.second_moment, native[1]), _embed(self.output_moment, native[0])
            self._derived[native] = replace(self, weight=weight, second_moment=inputs, output_moment=outputs)
        return self._derived[native]

    @cached_property
    def _derived(self) -> dict[Shape | str, Target]:
        """Targets made from this one, kept so that fits of one shape share their decompositions."""
        return {}

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (rounding removed) and eigenvectors of the second moment."""
        assert self.second_moment is not None
        return _eigen(self.second_moment)

    @cached_property
    def root(self) -> Tensor | None:
        """``C^(1/2)``, symmetric, or None for the identity."""
        if self.second_moment is None:
            return None
        return _root(*self._eigen)

    @cached_property
    def inverse_root(self) -> Tensor | None:
        """The pseudo-inverse of ``C^(1/2)``: zero on inputs that never occur. None for the identity."""
        if self.second_moment is None:
            return None
        return _inverse_root(*self._eigen)

    @cached_property
    def _output_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (rounding removed) and eigenvectors of the output moment."""
        assert self.output_moment is not None
        return _eigen(self.output_moment)

    @cached_property
    def output_root(self) -> Tensor | None:
        """``B^(1/2)``, symmetric, or None for the identity."""
        return None if self.output_moment is None else _root(*self._output_eigen)

    @cached_property
    def inverse_output_root(self) -> Tensor | None:
        """The pseudo-inverse of ``B^(1/2)``: zero on outputs that do not count. None for the identity."""
        return None if self.output_moment is None else _inverse_root(*self._output_eigen)

    @cached_property
    def whitened(self) -> Tensor:
        """``B^(1/2) W C^(1/2)``: the matrix whose plain Frobenius distances are the target's norm."""
        whitened = self.weight if self.root is None else self.weight @ self.root
        return whitened if self.output_root is None else self.output_root @ whitened

    @cached_property
    def whitened_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD ``(U, s, Vh)`` of :attr:`whitened`; shared by every fit of this target that needs it."""
        u, s, vh = torch.linalg.svd(self.whitened, full_matrices=False)
        return u, s, vh

    def error(self, dense: Tensor) -> float:
        """The distance of a member, given as a dense matrix of the native or the unpadded shape; padding is free."""
        rows, columns = self.shape
        difference = self.weight[:rows, :columns] - dense[:rows, :columns].to(self.weight)
        if self.root is not None:
            difference = difference @ self.root[:columns, :columns]
        if self.output_root is not None:
            difference = self.output_root[:rows, :rows] @ difference
        return float(torch.linalg.norm(difference))

    def squared(self, difference: Tensor) -> float:
        """``||B^(1/2) difference C^(1/2)||_F^2`` for a difference of the native shape, without taking roots."""
        image = difference if self.second_moment is None else difference @ self.second_moment
        image = image if self.output_moment is None else self.output_moment @ image
        return float((image * difference.conj()).real.sum().clamp(min=0.0))

    def norm(self) -> float:
        """The size of the target in its own norm."""
        return self.error(torch.zeros_like(self.weight))


def _embed(moment: Tensor | None, size: int) -> Tensor | None:
    if moment is None:
        return None
    larger = moment.new_zeros(size, size)
    larger[: moment.shape[0], : moment.shape[0]] = moment
    return larger


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    floor = values.max().clamp(min=0.0) * _RELATIVE_RANK_TOLERANCE
    return torch.where(values > floor, values, torch.zeros_like(values)), vectors


def _root(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * values.sqrt()) @ vectors.mH


def _inverse_root(values: Tensor, vectors: Tensor) -> Tensor:
    inverse = torch.where(values > 0, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), values)
    return (vectors * inverse) @ vectors.mH

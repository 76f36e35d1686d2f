"""What is to be approximated, and what a family answers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from structmat.structure import Shape

_T = TypeVar("_T")

Facts = dict[Hashable, Any]
"""What was computed from one moment, or from one weight in one norm, by key; shared by all targets that have it."""

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
        error: of this member in the target's norm (absolute) where the family has measured it anyway, else None. Of the
            target that it was given: not for a padded one.
    """

    tensors: Mapping[str, Tensor]
    certificate: Certificate
    lower_bound: float
    method: str
    error: float | None = None


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
        """The shape after padding."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def is_padded(self) -> bool:
        """Whether these shapes differ."""
        return self.native != self.shape

    def generator(self) -> torch.Generator:
        """A fresh one of the seed."""
        return torch.Generator().manual_seed(self.seed)

    def replace_weight(self, weight: Tensor) -> Target:
        """The same norm and options for another matrix; what was computed from the moments is kept."""
        return self._sharing(replace(self, weight=weight))

    def replace_sweeps(self, sweeps: int) -> Target:
        """The same problem with another number of sweeps; what was computed from it is kept."""
        other = self._sharing(replace(self, sweeps=sweeps))
        other.__dict__["_weight_facts"] = self._weight_facts
        return other

    def _sharing(self, other: Target) -> Target:
        other.__dict__.update(_input_facts=self._input_facts, _output_facts=self._output_facts)
        return other

    def input_fact(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What depends on the second moment of the inputs alone, made once for all targets that were made from one
        another and have the same."""
        return _remember(self._input_facts, key, make)

    def output_fact(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The same for the moment of the outputs."""
        return _remember(self._output_facts, key, make)

    def weight_fact(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The same for what depends on the weight and the norm, made once whatever the number of sweeps."""
        return _remember(self._weight_facts, key, make)

    def unweighted(self) -> Target:
        """The same matrix in the Frobenius norm. Always the same object, so that its decomposition is shared."""
        if self.second_moment is None and self.output_moment is None:
            return self
        if "plain" not in self._derived:
            other = replace(self, second_moment=None, output_moment=None)
            other.__dict__["_weight_facts"] = self._facts_of("plain")
            self._derived["plain"] = other
        return self._derived["plain"]

    def without_output_moment(self) -> Target:
        """The same target with all outputs weighing the same."""
        if self.output_moment is None:
            return self
        if "inputs" not in self._derived:
            other = replace(self, output_moment=None)
            other.__dict__.update(_input_facts=self._input_facts, _weight_facts=self._facts_of("inputs"))
            self._derived["inputs"] = other
        return self._derived["inputs"]

    def padded(self, native: Shape) -> Target:
        """The target embedded in a larger shape. In a weighted norm what is padded has moment zero."""
        if native == self.native:
            return self
        if native not in self._derived:
            weight = self.weight.new_zeros(native)
            weight[: self.native[0], : self.native[1]] = self.weight
            inputs, input_facts = _embedded(self.second_moment, native[1], self._input_facts)
            outputs, output_facts = _embedded(self.output_moment, native[0], self._output_facts)
            larger = replace(self, weight=weight, second_moment=inputs, output_moment=outputs)
            weight_facts = self._facts_of(native)
            larger.__dict__.update(_input_facts=input_facts, _output_facts=output_facts, _weight_facts=weight_facts)
            self._derived[native] = larger
        return self._derived[native]

    def of_rows(self, index: Tensor) -> Target:
        """Some of the outputs of a target that is not padded, as a target of their own, in the same norm of the inputs.

        Args:
            index: (rows,), which these are.
        """
        assert not self.is_padded, "rows of a padded target"

        def make() -> Target:
            outputs = self.output_moment
            other = replace(
                self,
                weight=self.weight[index],
                shape=(len(index), self.shape[1]),
                output_moment=None if outputs is None else outputs[index[:, None], index],
            )
            other.__dict__["_input_facts"] = self._input_facts
            return other

        return self.weight_fact(("rows", tuple(index.tolist())), make).replace_sweeps(self.sweeps)

    @cached_property
    def _derived(self) -> dict[Shape | str, Target]:
        """Targets made from this one, kept so that fits of one shape share their decompositions."""
        return {}

    @cached_property
    def _input_facts(self) -> Facts:
        return {}

    @cached_property
    def _output_facts(self) -> Facts:
        return {}

    @cached_property
    def _weight_facts(self) -> Facts:
        return {}

    def _facts_of(self, derived: Shape | str) -> Facts:
        """Those of a target made from this one, whatever its sweeps."""
        return self.weight_fact(("facts", derived), lambda: cast(Facts, {}))

    @property
    def root(self) -> Tensor | None:
        """``C^(1/2)``, symmetric, or None for the identity."""
        return _root(self.second_moment, self._input_facts)

    @property
    def inverse_root(self) -> Tensor | None:
        """The pseudo-inverse of ``C^(1/2)``: zero on inputs that never occur. None for the identity."""
        return _inverse_root(self.second_moment, self._input_facts)

    @property
    def output_root(self) -> Tensor | None:
        """``B^(1/2)``, symmetric, or None for the identity."""
        return _root(self.output_moment, self._output_facts)

    @property
    def inverse_output_root(self) -> Tensor | None:
        """The pseudo-inverse of ``B^(1/2)``: zero on outputs that do not count. None for the identity."""
        return _inverse_root(self.output_moment, self._output_facts)

    @property
    def whitened(self) -> Tensor:
        """``B^(1/2) W C^(1/2)``: the matrix whose plain Frobenius distances are the target's norm."""

        def make() -> Tensor:
            whitened = self.weight if self.root is None else self.weight @ self.root
            return whitened if self.output_root is None else self.output_root @ whitened

        return self.weight_fact("whitened", make)

    @property
    def whitened_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD ``(U, s, Vh)`` of :attr:`whitened`; shared by every fit of this target that needs it."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            u, s, vh = torch.linalg.svd(self.whitened, full_matrices=False)
            return u, s, vh

        return self.weight_fact("whitened SVD", make)

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
        if self.second_moment is None and self.output_moment is None:
            return float(torch.linalg.norm(self.weight))
        return self.error(torch.zeros_like(self.weight))


def _remember(facts: Facts, key: Hashable, make: Callable[[], _T]) -> _T:
    if key not in facts:
        facts[key] = make()
    return cast(_T, facts[key])


def _embedded(moment: Tensor | None, size: int, facts: Facts) -> tuple[Tensor | None, Facts]:
    """A moment among zeros, and what is known of it: roots of what is padded are padded roots."""
    if moment is None or moment.shape[0] == size:
        return moment, facts

    def make() -> tuple[Tensor, Facts]:
        known = {name: _embed(facts[name], size) for name in (_ROOT, _INVERSE_ROOT) if name in facts}
        return _embed(moment, size), cast(Facts, known)

    return _remember(facts, ("embedded", size), make)


def _embed(moment: Tensor, size: int) -> Tensor:
    larger = moment.new_zeros(size, size)
    larger[: moment.shape[0], : moment.shape[0]] = moment
    return larger


_EIGEN, _ROOT, _INVERSE_ROOT = "eigenvectors", "root", "inverse root"


def _eigen(moment: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
    """Eigenvalues (rounding removed) and eigenvectors."""

    def make() -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(moment)
        floor = values.max().clamp(min=0.0) * _RELATIVE_RANK_TOLERANCE
        return torch.where(values > floor, values, torch.zeros_like(values)), vectors

    return _remember(facts, _EIGEN, make)


def _root(moment: Tensor | None, facts: Facts) -> Tensor | None:
    if moment is None:
        return None

    def make() -> Tensor:
        values, vectors = _eigen(moment, facts)
        return (vectors * values.sqrt()) @ vectors.mH

    return _remember(facts, _ROOT, make)


def _inverse_root(moment: Tensor | None, facts: Facts) -> Tensor | None:
    if moment is None:
        return None

    def make() -> Tensor:
        values, vectors = _eigen(moment, facts)
        inverse = torch.where(values > 0, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), values)
        return (vectors * inverse) @ vectors.mH

    return _remember(facts, _INVERSE_ROOT, make)

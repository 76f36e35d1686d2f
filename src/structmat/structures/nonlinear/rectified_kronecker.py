"""Sums of Kronecker products with a rectifier between the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch

from structmat.errors import StructureError
from structmat.program import Program
from structmat.projection.kronecker import Pairs, application_order
from structmat.projection.target import Fit, Target
from structmat.structure import Constant, ParameterSpec, Shape, Structure, check_size, whole
from structmat.structures.kronecker import Kronecker


@final
@dataclass(frozen=True)
class RectifiedKronecker(Structure):
    """``sum over t of phi_t(L_t X) R_t``; ``phi_t(z) = max(z, 0) + a_t min(z, 0)``, and the slopes a_t start at 1.

    At the start it is the sum of Kronecker products :class:`Kronecker` with the same factors: it is fitted as that, and
    as a matrix it is that. A layer of it is a :class:`structmat.nn.KroneckerBlock`, whose slopes are learned beside the
    factors: ``terms`` more numbers than the linear sum has. Hogue, Kirby and Narayan, "Weight matrix dimensionality
    reduction in deep learning via Kronecker multi-layer architectures" (2022), with the rectifier of He et al. (2015)
    as the activation, so that a trained layer starts as its linear approximation.

    Args:
        terms, factors: as of :class:`Kronecker`, two factors.
    """

    by_default: ClassVar[bool] = False
    supports_complex: ClassVar[bool] = False
    is_matrix: ClassVar[bool] = False

    terms: int | float = 2
    factors: int | tuple[tuple[int, int], ...] = 2

    def __post_init__(self) -> None:
        check_size(self, "terms", self.terms)
        if (len(self.linear.pairs) if isinstance(self.factors, tuple) else self.linear.factors) != 2:
            raise StructureError(
                f"RectifiedKronecker(factors={self.factors!r}) has two factors, with the rectifier between. For more, "
                "convert the model with to_kronecker."
            )

    @property
    def linear(self) -> Kronecker:
        """The sum that it is at the start."""
        return Kronecker(self.terms, self.factors)

    @property
    def pairs(self) -> Pairs:
        """Sizes of the factors of a resolved structure."""
        return self.linear.pairs

    def resolve(self, shape: Shape) -> RectifiedKronecker:
        return replace(self, factors=self.linear.resolve(shape).pairs)

    def restriction(self, shape: Shape) -> str | None:
        return self.linear.restriction(shape)

    def native_shape(self, shape: Shape) -> Shape:
        return self.linear.native_shape(shape)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        terms = whole(self.terms)
        # Between the factors the terms are the middle axis: (m, k, p) left first, (n, k, q) right first.
        return {**self.linear.parameters(shape), "slope0": ParameterSpec((1, terms, 1), Constant(1.0))}

    def program(self, shape: Shape) -> Program:
        return self.linear.program(shape)

    def project(self, target: Target) -> Fit:
        found = self.linear.project(target)
        slopes = torch.ones(1, whole(self.terms), 1, dtype=target.weight.dtype, device=target.weight.device)
        return replace(found, tensors={**found.tensors, "slope0": slopes})

    @property
    def order(self) -> tuple[int, ...]:
        """In which the factors of a resolved structure are applied; with a rectifier between, part of the function."""
        return application_order(self.pairs)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        for family in Kronecker.configurations(shape, budget):
            if len(family.pairs) == 2:
                terms = min(whole(family.terms), budget // (sum(m * n for m, n in family.pairs) + 1))
                if terms:
                    yield cls(terms, family.pairs)

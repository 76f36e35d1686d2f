"""Chains of contractions: deformable butterfly matrices of any pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self, final

from structmat.chains import chain_parameters, chain_program, chain_shape, chain_size
from structmat.errors import StructureError
from structmat.program import Contraction, Program, chainable
from structmat.projection.chain import fit_chain
from structmat.projection.target import Fit, Target
from structmat.sizes import Pattern, smallest_chain, smooth_size
from structmat.structure import ParameterSpec, Shape, Structure

_FACTORS = 3
"""Factors of the automatic chain: more save parameters, fewer run faster."""

_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@final
@dataclass(frozen=True)
class Chain(Structure):
    """A product of contractions ``(a, b, c, d)``, each supported on ``I_a (x) 1_{b x c} (x) I_d``.

    Neighbours must be chainable: then the product has a pattern again, its blocks have a known rank, and there are
    guarantees for the projection. With (a1, b1, c1, d1) applied after (a2, b2, c2, d2): a1 divides a2, d2 divides d1,
    and ``a1 c1 / a2 = b2 d2 / d1`` is an integer, the rank of the interface. Low rank, block diagonal, Monarch and
    butterfly matrices are such chains. ``factor0``, applied first, and the others have the shapes of their patterns;
    parameters and multiply-adds are the sum of ``a b c d``. Smaller shapes than the chain's own are padded.

    Projection: hierarchical factorization and block coordinate descent with a lower bound; one or two factors are
    optimal. Source: Lin et al., "Deformable Butterfly" (NeurIPS 2021); Zheng et al. (SIMAX 2025).

    Args:
        patterns: in order of application. Where not given, the smallest chain of at most three factors for the shape.

    Raises:
        StructureError: a pattern is no four positive integers, or neighbours are not chainable.
    """

    weighs_outputs: ClassVar[bool] = True

    patterns: tuple[Pattern, ...] | None = None

    def __post_init__(self) -> None:
        if self.patterns is None:
            return
        if not self.patterns:
            raise StructureError("Chain(patterns=()): a chain has at least one pattern (a, b, c, d).")
        for pattern in self.patterns:
            sizes: tuple[object, ...] = tuple(pattern)
            if len(sizes) != 4 or not all(isinstance(n, int) and n >= 1 for n in sizes):
                raise StructureError(f"Chain: {pattern!r} is no pattern. Use four integers (a, b, c, d) of at least 1.")
        for first, second in pairwise(self.patterns):
            if chainable(Contraction("", *first), Contraction("", *second)) is None:
                raise StructureError(
                    f"Chain: {first} followed by {second} is not chainable. With (a2, b2, c2, d2) followed by "
                    "(a1, b1, c1, d1), a1 must divide a2, d2 must divide d1, and a1 * c1 / a2 = b2 * d2 / d1 must be "
                    "an integer."
                )

    def resolve(self, shape: Shape) -> Chain:
        if self.patterns is not None:
            return self
        return replace(self, patterns=smallest_chain(_smooth(shape), _FACTORS))

    def restriction(self, shape: Shape) -> str | None:
        own = self.native_shape(shape)
        if own[0] < shape[0] or own[1] < shape[1]:
            return f"its patterns make a matrix of shape {own}. Leave them out to have them chosen for the shape."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        assert self.patterns is not None, "unresolved chain"
        return chain_shape(self.patterns)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        assert self.patterns is not None, "unresolved chain"
        return chain_parameters(self.patterns)

    def program(self, shape: Shape) -> Program:
        assert self.patterns is not None, "unresolved chain"
        return chain_program(self.patterns)

    def project(self, target: Target) -> Fit:
        assert self.patterns is not None, "unresolved chain"
        return fit_chain(target, self.patterns)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """The smallest chains of two, three and four factors, each with the largest rank that fits."""
        native, seen = _smooth(shape), set()
        for most in (2, 3, 4):
            largest = None
            for rank in _RANKS:
                patterns = smallest_chain(native, most, rank)
                if chain_size(patterns) > budget or (len(patterns) > 1 and not _is_lean(patterns, rank)):
                    break
                largest = patterns
            if largest is not None and largest not in seen:
                seen.add(largest)
                yield cls(largest)
        if not seen and chain_size(longest := smallest_chain(native)) <= budget:
            yield cls(longest)


def _smooth(shape: Shape) -> Shape:
    return smooth_size(shape[0]), smooth_size(shape[1])


def _is_lean(patterns: tuple[Pattern, ...], rank: int) -> bool:
    """Whether no two neighbours could be merged at no cost: the rank is below the inner sizes on either side."""
    return rank == 1 or all(rank < min(after[1], before[2]) for before, after in pairwise(patterns))

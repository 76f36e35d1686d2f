"""Butterfly and kaleidoscope matrices that are orthogonal, or unitary, whatever their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.program import Chain, Contraction, Derived, Diagonal, Program
from structmat.program.derived import Phases, Rotations
from structmat.projection.kaleidoscope import kaleidoscope_patterns
from structmat.projection.orthogonal import fit_orthogonal
from structmat.projection.target import Fit, Target
from structmat.sizes import Pattern
from structmat.structure import Normal, ParameterSpec, Shape, Structure, check_count
from structmat.structures.permutation import square_only


@dataclass(frozen=True)
class _RandomPhases:
    """Signs, or numbers of modulus 1, all equally likely."""

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        drawn = Normal(1.0).draw(shape, generator=generator, dtype=dtype, device=device)
        return drawn.sgn() if drawn.is_complex() else torch.where(drawn < 0, -1.0, 1.0).to(drawn)


@final
@dataclass(frozen=True)
class OrthogonalButterfly(Structure):
    """A butterfly matrix of rotations: orthogonal for all values of its parameters, so under every optimizer.

    ``factor0``, ... are (n / 2s, 2, s): the two numbers of a block are the cosine and the sine of its rotation, times
    any length, n in all for each factor; ``phases`` (n,) are signs of the outputs, which no gradient moves. In complex
    dtypes the blocks are special unitary and the phases numbers of modulus 1, which makes every unitary butterfly. The
    inverse is the (conjugate) transpose; errors do not grow. A power of two, square.

    With ``pairs`` products of a butterfly and a transposed one it is an orthogonal kaleidoscope, which holds every
    permutation and Householder reflection. Projection: coordinate descent over the factors, each step the exact
    (Procrustes) optimum; monotone, no certificate. Weighted norms are ignored by it.
    Source: Dao et al. (ICLR 2020); Mathieu and LeCun 2014 for rotations on butterflies.

    Args:
        pairs: of a butterfly and a transposed one; 0 for a single butterfly.
    """

    closed_under_scaling: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    pairs: int = 0

    def __post_init__(self) -> None:
        check_count(self, "pairs", self.pairs, minimum=0)

    def restriction(self, shape: Shape) -> str | None:
        if shape[0] == shape[1] and shape[0] & (shape[0] - 1):
            power = 1 << shape[0].bit_length()
            return f"its size is a power of two. Use {power // 2} or {power}, or a Kaleidoscope, which is padded."
        return square_only(self, shape)

    def _patterns(self, shape: Shape) -> tuple[Pattern, ...]:
        if shape[0] == 1:
            return ()
        patterns = kaleidoscope_patterns(shape[0], max(1, self.pairs))
        return patterns if self.pairs else patterns[len(patterns) // 2 :]

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        found = {
            f"factor{i}": ParameterSpec((a, 2, d), Normal(1.0)) for i, (a, _, _, d) in enumerate(self._patterns(shape))
        }
        return {**found, "phases": ParameterSpec((shape[0],), _RandomPhases())}

    def program(self, shape: Shape) -> Program:
        factors = [
            Derived(Contraction(f"factor{i}", *pattern), Rotations()) for i, pattern in enumerate(self._patterns(shape))
        ]
        return Chain((*factors, Derived(Diagonal("phases", shape[0]), Phases())))

    def project(self, target: Target) -> Fit:
        return fit_orthogonal(target, self._patterns(target.native))

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if shape[0] != shape[1] or shape[0] & (shape[0] - 1):
            return
        if sum(spec.numel for spec in cls().parameters(shape).values()) <= budget:
            yield cls()

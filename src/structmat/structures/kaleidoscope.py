"""Kaleidoscope matrices: products of butterflies and transposed butterflies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.chains import OrthogonalBlocks, chain_program, chain_size
from structmat.program import Chain, Crop, Pad, Program
from structmat.projection.kaleidoscope import fit_kaleidoscope, kaleidoscope_patterns
from structmat.projection.target import Fit, Target
from structmat.sizes import Pattern, is_power_of_two, power_of_two
from structmat.structure import DENSE_GAIN, ParameterSpec, Shape, Structure, check_count


@final
@dataclass(frozen=True)
class Kaleidoscope(Structure):
    """The class ``(BB*)^w_e``: ``width`` products of a butterfly and a transposed one, on ``expansion`` times the size.

    The matrix is the upper left corner of the product. Strides go down from N / 2 to 1 and up again, ``width`` times;
    where two parts meet at one stride, one factor stands for both, which leaves ``width * (2 log2 N - 2) + 1`` factors
    of 2 x 2 blocks, 2 N numbers each, for ``N = expansion * n`` with n the power of two that holds the shape. Width 1
    holds every permutation, convolution and Householder reflection; a circuit of s gates and depth d is in it at width
    O(d) and expansion O(s / n) (``structmat.circuit.kaleidoscope``). Closed under transposition; products add widths.
    In complex arithmetic for complex dtypes; ``RealPart(Kaleidoscope(...))`` has complex factors in a real layer.

    Projection: starts from the nearest butterfly, transposed butterfly and permutation, then alternating least squares;
    monotone, no certificate. Random matrices are far from any small width.
    Source: Dao et al., "Kaleidoscope: an efficient, learnable representation for all structured linear maps" (ICLR
    2020).

    Args:
        width: products of a butterfly and a transposed one.
        expansion: a power of two.
    """

    by_default: ClassVar[bool] = False

    width: int = 1
    expansion: int = 1

    def __post_init__(self) -> None:
        check_count(self, "width", self.width)
        check_count(self, "expansion", self.expansion)

    def restriction(self, shape: Shape) -> str | None:
        if not is_power_of_two(self.expansion):
            power = 1 << self.expansion.bit_length()
            return f"an expansion is a power of two. Use expansion={power // 2} or {power}."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        size = power_of_two(max(shape))
        return size, size

    def _patterns(self, shape: Shape) -> tuple[Pattern, ...]:
        return kaleidoscope_patterns(self.expansion * shape[0], self.width)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        patterns = self._patterns(shape)
        gain = (DENSE_GAIN * self.expansion) ** (0.5 / len(patterns))  # the corner keeps a share of the energy
        return {f"factor{i}": ParameterSpec(pattern, OrthogonalBlocks(gain)) for i, pattern in enumerate(patterns)}

    def program(self, shape: Shape) -> Program:
        size = self.expansion * shape[0]
        return Chain((Pad(shape[1], size), chain_program(self._patterns(shape)), Crop(size, shape[0])))

    def project(self, target: Target) -> Fit:
        return fit_kaleidoscope(target, self._patterns(target.native), self.program(target.native))

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if chain_size(cls()._patterns(cls().native_shape(shape))) <= budget:
            yield cls()

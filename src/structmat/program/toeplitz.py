"""The stage of Toeplitz, Hankel and circulant blocks, and the choice of its algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from structmat.program.stage import Stage, binary_depth
from structmat.sizes import smooth_size


@dataclass(frozen=True)
class Convolution(Stage):
    """Blocks of Toeplitz or Hankel matrices: ``y[b] = sum over c of T(w[b, c]) x[c]``.

    ``x`` is (inputs, width), ``y`` (outputs, height), ``weight`` (outputs, inputs, entries), or of any shape with the
    same entries in the same order. Without a ``twist`` a block is a free Toeplitz matrix,
    ``T[i, j] = w[i - j + width - 1]``, with ``height + width - 1`` entries. With a twist f and ``period`` entries it is
    the corner of an f-circulant matrix, ``T[i, j] = w[i - j]`` on and below the diagonal and
    ``f * w[i - j + period]`` above. Where ``hankel`` is set the entries run the other way:
    ``T[i, j] = w[i + j]``, and ``f * w[i + j - period]`` from the period on.

    ``transform`` says which algorithm runs: fast Fourier transforms, which are stable here since nothing is divided,
    or one product with the blocks written out, which is faster for small ones. Cost model of the transforms: half of a
    complex transform (:class:`Fourier`) for each input and output block, and a complex multiply-add for each pair of
    blocks and frequency; the transforms of the weights are not counted, since they serve a whole batch.
    Source: Golub and Van Loan, Matrix Computations, section 4.8 and 12.1; Thomas et al. (NeurIPS 2018).
    """

    weight: str
    outputs: int
    inputs: int
    height: int
    width: int
    twist: float | None = None
    period: int = 0
    hankel: bool = False
    transform: bool = False
    transposed: bool = False
    length: int = field(init=False, compare=False, repr=False)
    """Of the Fourier transforms."""
    is_circular: bool = field(init=False, compare=False, repr=False)
    """Whether the blocks are corners of circulant matrices of a size that transforms are fast for."""

    def __post_init__(self) -> None:
        assert self.twist is None or self.period >= max(self.height, self.width), self
        circular = self.twist == 1.0 and smooth_size(self.period) == self.period
        object.__setattr__(self, "is_circular", circular)
        object.__setattr__(self, "length", self.period if circular else smooth_size(self.height + self.width - 1))

    @property
    def entries(self) -> int:
        """Numbers in the weight of a block."""
        return self.height + self.width - 1 if self.twist is None else self.period

    @property
    def in_features(self) -> int:
        return self.outputs * self.height if self.transposed else self.inputs * self.width

    @property
    def out_features(self) -> int:
        return self.inputs * self.width if self.transposed else self.outputs * self.height

    def transpose(self) -> Convolution:
        return replace(self, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.weight: self.outputs * self.inputs * self.entries}

    def rename(self, name: Callable[[str], str]) -> Convolution:
        return replace(self, weight=name(self.weight))

    @property
    def multiplications(self) -> int:
        if not self.transform:
            return self.in_features * self.out_features
        transforms = (self.inputs + self.outputs) * round(self.length * math.log2(self.length))
        return transforms + 4 * self.outputs * self.inputs * (self.length // 2 + 1)

    @property
    def additions(self) -> int:
        if not self.transform:
            return (self.in_features - 1) * self.out_features
        transforms = (self.inputs + self.outputs) * round(1.5 * self.length * math.log2(self.length))
        kept = self.inputs if self.transposed else self.outputs
        products = 4 * self.outputs * self.inputs - 2 * kept
        return transforms + products * (self.length // 2 + 1)

    @property
    def depth(self) -> int:
        if not self.transform:
            return binary_depth(self.in_features)
        joined = self.outputs if self.transposed else self.inputs
        return 4 * binary_depth(self.length) + binary_depth(2 * joined)

    def __str__(self) -> str:
        kind = "Hankel" if self.hankel else "Toeplitz"
        kind = kind if self.twist is None else f"{kind}, {self.twist:g}-circulant"
        size = f"{self.outputs} x {self.inputs} blocks of {self.height} x {self.width}"
        how = f"Fourier transforms of {self.length}" if self.transform else "written out"
        return f"Convolution ({kind}), {size}, {how}{', transposed' if self.transposed else ''}"


def convolution(
    weight: str,
    outputs: int,
    inputs: int,
    height: int,
    width: int,
    *,
    twist: float | None = None,
    period: int = 0,
    hankel: bool = False,
) -> Convolution:
    """A convolution with the algorithm chosen by its size: transforms where they take ``WRITTEN_OUT`` times fewer
    multiplications than the product with the blocks written out."""
    stage = Convolution(weight, outputs, inputs, height, width, twist, period, hankel)
    by_transforms = replace(stage, transform=True)
    return by_transforms if stage.multiplications > WRITTEN_OUT * by_transforms.multiplications else stage


WRITTEN_OUT = 6
"""A multiplication in a matrix product is so many times faster than one in a Fourier transform (float32, PyTorch 2.13
on a CPU with AVX-512: at n = 256 both ways take the same time)."""

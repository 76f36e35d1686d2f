"""Forms of a kernel: families of tensors that are, in some order of the unfolded index, a family of matrices."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from structmat.errors import ShapeError
from structmat.nn.kronecker.convolution import KernelSizes
from structmat.projection.kronecker import factor_pairs
from structmat.structure import Structure, check_count, check_size
from structmat.structures.kronecker import Kronecker
from structmat.structures.tensor_train import TensorTrain


class KernelForm(ABC):
    """What may be given to a structured convolution instead of a structure. Subclasses are frozen dataclasses."""

    @abstractmethod
    def unfolded(self, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[Structure, tuple[int, ...]]:
        """The family of the unfolded kernel of one group, and the order of its index over (channels, *kernel).

        Args:
            outputs, inputs: channels of a group.
            kernel: its sizes.
        """


@final
@dataclass(frozen=True)
class Separable(KernelForm):
    """``K[o, i, h, w] = sum over r of B[r, i, h] A[o, r, w]``: along the height, then along the width.

    ``rank * (in * height + out * width)`` parameters. Tensors ``factor0`` (1, rank, in * height) and ``factor1``.
    Projection: truncated SVD, optimal. As a family: ``Kronecker(rank, ((1, in * height), (out, width)))``.
    Source: Tai et al., "Convolutional neural networks with low-rank regularization" (ICLR 2016).

    Args:
        rank: channels between the two, or a fraction of the dense parameter count.
    """

    rank: int | float

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)

    def unfolded(self, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[Structure, tuple[int, ...]]:
        if len(kernel) != 2:
            raise ShapeError(f"{self} has a height and a width; the kernel has size {tuple(kernel)}. Use LowRank.")
        height, width = kernel
        return Kronecker(self.rank, ((1, inputs * height), (outputs, width))), (0, 1, 2)


@final
@dataclass(frozen=True)
class CP(KernelForm):
    """``K[o, i, h, w] = sum over r of a_r[o] b_r[i] c_r[h] d_r[w]``: 1 x 1, depthwise along each axis, 1 x 1.

    ``rank * (out + in + height + width)`` parameters. Projection: alternating least squares from several starts. As a
    family: ``Kronecker(rank, ((out, 1), (1, in), (1, height), (1, width)))``.
    Source: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition" (ICLR 2015).

    Args:
        rank: terms, or a fraction of the dense parameter count.
        joint: whether the axes of the kernel are one: a filter of all taps for each channel, which is a depthwise
            separable convolution between two of 1 x 1, with ``rank * (out + in + height * width)`` parameters.
    """

    rank: int | float
    joint: bool = False

    def __post_init__(self) -> None:
        check_size(self, "rank", self.rank)

    def unfolded(self, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[Structure, tuple[int, ...]]:
        taps = [math.prod(kernel)] if self.joint else [size for size in kernel if size > 1]
        pairs = ((outputs, 1), (1, inputs), *((1, size) for size in taps))
        return Kronecker(self.rank, pairs), tuple(range(1 + len(kernel)))


@final
@dataclass(frozen=True)
class Tucker(KernelForm):
    """``K[o, i, h, w] = sum of core[p, q, h, w] U[o, p] V[i, q]`` (Tucker-2): 1 x 1, a small convolution, 1 x 1.

    ``out * out_rank + out_rank * in_rank * taps + in_rank * in`` parameters. Tensors ``core0`` (U), ``core1`` and
    ``core2`` (V). Projection: higher-order SVD, one side after the other, then alternating least squares. As a family:
    a ``TensorTrain`` of three cores on the order (*kernel, channels).
    Source: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications"
    (ICLR 2016).

    Args:
        rank: of the outputs and of the inputs, a pair; one integer for both; or a fraction of the dense parameter
            count, the two ranks then being in proportion to the channels.
    """

    rank: int | float | tuple[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.rank, tuple):
            check_size(self, "rank", self.rank)
            return
        for rank in self.rank:
            check_count(self, "rank", rank)

    def unfolded(self, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[Structure, tuple[int, ...]]:
        taps = math.prod(kernel)
        match self.rank:
            case float():
                ranks = self._fitting(outputs, inputs, taps, self.rank)
            case int():
                ranks = (min(self.rank, outputs), min(self.rank, inputs))
            case _:
                ranks = self.rank
        order = (*range(1, 1 + len(kernel)), 0)
        return TensorTrain(ranks, 3, (outputs, 1, 1), (1, taps, inputs)), order

    def _fitting(self, outputs: int, inputs: int, taps: int, fraction: float) -> tuple[int, int]:
        """The largest ranks in proportion to the channels within a fraction of the dense parameters."""
        limit, best = fraction * outputs * inputs * taps, None
        for large in range(1, max(outputs, inputs) + 1):
            pair = tuple(max(1, round(large * n / max(outputs, inputs))) for n in (outputs, inputs))
            p, q = min(pair[0], pair[1] * taps), min(pair[1], pair[0] * taps)
            if outputs * p + p * q * taps + q * inputs <= limit:
                best = (p, q)
        if best is None:
            raise ShapeError(
                f"{self} asks for {fraction:.4g} of the {outputs * inputs * taps} parameters of a kernel, but ranks of "
                f"1 already take {outputs + taps + inputs}. Use a larger fraction."
            )
        return best


@final
@dataclass(frozen=True)
class KroneckerKernel(KernelForm):
    """A sum of Kronecker products of two kernels, each axis of taps belonging to one of them.

    ``terms * (size of a + size of b)`` parameters. Projection: truncated SVD, optimal. As a family: a ``Kronecker`` of
    two factors. :class:`KroneckerConv2d` is the layer for axes that both share, such as 4 = 2 * 2.
    Source: Hameed et al., "Convolutional neural network compression through generalized Kronecker product
    decomposition" (2021).

    Args:
        terms: products, or a fraction of the dense parameter count.
        sizes: of the factors, ((outputs, inputs, height, width), ...), the two multiplying to the kernel's; those with
            the fewest parameters if not given. Height and width in one dimension are (1, width).
    """

    terms: int | float = 1
    sizes: KernelSizes | None = None

    def __post_init__(self) -> None:
        check_size(self, "terms", self.terms)

    def unfolded(self, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[Structure, tuple[int, ...]]:
        full = (*[1] * (2 - len(kernel)), *kernel)
        whole = (outputs, inputs, full[0], full[1])
        sizes = self.sizes or _smallest(*whole)
        if sizes.kernel != whole:
            raise ShapeError(f"The factors {sizes.a} and {sizes.b} make a kernel {sizes.kernel}, not {whole}.")
        if any(min(n, m) > 1 for n, m in zip(sizes.a[2:], sizes.b[2:], strict=True)):
            raise ShapeError(
                f"The factors {sizes.a} and {sizes.b} share an axis of the kernel. Give it to one of them, or use "
                "KroneckerConv2d."
            )
        of_a = sizes.a[4 - len(kernel) :]
        first = [1 + axis for axis, size in enumerate(of_a) if size > 1]
        rest = [1 + axis for axis, size in enumerate(of_a) if size == 1]
        pairs = ((sizes.a[0], math.prod(sizes.a[1:])), (sizes.b[0], math.prod(sizes.b[1:])))
        return Kronecker(self.terms, pairs), (*first, 0, *rest)


def _smallest(f: int, c: int, h: int, w: int) -> KernelSizes:
    """The factors with the fewest parameters, then multiply-adds, that leave each axis of the kernel whole."""
    options = [
        KernelSizes((f1, c1, h1, w1), (f2, c2, h // h1, w // w1))
        for f1, f2 in factor_pairs(f)
        for c1, c2 in factor_pairs(c)
        for h1 in {1, h}
        for w1 in {1, w}
    ]
    return min(options, key=lambda s: (s.parameters, s.macs(s.cheaper)))

"""Networks of Kronecker blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.modes import is_compiling
from structmat.nn.kronecker.activation import Activation, gain
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.choose import choose_all
from structmat.nn.kronecker.initialize import Initialize, balanced_
from structmat.nn.kronecker.native import Fused, fused, has_hooks, run
from structmat.nn.kronecker.shape import AUTO, Bias, BlockShape
from structmat.projection.kronecker import padded_factors

Size = int | Sequence[int]
"""A number of features, or the shape of the array that they form."""


@dataclass(frozen=True)
class Counts:
    """What blocks one after the other hold and do, for one sample.

    Args:
        blocks: their sizes.
    """

    blocks: tuple[BlockShape, ...]

    @property
    def parameters(self) -> int:
        """Learned numbers."""
        return sum(b.parameters for b in self.blocks)

    @property
    def source_parameters(self) -> int:
        """As published networks are counted, see :attr:`BlockShape.source_parameters`."""
        return sum(b.source_parameters for b in self.blocks)

    @property
    def weights(self) -> int:
        """Those in factors."""
        return sum(b.weights for b in self.blocks)

    @property
    def biases(self) -> int:
        """The others."""
        return self.parameters - self.weights

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        return sum(b.macs for b in self.blocks)

    @property
    def backward_macs(self) -> int:
        """Multiply-adds of the backward pass, without a gradient of the network's input."""
        return sum(b.backward_macs(first=i == 0) for i, b in enumerate(self.blocks))

    @property
    def activations(self) -> int:
        """Values that pass an activation, if there is one everywhere."""
        return sum(b.activations for b in self.blocks)

    @property
    def dense_parameters(self) -> int:
        """Learned numbers of the fully connected network of the same sizes, biases too."""
        return sum(b.dense_macs + b.out_features for b in self.blocks)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of its forward pass."""
        return sum(b.dense_macs for b in self.blocks)


class KroneckerNetwork(nn.Module):
    """Kronecker blocks one after the other, the last one without outer activation.

    ``KroneckerNetwork([(28, 28), (28, 28), (28, 28), (2, 5)], terms=1, inner=torch.tanh)`` is the published network for
    MNIST: 6,534 parameters in place of 1,238,730. The array that a block makes is the next one's input; vectors between
    blocks are row-major views of it.

    Args:
        sizes: of the input, of every hidden layer and of the output: a number of features, or the shape of its array.
        terms: of every block, or of each.
        inner: the activation inside blocks, or None.
        outer: the activation after blocks but the last; by default as ``inner``.
        last: the activation after the last block.
        factors: axes of the arrays that are given as numbers.
        order: as for :class:`KroneckerBlock`, for all blocks.
        bias: for all blocks.
        initialize, recompute, device, dtype, generator: as for :class:`KroneckerBlock`. Gains are those of the
        activations.

    Raises:
        ShapeError: fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        terms: int | Sequence[int] = 1,
        *,
        inner: Activation | None = torch.relu,
        outer: Activation | Literal["as inner"] | None = "as inner",
        last: Activation | None = None,
        factors: int = 2,
        order: str | Sequence[object] = AUTO,
        bias: Bias | str = Bias.FULL,
        initialize: Initialize = balanced_,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ShapeError(f"A network has an input and an output; got sizes={list(sizes)}. Give at least two sizes.")
        arrays = [padded_factors(s, factors) if isinstance(s, int) else tuple(s) for s in sizes]
        features = [s if isinstance(s, int) else math.prod(s) for s in sizes]
        counts = [terms] * (len(sizes) - 1) if isinstance(terms, int) else list(terms)
        if len(counts) != len(sizes) - 1:
            raise ShapeError(f"A network of {len(sizes)} sizes has {len(sizes) - 1} blocks; got {len(counts)} terms.")
        between = inner if isinstance(outer, str) else outer
        self.blocks = nn.ModuleList(
            KroneckerBlock(
                features[i],
                features[i + 1],
                count,
                in_shape=arrays[i],
                out_shape=arrays[i + 1],
                order=order,
                inner=inner,
                outer=last if i == len(counts) - 1 else between,
                bias=bias,
                initialize=initialize,
                input_gain=1.0 if i == 0 else gain(between),
                recompute=recompute,
                device=device,
                dtype=dtype,
                generator=generator,
            )
            for i, count in enumerate(counts)
        )
        self._way: Fused = fused(self.layers())

    @classmethod
    def of(
        cls,
        shapes: Sequence[BlockShape],
        *,
        inner: Activation | None = torch.relu,
        outer: Activation | Literal["as inner"] | None = "as inner",
        last: Activation | None = None,
        **options: object,
    ) -> Self:
        """The network of given blocks, each as long as the next one's input; ``options`` go to all of them.

        Raises:
            ShapeError: a block's output has another size than the next one's input.
        """
        for a, b in itertools.pairwise(shapes):
            if a.out_features != b.in_features:
                raise ShapeError(
                    f"A block with {a.out_features} outputs is followed by one with {b.in_features} inputs."
                )
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        between = inner if isinstance(outer, str) else outer
        network.blocks = nn.ModuleList(
            KroneckerBlock.of(
                shape,
                inner=inner,
                outer=last if i == len(shapes) - 1 else between,
                input_gain=1.0 if i == 0 else gain(between),
                **options,
            )
            for i, shape in enumerate(shapes)
        )
        network._way = fused(network.layers())
        return network

    @classmethod
    def for_budget(
        cls,
        sizes: Sequence[int],
        *,
        parameters: int | None = None,
        macs: int | None = None,
        bias: Bias | str = Bias.FULL,
        **options: object,
    ) -> Self:
        """The network whose blocks together stay within a budget, shapes and terms chosen, see :func:`choose_all`.

        Raises:
            StructureError: none fits; the message names the smallest.
        """
        return cls.of(choose_all(sizes, parameters=parameters, macs=macs, bias=bias), **options)  # type: ignore[arg-type]

    def layers(self) -> tuple[KroneckerBlock, ...]:
        """The blocks."""
        return tuple(block for block in self.blocks if isinstance(block, KroneckerBlock))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., in_features), or arrays (..., n, p) of the first block's shape, to vectors (..., out_features).

        Raises:
            ShapeError: the input is neither.
        """
        first, *others = blocks = self.layers()
        x = x if first.holds_vectors(x) else x.flatten(-len(first.shape.inputs))
        made = self._natively(blocks, x)
        if made is not None:
            return made
        x = first(x)
        for block in others:
            x = block(x)
        return x

    def _natively(self, blocks: tuple[KroneckerBlock, ...], x: Tensor) -> Tensor | None:
        """All blocks in one pass, where that serves and nobody watches a single one."""
        way = self._way
        if len(way.recipes) != len(blocks) or not way.serves(blocks):
            if is_compiling():
                return None
            way = self._way = fused(blocks)
        if way.reason or any(has_hooks(block) or type(block) is not KroneckerBlock for block in blocks):
            return None
        return run(blocks, way, x)

    @property
    def counts(self) -> Counts:
        """Parameters and operations, exactly."""
        return Counts(tuple(block.shape for block in self.layers()))

    @property
    def num_parameters(self) -> int:
        """Learned numbers, slopes too."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

"""The extended fully connected network that a Kronecker block is, written out, and as a picture."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.kernels import runs_native
from structmat.nn.kronecker.activation import Activation, Slopes, name_of, rectify
from structmat.program import cost
from structmat.program.table import table

if TYPE_CHECKING:
    from structmat.nn.kronecker.block import KroneckerBlock

LARGEST = 160
"""Rows and columns beyond which a picture shows nothing."""


class Convention(enum.Enum):
    """How arrays are flattened: row by row, or column by column as in the paper."""

    ROW = "row"
    COLUMN = "column"


@dataclass(frozen=True)
class Layer:
    """One sparse layer of an extended network: ``activation(weight x + bias)``.

    Args:
        weight: (out, in), written out.
        tied: (out, in) integers: 0 where the weight has no entry; entries with the same positive number are one learned
            number, used many times.
        bias: (out,), or None.
        activation: what follows, or None.
        slope: (out,), of a rectifier that is :class:`Slopes`.
    """

    weight: Tensor
    tied: Tensor
    bias: Tensor | None
    activation: Activation | None
    slope: Tensor | None = None

    @property
    def nonzeros(self) -> int:
        """Entries."""
        return int((self.tied > 0).sum())

    @property
    def distinct(self) -> int:
        """Learned numbers among them."""
        return len(self.tied[self.tied > 0].unique())

    @property
    def density(self) -> float:
        """Share of the places that hold an entry."""
        return self.nonzeros / self.tied.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (..., in) to (..., out), by the dense matrix."""
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if isinstance(self.activation, Slopes):
            return y if self.slope is None else rectify(y, self.slope)
        return y if self.activation is None else self.activation(y)


@dataclass(frozen=True)
class Extended:
    """A Kronecker block as a fully connected network: one more hidden layer for each factor but the last.

    Two factors, left first, row-major: ``W1 = [L_1 (x) I_p; ...; L_k (x) I_p]`` of density 1/p, each entry used p
    times, and ``W2 = [I_m (x) R_1^T, ...]`` of density 1/m, each used m times. The arrays of hidden values are
    flattened term by term. Hogue, Kirby and Narayan (2022) call it the extended network.

    Args:
        layers: first applied first.
        convention: how arrays are flattened.
    """

    layers: tuple[Layer, ...]
    convention: Convention

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (..., in_features), flattened by the convention, to (..., out_features)."""
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def nonzeros(self) -> int:
        """Entries of all matrices."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def distinct(self) -> int:
        """Learned numbers among them."""
        return sum(layer.distinct for layer in self.layers)

    def draw(self) -> str:
        """The matrices as SVG, the first at the right as in a product; entries that are one number have one color.

        Raises:
            ShapeError: a matrix has more than 160 rows or columns.
        """
        return draw_matrices([layer.tied for layer in self.layers])


@torch.no_grad()
def extend(block: KroneckerBlock, convention: Convention) -> Extended:
    """What :meth:`KroneckerBlock.extended` returns."""
    shape = block.shape
    count = len(shape.inputs)
    padded = (math.prod(shape.inputs), shape.outer_array) != (shape.in_features, shape.out_features)
    if convention is Convention.COLUMN and padded:
        raise ShapeError(
            f"The block pads {shape.in_features} and {shape.out_features} features to {shape.inputs} and "
            f"{shape.outputs} at the end of row-major vectors, which has no column-major form. Use convention='row'."
        )
    axes = range(count) if convention is Convention.ROW else reversed(range(count))
    flat = _Flattening(tuple(axes))
    layers = []
    for place in range(count):
        parts = []
        biases: list[Tensor] = []
        slopes: list[Tensor] = []
        number = 1
        for chain in block.chains:
            layout = chain.layout
            axis = layout.order[place]
            factor = chain.factors()[axis].detach()
            before = shape.inputs if place == 0 else shape.hidden(layout.order)[place - 1]
            for term in range(layout.terms):
                ids = torch.arange(number, number + factor[term].numel()).reshape(factor[term].shape)
                number += factor[term].numel()
                parts.append((flat.stage(factor[term], before, axis), flat.stage(ids, before, axis)))
            if place < count - 1:
                gap = layout.gaps[place]
                made = shape.hidden(layout.order)[place]
                bias, slope = chain.natural_bias(gap), chain.slopes(gap)
                for term in range(layout.terms):
                    zero = factor.new_zeros(made)
                    biases.append(flat.vector(zero if bias is None else bias[term].detach() + zero))
                    slopes.append((zero + (1.0 if slope is None else float(slope[term]))).reshape(-1))
        weights, ties = zip(*parts, strict=True)
        if place == count - 1:
            weight, tied = torch.cat(weights, 1), torch.cat(ties, 1)
            crop = slice(0, shape.out_features)
            outer = None if block.bias is None else flat.vector(block.bias.detach(), shape.outputs)
            layers.append(Layer(weight[crop], tied[crop], outer, block.outer))
            continue
        weight = torch.cat(weights) if place == 0 else torch.block_diag(*weights)
        tied = torch.cat(ties) if place == 0 else torch.block_diag(*ties)
        if place == 0:
            weight, tied = weight[:, : shape.in_features], tied[:, : shape.in_features]
        active = shape.activated[place]
        held = any(f"bias{place}" in dict(chain.named_parameters()) for chain in block.chains)
        layers.append(
            Layer(
                weight,
                tied,
                torch.cat(biases) if held else None,
                block.inner if active else None,
                torch.cat(slopes) if active and isinstance(block.inner, Slopes) else None,
            )
        )
    return Extended(tuple(layers), convention)


@dataclass(frozen=True)
class _Flattening:
    """The axes of an array, the slowest first."""

    axes: tuple[int, ...]

    def stage(self, factor: Tensor, before: Sequence[int], axis: int) -> Tensor:
        """The matrix that multiplies the axis of a flattened array of shape ``before`` by the factor."""
        made = torch.ones(1, 1, dtype=factor.dtype)
        for other in self.axes:
            part = factor if other == axis else torch.eye(before[other], dtype=factor.dtype)
            made = kron(made, part)
        return made

    def vector(self, array: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """An array flattened; or a row-major vector of an array of that shape, flattened this way instead."""
        if self.axes == tuple(range(len(self.axes))):
            return array.reshape(-1)
        if shape is not None:
            array = array.reshape(tuple(shape))
        return array.permute(self.axes).reshape(-1)


def kron(a: Tensor, b: Tensor) -> Tensor:
    """``torch.kron`` of two matrices, of transposed views too: that one raises for some."""
    product = a[:, None, :, None] * b[None, :, None, :]
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


# ------------------------------------------------------------------------------------------------------------ pictures

_CELL, _MARGIN, _GAP = 8, 12, 28


def draw_matrices(matrices: Sequence[Tensor], words: Sequence[str] = ()) -> str:
    """Matrices of tied entries as SVG, the first applied at the right.

    Args:
        matrices: integers, 0 for no entry; equal positive numbers get the same color.
        words: a caption for each; by default its size and density.

    Raises:
        ShapeError: a matrix has more than 160 rows or columns.
    """
    worst = max(max(m.shape) for m in matrices)
    if worst > LARGEST:
        raise ShapeError(f"A picture shows matrices of at most {LARGEST} rows and columns; one has {worst}.")
    cell = max(2, min(_CELL, 320 // worst))
    shown = list(matrices)[::-1]
    given = list(words)[::-1] or [f"{m.shape[0]} x {m.shape[1]}, {int((m > 0).sum())} entries" for m in shown]
    height = max(m.shape[0] for m in shown) * cell + 2 * _MARGIN + 20
    width = sum(max(m.shape[1] * cell, 110) for m in shown) + _GAP * (len(shown) - 1) + 2 * _MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
    ]
    left = _MARGIN
    for matrix, text in zip(shown, given, strict=True):
        rows, columns = matrix.shape
        frame = f'width="{columns * cell}" height="{rows * cell}" fill="none" stroke="#999"'
        lines.append(f'<rect x="{left}" y="{_MARGIN}" {frame}/>')
        largest = int(matrix.max())
        for row, column in (matrix > 0).nonzero().tolist():
            # Hues far from each other for neighbouring numbers: steps of the golden angle.
            hue = 137.508 * int(matrix[row, column]) % 360
            light = 40 + 25 * int(matrix[row, column]) / max(1, largest)
            lines.append(
                f'<rect x="{left + column * cell}" y="{_MARGIN + row * cell}" width="{cell}" height="{cell}" '
                f'fill="hsl({hue:.0f},60%,{light:.0f}%)"/>'
            )
        lines.append(f'<text x="{left}" y="{_MARGIN + rows * cell + 15}">{text}</text>')
        left += max(columns * cell, 110) + _GAP
    return "\n".join([*lines, "</svg>"]) + "\n"


# -------------------------------------------------------------------------------------------------------- explanations


def _way(native: bool) -> str:
    return "native backend" if native else "reference backend"


def explain(block: KroneckerBlock, batch: int) -> str:
    """What :meth:`KroneckerBlock.explain` returns."""
    shape = block.shape
    fallback = block.fallback
    lines = [
        f"not one native pass: {fallback}; part by part:"
        if fallback
        else "one native pass in each direction, with biases and activations; where that can't be, part by part:"
    ]
    macs = 0
    for chain in block.chains:
        tensors = dict(chain.named_parameters())
        lines.append(f"{chain.layout.terms} terms, axes {chain.layout.order}:")
        for number, program in enumerate(chain.programs):
            ways = {
                False: _way(runs_native(program, tensors, batch)),
                True: "PyTorch operations without a graph inside",
            }
            if not chain.is_direct:
                ways[True] = _way(runs_native(program, tensors, batch, recorded=True))
            lines += [table(program), f"without gradients: {ways[False]}; with gradients: {ways[True]}"]
            macs += cost(program).macs
            if number < len(chain.programs) - 1:
                lines.append(f"then {name_of(block.inner)}")
    kept = "the input alone" if all(c.recompute for c in block.chains) else "input and hidden values"
    return "\n".join(
        [
            *lines,
            f"outer activation {name_of(block.outer)}; kept for the backward pass: {kept}",
            f"{shape.weights} weights, {shape.inner_biases} inner and {shape.outer_biases} outer biases",
            f"{batch} samples: {batch * macs} multiply-adds (dense: {batch * shape.dense_macs}), "
            f"{batch * shape.activations} activations",
        ]
    )

"""Blocks that are rectified sums of Kronecker products, to and from the structure that says so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.matrix import StructuredMatrix
from structmat.nn.kronecker.activation import Slopes
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.shape import Bias
from structmat.structure import Shape
from structmat.structures.nonlinear.rectified_kronecker import RectifiedKronecker

SLOPES = Slopes()


def rectified_block(
    structure: RectifiedKronecker,
    shape: Shape,
    *,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> KroneckerBlock:
    """A block of a resolved structure: slopes of 1, a bias of the outcome alone if there is one.

    Args:
        structure: resolved for the shape.
        shape: ``(out_features, in_features)``.
        bias: whether it has one.
        device, dtype: of the parameters; ``meta`` is allowed.
    """
    return KroneckerBlock(
        shape[1],
        shape[0],
        int(structure.terms),
        in_shape=[n for _, n in structure.pairs],
        out_shape=[m for m, _ in structure.pairs],
        order=structure.order,
        inner=SLOPES,
        bias=Bias.OUTER if bias else Bias.NONE,
        device=device,
        dtype=dtype,
    )


def block_of(matrix: StructuredMatrix, bias: Tensor | None) -> KroneckerBlock:
    """The block that owns copies of the tensors of a rectified sum and of a bias (out_features,), if given.

    Raises:
        StructureError: the matrix is of another structure, or transposed.
    """
    structure = matrix.structure
    if not isinstance(structure, RectifiedKronecker) or matrix.is_transposed:
        raise StructureError(f"A rectified block is made of a RectifiedKronecker, not transposed; got {structure}.")
    block = rectified_block(structure, matrix.shape, bias=bias is not None, device="meta", dtype=matrix.dtype)
    block.to_empty(device=matrix.device)
    with torch.no_grad():
        for name, path in PATHS.items():
            block.get_parameter(path).copy_(matrix.tensors[name])
        if block.bias is not None and bias is not None:
            block.bias.copy_(bias)
    return block


def structure_of(block: KroneckerBlock) -> RectifiedKronecker | None:
    """The structure that says all of a block but its numbers, or None if there is none: its activation must be
    learned slopes between two factors, applied in the order with the fewest operations, without inner biases."""
    shape = block.shape
    if len(shape.pairs) != 2 or shape.activated != (True,) or block.outer is not None:
        return None
    if not isinstance(block.inner, Slopes) or not block.inner.learned or shape.bias not in (Bias.OUTER, Bias.NONE):
        return None
    structure = RectifiedKronecker(shape.terms, shape.pairs)
    return structure if set(shape.orders) == {structure.order} else None


PATHS: Mapping[str, str] = {name: f"_chains.0.{name}" for name in ("factor0", "factor1", "slope0")}
"""Where a block of one order keeps the tensors of its structure: the structure's names to those in the block."""

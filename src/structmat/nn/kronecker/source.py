"""Blocks in the layout of the published code: one pair of kernels, and one pair of biases, for each term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.nn.kronecker.activation import Activation
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.shape import Bias


@dataclass(frozen=True)
class SourceTerm:
    """One term ``phi(L X + C) R + D`` or, right first, ``L phi(X R + C) + D``.

    Args:
        left: L (m, n).
        right: R (p, q).
        inner_bias: C, (m, p) left first or (n, q) right first.
        outer_bias: D (m, q). Every published term has one, although only their sum matters.
        order: "left" or "right".
    """

    left: Tensor
    right: Tensor
    inner_bias: Tensor
    outer_bias: Tensor
    order: str = "left"


@torch.no_grad()
def to_source(block: KroneckerBlock) -> list[SourceTerm]:
    """The terms of a block of two factors, copied; the first one holds all of the outer bias.

    Raises:
        ShapeError: the block has more factors, or is padded.
    """
    shape = block.shape
    if len(shape.inputs) != 2 or (shape.in_features, shape.out_features) != (
        shape.inputs[0] * shape.inputs[1],
        shape.outer_array,
    ):
        raise ShapeError(f"The published layout is for two factors without padding; the block is {block.extra_repr()}.")
    made: list[SourceTerm] = []
    for chain in block.chains:
        (gap,) = chain.layout.gaps
        left, right = chain.factors()
        bias = chain.natural_bias(gap)
        sizes = shape.hidden(chain.layout.order)[0]
        for term in range(chain.layout.terms):
            inner = left.new_zeros(sizes) if bias is None else bias[term] + left.new_zeros(sizes)
            outer = left.new_zeros(shape.outputs)
            if not made and block.bias is not None:
                outer = block.bias.reshape(shape.outputs).clone()
            word = "left" if chain.layout.order == (0, 1) else "right"
            made.append(SourceTerm(left[term].clone(), right[term].T.clone(), inner, outer, word))
    return made


@torch.no_grad()
def from_source(
    terms: Sequence[SourceTerm], *, inner: Activation | None = torch.tanh, outer: Activation | None = torch.tanh
) -> KroneckerBlock:
    """The block of given terms, in the dtype of the first; its outer bias is the sum of theirs.

    Raises:
        ShapeError: the terms do not fit together.
    """
    if not terms:
        raise ShapeError("A block has at least one term; got none.")
    (m, n), (p, q) = terms[0].left.shape, terms[0].right.shape
    for number, term in enumerate(terms):
        inside = (m, p) if term.order == "left" else (n, q)
        found = [tuple(t.shape) for t in (term.left, term.right, term.inner_bias, term.outer_bias)]
        if found != [(m, n), (p, q), inside, (m, q)]:
            raise ShapeError(
                f"Term {number} ({term.order} first) has shapes {found}; expected {[(m, n), (p, q), inside, (m, q)]}."
            )
    block = KroneckerBlock(
        n * p,
        m * q,
        len(terms),
        in_shape=(n, p),
        out_shape=(m, q),
        order=[term.order for term in terms],
        inner=inner,
        outer=outer,
        bias=Bias.FULL,
        dtype=terms[0].left.dtype,
        device=terms[0].left.device,
    )
    for chain in block.chains:
        word = "left" if chain.layout.order == (0, 1) else "right"
        own = [term for term in terms if term.order == word]
        chain.set_factors([torch.stack([t.left for t in own]), torch.stack([t.right.T for t in own])])
        (gap,) = chain.layout.gaps
        chain.get_parameter("bias0").copy_(gap.from_natural(torch.stack([t.inner_bias for t in own])))
    assert block.bias is not None
    block.bias.copy_(torch.stack([t.outer_bias for t in terms]).sum(0).reshape(-1))
    return block

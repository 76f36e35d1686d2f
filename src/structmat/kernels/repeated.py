"""One program multiplied many times by few rows: all that can be decided beforehand is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat.kernels.choice import native_text, plain_products
from structmat.kernels.operator import arguments, multiplier, run_into
from structmat.kernels.plainly import plainly
from structmat.program import Program, reference

Product = Callable[[Tensor], Tensor]
"""Rows (rows, in_features) to (rows, out_features), contiguous."""


def repeated(program: Program, tensors: Mapping[str, Tensor], like: Tensor, bias: Tensor | None) -> Product:
    """The product as a function that asks no questions: of many inputs like one, without gradients.

    Args:
        program: what to multiply by.
        tensors: what it reads; they must not change before the last call.
        like: rows (rows, in_features) of the number, dtype and device of those to come, each contiguous and at equal
            distances.
        bias: what is added to each row, or None.

    Raises:
        StructureError: the native backend is forced, and can't run it.
    """
    program, tensors = plainly(program, tensors, like, bias)
    text = native_text(program, tensors, like, bias)
    if text is not None:
        given, words, call = arguments(text, tensors, bias), text.plain if bias is None else text.biased, multiplier()
        return lambda x: call(x, given, words)
    weights = _weights(program, tensors)
    if weights:
        return _chain(weights, bias)
    if bias is None:
        return lambda x: reference.apply(program, tensors, x)
    return lambda x: reference.affine(program, tensors, x, bias)


def repeated_into(
    program: Program, tensors: Mapping[str, Tensor], like: Tensor, bias: Tensor | None
) -> Callable[[Tensor, Tensor], object] | None:
    """The same as a function that writes into memory: of rows (rows, in_features) into contiguous (rows,
    out_features), at least :data:`structmat.kernels.operator.FEW_ROWS` of both.

    Args:
        program, tensors, bias: as :func:`repeated` takes them.
        like: all rows (..., in_features), of which a call gets some: what is fastest for their number is done.

    Returns:
        None where there is no such way.

    Raises:
        StructureError: the native backend is forced, and can't run it.
    """
    program, tensors = plainly(program, tensors, like, bias)
    text = native_text(program, tensors, like, bias)
    if text is not None:
        given, words = arguments(text, tensors, bias), text.plain if bias is None else text.biased
        return lambda x, y: run_into(x, given, words, y)
    weights = _weights(program, tensors)
    if not weights or any(t.dtype is not like.dtype for t in (*weights, *([] if bias is None else [bias]))):
        return None
    *first, last = (weight.T for weight in weights)

    def product(x: Tensor, y: Tensor) -> object:
        for weight in first:
            x = x @ weight
        return torch.mm(x, last, out=y) if bias is None else torch.addmm(bias, x, last, out=y)

    return product


def _weights(program: Program, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Of a chain of plain products, each (out, in); none of another program."""
    plain = plain_products(program)
    return [] if any(s.transposed for s in plain) else [tensors[s.weight].reshape(s.b, s.c) for s in plain]


def _chain(weights: list[Tensor], bias: Tensor | None) -> Product:
    *first, last = weights

    def product(x: Tensor) -> Tensor:
        for weight in first:
            x = F.linear(x, weight)
        return F.linear(x, last, bias)

    return product

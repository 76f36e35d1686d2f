"""One program multiplied many times by few rows: all that can be decided beforehand is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from structmat.kernels.choice import native_text, plain_products
from structmat.kernels.operator import arguments, multiplier
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
    plain = plain_products(program)
    if plain and not any(s.transposed for s in plain):
        weights = [tensors[s.weight].reshape(s.b, s.c) for s in plain]
        return _chain(weights, bias)
    if bias is None:
        return lambda x: reference.apply(program, tensors, x)
    return lambda x: reference.affine(program, tensors, x, bias)


def _chain(weights: list[Tensor], bias: Tensor | None) -> Product:
    *first, last = weights

    def product(x: Tensor) -> Tensor:
        for weight in first:
            x = F.linear(x, weight)
        return F.linear(x, last, bias)

    return product

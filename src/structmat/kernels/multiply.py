"""One product on the native backend, recorded for gradients where these are wanted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from structmat.kernels.choice import wants_gradient
from structmat.kernels.gradient import run_recorded
from structmat.kernels.operator import arguments, is_by_features, is_by_rows, run
from structmat.kernels.text import Text
from structmat.program import Program


def multiply(program: Program, text: Text, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (..., in_features) to (..., out_features), contiguous.

    Args:
        program: what to multiply by.
        text: the program as the native backend reads it.
        tensors: what it reads.
        x: the rows, with any strides.
        bias: what is added to each row, or None.
    """
    recorded = wants_gradient(x, tensors.values(), bias)
    given = arguments(text, tensors, bias)
    if not is_by_rows(x) and (recorded or not is_by_features(x)):
        x = x.contiguous()
    if recorded:
        return run_recorded(program, text, bias is not None, x, given)
    return run(x, given, text.plain if bias is None else text.biased)

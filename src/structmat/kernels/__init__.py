"""Running programs: on the native library where it can and pays, else on PyTorch's operations.

:func:`apply` and :func:`affine` have the meaning of those of :mod:`structmat.program.reference`, which stay the
definition of every stage.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from structmat.kernels.by_parts import is_complex, multiply_complex, parts_form, runs_native, writing_for
from structmat.kernels.choice import (
    Backend,
    backend,
    native_text,
    prefers_native,
    wants_gradient,
)
from structmat.kernels.convolved import convolved
from structmat.kernels.library import Native, native
from structmat.kernels.multiply import multiply
from structmat.kernels.operator import arguments, is_by_features, is_by_rows, run, run_into, takes
from structmat.kernels.plainly import plainly
from structmat.kernels.quick import quick
from structmat.kernels.repeated import Product, repeated, repeated_into
from structmat.kernels.standing import Standing
from structmat.program import Program, reference

__all__ = [
    "Backend",
    "Native",
    "Product",
    "Standing",
    "affine",
    "apply",
    "apply_columns",
    "backend",
    "convolved",
    "native",
    "native_text",
    "parts_form",
    "prefers_native",
    "quick",
    "repeated",
    "repeated_into",
    "runs_native",
    "writing_for",
]


def apply(program: Program, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Multiply rows: ``x`` (..., in_features) to (..., out_features), as ``torch.nn.functional.linear``.

    Raises:
        ShapeError: the last axis of ``x`` is not ``in_features``.
    """
    program, tensors = plainly(program, tensors, x, None)
    if is_complex(program, x):
        return multiply_complex(program, tensors, x, None)
    text = native_text(program, tensors, x, None)
    if text is None:
        return reference.apply(program, tensors, x)
    reference.check_rows(program, x)
    return multiply(program, text, tensors, x, None)


def apply_columns(program: Program, tensors: Mapping[str, Tensor], x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply columns: ``x`` (..., in_features, k) to (..., out_features, k), as ``torch.matmul``.

    Args:
        program: what to multiply by.
        tensors: what it reads.
        x: the columns, with any strides.
        out: where to write the outcome, of its exact shape. The native backend needs no copy if it has the dtype of
            ``x`` and is a contiguous matrix, or the transpose of one.

    Raises:
        ShapeError: the last axis but one of ``x`` is not ``in_features``.
    """
    rows = x.transpose(-1, -2)
    program, tensors = plainly(program, tensors, rows, None)
    text = None if is_complex(program, x) else native_text(program, tensors, rows, None)
    if text is None or x.dim() != 2 or wants_gradient(x, tensors.values(), None):
        result = apply(program, tensors, rows).transpose(-1, -2)
        return result if out is None else out.copy_(result)
    reference.check_rows(program, rows)
    if out is None:
        out = x.new_empty(program.out_features, x.shape[1])
    if not is_by_rows(rows) and not is_by_features(rows):
        rows = rows.contiguous()
    given = arguments(text, tensors, None)
    if takes(out.T, rows):
        run_into(rows, given, text.plain, out.T)
        return out
    return out.copy_(run(rows, given, text.plain).T)


def affine(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor) -> Tensor:
    """``apply(program, tensors, x) + bias``, with ``bias`` (out_features,)."""
    program, tensors = plainly(program, tensors, x, bias)
    if is_complex(program, x):
        return multiply_complex(program, tensors, x, bias)
    text = native_text(program, tensors, x, bias)
    if text is None:
        return reference.affine(program, tensors, x, bias)
    reference.check_rows(program, x)
    return multiply(program, text, tensors, x, bias)

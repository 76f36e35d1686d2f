"""Running programs: on the native library where it can and pays, else on PyTorch's operations.

:func:`apply` and :func:`affine` have the meaning of those of :mod:`structmat.program.reference`, which stay the
definition of every stage.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from structmat.kernels.choice import (
    Backend,
    backend,
    native_text,
    prefers_native,
    runs_native,
    wants_gradient,
    writing_for,
)
from structmat.kernels.gradient import run_recorded
from structmat.kernels.library import Native, native
from structmat.kernels.operator import arguments, run
from structmat.kernels.quick import quick
from structmat.kernels.text import Text
from structmat.program import Program, reference

__all__ = [
    "Backend",
    "Native",
    "affine",
    "apply",
    "backend",
    "native",
    "native_text",
    "prefers_native",
    "quick",
    "runs_native",
    "writing_for",
]


def apply(program: Program, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Multiply rows: ``x`` (..., in_features) to (..., out_features), as ``torch.nn.functional.linear``.

    Raises:
        ShapeError: the last axis of ``x`` is not ``in_features``.
    """
    text = native_text(program, tensors, x, None)
    if text is None:
        return reference.apply(program, tensors, x)
    reference.check_rows(program, x)
    return _multiply(program, text, tensors, x, None)


def affine(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor) -> Tensor:
    """``apply(program, tensors, x) + bias``, with ``bias`` (out_features,)."""
    text = native_text(program, tensors, x, bias)
    if text is None:
        return reference.affine(program, tensors, x, bias)
    reference.check_rows(program, x)
    return _multiply(program, text, tensors, x, bias)


def _multiply(program: Program, text: Text, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    recorded = wants_gradient(x, tensors.values(), bias)
    x, given = arguments(text, tensors, x, bias)
    if recorded:
        return run_recorded(program, text, bias is not None, x, given)
    return run(x, given, text.plain if bias is None else text.biased)

"""Programs with stages that follow from others: natively they run in their plain form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from structmat.kernels.by_parts import runs_native
from structmat.kernels.choice import Backend, forced, wants_gradient
from structmat.modes import is_compiling, is_quiet
from structmat.program import Program
from structmat.program.plain import plain_form

Tensors = Mapping[str, Tensor]


def plainly(program: Program, tensors: Tensors, x: Tensor, bias: Tensor | None) -> tuple[Program, Tensors]:
    """The plain form of a program, and its tensors, if the native backend is to run that on these rows; else what was
    given, in which the reference takes fewer steps."""
    form = plain_form(program)
    if form is None or is_compiling():
        return program, tensors
    if forced() is not Backend.NATIVE and (type(x) is not Tensor or x.device.type != "cpu" or not is_quiet()):
        return program, tensors
    made = form.tensors(tensors, x.dtype.to_real(), x.device)
    rows, recorded = x.numel() // max(1, program.in_features), wants_gradient(x, tensors.values(), bias)
    if forced() is Backend.NATIVE or runs_native(form.program, made, rows, recorded):
        return form.program, made
    return program, tensors

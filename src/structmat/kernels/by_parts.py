"""Programs of complex values on the native backend: as real ones, on real and imaginary parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.kernels import choice
from structmat.kernels.choice import native_text
from structmat.kernels.multiply import multiply
from structmat.kernels.operator import FEW_ROWS
from structmat.modes import is_compiling
from structmat.program import FOR_FEW_ROWS, FOR_NATIVE, FOR_REFERENCE, Program, Writing, reference, stages
from structmat.program.plain import plain
from structmat.program.real_form import RealForm, real_form
from structmat.program.stages import Complex


def is_complex(program: Program, x: Tensor) -> bool:
    """Whether complex values pass on the way of these rows: the rows are, or a stage makes them so. (Real rows with
    complex weights are left to the reference.)"""
    return x.is_complex() or has_complex(program)


def has_complex(program: Program) -> bool:
    """Whether a stage of the program makes real values complex."""
    kept: bool | None = program.__dict__.get(_INSIDE)
    if kept is None:
        kept = program.__dict__[_INSIDE] = any(isinstance(stage, Complex) for stage in stages(program))
    return kept


def multiply_complex(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (..., in_features) to (..., out_features): natively if it has a real form, else by the reference.

    Raises:
        ShapeError: the last axis of ``x`` is not ``in_features``.
        StructureError: the native backend is forced, and can't run it.
    """
    reference.check_rows(program, x)
    known = x.dtype in _WHOLE and not is_compiling()
    form = parts_form(program, tensors, complex_in=x.is_complex()) if known else None
    if form is not None and (bias is None or form.complex_out or not bias.is_complex()):
        parts = torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
        shift = _bias(bias, form.complex_out)
        held = form.tensors(tensors)
        text = native_text(form.program, held, parts, shift)
        if text is not None:
            found = multiply(form.program, text, held, parts, shift)
            return torch.view_as_complex(found.unflatten(-1, (-1, 2))) if form.complex_out else found
    elif form is None:
        native_text(program, tensors, x, bias)  # which raises if the native backend is forced
    return reference.apply(program, tensors, x) if bias is None else reference.affine(program, tensors, x, bias)


def _bias(bias: Tensor | None, complex_out: bool) -> Tensor | None:
    if bias is None or not complex_out:
        return bias
    both = torch.view_as_real(bias.resolve_conj()) if bias.is_complex() else torch.stack([bias, 0 * bias], -1)
    return both.flatten()


def parts_form(program: Program, tensors: Mapping[str, Tensor], *, complex_in: bool) -> RealForm | None:
    """The form in which a program of complex values runs on their parts, or None if it has none."""
    return _form(program, frozenset(name for name, tensor in tensors.items() if tensor.is_complex()), complex_in)


def runs_native(
    program: Program, tensors: Mapping[str, Tensor], rows: int | None = None, recorded: bool = False
) -> bool:
    """Whether the native backend will run a program for so many rows (many by default), with gradients or without.
    Rows are taken to be complex where tensors are."""
    with torch.no_grad():
        program, tensors = plain(program, tensors)
    if not any(tensor.is_complex() for tensor in tensors.values()) and not has_complex(program):
        return choice.runs_native(program, tensors, rows, recorded)
    form = parts_form(program, tensors, complex_in=any(tensor.is_complex() for tensor in tensors.values()))
    if form is None:
        return False
    held = {made.name: _stand_in(tensors[made.source]) for made in form.made}
    return choice.runs_native(form.program, held, rows, recorded)


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.real.dtype if tensor.is_complex() else tensor.dtype, device=tensor.device)


def writing_for(program: Program, tensors: Mapping[str, Tensor], rows: int | None = None) -> Writing:
    """What to put together ahead of time for what will run a program on so many rows (many by default)."""
    if not runs_native(program, tensors, rows):
        return FOR_REFERENCE
    return FOR_NATIVE if rows is None or rows >= FEW_ROWS else FOR_FEW_ROWS


_WHOLE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Half precision has no complex numbers on the CPU: the reference widens it."""

_KEPT, _INSIDE = "_real_forms", "_is_complex_inside"


def _form(program: Program, complex_tensors: frozenset[str], complex_in: bool) -> RealForm | None:
    kept: dict[tuple[frozenset[str], bool], RealForm | None] = program.__dict__.setdefault(_KEPT, {})
    key = (complex_tensors, complex_in)
    if key not in kept:
        kept[key] = real_form(program, *key)
    return kept[key]

"""The short way from a layer to its product, for calls that take microseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat.kernels import tuning
from structmat.kernels.choice import NATIVE_DTYPES, Rows, is_usual, native_rows, plain_products, recorded_rows
from structmat.kernels.gradient import run_recorded
from structmat.kernels.library import native
from structmat.kernels.operator import run_rows
from structmat.kernels.text import Text, text_of
from structmat.program import Program

_NO_ROWS = (range(0), range(0))

Held = Mapping[str, Tensor | None]
"""A module's own dictionary of parameters or buffers."""


class Quick:
    """A layer's program, with all that can be decided about it before a call.

    A small layer takes a few microseconds, and so do the questions that :func:`structmat.kernels.apply` asks at each
    call. Here they are few and cheap; whenever one of them has an unusual answer, the long way decides.

    Args:
        program: what the layer multiplies by.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.in_features = program.in_features
        plain = plain_products(program)
        self.plain = [(s.weight, s.b, s.c) for s in plain] if not any(s.transposed for s in plain) else []
        text = text_of(program)
        self.text = text if isinstance(text, Text) else None
        self.rows: dict[torch.dtype, tuple[Rows, Rows]] = {}
        self.generation = -1

    def __deepcopy__(self, memo: object) -> Quick:
        return self  # it holds no tensors, and is one for all layers of a program

    def __reduce__(self) -> tuple[Callable[[Program], Quick], tuple[Program]]:
        return quick, (self.program,)

    def __call__(self, x: Tensor, own: Held, *held: Held) -> Tensor | None:
        """Rows (..., in_features) to (..., out_features), or None where :func:`apply` is to decide.

        Args:
            x: the input.
            own: the layer's own dictionary that has the key ``"bias"``.
            held: others in which its tensors are looked up.
        """
        if type(x) is not Tensor or not x.is_cpu or not x.is_contiguous() or "bias" not in own:
            return None
        shape = x.shape
        if not shape or shape[-1] != self.in_features or not is_usual():
            return None
        rows, dtype = x.numel() // self.in_features, x.dtype
        if self.generation != tuning.generation:
            self.generation = tuning.generation
            self.rows.clear()
        ranges = self.rows.get(dtype)
        if ranges is None:
            known = dtype in NATIVE_DTYPES  # complex rows run on their parts, if at all
            ranges = (native_rows(self.program, dtype), recorded_rows(self.program, dtype)) if known else _NO_ROWS
            self.rows[dtype] = ranges
        if self.text is not None and (rows in ranges[0] or rows in ranges[1]) and native().available:
            found = self._native(x, self.text, rows, ranges, own, held)
            if found is not None:
                return found
        return self._linear(x, own, held) if self.plain else None

    def _native(
        self, x: Tensor, text: Text, rows: int, ranges: tuple[Rows, Rows], own: Held, held: tuple[Held, ...]
    ) -> Tensor | None:
        recorded, dtype = x.requires_grad, x.dtype
        given = []
        for name in text.names:
            tensor = own.get(name)
            if tensor is None:
                tensor = _find(name, held)
            if tensor is None or not tensor.is_contiguous():
                return None
            if tensor.dtype is not dtype and (name not in text.indices or tensor.dtype is not torch.int64):
                return None
            recorded = recorded or tensor.requires_grad
            given.append(tensor)
        bias = own["bias"]
        words = text.plain
        if bias is not None:
            if bias.dtype is not dtype or not bias.is_contiguous():
                return None
            recorded = recorded or bias.requires_grad
            given.append(bias)
            words = text.biased
        recorded = recorded and torch.is_grad_enabled()
        if rows not in ranges[recorded]:
            return None
        return run_recorded(self.program, text, bias is not None, x, given) if recorded else run_rows(x, given, words)

    def _linear(self, x: Tensor, own: Held, held: tuple[Held, ...]) -> Tensor | None:
        """A chain of plain products, each of which PyTorch does in one call; differentiable."""
        bias = own["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            return None
        last = len(self.plain) - 1
        for number, (name, height, width) in enumerate(self.plain):
            weight = _find(name, (own, *held))
            if weight is None or weight.dtype is not x.dtype:
                return None
            x = F.linear(x, weight.reshape(height, width), bias if number == last else None)
        return x


def _find(name: str, held: tuple[Held, ...]) -> Tensor | None:
    """None where it is computed, by a parametrization for instance."""
    for tensors in held:
        tensor = tensors.get(name)
        if tensor is not None:
            return tensor
    return None


_KEPT = "_quick"


def quick(program: Program) -> Quick:
    """The short way of a program; kept with it."""
    kept: Quick | None = program.__dict__.get(_KEPT)
    if kept is None:
        kept = program.__dict__[_KEPT] = Quick(program)
    return kept

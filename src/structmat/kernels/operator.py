"""The operators ``structmat::multiply``, ``multiply_into`` and ``multiply_backward`` as PyTorch sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from structmat.kernels.text import Text

FEW_ROWS = 8
"""Fewer rows than this leave most of a tile empty. In float32 and float64 they run vector by vector instead (the
library decides with the same number), which is faster than PyTorch's products at any size; in half precision they stay
there unless blocks are small."""


def fake_outcome(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
    """An outcome without data: the text of a program begins with a word and the number of its outputs."""
    return x.new_empty(*x.shape[:-1], int(program.split(maxsplit=2)[1]))


def define_fakes() -> None:
    """What the operators do for tensors without data (meta, tracing)."""

    def filled(x: Tensor, tensors: list[Tensor], y: Tensor, program: str) -> None:
        return None

    def nothing(
        x: Tensor, grad: Tensor, tensors: list[Tensor], grad_x: Tensor, grads: list[Tensor], program: str
    ) -> None:
        return None

    def kept(x: Tensor, tensors: list[Tensor], program: str) -> tuple[Tensor, Tensor]:
        return fake_outcome(x, tensors, program), x.new_empty(0)

    def from_kept(
        x: Tensor,
        kept: Tensor,
        grad: Tensor,
        tensors: list[Tensor],
        grad_x: Tensor,
        grads: list[Tensor],
        program: str,
    ) -> None:
        return None

    def recurred(
        x: Tensor, start: Tensor, memory: Tensor, y: Tensor, tensors: list[Tensor], program: str, kind: int
    ) -> None:
        return None

    def recurred_keeping(
        x: Tensor,
        start: Tensor,
        memory: Tensor,
        y: Tensor,
        kept: Tensor,
        tensors: list[Tensor],
        program: str,
        kind: int,
    ) -> None:
        return None

    def recurred_back(
        kept: Tensor,
        start: Tensor,
        memory: Tensor,
        y: Tensor,
        grad: Tensor,
        grad_memory: Tensor,
        grad_x: Tensor,
        grad_s: Tensor,
        grad_start: Tensor,
        tensors: list[Tensor],
        program: str,
        kind: int,
    ) -> None:
        return None

    def convolved(x: Tensor, tensors: list[Tensor], y: Tensor, steps: str) -> None:
        return None

    def pooled(
        x: Tensor, x_scale: Tensor, weight: Tensor, index: Tensor, z: Tensor, z_scale: Tensor, kind: int
    ) -> None:
        return None

    def pooled_back(
        x: Tensor,
        x_scale: Tensor,
        weight: Tensor,
        index: Tensor,
        z_scale: Tensor,
        grad: Tensor,
        grad_x: Tensor,
        grad_weight: Tensor,
        kind: int,
    ) -> None:
        return None

    torch.library.register_fake("structmat::recur")(recurred)
    torch.library.register_fake("structmat::recur_keeping")(recurred_keeping)
    torch.library.register_fake("structmat::recur_backward")(recurred_back)
    torch.library.register_fake("structmat::convolve")(convolved)
    torch.library.register_fake("structmat::pool_layer")(pooled)
    torch.library.register_fake("structmat::pool_layer_backward")(pooled_back)
    torch.library.register_fake("structmat::multiply")(fake_outcome)
    torch.library.register_fake("structmat::multiply_keeping")(kept)
    torch.library.register_fake("structmat::multiply_backward_kept")(from_kept)
    torch.library.register_fake("structmat::multiply_into")(filled)
    torch.library.register_fake("structmat::multiply_backward")(nothing)


def arguments(text: Text, tensors: Mapping[str, Tensor], bias: Tensor | None) -> list[Tensor]:
    """The tensors as the operators take them."""
    given = [tensors[name].contiguous() for name in text.names]
    if bias is not None:
        given.append(bias.contiguous())
    return given


def is_by_rows(x: Tensor) -> bool:
    """Whether these are two axes, with contiguous rows at equal distances that don't overlap."""
    return x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def is_by_features(x: Tensor) -> bool:
    """The same of columns, as in the transpose of a matrix; of many rows, since few are read vector by vector."""
    return x.dim() == 2 and x.stride(0) == 1 and x.stride(1) >= x.shape[0] and x.shape[0] >= FEW_ROWS


def takes(y: Tensor, x: Tensor) -> bool:
    """Whether :func:`run_into` can write its outcome for ``x`` into ``y``."""
    plain = type(y) is Tensor and y.is_cpu and y.dtype is x.dtype and not y.requires_grad and not y.is_neg()
    return (
        plain
        and x.dim() == 2
        and x.shape[0] >= FEW_ROWS
        and (is_by_rows(y) or is_by_features(y))
        and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )


def run(x: Tensor, given: list[Tensor], words: str) -> Tensor:
    """Rows (..., in_features) to (..., out_features), contiguous, in one pass over the batch. No gradient is recorded.

    Args:
        x: the input, contiguous, by rows or by features.
        given: the tensors in the order of the text, contiguous.
        words: the text, with or without a bias.
    """
    if not is_by_features(x):
        return run_rows(x, given, words)
    y = x.new_empty(x.shape[0], int(words.split(maxsplit=2)[1]))
    run_into(x, given, words, y)
    return y


def run_rows(x: Tensor, given: list[Tensor], words: str) -> Tensor:
    """The same of an input that is contiguous or by rows."""
    result: Tensor = multiplier()(x, given, words)
    return result


def run_into(x: Tensor, given: list[Tensor], words: str, y: Tensor) -> None:
    """The same into existing memory, see :func:`takes`.

    Args:
        x, given, words: as :func:`run` takes them.
        y: what is written (rows, out_features).
    """
    _multiply_into()(x, given, y, words)
    torch.autograd.graph.increment_version(y)  # so that a gradient that needs what was there fails


def run_backward(x: Tensor, grad: Tensor, given: list[Tensor], grad_x: Tensor, grads: list[Tensor], words: str) -> None:
    """Write the gradients of the input and of the tensors, given that of the outcome, in one pass over the batch.

    Args:
        x, given, words: what :func:`run` was called with.
        grad: the gradient of what it returned, its rows at equal distances.
        grad_x, grads: what is written: as many numbers as in ``x`` and in each tensor, contiguous; or none, for a
            gradient that is not wanted.
    """
    _multiply_backward()(x, grad, given, grad_x, grads, words)


def run_keeping(x: Tensor, given: list[Tensor], words: str) -> tuple[Tensor, Tensor]:
    """As :func:`run_rows`, and what the text says to keep for the backward pass, in an order of the library's own.

    Called by address nothing is kept: the second tensor is empty.
    """
    call = _multiply_keeping()
    if call is None:
        return run_rows(x, given, words), x.new_empty(0)
    y, kept = call(x, given, words)
    return y, kept


def run_backward_kept(
    x: Tensor, kept: Tensor, grad: Tensor, given: list[Tensor], grad_x: Tensor, grads: list[Tensor], words: str
) -> None:
    """As :func:`run_backward`, after :func:`run_keeping`."""
    call = _multiply_backward_kept()
    if call is None:
        return run_backward(x, grad, given, grad_x, grads, words)
    call(x, kept, grad, given, grad_x, grads, words)


@cache
def _multiply_keeping() -> Callable[..., tuple[Tensor, Tensor]] | None:
    return None if _is_by_address() else _called("multiply_keeping")


@cache
def _multiply_backward_kept() -> Callable[..., None] | None:
    return None if _is_by_address() else _called("multiply_backward_kept")


def _is_by_address() -> bool:
    from structmat.kernels.library import native

    return native().by_address is not None


@cache
def multiplier() -> Callable[..., Tensor]:
    """What :func:`run_rows` calls, for those who call it many times."""
    return _called("multiply")


@cache
def standing() -> tuple[Callable[..., int], Callable[..., Tensor], Callable[..., None]] | None:
    """The operators that prepare tensors for many calls with few rows, multiply by them, and release them; None where
    it is not PyTorch that calls the library."""
    return None if _is_by_address() else (_called("stand"), _called("multiply_standing"), _called("fall"))


@cache
def recurrence() -> Callable[..., None] | None:
    """The operator for all times of a recurrent net, or None where it is not PyTorch that calls the library."""
    return None if _is_by_address() else _called("recur")


@cache
def convolution() -> Callable[..., None] | None:
    """The operator for convolutions one after the other, or None where it is not PyTorch that calls the library."""
    return None if _is_by_address() else _called("convolve")


@cache
def kept_recurrence() -> Callable[..., None] | None:
    """The same, which keeps what the way back needs."""
    return None if _is_by_address() else _called("recur_keeping")


@cache
def recurrence_back() -> Callable[..., None]:
    """The way back through all times."""
    return _called("recur_backward")


@cache
def _multiply_into() -> Callable[..., None]:
    return _called("multiply_into")


@cache
def _multiply_backward() -> Callable[..., None]:
    return _called("multiply_backward")


def _called(name: str) -> Callable[..., Any]:
    """The operator as PyTorch calls it, or the same by address where the loaded PyTorch did not take it."""
    from structmat.kernels.library import native  # which loads what is defined above

    by_address = native().by_address
    found: Callable[..., Any] = getattr(by_address or torch.ops.structmat, name)
    return found if by_address else found.default  # type: ignore[attr-defined]

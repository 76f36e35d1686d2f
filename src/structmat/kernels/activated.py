"""Programs with biases and activations between their stages: as text, and as an operator for compilers.

Only what is made of these words runs natively; no other stage is nonlinear, and :mod:`structmat.program` knows none.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from structmat.kernels.operator import fake_outcome
from structmat.kernels.text import NotNativeError, words_of
from structmat.program import Program


class Kind(enum.Enum):
    """An activation, with the number by which the native backend knows it."""

    IDENTITY = 0
    RELU = 1
    TANH = 2
    SIGMOID = 3
    SILU = 4
    GELU = 5
    GELU_TANH = 6
    RECTIFIER = 7

    @property
    def is_by_value(self) -> bool:
        """Whether its derivative is found from its value, so that its argument need not be kept."""
        return self.value <= Kind.SIGMOID.value


@dataclass(frozen=True)
class Spread:
    """A tensor whose number ``(row // inner) % count`` belongs to a row.

    Args:
        name: of the tensor.
        inner: neighbouring rows with the same number.
        count: numbers of the tensor.
    """

    name: str
    inner: int
    count: int


@dataclass(frozen=True)
class Activation:
    """``f(x + bias)`` on ``size`` rows; a rectifier has slopes."""

    kind: Kind
    size: int
    bias: Spread | None = None
    slope: Spread | None = None


@dataclass(frozen=True)
class Keep:
    """The value here is kept for the backward pass."""

    size: int


@dataclass(frozen=True)
class Together:
    """The sum of what several runs of steps make of one input."""

    parts: tuple[tuple[Step, ...], ...]


Step = Program | Activation | Keep | Together


@dataclass(frozen=True)
class Activated:
    """Steps as the native backend reads them.

    Args:
        words: in which everything between is made again for the gradients.
        keeping: in which values are kept.
        names: of the tensors, by number.
        out_features: numbers in a row of the outcome.
    """

    words: str
    keeping: str
    names: tuple[str, ...]
    out_features: int


def activated(steps: Sequence[Step], out_features: int) -> Activated:
    """The text of steps one after the other.

    Raises:
        NotNativeError: a stage has no native kernel; the message says which.
    """
    names: dict[str, int] = {}
    texts = [f"rows {out_features} {_chain(steps, names, keeps)}" for keeps in (False, True)]
    return Activated(texts[0], texts[1], tuple(names), out_features)


def _chain(steps: Sequence[Step], names: dict[str, int], keeps: bool) -> str:
    words = [_words(step, names, keeps) for step in steps if keeps or not isinstance(step, Keep)]
    return f"chain {len(words)} {' '.join(words)}"


def _words(step: Step, names: dict[str, int], keeps: bool) -> str:
    if isinstance(step, Keep):
        return f"keep {step.size}"
    if isinstance(step, Together):
        parts = [_chain(part, names, keeps) for part in step.parts]
        return f"sum {len(parts)} {' '.join(parts)}"
    if not isinstance(step, Activation):
        indices: set[str] = set()
        words = words_of(step, names, indices)
        if indices:
            raise NotNativeError("a program with activations has no tensors of integers")
        return words
    numbers = [step.kind.value, step.size]
    for spread in (step.bias, step.slope):
        if spread is None:
            numbers += [0, 1, 1]
        else:
            numbers += [names.setdefault(spread.name, len(names)) + 1, spread.inner, spread.count]
    return " ".join(["activate", *map(str, numbers)])


# ------------------------------------------------------------------------------------------------------- for compilers


def define_operators() -> None:
    """Make ``structmat::activated`` known to PyTorch: what a compiler puts into its graph, with its gradients.

    It has no memory of its own between forward and backward pass; calls outside of compilers use the operators in
    :mod:`structmat.kernels.operator`, which take less time.
    """
    library = torch.library.Library("structmat", "FRAGMENT")
    _HELD.append(library)  # an operator lives as long as its library
    library.define("activated(Tensor x, Tensor[] tensors, str program) -> Tensor")
    library.define(
        "activated_backward(Tensor x, Tensor grad, Tensor[] tensors, bool[] wanted, str program) -> Tensor[]"
    )
    library.impl("activated", _forward, "CPU")
    library.impl("activated_backward", _backward, "CPU")
    torch.library.register_fake("structmat::activated", fake_outcome)
    torch.library.register_fake("structmat::activated_backward", _fake_backward)
    torch.library.register_autograd("structmat::activated", _gradients, setup_context=_remember)


_HELD: list[torch.library.Library] = []


def _forward(x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
    made: Tensor = torch.ops.structmat.multiply.default(x.contiguous(), [t.contiguous() for t in tensors], program)
    return made


def _backward(x: Tensor, grad: Tensor, tensors: list[Tensor], wanted: list[bool], program: str) -> list[Tensor]:
    found = _fake_backward(x, grad, tensors, wanted, program)
    held = [t.contiguous() for t in tensors]
    torch.ops.structmat.multiply_backward.default(x.contiguous(), grad.contiguous(), held, found[0], found[1:], program)
    return found


def _fake_backward(x: Tensor, grad: Tensor, tensors: list[Tensor], wanted: list[bool], program: str) -> list[Tensor]:
    return [x.new_empty(t.shape if w else 0) for t, w in zip((x, *tensors), wanted, strict=True)]


def _remember(ctx: FunctionCtx, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    x, tensors, program = inputs
    ctx.save_for_backward(x, *tensors)
    ctx.program = program  # type: ignore[attr-defined]


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    x, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    # Which tensors of a list want a gradient is not told; those that can't have one are not computed.
    wanted = [ctx.needs_input_grad[0], *(t.requires_grad for t in tensors)]  # type: ignore[attr-defined]
    program: str = ctx.program  # type: ignore[attr-defined]
    found = torch.ops.structmat.activated_backward.default(x, grad, tensors, wanted, program)
    made = [g if w else None for g, w in zip(found, wanted, strict=True)]
    return made[0], made[1:], None

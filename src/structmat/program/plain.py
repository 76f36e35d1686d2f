"""Programs of plain stages: contractions, diagonals and moves, which every backend runs, in place of stages that follow
from these.

Weights that are functions of tensors are computed first, complex weights on pairs of reals become real blocks, a
Hadamard transform becomes contractions with constant blocks, and orders that follow from sizes become indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program, Sum, stages
from structmat.program.derived import Derived, Form, derived_functions
from structmat.program.fixed import Hadamard, Reorder, index_of
from structmat.program.pairs import Pairs
from structmat.program.simplify import simplify
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Crop, Diagonal, Pad, Permute, Shuffle

Tensors = Mapping[str, Tensor]


class Making(Protocol):
    """How a tensor of the plain program is made. Implementations are frozen dataclasses."""

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor: ...


@dataclass(frozen=True)
class PlainForm:
    """An equal program of plain stages.

    Args:
        program: what runs.
        made: by name, how the tensors are made that it reads beside the given ones.
    """

    program: Program
    made: Mapping[str, Making]

    def tensors(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What the plain program reads, differentiable in the given tensors; constants in this dtype."""
        known = dict(tensors)
        for name, making in self.made.items():
            known[name] = making(known, dtype, device)
        return known


_KEPT = "_plain_form"


def plain_form(program: Program) -> PlainForm | None:
    """The program in plain stages, or None if it is in these already. Stages that have no such form stay: Fourier
    transforms on pairs."""
    # Kept with the program itself: this is asked at every call.
    if _KEPT not in program.__dict__:
        program.__dict__[_KEPT] = _plain_form(program)
    kept: PlainForm | None = program.__dict__[_KEPT]
    return kept


def _plain_form(program: Program) -> PlainForm | None:
    if not any(isinstance(stage, Derived | Pairs | Hadamard | Reorder) for stage in stages(program)):
        return None
    writer = _Writer()
    return PlainForm(simplify(writer.run(program)), writer.made)


def plain(program: Program, tensors: Tensors) -> tuple[Program, Tensors]:
    """The plain form and its tensors; constants in the precision of the given ones, and on their device."""
    form = plain_form(program)
    if form is None:
        return program, tensors
    like = next((t for t in tensors.values() if t.is_floating_point() or t.is_complex()), torch.empty(0))
    return form.program, form.tensors(tensors, like.dtype.to_real(), like.device)


@dataclass
class _Writer:
    made: dict[str, Making] = field(default_factory=dict)

    def run(self, program: Program) -> Program:
        if isinstance(program, Chain):
            return Chain(tuple(map(self.run, program.steps)))
        if isinstance(program, Sum):
            return Sum(tuple(map(self.run, program.parts)))
        return self.stage(program)

    def make(self, name: str, making: Making) -> str:
        self.made[name] = making
        return name

    def stage(self, stage: Stage) -> Program:
        if isinstance(stage, Derived):
            return self.derived(stage)
        if isinstance(stage, Reorder):
            return Permute(self.make(f"{stage}", _Index(stage)), stage.size)
        if isinstance(stage, Hadamard):
            return Chain(tuple(self.hadamard(stage, 1)))
        if isinstance(stage, Pairs):
            return Chain(tuple(self.pairs(stage)))
        return stage

    def derived(self, stage: Derived) -> Stage:
        [(name, (source, form))] = derived_functions(stage).items()
        self.make(name, _Derivation(source, form))
        return stage.stage.rename(lambda _: name)

    def hadamard(self, stage: Hadamard, copies: int) -> list[Program]:
        """Of so many vectors, one after the other: digits of the index are mixed one by one, base ``_RADIX``."""
        steps: list[Program] = []
        done = 1
        while done < stage.size:
            radix = min(_RADIX, stage.size // done)
            name = self.make(f"Hadamard of {radix}", _Signs(radix))
            steps.append(Contraction(name, copies * stage.size // (done * radix), radix, radix, done, True, True))
            done *= radix
        return steps or [Crop(copies, copies, 0)]

    def pairs(self, stage: Pairs) -> list[Program]:
        """Steps on the real parts followed by the imaginary ones."""
        inner = self.derived(stage.stage) if isinstance(stage.stage, Derived) else stage.stage
        if stage.is_complex:
            return self.multiplied(replace(stage, stage=inner))
        match inner:
            case Contraction(a=a, b=b, c=c, d=d, shared_a=shared, shared_d=shared_d, transposed=transposed):
                alike = shared or a == 1
                name = inner.weight if alike else self.make(f"{inner.weight}, twice", _Twice(inner.weight))
                return [Contraction(name, 2 * a, b, c, d, alike, shared_d, transposed)]
            case Diagonal(spectrum=False):
                return [Diagonal(self.make(f"{inner.weight}, twice", _Twice(inner.weight)), 2 * inner.size)]
            case Shuffle(sizes=sizes, axes=axes):
                return [Shuffle((2, *sizes), (0, *(axis + 1 for axis in axes)))]
            case Permute(index=index, size=size, inverse=inverse):
                return [Permute(self.make(f"{index}, twice", _IndexTwice(index, size)), 2 * size, inverse)]
            case Reorder(size=size):
                once = self.make(f"{inner}", _Index(inner))
                return [Permute(self.make(f"{once}, twice", _IndexTwice(once, size)), 2 * size)]
            case Hadamard():
                return self.hadamard(inner, 2)
            case Pad(size=size, padded=padded, before=before):
                return [_interleaved(size), Pad(2 * size, 2 * padded, 2 * before), _apart(padded)]
            case Crop(size=size, kept=kept, before=before):
                return [_interleaved(size), Crop(2 * size, 2 * kept, 2 * before), _apart(kept)]
        return [stage]

    def multiplied(self, stage: Pairs) -> list[Program]:
        """By complex weights, as real blocks of four times the size."""
        inner = stage.stage
        sign = "conjugate" if stage.conjugate else "unsigned" if stage.unsigned else "blocks"
        if isinstance(inner, Diagonal) and not inner.spectrum:
            name = self.make(f"{inner.weight}, {sign}", _Blocks(stage, (1, 1, 1, inner.size)))
            return [Contraction(name, 1, 2, 2, inner.size)]
        if not isinstance(inner, Contraction):
            return [stage]
        a, b, c, d = inner.pattern
        side = ", transposed" if inner.transposed else ""
        name = self.make(f"{inner.weight}, {sign}{side}", _Blocks(stage, inner.stored_shape))
        made = Contraction(name, a, 2 * b, 2 * c, d, inner.shared_a, inner.shared_d)
        return [Shuffle((2, a, c * d), (1, 0, 2)), made, Shuffle((a, 2, b * d), (1, 0, 2))]


def _interleaved(size: int) -> Shuffle:
    return Shuffle((2, size), (1, 0))


def _apart(size: int) -> Shuffle:
    return Shuffle((size, 2), (1, 0))


_RADIX = 4
"""Of the blocks in which a Hadamard transform runs."""


# ---------------------------------------------------------------------------------------------------- the tensors


@dataclass(frozen=True)
class _Derivation:
    source: str
    form: Form

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.form(tensors[self.source])


@dataclass(frozen=True)
class _Index:
    stage: Reorder

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        return index_of(self.stage).to(device)


@dataclass(frozen=True)
class _IndexTwice:
    """For the second half of twice as many places too."""

    index: str
    size: int

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.cat([tensors[self.index], tensors[self.index] + self.size])


@dataclass(frozen=True)
class _Twice:
    source: str

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.cat([tensors[self.source].flatten()] * 2)


@dataclass(frozen=True)
class _Signs:
    size: int

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _signs(self.size, dtype, device)


@lru_cache(maxsize=64)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode can't be used with gradients later
        place = torch.arange(size)
        common, parity = place[:, None] & place, torch.zeros(size, size, dtype=torch.int64)
        for digit in range(size.bit_length() - 1):
            parity ^= common >> digit & 1
        return (1 - 2 * parity).to(device, dtype)


@dataclass(frozen=True)
class _Blocks:
    """``[[re, -im], [im, re]]`` in place of each block (b, c) of a complex weight of this shape (a, b, c, d)."""

    stage: Pairs
    shape: tuple[int, int, int, int]

    def __call__(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
        inner = self.stage.stage
        weight = tensors[next(iter(inner.weights))].reshape(*self.shape, 2)
        if isinstance(inner, Contraction) and inner.transposed:
            weight = weight.transpose(1, 2)
        real, imag = weight.unbind(-1)
        upper = imag if self.stage.conjugate or self.stage.unsigned else -imag
        lower = -imag if self.stage.conjugate and not self.stage.unsigned else imag
        rows = torch.stack([torch.stack([real, upper], 2), torch.stack([lower, real], 2)], 1)
        a, b, c, d = real.shape
        return rows.reshape(a, 2 * b, 2 * c, d)

"""Programs of complex numbers as programs of real ones, on real and imaginary parts side by side.

A complex value of n features is one of 2n, ``(re, im)`` feature by feature, as ``torch.view_as_real`` lays it out. A
complex weight becomes real blocks ``[[re, -im], [im, re]]``: four real multiply-adds for a complex one. Whatever runs
real programs runs these, forwards and backwards.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.simplify import simplify
from structmat.program.stage import Stage
from structmat.program.stages import Complex, Contraction, Crop, Diagonal, Pad, Permute, Real, Shuffle, Sparse

Tensors = Mapping[str, Tensor]


class Change(enum.Enum):
    """How a tensor of the real program comes from one of the complex program."""

    NONE = "the tensor itself"
    BLOCKS = "blocks of 2 x 2 of each entry"
    COLUMNS = "the two parts of each entry, as a column"
    TWICE = "each entry twice, along the last axis"
    SCATTERED = "entries of a sparse matrix as four each"
    PLACES = "their places"
    PAIR_PLACES = "the places of entries that stand twice on a diagonal"
    PAIRS = "an index of pairs"


@dataclass(frozen=True)
class Made:
    """A tensor of the real program: its name, the tensor that it comes from, how, and for which stage."""

    name: str
    source: str
    change: Change
    stage: Stage


@dataclass(frozen=True)
class RealForm:
    """A program on parts.

    Args:
        program: real, with simplified moves.
        made: its tensors.
        complex_out: whether its outcome is the parts of complex numbers.
    """

    program: Program
    made: tuple[Made, ...]
    complex_out: bool

    def tensors(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors of the real program, differentiable in the given ones."""
        return {made.name: _CHANGES[made.change](made.stage, tensors[made.source]) for made in self.made}


def real_form(program: Program, complex_tensors: frozenset[str], complex_in: bool) -> RealForm | None:
    """A program on the parts of its values.

    Args:
        program: what to bring into this form.
        complex_tensors: names of those of its tensors that are complex.
        complex_in: whether its input is.

    Returns:
        The form, or None if a stage has none (Fourier transforms, functions).
    """
    writer = _Writer(complex_tensors)
    try:
        steps, complex_out = writer.run(program, complex_in)
    except _NoFormError:
        return None
    features = program.in_features * (2 if complex_in else 1)
    made = simplify(Chain(tuple(steps) or (Crop(features, features, 0),)))
    return RealForm(made, tuple(writer.made.values()), complex_out)


class _NoFormError(Exception):
    pass


class _Writer:
    def __init__(self, complex_tensors: frozenset[str]) -> None:
        self.complex_tensors = complex_tensors
        self.made: dict[str, Made] = {}

    def tensor(self, source: str, change: Change, stage: Stage) -> str:
        """The name of a changed tensor; stages that read it in the same way share it."""
        sign = "T" if getattr(stage, "transposed", False) and change is not Change.NONE else ""
        name = source if change is Change.NONE else f"{source}:{change.name.lower()}{sign}"
        self.made[name] = Made(name, source, change, stage)
        return name

    def run(self, program: Program, is_complex: bool) -> tuple[list[Program], bool]:
        """Steps on parts, and whether their outcome is complex."""
        if isinstance(program, Chain):
            steps: list[Program] = []
            for step in program.steps:
                more, is_complex = self.run(step, is_complex)
                steps += more
            return steps, is_complex
        if isinstance(program, Sum):
            parts = [self.run(part, is_complex) for part in program.parts]
            complex_out = any(out for _, out in parts)
            size = program.in_features * (2 if is_complex else 1)
            chains = []
            for steps, out in parts:
                own = steps if out or not complex_out else [*steps, *_as_complex(program.out_features)]
                chains.append(Chain(tuple(own) or (Crop(size, size, 0),)))
            return [Sum(tuple(chains))], complex_out
        return self.stage(program, is_complex)

    def stage(self, stage: Stage, is_complex: bool) -> tuple[list[Program], bool]:
        weighted = any(name in self.complex_tensors for name in stage.weights)
        if isinstance(stage, Real):
            size = stage.size
            return ([Shuffle((size, 2), (1, 0)), Crop(2 * size, size, 0)] if is_complex else []), False
        if isinstance(stage, Complex):
            return ([] if is_complex else list(_as_complex(stage.size))), True
        if not is_complex and not weighted:
            for name in (*stage.weights, *stage.indices):
                self.tensor(name, Change.NONE, stage)
            return [stage], False
        if isinstance(stage, Contraction):
            return self.contraction(stage, is_complex, weighted), True
        if isinstance(stage, Diagonal) and not stage.spectrum:
            return [self.diagonal(stage, is_complex, weighted)], True
        if isinstance(stage, Sparse) and is_complex:
            return [self.sparse(stage, weighted)], True
        moved = self.moved(stage)
        if moved is None:
            raise _NoFormError
        return [moved], True

    def contraction(self, stage: Contraction, is_complex: bool, weighted: bool) -> list[Program]:
        a, b, c, d = stage.pattern
        if not weighted:  # the parts are one more axis inside of d
            if d == 1 or stage.shared_d:
                name = self.tensor(stage.weight, Change.NONE, stage)
                return [Contraction(name, a, b, c, 2 * d, stage.shared_a, True, stage.transposed)]
            name = self.tensor(stage.weight, Change.TWICE, stage)
            return [Contraction(name, a, b, c, 2 * d, stage.shared_a)]
        name = self.tensor(stage.weight, Change.BLOCKS if is_complex else Change.COLUMNS, stage)
        made = Contraction(name, a, 2 * b, 2 * c if is_complex else c, d, stage.shared_a, stage.shared_d)
        before = [Shuffle((a * c, d, 2), (0, 2, 1))] if d > 1 and is_complex else []
        after = [Shuffle((a * b, 2, d), (0, 2, 1))] if d > 1 else []
        return [*before, made, *after]

    def diagonal(self, stage: Diagonal, is_complex: bool, weighted: bool) -> Stage:
        if not weighted:
            return Diagonal(self.tensor(stage.weight, Change.TWICE, stage), 2 * stage.size)
        name = self.tensor(stage.weight, Change.BLOCKS if is_complex else Change.COLUMNS, stage)
        return Contraction(name, stage.size, 2, 2 if is_complex else 1, 1)

    def sparse(self, stage: Sparse, weighted: bool) -> Stage:
        values = self.tensor(stage.values, Change.SCATTERED if weighted else Change.TWICE, stage)
        places = self.tensor(stage.places, Change.PLACES if weighted else Change.PAIR_PLACES, stage)
        capacity = stage.capacity * (4 if weighted else 2)
        return Sparse(values, places, 2 * stage.height, 2 * stage.width, capacity, stage.transposed)

    def moved(self, stage: Stage) -> Stage | None:
        """A stage that only moves complex values, on parts."""
        if isinstance(stage, Permute):
            return Permute(self.tensor(stage.index, Change.PAIRS, stage), 2 * stage.size, stage.inverse)
        if isinstance(stage, Shuffle):
            return Shuffle((*stage.sizes, 2), (*stage.axes, len(stage.axes)))
        if isinstance(stage, Pad):
            return Pad(2 * stage.size, 2 * stage.padded, 2 * stage.before)
        if isinstance(stage, Crop):
            return Crop(2 * stage.size, 2 * stage.kept, 2 * stage.before)
        return None


def _as_complex(size: int) -> tuple[Program, ...]:
    return Pad(size, 2 * size, 0), Shuffle((2, size), (1, 0))


# ---------------------------------------------------------------------------------------------------- the tensors


def _full(stage: Stage, tensor: Tensor) -> Tensor:
    """The weight of a contraction as (a, b, c, d), of a diagonal as (size, 1, 1, 1)."""
    if not isinstance(stage, Contraction):
        return tensor.reshape(-1, 1, 1, 1)
    weight = tensor.reshape(stage.stored_shape)
    return weight.transpose(1, 2) if stage.transposed else weight


def _blocks(stage: Stage, tensor: Tensor) -> Tensor:
    a, b, c, d = (weight := _full(stage, tensor)).shape
    real, imag = weight.real, weight.imag
    rows = torch.stack([torch.stack([real, -imag], 3), torch.stack([imag, real], 3)], 2)  # (a, b, 2, c, 2, d)
    return rows.reshape(a, 2 * b, 2 * c, d)


def _columns(stage: Stage, tensor: Tensor) -> Tensor:
    a, b, c, d = (weight := _full(stage, tensor)).shape
    return torch.stack([weight.real, weight.imag], 2).reshape(a, 2 * b, c, d)


def _twice(stage: Stage, tensor: Tensor) -> Tensor:
    full = _full(stage, tensor) if isinstance(stage, Contraction) else tensor.reshape(-1)
    return full.repeat_interleave(2, -1)


def _scattered(stage: Stage, tensor: Tensor) -> Tensor:
    assert isinstance(stage, Sparse), stage
    imag = -tensor.imag if stage.transposed else tensor.imag  # the blocks are read transposed too
    return torch.stack([tensor.real, -imag, imag, tensor.real], -1).flatten()


def _places(stage: Stage, tensor: Tensor) -> Tensor:
    assert isinstance(stage, Sparse), stage
    row, column = 2 * (tensor // stage.width)[:, None], 2 * (tensor % stage.width)[:, None]
    down, along = torch.tensor([0, 0, 1, 1], device=tensor.device), torch.tensor([0, 1, 0, 1], device=tensor.device)
    return ((row + down) * (2 * stage.width) + column + along).flatten()


def _pair_places(stage: Stage, tensor: Tensor) -> Tensor:
    assert isinstance(stage, Sparse), stage
    part = torch.arange(2, device=tensor.device)
    row, column = 2 * (tensor // stage.width)[:, None] + part, 2 * (tensor % stage.width)[:, None] + part
    return (row * (2 * stage.width) + column).flatten()


def _pairs(stage: Stage, tensor: Tensor) -> Tensor:
    return (2 * tensor[:, None] + torch.arange(2, device=tensor.device)).flatten()


_CHANGES = {
    Change.NONE: lambda stage, tensor: tensor,
    Change.BLOCKS: _blocks,
    Change.COLUMNS: _columns,
    Change.TWICE: _twice,
    Change.SCATTERED: _scattered,
    Change.PLACES: _places,
    Change.PAIR_PLACES: _pair_places,
    Change.PAIRS: _pairs,
}

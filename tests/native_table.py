"""Which stages run natively: every kind of stage, by itself, in every dtype and direction.

:data:`LINES` holds programs of each kind of stage, :data:`GAPS` what is known to run on the reference backend instead.
:func:`measure` runs them all with the kernels of one instruction set and says who ran what.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from native_programs import tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import structmat as sm
from structmat.errors import StructureError
from structmat.kernels import apply, native
from structmat.program import (
    Call,
    Chain,
    Complex,
    Contraction,
    Convolution,
    Cosine,
    Crop,
    Derived,
    Diagonal,
    Fourier,
    Generated,
    Hadamard,
    Interpolation,
    Pad,
    Pairs,
    Permute,
    Program,
    Real,
    Reorder,
    Shuffle,
    Sparse,
    Sum,
    Windowed,
    reference,
)
from structmat.program.derived import Mixing, Phases, Rotations, Sinkhorn
from structmat.program.fixed import EvensFirst


def _doubled(x: Tensor, weight: Tensor) -> Tensor:
    return 2 * weight * x


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u[:, None] * v


# Sizes that are no multiples of a register, blocks of every size that has a kernel of its own, both directions.
_PLAIN = (Contraction("w", 3, 5, 7, 1), Contraction("w", 1, 21, 40, 5), Contraction("w", 2, 64, 48, 3, transposed=True))
_SHARED = tuple(
    Contraction("w", 3, 9, 17, 4, shared_a, shared_d, transposed)
    for shared_a, shared_d, transposed in itertools.product((False, True), repeat=3)
    if shared_a or shared_d
)
_RADIX = tuple(
    Chain(tuple(Contraction(f"w{d}", 64 // (base * d), base, base, d) for d in (base**k for k in range(64)) if d < 64))
    for base in (2, 4)
)

LINES: Mapping[str, tuple[Program, ...]] = {
    "Contraction": _PLAIN,
    "Contraction, shared": _SHARED,
    "Contraction, 2 x 2 and 4 x 4": _RADIX,
    "Diagonal": (Diagonal("w", 37),),
    "Diagonal, spectrum": (Diagonal("w", 16, spectrum=True),),
    "Permute": (Permute("p", 37), Permute("p", 37, inverse=True)),
    "Shuffle": (Shuffle((3, 4, 5), (2, 0, 1)),),
    "Fourier": (Fourier(16), Fourier(16, inverse=True)),
    "Convolution": (Convolution("w", 1, 1, 21, 37), Convolution("w", 2, 3, 16, 16, 1.0, 16, transform=True)),
    "Generated": (Generated(_outer, (("u", 21), ("v", 37)), (), 21, 37, linear=("u", "v")),),
    "Hadamard": (Hadamard(32), Hadamard(64)),
    "Cosine": (Cosine(32), Cosine(32, inverse=True)),
    "Reorder": (Reorder(EvensFirst(32, 16)), Reorder(EvensFirst(32, 16), inverse=True)),
    "Derived": (
        Derived(Diagonal("w", 37), Phases()),
        Derived(Contraction("angles", 3, 2, 2, 5), Rotations()),
        Derived(Contraction("logits", 1, 5, 5, 1, transposed=True), Sinkhorn(2)),
    ),
    "Pairs": (
        *(Pairs(stage) for stage in (_PLAIN[2], *_SHARED[:2], Diagonal("w", 37))),
        *(Pairs(Contraction("w", 3, 5, 7, 4), **{flag: True}) for flag in ("conjugate", "unsigned", "is_real")),
        *(Pairs(Contraction("w", 1, 5, 7, 4, shared_d=True), is_real=True), Pairs(Diagonal("w", 37), is_real=True)),
        *(Pairs(stage) for stage in (Permute("p", 37), Permute("p", 37, inverse=True), Shuffle((3, 4, 5), (2, 0, 1)))),
        *(Pairs(stage) for stage in (Reorder(EvensFirst(32, 16)), Hadamard(32), Pad(21, 37, 5), Crop(37, 21, 5))),
        Pairs(Derived(Contraction("w", 37, 1, 1, 1, shared_a=True), Mixing()), is_real=True),
    ),
    "Sparse": (Sparse("w", "p", 21, 37, 90), Sparse("w", "p", 21, 37, 90, transposed=True)),
    "Interpolation": (Interpolation("w", "p", 9, 37), Interpolation("w", "p", 9, 37, transposed=True)),
    "Windowed": (
        Windowed("l", "r", "w5_9x8_13", 21, 37, 2, 14, 21),
        Windowed("l", "r", "w5_9x8_13", 21, 37, 2, 14, 21, transposed=True),
    ),
    "Pad": (Pad(21, 37, 5),),
    "Crop": (Crop(37, 21, 5),),
    "Real": (Real(37),),
    "Complex": (Complex(37),),
    "Call": (Call(_doubled, (("w", 37),), 37, 37, 74, 0, 2),),
    "Chain": (Chain((Contraction("w", 1, 21, 37, 1), Diagonal("v", 21), Crop(21, 9, 3))),),
    "Sum": (Sum((Contraction("w", 1, 21, 37, 1), Sparse("v", "p", 21, 37, 90))),),
}
"""Programs of each kind of stage, by the names of the table. A name begins with the class."""

_SHAPES = {"angles": (3, 2, 5), "logits": (5, 5)}
"""Of tensors that weights are functions of; all others are read in any shape."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
}

DIRECTIONS = {"forward": 75, "few rows": 3, "backward": 75}
"""Rows of the input: several tiles with a last one that is not full; what has a path of its own; and with gradients."""


@dataclass(frozen=True)
class Gap:
    """Cells that run on the reference backend; None stands for all.

    Args:
        reason: why.
        stages: names of lines.
        dtypes: names of dtypes.
        directions: names of directions.
        instruction_sets: names of instruction sets.
    """

    reason: str
    stages: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    directions: tuple[str, ...] | None = None
    instruction_sets: tuple[str, ...] | None = None

    def holds(self, cell: Cell, instruction_set: str) -> bool:
        pairs = (
            (self.stages, cell.stage),
            (self.dtypes, cell.dtype),
            (self.directions, cell.direction),
            (self.instruction_sets, instruction_set),
        )
        return all(names is None or name in names for names, name in pairs)


GAPS: tuple[Gap, ...] = (
    Gap("PyTorch's fast Fourier transform serves", stages=("Fourier", "Diagonal, spectrum")),
    Gap("no program on parts is known", stages=("Interpolation", "Windowed"), dtypes=("complex64", "complex128")),
    Gap("half precision has no complex numbers", stages=("Complex",), dtypes=("bfloat16", "float16")),
    Gap("nothing is done", stages=("Real",), dtypes=("float32", "float64", "bfloat16", "float16")),
    Gap("a Python function has no kernel", stages=("Call", "Generated")),
    Gap("PyTorch's transforms and one product with the matrix serve", stages=("Convolution", "Cosine")),
)
"""Everything that does not run natively. A gap that is not here fails the tests, and so does one that is none."""


@dataclass(frozen=True)
class Cell:
    """One entry of the table: whether all programs of a line ran natively."""

    stage: str
    dtype: str
    direction: str
    native: bool


# -------------------------------------------------------------------------------------------------------- measuring


class _Seen(TorchDispatchMode):
    """Names of the operators that PyTorch really calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def measure() -> list[Cell]:
    """Run everything with this process's instruction set; what ran natively is compared with float64."""
    return [
        Cell(stage, name, direction, {_is_native(p, dtype, rows, direction == "backward") for p in programs} == {True})
        for (stage, programs), (name, dtype), (direction, rows) in itertools.product(
            LINES.items(), DTYPES.items(), DIRECTIONS.items()
        )
    ]


def _is_native(program: Program, dtype: torch.dtype, rows: int, backward: bool) -> bool:
    drawn = tensors_of(program, dtype, 1)
    tensors = {name: _turned(t.reshape(_SHAPES.get(name, t.shape))) for name, t in drawn.items()}
    generator = torch.Generator().manual_seed(0)
    x = _turned(torch.randn(rows, program.in_features, generator=generator, dtype=torch.float64).to(dtype))
    seen = _Seen()
    try:
        with sm.backend("native"), seen:
            found = _outcome(apply, program, tensors, x, backward)
    except StructureError:
        with sm.backend("auto"), seen:  # what is no kernel's is the reference's
            _outcome(apply, program, tensors, x, backward)
        assert not {n for n in seen.names if n.startswith("structmat::")}, (program, seen.names)
        return False
    wanted_names = {"structmat::multiply"} | ({"structmat::multiply_backward"} if backward else set())
    if not wanted_names <= seen.names:
        return False
    wide = {name: t if t.dtype == torch.int64 else t.to(_wide(t)) for name, t in tensors.items()}
    for one, two in zip(found, _outcome(reference.apply, program, wide, x.to(_wide(x)), backward), strict=True):
        error = float((one.to(two.dtype) - two).abs().max()) / max(float(two.abs().max()), 1e-3)
        assert _wide(one) == two.dtype
        assert one.abs().dtype == x.abs().dtype
        assert error <= 32 * torch.finfo(dtype).eps, (program, dtype, backward, error)
    return True


def _turned(tensor: Tensor) -> Tensor:
    """Complex numbers with an imaginary part."""
    return tensor * (1 + 0.5j) if tensor.is_complex() else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _outcome(
    multiply: Callable[[Program, Mapping[str, Tensor], Tensor], Tensor],
    program: Program,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    backward: bool,
) -> list[Tensor]:
    """The product; or the gradients of the input and of every learned tensor."""
    if not backward:
        with torch.inference_mode():
            return [multiply(program, tensors, x)]
    x = x.clone().requires_grad_()
    own = {n: t if t.dtype == torch.int64 else t.clone().requires_grad_() for n, t in tensors.items()}
    y = multiply(program, own, x)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *(t for t in own.values() if t.requires_grad)], grad))


def report() -> str:
    """For a process of its own: the instruction set and the cells as JSON."""
    return json.dumps({"instruction_set": native().instruction_set, "cells": [asdict(c) for c in measure()]})


# ---------------------------------------------------------------------------------------------------------- judging


def problems(cells: Iterable[Cell], instruction_set: str, gaps: Iterable[Gap] = GAPS) -> list[str]:
    """One line for each gap that is not declared, and each declared one that is none."""
    found, declared = [], tuple(gaps)
    for cell in cells:
        reasons = [gap.reason for gap in declared if gap.holds(cell, instruction_set)]
        where = f"{cell.stage}, {cell.dtype}, {cell.direction}, {instruction_set}"
        if not cell.native and not reasons:
            found.append(f"{where}: runs on the reference backend, which is not declared")
        if cell.native and reasons:
            found.append(f"{where}: runs natively, and is declared a gap: {reasons[0]}")
    return found


def table(cells: Iterable[Cell], instruction_set: str) -> str:
    """A line for each kind of stage; for each dtype the directions in turn: ``n``\\ ative or ``-``."""
    by = {(c.stage, c.dtype, c.direction): "n" if c.native else "-" for c in cells}
    width = max(map(len, LINES))
    lines = [
        f"native (n) or reference (-) with {instruction_set}; in each dtype: {', '.join(DIRECTIONS)}",
        f"{'':{width}} " + " ".join(f"{name:>10}" for name in DTYPES),
    ]
    for stage in LINES:
        marks = (" ".join(by[stage, dtype, direction] for direction in DIRECTIONS) for dtype in DTYPES)
        lines.append(f"{stage:{width}} " + " ".join(f"{m:>10}" for m in marks))
    return "\n".join(lines)

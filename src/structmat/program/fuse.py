"""Merging adjacent contractions. It multiplies weights, so it is for deployment, not for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program, Sum, rename, stages
from structmat.program.convolve import convolution_matrix
from structmat.program.plain import plain
from structmat.program.reference import (
    MATERIALISED_DENSITY,
    apply,
    generated_matrix,
    interpolation_matrix,
    sparse_matrix,
    window_matrices,
)
from structmat.program.simplify import simplify
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Diagonal, Interpolation, Sparse, Windowed
from structmat.program.toeplitz import Convolution
from structmat.program.transpose import transpose
from structmat.program.windows import merge_windows
from structmat.program.written_out import Generated

Tensors = Mapping[str, Tensor]

_ROWS_AT_ONCE = 256
"""Of a unit matrix, when a program is written out: several times as many numbers are in memory on the way."""


def chainable(first: Contraction, second: Contraction) -> int | None:
    """The rank of the interface if the product of two contractions is one again, else None.

    ``second`` is applied after ``first``: as a matrix product, the left factor. With patterns (a1, b1, c1, d1) of the
    left and (a2, b2, c2, d2) of the right factor: a1 | a2, d2 | d1 and ``r = a1 c1 / a2 = b2 d2 / d1`` is an integer.
    Source: Zheng, Gribonval et al., deformable butterfly factors.
    """
    a1, _, c1, d1 = second.pattern
    a2, b2, _, d2 = first.pattern
    if a2 % a1 or d1 % d2:
        return None
    rank = Fraction(a1 * c1, a2)
    if rank != Fraction(b2 * d2, d1) or rank.denominator != 1 or rank < 1:
        return None
    return int(rank)


def merged_pattern(first: Contraction, second: Contraction) -> tuple[int, int, int, int]:
    """The pattern of the product of two chainable contractions."""
    a1, b1, _, d1 = second.pattern
    a2, _, c2, d2 = first.pattern
    return (a1, b1 * d1 // d2, a2 * c2 // a1, d2)


def merge(first: Contraction, second: Contraction, tensors: Tensors) -> Tensor:
    """The weight (a, b, c, d) of the product of two chainable contractions, ``second`` applied after ``first``."""
    rank = chainable(first, second)
    assert rank is not None, f"{first} and {second} are not chainable"
    a1, b1, _, d1 = second.pattern
    a2, _, c2, d2 = first.pattern
    outer, inner = a2 // a1, d1 // d2
    # The interface has index (a1, outer, rank, inner, d2): the left factor's (a1; c1 = outer, rank; d1 = inner, d2)
    # and the right factor's (a2 = a1, outer; b2 = rank, inner; d2).
    left = full_weight(second, tensors).reshape(a1, b1, outer, rank, inner, d2)
    right = full_weight(first, tensors).reshape(a1, outer, rank, inner, c2, d2)
    wide = torch.promote_types(left.dtype, right.dtype)  # constants are real
    left, right = left.to(wide), right.to(wide)
    # [a1, d2, outer, inner] x (b1 x rank) @ (rank x c2)
    product = left.permute(0, 5, 2, 4, 1, 3) @ right.permute(0, 5, 1, 3, 2, 4)
    # -> (a1, b1, inner, outer, c2, d2)
    return product.permute(0, 4, 3, 2, 5, 1).reshape(merged_pattern(first, second))


def full_weight(stage: Contraction, tensors: Tensors) -> Tensor:
    """The stage's weight with shape (a, b, c, d), shared axes expanded."""
    weight = tensors[stage.weight].reshape(stage.stored_shape)
    if stage.transposed:
        weight = weight.transpose(1, 2)
    return weight.expand(stage.pattern)


@dataclass(frozen=True)
class Writing:
    """What :func:`fuse` puts together ahead of time: it depends on who runs the program.

    Args:
        growth: a run of contractions is merged while the multiplications of the merged one are at most ``growth``
            times those of the run; with 1 none is added.
        sparse_from: sparse stages that hold at least this share of their matrix are written out as a dense one.
        interpolations: whether these are written out.
        block_worth: by how much a multiply-add of a dense block is faster than one of a window; windows are merged into
            blocks where that pays. None writes windowed stages out: as one dense matrix, or as two factors with zeros
            outside of the windows, whichever is smaller.
        block_price: the multiply-adds of windows that take as long as a block does beside its own.
    """

    growth: float
    sparse_from: float
    interpolations: bool
    block_worth: float | None = None
    block_price: float = 0.0


FOR_REFERENCE = Writing(growth=2.0, sparse_from=MATERIALISED_DENSITY, interpolations=True)
"""Few fat stages run faster than many thin ones: four stages of a butterfly become one of radix 16. Interpolations and
dense enough sparse stages run as a dense product in any case."""

FOR_NATIVE = Writing(growth=1.0, sparse_from=0.4, interpolations=False, block_worth=1.25, block_price=300)
"""Stages of a chain run one after the other in the cache, so nothing is gained by merging them. The products of a
sparse stage run at a bit less than half of the speed of dense ones (float32, large batches, AVX-512)."""


FOR_FEW_ROWS = Writing(growth=1.0, sparse_from=0.09, interpolations=True, block_worth=3.0, block_price=2000)
"""With a row or two a product takes as long as reading its weights: a dense matrix is read faster than places are, and
than the pieces that windows are."""


def fuse(program: Program, tensors: Tensors, writing: Writing = FOR_REFERENCE) -> tuple[Program, dict[str, Tensor]]:
    """An equal program of plain stages with adjacent contractions (and diagonals) merged, and its tensors.

    Args:
        program: what is to run.
        tensors: its tensors by name.
        writing: what is put together ahead of time.

    Returns:
        The program and the tensors that it reads, all others dropped. Exact up to rounding.
    """
    made: dict[str, Tensor] = {}
    if any(t.is_floating_point() or t.is_complex() for t in tensors.values()):  # else nothing says in which precision
        program, tensors = plain(program, tensors)
    result = _fuse(simplify(program), tensors, writing, made)
    names = {name for stage in stages(result) for name in (*stage.weights, *stage.indices)}
    return result, {name: (made[name] if name in made else tensors[name]) for name in sorted(names)}


def _fuse(program: Program, tensors: Tensors, writing: Writing, made: dict[str, Tensor]) -> Program:
    if isinstance(program, Interpolation) and writing.interpolations:
        matrix = interpolation_matrix(program, tensors)
        return _dense(program, matrix.T if program.transposed else matrix, tensors, made)
    if isinstance(program, Sparse) and program.capacity > writing.sparse_from * program.height * program.width:
        return _dense(program, sparse_matrix(program, tensors), tensors, made)
    if isinstance(program, Windowed):
        return _windows(program, tensors, writing, made)
    if isinstance(program, Convolution) and not program.transform:
        return _dense(program, convolution_matrix(program, tensors[program.weight]), tensors, made)
    if isinstance(program, Generated):
        return _generated(program, tensors, made)
    if isinstance(program, Stage):
        return program
    if isinstance(program, Sum):
        return Sum(tuple(_fuse(part, tensors, writing, made) for part in program.parts))
    done: list[Program] = []
    work: list[int] = []  # multiplications of the original run behind each entry of done
    written_out = False
    for given in program.steps:
        step = _fuse(given, tensors, writing, made)
        written_out |= isinstance(given, Generated) and isinstance(step, Contraction)
        amount = step.multiplications if isinstance(step, Stage) else 0
        while done:
            joined = _join(done[-1], step, {**tensors, **made}, writing.growth, work[-1] + amount, made)
            if joined is None:
                break
            step, amount = joined, amount + work.pop()
            done.pop()
        done.append(step)
        work.append(amount)
    if len(done) == 1:
        return done[0]
    fused = Chain(tuple(done))
    if written_out and sum(s.multiplications for s in stages(fused)) > fused.out_features * fused.in_features:
        return _whole(fused, tensors, made)
    return fused


def _whole(program: Program, tensors: Tensors, made: dict[str, Tensor]) -> Contraction:
    """The dense matrix of a program: for those with a written out stage that is larger than it."""
    known = {**tensors, **made}
    like = next(known[name] for stage in stages(program) for name in stage.weights)
    unit = torch.eye(program.in_features, dtype=like.dtype, device=like.device)
    rows = [apply(program, known, part) for part in unit.split(_ROWS_AT_ONCE)]
    return _dense(program, torch.cat(rows).T, tensors, made)


def _windows(stage: Windowed, tensors: Tensors, writing: Writing, made: dict[str, Tensor]) -> Program:
    if writing.block_worth is not None:
        name = _new_name(tensors, made)
        program, found = merge_windows(stage, tensors, name, writing.block_worth, writing.block_price)
        made.update(found)
        return program
    left, right = window_matrices(stage, tensors)
    if stage.transposed:
        left, right = right.T, left.T
    if stage.terms * (stage.height + stage.width) >= stage.height * stage.width:
        return _dense(stage, left @ right, tensors, made)
    first = _factor(right, tensors, made)
    return Chain((first, _factor(left, tensors, made)))


def _generated(stage: Generated, tensors: Tensors, made: dict[str, Tensor]) -> Program:
    """The fast form of the matrix where the stage has one that is stable for these tensors, else the matrix itself."""
    given = [tensors[name] for name in (*(name for name, _ in stage.tensors), *stage.fixed)]
    found = None if stage.fast is None else stage.fast(*given, *stage.arguments)
    if found is None:
        matrix = generated_matrix(stage, tensors).to(given[0].dtype)
        return _dense(stage, matrix.T if stage.transposed else matrix, tensors, made)
    program, own = found
    names = {}
    for name, tensor in own.items():
        names[name] = _new_name(tensors, made)
        made[names[name]] = tensor.contiguous()
    program = rename(program, names.__getitem__)
    return simplify(transpose(program) if stage.transposed else program)


def _factor(matrix: Tensor, tensors: Tensors, made: dict[str, Tensor]) -> Contraction:
    name = _new_name(tensors, made)
    made[name] = matrix.contiguous()
    return Contraction(name, 1, matrix.shape[0], matrix.shape[1], 1)


def _dense(stage: Program, matrix: Tensor, tensors: Tensors, made: dict[str, Tensor]) -> Contraction:
    name = _new_name(tensors, made)
    made[name] = matrix.contiguous()
    return Contraction(name, 1, stage.out_features, stage.in_features, 1)


def _new_name(tensors: Tensors, made: Tensors) -> str:
    name = f"fused{len(made)}"
    while name in tensors:
        name += "_"
    return name


def _join(
    first: Program, second: Program, tensors: Tensors, growth: float, run: int, made: dict[str, Tensor]
) -> Contraction | None:
    if isinstance(first, Contraction) and isinstance(second, Contraction):
        if chainable(first, second) is None:
            return None
        a, b, c, d = merged_pattern(first, second)
        if a * b * c * d > growth * run:
            return None
        weight = merge(first, second, tensors)
    elif isinstance(first, Diagonal) and isinstance(second, Contraction) and not first.spectrum:
        a, b, c, d = second.pattern
        weight = full_weight(second, tensors) * tensors[first.weight].reshape(a, 1, c, d)
    elif isinstance(first, Contraction) and isinstance(second, Diagonal) and not second.spectrum:
        a, b, c, d = first.pattern
        weight = full_weight(first, tensors) * tensors[second.weight].reshape(a, b, 1, d)
    else:
        return None
    name = _new_name(tensors, made)
    made[name] = weight.contiguous()
    return Contraction(name, a, b, c, d)

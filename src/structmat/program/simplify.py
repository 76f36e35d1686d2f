"""Exact rewriting of programs that leaves the tensors alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import prod
from operator import mul

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.fixed import Cosine, Hadamard, Reorder
from structmat.program.stage import Stage
from structmat.program.stages import Complex, Crop, Fourier, Pad, Permute, Real, Shuffle


def simplify(program: Program) -> Program:
    """An equal program with fewer stages: nested chains and sums flattened, neighbours that cancel or merge removed.

    Rules: a permutation next to its inverse, two shuffles (one for both where their axes have common pieces), a Fourier
    transform next to its inverse, ``Pad`` after ``Pad``, ``Crop`` after ``Crop``, ``Crop`` after ``Pad``, a real part
    taken right after values became complex, and every stage that is the identity. Idempotent; never adds work.
    """
    if isinstance(program, Stage):
        return program
    if isinstance(program, Sum):
        parts: list[Program] = []
        for part in map(simplify, program.parts):
            parts.extend(part.parts if isinstance(part, Sum) else [part])
        return Sum(tuple(parts)) if len(parts) > 1 else parts[0]
    done: list[Program] = []
    pending: list[Program] = [*reversed(program.steps)]
    while pending:
        step = pending.pop()
        if isinstance(step, Chain):
            pending.extend(reversed(step.steps))
            continue
        step = simplify(step)
        if isinstance(step, Chain):
            pending.extend(reversed(step.steps))
            continue
        if _is_identity(step):
            continue
        merged = _merge(done[-1], step) if done else None
        if merged is None:
            done.append(step)
        else:  # what came of it may meet its new neighbour
            done.pop()
            pending.extend(reversed(merged))
    if not done:
        return Crop(program.in_features, program.out_features)
    return Chain(tuple(done)) if len(done) > 1 else done[0]


def _is_identity(step: Program) -> bool:
    match step:
        case Pad(size=size, padded=other) | Crop(size=size, kept=other):
            return size == other
        case Hadamard(size=size) | Cosine(size=size):
            return size == 1
        case Shuffle(axes=axes, sizes=sizes):
            moved = [axis for axis in axes if sizes[axis] != 1]
            return moved == sorted(moved)
        case _:
            return False


def _merge(first: Program, second: Program) -> tuple[Program, ...] | None:
    """What may stand for ``first`` followed by ``second``; None if nothing shorter is known."""
    match first, second:
        case Pad(size=size, before=i), Pad(padded=padded, before=j):
            return (Pad(size, padded, i + j),)
        case Crop(size=size, before=i), Crop(kept=kept, before=j):
            return (Crop(size, kept, i + j),)
        case Pad(size=size, before=0), Crop(kept=kept, before=0):
            return (Pad(size, kept),) if kept >= size else (Crop(size, kept),)
        case Permute(index=i, inverse=p), Permute(index=j, inverse=q) if i == j and p != q:
            return ()
        case Fourier(inverse=p), Fourier(inverse=q) if p != q:
            return ()
        case Complex(), Real():
            return ()
        case Cosine(inverse=p), Cosine(inverse=q) if p != q:
            return ()
        case Reorder(order=i, inverse=p), Reorder(order=j, inverse=q) if i == j and p != q:
            return ()
        case Shuffle(), Shuffle():
            return _merge_shuffles(first, second)
        case _:
            return None


def _merge_shuffles(first: Shuffle, second: Shuffle) -> tuple[Program, ...] | None:
    """One shuffle for two, if the axes between them can be cut into the same pieces."""
    between = tuple(first.sizes[axis] for axis in first.axes)
    cuts = sorted({*accumulate(between, mul), *accumulate(second.sizes, mul)} - {1})
    if any(high % low for low, high in pairwise(cuts)):
        return None
    pieces = tuple(high // low for low, high in zip([1, *cuts], cuts, strict=False))
    # Every product of sizes of either shuffle is a cut, so that both are made of whole pieces.
    order, groups = _cut(second.sizes, pieces), _cut(between, pieces)
    after = [piece for axis in second.axes for piece in order[axis]]
    # The pieces in the order in which the first shuffle reads them: those of its axis 0 first, and so on.
    reads = [piece for axis in range(len(first.sizes)) for piece in groups[first.axes.index(axis)]]
    axes = tuple(reads.index(piece) for piece in after)
    return _joined(tuple(pieces[piece] for piece in reads), axes)


def _cut(sizes: tuple[int, ...], pieces: tuple[int, ...]) -> list[list[int]]:
    """Which of the pieces, in order, each axis is made of."""
    groups: list[list[int]] = []
    used = 0
    for size in sizes:
        group, held = [], 1
        while held < size:
            held *= pieces[used]
            group.append(used)
            used += 1
        groups.append(group)
    return groups


def _joined(sizes: tuple[int, ...], axes: tuple[int, ...]) -> tuple[Program, ...]:
    """The same shuffle with axes that stay neighbours as one."""
    runs: list[list[int]] = []
    for axis in axes:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    order = sorted(range(len(runs)), key=lambda run: runs[run][0])
    joined = tuple(prod(sizes[axis] for axis in runs[run]) for run in order)
    if not joined:
        return ()
    return (Shuffle(joined, tuple(order.index(run) for run in range(len(runs)))),)

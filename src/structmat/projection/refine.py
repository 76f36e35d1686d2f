"""Weighted refinement of any fit: exact alternating least squares over the tensors of a program.

Where the dense matrix is linear in each tensor separately, lowering ``||B^(1/2) (W - S) C^(1/2)||`` over one tensor,
all others fixed, is linear least squares. Each is solved by conjugate gradients on its normal equations from the
current value, so no step increases the error, and nothing but products with the program is needed. Contractions are
preconditioned by the blocks of their normal equations that belong to one group, a Kronecker product of two small Gram
matrices, which alone solves the problem where the groups do not interact (both factors of a low rank matrix, for one).
Source: Hestenes and Stiefel 1952 for conjugate gradients; Kolda and Bader 2009 for alternating least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import (
    Call,
    Chain,
    Complex,
    Contraction,
    Derived,
    Diagonal,
    Generated,
    Program,
    Real,
    Stage,
    Sum,
    apply,
    simplify,
    stages,
    transpose,
)
from structmat.projection.target import Target

STEPS = 2
"""Conjugate gradient steps for one tensor that is preconditioned: the next visit goes on where this one ends."""

_PLAIN_STEPS = 8
"""Conjugate gradient steps for one tensor without a preconditioner."""

_RESIDUAL = 1e-4
"""A tensor's problem counts as solved when the preconditioned gradient has fallen by this factor."""

_PROGRESS = 2e-3
"""The descent ends when a sweep lowers the squared error by less than this share."""

_DAMPING = 1e-10
"""Share of its mean eigenvalue that is added to a Gram matrix before it is inverted."""


def refine(program: Program, tensors: Mapping[str, Tensor], target: Target, sweeps: int) -> dict[str, Tensor]:
    """Lower the error of a member by sweeps of alternating least squares; never increases it.

    Args:
        program: of the target's native shape, as :meth:`Structure.program` gives it. Its matrix is linear in each
            learned tensor; one that a path reads twice, or through a function of it, is left as it is.
        tensors: the start, of the target's dtype.
        target: what to approximate; rows and columns of padding are free.
        sweeps: at most so many passes over the tensors; the descent ends earlier when it no longer progresses.

    Returns:
        All tensors by name. Cost: a step multiplies the program with ``in`` vectors, forward and backward.
    """
    current = {name: tensor.detach() for name, tensor in tensors.items()}
    if sweeps == 0:
        return current
    problem = _Problem.of(target)
    program = simplify(program)
    names = [name for name in _learned(program) if _is_linear(program, name)]
    rest = problem.rest(program, current)
    error = _inner(rest, rest)
    for _ in range(sweeps):
        reached = dict(current)
        for name in names:
            reached[name], rest = _update(program, name, reached, problem, rest)
        rest = problem.rest(program, reached)  # anew, so that rounding does not add up
        before, error = error, _inner(rest, rest)
        if not error < before:
            break
        current = reached
        if before - error <= _PROGRESS * before:
            break
    return current


def rescale(program: Program, tensors: Mapping[str, Tensor], name: str, target: Target) -> dict[str, Tensor]:
    """The member times the scalar that fits best, put into one tensor: never worse than before, nor than zero."""
    problem = _Problem.of(target)
    outcome = problem.weigh(apply(program, tensors, problem.inputs))
    size = _inner(outcome, outcome)
    scale = _inner(outcome, problem.goal) / size if size > 0 else 1.0
    return {**tensors, name: tensors[name] * scale}


@dataclass(frozen=True)
class _Problem:
    """Approximate ``goal`` (vectors, rows): the rows of ``inputs`` (vectors, native in) are what the member multiplies,
    and ``output_root`` (rows, rows), where there is one, weighs the first rows of the outcome."""

    inputs: Tensor
    goal: Tensor
    output_root: Tensor | None

    @classmethod
    def of(cls, target: Target) -> _Problem:
        rows, columns = target.shape
        weight = target.weight[:rows, :columns]
        root = torch.eye(columns, dtype=weight.dtype) if target.root is None else target.root[:columns, :columns]
        inputs = torch.nn.functional.pad(root.T, (0, target.native[1] - columns))
        output_root = None if target.output_root is None else target.output_root[:rows, :rows]
        goal = (weight @ root).T
        return cls(inputs, goal if output_root is None else goal @ output_root.T, output_root)

    def weigh(self, outcome: Tensor) -> Tensor:
        """What is compared with the goal, of what the program makes of the inputs."""
        kept = outcome[:, : self.goal.shape[1]]
        return kept if self.output_root is None else kept @ self.output_root.T

    def adjoint(self, compared: Tensor, size: int) -> Tensor:
        """The adjoint of :meth:`weigh`, for outcomes of ``size`` features."""
        weighed = compared if self.output_root is None else compared @ self.output_root.conj()
        return torch.nn.functional.pad(weighed, (0, size - weighed.shape[1]))

    def rest(self, program: Program, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.goal - self.weigh(apply(program, tensors, self.inputs))


def _update(
    program: Program, name: str, tensors: Mapping[str, Tensor], problem: _Problem, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """A better value of one tensor and the residual it leaves: conjugate gradients for ``min ||goal - S||``."""
    before, reader, after = _around(_paths(program, name), name)
    back = None if after is None else transpose(after)
    entering = problem.inputs if before is None else apply(before, tensors, problem.inputs)
    value = tensors[name]
    leaf = value.clone().requires_grad_()
    with torch.enable_grad():
        read = apply(reader, {**tensors, name: leaf}, entering)

    def forward(trial: Tensor) -> Tensor:
        outcome = apply(reader, {**tensors, name: trial}, entering)
        return problem.weigh(outcome if after is None else apply(after, tensors, outcome))

    def adjoint(compared: Tensor) -> Tensor:
        outcome = problem.adjoint(compared, program.out_features)
        if back is not None:  # the transpose is not conjugated, the adjoint is
            outcome = apply(back, tensors, outcome.conj()).conj()
        if not read.is_complex():
            outcome = outcome.real if outcome.is_complex() else outcome
        return torch.autograd.grad(read, leaf, outcome.to(read.dtype), retain_graph=True)[0]

    inverse = _preconditioner(reader, entering, after, tensors, problem)
    steps, precondition = (STEPS, inverse) if inverse is not None else (_PLAIN_STEPS, _identity)
    gradient = adjoint(residual)
    direction = solved = precondition(gradient)
    size = first = _inner(gradient, solved)
    for _ in range(steps):
        if not size > first * _RESIDUAL**2:
            break
        moved = forward(direction)
        energy = _inner(moved, moved)
        if not energy > 0:
            break
        step = size / energy
        value = value + step * direction
        residual = residual - step * moved
        gradient = adjoint(residual)
        solved = precondition(gradient)
        size, last = _inner(gradient, solved), size
        direction = solved + (size / last) * direction
    return value, residual


def _inner(x: Tensor, y: Tensor) -> float:
    return float((x.conj() * y).sum().real)


# ------------------------------------------------------------------------------------------- reading the program


def _learned(program: Program) -> list[str]:
    return list(dict.fromkeys(name for stage in stages(program) for name in stage.weights))


def _reads(program: Program, name: str) -> bool:
    return any(name in stage.weights for stage in stages(program))


def _is_linear(program: Program, name: str) -> bool:
    """Whether every path reads the tensor at most once, and linearly."""
    if isinstance(program, Stage):
        if isinstance(program, Generated):
            return name not in program.weights or name in program.linear
        return name not in program.weights or not isinstance(program, Call | Derived)
    if isinstance(program, Sum):
        return all(_is_linear(part, name) for part in program.parts)
    return sum(_reads(step, name) for step in program.steps) <= 1 and all(_is_linear(s, name) for s in program.steps)


def _paths(program: Program, name: str) -> Program:
    """The part of a program that depends on a tensor, so that its matrix is linear in it and not only affine."""
    if isinstance(program, Sum):
        return simplify(Sum(tuple(_paths(part, name) for part in program.parts if _reads(part, name))))
    if isinstance(program, Chain):
        return simplify(Chain(tuple(_paths(s, name) if _reads(s, name) else s for s in program.steps)))
    return program


def _around(program: Program, name: str) -> tuple[Program | None, Program, Program | None]:
    """What comes before the step that reads a tensor, that step, and what comes after."""
    if not isinstance(program, Chain):
        return None, program, None
    place = next(i for i, step in enumerate(program.steps) if _reads(step, name))
    before, after = program.steps[:place], program.steps[place + 1 :]
    return Chain(before) if before else None, program.steps[place], Chain(after) if after else None


# ----------------------------------------------------------------------------------------------- preconditioning


def _preconditioner(
    reader: Program, entering: Tensor, after: Program | None, tensors: Mapping[str, Tensor], problem: _Problem
) -> Callable[[Tensor], Tensor] | None:
    """An approximate inverse of the normal equations, positive definite; None for stages without one."""
    if not isinstance(reader, Contraction | Diagonal) or (isinstance(reader, Diagonal) and reader.spectrum):
        return None
    if after is not None and any(isinstance(stage, Real | Complex) for stage in stages(after)):
        return None
    stage = Contraction(reader.weight, reader.size, 1, 1, 1) if isinstance(reader, Diagonal) else reader
    a, b, c, d = stage.pattern
    leaving = _rows_of(after, stage.out_features, tensors, problem)
    inputs = entering.reshape(-1, a, c, d).permute(1, 3, 2, 0)  # (a, d, c, vectors)
    outputs = leaving.reshape(-1, a, b, d).permute(1, 3, 2, 0)  # (a, d, b, rows)
    # gradient[b, c] = sum of conj(leaving[b]) R conj(entering[c]): the Gram matrices below, per group
    right, left = inputs @ inputs.mH, (outputs @ outputs.mH).conj()
    shared = [axis for axis, is_shared in ((0, stage.shared_a), (1, stage.shared_d)) if is_shared]
    for axis in shared:
        right, left = right.sum(axis, keepdim=True), left.sum(axis, keepdim=True)
    left_inverse, right_inverse = _inverse(left), _inverse(right)

    def apply_inverse(gradient: Tensor) -> Tensor:
        weight = gradient.reshape(stage.stored_shape)
        weight = weight.transpose(1, 2) if stage.transposed else weight
        solved = (left_inverse @ weight.permute(0, 3, 1, 2) @ right_inverse).permute(0, 2, 3, 1)
        solved = solved.transpose(1, 2) if stage.transposed else solved
        return solved.reshape(gradient.shape)

    return apply_inverse


def _identity(gradient: Tensor) -> Tensor:
    return gradient


def _rows_of(after: Program | None, size: int, tensors: Mapping[str, Tensor], problem: _Problem) -> Tensor:
    """The matrix (rows, size) by which what leaves the stage enters the comparison."""
    rows = problem.goal.shape[1]
    weights = torch.eye(rows, dtype=problem.goal.dtype) if problem.output_root is None else problem.output_root
    if after is None:
        return torch.nn.functional.pad(weights, (0, size - rows))
    padded = torch.nn.functional.pad(weights, (0, after.out_features - rows))
    return apply(transpose(after), tensors, padded)


def _inverse(gram: Tensor) -> Tensor:
    size = gram.shape[-1]
    mean = torch.diagonal(gram, dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    floor = _DAMPING * mean.max().clamp(min=torch.finfo(mean.dtype).tiny)
    damping = torch.eye(size, dtype=gram.dtype) * (_DAMPING * mean + floor)
    inverse: Tensor = torch.linalg.inv(gram + damping)
    return inverse

"""Transposition of programs: reverse every edge."""

from __future__ import annotations

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.stage import Stage


def transpose(program: Program) -> Program:
    """The program of the transposed matrix, reading the same tensors.

    Law: ``transpose(transpose(p)) == p``. Multiplications are equal (the transposition principle; Rudra's survey).
    """
    if isinstance(program, Stage):
        return program.transpose()
    if isinstance(program, Chain):
        return Chain(tuple(transpose(step) for step in reversed(program.steps)))
    return Sum(tuple(transpose(part) for part in program.parts))

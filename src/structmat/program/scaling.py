"""Which tensors to multiply so that a program's matrix is multiplied by a number."""

from __future__ import annotations

from collections import Counter

from structmat.program.combinators import Chain, Program, Sum, stages
from structmat.program.pairs import Pairs
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Diagonal, Sparse, Windowed
from structmat.program.toeplitz import Convolution
from structmat.program.written_out import Generated


def scaling_cut(program: Program) -> frozenset[str] | None:
    """Tensors that every path through the program crosses exactly once, or None if no such set is found.

    Multiplying all of them by a number multiplies the matrix by it. A ``Call`` may depend on its tensors in any way,
    so it offers none.
    """
    uses = Counter(name for stage in stages(program) for name in stage.weights)
    cut = _cut(program, uses)
    return None if cut is None else frozenset(cut)


def _cut(program: Program, uses: Counter[str]) -> Counter[str] | None:
    if isinstance(program, Stage):
        name = _linear_in(program)
        return None if name is None or uses[name] != 1 else Counter([name])
    if isinstance(program, Chain):
        # The last stage first: scaling there leaves the values in between as they are.
        return next((cut for cut in (_cut(step, uses) for step in reversed(program.steps)) if cut is not None), None)
    assert isinstance(program, Sum)
    total: Counter[str] = Counter()
    for part in program.parts:
        cut = _cut(part, uses)
        if cut is None:
            return None
        total += cut
    return total


def _linear_in(stage: Stage) -> str | None:
    match stage:
        case Pairs(stage=inner):
            return _linear_in(inner)
        case Contraction(weight=name) | Diagonal(weight=name) | Convolution(weight=name):
            return name
        case Sparse(values=name) | Windowed(left=name):
            return name
        case Generated(linear=(name, *_)):
            return name
        case _:
            return None

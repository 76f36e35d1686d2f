"""What a program costs: the plan that runs counts its own work."""

from __future__ import annotations

from dataclasses import dataclass

from structmat.program.combinators import Chain, Program, Sum, tensor_sizes
from structmat.program.stage import Stage, binary_depth
from structmat.program.stages import Complex, Diagonal, Fourier, Real
from structmat.program.toeplitz import Convolution


@dataclass(frozen=True)
class Cost:
    """Operations for one vector, in real arithmetic.

    A complex product counts 4 multiplications and 2 additions, a complex sum 2 additions. ``macs`` is the number of
    multiplications: each comes with at most one addition. ``depth`` counts levels of gates ``alpha * g + beta * h``.
    """

    multiplications: int
    additions: int
    depth: int
    parameters: int

    @property
    def flops(self) -> int:
        """Multiplications plus additions."""
        return self.multiplications + self.additions

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.multiplications


def cost(program: Program, *, complex_weights: bool = False) -> Cost:
    """Exact operation, depth and parameter counts of one product with a vector.

    Args:
        program: what runs.
        complex_weights: the learned tensors, and so the values that pass, are complex. Each complex weight then counts
            as two parameters.
    """
    multiplications, additions, depth, _ = _walk(program, complex_weights, complex_weights)
    parameters = sum(tensor_sizes(program).values()) * (2 if complex_weights else 1)
    return Cost(multiplications, additions, depth, parameters)


def _walk(program: Program, values: bool, weights: bool) -> tuple[int, int, int, bool]:
    """(multiplications, additions, depth, whether the outcome is complex); ``values``: what comes in is complex."""
    if isinstance(program, Chain):
        multiplications = additions = depth = 0
        for step in program.steps:
            m, s, d, values = _walk(step, values, weights)
            multiplications, additions, depth = multiplications + m, additions + s, depth + d
        return multiplications, additions, depth, values
    if isinstance(program, Sum):
        outcomes = [_walk(part, values, weights) for part in program.parts]
        is_complex = any(o[3] for o in outcomes)
        joins = (len(program.parts) - 1) * program.out_features * (2 if is_complex else 1)
        deepest = max(o[2] for o in outcomes) + (binary_depth(len(outcomes)) if len(outcomes) > 1 else 0)
        return sum(o[0] for o in outcomes), sum(o[1] for o in outcomes) + joins, deepest, is_complex
    return _stage(program, values, weights)


def _stage(stage: Stage, values: bool, weights: bool) -> tuple[int, int, int, bool]:
    m, s, d = stage.multiplications, stage.additions, stage.depth
    if isinstance(stage, Real):
        return m, s, d, False
    if isinstance(stage, Complex):
        return m, s, d, True
    if isinstance(stage, Fourier):  # its model counts real operations already
        return m, s, d, True
    if isinstance(stage, Convolution) and stage.transform:  # so does this one, for real values
        return (2 * m, 2 * s, d, True) if values or weights else (m, s, d, False)
    if isinstance(stage, Diagonal) and stage.spectrum:
        weights = True
    if not stage.weights:
        return m, s, d, values
    if values and weights:
        return 4 * m, 2 * m + 2 * s, d, True
    if values or weights:
        return 2 * m, 2 * s, d, True
    return m, s, d, False

"""Complex arithmetic on real numbers: a complex vector as its real parts followed by its imaginary parts.

A family whose layers are real but whose constants are complex runs on such pairs, so that its parameters are real, and
so that it trains, compiles and exports as every other. ``Pad(n, 2 n)`` takes a real vector as complex, ``Crop(2 m, m)``
takes the real part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Diagonal, Fourier


@dataclass(frozen=True)
class Pairs(Stage):
    """A stage with complex weights on pairs of reals: ``[[A, -B], [B, A]]`` for the matrix ``A + iB`` of the stage.

    The weight has the stage's own shape with a last axis of 2 (real and imaginary part). A stage without weights acts
    on both halves; a Fourier transform is the complex one. The transpose is the stage of the adjoint matrix.

    Args:
        stage: linear in its weight, of which there is at most one.
        conjugate: ``A - iB`` instead.
        unsigned: ``[[A, B], [B, A]]``: how sizes pass, for bounds and variances.
        is_real: the weights are real, in the stage's own shape, and act on both halves.
    """

    stage: Stage
    conjugate: bool = False
    unsigned: bool = False
    is_real: bool = False

    def __post_init__(self) -> None:
        assert len(self.stage.weights) <= 1, self

    @property
    def is_complex(self) -> bool:
        """Whether it multiplies by complex weights."""
        return bool(self.stage.weights) and not self.is_real

    @property
    def in_features(self) -> int:
        return 2 * self.stage.in_features

    @property
    def out_features(self) -> int:
        return 2 * self.stage.out_features

    def transpose(self) -> Pairs:
        return replace(self, stage=self.stage.transpose(), conjugate=not self.conjugate)

    @property
    def weights(self) -> Mapping[str, int]:
        return {name: size if self.is_real else 2 * size for name, size in self.stage.weights.items()}

    @property
    def indices(self) -> tuple[str, ...]:
        return self.stage.indices

    def rename(self, name: Callable[[str], str]) -> Pairs:
        return replace(self, stage=self.stage.rename(name))

    @property
    def multiplications(self) -> int:
        if isinstance(self.stage, Fourier):  # its model counts real operations already
            return self.stage.multiplications
        return (4 if self.is_complex else 2) * self.stage.multiplications

    @property
    def additions(self) -> int:
        if isinstance(self.stage, Fourier):
            return self.stage.additions
        if not self.is_complex:
            return 2 * self.stage.additions
        return 4 * self.stage.additions + 2 * self.stage.out_features

    @property
    def depth(self) -> int:
        return self.stage.depth + (1 if self.is_complex else 0)

    def __str__(self) -> str:
        return f"{self.stage} on pairs{', conjugate' if self.conjugate else ''}"


def on_pairs(program: Program) -> Program:
    """The program on pairs: every stage with complex weights, each a real tensor with a last axis of 2.

    Weights that are functions of tensors stay real (:func:`is_supported` allows probabilities alone).
    """
    if isinstance(program, Chain):
        return Chain(tuple(map(on_pairs, program.steps)))
    if isinstance(program, Sum):
        return Sum(tuple(map(on_pairs, program.parts)))
    return Pairs(program, is_real=_reads_probabilities(program))


def _reads_probabilities(stage: Stage) -> bool:
    from structmat.program.derived import Derived, Mixing  # derived weights know of pairs

    return isinstance(stage, Derived) and isinstance(stage.form, Mixing)


def real_tensors(program: Program) -> frozenset[str]:
    """The tensors that stay real when the program runs on pairs."""
    if isinstance(program, Chain | Sum):
        parts = program.steps if isinstance(program, Chain) else program.parts
        return frozenset(name for part in parts for name in real_tensors(part))
    return frozenset(program.weights) if _reads_probabilities(program) else frozenset()


def is_supported(program: Program) -> bool:
    """Whether every stage has a meaning on pairs."""
    if isinstance(program, Chain | Sum):
        return all(map(is_supported, program.steps if isinstance(program, Chain) else program.parts))
    if isinstance(program, Diagonal) and program.spectrum:
        return False
    return isinstance(program, Contraction | Diagonal) or not program.weights or _reads_probabilities(program)


def unsigned(program: Program) -> Program:
    """The program in which sizes pass instead of numbers: pairs add up whatever their signs."""
    if isinstance(program, Chain):
        return Chain(tuple(map(unsigned, program.steps)))
    if isinstance(program, Sum):
        return Sum(tuple(map(unsigned, program.parts)))
    return replace(program, unsigned=True) if isinstance(program, Pairs) else program

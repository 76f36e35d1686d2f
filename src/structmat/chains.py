"""What the families that are chains of contractions share: names, initialisation and program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Chain, Contraction, Program
from structmat.sizes import Pattern
from structmat.structure import DENSE_GAIN, ParameterSpec, Shape


@dataclass(frozen=True)
class OrthogonalBlocks:
    """A factor (a, b, c, d) whose b x c blocks are random with orthonormal columns or rows, times ``gain``.

    The blocks are Haar distributed. The mean square of the values that pass is multiplied by ``gain**2`` exactly where
    b >= c, and on average elsewhere. Products of such factors stay well conditioned, unlike those of Gaussian ones.
    """

    gain: float

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        a, b, c, d = shape
        wide = torch.complex128 if dtype.is_complex else torch.float64
        normal = torch.randn((a, d, max(b, c), min(b, c)), generator=generator, dtype=wide)
        frame, triangle = torch.linalg.qr(normal)
        phase = torch.sgn(torch.diagonal(triangle, dim1=-2, dim2=-1))  # makes the distribution that of Haar
        blocks = frame * phase[..., None, :]
        if b < c:
            blocks = blocks.transpose(-1, -2)
        scale = self.gain * max(1.0, b / c) ** 0.5
        drawn: Tensor = (blocks.permute(0, 2, 3, 1) * scale).contiguous()
        return drawn.to(dtype=dtype, device=device)


def chain_parameters(patterns: Sequence[Pattern]) -> Mapping[str, ParameterSpec]:
    """``factor0`` (applied first), ``factor1``, ...: orthogonal blocks, the gain of a dense layer spread evenly."""
    gain = DENSE_GAIN ** (0.5 / len(patterns))
    return {f"factor{i}": ParameterSpec(pattern, OrthogonalBlocks(gain)) for i, pattern in enumerate(patterns)}


def chain_program(patterns: Sequence[Pattern]) -> Program:
    """The contractions in order of application."""
    return Chain(tuple(Contraction(f"factor{i}", *pattern) for i, pattern in enumerate(patterns)))


def chain_shape(patterns: Sequence[Pattern]) -> Shape:
    """(out, in) of the product of a chain in order of application."""
    return _out(patterns[-1]), _in(patterns[0])


def chain_size(patterns: Sequence[Pattern]) -> int:
    """How many parameters the factors of a chain hold."""
    return sum(a * b * c * d for a, b, c, d in patterns)


def _out(pattern: Pattern) -> int:
    a, b, _, d = pattern
    return a * b * d


def _in(pattern: Pattern) -> int:
    a, _, c, d = pattern
    return a * c * d

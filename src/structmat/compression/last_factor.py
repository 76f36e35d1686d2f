"""The last factor of a structured matrix in closed form: linear least squares, its ridge chosen on data left out.

With every other tensor held, a matrix that ends in a learned contraction ``S = after A before + rest`` is linear in the
entries of ``A``, whatever comes before; so the ``A`` whose outputs are nearest to given ones solves a linear system for
each of its blocks, made of second moments alone. Of a low rank it is the left factor, of Monarch and BLAST the blocks
on the outputs' side, of a Tucker or bottleneck convolution the part on the outputs' side, of a dense layer all of it.
Source: the update of Wang et al., "SVD-LLM" (2025), for any family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structmat.matrix import StructuredMatrix
from structmat.program import Chain, Contraction, Program, Sum, stages
from structmat.program.dense import dense

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried, as shares of the mean eigenvalue of what the factor reads. They pull towards the factor as it is."""

SWEEPS = 12
"""At most so many over the parts of a sum, each of which has a last factor."""

GAIN = 1e-3
"""Sweeps end when the error falls by less than this share."""


@dataclass(frozen=True)
class Moments:
    """Of what a layer reads, ``x``, and what it should put out, ``y``: means over rows, in float64.

    Args:
        inputs: (in, in), ``E[x x^T]``.
        cross: (out, in), ``E[y x^T]``.
        outputs: ``E |y|^2``.
        mean_input, mean_output: (in,) and (out,).
        rows: how many there were.
    """

    inputs: Tensor
    cross: Tensor
    outputs: float
    mean_input: Tensor
    mean_output: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Of rows (rows, in) and (rows, out)."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        return cls(x.mT @ x / len(x), y.mT @ x / len(x), float(y.square().sum()) / len(x), x.mean(0), y.mean(0), len(x))

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both."""
        rows = self.rows + other.rows
        a, b = self.rows / rows, other.rows / rows
        return Moments(
            a * self.inputs + b * other.inputs,
            a * self.cross + b * other.cross,
            a * self.outputs + b * other.outputs,
            a * self.mean_input + b * other.mean_input,
            a * self.mean_output + b * other.mean_output,
            rows,
        )

    def centred(self) -> Moments:
        """Of the differences from the means: what is left to the matrix where there is a bias."""
        return replace(
            self,
            inputs=self.inputs - torch.outer(self.mean_input, self.mean_input),
            cross=self.cross - torch.outer(self.mean_output, self.mean_input),
            outputs=self.outputs - float(self.mean_output.square().sum()),
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """``E |y - W x - b|^2`` as a share of ``E |y|^2``."""
        found = self.outputs - 2 * float((weight * self.cross).sum()) + float((weight @ self.inputs * weight).sum())
        if bias is not None:
            found += float(bias @ (bias + 2 * (weight @ self.mean_input) - 2 * self.mean_output))
        return max(found, 0.0) / max(self.outputs, 1e-300)


@dataclass(frozen=True)
class LastFactor:
    """One part of a matrix: ``after @ contraction @ before``; None stands for the identity."""

    before: Program | None
    contraction: Contraction
    after: Program | None


def last_factors(program: Program) -> tuple[LastFactor, ...]:
    """The learned contractions that nothing learned follows, one for each part of a sum that ends in one.

    A part that ends in something else (a sparse stage, a window) has none; nor has one whose last tensor is also read
    elsewhere, in which the matrix is not linear.
    """
    read = Counter(name for stage in stages(program) for name in stage.weights)
    return tuple(f for f in _last(program, (), ()) if read[f.contraction.weight] == 1)


def _last(program: Program, before: tuple[Program, ...], after: tuple[Program, ...]) -> tuple[LastFactor, ...]:
    if isinstance(program, Sum):
        return tuple(found for part in program.parts for found in _last(part, before, after))
    if isinstance(program, Chain):
        for place in reversed(range(len(program.steps))):
            step = program.steps[place]
            if any(stage.weights for stage in stages(step)):
                return _last(step, before + program.steps[:place], program.steps[place + 1 :] + after)
        return ()
    if isinstance(program, Contraction):
        return (LastFactor(Chain(before) if before else None, program, Chain(after) if after else None),)
    return ()


@dataclass(frozen=True)
class Refit:
    """A matrix with other last factors, its bias, and errors on the rows that were left out (see
    :meth:`Moments.error`)."""

    matrix: StructuredMatrix
    bias: Tensor | None
    before: float
    after: float


def refit(matrix: StructuredMatrix, bias: Tensor | None, fit: Moments, judge: Moments) -> Refit | None:
    """The last factors, and the bias if there is one, that put out ``y`` for ``x`` as well as such ones can.

    Args:
        matrix: real, of any family; in the result its other tensors are as they are.
        bias: (out,), or None for none.
        fit: moments that the systems are made of.
        judge: moments that the ridge is chosen by. Where no choice makes the error on them smaller, nothing changes.

    Returns:
        The new matrix; None if no part of the matrix ends in a learned contraction, or it is complex.
    """
    factors = last_factors(matrix.program)
    if not factors or matrix.dtype.is_complex or matrix.is_transposed:
        return None
    wide = matrix.to(dtype=torch.float64, device=torch.device("cpu"))
    own = fit if bias is None else fit.centred()
    held = None if bias is None else bias.detach().cpu().double()
    before = judge.error(wide.to_dense(), held)
    best, best_bias, after = wide, held, before

    def offer(found: StructuredMatrix) -> None:
        nonlocal best, best_bias, after
        weight = found.to_dense()
        shift = None if bias is None else fit.mean_output - weight @ fit.mean_input
        error = judge.error(weight, shift)
        if error < after:
            best, best_bias, after = found, shift, error

    offer(wide)  # the bias alone
    for _ in range(SWEEPS if len(factors) > 1 else 1):
        start = after
        for factor in factors:
            name = factor.contraction.weight
            for solved in _solutions(best, factor, own):
                offer(StructuredMatrix(wide.structure, wide.shape, {**best.tensors, name: solved}, dtype=torch.float64))
        if after > (1 - GAIN) * start:
            break
    return Refit(best, best_bias, before, after)


def _solutions(matrix: StructuredMatrix, factor: LastFactor, moments: Moments) -> list[Tensor]:
    """The factor's tensor at every ridge; none where what follows the factor adds outputs up."""
    own, kind = matrix.tensors, factor.contraction
    before, after = _written(factor.before, own), _written(factor.after, own)
    part = dense(kind, own, torch.float64, torch.device("cpu"))
    inputs, cross = moments.inputs, moments.cross
    rest = matrix.to_dense() - _times(after, part if before is None else part @ before)
    cross = cross - rest @ inputs  # what is left for this part to put out
    if before is not None:
        inputs, cross = before @ inputs @ before.mT, cross @ before.mT
    if after is not None:
        picked = (after.mT @ after).diagonal()
        if not torch.equal(after.mT @ after, torch.diag(picked)) or bool(((picked != 0) & (picked != 1)).any()):
            return []
        cross = after.mT @ cross
    a, b, c, d = kind.pattern
    gram = inputs.reshape(a, c, d, a, c, d)
    gram = torch.stack([torch.stack([gram[i, :, j, i, :, j] for j in range(d)]) for i in range(a)])  # (a, d, c, c)
    wanted = cross.reshape(a, b, d, a, c, d)
    wanted = torch.stack([torch.stack([wanted[i, :, j, i, :, j] for j in range(d)]) for i in range(a)])  # (a, d, b, c)
    for axis, is_shared in ((0, kind.shared_a), (1, kind.shared_d)):
        if is_shared:
            gram, wanted = gram.sum(axis, keepdim=True), wanted.sum(axis, keepdim=True)
    stored = own[kind.weight].reshape(kind.stored_shape)
    held = (stored.transpose(1, 2) if kind.transposed else stored).permute(0, 3, 1, 2)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0.0)
    rotated = (wanted - held @ gram) @ vectors
    mean = values.mean(-1)[..., None, None]
    found = []
    for ridge in RIDGES:
        change = rotated / (values[..., None, :] + ridge * mean.clamp(min=1e-300)) @ vectors.mT
        new = (held + change).permute(0, 2, 3, 1)  # (a, b, c, d)
        if kind.transposed:
            new = new.transpose(1, 2)
        if bool(torch.isfinite(new).all()):
            found.append(new.reshape(own[kind.weight].shape).contiguous())
    return found


def _written(program: Program | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
    if program is None:
        return None
    return dense(program, tensors, torch.float64, torch.device("cpu"))


def _times(after: Tensor | None, part: Tensor) -> Tensor:
    return part if after is None else after @ part

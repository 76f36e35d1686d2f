"""The nearest matrix with few nonzero entries, in the plain norm or one that weighs inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.projection.supports import Correlation, Fact, alternating, correlation, largest
from structmat.projection.target import Target

_ROW_ENTRIES = 1 << 22
"""Entries of the small systems that are solved in one batch (32 MB in float64)."""

_RIDGE = 1e-10
"""Relative ridge of the row systems, towards the given weight: on inputs that never occur the weight is followed."""

_GRADIENT_STEPS = 3
"""Conjugate gradient steps each time that a support changes."""

_LAST_STEPS = 10
"""At most so many of them on the last support."""

_ITERATIONS = 2
"""Of the search for a support, in each round."""

_SOLVED = 1e-10
"""Enough of these: the squared gradient, in the norm of the preconditioner, has fallen by this factor."""


def entries(dense: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``values`` and ``places`` of the masked entries, row by row."""
    places = torch.nonzero(mask.reshape(-1))[:, 0]
    return {"values": dense.reshape(-1)[places], "places": places}


def sparsify(target: Target, nonzeros: int, rounds: int) -> tuple[Tensor, Tensor]:
    """A matrix with ``nonzeros`` entries near the target: its dense form and the mask of its support.

    Without moments the largest entries are kept, which is optimal. With a moment ``C`` of the inputs or ``B`` of the
    outputs the support is that of the largest ``|W_ij|^2 B_ii C_jj``, the cost of leaving out that entry alone. If
    ``rounds`` may be spent, :func:`structmat.projection.supports.alternating` looks for a better one in twice as many
    iterations. At the end the values are the least squares solution on the support, or with outputs weighed a few
    conjugate gradient steps away from it.
    """
    weight, norm = target.weight, Norm.of(target)
    if norm.is_plain:
        mask = largest(weight.abs(), nonzeros)
        return torch.where(mask, weight, torch.zeros_like(weight)), mask
    mask = largest(weight.abs().square() * norm.diagonal, nonzeros)
    dense = _descend(torch.where(mask, weight, torch.zeros_like(weight)), mask, weight, norm)
    if not rounds:
        return dense, mask
    error = target.squared(weight - dense)
    values, other = alternating(target, nonzeros, _ITERATIONS * rounds)
    values = _descend(values, other, weight, norm, _LAST_STEPS)
    if (reached := target.squared(weight - values)) < error:
        dense, mask, error = values, other, reached
    if target.output_moment is None and target.second_moment is not None:
        exact = least_squares_on(mask, weight, target.second_moment, weight @ target.second_moment)
        if target.squared(weight - exact) <= error:
            return exact, mask
    return dense, mask


def improve(target: Target, dense: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with as many entries and no larger error in a weighted norm: support and values change.

    The support of a hard-thresholded Jacobi step is proposed (iterative hard thresholding, Blumensath and Davies
    2009, with ``B_ii C_jj`` as preconditioner). For an entry outside the present support the score is the exact gain of
    adding it, for one inside the cost of dropping it. The proposal stands if the error falls after a few conjugate
    gradient steps on it; else these are spent on the present support.
    """
    weight, norm = target.weight, Norm.of(target)
    left = weight - dense
    pull = norm.image(left)
    error = float((pull * left.conj()).real.sum())
    step = dense + pull * norm.inverse
    proposed = largest(step.abs().square() * norm.diagonal, int(mask.sum()))
    if not bool((proposed == mask).all()):
        # Starting from the thresholded step itself or from the old values: the latter never overshoots.
        other = _descend(torch.where(proposed, dense, torch.zeros_like(dense)), proposed, weight, norm)
        if target.squared(weight - other) < error:
            return other, proposed
    return _descend(dense, mask, weight, norm), mask


@dataclass(frozen=True)
class Norm:
    """``||B^(1/2) D C^(1/2)||``: the moments of outputs and inputs, and the diagonal of ``B (x) C`` as a matrix."""

    outputs: Tensor | None
    inputs: Tensor | None
    diagonal: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, target: Target) -> Norm:
        """That of a target."""
        sizes = [
            torch.ones(size, dtype=torch.float64) if moment is None else moment.diagonal().real.clamp(min=0.0)
            for moment, size in zip((target.output_moment, target.second_moment), target.native, strict=True)
        ]
        diagonal = torch.outer(*sizes)
        inverse = torch.where(diagonal > 0, 1.0 / diagonal.clamp(min=1e-300), torch.zeros_like(diagonal))
        return cls(target.output_moment, target.second_moment, diagonal, inverse)

    @property
    def is_plain(self) -> bool:
        """Whether it is the Frobenius norm."""
        return self.outputs is None and self.inputs is None

    def image(self, difference: Tensor) -> Tensor:
        """``B D C``."""
        image = difference if self.inputs is None else difference @ self.inputs
        return image if self.outputs is None else self.outputs @ image


def _descend(dense: Tensor, mask: Tensor, weight: Tensor, norm: Norm, steps: int = _GRADIENT_STEPS) -> Tensor:
    """Conjugate gradient steps on the values of a support, preconditioned by the diagonal; monotone."""
    inverse = norm.inverse * mask
    residual = norm.image(weight - dense) * mask
    direction = residual * inverse
    size = first = float((residual.conj() * direction).real.sum())
    for _ in range(steps):
        image = norm.image(direction) * mask
        curvature = float((direction.conj() * image).real.sum())
        if curvature <= 0 or size <= _SOLVED * first:
            break
        dense = dense + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        scaled = residual * inverse
        before, size = size, float((residual.conj() * scaled).real.sum())
        direction = scaled + (size / before) * direction
    return dense


def least_squares_on(mask: Tensor, weight: Tensor, moment: Tensor, reached: Tensor) -> Tensor:
    """The matrix on a support that is nearest to ``weight`` in the norm of ``moment``; ``reached = weight @ moment``.

    Row i with support s solves ``v C[s, s] = (W C)[i, s]``. Rows are solved in batches of similar size. Cost: a
    Cholesky factorisation of the size of the support, for each row.
    """
    counts = mask.sum(1)
    order = torch.argsort(counts, descending=True, stable=True)
    columns = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)
    ridge = _RIDGE * float(moment.diagonal().real.max())
    result = torch.zeros_like(weight)
    done = 0
    while done < len(order):
        size = int(counts[order[done]])
        if size == 0:
            break
        rows = order[done : done + max(1, _ROW_ENTRIES // (size * size))]
        done += len(rows)
        index = columns[rows, :size]
        inside = torch.arange(size) < counts[rows, None]
        system = moment[index[:, :, None], index[:, None, :]] * (inside[:, :, None] & inside[:, None, :])
        known = weight[rows[:, None], index] * inside
        right = reached[rows[:, None], index] * inside
        values = _solve(system.mT, right, known, ridge, inside) * inside
        result[rows[:, None], index] = values
    return result


def _solve(system: Tensor, right: Tensor, known: Tensor, ridge: float, inside: Tensor) -> Tensor:
    """``(system + ridge) values = right + ridge * known`` for a batch; rows outside the support give zero."""
    if ridge == 0.0:
        return known
    for _ in range(6):
        shift = torch.where(inside, ridge, 1.0).to(system)
        factor, info = torch.linalg.cholesky_ex(system + torch.diag_embed(shift))
        if not bool(info.any()):
            solution: Tensor = torch.cholesky_solve((right + ridge * known)[..., None], factor)
            return solution[..., 0]
        ridge *= 10.0
    return known


def lower_bound(target: Target, nonzeros: int) -> float:
    """No matrix with so many nonzeros has a smaller error in the target's norm.

    With ``alpha`` the smallest eigenvalue of the correlation ``D^(-1/2) C D^(-1/2)``, ``D = diag(C)``, the squared
    error is at least ``alpha`` times that in the norm of ``D``, where the best support is known; likewise for outputs.
    """
    alpha = 1.0
    if (inputs := target.second_moment) is not None:
        alpha *= _smallest(inputs, target.input_fact)
    if (outputs := target.output_moment) is not None:
        alpha *= _smallest(outputs, target.output_fact)
    costs = (target.weight.abs().square() * Norm.of(target).diagonal).reshape(-1)
    left_out = costs.numel() - nonzeros
    tail = float(torch.topk(costs, left_out, largest=False, sorted=False).values.sum()) if left_out else 0.0
    return float((alpha * tail) ** 0.5)


def _smallest(moment: Tensor, fact: Fact[Correlation]) -> float:
    """The smallest eigenvalue of its correlation."""
    if not bool((moment.diagonal().real > 0).all()):
        return 0.0
    # Rounding may make the smallest eigenvalue of a singular matrix look positive.
    return max(0.0, float(correlation(moment, fact).values[0]) - 1e-13 * len(moment))

"""The nearest matrix with few nonzero entries, in the plain or the activation-weighted norm."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.projection.target import Target

_ROW_ENTRIES = 1 << 22
"""Entries of the small systems that are solved in one batch (32 MB in float64)."""

_RIDGE = 1e-10
"""Relative ridge of the row systems, towards the given weight: on inputs that never occur the weight is followed."""

_GRADIENT_STEPS = 3
"""Conjugate gradient steps each time that a support changes."""

_PATIENCE = 1e-6
"""A round that lowers the squared error by less than this share is the last."""


def largest(scores: Tensor, count: int) -> Tensor:
    """A boolean mask of the ``count`` largest entries."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.topk(scores.reshape(-1), count, sorted=False).indices] = True
    return mask.reshape(scores.shape)


def entries(dense: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``values`` and ``places`` of the masked entries, row by row."""
    places = torch.nonzero(mask.reshape(-1))[:, 0]
    return {"values": dense.reshape(-1)[places], "places": places}


def sparsify(target: Target, nonzeros: int, rounds: int) -> tuple[Tensor, Tensor]:
    """A matrix with ``nonzeros`` entries near the target: its dense form and the mask of its support.

    Without a second moment ``C`` the largest entries are kept, which is optimal. With one, the support starts with
    the largest ``|W_ij|^2 C_jj``, the cost of leaving out that entry alone. Each round is a monotone step of
    :func:`improve`; at the end the values are the exact least squares solution on the support. With 0 rounds the
    values are left approximate (a few conjugate gradient steps).
    """
    weight, moment = target.weight, target.second_moment
    if moment is None:
        mask = largest(weight.abs(), nonzeros)
        return torch.where(mask, weight, torch.zeros_like(weight)), mask
    mask = largest(weight.abs().square() * moment.diagonal().real.clamp(min=0.0), nonzeros)
    dense = _descend(torch.where(mask, weight, torch.zeros_like(weight)), mask, weight, moment)
    error = target.squared(weight - dense)
    for _ in range(rounds):
        dense, mask = improve(target, dense, mask)
        before, error = error, target.squared(weight - dense)
        if before - error <= _PATIENCE * error:
            break
    if rounds:
        exact = least_squares_on(mask, weight, moment, weight @ moment)
        if target.squared(weight - exact) <= error:
            dense = exact
    return dense, mask


def improve(target: Target, dense: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with as many entries and no larger error in a weighted norm: support and values change.

    The support of a hard-thresholded Jacobi step is proposed (iterative hard thresholding, Blumensath and Davies
    2009, with ``diag(C)`` as preconditioner). For an entry outside the present support the score is the exact gain of
    adding it, for one inside the cost of dropping it. The proposal stands if the error falls after a few conjugate
    gradient steps on it; else these are spent on the present support.
    """
    weight, moment = target.weight, target.second_moment
    assert moment is not None
    diagonal = moment.diagonal().real.clamp(min=0.0)
    left = weight - dense
    pull = left @ moment
    error = float((pull * left.conj()).real.sum())
    step = dense + torch.where(diagonal > 0, pull / diagonal.clamp(min=1e-300), torch.zeros_like(pull))
    proposed = largest(step.abs().square() * diagonal, int(mask.sum()))
    if not bool((proposed == mask).all()):
        # Starting from the thresholded step itself or from the old values: the latter never overshoots.
        other = _descend(torch.where(proposed, dense, torch.zeros_like(dense)), proposed, weight, moment)
        if target.squared(weight - other) < error:
            return other, proposed
    return _descend(dense, mask, weight, moment), mask


def _descend(dense: Tensor, mask: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    """Conjugate gradient steps on the values of a support, preconditioned by ``diag(C)``; monotone."""
    diagonal = moment.diagonal().real.clamp(min=0.0)
    inverse = torch.where(mask & (diagonal > 0), 1.0 / diagonal.clamp(min=1e-300), 0.0)
    residual = ((weight - dense) @ moment) * mask
    direction = residual * inverse
    size = float((residual.conj() * direction).real.sum())
    for _ in range(_GRADIENT_STEPS):
        image = (direction @ moment) * mask
        curvature = float((direction.conj() * image).real.sum())
        if curvature <= 0 or size <= 0:
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
    error is at least ``alpha`` times that in the norm of ``D``, where the best support is known.
    """
    moment = target.second_moment
    if moment is None:
        diagonal, alpha = torch.ones(target.native[1], dtype=torch.float64), 1.0
    else:
        diagonal = moment.diagonal().real.clamp(min=0.0)
        if not bool((diagonal > 0).all()):
            return 0.0
        alpha = target.input_fact("smallest correlation", lambda: _smallest_correlation(moment, diagonal))
    costs = (target.weight.abs().square() * diagonal).reshape(-1)
    left_out = costs.numel() - nonzeros
    tail = float(torch.topk(costs, left_out, largest=False, sorted=False).values.sum()) if left_out else 0.0
    return float((max(alpha, 0.0) * tail) ** 0.5)


def _smallest_correlation(moment: Tensor, diagonal: Tensor) -> float:
    scale = diagonal.rsqrt()
    # Rounding may make the smallest eigenvalue of a singular matrix look positive.
    return float(torch.linalg.eigvalsh(moment * scale * scale[:, None])[0]) - 1e-13 * len(diagonal)

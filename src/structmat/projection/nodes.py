"""Fits of matrices with nodes: Cauchy and Vandermonde matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Program
from structmat.program.generated import cauchy_kernel, cauchy_like, powers
from structmat.projection.displacement import low_rank_factors
from structmat.projection.found_operators import cauchy_angles
from structmat.projection.refine import rescale
from structmat.projection.target import Target


@dataclass(frozen=True)
class Spread:
    """Evenly spread numbers from ``low`` to ``high``; one alone lies in the middle. The same at each draw, so that a
    projection can start where a fresh matrix does."""

    low: float
    high: float

    def values(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        if count == 1:
            return torch.full((1,), (self.low + self.high) / 2, dtype=dtype)
        return torch.linspace(self.low, self.high, count, dtype=torch.float64).to(dtype)

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self.values(math.prod(shape)).reshape(shape).to(dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------------- Cauchy

_STEPS_A_SWEEP = 3


def fit_cauchy(program: Program, target: Target) -> dict[str, Tensor]:
    """``scale``, ``rows`` and ``columns`` of a Cauchy matrix near a target.

    The reciprocals ``1 / W`` of a member are ``(s[i] - t[j]) / scale``: least squares for such sums, weighted by
    ``|W|^4`` as their errors enter those of W. That, and the nodes of a fresh matrix, are starts of a descent by
    Levenberg-Marquardt steps in the Frobenius norm; the best scale is put on what comes out.
    """
    weight = target.weight
    m, n = weight.shape
    starts = [(torch.zeros(m, dtype=weight.dtype), torch.full((n,), 0.5, dtype=weight.dtype))]
    if bool((weight != 0).all()):
        s, t = _sums_of_reciprocals(weight)
        # The scale is free: chosen so that the nodes are about as far apart as those of a fresh matrix.
        spread = float((s[:, None] - t).abs().mean())
        unit = (m + n) / 3 / spread if spread > 0 else 1.0
        starts.append((unit * s - torch.arange(m), unit * t - torch.arange(n)))
    best: dict[str, Tensor] | None = None
    lowest = math.inf
    for rows, columns in starts:
        if not bool(torch.isfinite(cauchy_kernel(rows, columns)).all()):
            continue
        tensors = {"scale": torch.ones(1, dtype=weight.dtype), "rows": rows, "columns": columns}
        tensors = rescale(program, tensors, "scale", target)
        tensors = _descend_cauchy(weight, tensors, _STEPS_A_SWEEP * target.sweeps)
        tensors = rescale(program, tensors, "scale", target)
        error = target.error(tensors["scale"] * cauchy_kernel(tensors["rows"], tensors["columns"]))
        if error < lowest:
            best, lowest = tensors, error
    assert best is not None
    return best


def _sums_of_reciprocals(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` with ``s[i] - t[j]`` near ``1 / W[i, j]``, the mean of ``t`` being zero."""
    m, n = weight.shape
    largest = float(weight.abs().max())
    importance = (weight.abs() / largest) ** 4
    wanted = 1.0 / weight
    system = torch.zeros(m + n, m + n, dtype=weight.dtype)
    system[range(m), range(m)] = importance.sum(1).to(weight.dtype)
    system[range(m, m + n), range(m, m + n)] = importance.sum(0).to(weight.dtype)
    system[:m, m:] = -importance.to(weight.dtype)
    system[m:, :m] = -importance.T.to(weight.dtype)
    sides = torch.cat([(importance * wanted).sum(1), -(importance * wanted).sum(0)])
    found: Tensor = torch.linalg.lstsq(system, sides[:, None], driver="gelsd").solution[:, 0]
    return found[:m], found[m:]


def _descend_cauchy(weight: Tensor, tensors: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Levenberg-Marquardt for the nodes: the normal equations need row and column sums and one matrix of products."""
    m, n = weight.shape
    scale, rows, columns = tensors["scale"], tensors["rows"], tensors["columns"]
    damping = 1e-3
    kernel = cauchy_kernel(rows, columns)
    rest = weight - scale * kernel
    error = float(torch.linalg.norm(rest))
    for _ in range(steps):
        slope = -scale * kernel**2  # of the entries in s; in t the negative
        energy = slope.abs() ** 2
        system = torch.zeros(m + n, m + n, dtype=weight.dtype)
        system[:m, m:] = -energy.to(weight.dtype)
        system[m:, :m] = -energy.T.to(weight.dtype)
        own = torch.cat([energy.sum(1), energy.sum(0)])
        sides = slope.conj() * rest
        wanted = torch.cat([sides.sum(1), -sides.sum(0)])
        floor = 1e-12 * float(own.max()) + 1e-300
        system = system + torch.diag((own * (1 + damping) + floor).to(weight.dtype))
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) > 0:
            damping *= 10
            continue
        step = torch.cholesky_solve(wanted[:, None], factor)[:, 0]
        trial = cauchy_kernel(rows + step[:m], columns + step[m:])
        # The best scale for the new nodes.
        size = float((trial.abs() ** 2).sum())
        other = ((trial.conj() * weight).sum() / size).reshape(1) if math.isfinite(size) and size > 0 else scale
        left = weight - other * trial
        moved = float(torch.linalg.norm(left))
        if moved < error:
            rows, columns, scale, kernel, rest = rows + step[:m], columns + step[m:], other, trial, left
            damping = max(damping / 5, 1e-12)
            if error - moved <= 1e-15 * error:
                break
            error = moved
        else:
            damping *= 4
            if damping > 1e12:
                break
    return {"scale": scale, "rows": rows, "columns": columns}


def fit_cauchy_like(target: Target, rank: int) -> dict[str, Tensor]:
    """``left``, ``right``, ``rows`` and ``columns`` of a Cauchy-like matrix near a target: for the nodes of a fresh
    one, or for nodes that are found (:func:`structmat.projection.found_operators.cauchy_angles`), as those of generic
    members of small ranks are.

    With the nodes fixed, each row of W is linear in its own ``left[:, i]``, and each column in ``right[:, j]``: the
    start from the displacement is followed by exact least squares for all rows, in a weighted norm too, and in the
    Frobenius norm by sweeps over columns and rows. Never worse than zero.
    """
    weight = target.weight
    m, n = weight.shape
    rows, columns = torch.zeros(m, dtype=weight.dtype), torch.full((n,), 0.5, dtype=weight.dtype)
    kernel = cauchy_kernel(rows, columns)
    left, right = low_rank_factors(weight / kernel, rank)
    root = target.root
    left = _rows_of(weight, kernel, right, root)
    if root is None:
        for _ in range(target.sweeps):
            right = _rows_of(weight.T, kernel.T, left, None)
            left = _rows_of(weight, kernel, right, None)
    size_left, size_right = float(torch.linalg.norm(left)), float(torch.linalg.norm(right))
    if size_left > 0 and size_right > 0:
        balance = (size_right / size_left) ** 0.5
        left, right = left * balance, right / balance
    found = {"left": left, "right": right, "rows": rows, "columns": columns}
    error = target.error(cauchy_like(left, right, rows, columns))
    if error > target.norm():
        found["left"], error = torch.zeros_like(left), target.norm()
    for smaller in range(1, rank + 1):
        angles = cauchy_angles(weight, smaller)
        if angles is not None:
            other = _from_angles(weight, *angles, rank)
            return other if target.error(cauchy_like(**other)) < error else found
    return found


def _from_angles(weight: Tensor, p: Tensor, q: Tensor, rank: int) -> dict[str, Tensor]:
    """The member of which the nodes are tangents of angles, turned so that all are as far from infinity as can be."""
    sorted_angles = torch.cat([p, q]).remainder(math.pi).sort().values
    gaps = torch.cat([sorted_angles[1:], sorted_angles[:1] + math.pi]) - sorted_angles
    widest = int(gaps.argmax())
    turn = sorted_angles[widest] + gaps[widest] / 2 - math.pi / 2
    p, q = p - turn, q - turn
    g, h = low_rank_factors(torch.sin(p[:, None] - q) * weight, rank)
    # sin(p - q) = cos(p) cos(q) (tan(p) - tan(q)).
    places = torch.arange(max(weight.shape), dtype=weight.dtype)
    rows, columns = torch.tan(p) - places[: len(p)], torch.tan(q) - places[: len(q)]
    return {"left": g / torch.cos(p), "right": h / torch.cos(q), "rows": rows, "columns": columns}


def _rows_of(weight: Tensor, kernel: Tensor, right: Tensor, root: Tensor | None) -> Tensor:
    """The vectors (rank, m) with which ``(left[:, i] . right) * kernel[i]`` is nearest to each row."""
    systems = right[None] * kernel[:, None, :]  # (m, rank, n)
    if root is not None:
        systems, weight = systems @ root, weight @ root
    gram = systems @ systems.mH
    sides = (weight[:, None, :] @ systems.mH)[:, 0]
    # The pseudo-inverse where vectors are dependent: eigenvalues below rounding are none.
    inverse: Tensor = torch.linalg.pinv(gram, rtol=1e-14, hermitian=True)
    found = sides[:, None, :] @ inverse
    rest = sides[:, None, :] - found @ gram
    solution: Tensor = found + rest @ inverse
    return solution[:, 0].T.contiguous()


# -------------------------------------------------------------------------------------------------------- Vandermonde

_GRID = 401
_SECTIONS = 60


def fit_vandermonde(target: Target) -> dict[str, Tensor]:
    """``scale`` and ``nodes`` of the best geometric sequence for each row, with nodes of modulus at most 1.

    For a node d the best scale leaves ``|w|^2 - |w . v|^2 / |v|^2`` with ``v[j] = d^j``: maximal on a grid, and then by
    golden sections around its best place. In a weighted norm the same with the weighted products. Complex rows take
    their nodes from the real line.
    """
    weight, moment = target.weight, target.second_moment
    m, n = weight.shape
    seen = weight if moment is None else weight @ moment

    # A sequence that the inputs hardly ever excite is not fitted to: its scale would be rounding.
    floor = 0.0 if moment is None else 1e-10 * float(moment.diagonal().real.max())

    def gain(nodes: Tensor) -> tuple[Tensor, Tensor]:
        """For nodes (m, k): the share of each row that they explain, and the best scale."""
        v = powers(nodes.flatten(), n).reshape(*nodes.shape, n).to(weight.dtype)
        reached = (v @ seen[:, :, None])[..., 0]
        image = v if moment is None else v @ moment
        size = (image * v).sum(-1).real
        alive = size > floor * (v.abs() ** 2).sum(-1)
        size = torch.where(alive, size, torch.ones_like(size))
        scale = torch.where(alive, reached / size, torch.zeros_like(reached))
        return (reached.abs() ** 2 / size) * alive, scale

    grid = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float64).expand(m, _GRID)
    best = torch.cat([gain(part.expand(m, -1))[0] for part in grid[:1].split(64, 1)], 1).argmax(1)
    centre = grid[0, best]
    if target.sweeps:
        width = 2.0 / (_GRID - 1)
        low, high = (centre - width).clamp(-1, 1), (centre + width).clamp(-1, 1)
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(_SECTIONS):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            values = gain(torch.stack([a, b], 1))[0]
            upper = values[:, 1] > values[:, 0]
            low, high = torch.where(upper, a, low), torch.where(upper, high, b)
        middle = (low + high) / 2
        values = gain(torch.stack([centre, middle], 1))[0]
        centre = torch.where(values[:, 1] > values[:, 0], middle, centre)
    scale = gain(centre[:, None])[1][:, 0]
    return {"scale": scale, "nodes": centre.to(weight.dtype)}

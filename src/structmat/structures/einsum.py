"""The two-factor einsum family: a continuous space between low rank, Kronecker, Monarch and block tensor trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program, Shuffle
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import divisors
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_size,
    largest_fitting,
    whole,
)

Sizes = tuple[int, int, int, int, int, int]
"""``(a, b, g, d, e, f)``: in = a b g, out = d e f."""

NAMED: Mapping[str, tuple[float, ...]] = {
    "low rank": (1, 0, 0, 0, 1, 0),
    "Kronecker": (0.5, 0.5, 0, 0.5, 0.5, 0),
    "Monarch": (0.5, 0, 0.5, 0, 0.5, 0.5),
    "generic": (0.5, 0.25, 0.25, 0.25, 0.5, 0.25),
}
"""Exponents of ``(a, b, g, d, e, f)`` of members with a name."""


@dataclass(frozen=True)
class Taxonomy:
    """What the shape of a member says about it.

    Args:
        parameters: ``r (f d g a + f e g b)``.
        macs: multiply-adds for one vector, ``r (f d g a b + f d e g b)``.
        sharing: multiply-adds by parameters; 1 without sharing, which scales best.
        rank: the largest that a member can have.
        omega: exponent of the sharing in the smaller side.
        psi: exponent of the rank, 1 for full rank, which scales best.
        nu: ``macs`` grow as the smaller side to the power ``1 + nu``.
    """

    parameters: int
    macs: int
    sharing: float
    rank: int
    omega: float
    psi: float
    nu: float

    def __str__(self) -> str:
        return (
            f"{self.parameters} parameters, {self.macs} multiply-adds (each parameter used {self.sharing:.3g} times), "
            f"rank at most {self.rank}; omega={self.omega:.2f}, psi={self.psi:.2f}, nu={self.nu:.2f}"
        )


@final
@dataclass(frozen=True)
class Einsum(Structure):
    """Two factors with every way to share axes: inputs (g, b, a), outputs (f, e, d), a bond of size ``rank``.

    ``z[f,d,r,g,b] = sum_a A[f,d,r,g,a] x[g,b,a]`` and ``y[f,e,d] = sum_(r,g,b) B[f,e,r,g,b] z[f,d,r,g,b]``, tensors
    ``first`` (g, f * d * rank, a) and ``second`` (f, e, rank * g * b). Exponents of the six sizes span low rank,
    Kronecker and tensor trains, Monarch and block tensor trains: :data:`NAMED`; :meth:`taxonomy` says what a member is.
    Sizes are padded. Projection: for each (f, g) the block of the matrix, rearranged as (e b, d a), has at most that
    rank, so truncated SVDs of all blocks are optimal; in an activation-weighted norm alternating least squares from
    there, monotone.
    Source: Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices"
    (NeurIPS 2024).

    Args:
        exponents: of (a, b, g) in the inputs and (d, e, f) in the outputs, each triple summing to 1.
        rank: size of the bond, or a fraction of the dense parameter count.
        sizes: the six sizes themselves; chosen from the exponents where not given.
    """

    exponents: tuple[float, ...] = (0.5, 0.0, 0.5, 0.0, 0.5, 0.5)
    rank: int | float = 1
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponents", tuple(float(t) for t in self.exponents))
        t = self.exponents
        if len(t) != 6 or min(t) < 0 or any(abs(sum(side) - 1) > 1e-6 for side in (t[:3], t[3:])):
            raise StructureError(
                f"Einsum(exponents={t}): there are six of at least 0, of (a, b, g) and of (d, e, f), and each triple "
                "sums to 1. Use, for example, those of NAMED['Monarch']."
            )
        check_size(self, "rank", self.rank)
        if self.sizes is not None and (len(self.sizes) != 6 or min(self.sizes) < 1):
            raise StructureError(f"Einsum(sizes={self.sizes}): there are six sizes of at least 1, (a, b, g, d, e, f).")

    def resolve(self, shape: Shape) -> Self:
        if self.sizes is not None:
            return self
        t = self.exponents
        return replace(self, sizes=(*_split(shape[1], t[:3]), *_split(shape[0], t[3:])))

    @property
    def _sizes(self) -> Sizes:
        assert self.sizes is not None, f"unresolved {self}"
        a, b, g, d, e, f = self.sizes
        return a, b, g, d, e, f

    def restriction(self, shape: Shape) -> str | None:
        a, b, g, d, e, f = self._sizes
        if a * b * g < shape[1] or d * e * f < shape[0]:
            return f"its sizes make a matrix of shape {(d * e * f, a * b * g)}. Use larger ones, or leave them out."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        a, b, g, d, e, f = self._sizes
        return (d * e * f, a * b * g)

    def taxonomy(self, shape: Shape) -> Taxonomy:
        """Counts and exponents of the member at this shape.

        Source: the exponents of the paper's taxonomy; parameters, multiply-adds and rank are counted, not estimated.
        """
        from structmat.structure import resolve

        found = resolve(self, shape)
        assert isinstance(found, Einsum)
        a, b, g, d, e, f = found._sizes
        r = whole(found.rank)
        parameters = f * d * r * g * a + f * e * r * g * b
        macs = a * b * g * d * f * r + b * g * d * e * f * r
        m, n = found.native_shape(shape)
        rank = min(m, n, f * d * r * g * b, f * g * r * min(a, d) * min(b, e))
        small = math.log(max(2, min(shape)))
        ta, tb, td, te = (math.log(s) / small for s in (a, b, d, e))
        tr = math.log(r) / small
        return Taxonomy(
            parameters,
            macs,
            macs / parameters,
            rank,
            omega=min(tb + te, ta + td) - min(ta, te),
            psi=min(1.0, 2 + tr - ta - te),
            nu=1 + tr - min(ta, te),
        )

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        a, b, g, d, e, f = self._sizes
        rank = whole(self.rank)
        return {
            "first": ParameterSpec((g, f * d * rank, a), Normal(a**-0.5)),
            "second": ParameterSpec((f, e, rank * g * b), Normal((DENSE_GAIN / (rank * g * b)) ** 0.5)),
        }

    def program(self, shape: Shape) -> Program:
        a, b, g, d, e, f = self._sizes
        r = whole(self.rank)
        return Chain(
            (
                # (g, b, a) -> (g, a, b): the shared axis b innermost
                Shuffle((g, b, a), (0, 2, 1)),
                Contraction("first", g, f * d * r, a, b, shared_d=True),
                # (g, f, d, r, b) -> (f, r, g, b, d)
                Shuffle((g, f, d, r, b), (1, 3, 0, 4, 2)),
                Contraction("second", f, e, r * g * b, d, shared_d=True),
            )
        )

    def project(self, target: Target) -> Fit:
        sizes, rank = self._sizes, whole(self.rank)
        _, b, _, d, _, _ = sizes
        first, second, tail = _per_block(target.weight, sizes, rank)
        plain = target.second_moment is None
        # Cropping the rows of a member leaves a member, and of no larger ranks, where no axis is shared.
        if plain and (not target.is_padded or b == d == 1):
            return Fit({"first": first, "second": second}, Certificate.OPTIMAL, tail, "truncated SVD of blocks")
        if not plain:
            first, second = _descend(target, sizes, rank, (first, second))
        most = self.taxonomy(target.native).rank
        bound = float(torch.linalg.norm(target.whitened_svd[1][most:]))
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        method = "truncated SVD of blocks" if plain else "alternating least squares"
        return Fit({"first": first, "second": second}, certificate, bound, method)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        for name in ("Monarch", "generic", "Kronecker"):
            exponents = NAMED[name]
            unit = cls(exponents, 1).resolve(shape)
            a, b, g, d, e, f = unit._sizes
            most = max(1, min(shape) // max(1, min(f * g, min(shape))))
            rank = largest_fitting(lambda r, k=f * g * (d * a + e * b): r * k, budget, most)
            if rank:
                yield cls(exponents, rank, unit.sizes)
                return


def _split(size: int, exponents: tuple[float, ...]) -> tuple[int, int, int]:
    """Three sizes whose product is ``size`` or slightly above, in proportion to powers of it."""
    wanted = [size**t for t in exponents]
    best: tuple[float, tuple[int, int, int]] | None = None
    for padded in range(size, max(size + 1, math.ceil(1.15 * size)) + 1):
        for first in divisors(padded):
            for second in divisors(padded // first):
                sizes = (first, second, padded // first // second)
                if any(t == 0 and s != 1 for t, s in zip(exponents, sizes, strict=True)):
                    continue
                away = sum(abs(math.log(s / w)) for s, w in zip(sizes, wanted, strict=True))
                away += 8 * math.log(padded / size)
                if best is None or away < best[0] - 1e-12:
                    best = (away, sizes)
    assert best is not None
    return best[1]


def _grid(weight: Tensor, sizes: Sizes) -> Tensor:
    """The matrix as (f, e, d, g, b, a)."""
    a, b, g, d, e, f = sizes
    return weight.reshape(f, e, d, g, b, a)


def _dense(first: Tensor, second: Tensor, sizes: Sizes, rank: int) -> Tensor:
    a, b, g, d, e, f = sizes
    left = first.reshape(g, f, d, rank, a)
    right = second.reshape(f, e, rank, g, b)
    return torch.einsum("gfdra,fergb->fedgba", left, right).reshape(f * e * d, g * b * a)


def _per_block(weight: Tensor, sizes: Sizes, rank: int) -> tuple[Tensor, Tensor, float]:
    """For each pair (f, g) the best rank of the block rearranged as (e b, d a): optimal without a weight."""
    a, b, g, d, e, f = sizes
    blocks = _grid(weight, sizes).permute(0, 3, 1, 4, 2, 5).reshape(f, g, e * b, d * a)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = s[..., :kept].sqrt()
    left = u[..., :kept] * root[..., None, :]  # (f, g, e b, r)
    right = root[..., None] * vh[..., :kept, :]  # (f, g, r, d a)
    if kept < rank:
        left = torch.cat([left, left.new_zeros(f, g, e * b, rank - kept)], -1)
        right = torch.cat([right, right.new_zeros(f, g, rank - kept, d * a)], -2)
    second = left.reshape(f, g, e, b, rank).permute(0, 2, 4, 1, 3).reshape(f, e, rank * g * b)
    first = right.reshape(f, g, rank, d, a).permute(1, 0, 3, 2, 4).reshape(g, f * d * rank, a)
    return first, second, float(torch.linalg.norm(s[..., kept:]))


def _descend(target: Target, sizes: Sizes, rank: int, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Conjugate gradients in one factor at a time, in the norm of the target: never worse than the start."""
    first, second = start
    best = target.squared(target.weight - _dense(first, second, sizes, rank))
    for _ in range(target.sweeps):
        before = best
        for side in (0, 1):
            first, second = _improved(target, first, second, sizes, rank, side)
        best = target.squared(target.weight - _dense(first, second, sizes, rank))
        if before - best <= 1e-9 * before:
            break
    return first, second


def _improved(
    target: Target, first: Tensor, second: Tensor, sizes: Sizes, rank: int, side: int, steps: int = 6
) -> tuple[Tensor, Tensor]:
    def image(x: Tensor) -> Tensor:
        return _dense(x, second, sizes, rank) if side == 0 else _dense(first, x, sizes, rank)

    def back(y: Tensor) -> Tensor:
        y = y if target.second_moment is None else y @ target.second_moment
        a, b, g, d, e, f = sizes
        grid = y.reshape(f, e, d, g, b, a)
        if side == 0:
            right = second.reshape(f, e, rank, g, b).conj()
            return torch.einsum("fedgba,fergb->gfdra", grid, right).reshape(first.shape)
        left = first.reshape(g, f, d, rank, a).conj()
        return torch.einsum("fedgba,gfdra->fergb", grid, left).reshape(second.shape)

    x = first if side == 0 else second
    residual = back(target.weight - image(x))
    direction, power = residual, float(residual.abs().square().sum())
    for _ in range(steps):
        if power <= 1e-300:
            break
        moved = back(image(direction))
        curvature = float((direction.conj() * moved).sum().real)
        if curvature <= 0:
            break
        step = power / curvature
        x, residual = x + step * direction, residual - step * moved
        last, power = power, float(residual.abs().square().sum())
        direction = residual + power / last * direction
    return (x, second) if side == 0 else (first, x)


@dataclass(frozen=True)
class Found:
    """One member that :func:`search` tried."""

    structure: Einsum
    taxonomy: Taxonomy
    error: float


def search(weight: Tensor, budget: int, *, step: float = 0.25, sweeps: int = 4, limit: int = 64) -> list[Found]:
    """Members on a grid of exponents within a budget of parameters, by rising error of their projection.

    Args:
        weight: (out, in), what the members are to approximate; for a search over training runs take the structures and
            train them.
        budget: parameters at most; each member takes the largest rank within it.
        step: of the grid of exponents.
        sweeps: of each projection.
        limit: members at most; those of least sharing and largest rank go first.
    """
    from structmat.projection.project import project
    from structmat.structure import resolve

    shape = (weight.shape[0], weight.shape[1])
    ticks = [i * step for i in range(round(1 / step) + 1)]
    sides = [(x, y, 1 - x - y) for x, y in product(ticks, ticks) if x + y <= 1 + 1e-9]
    members: dict[tuple[object, ...], Einsum] = {}
    for left, right in product(sides, sides):
        unit = resolve(Einsum((*(max(0.0, t) for t in left), *(max(0.0, t) for t in right)), 1), shape)
        assert isinstance(unit, Einsum)
        cost = unit.taxonomy(shape).parameters
        a, b, _, d, e, _ = unit._sizes
        rank = min(budget // cost, e * b, d * a)
        if rank >= 1:
            members.setdefault((unit.sizes, rank), replace(unit, rank=rank))
    ranked = sorted(members.values(), key=lambda s: (s.taxonomy(shape).omega, -s.taxonomy(shape).rank))
    tried = [Found(s, s.taxonomy(shape), project(weight, s, sweeps=sweeps).error) for s in ranked[:limit]]
    return sorted(tried, key=lambda found: found.error)

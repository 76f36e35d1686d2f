"""Planted structure, found by projection (P1) and by gradient descent (P2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import structmat as sm
from benchmarks.learned_common import (
    BASE,
    LEARNED,
    deployed,
    prepared,
    train,
)
from structmat.projection.windows import Terms

KINDS = ("block sparse", "mixed", "off-grid", "low rank")


def planted(kind: str, seed: int, size: int = 64) -> Terms:
    """A matrix of windows: on a grid, off it, or of both kinds with low rank."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=g)

    if kind == "block sparse":
        grid = torch.randperm(64, generator=g)[:6]
        rows = [[int(p) // 8 * 8, 8, int(p) % 8 * 8 + j, 1] for p in grid for j in range(8)]
        windows = torch.tensor(rows)
    elif kind == "low rank":
        windows = torch.tensor([[0, size, 0, size]]).repeat(4, 1)
    else:
        windows = torch.stack([ints(0, size, 8), ints(8, 25, 8), ints(0, size, 8), ints(8, 25, 8)], 1)
        if kind == "mixed":
            diagonal = [[8 * i, 8, 8 * i, 8] for i in range(8) for _ in range(2)]
            windows = torch.cat([windows[:4], torch.tensor([[0, size, 0, size], *diagonal])])
    left = torch.randn(len(windows), size, generator=g, dtype=torch.float64)
    right = torch.randn(len(windows), size, generator=g, dtype=torch.float64)
    return Terms(left, right, windows).cropped()


def run_projection(kind: str, seed: int) -> dict[str, Any]:
    """The projection on windows of the planted cost, beside every fixed family of at least that cost."""
    terms = planted(kind, seed)
    weight, (rows, columns) = terms.dense(), terms.totals
    found = {"GBLR": sm.project(weight, sm.GBLR(2 * terms.count, rows, columns)).error}
    for family in (sm.LowRank, sm.BlockDiagonal, sm.Monarch, sm.BLAST, sm.BlockTensorTrain, sm.Einsum, sm.Kronecker):
        members = list(family.configurations((64, 64), math.ceil(1.05 * (rows + columns))))
        if members:
            found[family.__name__] = min(sm.project(weight, member).error for member in members)
    return {"errors": found, "cost": rows + columns}


def run_teacher(method: str, factor: float, seed: int, kind: str = "off-grid", steps: int = 1000) -> dict[str, Any]:
    """A student of planted windows at the teacher's own cost; its error with hard windows."""
    teacher = planted(kind, seed)
    weight, cost = teacher.dense().float(), sum(teacher.totals)
    size = weight.shape[0]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    share = cost / size**2
    options: dict[str, Any] = {"floor": 0.0} if method in LEARNED else {}
    learner = prepared(model, ["0"], method, share, steps, seed, **options)
    if method == "dense-small":
        inner = max(1, cost // (2 * size))
        model = nn.Sequential(nn.Linear(size, inner, bias=False), nn.Linear(inner, size, bias=False))
    g = torch.Generator().manual_seed(seed + 100)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(256, size, generator=g)
        return x, x @ weight.T

    # A base rate is that of a dense layer; for a bare matrix the spec's 1e-2 is used for every tensor alike.
    seconds = train(model, learner, BASE["P2"] * factor, steps, batch, lambda y, t: (y - t).square().mean())
    moved = learner.moved()["0"] if learner is not None else None
    if learner is not None:
        learner.harden()
    with torch.no_grad():
        found = model(torch.eye(size)).T
    error = float((found - weight).norm() / weight.norm())
    spent = deployed(model, ["0"]) if method != "dense-small" else 2 * size * max(1, cost // (2 * size))
    return {"error": error, "share": spent / size**2, "asked": share, "moved": moved, "training_seconds": seconds}

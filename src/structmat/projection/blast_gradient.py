"""BLAST factors by preconditioned gradient descent as published, to measure the library's own fit against.

:func:`structmat.projection.blast.blast` solves each block exactly with a small, vanishing proximity and from several
starts; it needs fewer sweeps and ends lower, so ``project`` uses it. See ``docs/learned.md`` for the figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from structmat.projection.blast import Factors
from structmat.projection.target import Target


def small_start(target: Target, blocks: tuple[int, int], rank: int) -> Factors:
    """Bases of size 1e-3 and couplings uniform in (0, 1), for a matrix of unit standard deviation."""
    (height, width), (b1, b2) = target.native, blocks
    generator = target.generator()
    dtype = target.weight.dtype
    u = torch.randn(b1, height // b1, rank, generator=generator, dtype=dtype) * 1e-3 / rank**0.5
    v = torch.randn(b2, width // b2, rank, generator=generator, dtype=dtype) * 1e-3 / rank**0.5
    s = torch.rand(b1, b2, rank, generator=generator, dtype=torch.float64).to(dtype)
    return Factors(u, v, s)


def preconditioned_descent(
    target: Target,
    blocks: tuple[int, int],
    rank: int,
    *,
    iterations: int = 300,
    damping: float = 0.1,
    precondition: bool = True,
    start: Factors | None = None,
) -> tuple[Factors, list[float]]:
    """Factors in the Frobenius norm, and the relative error after each iteration.

    For ``1/2 sum_ij ||W_ij - U_i diag(s_ij) V_j^T||^2`` the bases of the rows, those of the columns and the couplings
    take turns: the gradient is divided by the block's Gram matrix plus ``damping`` times the norm of the residual, at a
    step that falls linearly from 1 to 0. No block update raises the loss. An iteration costs about ``6 out in rank``
    multiply-adds and ``b1 b2`` solves of size ``rank``.
    Source: Lee et al., "BLAST: Block-Level Adaptive Structured Matrices for Efficient Deep Neural Network Inference"
    (NeurIPS 2024), algorithm 2; their step of 1 is one of 2 in this convention.

    Args:
        target: of the native shape; its moments are not used.
        blocks: along the outputs and the inputs.
        rank: of the bases.
        iterations: of all three updates.
        damping: relative to the norm of the residual, computed anew for each update.
        precondition: False divides by the largest eigenvalue of the Gram matrix instead: plain gradient descent.
        start: :func:`small_start` if None.
    """
    scale = float(target.weight.std()) if target.weight.numel() > 1 else 0.0
    scale = scale if scale > 0 else 1.0
    weight = target.weight / scale
    size = float(torch.linalg.norm(weight))
    f = small_start(target, blocks, rank) if start is None else start
    b1, b2 = blocks
    p, q = weight.shape[0] // b1, weight.shape[1] // b2

    def rest() -> Tensor:
        return (weight - f.dense()).reshape(b1, p, b2, q)

    errors = []
    for iteration in range(iterations):
        step = 1.0 - iteration / iterations
        left = rest()
        basis = torch.einsum("ijr,jqr->ijqr", f.s, f.v)
        gram = torch.einsum("ijqr,ijqt->irt", basis.conj(), basis)
        pull = torch.einsum("ipjq,ijqr->ipr", left, basis.conj())
        change = _scaled(gram.mT, pull.mT, damping * float(torch.linalg.norm(left)), precondition)
        f = replace(f, u=f.u + step * change.mT)
        left = rest()
        basis = torch.einsum("ijr,ipr->ijpr", f.s, f.u)
        gram = torch.einsum("ijpr,ijpt->jrt", basis.conj(), basis)
        pull = torch.einsum("ipjq,ijpr->jqr", left, basis.conj())
        change = _scaled(gram.mT, pull.mT, damping * float(torch.linalg.norm(left)), precondition)
        f = replace(f, v=f.v + step * change.mT)
        left = rest()
        gram = (f.u.mH @ f.u)[:, None] * (f.v.mH @ f.v)
        pull = torch.einsum("ipjq,ipr,jqr->ijr", left, f.u.conj(), f.v.conj())
        change = _scaled(gram, pull[..., None], damping * float(torch.linalg.norm(left)), precondition)
        f = replace(f, s=f.s + step * change[..., 0])
        errors.append(float(torch.linalg.norm(rest())) / size if size > 0 else 0.0)
    root = scale**0.5
    return Factors(f.u * root, f.v * root, f.s), errors


def _scaled(gram: Tensor, pull: Tensor, damping: float, precondition: bool) -> Tensor:
    if not precondition:
        largest = torch.linalg.matrix_norm(gram, 2).clamp(min=1e-30)
        shrunk: Tensor = pull / largest[..., None, None]
        return shrunk
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    floor = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) + 1e-30
    solution: Tensor = torch.linalg.solve(gram + (damping + floor)[..., None, None] * eye, pull)
    return solution

"""The nearest matrix of low rank, in the plain or the activation-weighted norm."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.projection.target import Target


def truncate(target: Target, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best ``left @ right`` of a rank, balanced, and its error.

    With ``U`` the leading left singular vectors of ``B^(1/2) W C^(1/2)``, the best member is
    ``B^(-1/2) U U^H B^(1/2) W``: no inverse of the second moment of the inputs is taken, so a singular one is handled
    exactly, and on inputs that never occur the weight itself is followed. Cost: one SVD of the target, shared by all
    ranks.

    Returns:
        ``left`` (out, rank), ``right`` (rank, in) and the error in the target's norm.
    """
    u, s, _ = target.whitened_svd
    left = u[:, :rank]
    if target.output_root is None or target.inverse_output_root is None:
        right = left.mH @ target.weight
    else:
        right = left.mH @ target.output_root @ target.weight
        left = target.inverse_output_root @ left
    tail = float(torch.linalg.norm(s[rank:]))
    return *balance(left, right), tail


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each column of ``left`` and row of ``right`` to equal norms; the product does not change."""
    a, b = torch.linalg.norm(left, dim=0), torch.linalg.norm(right, dim=1)
    alive = (a > 0) & (b > 0)
    scale = torch.where(alive, (b / a.clamp(min=1e-300)).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]

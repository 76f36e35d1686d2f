"""Fitting a product of two structures: each factor in turn, by its own projection in the norm that the other makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.projection.member import Member, nearest
from structmat.projection.target import Target
from structmat.structure import Structure

_INNER_SWEEPS = 4
_PATIENCE = 1e-6
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class _Trial:
    left: Member
    right: Member
    squared: float


def fit_product(left: Structure, right: Structure, inner: int, target: Target) -> tuple[Member, Member]:
    """Members of two resolved structures whose product is near the target.

    For a given right factor ``B`` the left one solves a weighted problem of its own: with ``A*`` the least squares
    solution, ``||(W - A B) C^(1/2)||^2 = ||(A* - A) (B C B^H)^(1/2)||^2 + constant``. For a given left factor ``A`` the
    right one solves ``||(A^H A)^(1/2) (B* - B) C^(1/2)||``, a norm that weighs outputs; for families that can't weigh
    them, the same with ``||A||^2`` in place of ``A^H A``, at a point where the two touch. A factor is kept only if the
    error does not rise. Starts: either factor like the identity, and the two halves of the singular value
    decomposition; all spend a quarter of the sweeps, the best one the rest.
    """
    rows, columns = target.native
    eyes = [torch.eye(n, m, dtype=target.weight.dtype) for n, m in ((rows, inner), (inner, columns))]
    s, vh = torch.linalg.svd(target.weight, full_matrices=False)[1:]
    kept = min(inner, len(s))
    half = target.weight.new_zeros(inner, columns)
    half[:kept] = s[:kept].sqrt()[:, None] * vh[:kept]
    starts = []
    for first_left, wanted in ((True, eyes[0]), (False, eyes[1]), (False, half)):
        if first_left:
            a = nearest(left, Target(wanted, None, (rows, inner), target.sweeps, target.seed))
            b = nearest(right, _right_target(a.dense, target, 0))
        else:
            b = nearest(right, Target(wanted, target.second_moment, (inner, columns), target.sweeps, target.seed))
            a = nearest(left, _left_target(b.dense, target, target.sweeps))
        starts.append(_Trial(a, b, target.squared(target.weight - a.dense @ b.dense)))
    if target.sweeps:
        quick = max(1, target.sweeps // 4)
        starts = [_descend(left, right, target, trial, quick) for trial in starts]
        best = min(starts, key=lambda trial: trial.squared)
        starts = [_descend(left, right, target, best, target.sweeps - quick)]
    best = min(starts, key=lambda trial: trial.squared)
    return best.left, best.right


def _left_target(right: Tensor, target: Target, sweeps: int) -> Target:
    """The problem of the left factor for a given right one."""
    reached = right if target.second_moment is None else right @ target.second_moment
    moment = reached @ right.mH
    moment = (moment + moment.mH) / 2
    wanted = target.weight @ reached.mH @ torch.linalg.pinv(moment, rtol=_TOLERANCE, hermitian=True)
    return Target(wanted, moment, (target.native[0], right.shape[0]), sweeps, target.seed)


def _right_target(left: Tensor, target: Target, sweeps: int) -> Target:
    """The problem of the right factor for a given left one."""
    moment = left.mH @ left
    moment = (moment + moment.mH) / 2
    wanted = torch.linalg.pinv(moment, rtol=_TOLERANCE, hermitian=True) @ (left.mH @ target.weight)
    shape = (left.shape[1], target.native[1])
    return Target(wanted, target.second_moment, shape, sweeps, target.seed, moment)


def _majorised(left: Tensor, right: Tensor, target: Target, sweeps: int) -> Target:
    """A problem in the plain norm of outputs that touches the right factor's from above at the present one."""
    size = float(torch.linalg.matrix_norm(left, 2)) ** 2
    step = left.mH @ (target.weight - left @ right) / max(size, 1e-300)
    return Target(right + step, target.second_moment, (left.shape[1], target.native[1]), sweeps, target.seed)


def _descend(left: Structure, right: Structure, target: Target, trial: _Trial, sweeps: int) -> _Trial:
    inner = min(target.sweeps, _INNER_SWEEPS)
    for _ in range(sweeps):
        before = trial.squared
        trial = _better(target, trial, nearest(left, _left_target(trial.right.dense, target, inner)), trial.right)
        if right.weighs_outputs:
            wanted = _right_target(trial.left.dense, target, inner)
        else:
            wanted = _majorised(trial.left.dense, trial.right.dense, target, inner)
        trial = _better(target, trial, trial.left, nearest(right, wanted))
        if before - trial.squared <= _PATIENCE * before:
            break
    return trial


def _better(target: Target, trial: _Trial, left: Member, right: Member) -> _Trial:
    squared = target.squared(target.weight - left.dense @ right.dense)
    return _Trial(left, right, squared) if squared <= trial.squared else trial

"""Fitting a sum of structures: each part in turn takes what the others leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from structmat.program import Chain, Program, Stage
from structmat.program import Sparse as SparseStage
from structmat.projection.low_rank import balance, truncate
from structmat.projection.member import Member, nearest
from structmat.projection.robust import RobustPCA, robust_pca
from structmat.projection.sparse import entries, improve
from structmat.projection.target import Target
from structmat.structure import Structure, whole
from structmat.structures.low_rank import LowRank
from structmat.structures.sparse import Sparse

_INNER_SWEEPS = 4
"""Sweeps that a part without a closed form may spend each time that it is fitted again."""

_SUBSPACE_STEPS = 4
"""Steps of subspace iteration in place of the decomposition of a residual."""

_PATIENCE = 1e-5
"""The descent ends when a sweep lowers the squared error by less than this share."""


_LARGEST_SEPARATED = 1024
"""Sides up to this are separated by robust principal component analysis, some twenty singular value decompositions."""


@dataclass(frozen=True)
class _Trial:
    """Members of all parts, and the squared error of their sum in the target's norm."""

    members: tuple[Member, ...]
    squared: float


def fit_sum(parts: Sequence[Structure], target: Target) -> tuple[Member, ...]:
    """Members of resolved ``parts`` whose sum is near the target, by alternating projections of the residual.

    One start for each part: that part is fitted first, alone, the others in their order to what is left. Hence no
    worse than the best single part. Then every sweep fits each part again to the target minus the others and keeps it
    if the error does not rise: monotone, in the target's own norm. For low rank and sparse parts this is the scheme of
    GoDec (Zhou and Tao 2011), with one step of subspace iteration in place of each singular value decomposition.
    A low rank and a sparse part in the plain norm have one more start, the parts that robust principal component
    analysis finds (:func:`separation`): where its conditions hold it is the truth, and the alternation takes off what
    its tolerance left. The fits of a start, and then all starts, may spend a quarter of ``target.sweeps``; the best one
    goes on. With 0 sweeps only the starts are made.
    """
    trials = [_start(parts, target.replace_sweeps(target.sweeps // 4), first) for first in range(len(parts))]
    separated = separation(parts, target)
    if separated is not None and separated.succeeded:
        trials.append(_separated(parts, target, separated))
    if target.sweeps and len(parts) > 1:
        quick = max(1, target.sweeps // 4)
        trials = [_descend(parts, target, trial, quick) for trial in trials]
        best = min(trials, key=lambda trial: trial.squared)
        trials = [_descend(parts, target, best, target.sweeps - quick)]
    return min(trials, key=lambda trial: trial.squared).members


def separation(parts: Sequence[Structure], target: Target) -> RobustPCA | None:
    """Low rank and sparse parts of a target with sizes free, or None for other parts, weighted norms, sizes above
    1024 and screening (0 sweeps)."""
    kinds = sorted(type(part).__name__ for part in parts)
    plain = target.second_moment is None and target.output_moment is None
    if kinds != ["LowRank", "Sparse"] or not plain or not target.sweeps or target.norm() == 0:
        return None
    if max(target.native) > _LARGEST_SEPARATED:
        return None
    return target.weight_fact("robust_pca", lambda: robust_pca(target.weight))


def _separated(parts: Sequence[Structure], target: Target, found: RobustPCA) -> _Trial:
    """The parts that were found, cut to the sizes asked for."""
    left = target.weight
    members: list[Member] = []
    for part in parts:
        share = found.low_rank if isinstance(part, LowRank) else found.sparse
        members.append(nearest(part, Target(share.to(left.dtype), None, target.native, 0)))
        left = left - members[-1].dense
    return _Trial(tuple(members), target.squared(left))


def rank_bound(program: Program) -> int:
    """No matrix of this program has a larger rank."""
    if isinstance(program, Stage):
        most = min(program.in_features, program.out_features)
        return min(most, program.capacity) if isinstance(program, SparseStage) else most
    if isinstance(program, Chain):
        return min(rank_bound(step) for step in program.steps)
    return min(program.in_features, program.out_features, sum(rank_bound(part) for part in program.parts))


def _start(parts: Sequence[Structure], target: Target, first: int) -> _Trial:
    found = {first: nearest(parts[first], target)}
    left = target.weight - found[first].dense
    for index, part in enumerate(parts):
        if index != first:
            found[index] = _fit_rest(part, target, target.replace_weight(left))
            left = left - found[index].dense
    return _Trial(tuple(found[i] for i in range(len(parts))), target.squared(left))


def _descend(parts: Sequence[Structure], target: Target, trial: _Trial, sweeps: int) -> _Trial:
    members, squared = list(trial.members), trial.squared
    norm = target.replace_sweeps(min(target.sweeps, _INNER_SWEEPS))
    left = target.weight - sum(member.dense for member in members)
    for _ in range(sweeps):
        before = squared
        for index, part in enumerate(parts):
            wanted = left + members[index].dense
            other = _again(part, norm.replace_weight(wanted), members[index])
            error = target.squared(wanted - other.dense)
            if error <= squared:
                members[index], left, squared = other, wanted - other.dense, error
        if before - squared <= _PATIENCE * before:
            break
    return _Trial(tuple(members), squared)


def _fit_rest(part: Structure, target: Target, rest: Target) -> Member:
    """A member for what other parts have left of a target whose decomposition is known already."""
    if not isinstance(part, LowRank):
        return nearest(part, rest)
    left, right, _ = truncate(target, whole(part.rank))
    member = Member({"left": left, "right": right}, left @ right)
    for _ in range(_SUBSPACE_STEPS):
        member = _low_rank_step(rest, member)
    return member


def _again(part: Structure, target: Target, current: Member) -> Member:
    """A better member for a target that has moved a little: a cheap step where the family offers one."""
    if isinstance(part, LowRank):
        return _low_rank_step(target, current)
    if isinstance(part, Sparse) and (target.second_moment is not None or target.output_moment is not None):
        support = torch.zeros(target.weight.numel(), dtype=torch.bool)
        support[current.tensors["places"]] = True
        support = support.reshape(target.native)
        dense, mask = improve(target, current.dense, support)
        return Member(entries(dense, mask), dense)
    return nearest(part, target)


def _low_rank_step(target: Target, current: Member) -> Member:
    """One step of subspace iteration from the current row space.

    The columns of ``W C right^H`` span the best left factor for the present right one; for an orthonormal basis ``Q``
    of them the best right factor is ``Q^H W``, in every norm of this kind. So the error does not rise.
    """
    right = current.tensors["right"]
    rows = right if target.second_moment is None else right @ target.second_moment
    basis = torch.linalg.qr(target.weight @ rows.mH).Q
    reached = basis.mH @ target.weight
    left, right = balance(basis, reached)
    return Member({"left": left, "right": right}, basis @ reached)

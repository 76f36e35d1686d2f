"""Which entries a sparse matrix keeps where inputs and outputs are weighed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.projection.sparse import Norm, improve, lower_bound, sparsify
from structmat.projection.supports import alternating, correlation
from structmat.projection.target import Target

F64 = torch.float64


def decaying(size: int, decay: float, dtype: torch.dtype = F64) -> Tensor:
    """A moment whose eigenvalues fall by ``decay`` each, in random directions."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=dtype)).Q
    values = decay ** torch.arange(size, dtype=F64)
    return (basis * values) @ basis.mH


def target_of(matrix: Tensor, inputs: Tensor | None, outputs: Tensor | None, sweeps: int = 20) -> Target:
    return Target(matrix, inputs, (matrix.shape[0], matrix.shape[1]), sweeps, 0, outputs)


def solved(target: Target, mask: Tensor) -> float:
    """The least squared error on a support, from the normal equations of both moments together."""
    inputs, outputs = target.second_moment, target.output_moment
    sizes = target.native
    wide = torch.kron(
        torch.eye(sizes[0], dtype=F64) if outputs is None else outputs,
        torch.eye(sizes[1], dtype=F64) if inputs is None else inputs,
    )
    weight, inside = target.weight.reshape(-1), mask.reshape(-1)
    outside = weight.clone()
    outside[inside] = 0.0
    change = torch.linalg.lstsq(wide[inside][:, inside], wide[inside] @ outside, driver="gelsd").solution
    outside[inside] = -change
    return float(outside @ wide @ outside)


@pytest.mark.parametrize("weighed", ["inputs", "outputs", "both"])
def test_support_against_brute_force(weighed: str) -> None:
    ratios = []
    for _ in range(20):
        inputs = decaying(4, 0.3) if weighed != "outputs" else None
        outputs = decaying(2, 0.3) if weighed != "inputs" else None
        target = target_of(torch.randn(2, 4, dtype=F64), inputs, outputs)
        masks = [
            torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True).reshape(2, 4)
            for chosen in itertools.combinations(range(8), 3)
        ]
        best = min(solved(target, mask) for mask in masks)
        dense, mask = sparsify(target, 3, 20)
        reached = target.squared(target.weight - dense)
        assert int(mask.sum()) == 3
        assert lower_bound(target, 3) ** 2 <= best * (1 + 1e-9) <= reached * (1 + 1e-6)
        assert reached <= solved(target, mask) * 1.01  # the values are the best on this support
        ratios.append(reached / best)
    assert sorted(ratios)[10] < 1.05


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_entries_that_make_up_for_each_other_are_weighed_together(share: float, dtype: torch.dtype) -> None:
    """Far better than rounds of hard thresholding, each of which sees single entries."""
    matrix = torch.randn(40, 60, dtype=dtype)
    target = target_of(matrix, decaying(60, 0.85, dtype), decaying(40, 0.9, dtype))
    count = int(share * matrix.numel())
    dense, mask = sparsify(target, count, 0)
    for _ in range(40):
        dense, mask = improve(target, dense, mask)
    rounds = target.squared(matrix - dense)
    found, kept = sparsify(target, count, 20)
    assert int(kept.sum()) == count
    assert bool((found[~kept] == 0).all())
    assert target.squared(matrix - found) < 0.7 * rounds


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_shape_and_share(height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, height * width))
    rank = data.draw(st.integers(0, width))
    rows = torch.randn(rank, width, dtype=F64)  # inputs may never occur, or be tied
    target = target_of(torch.randn(height, width, dtype=F64), rows.T @ rows, decaying(height, 0.5))
    dense, mask = alternating(target, count, 10)
    assert int(mask.sum()) == count
    assert bool((dense[~mask] == 0).all())
    assert bool(torch.isfinite(dense).all())
    quick = target.squared(target.weight - sparsify(target, count, 0)[0])
    for rounds in (1, 5, 20):  # never worse than the start
        assert target.squared(target.weight - sparsify(target, count, rounds)[0]) <= quick


def test_members_come_back() -> None:
    matrix = torch.where(torch.rand(12, 15) < 0.3, torch.randn(12, 15, dtype=F64), 0.0)
    structure = sm.Sparse(nonzeros=int((matrix != 0).sum()))
    found = sm.project(matrix, structure, second_moment=decaying(15, 0.7), output_moment=decaying(12, 0.7))
    torch.testing.assert_close(found.matrix.to_dense(), matrix, rtol=0, atol=1e-12)


def test_correlations_are_shared() -> None:
    """The bound and fits of all sizes use one decomposition of a moment."""
    target = target_of(torch.randn(6, 5, dtype=F64), decaying(5, 0.5), None)
    assert target.second_moment is not None
    found = correlation(target.second_moment, target.input_fact)
    lower_bound(target, 7)
    sparsify(target, 7, 3)
    other = target.replace_weight(torch.randn(6, 5, dtype=F64))
    assert correlation(target.second_moment, other.input_fact) is found
    whole = (found.vectors * found.values) @ found.vectors.mH * torch.outer(found.scale, found.scale)
    torch.testing.assert_close(whole, target.second_moment)
    assert Norm.of(target).outputs is None

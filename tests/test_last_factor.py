"""Last factors in closed form: equal to plain least squares, never worse on data left out, chosen by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.compression.last_factor import Moments, last_factors, refit
from structmat.matrix import StructuredMatrix
from structmat.program import build
from structmat.structures.sum_of import Sum

SHAPE = (12, 8)


def drawn(structure: Any, shape: tuple[int, int] = SHAPE, seed: int = 0) -> StructuredMatrix:
    generator = torch.Generator().manual_seed(seed)
    return StructuredMatrix.random(structure, shape, generator=generator, dtype=torch.float64)


def rows(shape: tuple[int, int], count: int = 400, seed: int = 1, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inputs that are not white, and the outputs of some dense layer with a bias."""
    generator = torch.Generator().manual_seed(seed)
    map_generator = torch.Generator().manual_seed(99)
    mixing = torch.randn(shape[1], shape[1], generator=map_generator, dtype=torch.float64)
    weight = torch.randn(shape, generator=map_generator, dtype=torch.float64)
    x = torch.randn(count, shape[1], generator=generator, dtype=torch.float64) @ mixing + 0.5
    y = x @ weight.T + 3.0
    return x, y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)


def test_moments_give_the_error_of_the_rows_and_add_up() -> None:
    x, y = rows(SHAPE)
    weight, bias = drawn(sm.Dense()).to_dense(), torch.arange(12.0, dtype=torch.float64)
    whole = Moments.of(x, y)
    parts = Moments.of(x[:100], y[:100]) + Moments.of(x[100:], y[100:])
    for held in (None, bias):
        wrong = y - x @ weight.T - (0 if held is None else held)
        expected = float(wrong.square().sum() / y.square().sum())
        assert whole.error(weight, held) == pytest.approx(expected, rel=1e-9)
        assert parts.error(weight, held) == pytest.approx(expected, rel=1e-9)


def test_the_left_factor_of_a_low_rank_is_that_of_least_squares() -> None:
    x, y = rows(SHAPE)
    matrix = drawn(sm.LowRank(rank=3))
    found = refit(matrix, None, Moments.of(x, y), Moments.of(x, y))
    assert found is not None
    wanted = torch.linalg.lstsq(x @ matrix.tensors["right"].T, y).solution.T
    torch.testing.assert_close(found.matrix.tensors["left"], wanted, rtol=1e-3, atol=1e-3)  # the least ridge is 1e-8
    assert torch.equal(found.matrix.tensors["right"], matrix.tensors["right"])
    best = float((y - x @ matrix.tensors["right"].T @ wanted.T).square().sum() / y.square().sum())
    assert best <= found.after <= best * (1 + 1e-6) < found.before


FAMILIES = (
    sm.Dense(),
    sm.LowRank(rank=3),
    sm.PivotedLowRank(rank=3),
    sm.BlockDiagonal(blocks=4),
    sm.Monarch(blocks=2, rank=2),
    sm.BLAST(blocks=2, rank=3),
    sm.TensorTrain(rank=2),
    Sum(sm.LowRank(rank=2), sm.BlockDiagonal(blocks=4)),
)


@pytest.mark.parametrize("structure", FAMILIES, ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (16, 16)], ids=str)
def test_no_other_last_factor_is_better(structure: Any, shape: tuple[int, int]) -> None:
    """The gradient in the tensors that were solved vanishes, and with a bias the mean of what is wrong does."""
    x, y = rows(shape)
    matrix = drawn(structure, shape)
    moments = Moments.of(x, y)
    found = refit(matrix, torch.zeros(shape[0], dtype=torch.float64), moments, moments)
    assert found is not None
    assert found.after < found.before
    assert found.bias is not None
    names = {f.contraction.weight for f in last_factors(matrix.program)}
    assert names
    tensors = {n: t.clone().requires_grad_(n in names) for n, t in found.matrix.tensors.items()}
    written = StructuredMatrix(matrix.structure, shape, tensors).to_dense()
    wrong = y - x @ written.T - found.bias
    error = wrong.square().sum() / y.square().sum()
    error.backward()
    assert float(wrong.detach().mean(0).abs().max()) < 1e-9
    sums = len(names) > 1  # solved in turns, which ends after a few
    for name in names:
        gradient, tensor = tensors[name].grad, tensors[name].detach()
        assert gradient is not None
        assert float((gradient * tensor).abs().sum()) < (5e-2 if sums else 2e-4) * found.before, name


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 40), st.integers(0, 10_000))
def test_never_worse_on_the_rows_left_out(out: int, inputs: int, count: int, seed: int) -> None:
    """With fewer rows than inputs too: then the ridge, or nothing, is right."""
    shape = (out, inputs)
    matrix = drawn(sm.LowRank(rank=1 + seed % min(shape)), shape, seed)
    fit, judge = rows(shape, count, seed, noise=2.0), rows(shape, 50, seed + 1, noise=2.0)
    found = refit(matrix, None, Moments.of(*fit), Moments.of(*judge))
    assert found is not None
    assert found.after <= found.before
    wrong = judge[1] - judge[0] @ found.matrix.to_dense().T
    assert found.after == pytest.approx(float(wrong.square().sum() / judge[1].square().sum()), rel=1e-6, abs=1e-12)


def test_few_noisy_rows_get_a_larger_ridge() -> None:
    """The factor that few rows ask for is bad on others; the one that is kept lies between it and the old one."""
    shape = (6, 20)
    x, clean = rows(shape, 4000)
    right = torch.linalg.lstsq(torch.cat([x, torch.ones(4000, 1, dtype=x.dtype)], 1), clean).solution.T
    weight = right[:, :-1]
    matrix = StructuredMatrix(sm.Dense(), shape, {"weight": weight * 1.1})
    few = rows(shape, 21, 7, noise=30.0)
    judge = Moments.of(x, clean)
    bias = right[:, -1]
    found = refit(matrix, bias, Moments.of(*few), judge)
    assert found is not None
    least = few[0] - few[0].mean(0)
    greedy = torch.linalg.lstsq(least, few[1] - few[1].mean(0)).solution.T
    assert judge.error(greedy, few[1].mean(0) - greedy @ few[0].mean(0)) > found.before
    assert found.after <= found.before


def test_what_ends_in_no_learned_contraction_is_left_alone() -> None:
    x, y = rows(SHAPE)
    moments = Moments.of(x, y)
    for structure in (sm.Sparse(nonzeros=20), sm.GBLR(terms=4, rows=20, columns=20)):
        assert refit(drawn(structure), None, moments, moments) is None
    # A tensor that is read twice makes no linear problem.
    twice = build(sm.Dense(), (8, 8))
    from structmat.program import Chain

    assert last_factors(Chain((twice, twice))) == ()

"""BLAST: shared block bases with couplings."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.program import Contraction, stages
from structmat.projection.blast import Descent, from_blocks, from_low_rank, from_noise
from structmat.projection.blast_gradient import preconditioned_descent
from structmat.projection.project import make_target
from structmat.projection.target import Certificate
from structmat.structure import count_parameters, resolve

F64 = torch.float64


def dense_of(left: Tensor, coupling: Tensor, right: Tensor) -> Tensor:
    """The definition, block by block."""
    b1, b2, _ = coupling.shape
    return torch.cat(
        [torch.cat([left[i] @ coupling[i, j].diag() @ right[j].T for j in range(b2)], 1) for i in range(b1)]
    )


def random_moment(size: int, rank: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    x = torch.randn(size, rank or size + 5, dtype=dtype)
    return x @ x.mH / x.shape[1]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=25)
def test_learned_C15_multiply_equals_the_definition(b1: int, b2: int, p: int, q: int, rank: int) -> None:
    shape = (b1 * p, b2 * q)
    structure = sm.BLAST((b1, b2), rank)
    matrix = sm.StructuredMatrix.random(structure, shape, dtype=F64)
    expected = dense_of(matrix.tensors["left"], matrix.tensors["coupling"], matrix.tensors["right"])
    torch.testing.assert_close(matrix.to_dense(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(matrix.T.to_dense(), expected.T, rtol=1e-12, atol=1e-13)
    count = rank * (sum(shape) + b1 * b2)
    assert matrix.num_parameters == matrix.macs == count == count_parameters(structure, shape)
    assert all(isinstance(stage, Contraction) for stage in stages(matrix.program))  # nothing is moved


def test_learned_C15_latin_square_embedding() -> None:
    """Blocks of rank t are members of rank b * t: each in a slot that its row and column share with no other block."""
    blocks, t = 3, 2
    rows = [
        torch.cat([torch.randn(5, t, dtype=F64) @ torch.randn(t, 4, dtype=F64) for _ in range(blocks)], 1)
        for _ in range(blocks)
    ]
    matrix = torch.cat(rows)
    target = make_target(matrix)
    factors = from_blocks(target, (blocks, blocks), blocks * t)
    assert factors is not None
    torch.testing.assert_close(factors.dense(), matrix, rtol=1e-12, atol=1e-12)
    assert sm.project(matrix, sm.BLAST(blocks, blocks * t)).error < 1e-10
    assert from_blocks(target, (blocks, blocks), blocks - 1) is None


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("weighted", [False, True, "singular"])
@pytest.mark.parametrize("proximity", [0.0, 1e-2])
def test_learned_C15_every_block_update_descends(dtype: torch.dtype, weighted: bool | str, proximity: float) -> None:
    moment = random_moment(20, 6 if weighted == "singular" else None, dtype) if weighted else None
    target = make_target(torch.randn(18, 20, dtype=dtype), moment)
    starts = [from_low_rank(target, (3, 4), 5), from_blocks(target, (3, 4), 5), from_noise(target, (3, 4), 5)]
    for start in starts:
        assert start is not None
        run = Descent(target, start)
        squared = [run.squared]
        for _ in range(8):
            for update in (run.update_u, run.update_v, run.update_s):
                update(proximity)
                squared.append(run.squared)
                # What the updates keep track of is the true error.
                true = target.error(run.factors.dense()) ** 2
                assert run.squared == pytest.approx(true, rel=1e-8, abs=1e-10 * squared[0])
        assert all(late <= early * (1 + 1e-9) + 1e-12 * squared[0] for early, late in itertools.pairwise(squared))
        assert squared[-1] < squared[0]


def test_learned_C15_update_is_the_exact_block_solution() -> None:
    """After an update without proximity no change of the same variables lowers the error."""
    target = make_target(torch.randn(12, 15, dtype=F64), random_moment(15))
    for name, single in (("update_u", "u"), ("update_s", "s"), ("update_v", "v")):
        start = from_noise(target, (3, 1 if name != "update_u" else 5), 3)
        run = Descent(target, start)
        getattr(run, name)(0.0)
        best = run.squared
        for _ in range(10):
            moved = {k: getattr(run.factors, k) for k in ("u", "v", "s")}
            moved[single] = moved[single] + 1e-3 * torch.randn_like(moved[single])
            assert target.error(type(run.factors)(**moved).dense()) ** 2 >= best * (1 - 1e-10)


def test_learned_C15_exact_rank_recovery() -> None:
    matrix = torch.randn(256, 8, dtype=F64) @ torch.randn(8, 256, dtype=F64)
    found = sm.project(matrix, sm.BLAST(16, 8))
    assert found.error < 1e-6
    # From noise too, in few sweeps.
    target = make_target(matrix[:64, :64] / matrix.std())
    run = Descent(target, from_noise(target, (4, 4), 8))
    for step in range(60):
        run.sweep(1e-2 * 0.7**step)
    assert run.squared**0.5 < 1e-6 * target.norm()


@given(st.integers(5, 20), st.integers(5, 20), st.integers(1, 5), st.integers(1, 6), st.booleans())
@settings(max_examples=20)
def test_never_worse_than_low_rank(height: int, width: int, blocks: int, rank: int, weighted: bool) -> None:
    matrix = torch.randn(height, width, dtype=F64)
    moment = random_moment(width, width // 2 + 1) if weighted else None
    rank = min(rank, height, width)
    found = sm.project(matrix, sm.BLAST(blocks, rank), second_moment=moment)
    low = sm.project(matrix, sm.LowRank(rank), second_moment=moment)
    assert found.error <= low.error * (1 + 1e-9) + 1e-9  # a singular moment amplifies rounding
    assert found.lower_bound <= found.error * (1 + 1e-9)
    assert found.certificate is not Certificate.OPTIMAL


def test_better_than_low_rank_at_equal_size() -> None:
    """Figures of a Gaussian 256 x 256: 0.610 against 0.698 of low rank (rank 48) at 24,832 parameters."""
    matrix = torch.randn(256, 256, dtype=F64)
    found = sm.project(matrix, sm.BLAST(16, 32))
    assert count_parameters(sm.BLAST(16, 32), (256, 256)) == 24_576
    low = sm.project(matrix, sm.LowRank(48))
    assert found.error < 0.62 < 0.69 < low.error


def test_more_sweeps_are_no_worse() -> None:
    matrix = torch.randn(30, 25, dtype=F64)
    for moment in (None, random_moment(25), random_moment(25, 7)):
        errors = [sm.project(matrix, sm.BLAST(3, 6), second_moment=moment, sweeps=n).error for n in (0, 4, 40)]
        assert errors[0] >= errors[1] - 1e-12
        assert errors[0] >= errors[2] - 1e-12


def test_bad_sizes_are_refused() -> None:
    for wrong in (0, (2,), (2, 0), 2.0, True):
        with pytest.raises(StructureError, match="blocks"):
            sm.BLAST(wrong, 2)
    with pytest.raises(ShapeError, match="at most 3 x 9 blocks"):
        resolve(sm.BLAST(4, 2), (3, 9))


@pytest.mark.parametrize("shape", [(64, 64), (97, 33), (256, 688), (8, 8), (9, 300)])
def test_configurations_fit_the_budget(shape: tuple[int, int]) -> None:
    for share in (0.1, 0.25, 0.5, 1.0):
        budget = int(share * shape[0] * shape[1])
        found = list(sm.BLAST.configurations(shape, budget))
        assert all(count_parameters(member, shape) <= budget for member in found)
        assert found or budget < sum(shape) + 1


def test_learned_C15_the_published_descent_descends_and_recovers() -> None:
    """Exact rank: below 1e-6 within 60 iterations preconditioned; plain descent with too large a rank stalls."""
    generator = torch.Generator().manual_seed(15)
    matrix = torch.randn(64, 4, generator=generator, dtype=F64) @ torch.randn(4, 64, generator=generator, dtype=F64)
    target = make_target(matrix)
    factors, errors = preconditioned_descent(target, (8, 8), 4, iterations=60)
    assert errors[-1] < 1e-6
    assert float((factors.dense() - matrix).norm() / matrix.norm()) == pytest.approx(errors[-1], abs=1e-9)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    _, over = preconditioned_descent(target, (8, 8), 16, iterations=60)
    _, plain = preconditioned_descent(target, (8, 8), 16, iterations=60, precondition=False)
    assert over[-1] < 2e-2
    assert plain[-1] > 5 * over[-1]


def test_learned_C15_our_fit_ends_no_higher_in_fewer_sweeps() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(96, 96, generator=generator, dtype=F64)
    _, errors = preconditioned_descent(make_target(matrix), (4, 4), 16, iterations=60)
    assert sm.project(matrix, sm.BLAST(4, 16), sweeps=20).error <= errors[-1] + 1e-3

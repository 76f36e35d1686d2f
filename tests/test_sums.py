"""Sparse, diagonal, sums and products: projections in both norms, joint fits."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.projection.alternate import fit_sum, rank_bound
from structmat.projection.project import make_target
from structmat.projection.sparse import improve, least_squares_on, lower_bound, sparsify
from structmat.projection.target import Certificate
from structmat.structure import Structure, count_stored, resolve, to_json
from structmat.structures import from_json

F64 = torch.float64


def random_moment(size: int, rank: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    x = torch.randn(size, rank or size + 5, dtype=dtype)
    return x @ x.mH / x.shape[1]


def weighted_error(matrix: Tensor, member: Tensor, moment: Tensor) -> float:
    difference = matrix - member
    return float(torch.trace(difference @ moment @ difference.mH).real.sqrt())


# --------------------------------------------------------------------------------------------- sparse and diagonal


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_sparse_keeps_the_largest_entries(height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, height * width))
    matrix = torch.randn(height, width, dtype=F64)
    found = sm.project(matrix, sm.Sparse(nonzeros=count))
    assert found.certificate is Certificate.OPTIMAL
    kept = matrix.abs().reshape(-1).sort(descending=True).values
    assert found.error * float(matrix.norm()) == pytest.approx(float(kept[count:].norm()), abs=1e-12)
    dense = found.matrix.to_dense()
    assert int((dense != 0).sum()) == count
    assert bool(((dense == matrix) | (dense == 0)).all())
    index = found.matrix.tensors["places"]
    assert index.dtype == torch.int64
    assert bool((index.diff() > 0).all())  # every entry once, row by row


def test_weighted_sparse_against_brute_force() -> None:
    """Values are optimal on the support; the bound holds for the best of all supports, which the fit comes near."""
    ratios = []
    for _ in range(20):
        matrix, moment = torch.randn(2, 4, dtype=F64), random_moment(4)
        count = 3
        best = min(
            weighted_error(matrix, least_squares_on(mask, matrix, moment, matrix @ moment), moment)
            for chosen in itertools.combinations(range(8), count)
            for mask in [torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True).reshape(2, 4)]
        )
        target = make_target(matrix, moment)
        found = sm.project(matrix, sm.Sparse(nonzeros=count), second_moment=moment)
        reached = weighted_error(matrix, found.matrix.to_dense(), moment)
        assert 0 < lower_bound(target, count) <= best * (1 + 1e-9) <= reached * (1 + 2e-9)
        ratios.append(reached / best)
    assert sorted(ratios)[10] < 1.15


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_least_squares_on_a_support_is_optimal(rank: int | None, dtype: torch.dtype) -> None:
    matrix, moment = torch.randn(7, 9, dtype=dtype), random_moment(9, rank, dtype)
    mask = torch.rand(7, 9) < 0.4
    mask[3] = False  # an empty row
    dense = least_squares_on(mask, matrix, moment, matrix @ moment)
    assert bool((dense[~mask] == 0).all())
    gradient = ((matrix - dense) @ moment)[mask]
    assert float(gradient.abs().max()) < 1e-6 * float((matrix @ moment).abs().max())
    # A matrix on the support itself comes back, also on inputs that never occur.
    own = torch.where(mask, matrix, torch.zeros_like(matrix))
    torch.testing.assert_close(least_squares_on(mask, own, moment, own @ moment), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 5])
def test_sparse_rounds_are_monotone(rank: int | None) -> None:
    target = make_target(torch.randn(20, 16, dtype=F64), random_moment(16, rank))
    dense, mask = sparsify(target, 60, 0)
    errors = [target.error(dense)]
    for _ in range(10):
        dense, mask = improve(target, dense, mask)
        assert int(mask.sum()) == 60
        assert bool((dense[~mask] == 0).all())
        errors.append(target.error(dense))
    assert all(late <= early * (1 + 1e-12) for early, late in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_sparse_sizes() -> None:
    assert resolve(sm.Sparse(0.1), (20, 30)) == sm.Sparse(nonzeros=60)
    assert resolve(sm.Sparse(0.03), (60, 50)) == sm.Sparse(nonzeros=90)  # though 0.03 * 3000 is less in floats
    assert count_stored(sm.Sparse(nonzeros=60), (20, 30)) == 60 + 19  # one bit for each of 600 entries
    assert count_stored(sm.Sparse(nonzeros=10), (20, 30)) == 20  # a list of places is shorter
    assert from_json(to_json(sm.Sparse(nonzeros=60))) == sm.Sparse(nonzeros=60)
    with pytest.raises(StructureError, match="exactly one"):
        sm.Sparse()
    with pytest.raises(StructureError, match="exactly one"):
        sm.Sparse(0.1, 5)
    with pytest.raises(StructureError, match="nonzeros=3"):
        sm.Sparse(3)
    with pytest.raises(StructureError, match="between 0 and 1"):
        sm.Sparse(1.5)
    with pytest.raises(ShapeError, match="6 entries in all"):
        resolve(sm.Sparse(nonzeros=7), (2, 3))
    with pytest.raises(ShapeError, match="less than one of its 6 entries"):
        resolve(sm.Sparse(0.1), (2, 3))


@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 225))
def test_initial_support_is_even_and_without_repetition(height: int, width: int, count: int) -> None:
    count = min(count, height * width)
    drawn = sm.StructuredMatrix.random(sm.Sparse(nonzeros=count), (height, width)).tensors
    places = drawn["places"]
    rows = torch.bincount(places // width, minlength=height)
    assert int(rows.max() - rows.min()) <= 1
    assert places.tolist() == sorted(set(places.tolist()))
    assert int(places[0]) >= 0
    assert int(places[-1]) < height * width


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_diagonal_is_optimal(shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> None:
    matrix, moment = torch.randn(shape, dtype=dtype), random_moment(shape[1], rank, dtype)
    assert torch.equal(sm.project(matrix, sm.Diagonal()).matrix.tensors["weight"], matrix.diagonal())
    found = sm.project(matrix, sm.Diagonal(), second_moment=moment)
    assert found.certificate is Certificate.OPTIMAL
    best = weighted_error(matrix, found.matrix.to_dense(), moment)
    for _ in range(10):
        moved = sm.StructuredMatrix(
            sm.Diagonal(), shape, {k: t + 1e-2 * torch.randn_like(t) for k, t in found.matrix.tensors.items()}
        )
        assert weighted_error(matrix, moved.to_dense(), moment) >= best
    dead = torch.diag(torch.tensor([0.0] + [1.0] * (shape[1] - 1), dtype=dtype))
    assert sm.project(matrix, sm.Diagonal(), second_moment=dead).matrix.tensors["weight"][0] == matrix[0, 0]


# ------------------------------------------------------------------------------------------------------------ sums

SUMS: tuple[sm.Sum, ...] = (
    sm.SparsePlusLowRank(2, 0.1),
    sm.Sum(sm.LowRank(2), sm.BlockDiagonal(3)),
    sm.Sum(sm.Diagonal(), sm.LowRank(1), sm.Sparse(0.1)),
    sm.Sum(sm.Kronecker(2), sm.LowRank(1)),
    sm.Sum(sm.BLAST(2, 2), sm.Diagonal()),
    sm.Sum(sm.LowRank(1), sm.Sum(sm.BlockDiagonal(4), sm.Sparse(0.05))),
)


@pytest.mark.parametrize("structure", SUMS, ids=str)
@pytest.mark.parametrize("moment", ["none", "full", "singular"])
def test_sum_is_never_worse_than_its_parts(structure: sm.Sum, moment: str) -> None:
    matrix = torch.randn(17, 13, dtype=F64)
    weight = {"none": None, "full": random_moment(13), "singular": random_moment(13, 6)}[moment]
    found = sm.project(matrix, structure, second_moment=weight)
    for part in structure.parts:
        assert found.error <= sm.project(matrix, part, second_moment=weight).error * (1 + 1e-9) + 1e-12
    assert found.certificate is not Certificate.OPTIMAL
    assert found.lower_bound <= found.error * (1 + 1e-9) + 1e-12
    if weight is not None:
        plain = sm.project(matrix, structure).matrix.to_dense()
        size = weighted_error(matrix, torch.zeros_like(matrix), weight)
        assert found.error <= weighted_error(matrix, plain, weight) / size * (1 + 1e-9)
    errors = [sm.project(matrix, structure, second_moment=weight, sweeps=n).error for n in (0, 4, 40)]
    assert errors[1] <= errors[0] + 1e-12
    assert errors[2] <= errors[0] + 1e-12
    again = sm.project(matrix, structure, second_moment=weight)
    assert all(torch.equal(again.matrix.tensors[k], t) for k, t in found.matrix.tensors.items())


def test_sum_descends_monotonically() -> None:
    """One sweep more never raises the error, as long as the same start is followed."""
    for moment in (None, random_moment(20)):
        parts = tuple(resolve(part, (24, 20)) for part in (sm.LowRank(3), sm.BlockDiagonal(4)))
        errors = []
        for sweeps in (4, 5, 6, 7):  # each spends one sweep a start, then the rest
            target = make_target(_fixed((24, 20)), moment, sweeps=sweeps)
            members = fit_sum(parts, target)
            errors.append(target.error(sum(member.dense for member in members)))
        assert all(late <= early * (1 + 1e-12) for early, late in itertools.pairwise(errors))


def _fixed(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def test_robust_recovery_of_sparse_plus_low_rank() -> None:
    """Planted rank 2 and 3 % large entries in 60 x 50: found exactly, by both starts' better one."""
    low = torch.randn(60, 2, dtype=F64) @ torch.randn(2, 50, dtype=F64)
    spikes = torch.zeros(60, 50, dtype=F64)
    spikes.view(-1)[torch.randperm(3000)[:90]] = 10 * torch.randn(90, dtype=F64).sign()
    found = sm.project(low + spikes, sm.SparsePlusLowRank(2, 0.03), sweeps=200)
    assert found.error < 1e-6
    assert found.certificate is Certificate.NONE or found.lower_bound < 1e-6


def test_planted_block_diagonal_plus_low_rank() -> None:
    blocks = torch.block_diag(*(torch.randn(10, 10, dtype=F64) for _ in range(4)))
    low = torch.randn(40, 2, dtype=F64) @ torch.randn(2, 40, dtype=F64) / 6
    structure = sm.Sum(sm.LowRank(2), sm.BlockDiagonal(4))
    for moment in (None, random_moment(40)):
        found = sm.project(blocks + low, structure, second_moment=moment, sweeps=300)
        alone = sm.project(blocks + low, sm.LowRank(2 + 5), second_moment=moment)
        assert found.error < 0.02 * alone.error


@given(st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=15)
def test_rank_bound(height: int, width: int) -> None:
    for structure, most in (
        (sm.Sum(sm.LowRank(1), sm.Sparse(nonzeros=2)), 3),
        (sm.Sum(sm.LowRank(1), sm.LowRank(1)), 2),
        (sm.Product(sm.LowRank(1), sm.Dense()), 1),
        (sm.Diagonal(), min(height, width)),
    ):
        matrix = sm.StructuredMatrix.random(structure, (height, width), dtype=F64)
        bound = rank_bound(matrix.program)
        assert bound == min(most, height, width)
        assert int(torch.linalg.matrix_rank(matrix.to_dense())) <= bound


def test_two_low_rank_terms_reach_their_bound() -> None:
    matrix = torch.randn(12, 15, dtype=F64)
    found = sm.project(matrix, sm.Sum(sm.LowRank(2), sm.LowRank(3)))
    assert found.lower_bound == pytest.approx(sm.project(matrix, sm.LowRank(5)).error, rel=1e-9)
    assert found.error == pytest.approx(found.lower_bound, rel=1e-4)


def test_sum_names_json_and_nesting() -> None:
    structure = sm.Sum(sm.LowRank(2), sm.SparsePlusLowRank(1, 0.1))
    matrix = sm.StructuredMatrix.random(structure, (12, 10), dtype=F64)
    assert set(matrix.tensors) == {
        "term0_left", "term0_right", "term1_term0_left", "term1_term0_right",
        "term1_term1_values", "term1_term1_places",
    }  # fmt: skip
    parts = [sm.StructuredMatrix(sm.LowRank(2), (12, 10), {n: matrix.tensors[f"term0_{n}"] for n in ("left", "right")})]
    inner = {k.removeprefix("term1_"): t for k, t in matrix.tensors.items() if k.startswith("term1_")}
    parts.append(sm.StructuredMatrix(sm.SparsePlusLowRank(1, 0.1), (12, 10), inner))
    torch.testing.assert_close(matrix.to_dense(), parts[0].to_dense() + parts[1].to_dense())
    assert from_json(to_json(structure)) == structure
    assert from_json(to_json(matrix.structure)) == matrix.structure
    assert str(matrix.structure.parts[1]) == "Sum(parts=(LowRank(rank=1), Sparse(nonzeros=12)))"
    layer = sm.nn.StructuredLinear(10, 12, structure=structure)
    assert {name for name, _ in layer.named_buffers()} == {"term1_term1_places"}


def test_bad_sums_and_products() -> None:
    with pytest.raises(StructureError, match="at least one part"):
        sm.Sum()
    with pytest.raises(StructureError, match="all of them structures"):
        sm.Sum(sm.LowRank(2), 3)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="two structures"):
        sm.Product(sm.LowRank(2), 3)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="inner"):
        sm.Product(sm.LowRank(2), sm.Dense(), 0)
    with pytest.raises(ShapeError, match="rank is at most 8"):
        resolve(sm.Sum(sm.LowRank(9), sm.Diagonal()), (8, 10))


@pytest.mark.parametrize("family", [sm.Sum, sm.Sparse, sm.Diagonal, sm.Product])
@pytest.mark.parametrize("shape", [(64, 64), (97, 33), (256, 688), (8, 8), (9, 300)])
def test_configurations_fit_the_budget(family: type[Structure], shape: tuple[int, int]) -> None:
    for share in (0.1, 0.25, 0.5, 1.0):
        budget = int(share * shape[0] * shape[1])
        found = list(family.configurations(shape, budget))
        assert len(set(found)) == len(found)
        assert all(count_stored(member, shape) <= budget for member in found)
        assert found or budget < sum(shape) + 3


# -------------------------------------------------------------------------------------------------------- products

PRODUCTS: tuple[sm.Product, ...] = (
    sm.Product(sm.BlockDiagonal(2), sm.Dense(), 6),
    sm.Product(sm.Dense(), sm.BlockDiagonal(2), 6),
    sm.Product(sm.Diagonal(), sm.LowRank(2)),
    sm.Product(sm.BlockDiagonal(3), sm.Sparse(0.3), 9),
    sm.Product(sm.LowRank(3), sm.Product(sm.BlockDiagonal(2), sm.Diagonal())),
)


@pytest.mark.parametrize("structure", PRODUCTS, ids=str)
@pytest.mark.parametrize("moment", ["none", "full", "singular"])
def test_product_projection(structure: sm.Product, moment: str) -> None:
    matrix = torch.randn(14, 12, dtype=F64)
    weight = {"none": None, "full": random_moment(12), "singular": random_moment(12, 6)}[moment]
    errors = [sm.project(matrix, structure, second_moment=weight, sweeps=n).error for n in (0, 4, 20)]
    assert errors[1] <= errors[0] + 1e-12
    assert errors[2] <= errors[0] + 1e-12
    assert errors[2] < 1
    found = sm.project(matrix, structure, second_moment=weight)
    assert found.lower_bound <= found.error * (1 + 1e-9)
    shape = (14, 12)
    member = sm.StructuredMatrix.random(structure, shape, dtype=F64)
    inner = member.structure.inner
    sides = {}
    for side, size in (("left", (14, inner)), ("right", (inner, 12))):
        own = {k.removeprefix(f"{side}_"): t for k, t in member.tensors.items() if k.startswith(f"{side}_")}
        sides[side] = sm.StructuredMatrix(getattr(member.structure, side), size, own).to_dense()
    torch.testing.assert_close(member.to_dense(), sides["left"] @ sides["right"])


def test_product_of_dense_factors_is_low_rank() -> None:
    matrix, moment = torch.randn(14, 12, dtype=F64), random_moment(12)
    for weight in (None, moment):
        found = sm.project(matrix, sm.Product(sm.Dense(), sm.Dense(), 3), second_moment=weight)
        low = sm.project(matrix, sm.LowRank(3), second_moment=weight)
        assert found.error == pytest.approx(low.error, rel=1e-3)
        assert found.lower_bound == pytest.approx(low.error, rel=1e-9)


def test_product_with_groups_of_outputs() -> None:
    """BlockDiagonal times Dense is low rank group by group; there the closed form is known."""
    matrix = torch.randn(16, 12, dtype=F64)
    best = sum(float(torch.linalg.svdvals(rows)[2:].square().sum()) for rows in matrix.split(8)) ** 0.5
    found = sm.project(matrix, sm.Product(sm.BlockDiagonal(2), sm.Dense(), 4), sweeps=100)
    assert found.error * float(matrix.norm()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("structure", [*SUMS[:4], *PRODUCTS[:4]], ids=str)
def test_combinations_start_with_the_variance_of_a_dense_layer(structure: Structure) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (24, 36)
    draws = [sm.StructuredMatrix.random(structure, shape, generator=generator, dtype=F64) for _ in range(200)]
    mean = sum(float(m.to_dense().square().sum()) for m in draws) / len(draws) / shape[0]
    assert mean == pytest.approx(1 / 3, rel=0.1)

"""Robust principal component analysis and rigidity: recovery, failure, counting."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from benchmarks import fast_algorithms

import structmat as sm
from structmat import transforms
from structmat.errors import DataError, ShapeError

F64 = torch.float64


def planted(size: int, rank: int, density: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=generator, dtype=F64) for _ in range(2))
    sparse = torch.randn(size, size, generator=generator, dtype=F64) * rank**0.5 * 3
    sparse[torch.rand(size, size, generator=generator) >= density] = 0
    return left @ right.T, sparse


@pytest.mark.parametrize(
    ("size", "rank", "density"),
    [(100, 5, 0.05), pytest.param(200, 10, 0.10), pytest.param(400, 20, 0.05, marks=pytest.mark.slow)],
)
def test_circuits_L3_robust_pca_recovers(size: int, rank: int, density: float) -> None:
    low, sparse = planted(size, rank, density)
    found = sm.robust_pca(low + sparse)
    assert found.succeeded
    assert found.verdict.startswith("Separated into")
    assert found.steps < 40
    assert float(torch.linalg.norm(found.low_rank - low) / torch.linalg.norm(low)) < 1e-6
    assert found.rank == rank
    assert abs(found.nonzeros - int((sparse != 0).sum())) <= 0.01 * sparse.numel()
    assert 1 <= found.incoherence < size
    member = found.matrix
    error = float(torch.linalg.norm(member.to_dense() - low - sparse) / torch.linalg.norm(low + sparse))
    assert error < 1e-5
    assert isinstance(member.structure, sm.Sum)


def test_robust_pca_reports_failure() -> None:
    """The Hadamard matrix is neither: everything goes into one part, and that is said."""
    hadamard = transforms.hadamard(32).to_dense()
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    for matrix in (hadamard, noise, torch.eye(32, dtype=F64)):
        found = sm.robust_pca(matrix)
        assert not found.succeeded
        assert "separat" in found.verdict.lower()
        torch.testing.assert_close(found.low_rank + found.sparse, matrix, rtol=0, atol=1e-4)
    assert sm.robust_pca(torch.zeros(3, 4)).rank == 0


@pytest.mark.parametrize("size", [8, 16])
def test_circuits_L2_rigidity_of_the_hadamard_matrix(size: int) -> None:
    """No fewer than ``n^2 / (4 r)`` changes are found, and the same number is proved necessary."""
    found = sm.rigidity(transforms.hadamard(size).to_dense(), ranks=[1, 2, 4])
    for rank, low, high in zip(found.ranks, found.lower, found.upper, strict=True):
        assert low >= size**2 // (4 * rank)
        assert high >= low
        assert found.numbers(rank) >= size**1.5
    assert found.rank == size


@pytest.mark.parametrize("seed", range(10))
def test_rigidity_of_small_integer_matrices(seed: int) -> None:
    """Rank 0 needs every nonzero entry changed; rank 2 of a regular 3 x 3 matrix one, with a cofactor that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-2, 3, (3, 3), generator=generator).to(F64)
    found = sm.rigidity(matrix, ranks=[0, 1, 2])
    nonzeros, regular = int((matrix != 0).sum()), abs(float(torch.linalg.det(matrix))) > 1e-9
    assert (found.lower[0], found.upper[0]) == (nonzeros, nonzeros)
    assert found.lower[1] <= found.upper[1] <= nonzeros
    assert (found.lower[2], found.upper[2]) == (int(regular), int(regular))
    # Any 2 x 2 minor that is not 0 needs a change of its own; 4 changes are enough, in a row and a column's rest.
    assert found.upper[1] <= 4


def test_rigidity_of_low_rank_plus_sparse() -> None:
    low, _ = planted(16, 2, 0.0)
    matrix = low.clone()
    for i, j in ((0, 3), (5, 5), (11, 2)):
        matrix[i, j] += 5.0
    found = sm.rigidity(matrix, ranks=[2, 5])
    assert found.upper == (3, 0)
    assert 1 <= found.lower[0] <= 3
    assert "at most" in str(found)


def test_rigidity_takes_ranks_in_any_order() -> None:
    """What was found for a higher rank says nothing of a lower one."""
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ordered, other = sm.rigidity(matrix, ranks=[1, 2, 5]), sm.rigidity(matrix, ranks=[5, 1, 2, 1])
    assert (other.ranks, other.lower, other.upper) == (ordered.ranks, ordered.lower, ordered.upper)
    assert ordered.upper[0] >= 25  # a generic matrix needs (n - r)^2


@pytest.mark.parametrize("rank", [-1, 7, 1.5])
def test_rigidity_refuses_ranks_that_there_are_not(rank: float) -> None:
    with pytest.raises(ShapeError, match="from 0 to 6"):
        sm.rigidity(torch.eye(6), ranks=[rank])  # type: ignore[list-item]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_robust_pca_refuses_weights(weight: float) -> None:
    with pytest.raises(DataError, match="above 0"):
        sm.robust_pca(torch.eye(4), weight=weight)


def test_rigidity_plot() -> None:
    pytest.importorskip("matplotlib")
    axes = sm.rigidity(transforms.hadamard(4).to_dense()).plot()
    assert axes.get_xlabel() == "rank"


@pytest.mark.parametrize("size", [8, 64])
def test_circuits_L1_closed_forms(size: int) -> None:
    """Root mean square errors of a flat unitary matrix: sparse and low rank at the budget of a butterfly."""
    matrix = transforms.hadamard(size).to_dense() / size**0.5
    levels = size.bit_length() - 1
    count = min(2 * size * levels, size * size - 1)
    sparse = sm.project(matrix, sm.Sparse(nonzeros=count)).error / size**0.5
    assert sparse == pytest.approx(((1 - count / size**2) / size) ** 0.5, rel=1e-9)
    low = sm.project(matrix, sm.LowRank(levels)).error / size**0.5
    assert low == pytest.approx(((1 - levels / size) / size) ** 0.5, rel=1e-9)
    if size == 64:
        assert (round(sparse, 4), round(low, 4)) == (0.1127, 0.1190)


PUBLISHED = {  # (Dao et al., ICML 2019): sizes 8, 16, 32, ..., at 2 N log2 N entries, and at rank log2 N
    "dct": (".107 .164 .167 .143 .111 .0829", ".395 .306 .230 .168 .122 .0870"),
    "dst": (".107 .164 .167 .143 .111 .0829", ".395 .306 .230 .168 .122 .0870"),
    "hadamard": (".177 .177 .147 .113 .0834 .0605", ".280 .217 .162 .119 .0859 .0615"),
    "hartley": (".125 .134 .117 .0997 .0782 .0585", ".280 .217 .162 .119 .0859 .0615"),
    "legendre": (".0190 .0243 .0184 .0119 .0071 .0041", ".0635 .0433 .0267 .0157 .0089 .0050"),
    "hilbert": (".0246 .0186 .0115 .0066 .0036 .0020", "1.1e-4 1.7e-5 3.8e-6 1.0e-6 3.2e-7 1.1e-7"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_circuits_L1_published_baselines(name: str) -> None:
    """The rows of the study's tables that no random matrix enters, to the digits that they have."""
    for column, published in enumerate(PUBLISHED[name]):
        for place, printed in enumerate(published.split()):
            size, levels = 8 << place, 3 + place
            wanted = fast_algorithms.target(name, size)
            structure = sm.LowRank(levels) if column else sm.Sparse(nonzeros=2 * size * levels)
            found = sm.project(wanted, structure).error * float(torch.linalg.norm(wanted)) / size
            unit = 10.0 ** int(Decimal(printed).as_tuple().exponent)
            assert found == pytest.approx(float(printed), rel=0, abs=0.6 * unit), (size, column)


def test_sparse_plus_low_rank_is_projected_by_robust_pca() -> None:
    """Members come back where the conditions hold; where they do not the method says so."""
    low, sparse = planted(100, 5, 0.05)
    structure = sm.SparsePlusLowRank(rank=5, density=0.06)
    found = sm.project(low + sparse, structure)
    assert "Separated into rank 5" in found.method
    assert found.error < 1e-9
    part = found.matrix.tensors["term0_left"] @ found.matrix.tensors["term0_right"]
    assert float(torch.linalg.norm(part - low) / torch.linalg.norm(low)) < 1e-7
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    failed = sm.project(noise, sm.SparsePlusLowRank(rank=2, density=0.1))
    assert "robust principal component analysis" in failed.method
    assert "Separated" not in failed.method
    weighted = sm.project(noise, sm.SparsePlusLowRank(rank=2, density=0.1), second_moment=noise @ noise.T)
    assert weighted.method.startswith("alternating projections")

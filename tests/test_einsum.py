"""The two-factor einsum family and block tensor trains (C16)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.errors import StructureError
from structmat.structures.einsum import NAMED, Einsum, search

SIZES = [
    (2, 3, 4, 2, 2, 3),
    (3, 1, 2, 1, 3, 2),
    (4, 2, 1, 2, 4, 1),
    (1, 2, 3, 3, 2, 1),
    (2, 2, 2, 2, 2, 2),
    (5, 1, 1, 1, 4, 1),
]


def by_definition(first: Tensor, second: Tensor, sizes: tuple[int, ...], rank: int, x: Tensor) -> Tensor:
    a, b, g, d, e, f = sizes
    A, B = first.reshape(g, f, d, rank, a), second.reshape(f, e, rank, g, b)
    z = torch.einsum("gfdra,gba->fdrgb", A, x.reshape(g, b, a))
    return torch.einsum("fergb,fdrgb->fed", B, z).reshape(-1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_learned_C16_einsum_counts_rank_and_values(sizes: tuple[int, ...], rank: int) -> None:
    a, b, g, d, e, f = sizes
    shape = (d * e * f, a * b * g)
    structure = Einsum(rank=rank, sizes=sizes)
    member = sm.StructuredMatrix.random(
        structure, shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    told = structure.taxonomy(shape)
    assert member.num_parameters == told.parameters == rank * (f * d * g * a + f * e * g * b)
    assert member.macs == told.macs == rank * (a * b * g * d * f + b * g * d * e * f)
    found = int(torch.linalg.matrix_rank(member.to_dense()))
    assert found == min(told.rank, *shape)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = by_definition(member.tensors["first"], member.tensors["second"], sizes, rank, x)
    torch.testing.assert_close(member @ x, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(4, 1, 4, 1, 4, 4), (2, 1, 5, 1, 3, 4), (2, 3, 2, 3, 2, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_learned_C16_projection_is_optimal(sizes: tuple[int, ...], rank: int) -> None:
    """With shared axes and without: no perturbation of the factors is better."""
    a, b, g, d, e, f = sizes
    g_ = torch.Generator().manual_seed(16)
    weight = torch.randn(d * e * f, a * b * g, generator=g_, dtype=torch.float64)
    found = sm.project(weight, Einsum(rank=rank, sizes=sizes))
    assert found.certificate.value == "optimal"
    best = float((weight - found.matrix.to_dense()).norm())
    for _ in range(50):
        moved = {
            k: t + 0.05 * torch.randn(t.shape, generator=g_, dtype=torch.float64)
            for k, t in found.matrix.tensors.items()
        }
        other = sm.StructuredMatrix(found.matrix.structure, tuple(weight.shape), moved)
        assert float((weight - other.to_dense()).norm()) >= best - 1e-12


def test_learned_C16_block_tensor_train_of_rank_one_is_monarch() -> None:
    """The same sets of matrices up to the order of the outputs, so equally near to any matrix."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    train = sm.project(weight, sm.BlockTensorTrain(1, (4, 4), (4, 4)))
    einsum = sm.project(weight, Einsum(NAMED["Monarch"], 1))
    assert train.error == pytest.approx(einsum.error, rel=1e-10)
    order = torch.arange(16).reshape(4, 4).T.flatten()
    shuffled = torch.empty_like(weight)
    shuffled[order] = weight
    monarch = sm.project(shuffled, sm.Monarch(4, 1))
    assert monarch.error == pytest.approx(train.error, rel=1e-10)
    assert monarch.matrix.num_parameters == train.matrix.num_parameters == 2 * 4 * 16


def test_learned_C16_taxonomy_of_named_members() -> None:
    """Exponents of square members: sharing, rank and compute, as the paper tabulates them."""
    shape = (256, 256)
    monarch = Einsum(NAMED["Monarch"], 1).taxonomy(shape)
    assert (monarch.omega, monarch.psi, monarch.nu) == pytest.approx((0.0, 1.0, 0.5))
    kronecker = Einsum(NAMED["Kronecker"], 1).taxonomy(shape)
    assert (kronecker.omega, kronecker.psi, kronecker.nu) == pytest.approx((0.5, 1.0, 0.5))
    low = Einsum(NAMED["low rank"], 16).taxonomy(shape)
    assert (low.omega, low.psi, low.nu) == pytest.approx((0.0, 0.5, 0.5))
    assert low.rank == 16
    assert monarch.macs == monarch.parameters == 2 * 256**1.5
    assert kronecker.sharing == 16
    assert "omega=0.50" in str(kronecker)
    assert low.parameters == 2 * 16 * 256


def test_low_rank_is_a_member() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert sm.project(weight, Einsum(NAMED["low rank"], 3)).error == pytest.approx(
        sm.project(weight, sm.LowRank(3)).error, rel=1e-10
    )


def test_search_finds_what_was_planted() -> None:
    member = sm.StructuredMatrix.random(
        Einsum((0.5, 0.25, 0.25, 0.25, 0.5, 0.25), 1),
        (16, 16),
        generator=torch.Generator().manual_seed(5),
        dtype=torch.float64,
    )
    budget = member.num_parameters
    found = search(member.to_dense(), budget, sweeps=8)
    assert found[0].error < 1e-6
    assert all(f.taxonomy.parameters <= budget for f in found)
    assert [f.error for f in found] == sorted(f.error for f in found)
    assert found[-1].error > 0.1


def test_bad_exponents() -> None:
    with pytest.raises(StructureError, match="each triple sums to 1"):
        Einsum((0.5, 0.2, 0.2, 0, 0.5, 0.5))
    with pytest.raises(StructureError, match="six sizes"):
        Einsum(sizes=(1, 2, 3))

"""Structures one above the other: equal to their parts, fitted part by part, in any order of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.projection.target import Certificate
from structmat.structure import count_stored, resolve, to_json
from structmat.structures import from_json
from structmat.testing import CHECKS, check_structure

F64 = torch.float64
PARTS = (sm.LowRank(2), sm.Dense(), sm.Sparse(nonzeros=9))


def seeded(index: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(index)


def gram(size: int, index: int) -> Tensor:
    x = torch.randn(size + 5, size, generator=seeded(index), dtype=F64)
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (sm.Stacked(PARTS, (3, 5, 1)), (9, 10)),
        (sm.Stacked((sm.LowRank(2), sm.Monarch(2), sm.Butterfly()), (2, 1, 1), groups=4), (16, 12)),
        (sm.Stacked((sm.LowRank(0.5), sm.BlockDiagonal(3))), (14, 9)),
        (sm.Stacked((sm.Stacked((sm.LowRank(1), sm.Diagonal())), sm.Toeplitz()), (4, 3)), (7, 6)),
        (sm.Stacked((sm.LowRank(1),), groups=3), (6, 4)),
    ],
    ids=str,
)
def test_the_contract_holds_for_uneven_grouped_and_nested_stacks(structure: sm.Stacked, shape: tuple[int, int]) -> None:
    check_structure(structure, shape, groups=[g for g in CHECKS if g not in ("compile", "inductor", "export", "onnx")])


def test_rows_of_the_whole_are_those_of_the_parts() -> None:
    """Interleaved groups: of each three rows one is of the first part and two of the second."""
    matrix = sm.StructuredMatrix.random(
        sm.Stacked((sm.LowRank(2), sm.Dense()), (1, 2), groups=4), (12, 5), generator=seeded(), dtype=F64
    )
    first = matrix.tensors["part0_left"] @ matrix.tensors["part0_right"]
    second = matrix.tensors["part1_weight"]
    wanted = torch.stack([first[g // 3] if g % 3 == 0 else second[2 * (g // 3) + g % 3 - 1] for g in range(12)])
    torch.testing.assert_close(matrix.to_dense(), wanted)
    x = torch.randn(5, generator=seeded(1), dtype=F64)
    torch.testing.assert_close(matrix @ x, wanted @ x)
    torch.testing.assert_close(matrix.T.to_dense(), wanted.T)
    assert matrix.num_parameters == 2 * (4 + 5) + 8 * 5


@pytest.mark.parametrize("groups", [1, 2])
def test_a_projection_is_that_of_each_part(groups: int) -> None:
    weight = torch.randn(18, 10, generator=seeded(), dtype=F64)
    moment = gram(10, 1)
    structure = sm.Stacked(PARTS, (3, 5, 1) if groups == 2 else (9, 5, 4), groups)
    found = sm.project(weight, structure, second_moment=moment)
    squares = 0.0
    for part, index in zip(PARTS, resolve(structure, (18, 10)).places(), strict=True):  # type: ignore[attr-defined]
        own = sm.project(weight[index], part, second_moment=moment)
        torch.testing.assert_close(found.matrix.to_dense()[index], own.matrix.to_dense())
        squares += (own.error * float(torch.linalg.norm(weight[index] @ torch.linalg.cholesky(moment)))) ** 2
    whole = float(torch.linalg.norm(weight @ torch.linalg.cholesky(moment)))
    assert found.error == pytest.approx(squares**0.5 / whole, rel=1e-6)
    plain = sm.project(weight, structure)
    assert plain.certificate is Certificate.OPTIMAL, "all parts are, and rows add up"
    assert plain.error == pytest.approx(plain.lower_bound)


def test_outputs_that_weigh_apart_keep_the_certificate_and_coupled_ones_are_fitted_together() -> None:
    weight, moment = torch.randn(12, 8, generator=seeded(), dtype=F64), gram(8, 1)
    structure = sm.Stacked((sm.LowRank(2), sm.LowRank(3)))
    apart = torch.block_diag(gram(6, 2), gram(6, 3))
    found = sm.project(weight, structure, second_moment=moment, output_moment=apart)
    assert found.certificate is Certificate.OPTIMAL
    for seed in range(20):
        other = sm.StructuredMatrix.random(structure, (12, 8), generator=seeded(seed), dtype=F64).to_dense()
        near = found.matrix.to_dense() + 1e-3 * other
        near = sm.project(near, structure).matrix.to_dense()
        difference = weight - near
        assert float(torch.trace(difference.T @ apart @ difference @ moment)) >= (
            found.error**2 * float(torch.trace(weight.T @ apart @ weight @ moment)) * (1 - 1e-9)
        )
    coupled = apart + 0.9 * gram(12, 4)
    together = sm.project(weight, structure, second_moment=moment, output_moment=coupled)
    quick = sm.project(weight, structure, second_moment=moment, output_moment=coupled, sweeps=0)
    assert together.certificate is Certificate.NONE
    assert together.error < quick.error


def test_what_is_soft_in_a_part_hardens() -> None:
    structure = sm.Stacked((sm.SoftPermutation(), sm.LowRank(2)), (8, 8))
    layer = sm.nn.StructuredLinear(8, 16, structure=structure, generator=seeded())
    penalty = layer.structure.penalty((16, 8), layer.tensors())
    assert penalty is not None
    assert float(penalty.detach()) > 0
    hard = layer.harden()
    assert isinstance(hard.structure, sm.Stacked)
    assert not isinstance(hard.structure.parts[0], sm.SoftPermutation)
    assert hard.structure.parts[1] == sm.LowRank(2)
    assert bool(((hard.matrix.to_dense()[:8] == 0) | (hard.matrix.to_dense()[:8] == 1)).all())


def test_a_dense_stack_is_the_layer_and_is_frozen_and_written_out_as_such() -> None:
    linear = nn.Linear(8, 12)
    layer = sm.nn.StructuredLinear.from_linear(linear, sm.Stacked((sm.Dense(), sm.Dense(), sm.LowRank(4))))
    x = torch.randn(5, 8, generator=seeded())
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.freeze()(x), linear(x))
    torch.testing.assert_close(layer.to_linear()(x), linear(x))


def test_sizes_and_json() -> None:
    structure = sm.Stacked((sm.LowRank(0.5), sm.Dense()), (8, 4))
    resolved = resolve(structure, (12, 8))
    assert resolved == sm.Stacked((sm.LowRank(2), sm.Dense()), (8, 4))
    assert resolve(sm.Stacked((sm.LowRank(1),) * 3), (12, 8)) == sm.Stacked((sm.LowRank(1),) * 3, (4, 4, 4))
    assert count_stored(resolved, (12, 8)) == 2 * 16 + 32
    assert from_json(to_json(resolved)) == resolved
    with pytest.raises(StructureError, match="at least one part"):
        sm.Stacked(())
    with pytest.raises(StructureError, match=r"2 parts and rows=\(1, 2, 3\) of 3"):
        sm.Stacked((sm.Dense(), sm.Dense()), (1, 2, 3))
    with pytest.raises(StructureError, match="rows is an integer"):
        sm.Stacked((sm.Dense(), sm.Dense()), (1, 0))
    with pytest.raises(ShapeError, match="12 rows are not 5 equal parts"):
        resolve(sm.Stacked((sm.LowRank(1),) * 5), (12, 8))
    with pytest.raises(ShapeError, match=r"2 groups of \(4, 1\) rows are 10 in all. Give rows that are 12"):
        resolve(sm.Stacked((sm.LowRank(1), sm.Dense()), (4, 1), 2), (12, 8))
    with pytest.raises(ShapeError, match="rank is at most 4"):
        resolve(sm.Stacked((sm.LowRank(5), sm.Dense()), (4, 8)), (12, 8))

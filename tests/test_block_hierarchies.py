"""HODLR with and without nested bases, and two-level block low rank, against blocks cut out of dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.program.padding import padding_factor
from structmat.projection.target import Certificate
from structmat.structure import Shape

F64 = torch.float64


def gaussian(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


def off_diagonal(matrix: Tensor, levels: int) -> list[Tensor]:
    """All off-diagonal blocks, by halving."""
    if levels == 0:
        return []
    m, n = matrix.shape[0] // 2, matrix.shape[1] // 2
    below, above = off_diagonal(matrix[:m, :n], levels - 1), off_diagonal(matrix[m:, n:], levels - 1)
    return [matrix[m:, :n], matrix[:m, n:], *below, *above]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (48, 32)], ids=str)
def test_off_diagonal_blocks_have_low_rank(nested: bool, shape: Shape) -> None:
    matrix = sm.StructuredMatrix.random(sm.HODLR(3, 2, nested), shape, dtype=F64)
    for block in off_diagonal(matrix.to_dense(), 3):
        assert int(torch.linalg.matrix_rank(block, rtol=1e-10)) == 2
    if nested:  # whole block rows too
        dense = matrix.to_dense()
        height, width = shape[0] // 8, shape[1] // 8
        for k in range(8):
            rows = dense[k * height : (k + 1) * height].clone()
            rows[:, k * width : (k + 1) * width] = 0
            assert int(torch.linalg.matrix_rank(rows, rtol=1e-10)) == 2


def test_projection_of_hodlr_is_the_tail() -> None:
    weight = gaussian(24, 40)
    found = sm.project(weight, sm.HODLR(2, 3))
    squared = sum(float((torch.linalg.svdvals(b)[3:] ** 2).sum()) for b in off_diagonal(weight, 2))
    assert found.certificate is Certificate.OPTIMAL
    assert found.error == pytest.approx((squared / float(weight.square().sum())) ** 0.5)
    nested = sm.project(weight, sm.HODLR(2, 3, nested=True))
    assert nested.certificate is Certificate.BOUND
    assert nested.lower_bound == pytest.approx(found.error)
    assert found.error <= nested.error <= 1
    assert nested.error <= sm.project(weight, sm.HODLR(2, 3, nested=True), sweeps=0).error


@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (50, 37), (9, 8)], ids=str)
@pytest.mark.parametrize(
    "structure", [sm.HODLR(2, 2), sm.HODLR(3, 1, nested=True), sm.HODLR(2, 2, nested=True)], ids=str
)
def test_members_are_recovered(structure: sm.HODLR, shape: Shape) -> None:
    matrix = sm.StructuredMatrix.random(structure, shape, dtype=F64)
    assert sm.project(matrix.to_dense(), structure, sweeps=0).error < 1e-10


@pytest.mark.parametrize(
    ("structure", "shape", "factor"),
    [
        (sm.HODLR(6, 1, nested=True), (1024, 1024), 1.0),
        (sm.HODLR(3, 2, nested=True), (64, 64), 1.0),
        (sm.HODLR(2, 1, nested=True), (13, 17), (20 / 17) ** 0.5),
    ],
    ids=str,
)
def test_fresh_nested_matrices_are_scaled_for_padding_alone(structure: sm.HODLR, shape: Shape, factor: float) -> None:
    """Products of many Gaussian numbers have heavy tails: a sample of them tells little of their variance."""
    assert padding_factor(structure, shape)[0] == pytest.approx(factor, rel=1e-12)


def test_smooth_kernels_are_nearly_hodlr() -> None:
    """What the class is for: interactions that are smooth away from the diagonal. Nested bases take fewer numbers."""
    x = torch.linspace(0, 1, 128, dtype=F64)
    kernel = 1 / (1 + 50 * (x[:, None] - x).abs())
    plain, nested = sm.project(kernel, sm.HODLR(4, 6)), sm.project(kernel, sm.HODLR(4, 6, nested=True))
    assert plain.error < 1e-5
    assert nested.error < 1e-3
    assert nested.matrix.num_parameters < plain.matrix.num_parameters < kernel.numel() / 1.5
    assert sm.project(kernel, sm.LowRank(6)).error > 1e-2


def test_hodlr_refuses() -> None:
    with pytest.raises(ShapeError, match="halved"):
        sm.StructuredMatrix.random(sm.HODLR(4, 1), (8, 8))
    with pytest.raises(ShapeError, match="rank"):
        sm.StructuredMatrix.random(sm.HODLR(1, 9), (8, 8))
    with pytest.raises(StructureError, match="nested"):
        sm.HODLR(1, 1, nested=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(24, 30), (25, 31)], ids=str)
def test_block_low_rank(shape: Shape) -> None:
    structure = sm.BlockLowRank((3, 4), 2)
    matrix = sm.StructuredMatrix.random(structure, shape, dtype=F64)
    dense = matrix.to_dense()
    height, width = -(-shape[0] // 4), -(-shape[1] // 3)
    for i in range(4):
        for j in range(3):
            block = dense[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert int(torch.linalg.matrix_rank(block, rtol=1e-10)) == 2
    weight = gaussian(*shape)
    found = sm.project(weight, structure)
    squared = 0.0
    for i in range(4):
        for j in range(3):
            block = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            squared += float((torch.linalg.svdvals(block)[2:] ** 2).sum())
    assert found.error == pytest.approx((squared / float(weight.square().sum())) ** 0.5)
    assert sm.project(dense, structure, sweeps=0).error < 1e-12
    with pytest.raises(StructureError, match="pair"):
        sm.BlockLowRank((1, 2, 3))  # type: ignore[arg-type]

"""Operators and stages found: members with nodes, subdiagonals, switches and diagonals of their own are given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.projection.found_operators import cauchy_angles, corners, subdiagonals, vandermonde_nodes
from structmat.projection.found_stages import (
    fastfood_tensors,
    kaleidoscope_factors,
    relaxed_factors,
    switch_logits,
)
from structmat.projection.found_tridiagonals import tridiagonal_members
from structmat.projection.simultaneous import factor_grid

F64, C128 = torch.float64, torch.complex128


def drawn(*sizes: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(structure: sm.Structure, shape: tuple[int, int], seed: int, by: float = 0.2) -> sm.StructuredMatrix:
    """A member with every learned number changed."""
    generator = torch.Generator().manual_seed(seed)
    made = sm.StructuredMatrix.random(structure, shape, generator=generator, dtype=F64)
    tensors = {
        name: t * (1 + by * (2 * torch.rand(t.shape, generator=generator, dtype=F64) - 1))
        if t.is_floating_point()
        else t
        for name, t in made.tensors.items()
    }
    return sm.StructuredMatrix(made.structure, made.shape, tensors)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(32, 32), (24, 37), (40, 26)])
@pytest.mark.parametrize("family", [sm.CauchyLike, sm.VandermondeLike, sm.LDRSubdiagonal])
def test_members_with_operators_of_their_own_are_projected_exactly(
    family: type[sm.CauchyLike] | type[sm.VandermondeLike] | type[sm.LDRSubdiagonal], shape: tuple[int, int], rank: int
) -> None:
    matrix = moved(family(rank=rank), shape, seed=rank).to_dense()
    assert sm.project(matrix, family(rank=rank), sweeps=0).error < 1e-12
    assert sm.project(matrix, family(rank=rank + 1), sweeps=0).error < 1e-12, "a rank too many"
    if rank > 1:
        assert sm.project(matrix, family(rank=rank - 1), sweeps=0).error > 1e-3


def test_nodes_are_found_up_to_maps_of_the_line() -> None:
    """The cross ratios of four nodes are the ones that went in."""
    s, t = drawn(20, seed=0), drawn(20, seed=1)
    matrix = (drawn(20, 2, seed=2) @ drawn(2, 20, seed=3)) / (s[:, None] - t)
    found = cauchy_angles(matrix, 2)
    assert found is not None

    def ratio(x: Tensor) -> Tensor:
        a, b, c, d = x
        return (a - c) * (b - d) / ((a - d) * (b - c))

    for four in range(0, 20, 4):
        for angles, nodes in zip(found, (s, t), strict=True):
            torch.testing.assert_close(
                ratio(angles[four : four + 4].tan()), ratio(nodes[four : four + 4]), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("dtype", [F64, C128])
def test_vandermonde_nodes_are_found_as_they_are(dtype: torch.dtype) -> None:
    nodes = drawn(16, seed=0, dtype=dtype)
    nodes = nodes / nodes.abs() * torch.linspace(0.3, 0.9, 16, dtype=F64)
    roots = torch.exp(1j * torch.pi * (2 * torch.arange(24, dtype=F64) + 1) / 24)
    twisted = torch.zeros(24, 24, dtype=F64).to(dtype)
    twisted.diagonal(-1).fill_(1.0)
    twisted[0, -1] = -1.0
    low = drawn(16, 3, seed=1, dtype=dtype) @ drawn(3, 24, seed=2, dtype=dtype)
    assert float((nodes[:, None] - roots).abs().min()) > 0.05
    matrix = torch.stack(
        [
            torch.linalg.solve((d * torch.eye(24, dtype=dtype) - twisted).mT, row)
            for d, row in zip(nodes, low, strict=True)
        ]
    )
    found = vandermonde_nodes(matrix, 3)
    assert found is not None
    torch.testing.assert_close(found, nodes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_tridiagonal_operators_are_found(seed: int, rank: int) -> None:
    """All bands and corners, a fifth from those of the shift."""
    generator = torch.Generator().manual_seed(seed)
    structure = sm.LDRTridiagonal(rank=rank)
    made = sm.StructuredMatrix.random(structure, (24, 24), generator=generator, dtype=F64)
    tensors = {
        name: t + 0.2 * (2 * torch.rand(t.shape, generator=generator, dtype=F64) - 1)
        for name, t in made.tensors.items()
    }
    matrix = sm.StructuredMatrix(structure, (24, 24), tensors).to_dense()
    found = tridiagonal_members(matrix, rank)
    assert found is not None
    assert distance(sm.StructuredMatrix(structure, (24, 24), found).to_dense(), matrix) < 1e-11
    assert sm.project(matrix, sm.LDRTridiagonal(rank=rank), sweeps=0).error < 1e-11
    assert sm.project(matrix, sm.LDRTridiagonal(rank=rank + 1), sweeps=0).error < 1e-11, "a rank too many"
    assert tridiagonal_members(drawn(24, 24, seed=seed), rank) is None


def test_corners_of_learned_operators_are_found() -> None:
    member = moved(sm.LDRSubdiagonal(rank=2), (24, 24), seed=4)
    tensors = dict(member.tensors)
    tensors["left_operator"][-1], tensors["right_operator"][-1] = 0.7, -0.4
    matrix = sm.StructuredMatrix(member.structure, member.shape, tensors).to_dense()
    found = subdiagonals(matrix, 2)
    assert found is not None
    one, other = corners(matrix, *found, 2)
    # What is known is the product of all that is below the diagonals with both corners.
    wanted = tensors["left_operator"].prod() * tensors["right_operator"].prod()
    assert float(found[0].prod() * found[1].prod() * one * other / wanted) == pytest.approx(1.0, rel=1e-6)
    assert sm.project(matrix, sm.LDRSubdiagonal(rank=2), sweeps=0).error < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_noise_has_no_operators(seed: int) -> None:
    noise = drawn(32, 32, seed=seed)
    for rank in (1, 2, 3):
        assert cauchy_angles(noise, rank) is None
        assert vandermonde_nodes(noise, rank) is None
        assert subdiagonals(noise, rank) is None


def test_fastfood_comes_back_with_signs_on_both_sides() -> None:
    member = moved(sm.Fastfood(), (32, 32), seed=0)
    signs = torch.sign(drawn(32, seed=5))
    tensors = {**member.tensors, "scales": member.tensors["scales"] * signs}
    matrix = sm.StructuredMatrix(member.structure, member.shape, tensors).to_dense()
    found = fastfood_tensors(matrix)
    assert found is not None
    assert distance(sm.StructuredMatrix(sm.Fastfood(), (32, 32), found).to_dense(), matrix) < 1e-13
    other = fastfood_tensors(drawn(32, 32, seed=6))
    assert other is None or distance(sm.StructuredMatrix(sm.Fastfood(), (32, 32), other).to_dense(), matrix) > 0.1


@pytest.mark.parametrize("size", [4, 16, 64])
def test_switches_come_back(size: int) -> None:
    matrix = moved(sm.SoftPermutation(), (size, size), seed=size).to_dense()
    found = sm.StructuredMatrix(sm.SoftPermutation(), (size, size), switch_logits(matrix))
    assert distance(found.to_dense(), matrix) < 1e-11


@pytest.mark.parametrize("size", [4, 32, 128])
def test_kaleidoscopes_come_back(size: int) -> None:
    matrix = moved(sm.Kaleidoscope(), (size, size), seed=1).to_dense()
    found = kaleidoscope_factors(matrix)
    assert found is not None
    assert distance(sm.StructuredMatrix(sm.Kaleidoscope(), (size, size), found).to_dense(), matrix) < 1e-10


@pytest.mark.parametrize(("size", "seed"), [(4, 0), (8, 1), (16, 2), (32, 0), (32, 1), (32, 2), (32, 3), (64, 4)])
def test_relaxed_permutations_come_back(size: int, seed: int) -> None:
    matrix = moved(sm.RelaxedButterfly(), (size, size), seed=seed, by=0.0).to_dense()
    found = relaxed_factors(matrix)
    assert found is not None
    assert distance(sm.StructuredMatrix(sm.RelaxedButterfly(), (size, size), found).to_dense(), matrix) < 1e-12
    if size > 4:
        assert relaxed_factors(drawn(size, size, seed=seed)) is None


def test_relaxed_permutations_with_nearly_no_inverse_come_back() -> None:
    """Logits of a hundredth multiply by two hundred what is odd under a reversal: at each level in turn, and at all."""
    member = moved(sm.RelaxedButterfly(), (32, 32), seed=3, by=0.0)
    for levels in ([0], [1], [2], [3], [0, 1, 2, 3]):
        logits = member.tensors["logits0"].clone()
        for level in levels:
            logits[level, 1] = 0.01 * (1 + level)
        matrix = sm.StructuredMatrix(member.structure, member.shape, {**member.tensors, "logits0": logits}).to_dense()
        found = relaxed_factors(matrix)
        if len(levels) == 1:
            assert found is not None, levels
        if found is not None:
            assert distance(sm.StructuredMatrix(sm.RelaxedButterfly(), (32, 32), found).to_dense(), matrix) < 1e-12


def test_grids_with_a_bad_first_block_are_factored() -> None:
    """Everything goes through one row and one column of the grid: not through a block that is nearly singular."""
    left, middle, right = drawn(3, 4, 4, seed=0), drawn(3, 3, 4, seed=1), drawn(3, 4, 4, seed=2)
    middle[0, 0, 0] = 1e-13
    blocks = (left[:, None] * middle[:, :, None, :]) @ right[None]
    found = factor_grid(blocks)
    assert found is not None
    assert distance(found.blocks, blocks) < 1e-11


def test_a_matrix_of_zeros_has_no_operators() -> None:
    zeros = torch.zeros(8, 8, dtype=torch.float64)
    assert tridiagonal_members(zeros, 1) is None
    for structure in (sm.LDRTridiagonal(rank=1), sm.LDRSubdiagonal(rank=1), sm.CauchyLike(rank=1)):
        assert sm.project(zeros, structure).error == 0.0

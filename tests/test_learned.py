"""Initialisation and whitening identities of the notes on learned structure (C17, C18)."""

from __future__ import annotations

import market
import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.structure import DENSE_GAIN, Shape, Structure

SHAPE: Shape = (96, 128)
INPUTS = 4096


def output_rms(structure: Structure, draws: int, shape: Shape = SHAPE) -> float:
    """Root mean square of the outputs for Gaussian inputs of unit variance, over fresh matrices."""
    generator = torch.Generator().manual_seed(17)
    total = 0.0
    for _ in range(draws):
        matrix = sm.StructuredMatrix.random(structure, shape, generator=generator)
        x = torch.randn(shape[1], INPUTS // draws, generator=generator)
        total += float((matrix @ x).square().mean())
    return (total / draws) ** 0.5


SQUARE: Shape = (128, 128)
"""For families of square matrices alone."""


def one_a_family() -> list[tuple[Structure, Shape]]:
    """A small member of every family that keeps the variance; where its sizes are those of another shape, the smallest
    that the family proposes here."""
    found = []
    for member, _ in market.one_a_family(SHAPE):
        if member.keeps_variance:
            fitting = [(member, shape) for shape in (SHAPE, SQUARE) if member.restriction(shape) is None]
            found += fitting[:1] or [(s, SHAPE) for s in market.proposals(type(member), SHAPE)[:1]]
    return found


@pytest.mark.parametrize(("structure", "shape"), one_a_family(), ids=str)
def test_learned_C17_fan_in_initialisation_keeps_the_dense_output(structure: Structure, shape: Shape) -> None:
    """Output rms within 5 % of a dense layer's. The inputs are spread over many matrices: one alone varies."""
    wanted = DENSE_GAIN**0.5 if structure.closed_under_scaling else 1.0
    assert output_rms(structure, 512, shape) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_learned_C17_low_rank(rank: int) -> None:
    """A bottleneck does not shrink the output: that is the fan-in convention, not the spectral one."""
    assert output_rms(sm.LowRank(rank), 1024) == pytest.approx(DENSE_GAIN**0.5, rel=0.05)


def change_of_the_output(structure: Structure, size: int, *, scaled: bool) -> float:
    """Root mean square of what one step of Adam changes in the outputs, at the rate of a dense layer of this width."""
    generator = torch.Generator().manual_seed(size)
    layer = sm.nn.StructuredLinear(size, size, False, structure=structure, generator=generator)
    x, pull = torch.randn(64, size, generator=generator), torch.randn(64, size, generator=generator)
    rate = 1e-4 * 256 / size
    groups = sm.parameter_groups(layer, lr=rate) if scaled else [{"params": list(layer.parameters()), "lr": rate}]
    optimizer = torch.optim.Adam(groups)
    before = layer(x)
    (before * pull).sum().backward()
    optimizer.step()
    with torch.no_grad():
        return float((layer(x) - before).square().mean().sqrt())


MULTIPLIED = (
    sm.LowRank(0.25),
    sm.BlockDiagonal(4),
    sm.Monarch(4, 0.25),
    sm.BLAST(4, 0.25),
    sm.BlockTensorTrain(2),
    sm.GBLR(0.25),
    sm.Einsum(rank=2),
)


@pytest.mark.parametrize("size", [256, 512, pytest.param(1024), pytest.param(2048, marks=pytest.mark.slow)])
def test_learned_C17_learning_rates_transfer_over_widths(size: int) -> None:
    """One step moves every family's output as far as a dense layer's within a factor of 2, and without the multiples
    some family's by less than half."""
    dense = change_of_the_output(sm.structures.Dense(), size, scaled=False)
    plain = []
    for structure in MULTIPLIED:
        assert 0.5 <= change_of_the_output(structure, size, scaled=True) / dense <= 2.0, structure
        plain.append(change_of_the_output(structure, size, scaled=False) / dense)
    assert min(plain) < 0.5


def test_learned_C17_scaled_decay_is_that_of_a_dense_matrix() -> None:
    """With gradients of zero a step of AdamW shrinks the product of the factors by the dense layer's factor."""
    layer = sm.nn.StructuredLinear(32, 32, False, structure=sm.LowRank(8))
    before = layer.matrix.to_dense().detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(sm.parameter_groups(layer, lr=1e-2, weight_decay=0.1, decay_structured=True))
    optimizer.step()
    wanted = (1 - 1e-2 * 0.1 / 2) ** 2
    torch.testing.assert_close(layer.matrix.to_dense().detach(), wanted * before, rtol=1e-5, atol=1e-7)
    assert all(g["weight_decay"] == 0 for g in sm.parameter_groups(layer, lr=1e-2, weight_decay=0.1))


# --------------------------------------------------------------------------------------------------------- whitening


def problem(rows: int = 9, columns: int = 12, samples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(18)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(columns, samples, generator=generator, dtype=torch.float64)
    return weight, x, x @ x.T


RANKS = (1, 3, 6, 9)


@pytest.mark.parametrize("rank", RANKS)
def test_learned_C18_the_loss_is_the_tail_of_the_whitened_spectrum(rank: int) -> None:
    """||(W - S) X||_F^2 = sum of the squares of the singular values of W L from ``rank`` on, C = L L^T."""
    weight, x, moment = problem()
    found = sm.project(weight, sm.LowRank(rank), second_moment=moment)
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    loss = torch.linalg.norm((weight - found.matrix.to_dense()) @ x)
    torch.testing.assert_close(loss, torch.linalg.norm(values[rank:]), rtol=1e-9, atol=1e-9 * float(values[0]))
    assert found.error == pytest.approx(float(loss / torch.linalg.norm(weight @ x)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_learned_C18_the_factor_of_the_second_moment_does_not_matter(rank: int) -> None:
    """Truncation of W L with the Cholesky factor, multiplied back by L^-1, is the same matrix."""
    weight, _, moment = problem()
    factor = torch.linalg.cholesky(moment)
    u, s, vh = torch.linalg.svd(weight @ factor, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ torch.linalg.solve_triangular(factor, vh[:rank], upper=False, left=False)
    found = sm.project(weight, sm.LowRank(rank), second_moment=moment).matrix.to_dense()
    torch.testing.assert_close(found, truncated, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", RANKS)
def test_learned_C18_eigenvectors_of_the_output_moment_give_the_same(rank: int) -> None:
    """The form free of factors: Q Q^T W with the leading eigenvectors Q of W C W^T."""
    weight, _, moment = problem()
    _, vectors = torch.linalg.eigh(weight @ moment @ weight.T)
    q = vectors[:, -rank:]
    found = sm.project(weight, sm.LowRank(rank), second_moment=moment).matrix.to_dense()
    torch.testing.assert_close(found, q @ q.T @ weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", RANKS)
def test_learned_C18_plain_truncation_is_no_better_on_the_inputs(rank: int) -> None:
    weight, x, moment = problem()
    aware = sm.project(weight, sm.LowRank(rank), second_moment=moment).matrix.to_dense()
    plain = sm.project(weight, sm.LowRank(rank)).matrix.to_dense()
    size = float(torch.linalg.norm(weight @ x))
    assert (
        float(torch.linalg.norm((weight - aware) @ x)) <= float(torch.linalg.norm((weight - plain) @ x)) + 1e-9 * size
    )
    assert float(torch.linalg.norm(weight - plain)) <= float(torch.linalg.norm(weight - aware)) + 1e-9


def test_learned_C18_the_identity_reduces_to_plain_truncation() -> None:
    weight, _, _ = problem()
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    whitened = sm.project(weight, sm.LowRank(3), second_moment=2.5 * eye)
    plain = sm.project(weight, sm.LowRank(3))
    torch.testing.assert_close(whitened.matrix.to_dense(), plain.matrix.to_dense(), rtol=1e-9, atol=1e-9)
    assert whitened.error == pytest.approx(plain.error, rel=1e-12)


def test_learned_C18_a_singular_second_moment_is_handled_exactly() -> None:
    """With inputs in a space of dimension 4 every matrix is one of rank 4 on them."""
    weight, _, _ = problem()
    basis = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = basis @ basis.T
    found = sm.project(weight, sm.LowRank(4), second_moment=moment)
    assert found.error <= 1e-7  # the root of a rounded eigenvalue is half as precise
    torch.testing.assert_close(found.matrix.to_dense() @ basis, weight @ basis, rtol=1e-7, atol=1e-7)
    fewer = sm.project(weight, sm.LowRank(2), second_moment=moment)
    values = torch.linalg.svdvals(weight @ basis)
    assert fewer.error == pytest.approx(float(torch.linalg.norm(values[2:]) / torch.linalg.norm(values)), rel=1e-6)

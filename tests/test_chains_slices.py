"""Monarch matrices and block tensor trains: checks circuits_M1 to M4, M6, M7 and learned_C16."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.projection.hierarchical import dense_product, factorize_by_crosses
from structmat.projection.target import Certificate
from structmat.sizes import smallest_chain
from structmat.structure import count_parameters
from structmat.transforms import fourier_monarch


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(size: int, seed: int = 0, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    x = gaussian(rank or 3 * size, size, seed=seed + 1000, dtype=dtype)
    x = (
        x
        @ torch.diag(torch.logspace(0, -1, size, dtype=torch.float64)).to(dtype)
        @ gaussian(size, size, seed=7, dtype=dtype)
    )
    return x.mH @ x / len(x)


def weighted_error(w: Tensor, s: Tensor, c: Tensor) -> float:
    rest = w - s
    return float(((rest @ c) * rest.conj()).sum().real.clamp(min=0)) ** 0.5


def slices_of(w: Tensor, k: int, l: int) -> Tensor:
    out, width = w.shape
    return w.reshape(out // l, l, k, width // k).permute(1, 2, 0, 3)


@pytest.mark.parametrize(("n", "b"), [(12, 3), (16, 4), (42, 6)])
def test_circuits_M1_entries_and_parameters(n: int, b: int) -> None:
    s = sm.StructuredMatrix.random(sm.Monarch((n // b, b), 1), (n, n), dtype=torch.float64)
    left, right = s.tensors["left"], s.tensors["right"]  # L[j, l, k] = left[l, k, j], R[k, j, i]
    entries = torch.einsum("lkj,kji->ljki", left, right).reshape(n, n)
    torch.testing.assert_close(s.to_dense(), entries, rtol=0, atol=1e-14)
    assert s.num_parameters == n * b + n * n // b == s.macs


@pytest.mark.parametrize(("n", "blocks"), [(15, 3), (16, 4), (42, 7), (48, 4), (512, 32)])
def test_circuits_M1_fourier(n: int, blocks: int) -> None:
    s, order = fourier_monarch(n, blocks)
    dft = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    assert torch.allclose(s.to_dense(), dft[:, order], atol=1e-11)
    if blocks != n // blocks:  # the permutation of the other orientation is not the right one
        wrong = torch.arange(n).reshape(blocks, n // blocks).T.flatten()
        assert not torch.allclose(s.to_dense(), dft[:, wrong], atol=1e-2)
        assert sm.project(dft[:, wrong], s.structure).error > 0.1
    with pytest.raises(sm.StructmatError, match="do not divide"):
        fourier_monarch(n, n - 1)


def test_circuits_M2_projection() -> None:
    w = gaussian(64, 64)
    found = sm.project(w, sm.Monarch((8, 8), 1))
    assert found.certificate is Certificate.OPTIMAL
    assert 0.75 < found.error < 0.81
    tail = torch.linalg.svdvals(slices_of(w, 8, 8))[..., 1:]
    assert found.error == pytest.approx(float(tail.norm() / w.norm()), rel=1e-12)
    again = sm.project(found.matrix.to_dense(), sm.Monarch((8, 8), 1))
    assert again.error < 1e-13
    best = float("inf")
    for seed in range(20):  # alternating least squares on every slice at once, from random starts
        left, slices = gaussian(8, 8, 8, 1, seed=seed), slices_of(w, 8, 8)
        for _ in range(50):
            right = torch.linalg.pinv(left) @ slices
            left = slices @ torch.linalg.pinv(right)
        best = min(best, float((slices - left @ right).norm() / w.norm()))
    assert found.error <= best * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_circuits_M3_slices_of_any_shape(shape: tuple[int, int], grid: tuple[int, int], rank: int, seed: int) -> None:
    structure = sm.Monarch(grid, rank)
    if structure.restriction(shape) is not None:
        with pytest.raises(sm.StructmatError):
            sm.project(gaussian(*shape), structure)
        return
    w = gaussian(*shape, seed=seed)
    found = sm.project(w, structure)
    tails = 0.0
    for group in range(grid[1]):
        for columns in torch.arange(shape[1]).split(structure.native_shape(shape)[1] // grid[0]):
            piece = w[group :: grid[1]][:, columns]
            member = found.matrix.to_dense()[group :: grid[1]][:, columns]
            if piece.numel():
                assert float(torch.linalg.svdvals(member)[rank:].sum()) < 1e-12 * (1 + float(w.norm()))
                tails += float(torch.linalg.svdvals(piece)[rank:].square().sum())
    assert found.error * float(w.norm()) == pytest.approx(tails**0.5, abs=1e-10)
    assert found.lower_bound == pytest.approx(found.error, abs=1e-10)


@pytest.mark.parametrize("n", [8, 32])
def test_circuits_M4_butterflies_are_monarch(n: int) -> None:
    dense = sm.StructuredMatrix.random(sm.Butterfly(), (n, n), dtype=torch.float64).to_dense()
    b = 2
    while b < n:
        assert sm.project(dense, sm.Monarch((n // b, b), 1)).error < 1e-12
        b *= 2


@pytest.mark.parametrize("structure", [sm.Monarch(4, 2), sm.BlockTensorTrain(2), sm.Butterfly(), sm.TensorTrain(4)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 64)])
def test_circuits_M6_initial_variance(structure: sm.Structure, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = gaussian(64, shape[1], dtype=torch.float32)
    draws = [
        (x @ sm.StructuredMatrix.random(structure, shape, generator=generator).to_dense().T).square().mean()
        for _ in range(100)
    ]
    assert float(torch.stack(draws).mean()) == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("structure", [sm.Monarch((3, 2), 2), sm.BlockTensorTrain(2)])
def test_circuits_M7_weighted(structure: sm.Structure, dtype: torch.dtype) -> None:
    shape = (20, 24)
    w, c = gaussian(*shape, dtype=dtype), moment(24, dtype=dtype)
    errors = [sm.project(w, structure, second_moment=c, sweeps=sweeps).error for sweeps in range(6)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    plain = sm.project(w, structure).matrix.to_dense()
    assert errors[1] * weighted_error(w, torch.zeros_like(w), c) <= weighted_error(w, plain, c)
    found = sm.project(w, structure, second_moment=c, sweeps=50)
    assert found.lower_bound <= found.error
    exact = sm.project(plain, structure, second_moment=c)
    assert exact.error < 1e-6


def test_circuits_M7_block_diagonal_moment_is_closed_form() -> None:
    w, k, l = gaussian(24, 24), 3, 4
    c = torch.block_diag(*(moment(8, seed) for seed in range(k)))
    found = sm.project(w, sm.Monarch((k, l), 2), second_moment=c)
    assert found.certificate is Certificate.OPTIMAL
    values, vectors = torch.linalg.eigh(c)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    tail = torch.linalg.svdvals(slices_of(w @ root, k, l))[..., 2:]
    assert found.error == pytest.approx(float(tail.norm() / (w @ root).norm()), rel=1e-10)


def alternating_least_squares(w: Tensor, c: Tensor, k: int, l: int, seed: int) -> float:
    """The weighted error of rank-one slices that 100 sweeps over left and right factors reach from a random start."""
    width, total = w.shape[1] // k, 0.0
    for group in range(l):
        rows, right = w[group::l], torch.zeros(k, w.shape[1], dtype=torch.float64)
        for block in range(k):
            right[block, block * width : (block + 1) * width] = gaussian(width, seed=seed + block)
        free = (right != 0).flatten()
        for _ in range(100):
            left = rows @ c @ right.T @ torch.linalg.pinv(right @ c @ right.T)
            system = torch.einsum("ab,ij->aibj", left.T @ left, c).reshape(right.numel(), -1)[free][:, free]
            right.view(-1)[free] = torch.linalg.lstsq(system, (left.T @ rows @ c).flatten()[free]).solution
        total += weighted_error(rows, left @ right, c) ** 2
    return total**0.5


def test_circuits_M7_no_worse_than_alternating_least_squares() -> None:
    ours, theirs = 0.0, 0.0  # both end in local optima: compared over several matrices
    for seed in range(8):
        w, c = gaussian(12, 15, seed=seed), moment(15, seed)
        found = sm.project(w, sm.Monarch((3, 2), 1), second_moment=c, sweeps=100)
        ours += found.error * weighted_error(w, torch.zeros_like(w), c)
        theirs += alternating_least_squares(w, c, 3, 2, seed)
    assert ours <= theirs * 1.02


def test_singular_moments_are_exact() -> None:
    w, c = gaussian(16, 20), moment(20, rank=3)
    for structure in (sm.Monarch(2, 3), sm.BlockTensorTrain(3)):
        found = sm.project(w, structure, second_moment=c)
        assert torch.isfinite(found.matrix.to_dense()).all()
        zero = sm.project(w, structure, second_moment=torch.zeros(20, 20))
        assert zero.error == 0.0


def test_outputs_are_weighed() -> None:
    w, b, c = gaussian(16, 20), moment(16), moment(20, 1)
    for structure in (sm.Monarch(2, 2), sm.BlockTensorTrain(1), sm.Butterfly(), sm.TensorTrain(2)):
        errors = [
            sm.project(w, structure, second_moment=c, output_moment=b, sweeps=sweeps).error for sweeps in (0, 1, 2, 8)
        ]
        assert errors[0] <= 1 + 1e-12
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))


@pytest.mark.parametrize("shape", [(16, 16), (12, 36), (17, 23)])
def test_learned_C16_block_tensor_train(shape: tuple[int, int]) -> None:
    s = sm.StructuredMatrix.random(sm.BlockTensorTrain(2), shape, dtype=torch.float64)
    m1, m2 = s.structure.out_factors
    n2, n1 = s.structure.in_factors
    assert s.num_parameters == s.macs == 2 * (n1 * n2 * m1 + m1 * m2 * n2)
    left = s.tensors["left"].reshape(m1, m2, n2, 2)
    right = s.tensors["right"].reshape(n2, m1, 2, n1)
    dense = torch.einsum("abcr,card->abcd", left, right).reshape(m1 * m2, n2 * n1)[: shape[0], : shape[1]]
    torch.testing.assert_close(s.to_dense(), dense, rtol=0, atol=1e-13)
    assert int(torch.linalg.matrix_rank(dense)) == min(*shape, 2 * n2 * m1)


def test_learned_C16_rank_one_is_monarch() -> None:
    w = gaussian(16, 16)
    train = sm.project(w, sm.BlockTensorTrain(1)).matrix.to_dense()
    m1, m2 = 4, 4
    order = torch.arange(16).reshape(m1, m2).T.flatten()  # rows (m2, m1): the strided order of a Monarch matrix
    monarch = sm.project(w[order], sm.Monarch((4, m1), 1)).matrix.to_dense()
    torch.testing.assert_close(train[order], monarch, rtol=0, atol=1e-12)


def test_learned_C16_projection_is_optimal() -> None:
    w = gaussian(16, 12)
    found = sm.project(w, sm.BlockTensorTrain(1))
    assert found.certificate is Certificate.OPTIMAL
    for seed in range(20):
        tensors = {name: t + 1e-3 * gaussian(*t.shape, seed=seed) for name, t in found.matrix.tensors.items()}
        other = sm.StructuredMatrix(found.matrix.structure, (16, 12), tensors)
        assert float((w - other.to_dense()).norm() / w.norm()) >= found.error - 1e-14


@settings(max_examples=30, deadline=None)
@given(out=st.integers(8, 400), width=st.integers(8, 400), share=st.floats(0.1, 1.0))
def test_configurations_are_within_budget(out: int, width: int, share: float) -> None:
    budget = int(share * out * width)
    for family in (sm.Monarch, sm.BlockTensorTrain, sm.Butterfly, sm.Chain, sm.TensorTrain):
        for structure in family.configurations((out, width), budget):
            assert structure.resolve((out, width)).restriction((out, width)) is None
            assert count_parameters(structure, (out, width)) <= budget


def test_bad_hyperparameters_say_why() -> None:
    with pytest.raises(sm.StructmatError, match="pair"):
        sm.Monarch((1, 2, 3))
    with pytest.raises(sm.StructmatError, match="at most 2"):
        sm.project(gaussian(8, 8), sm.Monarch(4, 3))
    with pytest.raises(sm.StructmatError, match="two factors"):
        sm.BlockTensorTrain(1, (2, 2, 2))
    with pytest.raises(sm.StructmatError, match="Use larger factors"):
        sm.project(gaussian(8, 8), sm.BlockTensorTrain(1, (2, 2)))


@pytest.mark.parametrize("size", [8, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_members_of_chains_are_met_by_crosses(size: int, dtype: torch.dtype) -> None:
    """From a row and a column of each block; other matrices are not met, and fitted as before."""
    generator = torch.Generator().manual_seed(size)
    member = sm.StructuredMatrix.random(sm.Butterfly(), (size, size), generator=generator, dtype=dtype).to_dense()
    patterns = smallest_chain((size, size))
    factors = factorize_by_crosses(member, patterns)
    assert factors is not None
    assert [tuple(f.shape) for f in factors] == list(patterns)
    torch.testing.assert_close(dense_product(factors, patterns), member, rtol=0, atol=1e-13)
    found = sm.project(member, sm.Butterfly())
    assert found.error == pytest.approx(float(torch.linalg.norm(found.matrix.to_dense() - member)), abs=1e-14)
    noisy = member + 1e-3 * torch.randn(size, size, generator=generator, dtype=dtype)
    near = sm.project(noisy, sm.Butterfly())
    assert "exact" not in near.method
    assert near.error < 1e-1
    assert factorize_by_crosses(torch.zeros(4, 4, dtype=dtype), ((2, 4, 2, 1), (1, 2, 4, 2))) is None  # rank 2

"""Sums of Kronecker products: order of application, projection, lowering, any size."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kronecker_blocks import Largest
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.program import Contraction, build, cost, stages
from structmat.projection import canonical
from structmat.projection.kronecker import (
    application_cost,
    application_order,
    even_factors,
    factor_pairs,
    nearest_terms,
    padded_factors,
    rearrange,
    restore,
    separable_start,
    weighted_descent,
    weighted_sweep,
)
from structmat.projection.project import make_target, project_target
from structmat.projection.target import Certificate
from structmat.structure import count_parameters, resolve
from structmat.structures.kronecker import Kronecker, factor_matrices

F64 = torch.float64
sizes = st.integers(1, 5)


def kron(factors: list[Tensor]) -> Tensor:
    """Independent of the library and of torch.kron, which refuses some strides."""
    result = torch.ones(1, 1, dtype=factors[0].dtype)
    for f in factors:
        result = torch.einsum("ab,cd->acbd", result, f).reshape(result.shape[0] * f.shape[0], -1)
    return result


def dense_of(structure: Kronecker, tensors: dict[str, Tensor]) -> Tensor:
    factors = factor_matrices(structure, tensors)
    return sum(kron([f[t] for f in factors]) for t in range(factors[0].shape[0]))


def random_moment(size: int, rank: int | None = None) -> Tensor:
    x = torch.randn(size, rank or size + 5, dtype=F64)
    return x @ x.T / x.shape[1]


@given(sizes, sizes, sizes, sizes, sizes, sizes)
def test_kronecker_1_vectorisation(m: int, n: int, p: int, q: int, a: int, b: int) -> None:
    """(A (x) B) vec(X) = vec(A X B^T) for row-major flattening, and rearrangement makes it an outer product."""
    left, right, x = torch.randn(m, n, dtype=F64), torch.randn(p, q, dtype=F64), torch.randn(n, q, dtype=F64)
    matrix = kron([left, right])
    torch.testing.assert_close(matrix @ x.reshape(-1), (left @ x @ right.T).reshape(-1))
    pairs = ((m, n), (p, q))
    torch.testing.assert_close(rearrange(matrix, pairs), torch.outer(left.reshape(-1), right.reshape(-1)))
    many = ((m, n), (p, q), (a, b))
    other = torch.randn(m * p * a, n * q * b, dtype=F64)
    assert torch.equal(restore(rearrange(other, many), many), other)


def test_kronecker_5_order_rule_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        count = int(torch.randint(2, 6, (), generator=generator))
        pairs = [tuple(torch.randint(1, 9, (2,), generator=generator).tolist()) for _ in range(count)]
        best = min(application_cost(pairs, order) for order in itertools.permutations(range(count)))
        order = application_order(pairs)
        assert application_cost(pairs, order) == best
        flipped = [(n, m) for m, n in pairs]
        assert application_cost(flipped, tuple(reversed(order))) == min(
            application_cost(flipped, other) for other in itertools.permutations(range(count))
        )
    example = [(16, 32), (128, 16)]
    assert application_cost(example, application_order(example)) == 40_960
    assert application_cost(example, (1, 0)) == 131_072


@pytest.mark.parametrize(
    ("pairs", "terms"), [(((16, 32), (128, 16)), 1), (((3, 5), (4, 2)), 3), (((2, 3), (4, 2), (3, 5)), 1)]
)
def test_program_takes_the_cheapest_order(pairs: tuple[tuple[int, int], ...], terms: int) -> None:
    shape = (math.prod(m for m, _ in pairs), math.prod(n for _, n in pairs))
    program = build(Kronecker(terms, pairs), shape)
    assert cost(program).macs == terms * application_cost(pairs, application_order(pairs))
    assert cost(program).parameters == terms * sum(m * n for m, n in pairs)


# ---------------------------------------------------------------------------------------------------- projection


@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4), st.integers(1, 4))
@settings(max_examples=20)
def test_kronecker_8_projection_is_optimal(m: int, n: int, p: int, q: int, terms: int) -> None:
    matrix = torch.randn(m * p, n * q, dtype=F64)
    structure = Kronecker(terms, ((m, n), (p, q)))
    found = sm.project(matrix, structure)
    values = torch.linalg.svdvals(rearrange(matrix, structure.pairs))
    tail = float(values[terms:].square().sum() / values.square().sum())
    assert found.error**2 == pytest.approx(tail, rel=1e-10, abs=1e-14)
    assert found.certificate is Certificate.OPTIMAL
    assert found.lower_bound == pytest.approx(found.error, abs=1e-9)
    # Idempotent; terms orthogonal in both factors; balanced; no perturbation is better.
    again = sm.project(found.matrix.to_dense(), structure)
    assert again.error < 1e-12
    factors = [f.flatten(1) for f in factor_matrices(structure, found.matrix.tensors)]
    for factor in factors:
        gram = factor @ factor.T
        assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-10
    torch.testing.assert_close(factors[0].norm(dim=1), factors[1].norm(dim=1))
    for _ in range(5):
        moved = {k: t + 1e-3 * torch.randn_like(t) for k, t in found.matrix.tensors.items()}
        assert float((matrix - dense_of(structure, moved)).norm() / matrix.norm()) >= found.error


def test_kronecker_8_special_cases() -> None:
    matrix = torch.randn(6, 8, dtype=F64)
    complete = sm.project(torch.randn(6, 12, dtype=F64), Kronecker(6, ((2, 3), (3, 4))))
    assert complete.error < 1e-14
    corner = sm.project(matrix, Kronecker(3, ((6, 1), (1, 8))))
    assert corner.error == pytest.approx(sm.project(matrix, sm.LowRank(3)).error, rel=1e-12)
    planted = sum(kron([torch.randn(4, 3, dtype=F64), torch.randn(2, 5, dtype=F64)]) for _ in range(2))
    assert sm.project(planted, Kronecker(2, ((4, 3), (2, 5)))).error < 1e-10
    complex_planted = kron([torch.randn(3, 2, dtype=torch.complex128), torch.randn(2, 4, dtype=torch.complex128)])
    assert sm.project(complex_planted, Kronecker(1, ((3, 2), (2, 4)))).error < 1e-12


def test_kronecker_9_no_random_start_is_better() -> None:
    matrix, pairs, terms = torch.randn(12, 15, dtype=F64), ((3, 5), (4, 3)), 3
    best = sm.project(matrix, Kronecker(terms, pairs)).error * float(matrix.norm())
    tensor = rearrange(matrix, pairs)
    for seed in range(20):
        start = canonical.random(tensor, terms, torch.Generator().manual_seed(seed))
        _, error = canonical.run(tensor, start, 200)
        assert error >= best - 1e-9


def test_kronecker_10_weighted_closed_form_for_a_separable_moment() -> None:
    pairs, terms = ((3, 4), (5, 3)), 2
    moment = kron([random_moment(4), random_moment(3)])
    matrix = torch.randn(15, 12, dtype=F64)
    target = make_target(matrix, moment)
    a, b, bound = separable_start(target, pairs, terms)
    closed = target.error(restore(a.T @ b, pairs))
    assert bound == pytest.approx(closed, rel=1e-6)  # the bound is tight here
    start = nearest_terms(matrix, pairs, terms)[:2]
    assert weighted_descent(target, pairs, *start, 2000)[2] == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("rank", [None, 5])
def test_kronecker_10_weighted_sweeps_are_monotone(rank: int | None) -> None:
    pairs, terms = ((3, 5), (5, 3)), 3
    target = make_target(torch.randn(15, 15, dtype=F64), random_moment(15, rank))
    a, b = nearest_terms(target.weight, pairs, terms)[:2]
    errors = [target.error(restore(a.T @ b, pairs))]
    for _ in range(20):
        a, b = weighted_sweep(target, pairs, a, b)
        errors.append(target.error(restore(a.T @ b, pairs)))
    assert all(late <= early * (1 + 1e-9) for early, late in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_kronecker_10_identity_moment_is_the_plain_projection() -> None:
    matrix = torch.randn(12, 20, dtype=F64)
    structure = Kronecker(3, ((3, 5), (4, 4)))
    plain, weighted = sm.project(matrix, structure), sm.project(matrix, structure, second_moment=torch.eye(20))
    assert weighted.error == pytest.approx(plain.error, rel=1e-6)


def test_kronecker_11_three_factors() -> None:
    pairs = ((3, 4), (4, 3), (3, 3))
    planted = sum(kron([torch.randn(p, dtype=F64) for p in pairs]) for _ in range(4))
    assert sm.project(planted, Kronecker(4, pairs), sweeps=100).error < 1e-8
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
    hadamard = kron([h2] * 6)
    found = sm.project(hadamard, Kronecker(1, ((4, 4), (4, 4), (4, 4))))
    assert found.error < 1e-12
    assert found.certificate is not Certificate.OPTIMAL
    for terms in (1, 3, 6):
        for moment in (None, random_moment(12)):
            other = sm.project(torch.randn(18, 12, dtype=F64), Kronecker(terms, 3), second_moment=moment)
            assert 0 <= other.lower_bound <= other.error * (1 + 1e-9)
            assert other.error < 1


def test_kronecker_11_error_falls_with_sweeps() -> None:
    matrix = torch.randn(27, 27, dtype=F64)
    for moment in (None, random_moment(27), random_moment(27, 6)):
        errors = [
            sm.project(matrix, Kronecker(6, 3), second_moment=moment, sweeps=sweeps).error for sweeps in (0, 5, 30)
        ]
        assert errors[0] >= errors[1] >= errors[2]


def test_kronecker_25_lower_bound_is_valid() -> None:
    generator = torch.Generator().manual_seed(1)
    positive = 0
    for _ in range(50):
        m, n, p, q = (int(v) for v in torch.randint(2, 4, (4,), generator=generator))
        matrix = torch.randn(m * p, n * q, dtype=F64, generator=generator)
        found = sm.project(matrix, Kronecker(1, ((m, n), (p, q))), second_moment=random_moment(n * q))
        assert found.lower_bound <= found.error * (1 + 1e-9)
        positive += found.lower_bound > 0
    assert positive > 40


# ------------------------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize(
    ("terms", "pairs"),
    [
        (1, ((3, 5), (4, 2))),
        (3, ((3, 5), (4, 6))),  # first factor first
        (3, ((5, 3), (2, 4))),  # second factor first
        (1, ((2, 3), (4, 2), (3, 5))),
        (2, ((2, 3), (4, 2), (3, 5))),
        (3, ((3, 2), (2, 4), (2, 2), (1, 2))),
    ],
)
def test_kronecker_19_lowering_equals_the_dense_matrix(terms: int, pairs: tuple[tuple[int, int], ...]) -> None:
    shape = (math.prod(m for m, _ in pairs), math.prod(n for _, n in pairs))
    matrix = sm.StructuredMatrix.random(Kronecker(terms, pairs), shape, dtype=F64)
    expected = dense_of(Kronecker(terms, pairs), matrix.tensors)
    torch.testing.assert_close(matrix.to_dense(), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(matrix.T.to_dense(), expected.T, rtol=1e-13, atol=1e-14)
    contractions = [s for s in stages(matrix.program) if isinstance(s, Contraction)]
    assert len(contractions) == len(pairs)
    for stage in contractions:  # the stored tensors are plain views of the stages' weights
        assert matrix.tensors[stage.weight].numel() == math.prod(stage.stored_shape)
    if len(pairs) == 2 and application_order(pairs) == (0, 1):
        (m, n), (q, p) = pairs
        assert contractions[0].stored_shape == (1, m * terms, n, 1)
        assert contractions[1].stored_shape == (1, q, terms * p, 1)


def test_kronecker_19_forward_forms_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """No intermediate of a 1024 x 1024 member comes near the size of the matrix."""
    layer = sm.nn.StructuredLinear(1024, 1024, structure=Kronecker(4))
    x = torch.randn(2, 1024)
    with Largest() as watch:
        layer(x)
    assert 2 * 1024 <= watch.numbers < 1024 * 1024 // 4


# ------------------------------------------------------------------------------------------------------- any size

ANY = (1, 2, 3, 5, 7, 10, 13, 64, 97, 784, 1000, 1021)


@pytest.mark.parametrize("out_features", ANY)
def test_kronecker_20_any_size(out_features: int) -> None:
    for in_features in ANY:
        structure = resolve(Kronecker(1), (out_features, in_features))
        native = structure.native_shape((out_features, in_features))
        for size, padded in zip((out_features, in_features), native, strict=True):
            assert size <= padded <= size + math.sqrt(size) + 1
        matrix = sm.StructuredMatrix.random(structure, (out_features, in_features), dtype=F64)
        tensors = {k: t.requires_grad_() for k, t in matrix.tensors.items()}
        expected = dense_of(structure, tensors)[:out_features, :in_features]
        x = torch.randn(3, in_features, dtype=F64)
        y = matrix @ x.T
        torch.testing.assert_close(y, expected @ x.T)
        torch.testing.assert_close(matrix.T @ torch.ones(out_features, dtype=F64), expected.sum(0))
        names = list(tensors)
        got = torch.autograd.grad(y.square().sum(), [tensors[k] for k in names])
        wanted = torch.autograd.grad((expected @ x.T).square().sum(), [tensors[k] for k in names])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@given(st.integers(1, 3000), st.integers(2, 4))
def test_padded_factors(size: int, count: int) -> None:
    factors = padded_factors(size, count)
    assert len(factors) == count
    assert math.prod(factors) >= size
    if count == 2:
        assert math.prod(factors) - size <= 2 * math.sqrt(size)
    pairs = factor_pairs(size)
    assert all(n * p == size for n, p in pairs)
    assert sorted(pairs) == sorted({(n, size // n) for n in range(1, size + 1) if size % n == 0})
    assert even_factors(size, 2) == min(((n, p) for n, p in pairs if n <= p), key=lambda np: np[1] / np[0])


def test_wrong_factors_are_named() -> None:
    with pytest.raises(ShapeError, match=r"multiply to 6 x 20"):
        resolve(Kronecker(1, ((2, 4), (3, 5))), (7, 20))
    with pytest.raises(ShapeError, match="terms=4"):
        resolve(Kronecker(5, ((2, 2), (3, 3))), (6, 6))
    for wrong in (1, (), ((2, 3),), ((2, 3, 4), (1, 2)), ((2, 0), (3, 4)), 2.5):
        with pytest.raises(StructureError, match="factors"):
            Kronecker(1, wrong)  # type: ignore[arg-type]


def test_kronecker_24_free_padding_never_hurts() -> None:
    matrix = torch.randn(13, 13, dtype=F64)
    structure = Kronecker(2, ((4, 4), (4, 4)))
    errors = [sm.project(matrix, structure, sweeps=sweeps).error for sweeps in (0, 1, 2, 5, 10, 50, 200)]
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]
    found = sm.project(matrix, structure)
    assert found.certificate is Certificate.BOUND
    assert 0 < found.lower_bound < found.error
    weighted = [sm.project(matrix, structure, second_moment=random_moment(13), sweeps=s).error for s in (0, 20)]
    assert weighted[1] < weighted[0]


def test_kronecker_24_initial_factors_keep_the_mean_square() -> None:
    """Exact for tall and square factors, within 1 % over 5,000 inputs for wide ones."""
    square = sm.StructuredMatrix.random(Kronecker(1, ((6, 4), (5, 5))), (30, 20), dtype=F64)
    x = torch.randn(20, 10, dtype=F64)
    torch.testing.assert_close((square @ x).square().mean(0), x.square().mean(0) / 3)
    wide = sm.StructuredMatrix.random(Kronecker(1, ((8, 16), (8, 16))), (64, 256), dtype=F64)
    x = torch.randn(256, 5000, dtype=F64)
    assert float((wide @ x).square().mean() * 3) == pytest.approx(1.0, rel=0.01)


def test_memory_guard_falls_back_to_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structmat.projection.kronecker._GRAM_LIMIT", 1)
    matrix, moment = torch.randn(12, 20, dtype=F64), random_moment(20)
    structure = Kronecker(3)
    lean = sm.project(matrix, structure, second_moment=moment, sweeps=60)
    assert lean.method == "alternating conjugate gradients"
    monkeypatch.undo()
    full = sm.project(matrix, structure, second_moment=moment, sweeps=60)
    assert lean.error == pytest.approx(full.error, rel=0.02)


@pytest.mark.parametrize("shape", [(64, 64), (97, 33), (256, 688), (8, 8), (50, 1)])
def test_configurations_fit_the_budget(shape: tuple[int, int]) -> None:
    for share in (0.05, 0.25, 0.5):
        budget = int(share * shape[0] * shape[1])
        found = list(Kronecker.configurations(shape, budget))
        assert all(count_parameters(member, shape) <= budget for member in found)
        smallest = count_parameters(Kronecker(1), shape)
        assert found or smallest > budget


def test_projection_is_deterministic() -> None:
    matrix = torch.randn(24, 30)
    target = make_target(matrix, random_moment(30))
    structure = Kronecker(4, 3)
    first, second = (
        project_target(target, structure, dtype=matrix.dtype, device=matrix.device).matrix for _ in range(2)
    )
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    assert all(t.is_contiguous() for t in first.tensors.values())

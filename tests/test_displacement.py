"""Displacement structure: ranks, generators, products, learned operators and solving, against explicit matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import structmat as sm
from structmat import displacement
from structmat.errors import DataError, ShapeError
from structmat.program import Contraction, Convolution, apply, fuse, stages
from structmat.program.generated import subdiagonal_by_transforms, subdiagonal_krylov, tridiagonal_krylov
from structmat.program.reference import Form, form
from structmat.projection.displacement import toeplitz_like_generators
from structmat.projection.krylov import Shift
from structmat.projection.project import project
from structmat.projection.target import Certificate
from structmat.structure import Shape, Structure

F64 = torch.float64
SIZES = (1, 2, 3, 5, 8, 13, 33)
RECTANGLES: tuple[Shape, ...] = ((1, 7), (5, 1), (5, 9), (9, 5), (13, 17), (33, 16))


def gaussian(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


def member(structure: Structure, shape: Shape, seed: int = 0) -> sm.StructuredMatrix:
    return sm.StructuredMatrix.random(structure, shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(got: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert float(torch.linalg.norm(got - expected)) <= tolerance * max(1e-300, float(torch.linalg.norm(expected)))


# ------------------------------------------------------------------------------------------- the plain families


@pytest.mark.parametrize("shape", [*((n, n) for n in (*SIZES, 700)), *RECTANGLES, (600, 900)], ids=str)
def test_families_equal_scipy(shape: Shape) -> None:
    """Dense matrix and products, written out and by transforms."""
    m, n = shape
    toeplitz, hankel, circulant = (member(s, shape) for s in (sm.Toeplitz(), sm.Hankel(), sm.Circulant()))
    t, h, c = (s.tensors["weight"].numpy() for s in (toeplitz, hankel, circulant))
    expected = {
        toeplitz: scipy.linalg.toeplitz(t[n - 1 :], t[:n][::-1]),
        hankel: scipy.linalg.hankel(h[:m], h[m - 1 :]),
        circulant: scipy.linalg.circulant(c)[:m, :n],
    }
    for matrix, dense in expected.items():
        close(matrix.to_dense(), dense)
        x, y = gaussian(n, 3), gaussian(m, 3, seed=1)
        close(matrix @ x, dense @ x.numpy(), 1e-11)
        close(matrix.T @ y, dense.T @ y.numpy(), 1e-11)
        (stage,) = stages(matrix.program)
        assert (form(stage) is Form.TRANSFORM) == (min(shape) > 500)
        assert ("fast Fourier transform" in layer_of(matrix).explain()) == (min(shape) > 500)


def layer_of(matrix: sm.StructuredMatrix) -> sm.nn.StructuredLinear:
    return sm.nn.StructuredLinear.from_matrix(matrix)


def test_single_precision_by_transforms() -> None:
    matrix = member(sm.ToeplitzLike(3), (700, 700))
    x = gaussian(5, 700)
    exact = apply(matrix.program, matrix.tensors, x)
    narrow = matrix.to(dtype=torch.float32)
    close(apply(narrow.program, narrow.tensors, x.float()).double(), exact, 2e-6)


def test_explicit_matrices_with_nodes() -> None:
    for m, n in ((7, 7), (5, 9), (9, 4)):
        cauchy = member(sm.Cauchy(), (m, n))
        s = np.arange(m) + cauchy.tensors["rows"].numpy()
        t = np.arange(n) + cauchy.tensors["columns"].numpy()
        close(cauchy.to_dense(), float(cauchy.tensors["scale"]) / (s[:, None] - t))
        like = member(sm.CauchyLike(2), (m, n))
        product = like.tensors["left"].T @ like.tensors["right"]
        close(like.to_dense(), product.numpy() / (np.arange(m)[:, None] - np.arange(n) - 0.5))
        vandermonde = member(sm.Vandermonde(), (m, n))
        powers = np.vander(vandermonde.tensors["nodes"].numpy(), n, increasing=True)
        close(vandermonde.to_dense(), vandermonde.tensors["scale"].numpy()[:, None] * powers)


@pytest.mark.parametrize("structure", [sm.Circulant(), sm.Toeplitz(), sm.Hankel()], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (7, 12), (12, 5)], ids=str)
def test_circuits_D5_averaging_is_an_orthogonal_projection(structure: Structure, shape: Shape) -> None:
    weight, other = gaussian(*shape), gaussian(*shape, seed=1)
    found = project(weight, structure)
    assert found.certificate is Certificate.OPTIMAL
    dense = found.matrix.to_dense()
    close(project(dense, structure).matrix.to_dense(), dense, 1e-14)
    inner = float(((weight - dense) * project(other, structure).matrix.to_dense()).sum())
    assert abs(inner) <= 1e-12 * float(torch.linalg.norm(weight) * torch.linalg.norm(other))


@pytest.mark.parametrize("structure", [sm.Circulant(), sm.Toeplitz(), sm.Hankel()], ids=str)
def test_weighted_averaging_is_least_squares(structure: Structure) -> None:
    """Against a dense least squares problem with one column for each number, also for a singular moment."""
    shape = (6, 9)
    weight = gaussian(*shape)
    for rank in (9, 4):
        factor = gaussian(9, rank, seed=2)
        found = project(weight, structure, second_moment=factor @ factor.T)
        assert found.certificate is Certificate.OPTIMAL
        count = found.matrix.num_parameters
        basis = torch.stack(
            [
                sm.StructuredMatrix(structure, shape, {"weight": e}).to_dense() @ factor
                for e in torch.eye(count).double()
            ]
        )
        design = basis.reshape(count, -1).T
        best = torch.linalg.lstsq(design, (weight @ factor).reshape(-1, 1), driver="gelsd").solution
        rest = torch.linalg.norm(design @ best - (weight @ factor).reshape(-1, 1))
        assert found.error == pytest.approx(float(rest / torch.linalg.norm(weight @ factor)), rel=1e-7)


# --------------------------------------------------------------------------------------------------- displacement


@pytest.mark.parametrize("size", [8, 13, 30])
def test_circuits_D1_ranks(size: int) -> None:
    shape = (size, size)
    first, second = (member(sm.Toeplitz(), shape, seed).to_dense() for seed in (0, 1))
    hankel = member(sm.Hankel(), shape).to_dense()
    rank = sm.displacement_rank
    assert rank(first) == 2
    assert rank(torch.linalg.inv(first)) <= 2
    assert rank(first @ second) <= 4
    assert rank(hankel, displacement.hankel(shape)) == 2
    assert rank(first + hankel, displacement.toeplitz_plus_hankel(shape)) <= 4
    nodes = torch.linspace(-0.9, 0.9, size, dtype=F64)
    vandermonde = torch.from_numpy(np.vander(nodes.numpy(), size, increasing=True))
    assert rank(vandermonde, displacement.vandermonde(nodes, size)) == 1
    s, t = torch.arange(size, dtype=F64), torch.arange(size, dtype=F64) + 0.5
    assert rank(1 / (s[:, None] - t), displacement.cauchy(s, t)) == 1
    roots = torch.from_numpy(np.exp(-2j * np.pi * np.arange(size) / size))
    dft = torch.from_numpy(np.fft.fft(np.eye(size)))
    assert rank(dft, displacement.vandermonde(roots, size, twist=1.0)) == 0
    assert rank(dft, displacement.vandermonde(roots, size)) == 1
    low = gaussian(size, 2) @ gaussian(2, size, seed=1)
    assert rank(low) <= 4
    assert rank(gaussian(size, size)) == size
    assert rank(first.float()) == 2


def test_displacement_rank_refuses() -> None:
    with pytest.raises(ShapeError, match="two axes"):
        sm.displacement_rank(torch.ones(3))
    with pytest.raises(ShapeError, match="of shape"):
        sm.displacement_rank(torch.ones(3, 4), displacement.toeplitz((4, 4)))
    with pytest.raises(DataError, match="NaN"):
        sm.displacement_rank(torch.full((3, 3), math.nan))


@pytest.mark.parametrize("twist", [1.0, -1.0, 0.0, 0.5, -2.0])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_circuits_D1_f_circulant(twist: float, size: int) -> None:
    """``Z_f(v) = sum of v[j] Z_f^j``, transposes and gradients, by transforms and written out."""
    v, x = gaussian(size), gaussian(4, size, seed=1)
    shift = displacement.shift(size, twist)
    dense = sum(v[j] * torch.linalg.matrix_power(shift, j) for j in range(size))
    assert isinstance(dense, Tensor)
    for transform in (False, True):
        stage = Convolution("v", 1, 1, size, size, twist, size, transform=transform)
        close(apply(stage, {"v": v}, x), x @ dense.T)
        close(apply(stage.transpose(), {"v": v}, x), x @ dense)

        def run(v: Tensor, x: Tensor, stage: Convolution = stage) -> Tensor:
            return apply(stage, {"v": v}, x)

        assert torch.autograd.gradcheck(run, (v.clone().requires_grad_(), x.clone().requires_grad_()))


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_circuits_D1_reconstruction(size: int) -> None:
    """``M = 1/2 sum of Z_1(g_i) Z_-1(J h_i)`` from the displacement of any matrix, at full rank."""
    matrix = gaussian(size, size)
    found = toeplitz_like_generators(matrix, size)
    tensors = {"left": found.left, "right": found.right}
    close(sm.StructuredMatrix(sm.ToeplitzLike(size), (size, size), tensors).to_dense(), matrix, 1e-13 * size)
    operators = displacement.toeplitz((size, size))
    generated = 2 * found.left.T @ found.right.flip(1)
    close(operators.displace(matrix), generated, 1e-13 * size)


@pytest.mark.parametrize("shape", [(8, 8), (13, 13), *RECTANGLES], ids=str)
@pytest.mark.parametrize("kind", [sm.ToeplitzLike, sm.HankelLike, sm.VandermondeLike, sm.CauchyLike, sm.LDRSubdiagonal])
def test_members_are_recovered(kind: type[Structure], shape: Shape) -> None:
    for rank in {1, min(2, *shape)}:
        matrix = member(kind(rank), shape)  # type: ignore[call-arg]
        found = project(matrix.to_dense(), matrix.structure, sweeps=0)
        assert found.error < 1e-10, (rank, found.error)


@pytest.mark.parametrize("kind", [sm.Cauchy, sm.Vandermonde, sm.LDRTridiagonal, sm.OrthogonalPolynomial])
def test_members_with_nodes_are_recovered(kind: type[Structure]) -> None:
    for shape in ((8, 8), (9, 5), (5, 9)):
        matrix = member(kind(), shape)
        found = project(matrix.to_dense(), matrix.structure)
        assert found.error < 1e-7, found.error


def test_toeplitz_matrices_their_inverses_and_products_are_toeplitz_like() -> None:
    first, second = (member(sm.Toeplitz(), (20, 20), seed).to_dense() for seed in (0, 1))
    for matrix, rank in ((first, 2), (torch.linalg.inv(first), 2), (first @ second, 4)):
        assert project(matrix, sm.ToeplitzLike(rank), sweeps=0).error < 1e-10
    assert project(first, sm.ToeplitzLike(1), sweeps=0).error > 1e-3


@pytest.mark.parametrize("size", [16, 64])
def test_circuits_D4_norm_of_the_inverse(size: int) -> None:
    """``M -> Z_1 M - M Z_-1`` shrinks no matrix by more than ``2 sin(pi / 2 n)``, and some by as much."""
    values = [torch.linalg.eigvals(displacement.shift(size, f)) for f in (1.0, -1.0)]
    gap = float((values[0][:, None] - values[1]).abs().min())
    assert gap == pytest.approx(2 * math.sin(math.pi / (2 * size)), rel=1e-9)
    matrix = gaussian(size, size)
    for rank in (1, 2, 5, size // 2):
        found = toeplitz_like_generators(matrix, rank)
        tail = found.tail
        tensors = {"left": found.left, "right": found.right}
        dense = sm.StructuredMatrix(sm.ToeplitzLike(rank), (size, size), tensors).to_dense()
        error = float(torch.linalg.norm(matrix - dense))
        assert tail / 2 <= error <= tail / gap * (1 + 1e-9)
        bounded = project(matrix, sm.ToeplitzLike(rank), sweeps=1)
        norm = float(torch.linalg.norm(matrix))
        assert bounded.certificate is Certificate.BOUND
        assert bounded.lower_bound == pytest.approx(tail / 2 / norm, rel=1e-9)
        assert bounded.lower_bound <= bounded.error <= 1


# ------------------------------------------------------------------------------------------------ learned operators


def operator(values: Tensor) -> Tensor:
    """The dense subdiagonal (n,) or tridiagonal (3, n) operator with its corners."""
    rows = values[None] if values.dim() == 1 else values
    size = rows.shape[1]
    matrix = torch.zeros(size, size, dtype=values.dtype)
    for i in range(size):
        matrix[(i + 1) % size, i] += rows[0, i]
        if len(rows) == 3:
            matrix[i, i] += rows[1, i]
            matrix[i, (i + 1) % size] += rows[2, i]
    return matrix


def krylov(matrix: Tensor, vector: Tensor, count: int) -> Tensor:
    columns = [vector]
    for _ in range(count - 1):
        columns.append(matrix @ columns[-1])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_krylov_matrices(size: int) -> None:
    vectors = gaussian(2, size)
    for count in {1, max(1, size - 2), size}:
        sub, tri = gaussian(size, seed=1), gaussian(3, size, seed=2)
        expected = torch.cat([krylov(operator(sub), v, count) for v in vectors], 1)
        close(subdiagonal_krylov(sub, vectors, count), expected)
        expected = torch.cat([krylov(operator(tri), v, count) for v in vectors], 1)
        close(tridiagonal_krylov(tri, vectors, count), expected)


def test_krylov_matrices_with_zeros_have_gradients() -> None:
    values = gaussian(6)
    values[2] = 0.0
    arguments = (values.requires_grad_(), gaussian(2, 6, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, v: subdiagonal_krylov(a, v, 5), arguments)
    assert torch.autograd.gradgradcheck(lambda a, v: subdiagonal_krylov(a, v, 5), arguments)


@pytest.mark.parametrize("kind", [sm.LDRSubdiagonal, sm.LDRTridiagonal])
@pytest.mark.parametrize("rank", [1, 2])
def test_circuits_D2_displacement_rank_of_krylov_products(kind: type[Structure], rank: int) -> None:
    size = 14
    matrix = member(kind(rank), (size, size))  # type: ignore[call-arg]
    tensors = {n: t + 0.3 * gaussian(*t.shape, seed=3) if "operator" in n else t for n, t in matrix.tensors.items()}
    dense = sm.StructuredMatrix(matrix.structure, (size, size), tensors).to_dense()
    a, b = operator(tensors["left_operator"]), operator(tensors["right_operator"]).T
    terms = [
        krylov(a, g, size) @ krylov(b.T, h, size).T for g, h in zip(tensors["left"], tensors["right"], strict=True)
    ]
    close(dense, torch.stack(terms).sum(0))
    assert sm.displacement_rank(dense, displacement.Operators(a, b, stein=True)) <= 2 * rank
    scaled = displacement.Operators(a, torch.linalg.inv(b)).displace(dense)
    values = torch.linalg.svdvals(scaled)
    assert float(values[2 * rank]) <= 1e-9 * float(values[0])


@pytest.mark.parametrize("spread", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("corner", [0.0, 0.7])
def test_circuits_D3_transforms_equal_the_krylov_matrix(spread: float, corner: float) -> None:
    """Where the scaling D allows it; beyond, and with a zero in the operator, the matrix is written out."""
    size, count = 600, 600
    step = spread ** (1 / (size - 1))
    values = torch.full((size,), step, dtype=F64)
    values[-1] = corner
    vectors = gaussian(2, size)
    stage = sm.StructuredMatrix.random(sm.LDRSubdiagonal(2), (size, size), dtype=F64).program
    left = stages(stage)[1]
    tensors = {"left_operator": values, "left": vectors}
    program, made = fuse(left, tensors)
    assert any(isinstance(s, Convolution) and s.transform for s in stages(program))
    x = gaussian(3, 2 * count, seed=1)
    close(apply(program, made, x), x @ subdiagonal_krylov(values, vectors, count).T, 1e-11 * spread)
    back = fuse(left.transpose(), tensors)
    y = gaussian(3, size, seed=2)
    close(apply(*back, y), y @ subdiagonal_krylov(values, vectors, count), 1e-11 * spread)


@pytest.mark.parametrize(("factor", "dtype"), [(1.1, F64), (0.9, F64), (1.02, torch.float32), (0.0, F64)])
def test_circuits_D3_fallback(factor: float, dtype: torch.dtype) -> None:
    size = 1024
    values = torch.full((size,), factor, dtype=dtype)
    vectors = gaussian(1, size).to(dtype)
    assert subdiagonal_by_transforms(values, vectors, 64) is None
    left = stages(sm.StructuredMatrix.random(sm.LDRSubdiagonal(1), (size, 64), dtype=dtype).program)[1]
    program, made = fuse(left, {"left_operator": values, "left": vectors})
    assert isinstance(program, Contraction)
    (matrix,) = made.values()
    assert bool(torch.isfinite(matrix).all())


@pytest.mark.parametrize("structure", [sm.VandermondeLike(3), sm.LDRTridiagonal(2), sm.LDRSubdiagonal(3)], ids=str)
def test_a_frozen_layer_takes_no_more_operations_than_the_dense_one(structure: sm.Structure) -> None:
    """What is written out is larger than the matrix; then the matrix itself is what runs."""
    generator = torch.Generator().manual_seed(0)
    layer = sm.nn.StructuredLinear(48, 40, structure=structure, dtype=torch.float64, generator=generator)
    frozen = layer.freeze()
    assert sum(stage.multiplications for stage in stages(frozen.program)) <= 48 * 40
    x = torch.randn(5, 48, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(frozen(x), layer(x))


def test_what_a_frozen_layer_runs_is_explained() -> None:
    """A fresh operator is the shift, for which transforms are stable."""
    layer = layer_of(member(sm.LDRSubdiagonal(1), (700, 700)))
    assert "krylov written out" in layer.explain()
    frozen = layer.freeze()
    assert "Fourier transforms" in str(frozen)
    assert "fast Fourier transform" in frozen.explain()
    assert "krylov" not in frozen.explain()
    x = gaussian(3, 700)
    close(frozen(x), layer(x).detach(), 1e-11)


def test_a_fresh_operator_is_the_shift() -> None:
    assert operator(Shift().values(4)).tolist() == displacement.shift(4).tolist()
    matrix = member(sm.LDRSubdiagonal(2), (9, 9)).to_dense()
    zero = displacement.shift(9)
    assert sm.displacement_rank(matrix, displacement.Operators(zero, zero.T, stein=True)) == 2


# --------------------------------------------------------------------------------------------------------- solving


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 40])
@pytest.mark.parametrize(
    ("structure", "method"),
    [
        (sm.Circulant(), "division"),
        (sm.Toeplitz(), "GKO"),
        (sm.Hankel(), "GKO"),
        (sm.ToeplitzLike(1), "GKO"),
        (sm.HankelLike(1), "GKO"),
        (sm.CauchyLike(1), "GKO"),
        (sm.Cauchy(), "GKO"),
        (sm.Dense(), "LU"),
    ],
    ids=str,
)
def test_solve(structure: Structure, method: str, size: int) -> None:
    matrix, b = member(structure, (size, size), seed=4), gaussian(size, 2, seed=1)
    for one in (matrix, matrix.T):
        found = displacement.solve(one, b)
        assert method in found.method
        condition = float(torch.linalg.cond(one.to_dense()))
        close(found.x, torch.linalg.solve(one.to_dense(), b), 1e-13 * max(1.0, condition) * size)
        assert found.residual < 1e-12 * max(1.0, found.growth)
        close(one.solve(b[:, 0]), found.x[:, 0], 1e-12 * max(1.0, condition))


@pytest.mark.parametrize("structure", [sm.Vandermonde(), sm.VandermondeLike(1), sm.VandermondeLike(2)], ids=str)
def test_solve_vandermonde(structure: Structure) -> None:
    """Real nodes: the condition number is large, the residual is small."""
    size = 7
    matrix, b = member(structure, (size, size)), gaussian(size, seed=1)
    for one in (matrix, matrix.T):
        found = displacement.solve(one, b)
        assert "GKO" in found.method
        condition = float(torch.linalg.cond(one.to_dense()))
        close(found.x, torch.linalg.solve(one.to_dense(), b), 1e-13 * condition)


@pytest.mark.parametrize("structure", [sm.Vandermonde(), sm.VandermondeLike(1)], ids=str)
@pytest.mark.parametrize("node", [-1.0, -1.0 + 1e-9])
def test_solve_with_a_node_that_is_a_root_of_the_shift(structure: Structure, node: float) -> None:
    """There the generators vanish, the matrix is as regular as ever."""
    matrix = member(structure, (3, 3))
    tensors = {**matrix.tensors, "nodes": torch.tensor([0.0, 1.0, node], dtype=F64)}
    matrix, b = sm.StructuredMatrix(structure, (3, 3), tensors), gaussian(3, seed=1)
    for one in (matrix, matrix.T):
        close(one.solve(b), torch.linalg.solve(one.to_dense(), b), 1e-11)


def test_solve_agrees_with_levinson() -> None:
    matrix, b = member(sm.Toeplitz(), (60, 60)), gaussian(60)
    w = matrix.tensors["weight"].numpy()
    expected = scipy.linalg.solve_toeplitz((w[59:], w[:60][::-1]), b.numpy())
    close(matrix.solve(b), expected, 1e-9)


def test_solve_in_other_precisions_and_complex() -> None:
    matrix = sm.StructuredMatrix.random(sm.Toeplitz(), (9, 9), dtype=torch.complex128)
    b = gaussian(9)
    close(matrix.solve(b), torch.linalg.solve(matrix.to_dense(), b.to(torch.complex128)), 1e-10)
    close(matrix.T.solve(b), torch.linalg.solve(matrix.T.to_dense(), b.to(torch.complex128)), 1e-10)
    single = member(sm.Circulant(), (8, 8)).to(dtype=torch.float32)
    assert single.solve(torch.ones(8)).dtype == torch.float32


def test_solve_refuses() -> None:
    with pytest.raises(ShapeError, match="not square"):
        member(sm.Toeplitz(), (3, 4)).solve(torch.ones(3))
    with pytest.raises(ShapeError, match="right hand side"):
        member(sm.Toeplitz(), (3, 3)).solve(torch.ones(4))
    tensors = {"weight": torch.zeros(4, dtype=F64)}, {"weight": torch.zeros(7, dtype=F64)}
    singular = (
        sm.StructuredMatrix(sm.Circulant(), (4, 4), tensors[0]),
        sm.StructuredMatrix(sm.Toeplitz(), (4, 4), tensors[1]),
        sm.StructuredMatrix(sm.Dense(), (4, 4), {"weight": torch.zeros(4, 4, dtype=F64)}),
    )
    for matrix in singular:
        with pytest.raises(DataError, match="singular"):
            matrix.solve(torch.ones(4, dtype=F64))
    for structure in (sm.LowRank(3), sm.HankelLike(1)):  # no pivot of theirs is exactly zero
        matrix = member(structure, (5, 5))
        tensors = {name: t.clone() for name, t in matrix.tensors.items()}
        tensors["left"] = torch.ones_like(tensors["left"])
        with pytest.raises(DataError, match="singular"):
            sm.StructuredMatrix(structure, (5, 5), tensors).solve(gaussian(5))
    with pytest.raises(DataError, match="right hand side"):
        member(sm.Toeplitz(), (3, 3)).solve(torch.tensor([1.0, torch.inf, 0.0]))


@pytest.mark.parametrize("structure", [sm.Toeplitz(), sm.Circulant(), sm.Dense()], ids=str)
def test_solve_no_right_hand_sides(structure: Structure) -> None:
    assert member(structure, (5, 5)).solve(torch.ones(5, 0, dtype=F64)).shape == (5, 0)

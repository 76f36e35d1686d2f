"""Which matrices are butterfly matrices, or products of few: the exact members of the literature, one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from circuits import up
from scipy import fft, linalg

from structmat.circuit import Floats, Rationals
from structmat.circuit.catalogue import fourier, haar, hadamard
from structmat.circuit.kaleidoscope import ButterflyProduct, Kaleidoscope, Stage, kaleidoscope, permutation_starred
from structmat.circuit.kaleidoscope.stage import bit_reversal

EXACT = Rationals()
COMPLEX = Floats(complex)


def decimation_in_time(size: int) -> ButterflyProduct:
    """B with F = B R: twiddles [[1, w], [1, -w]]."""
    stages = []
    for s in up(size):
        w = np.exp(-1j * np.pi * np.arange(s) / s)
        block = np.stack([np.stack([np.ones(s), w]), np.stack([np.ones(s), -w])])
        stages.append(Stage.of(np.broadcast_to(block, (size // (2 * s), 2, 2, s))))
    return ButterflyProduct(size, tuple(stages))


# ------------------------------------------------------------------------------------------------------ the checks


@pytest.mark.parametrize("size", [2, 4, 16, 64, 512, 1024])
def test_circuits_B1_transforms_are_butterfly_matrices(size: int) -> None:
    rng = np.random.default_rng(size)
    reversal = bit_reversal(size)
    butterfly = decimation_in_time(size)
    assert butterfly.strides == up(size)
    x = rng.standard_normal((3, size))
    np.testing.assert_allclose(butterfly.multiply(x[:, reversal], COMPLEX), np.fft.fft(x), atol=1e-12 * size)
    # By transposition F = R B^T, with B^T in B*.
    np.testing.assert_allclose(butterfly.T.multiply(x, COMPLEX)[:, reversal], np.fft.fft(x), atol=1e-12 * size)
    # A circulant matrix is in B B* without a permutation.
    column = rng.standard_normal(size)
    eigenvalues = np.fft.fft(column)[reversal] / size
    conjugate = ButterflyProduct(size, tuple(Stage.of(s.weight.conj()) for s in butterfly.stages))
    first = (conjugate.stages[0].columns_scaled(eigenvalues), *conjugate.stages[1:])
    circulant = Kaleidoscope(ButterflyProduct(size, butterfly.T.stages + first), size, size)
    assert circulant.width == 1
    expected = np.fft.ifft(np.fft.fft(x) * np.fft.fft(column))
    np.testing.assert_allclose(circulant.multiply(x, COMPLEX), expected, atol=1e-12 * size)


def test_circuits_B1_hadamard_needs_no_permutation() -> None:
    for starred in (False, True):
        stages = walsh(32, starred=starred)
        assert np.array_equal(ButterflyProduct(32, stages).to_dense(EXACT), hadamard(32).to_dense(EXACT))


def scaled_last(product: ButterflyProduct, scale: Any) -> ButterflyProduct:
    """The product with a diagonal matrix on the left: the last stage takes it in."""
    last = product.stages[-1].transpose().columns_scaled(np.broadcast_to(scale, product.size)).transpose()
    return ButterflyProduct(product.size, (*product.stages[:-1], last))


def circulant(column: Any) -> ButterflyProduct:
    """``conj(B) diag(eigenvalues / n, in bit-reversed order) B^T``: no permutation is needed."""
    size = len(column)
    butterfly = decimation_in_time(size)
    conjugate = ButterflyProduct(size, tuple(Stage.of(stage.weight.conj()) for stage in butterfly.stages))
    eigenvalues = np.fft.fft(column)[bit_reversal(size)] / size
    first = (conjugate.stages[0].columns_scaled(eigenvalues), *conjugate.stages[1:])
    return ButterflyProduct(size, butterfly.T.stages + first)


def rotation(vector: Any) -> ButterflyProduct:
    """An orthogonal member of B* that takes a vector to its norm times the first unit vector."""
    size = len(vector)
    stages, rest = [], np.array(vector, dtype=float)
    for stride in up(size)[::-1]:
        weight = Stage.identity(size, stride).weight.astype(float)
        upper, lower = rest[:stride], rest[stride : 2 * stride]
        norm = np.hypot(upper, lower)
        safe = np.where(norm > 0, norm, 1)
        c, s = np.where(norm > 0, upper / safe, 1), lower / safe
        weight[0] = np.stack([np.stack([c, s]), np.stack([-s, c])])
        stages.append(Stage.of(weight))
        rest = norm
    return ButterflyProduct(size, tuple(stages))


@pytest.mark.parametrize("size", [2, 4, 16, 64, 512])
def test_circuits_B1_inverse_and_real_relatives_of_the_fourier_transform(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((2, size))
    k = np.arange(size)
    reversal = bit_reversal(size)
    butterfly = decimation_in_time(size)
    halved = ButterflyProduct(size, tuple(Stage.of(stage.weight.conj() / 2) for stage in butterfly.stages))
    np.testing.assert_allclose(halved.multiply(x[:, reversal], COMPLEX), np.fft.ifft(x), atol=1e-14 * size)
    hartley = scaled_last(butterfly, 1 + 1j).multiply(x[:, reversal], COMPLEX).real
    angle = 2 * np.pi * np.outer(k, k) / size
    np.testing.assert_allclose(hartley, x @ (np.cos(angle) + np.sin(angle)), atol=1e-12 * size)
    # Cosine and sine transforms: the evens ascending, then the odds descending, in bit-reversed order.
    folded = np.concatenate([k[::2], k[1::2][::-1]])[reversal]
    cosine_2 = scaled_last(butterfly, 2 * np.exp(-0.5j * np.pi * k / size))
    np.testing.assert_allclose(cosine_2.multiply(x[:, folded], COMPLEX).real, fft.dct(x), atol=1e-12 * size)
    unfolded = np.empty(size, dtype=np.int64)
    unfolded[folded] = k
    transposed = cosine_2.T.multiply(x, COMPLEX).real[:, unfolded]
    doubled = x + np.where(k == 0, x, 0)  # SciPy takes the zeroth term once, the transpose twice
    np.testing.assert_allclose(transposed, fft.dct(doubled, type=3), atol=1e-12 * size)
    signs = np.where(k < size // 2 + size % 2, 1, -1)
    shift = np.exp(-2j * np.pi * k / size)  # moves every frequency by one: the exponent k + 1 afterwards
    sine_2 = scaled_last(butterfly, 2j * np.exp(-0.5j * np.pi * (k + 1) / size))
    first = sine_2.stages[0].columns_scaled((signs * shift)[reversal])
    sine_2 = ButterflyProduct(size, (first, *sine_2.stages[1:]))
    np.testing.assert_allclose(sine_2.multiply(x[:, folded], COMPLEX).real, fft.dst(x), atol=1e-12 * size)
    # With the exponent k, as printed in the appendix of arXiv 1903.05895, it is another matrix.
    misprint = scaled_last(sine_2, np.exp(0.5j * np.pi / size)).multiply(np.eye(size)[:, folded], COMPLEX).real
    assert np.abs(misprint - fft.dst(np.eye(size))).max() > 1 / size


@pytest.mark.parametrize("size", [2, 8, 64])
def test_circuits_B1_kronecker_products_and_wavelets_are_butterfly_matrices(size: int) -> None:
    rng = np.random.default_rng(size)
    blocks = rng.integers(-3, 4, (len(up(size)), 2, 2))
    tied = [
        Stage.of(np.broadcast_to(block[None, :, :, None], (size // (2 * s), 2, 2, s)))
        for s, block in zip(up(size), blocks, strict=True)
    ]
    expected = np.ones((1, 1), dtype=np.int64)
    for block in blocks:
        expected = np.kron(block, expected)
    assert np.array_equal(ButterflyProduct(size, tuple(tied)).to_dense(EXACT), expected)
    # The Haar wavelet in place: at stride s only pairs of multiples of s are mixed.
    stages = []
    for s in up(size):
        weight = Stage.identity(size, s).weight.astype(float)
        weight[:, :, :, 0] = np.array([[1, 1], [1, -1]]) / math.sqrt(2)
        stages.append(Stage.of(weight))
    in_place = ButterflyProduct(size, tuple(stages)).to_dense()
    k = np.arange(size)
    level = np.array([size if i == 0 else i & -i for i in range(size)])
    coarse_first = np.lexsort((k, -level))
    np.testing.assert_allclose(in_place[coarse_first], haar(size).to_dense(), atol=1e-14)


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("factor", [1, -1, 0.5])
def test_circuits_B1_circulant_relatives_are_in_one_pair(size: int, factor: float) -> None:
    """f-circulant matrices: the wrapped entries times f; a cyclic shift is one of them."""
    rng = np.random.default_rng(size)
    for column in (rng.standard_normal(size), np.eye(size)[1]):
        eta = np.power(complex(factor), np.arange(size) / size)
        inner = circulant(column * eta)
        first = inner.stages[0].columns_scaled(eta)
        product = ButterflyProduct(size, (first, *inner.stages[1:]))
        matrix = scaled_last(product, 1 / eta)
        i, j = np.indices((size, size))
        expected = np.where(i >= j, column[(i - j) % size], factor * column[(i - j) % size])
        assert Kaleidoscope(matrix, size, size).width == 1
        np.testing.assert_allclose(matrix.to_dense(COMPLEX), expected, atol=1e-12 * size)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (3, 9), (12, 7), (30, 33)])
def test_circuits_B1_toeplitz_matrices_of_any_size_are_corners_of_one_pair(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    first_column, first_row = rng.standard_normal(rows), rng.standard_normal(columns)
    first_row[0] = first_column[0]
    size = max(2, 1 << (rows + columns - 2).bit_length())
    padding = np.zeros(size - rows - columns + 1)
    embedded = circulant(np.concatenate([first_column, padding, first_row[:0:-1]]))
    matrix = Kaleidoscope(embedded, columns, rows)
    assert matrix.width == 1
    np.testing.assert_allclose(matrix.to_dense(COMPLEX), linalg.toeplitz(first_column, first_row), atol=1e-12)
    # So is a circulant matrix of any size.
    size = max(2, 1 << (2 * rows - 2).bit_length())
    padding = np.zeros(size - 2 * rows + 1)
    corner = Kaleidoscope(circulant(np.concatenate([first_column, padding, first_column[1:]])), rows, rows)
    np.testing.assert_allclose(corner.to_dense(COMPLEX), linalg.circulant(first_column), atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 32])
def test_circuits_B1_rank_one_and_householder_matrices_are_in_one_pair(size: int) -> None:
    rng = np.random.default_rng(size)
    u, v = rng.standard_normal((2, size))
    into, back = rotation(v), rotation(u).T
    first = back.stages[0].columns_scaled(np.linalg.norm(u) * np.linalg.norm(v) * np.eye(size)[0])
    outer = Kaleidoscope(ButterflyProduct(size, (*into.stages, first, *back.stages[1:])), size, size)
    assert outer.width == 1
    np.testing.assert_allclose(outer.to_dense(), np.outer(u, v), atol=1e-12)
    for alpha in (-2 / (v @ v), 0.7):
        back = into.T
        scale = np.ones(size)
        scale[0] += alpha * (v @ v)
        first = back.stages[0].columns_scaled(scale)
        reflected = Kaleidoscope(ButterflyProduct(size, (*into.stages, first, *back.stages[1:])), size, size)
        assert reflected.width == 1
        np.testing.assert_allclose(reflected.to_dense(), np.eye(size) + alpha * np.outer(v, v), atol=1e-12)
    diagonal = Stage.identity(size, 1).columns_scaled(u)
    assert np.array_equal(ButterflyProduct(size, (diagonal,)).to_dense(), np.diag(u))


def walsh(size: int, *, starred: bool = False) -> tuple[Stage, ...]:
    """The stages of the Hadamard matrix, which is in B and in B*."""
    block = np.array([[1, 1], [1, -1]])[None, :, :, None]
    strides = up(size)[::-1] if starred else up(size)
    return tuple(Stage.of(np.broadcast_to(block, (size // (2 * s), 2, 2, s))) for s in strides)


def after_diagonal(stages: tuple[Stage, ...], scale: Any) -> tuple[Stage, ...]:
    """The stages after a diagonal matrix, which the first one takes in."""
    return (stages[0].columns_scaled(scale), *stages[1:])


@pytest.mark.parametrize("size", [2, 8, 64, 256])
def test_circuits_B1_hadamard_and_diagonal_in_turns_is_in_two_pairs(size: int) -> None:
    """(H D)^3, the stand-in for a random rotation, and Fastfood, S H G P H B."""
    rng = np.random.default_rng(size)
    d = rng.choice([-3, -1, 2], (3, size))
    h = linalg.hadamard(size)
    plain, starred = walsh(size), walsh(size, starred=True)
    idle = tuple(Stage.identity(size, s) for s in up(size))
    stages = (*after_diagonal(starred, d[0]), *after_diagonal(plain, d[1]), *after_diagonal(starred, d[2]), *idle)
    turns = Kaleidoscope(ButterflyProduct(size, stages), size, size)
    assert turns.width == 2
    assert np.array_equal(turns.to_dense(EXACT), h @ np.diag(d[2]) @ h @ np.diag(d[1]) @ h @ np.diag(d[0]))

    b, g, s = rng.choice([-3, -1, 2], (3, size))
    order = rng.permutation(size)
    routed = permutation_starred(order).stages
    last = ButterflyProduct(size, after_diagonal(plain, g))
    stages = (*after_diagonal(starred, b), *routed, *scaled_last(last, s).stages)
    fastfood = Kaleidoscope(ButterflyProduct(size, stages), size, size)
    assert fastfood.width == 2
    assert np.array_equal(
        fastfood.to_dense(EXACT), np.diag(s) @ h @ np.diag(g) @ np.eye(size, dtype=int)[order] @ h @ np.diag(b)
    )


@pytest.mark.parametrize("size", [2, 8, 64])
def test_circuits_B1_layers_of_diagonals_between_transforms_are_in_two_pairs(size: int) -> None:
    """Two layers A F D F^-1 are in (B B*)^2; one layer A C^-1 D C with cosine transforms in (B B*)^2 of twice the size.

    The cosine layer is the circulant of the input and its mirror image, which one B* makes of the padded input.
    """
    rng = np.random.default_rng(size)
    a, d = rng.standard_normal((2, 2, size)) + 1j * rng.standard_normal((2, 2, size))
    expected = np.eye(size)
    stages: tuple[Stage, ...] = ()
    for outer, inner in zip(a, d, strict=True):
        expected = outer[:, None] * np.fft.fft(inner[:, None] * np.fft.ifft(expected, axis=0), axis=0)
        # F diag(inner) F^-1 is the circulant matrix whose eigenvalues are the inner ones, in mirrored order.
        stages += scaled_last(circulant(np.fft.fft(inner) / size), outer).stages
    layers = Kaleidoscope(ButterflyProduct(size, stages), size, size)
    assert layers.width == 2
    np.testing.assert_allclose(layers.to_dense(COMPLEX), expected, atol=1e-11 * np.abs(expected).max())

    outer, inner = rng.standard_normal((2, size))
    copy = Stage.of(np.broadcast_to(np.array([[1, 0], [1, 0]])[None, :, :, None], (1, 2, 2, size)))
    mirror = [Stage.switches(np.repeat([[False], [True]], s, 1).repeat(size // (2 * s), 0)) for s in up(size)[::-1]]
    idle = tuple(Stage.identity(2 * size, s) for s in up(2 * size))
    symbol = np.concatenate([inner, [0], inner[:0:-1]])
    inside = scaled_last(circulant(np.fft.ifft(symbol)), np.concatenate([outer, np.zeros(size)]))
    layer = Kaleidoscope(ButterflyProduct(2 * size, (copy, *mirror, *idle, *inside.stages)), size, size)
    assert (layer.width, layer.expansion) == (2, 2)
    cosines = fft.dct(np.eye(size), axis=0)
    expected = outer[:, None] * np.linalg.solve(cosines, inner[:, None] * cosines)
    np.testing.assert_allclose(layer.to_dense(COMPLEX), expected, atol=1e-12 * size)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_circuits_B1_the_fourier_matrix_in_its_own_order_is_in_neither_class(size: int) -> None:
    """Between two stages one coordinate joins certain rows and columns, whose block then has rank 1."""
    far, near = np.array([0, size // 2]), np.array([0, 1])
    transform = np.fft.fft(np.eye(size))
    for strides, block in ((up(size), np.ix_(far, near)), (up(size)[::-1], np.ix_(near, far))):
        rng = np.random.default_rng(size)
        stages = [Stage.of(rng.integers(1, 9, (size // (2 * s), 2, 2, s))) for s in strides]
        assert np.linalg.matrix_rank(ButterflyProduct(size, tuple(stages)).to_dense()[block]) == 1
        assert np.linalg.matrix_rank(transform[block]) == 2
    # Two pairs hold it: the bit reversal, and the butterfly matrix.
    compiled = kaleidoscope(fourier(size))
    assert compiled.width == 2
    np.testing.assert_allclose(compiled.to_dense(), transform, atol=1e-12 * size)


@pytest.mark.parametrize("size", [4, 8])
def test_circuits_B2_permutations_of_one_butterfly_matrix(size: int) -> None:
    """Switch settings give different permutations, and those of B* are the modular-balanced ones."""
    strides = up(size)[::-1]
    pairs = len(strides) * size // 2
    x = np.arange(size)
    reached = set()
    for bits in itertools.product([False, True], repeat=pairs):
        crossed = np.array(bits).reshape(len(strides), -1)
        y = x
        for s, switch in zip(strides, crossed, strict=True):
            pair = y.reshape(-1, 2, s)
            y = np.where(switch.reshape(-1, 1, s), pair[:, ::-1], pair).ravel()
        reached.add(tuple(y.tolist()))
    assert len(reached) == 2**pairs == {4: 16, 8: 4096}[size]

    def balanced(order: tuple[int, ...]) -> bool:
        chunks = [np.array(order).reshape(-1, m) % m for m in up(2 * size)]
        return all(len(set(chunk.tolist())) == len(chunk) for array in chunks for chunk in array)

    everything = itertools.permutations(range(size))
    assert reached == {order for order in everything if balanced(order)}

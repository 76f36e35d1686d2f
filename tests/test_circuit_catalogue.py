"""The catalogue: every circuit computes what SciPy or the definition does, with the counts of the literature."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from scipy import fft, linalg

from structmat.circuit import Circuit, PrimeField, Rationals, equal, fan_in_depth, morgenstern
from structmat.circuit import catalogue as cat
from structmat.circuit.catalogue.cosine import published_cosine, published_hartley
from structmat.circuit.catalogue.fourier import published_fourier
from structmat.circuit.catalogue.hadamard import outputs_of_level, published_haar, published_hadamard, scaling_filter
from structmat.circuit.catalogue.polynomials import published_evaluation
from structmat.circuit.catalogue.prefix import published_prefix_sums
from structmat.circuit.catalogue.products import published_karatsuba, published_strassen
from structmat.circuit.measure import largest_weight
from structmat.errors import CircuitError

EXACT = Rationals()
PRIME = 998_244_353
"""119 * 2^23 + 1: roots of unity of every power of two up to 2^23."""
POWERS = [1, 2, 4, 8, 16, 64]


def assert_close(circuit: Circuit, matrix: np.ndarray, tolerance: float = 1e-12) -> None:
    dense = circuit.to_dense()
    assert dense.shape == matrix.shape
    assert np.abs(dense - matrix).max() <= tolerance * max(1.0, float(np.abs(matrix).max())) * len(matrix)


# --------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 8, 12, 15, 30, 36, 64])
@pytest.mark.parametrize("folded", [True, False])
def test_fourier_transforms_of_any_size(size: int, folded: bool) -> None:
    assert_close(cat.fourier(size, folded=folded), fft.fft(np.eye(size)))
    assert_close(cat.fourier(size, folded=folded, inverse=True), fft.ifft(np.eye(size)))


@pytest.mark.parametrize("radices", [(4, 4, 4), (2, 8, 4), (8, 8), (64,), (2,) * 6])
def test_radices_in_any_order(radices: tuple[int, ...]) -> None:
    assert_close(cat.fourier(64, radices=radices), fft.fft(np.eye(64)))


@pytest.mark.parametrize("levels", range(9))
def test_circuits_C6_fourier_counts(levels: int) -> None:
    size = 1 << levels
    circuit = cat.fourier(size)
    assert (circuit.gates, circuit.depth) == (size * levels, levels)
    assert (circuit.T.gates, circuit.T.depth) == (size * levels, levels)
    unfolded = cat.fourier(size, folded=False)
    assert unfolded.gates <= 2 * size * levels
    if levels:
        assert size / 2 * levels <= circuit.gates, "Morgenstern's bound"
        assert morgenstern(circuit.to_dense(), largest_weight(circuit)) == pytest.approx(size / 2 * levels)


@pytest.mark.parametrize("size", [2, 4, 8, 32, 128])
def test_split_radix_has_the_published_count(size: int) -> None:
    circuit = cat.split_radix(size)
    assert_close(circuit, fft.fft(np.eye(size)))
    assert cat.real_operations(circuit) == published_fourier(size).operations
    assert published_fourier(size).compared_with(circuit) == 1
    assert cat.real_operations(cat.fourier(size, folded=False)) >= published_fourier(size).operations


@pytest.mark.parametrize("size", [2, 3, 8])
def test_number_theoretic_transforms_are_exact(size: int) -> None:
    prime = 12289 if size != 3 else 7
    field = PrimeField(prime)
    forward, back = cat.fourier(size, prime=prime), cat.fourier(size, inverse=True, prime=prime)
    dense = forward.to_dense(field)
    root = int(dense[1, 1])
    assert [pow(root, k, prime) == 1 for k in range(1, size + 1)] == [False] * (size - 1) + [True]
    assert np.array_equal(dense, [[pow(root, j * k, prime) for j in range(size)] for k in range(size)])
    assert np.array_equal(back.to_dense(field) @ dense % prime, np.eye(size))


def trigonometric(name: str, kind: int, size: int) -> np.ndarray:
    j, k = np.arange(size)[None], np.arange(size)[:, None]
    first = (k + 1, j + 1) if name == "sine" else (k, j)
    angle = {
        1: np.pi * first[0] * first[1] / (size + 1 if name == "sine" else max(1, size - 1)),
        2: np.pi * first[0] * (2 * j + 1) / (2 * size),
        3: np.pi * first[1] * (2 * k + 1) / (2 * size),
        4: np.pi * (2 * j + 1) * (2 * k + 1) / (4 * size),
    }[kind]
    return np.sin(angle) if name == "sine" else np.cos(angle)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("size", POWERS)
def test_cosine_and_sine_transforms(kind: int, size: int) -> None:
    n = size + (kind == 1)
    circuit = cat.cosine(n, kind)
    assert_close(circuit, trigonometric("cosine", kind, n))
    if kind > 1:
        assert circuit.counts.operations == published_cosine(size, kind).operations
    n = size - (kind == 1)
    if n:
        turned = cat.sine(n, kind)
        assert_close(turned, trigonometric("sine", kind, n))
        if kind > 1:
            assert turned.counts.operations == published_cosine(size, kind).operations


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_cosine_and_sine_transforms_are_those_of_scipy(kind: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 16 + (kind == 1)))
    ends = np.ones(x.shape[1])
    # SciPy weighs inner terms twice where ours are all weighed once.
    if kind in (1, 3):
        ends[0] = 2
    if kind == 1:
        ends[-1] = 2
    assert np.allclose(2 * cat.cosine(x.shape[1], kind).evaluate(x), fft.dct(x * ends, kind))
    x = x[:, : 16 - (kind == 1)]
    ends = np.ones(x.shape[1])
    if kind == 3:
        ends[-1] = 2
    assert np.allclose(2 * cat.sine(x.shape[1], kind).evaluate(x), fft.dst(x * ends, kind))


@pytest.mark.parametrize("size", [*POWERS, 256])
def test_the_hartley_transform(size: int) -> None:
    circuit = cat.hartley(size)
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    assert_close(circuit, np.cos(angle) + np.sin(angle))
    if size > 1:
        assert circuit.counts.operations == published_hartley(size).operations


@pytest.mark.parametrize("size", POWERS)
def test_the_hadamard_transform(size: int) -> None:
    circuit = cat.hadamard(size)
    assert np.array_equal(circuit.to_dense(EXACT), linalg.hadamard(size))
    assert circuit.depth == fan_in_depth(linalg.hadamard(size))
    assert circuit.counts.operations == published_hadamard(size).operations


@pytest.mark.parametrize("size", POWERS)
def test_haar_wavelets(size: int) -> None:
    circuit = cat.haar(size)
    matrix = circuit.to_dense()
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-14
    assert np.allclose(matrix[0], 1 / math.sqrt(size))
    for level in range(1, size.bit_length()):
        rows = matrix[outputs_of_level(size, level)]
        block = np.repeat([1.0, -1.0], 1 << (level - 1)) / math.sqrt(1 << level)
        assert np.allclose(rows, np.kron(np.eye(size >> level), block))
    if size > 1:
        assert circuit.additions == 2 * (size - 1)
        assert circuit.counts.operations == published_haar(size).operations
    assert np.allclose(cat.daubechies(size, 1).to_dense(), matrix)


@pytest.mark.parametrize("moments", range(1, 11))
def test_daubechies_wavelets(moments: int) -> None:
    taps = scaling_filter(moments)
    assert taps.sum() == pytest.approx(math.sqrt(2))
    high = taps[::-1] * (-1.0) ** np.arange(2 * moments)
    for power in range(moments):
        assert abs(np.sum(high * (np.arange(2 * moments) / moments) ** power)) < 1e-8, "vanishing moments"
    circuit = cat.daubechies(64, moments)
    matrix = circuit.to_dense()
    assert np.abs(matrix @ matrix.T - np.eye(64)).max() < 1e-12
    assert circuit.levels.count > 1
    known = {1: [1, 1], 2: [1 + math.sqrt(3), 3 + math.sqrt(3), 3 - math.sqrt(3), 1 - math.sqrt(3)]}
    if moments in known:
        assert taps == pytest.approx(np.array(known[moments]) / (4 * math.sqrt(2) if moments == 2 else math.sqrt(2)))
    assert np.allclose(cat.daubechies(64, moments, levels=0).to_dense(), np.eye(64))


# -------------------------------------------------------------------------------------------------------- prefix sums


@pytest.mark.parametrize("network", ["serial", "kogge-stone", "sklansky", "brent-kung"])
def test_prefix_sums(network: Any) -> None:
    for size in (1, 2, 3, 7, 16, 33):
        assert np.array_equal(cat.prefix_sums(size, network).to_dense(EXACT), np.tril(np.ones((size, size), int)))
    for level in range(1, 8):
        size = 1 << level
        circuit = cat.prefix_sums(size, network)
        assert circuit.multiplications == 0
        expected = {
            "serial": (size - 1, size - 1),
            "kogge-stone": (size * level - size + 1, level),
            "sklansky": (size * level // 2, level),
            "brent-kung": (2 * size - 2 - level, max(level, 2 * level - 2)),
        }[network]
        assert (circuit.additions, circuit.depth) == expected
        assert circuit.gates + circuit.depth >= 2 * size - 2, "Snir's bound"
        assert circuit.depth >= fan_in_depth(np.tril(np.ones((size, size))))
    assert published_prefix_sums(64).operations == cat.prefix_sums(64).additions


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("winograd", [True, False])
def test_strassen(size: int, winograd: bool) -> None:
    circuit = cat.strassen(size, winograd=winograd)
    a, b = np.random.default_rng(0).integers(-9, 10, (2, size, size))
    x = np.concatenate([a.ravel(), b.ravel()])
    assert np.array_equal(circuit.evaluate(x, EXACT).reshape(size, size), a @ b)
    assert equal(circuit, cat.strassen(size, base=size), seed=0)
    level = size.bit_length() - 1
    assert circuit.multiplications == 7**level
    assert circuit.additions == (5 if winograd else 6) * (7**level - 4**level)
    if winograd:
        assert circuit.counts.operations == published_strassen(size).operations
    assert cat.strassen(size, base=size).counts.operations == size**2 * (2 * size - 1)
    assert equal(cat.strassen(6, base=3), cat.strassen(6, base=6), seed=0)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_polynomial_products(size: int) -> None:
    school, karatsuba = cat.polynomial_product(size, "schoolbook"), cat.polynomial_product(size)
    assert equal(school, karatsuba, seed=0)
    assert equal(school, cat.polynomial_product(size, "fourier", prime=PRIME), prime=PRIME, seed=0)
    a, b = np.random.default_rng(0).standard_normal((2, size))
    for circuit in (school, karatsuba, cat.polynomial_product(size, "fourier")):
        assert np.allclose(circuit.evaluate(np.concatenate([a, b])), np.convolve(a, b))
    assert school.multiplications == size**2
    assert school.additions == (size - 1) ** 2
    assert karatsuba.multiplications == 3 ** (size.bit_length() - 1)
    assert karatsuba.counts.operations == published_karatsuba(size).operations
    assert equal(cat.polynomial_product(5, "schoolbook"), cat.polynomial_product(5, "schoolbook"))


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_circular_convolutions(size: int) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, size))
    expected = fft.ifft(fft.fft(a) * fft.fft(b))
    for folded in (True, False):
        circuit = cat.circular_convolution(size, folded=folded)
        assert np.allclose(circuit.evaluate(np.concatenate([a, b])), expected)
    assert np.allclose(linalg.circulant(a) @ b, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (8, 8), (7, 1), (1, 7), (20, 33)])
def test_toeplitz_matrices(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    column, row = (rng.integers(-5, 6, n) for n in shape)
    expected = linalg.toeplitz(column, row)
    assert_close(cat.toeplitz(column, row), expected)
    assert_close(cat.toeplitz(column, row, folded=False), expected)
    assert np.array_equal(cat.toeplitz(column, row, "karatsuba").to_dense(EXACT), expected)
    modulo = cat.toeplitz(column, row, prime=PRIME).to_dense(PrimeField(PRIME))
    assert np.array_equal(modulo, expected % PRIME)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_evaluation_and_interpolation_at_many_points(size: int) -> None:
    points = np.random.default_rng(size).permutation(4 * size)[:size] - size
    vandermonde = np.vander(points.astype(object), size, increasing=True)
    values, coefficients = cat.evaluation(points), cat.interpolation(points)
    assert np.array_equal(values.to_dense(EXACT), vandermonde)
    assert np.array_equal(coefficients.to_dense(EXACT) @ vandermonde, np.eye(size, dtype=int))
    modulo = cat.evaluation(points, prime=PRIME)
    assert equal(modulo, values, prime=PRIME, seed=0)
    assert equal(cat.interpolation(points, prime=PRIME), coefficients, prime=PRIME, seed=0)


def test_fast_evaluation_beats_horner_in_the_end() -> None:
    points = np.random.default_rng(0).integers(0, PRIME, 256)
    circuit = cat.evaluation(points, prime=PRIME)
    assert circuit.counts.operations < published_evaluation(256).operations
    floats = np.linspace(-1, 1, 8)
    assert np.allclose(cat.evaluation(floats).to_dense(), np.vander(floats, 8, increasing=True))
    assert np.allclose(cat.interpolation(floats).to_dense() @ np.vander(floats, 8, increasing=True), np.eye(8))


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cat.fourier(6, radices=(2, 2)), r"size 6 multiply to it and are at least 2; got \(2, 2\)"),
        (lambda: cat.fourier(8, prime=7), "no root of unity of order 8 modulo 7"),
        (lambda: cat.fourier(0), "size 0 multiply"),
        (lambda: cat.split_radix(6), "split-radix transform has a size of 1, 2, 4, ...; got 6"),
        (lambda: cat.cosine(8, 5), "types 1 to 4; got 5"),
        (lambda: cat.cosine(8, 1), "type 1 less one has a size of 1, 2, 4, ...; got 7"),
        (lambda: cat.sine(8, 1), "type 1 plus one has a size of 2, 4, 8, ...; got 9"),
        (lambda: published_cosine(8, 1), "no published count here for type 1"),
        (lambda: cat.hadamard(3), "got 3"),
        (lambda: cat.haar(8, levels=4), "0 to 3 levels; got 4"),
        (lambda: cat.daubechies(8, 11), "1 to 10 vanishing moments here; got 11"),
        (lambda: cat.prefix_sums(0), "at least one input; got 0"),
        (lambda: cat.prefix_sums(4, "ladner"), "no network of prefix sums named 'ladner'"),  # type: ignore[arg-type]
        (lambda: cat.strassen(6, base=4), "size 6 does not split into blocks of size 4"),
        (lambda: cat.strassen(6), "got 6"),
        (lambda: cat.polynomial_product(0), "at least one coefficient; got 0"),
        (lambda: cat.polynomial_product(4, "toom"), "no method 'toom'"),  # type: ignore[arg-type]
        (lambda: cat.polynomial_product(3), "got 3"),
        (lambda: cat.toeplitz([], []), "got 0 and 0"),
        (lambda: cat.toeplitz([1], [1], "toom"), "no method 'toom'"),  # type: ignore[arg-type]
        (lambda: cat.evaluation([1, 2, 3]), "got 3"),
        (lambda: cat.interpolation([1, 1]), "needs different points"),
    ],
)
def test_what_is_not_in_the_catalogue_is_refused(make: Any, message: str) -> None:
    with pytest.raises(CircuitError, match=message.replace("...", r"\.\.\.")):
        make()


def test_the_table_of_the_catalogue() -> None:
    lines = cat.table(16).splitlines()
    head = ["gates", "depth", "least", "operations", "classical", "fewest", "source"]
    assert lines[0].split() == ["n", "=", "16", *head]
    entries = cat.entries(16)
    assert len(lines) == len(entries) + 1
    for line, entry in itertools.zip_longest(lines[1:], entries):
        assert line.startswith(entry.name)
        assert f"{entry.operations:,}" in line
        assert entry.circuit.depth >= entry.least_depth
    reached = [e.name for e in entries if e.published is not None and e.operations <= e.published.operations]
    missed = {e.name for e in entries if e.published is not None} - set(reached)
    assert missed == {
        "Fourier, radix 2",
        "polynomial product, Fourier",
        "circular convolution",
        "Toeplitz product",
        "evaluation at n points",
    }
    with pytest.raises(CircuitError, match="The catalogue has a size of 4, 8, 16"):
        cat.entries(12)


def test_the_fewest_known_operations_are_those_of_the_literature() -> None:
    known = {entry.name: entry.published for entry in cat.entries(64)}
    record = {name: p.record for name, p in known.items() if p is not None and p.record is not None}
    assert record["Fourier, split radix"] == 1152  # Johnson and Frigo 2007, table 1
    assert record["cosine, type 2"] == record["sine, type 3"] == 686  # Shao and Johnson 2008, table 1
    assert record["cosine, type 4"] == 800
    assert [e.published.record for e in cat.entries(16) if e.name == "cosine, type 2" and e.published] == [112]


@pytest.mark.slow
def test_a_fourier_circuit_of_a_million_gates_in_ten_seconds() -> None:
    """Built, transposed, differentiated and evaluated on 64 vectors; processor time, on however busy a machine."""
    begin = time.process_time()
    circuit = cat.fourier(2**16)
    transposed, gradient = circuit.transpose(), circuit.vjp()
    x = np.random.default_rng(0).standard_normal((64, 2**16)) + 0j
    values = circuit.evaluate(x)
    taken = time.process_time() - begin
    assert circuit.gates == transposed.gates == 2**20
    np.testing.assert_allclose(values, np.fft.fft(x), atol=1e-9)
    # The Fourier matrix is symmetric, and so is its own gradient.
    np.testing.assert_allclose(transposed.evaluate(x[:2]), values[:2], atol=1e-9)
    np.testing.assert_allclose(gradient.evaluate(np.concatenate([x[:2], x[:2]], axis=1)), values[:2], atol=1e-9)
    assert taken < 10

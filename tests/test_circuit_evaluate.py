"""Evaluation in every arithmetic, and equality of circuits."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from circuits import fft, hadamard, random_polynomial
from hypothesis import given
from scipy import linalg

from structmat.circuit import Builder, Floats, PrimeField, Rationals, equal
from structmat.circuit.fields import is_prime
from structmat.errors import CircuitError

seeds = st.integers(0, 100_000)
EXACT = Rationals()


# ------------------------------------------------------------------------------------------------------- arithmetic


@given(seeds)
def test_all_arithmetics_agree(seed: int) -> None:
    circuit = random_polynomial(seed, parameters=seed % 3)
    x = np.random.default_rng(seed).integers(-3, 4, (4, circuit.in_features))
    exact = circuit.evaluate(x, EXACT)
    prime = PrimeField(10_007)
    assert np.array_equal(circuit.evaluate(x, prime), exact % 10_007)
    scale = max(1.0, float(np.abs(exact.astype(float)).max(initial=0)))
    assert np.abs(circuit.evaluate(x) - exact.astype(float)).max(initial=0) <= 1e-12 * scale
    assert np.abs(circuit.evaluate(x + 0j) - exact.astype(float)).max(initial=0) <= 1e-12 * scale
    single = circuit.evaluate(x.astype(np.float32))
    assert single.dtype == np.float32
    assert np.array_equal(circuit.evaluate(x[0], EXACT), exact[0])


@given(seeds)
def test_quotients_in_all_arithmetics(seed: int) -> None:
    circuit = random_polynomial(seed, divisions=True)
    x = np.random.default_rng(seed).integers(-3, 4, circuit.in_features)
    try:
        exact = circuit.evaluate(x, EXACT)
    except CircuitError as error:
        assert "divides by zero" in str(error)  # noqa: PT017
        return
    modulo = [Fraction(v).numerator * pow(Fraction(v).denominator, -1, 2_147_483_629) % 2_147_483_629 for v in exact]
    assert circuit.evaluate(x, PrimeField()).tolist() == modulo
    assert circuit.evaluate(x) == pytest.approx([float(v) for v in exact], rel=1e-9, abs=1e-9)


def test_fractions_stay_exact() -> None:
    builder = Builder(2)
    third = builder.sum([0, 1], [Fraction(1, 3), Fraction(1, 7)])
    circuit = builder.build([third])
    assert circuit.evaluate([Fraction(1, 2), 1]).tolist() == [Fraction(13, 42)]
    assert circuit.to_dense().tolist() == [[Fraction(1, 3), Fraction(1, 7)]]
    p = PrimeField(101)
    assert circuit.evaluate([3, 7], p).tolist() == [2]


def test_complex_constants_modulo_a_prime() -> None:
    circuit = fft(3)
    half = PrimeField(13)
    root = half.array(np.array([1j]))[0]
    assert root * root % 13 == 12
    builder = Builder(1)
    fourth = builder.build(builder.sums([[0]] * 2, [[1j], [-0.5]]))
    assert fourth.evaluate([1], half).tolist() == [root, 6]
    with pytest.raises(CircuitError, match="no square root modulo 7"):
        fourth.evaluate([1], PrimeField(7))
    with pytest.raises(CircuitError, match="complex number does not fit float64"):
        circuit.evaluate(np.ones(8), Floats())


def test_large_products_do_not_overflow_modulo_the_largest_prime() -> None:
    builder = Builder(3)
    circuit = builder.build([builder.product([0, 1, 2]), builder.sum([0, 1, 2], [2_147_483_628] * 3)])
    p = PrimeField().prime
    x = [p - 1, p - 2, p - 3]
    assert circuit.evaluate(x, PrimeField()).tolist() == [(-1 * -2 * -3) % p, (-1 * (-1 - 2 - 3)) % p]


def test_primes() -> None:
    assert [n for n in range(60) if is_prime(n)] == [
        n for n in range(2, 60) if all(n % d for d in range(2, n))
    ]  # fmt: skip
    assert not is_prime(3_215_031_751), "a strong pseudoprime to the bases 2, 3, 5, 7"
    for wrong in (1, 9, 1 << 31, 2_147_483_629 * 2):
        with pytest.raises(CircuitError, match="prime below"):
            PrimeField(wrong)
    with pytest.raises(CircuitError, match="its denominator is a multiple"):
        PrimeField(5).array(np.array([Fraction(1, 5)], dtype=object))
    with pytest.raises(CircuitError, match="no arithmetic of int64"):
        Floats(np.int64)


def test_growing_rationals_are_stopped() -> None:
    builder = Builder(1)
    node = 0
    for _ in range(30):
        node = builder.product([node, node])
    circuit = builder.build([node])
    with pytest.raises(CircuitError, match=r"has \d+ bits, more than the 65536 allowed"):
        circuit.evaluate([3], EXACT)
    assert circuit.evaluate([3], PrimeField(101)).tolist() == [pow(3, 1 << 30, 101)]
    with pytest.raises(CircuitError, match="nan is no rational number"):
        circuit.evaluate([math.nan], EXACT)


def test_division_by_zero_names_the_gate() -> None:
    builder = Builder(2)
    builder.build([builder.quotient(0, 1)])
    circuit = builder.build([2])
    for field in (Floats(), EXACT, PrimeField(7)):
        with pytest.raises(CircuitError, match="Gate 2 divides by zero"):
            circuit.evaluate([[1, 2], [1, 0]], field)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches(batch: int) -> None:
    x = np.random.default_rng(0).standard_normal((batch, 8))
    assert np.allclose(hadamard(3).evaluate(x), x @ linalg.hadamard(8))
    assert hadamard(3).evaluate(x).shape == (batch, 8)


def test_batches_that_do_not_fit_the_buffer_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structmat.circuit.evaluate._BUFFER_BYTES", 3 * 16 * 8)
    x = np.random.default_rng(0).standard_normal((10, 8))
    assert np.allclose(hadamard(3).evaluate(x), x @ linalg.hadamard(8))


def test_rows_of_the_buffer_are_used_again() -> None:
    assert hadamard(10).plan.rows == 2 * 1024
    assert hadamard(10).nodes == 11 * 1024


# --------------------------------------------------------------------------------------------------------- equality


def test_equality_states_its_error_probability() -> None:
    builder = Builder(2)
    plus, minus = builder.sum([0, 1]), builder.sum([0, 1], [1, -1])
    product = builder.build([builder.product([plus, minus])])
    squares = builder.build([builder.sum([builder.product([0, 0]), builder.product([1, 1])], [1, -1])])
    same = equal(product, squares, trials=2)
    assert same
    assert same.degree == 2
    assert same.error_probability == pytest.approx((2 / same.prime) ** 2)
    other = equal(product, builder.build([plus]))
    assert not other
    assert other.error_probability == 0
    assert other.witness is not None
    with pytest.raises(CircuitError, match=r"\(2, 1, 0\) and \(2, 2, 0\)"):
        equal(product, hadamard(1))


def test_rational_functions_are_compared() -> None:
    builder = Builder(2)
    square = builder.product([0, 0])
    ratio = builder.build([builder.quotient(square, 0)])
    assert equal(ratio, builder.build([0]))
    assert not equal(ratio, builder.build([1]))
    zero = builder.sum([0, 0], [1, -1])
    with pytest.raises(CircuitError, match="20 random points a divisor was zero"):
        equal(builder.build([builder.quotient(0, zero)]), ratio)


def test_a_small_prime_can_be_fooled_as_often_as_stated() -> None:
    """x (x - 1) (x - 2) vanishes at 3 of 7 points."""
    builder = Builder(1)
    one = builder.constant([1, 2])
    cubic = builder.build([builder.product([0, *builder.sums([[0, one[0]], [0, one[1]]], [1, -1])])])
    zero = builder.build([builder.sum([])])
    fooled = sum(bool(equal(cubic, zero, trials=1, prime=7, seed=s)) for s in range(300))
    assert equal(cubic, zero, trials=1, prime=7, seed=next(s for s in range(300) if equal(
        cubic, zero, trials=1, prime=7, seed=s
    ))).error_probability == pytest.approx(3 / 7)  # fmt: skip
    assert 0.3 < fooled / 300 < 0.56

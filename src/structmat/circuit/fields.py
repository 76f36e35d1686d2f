"""The arithmetic in which a circuit is evaluated, as a value that is passed in.

Values are arrays (nodes, batch) with the batch innermost: a level gathers whole rows. A field says how numbers of a
circuit become its own, and computes the gates of one level; anything with these five operations will do, for example a
semiring of log-probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import sparse

from structmat.circuit.arrays import Numbers
from structmat.errors import CircuitError

Indices = NDArray[np.signedinteger[Any]]

LARGEST_PRIME = 2_147_483_629
"""The largest prime below 2^31 that is 1 modulo 4, so that -1 has a square root."""


class Field(ABC):
    """An arithmetic. Subclasses are frozen dataclasses and final."""

    @abstractmethod
    def array(self, values: Numbers) -> Numbers:
        """Numbers of a circuit or of a user as numbers of the field, any shape.

        Raises:
            CircuitError: one of them is not in the field.
        """

    @abstractmethod
    def weighted_sum(self, values: Numbers, start: Indices, operand: Indices, weight: Numbers) -> Numbers:
        """``sum over k of weight[k] * values[operand[k]]`` for each segment: (segments, batch). None is empty."""

    @abstractmethod
    def product(self, values: Numbers, start: Indices, operand: Indices) -> Numbers:
        """The product of ``values[operand[k]]`` for each segment: (segments, batch). None is empty."""

    @abstractmethod
    def quotient(self, dividend: Numbers, divisor: Numbers) -> Numbers:
        """Elementwise. Raises :class:`ZeroDivisionError` where a divisor is zero."""

    @abstractmethod
    def random(self, shape: tuple[int, ...], generator: np.random.Generator) -> Numbers:
        """Random numbers of the field."""

    def zeros(self, shape: tuple[int, ...]) -> Numbers:
        """Zeros of the field's type."""
        return np.broadcast_to(self.array(np.zeros(1, dtype=np.int64)), shape).copy()


@dataclass(frozen=True)
class Floats(Field):
    """Floating point: float32, float64, complex64 or complex128."""

    dtype: np.dtype[Any]

    def __init__(self, dtype: DTypeLike = np.float64) -> None:
        object.__setattr__(self, "dtype", np.dtype(dtype))
        if self.dtype not in (np.float32, np.float64, np.complex64, np.complex128):
            raise CircuitError(
                f"Floats has no arithmetic of {self.dtype}. Use float32, float64, complex64, complex128."
            )

    def array(self, values: Numbers) -> Numbers:
        if self.dtype.kind != "c" and _has_complex(values):
            raise CircuitError(
                f"A complex number does not fit {self.dtype}. Evaluate in Floats(complex) or with complex inputs."
            )
        return values.astype(self.dtype, copy=False)

    def weighted_sum(self, values: Numbers, start: Indices, operand: Indices, weight: Numbers) -> Numbers:
        # One pass in C with nothing stored between the gather and the sum.
        matrix = sparse.csr_array((weight, operand, start), shape=(len(start) - 1, len(values)))
        return np.asarray(matrix @ values)

    def product(self, values: Numbers, start: Indices, operand: Indices) -> Numbers:
        return _product(values, start, operand)

    def quotient(self, dividend: Numbers, divisor: Numbers) -> Numbers:
        if not np.all(divisor):
            raise ZeroDivisionError
        return np.asarray(dividend / divisor)

    def random(self, shape: tuple[int, ...], generator: np.random.Generator) -> Numbers:
        """Standard normal numbers; real and imaginary part each, in a complex type."""
        drawn = generator.standard_normal(shape)
        if self.dtype.kind == "c":
            drawn = drawn + 1j * generator.standard_normal(shape)
        return np.asarray(drawn).astype(self.dtype)

    def __str__(self) -> str:
        return str(self.dtype)


@dataclass(frozen=True)
class Rationals(Field):
    """Exact rational numbers: Python integers and fractions, which grow.

    Floats are taken for the dyadic fractions that they are.

    Args:
        bits: the largest size of a numerator or denominator. Repeated squaring doubles it at every level, so that some
            twenty levels would fill the memory; beyond this size the evaluation stops with an error.
    """

    bits: int = 1 << 16

    def array(self, values: Numbers) -> Numbers:
        if values.dtype.kind == "i":
            return values.astype(object)
        exact = np.empty(values.shape, dtype=object)
        exact.ravel()[:] = [_rational(number) for number in values.ravel().tolist()]
        return exact

    def weighted_sum(self, values: Numbers, start: Indices, operand: Indices, weight: Numbers) -> Numbers:
        return self._bounded(np.add.reduceat(weight[:, None] * values[operand], start[:-1], axis=0))

    def product(self, values: Numbers, start: Indices, operand: Indices) -> Numbers:
        return self._bounded(_product(values, start, operand))

    def quotient(self, dividend: Numbers, divisor: Numbers) -> Numbers:
        result = np.empty(divisor.shape, dtype=object)
        pairs = zip(dividend.ravel().tolist(), divisor.ravel().tolist(), strict=True)
        result.ravel()[:] = [Fraction(above) / below for above, below in pairs]
        return self._bounded(result)

    def random(self, shape: tuple[int, ...], generator: np.random.Generator) -> Numbers:
        """Integers between -1000 and 1000."""
        return generator.integers(-1000, 1001, shape).astype(object)

    def _bounded(self, values: Numbers) -> Numbers:
        for number in values.ravel().tolist():
            size = max(number.numerator.bit_length(), number.denominator.bit_length())
            if size > self.bits:
                raise CircuitError(
                    f"A rational value has {size} bits, more than the {self.bits} allowed: exact values of deep "
                    "circuits grow without end. Use PrimeField() to compare circuits, or Rationals(bits=...)."
                )
        return values

    def __str__(self) -> str:
        return "the rationals"


@dataclass(frozen=True)
class PrimeField(Field):
    """Integers modulo a prime below 2^31: exact, and of constant size.

    Rational numbers are taken as quotients modulo the prime, floats for the dyadic fractions that they are, and complex
    numbers by a square root of -1 (which exists where the prime is 1 modulo 4).

    Raises:
        CircuitError: ``prime`` is no prime below 2^31.
    """

    prime: int = LARGEST_PRIME

    def __post_init__(self) -> None:
        if not 2 <= self.prime < 1 << 31 or not is_prime(self.prime):
            raise CircuitError(f"PrimeField needs a prime below 2^31; got {self.prime}.")

    def array(self, values: Numbers) -> Numbers:
        if values.dtype.kind == "i":
            return np.asarray(values % self.prime)
        distinct, inverse = (list(values.ravel().tolist()), None)
        if values.dtype != object and values.size > 64:
            unique, inverse = np.unique(values.ravel(), return_inverse=True)
            distinct = unique.tolist()
        reduced = np.array([self._reduce(number) for number in distinct], dtype=np.int64)
        return (reduced if inverse is None else reduced[inverse]).reshape(values.shape)

    def _reduce(self, number: Any) -> int:
        if isinstance(number, complex) and number.imag:
            root = self._imaginary_unit()
            return (self._reduce(number.real) + root * self._reduce(number.imag)) % self.prime
        exact = _rational(number.real)
        below = exact.denominator % self.prime
        if not below:
            raise CircuitError(f"{number} has no value modulo {self.prime}: its denominator is a multiple of it.")
        return int(exact.numerator * pow(below, -1, self.prime) % self.prime)

    def _imaginary_unit(self) -> int:
        if self.prime % 4 != 1:
            raise CircuitError(f"-1 has no square root modulo {self.prime}. Complex numbers need a prime 1 modulo 4.")
        for base in range(2, self.prime):
            root = pow(base, (self.prime - 1) // 4, self.prime)
            if root * root % self.prime == self.prime - 1:
                return root
        raise AssertionError("half of all bases give a root")

    def weighted_sum(self, values: Numbers, start: Indices, operand: Indices, weight: Numbers) -> Numbers:
        # Each term is below 2^62 before it is reduced, and a sum of 2^31 reduced terms is below 2^62.
        terms = values[operand]
        scaled = np.flatnonzero(weight != 1)
        terms[scaled] = terms[scaled] * weight[scaled, None] % self.prime
        return np.asarray(np.add.reduceat(terms, start[:-1], axis=0) % self.prime)

    def product(self, values: Numbers, start: Indices, operand: Indices) -> Numbers:
        counts = np.diff(start)
        result = values[operand[start[:-1]]]
        for factor in range(1, int(counts.max())):
            more = np.flatnonzero(counts > factor)
            result[more] = result[more] * values[operand[start[more] + factor]] % self.prime
        return result

    def quotient(self, dividend: Numbers, divisor: Numbers) -> Numbers:
        if not np.all(divisor):
            raise ZeroDivisionError
        # Fermat: the inverse is the power prime - 2.
        inverse, power, exponent = np.ones_like(divisor), divisor, self.prime - 2
        while exponent:
            if exponent & 1:
                inverse = inverse * power % self.prime
            power = power * power % self.prime
            exponent >>= 1
        return np.asarray(dividend * inverse % self.prime)

    def random(self, shape: tuple[int, ...], generator: np.random.Generator) -> Numbers:
        """Uniform over the field."""
        return generator.integers(0, self.prime, shape)

    def __str__(self) -> str:
        return f"the integers modulo {self.prime}"


def is_prime(number: int) -> bool:
    """Whether a number below 3.3 * 10^24 is prime (Sorenson and Webster 2015).

    Miller-Rabin with the first 13 primes as bases.
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def natural_field(*arrays: Numbers, precision: np.dtype[Any] | None = None) -> Field:
    """The field that fits numbers: rationals for objects, else floating point, complex where a number is.

    ``precision`` is that of the first array before it was widened: float32 stays float32.
    """
    if any(a.dtype == object for a in arrays):
        return Floats(complex) if any(_has_complex(a) for a in arrays) else Rationals()
    is_complex = any(a.dtype.kind == "c" for a in arrays)
    single = precision in (np.dtype(np.float32), np.dtype(np.complex64))
    if single:
        return Floats(np.complex64 if is_complex else np.float32)
    return Floats(np.complex128 if is_complex else np.float64)


def _product(values: Numbers, start: Indices, operand: Indices) -> Numbers:
    counts = np.diff(start)
    if len(counts) and counts.min() == counts.max() == 2:
        return np.asarray(values[operand[0::2]] * values[operand[1::2]])
    return np.multiply.reduceat(values[operand], start[:-1], axis=0)


def _has_complex(values: Numbers) -> bool:
    if values.dtype == object:
        return any(isinstance(number, complex) for number in values.ravel().tolist())
    return values.dtype.kind == "c"


def _rational(number: Any) -> Any:
    if isinstance(number, int):
        return number
    try:
        exact = Fraction(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise CircuitError(f"{number!r} is no rational number. Use int, Fraction or a finite float.") from error
    return exact.numerator if exact.denominator == 1 else exact

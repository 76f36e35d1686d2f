"""Bilinear circuits: products of matrices and polynomials. Inputs are the first factor's entries, then the second's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from structmat.circuit.arrays import Ints
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.fourier import fourier, log2, require_power_of_two
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.errors import CircuitError

Add = Callable[[Ints, Ints], Ints]
Multiply = Callable[[list[Ints], list[Ints]], list[Ints]]
Step = Callable[[list[Ints], list[Ints], Add, Add, Multiply], list[Ints]]


def strassen(size: int, *, winograd: bool = True, base: int = 1) -> Circuit:
    """The product of two square matrices with ``7^L`` multiplications for ``n = 2^L``.

    Args:
        size: ``base`` times a power of two. Inputs are both matrices row by row, outputs the product row by row.
        winograd: 15 additions of blocks in each step (Winograd's form) rather than Strassen's 18.
        base: blocks of this size are multiplied by the definition.

    Source: Strassen 1969; Winograd's form in Fischer and Probert 1974.

    Raises:
        CircuitError: the size is not ``base`` times a power of two.
    """
    if base < 1 or size % base:
        raise CircuitError(f"A matrix of size {size} does not split into blocks of size {base}.")
    require_power_of_two(size // base, "The number of blocks of Strassen's multiplication")
    builder = Builder(2 * size * size)
    a, b = builder.inputs.reshape(2, 1, size, size)
    step = _winograd if winograd else _strassen
    return builder.build(_multiplied(builder, a, b, base, step)[0])


def published_strassen(size: int) -> Published:
    """Winograd's form takes ``6 * 7^L - 5 * 4^L`` operations; Karstadt and Schwartz (2017) need about ``5 * 7^L``."""
    level = log2(size)
    return Published(6 * 7**level - 5 * 4**level, "Strassen 1969, Winograd's form")


def _multiplied(builder: Builder, a: Ints, b: Ints, base: int, step: Step) -> Ints:
    """Products of stacks of matrices (copies, n, n)."""
    n = a.shape[-1]
    if n <= base:
        left, right = np.broadcast_arrays(a[:, :, None, :], b.swapaxes(1, 2)[:, None, :, :])
        terms = builder.products(np.stack([left, right], axis=-1))
        return terms[..., 0] if n == 1 else builder.sums(terms)
    half = n // 2
    blocks = [[m[:, i : i + half, j : j + half] for i in (0, half) for j in (0, half)] for m in (a, b)]

    def add(first: Ints, second: Ints) -> Ints:
        return builder.sums(np.stack([first, second], axis=-1))

    def minus(first: Ints, second: Ints) -> Ints:
        return builder.sums(np.stack([first, second], axis=-1), [1, -1])

    def multiply(left: list[Ints], right: list[Ints]) -> list[Ints]:
        products = _multiplied(builder, np.concatenate(left), np.concatenate(right), base, step)
        return list(products.reshape(len(left), len(a), half, half))

    c = step(blocks[0], blocks[1], add, minus, multiply)
    return np.concatenate([np.concatenate(c[:2], axis=2), np.concatenate(c[2:], axis=2)], axis=1)


def _strassen(a: list[Ints], b: list[Ints], add: Add, minus: Add, multiply: Multiply) -> list[Ints]:
    (a11, a12, a21, a22), (b11, b12, b21, b22) = a, b
    m = multiply(
        [add(a11, a22), add(a21, a22), a11, a22, add(a11, a12), minus(a21, a11), minus(a12, a22)],
        [add(b11, b22), b11, minus(b12, b22), minus(b21, b11), b22, add(b11, b12), add(b21, b22)],
    )
    c11 = add(minus(add(m[0], m[3]), m[4]), m[6])
    c22 = add(minus(add(m[0], m[2]), m[1]), m[5])
    return [c11, add(m[2], m[4]), add(m[1], m[3]), c22]


def _winograd(a: list[Ints], b: list[Ints], add: Add, minus: Add, multiply: Multiply) -> list[Ints]:
    (a11, a12, a21, a22), (b11, b12, b21, b22) = a, b
    s1, t1 = add(a21, a22), minus(b12, b11)
    s2, t2 = minus(s1, a11), minus(b22, t1)
    s3, t3 = minus(a11, a21), minus(b22, b12)
    s4, t4 = minus(a12, s2), minus(t2, b21)
    m = multiply([a11, a12, s4, a22, s1, s2, s3], [b11, b21, b22, t4, t1, t2, t3])
    u = add(m[0], m[5])
    v = add(u, m[6])
    w = add(u, m[4])
    return [add(m[0], m[1]), add(w, m[2]), minus(v, m[3]), add(v, m[4])]


# ------------------------------------------------------------------------------------------------------ polynomials


def polynomial_product(
    size: int, method: Literal["schoolbook", "karatsuba", "fourier"] = "karatsuba", *, prime: int | None = None
) -> Circuit:
    """The ``2 n - 1`` coefficients of the product of two polynomials of ``n`` coefficients each.

    Args:
        size: ``n``, any for ``schoolbook``, else a power of two. Inputs are both lists of coefficients, lowest first.
        method: ``schoolbook`` takes ``n^2`` multiplications; ``karatsuba`` ``3^L`` for ``n = 2^L`` (Karatsuba and Ofman
            1962); ``fourier`` ``2 n`` between three transforms of ``2 n`` points, complex.
        prime: for ``fourier``, transforms modulo this prime: exact there.

    Raises:
        CircuitError: the size does not fit, or there is no such method.
    """
    if size < 1:
        raise CircuitError(f"Polynomials have at least one coefficient; got {size}.")
    builder = Builder(2 * size)
    a, b = builder.inputs.reshape(2, 1, size)
    if method == "schoolbook":
        return builder.build(_schoolbook(builder, a, b)[0])
    require_power_of_two(size, "A polynomial product by halves")
    if method == "karatsuba":
        return builder.build(_karatsuba(builder, a, b)[0])
    if method != "fourier":
        raise CircuitError(f"There is no method {method!r}. There are: schoolbook, karatsuba, fourier.")
    zeros = np.broadcast_to(builder.sum([]), (2, size))
    padded = np.concatenate([np.concatenate([a, b]), zeros], axis=1)
    values = builder.apply(fourier(2 * size, folded=False, prime=prime), padded)
    product = builder.products(values.T)
    result = builder.apply(fourier(2 * size, folded=False, inverse=True, prime=prime), product)
    return builder.build(result[: 2 * size - 1]).simplify()


def published_karatsuba(size: int) -> Published:
    """``3^L`` multiplications and ``6 * 3^L - 8 n + 2`` additions."""
    level = log2(size)
    return Published(7 * 3**level - 8 * size + 2, "Karatsuba and Ofman 1962; Weimerskirch and Paar 2003")


def _schoolbook(builder: Builder, a: Ints, b: Ints) -> Ints:
    copies, n = a.shape
    left, right = np.broadcast_arrays(a[:, :, None], b[:, None, :])
    terms = builder.products(np.stack([left, right], axis=-1))
    degree = np.add.outer(np.arange(n), np.arange(n)).ravel()
    order = np.argsort(degree, kind="stable")
    counts = np.tile(np.bincount(degree), copies)
    sums = builder.ragged_sums(counts, terms.reshape(copies, -1)[:, order].ravel())
    # The first and the last coefficient are products, not sums of one.
    result = sums.reshape(copies, 2 * n - 1)
    result[:, 0], result[:, -1] = terms[:, 0, 0], terms[:, -1, -1]
    return result


def _karatsuba(builder: Builder, a: Ints, b: Ints) -> Ints:
    copies, n = a.shape
    if n == 1:
        return builder.products(np.stack([a, b], axis=-1))
    half = n // 2
    sums = [builder.sums(np.stack([p[:, :half], p[:, half:]], axis=-1)) for p in (a, b)]
    products = _karatsuba(
        builder,
        np.concatenate([a[:, :half], a[:, half:], sums[0]]),
        np.concatenate([b[:, :half], b[:, half:], sums[1]]),
    )
    return recombined(builder, products.reshape(3, copies, n - 1))


def recombined(builder: Builder, products: Ints) -> Ints:
    """Karatsuba's recombination: from the products (3, copies, n - 1) of the low halves, the high halves and their
    sums, the coefficients (copies, 2 n - 1) of the whole product."""
    low, high, mixed = products
    copies, n = low.shape[0], low.shape[1] + 1
    half = n // 2
    middle = builder.sums(np.stack([mixed, low, high], axis=-1), [1, -1, -1])
    result = np.empty((copies, 2 * n - 1), dtype=np.int64)
    result[:, :half] = low[:, :half]
    result[:, half : n - 1] = builder.sums(np.stack([low[:, half:], middle[:, : half - 1]], axis=-1))
    result[:, n - 1] = middle[:, half - 1]
    result[:, n : n + half - 1] = builder.sums(np.stack([high[:, : half - 1], middle[:, half:]], axis=-1))
    result[:, n + half - 1 :] = high[:, half - 1 :]
    return result


def circular_convolution(size: int, *, folded: bool = True, prime: int | None = None) -> Circuit:
    """``y[k] = sum over j of a[j] b[(k - j) mod n]`` of two inputs, by three Fourier transforms of size ``n``.

    Args:
        size: any; the transforms have its prime factors as radices.
        folded: fewer gates, or fewer multiplications, as in :func:`~structmat.circuit.catalogue.fourier.fourier`.
        prime: transforms modulo this prime in place of complex ones.
    """
    builder = Builder(2 * size)
    values = builder.apply(fourier(size, folded=folded, prime=prime), builder.inputs.reshape(2, size))
    back = fourier(size, folded=folded, inverse=True, prime=prime)
    return builder.build(builder.apply(back, builder.products(values.T)))

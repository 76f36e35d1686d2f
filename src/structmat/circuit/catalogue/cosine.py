"""Discrete cosine and sine transforms of types I to IV, and the Hartley transform, of power-of-two sizes.

The matrices are plain cosines and sines, without SciPy's factor 2 and without normalisation (``n`` the size):

    cosine 1   cos(pi j k / (n - 1))               sine 1   sin(pi (j + 1) (k + 1) / (n + 1))
    cosine 2   cos(pi k (2 j + 1) / 2 n)           sine 2   sin(pi (k + 1) (2 j + 1) / 2 n)
    cosine 3   its transpose                       sine 3   its transpose
    cosine 4   cos(pi (2 k + 1) (2 j + 1) / 4 n)   sine 4   sin(pi (2 k + 1) (2 j + 1) / 4 n)

for ``y[k] = sum over j of matrix[k, j] * x[j]``. SciPy's ``dct(x, 2)``, ``dct(x, 4)``, ``dst(x, 1)``, ``dst(x, 2)``,
``dst(x, 4)`` are twice these; types 1 and 3 of ``dct`` and 3 of ``dst`` also halve the terms at the ends.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from structmat.circuit.arrays import Ints
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.fourier import log2, require_power_of_two
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.circuit.rebuild import without_copies
from structmat.circuit.simplify import prune
from structmat.errors import CircuitError


def cosine(size: int, kind: int = 2) -> Circuit:
    """The cosine transform of a type from 1 to 4.

    Type 2 is Lee's algorithm (IEEE Trans. ASSP 1984), with ``n / 2 * log2 n`` multiplications and ``3 n / 2 * log2 n -
    n + 1`` additions. It divides by cosines, so that rounding errors grow with the size. Type 3 is its transpose, with
    the same counts by the transposition principle; type 4 is two transforms of type 2 of half the size after ``n / 2``
    rotations (Wang 1984); type 1 halves into types 1 and 3.

    Args:
        size: a power of two, for type 1 a power of two plus 1.
        kind: 1, 2, 3 or 4.

    Raises:
        CircuitError: another size or type.
    """
    _require_kind(kind)
    require_power_of_two(size - (kind == 1), f"A cosine transform of type {kind}" + " less one" * (kind == 1))
    if kind == 3:
        return cosine(size, 2).transpose()
    builder = Builder(size)
    transform = {1: _cosine_1, 2: _cosine_2, 4: _cosine_4}[kind]
    return _built(builder, transform(builder, builder.inputs[None])[0])


def sine(size: int, kind: int = 2) -> Circuit:
    """The sine transform of a type from 1 to 4: types 2 to 4 are the cosine transforms with signs and orders changed.

    Args:
        size: a power of two, for type 1 a power of two less 1.
        kind: 1, 2, 3 or 4.

    Raises:
        CircuitError: another size or type.
    """
    _require_kind(kind)
    least = 2 if kind == 1 else 1
    require_power_of_two(size + (kind == 1), f"A sine transform of type {kind}" + " plus one" * (kind == 1), least)
    if kind == 3:
        return sine(size, 2).transpose()
    builder = Builder(size)
    transform = {1: _sine_1, 2: _sine_2, 4: _sine_4}[kind]
    return _built(builder, transform(builder, builder.inputs[None])[0])


def hartley(size: int) -> Circuit:
    """The Hartley transform ``y[k] = sum over j of x[j] * (cos + sin)(2 pi j k / n)``, real.

    Even and odd part of the input give a cosine and a sine transform of type 1, whose sum and difference are the
    result. Source of the transform: Bracewell 1983.

    Raises:
        CircuitError: the size is no power of two.
    """
    require_power_of_two(size, "A Hartley transform")
    builder = Builder(size)
    x = builder.inputs
    if size <= 2:
        return _built(builder, _cosine_1(builder, x[None])[0] if size == 2 else x)
    half = size // 2
    pairs = np.stack([x[1:half], x[:half:-1]], axis=-1)
    even = np.concatenate([x[:1], builder.sums(pairs), x[half : half + 1]])
    cosines, sines = _cosine_1(builder, even[None])[0], _sine_1(builder, builder.sums(pairs, [1, -1])[None])[0]
    both = np.stack([cosines[1:half], sines], axis=-1)
    up, down = builder.sums(both), builder.sums(both, [1, -1])
    return _built(builder, np.concatenate([cosines[:1], up, cosines[half:], down[::-1]]))


def published_cosine(size: int, kind: int) -> Published:
    """The counts that stood from 1984 on, for types 2, 3 and 4 (``n >= 2``), and those of Shao and Johnson.

    The latter are for orthonormal transforms, some 6 % fewer for large sizes.
    """
    level = log2(size)
    sign = (-1) ** level
    if kind == 4:
        record = Fraction(17 * size * level, 9) + Fraction(31 * size, 27) + Fraction(2 * sign * level, 9)
        record -= Fraction(4 * sign, 27)
        return Published(2 * size * level + size, "Wang 1984", False, int(record), "Shao and Johnson 2008")
    if kind in (2, 3):
        record = Fraction(17 * size * level, 9) - Fraction(17 * size, 27) - Fraction(sign * level, 9)
        record += Fraction(7 * sign, 54) + Fraction(3, 2)
        return Published(2 * size * level - size + 1, "Lee 1984", False, int(record), "Shao and Johnson 2008")
    raise CircuitError(f"There is no published count here for type {kind}. Types 2, 3 and 4 have one.")


def published_hartley(size: int) -> Published:
    """The split-radix count."""
    return Published(2 * size * log2(size) - 3 * size + 4, "Sorensen et al. 1985, split radix")


def _built(builder: Builder, outputs: Ints) -> Circuit:
    """The circuit, with changes of sign moved into the sums that follow."""
    return prune(without_copies(builder.build(outputs)))


def _require_kind(kind: int) -> None:
    if kind not in (1, 2, 3, 4):
        raise CircuitError(f"Cosine and sine transforms have types 1 to 4; got {kind}.")


def _cosine_2(builder: Builder, x: Ints) -> Ints:
    """Rows of x (copies, n). Lee: sums of mirrored entries give the even outputs, scaled differences the odd ones."""
    copies, n = x.shape
    if n == 1:
        return x
    pairs = np.stack([x[:, : n // 2], x[:, : n // 2 - 1 : -1]], axis=-1)
    scale = 1 / (2 * np.cos(np.pi * (2 * np.arange(n // 2) + 1) / (2 * n)))
    differences = builder.sums(builder.sums(pairs, [1, -1])[..., None], scale[:, None])
    halves = _cosine_2(builder, np.concatenate([builder.sums(pairs), differences]))
    result = np.empty_like(x)
    even, odd = halves[:copies], halves[copies:]
    result[:, 0::2] = even
    result[:, 1:-1:2] = builder.sums(np.stack([odd[:, :-1], odd[:, 1:]], axis=-1))
    result[:, -1] = odd[:, -1]
    return result


def _sine_2(builder: Builder, x: Ints) -> Ints:
    """The reversed cosine transform of the entries with alternating signs."""
    return _cosine_2(builder, _alternating(builder, x))[:, ::-1]


def _alternating(builder: Builder, x: Ints) -> Ints:
    """Every second entry negated."""
    result = x.copy()
    result[:, 1::2] = builder.sums(x[:, 1::2, None], -1)
    return result


def _cosine_4(builder: Builder, x: Ints) -> Ints:
    copies, n = x.shape
    if n == 1:
        return builder.sums(x[..., None], np.cos(np.pi / 4))
    half = n // 2
    angle = np.pi * (2 * np.arange(half) + 1) / (4 * n)
    pairs = np.stack([x[:, :half], x[:, : half - 1 : -1]], axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    # The alternating signs of the sine transform are in the rotation already.
    sign = (-1.0) ** np.arange(half)
    u = builder.sums(pairs, np.stack([c, s], axis=-1))
    v = builder.sums(pairs, np.stack([-s * sign, c * sign], axis=-1))
    both = _cosine_2(builder, np.concatenate([u, v]))
    U, V = both[:copies], both[copies:, ::-1]
    result = np.empty_like(x)
    result[:, 0] = U[:, 0]
    joint = np.stack([U[:, 1:], V[:, :-1]], axis=-1)
    result[:, 2::2] = builder.sums(joint)
    result[:, 1:-1:2] = builder.sums(joint, [1, -1])
    result[:, -1] = builder.sums(V[:, -1:], -1)
    return result


def _sine_4(builder: Builder, x: Ints) -> Ints:
    """``sin`` of type 4 is ``cos`` of type 4 of the reversed input with alternating signs of the output."""
    return _alternating(builder, _cosine_4(builder, x[:, ::-1]))


def _cosine_1(builder: Builder, x: Ints) -> Ints:
    """Rows of x (copies, n + 1): sums of mirrored entries give the even outputs, differences the odd ones by type 3."""
    n = x.shape[1] - 1
    if n == 1:
        return np.stack([builder.sums(x), builder.sums(x, [1, -1])], axis=1)
    half = n // 2
    pairs = np.stack([x[:, :half], x[:, :half:-1]], axis=-1)
    even = np.concatenate([builder.sums(pairs), x[:, half : half + 1]], axis=1)
    result = np.empty_like(x)
    result[:, 0::2] = _cosine_1(builder, even)
    result[:, 1::2] = builder.apply(cosine(half, 3), builder.sums(pairs, [1, -1]))
    return result


def _sine_1(builder: Builder, x: Ints) -> Ints:
    """Rows of x (copies, n - 1): of mirrored entries the differences give every second output, the sums the others."""
    n = x.shape[1] + 1
    if n == 2:
        return x
    half = n // 2
    pairs = np.stack([x[:, : half - 1], x[:, : half - 1 : -1]], axis=-1)
    result = np.empty_like(x)
    result[:, 1::2] = _sine_1(builder, builder.sums(pairs, [1, -1]))
    odd = np.concatenate([builder.sums(pairs), x[:, half - 1 : half]], axis=1)
    result[:, 0::2] = builder.apply(sine(half, 3), odd)
    return result

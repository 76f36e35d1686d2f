"""Kronecker products: how sizes factor, the best order of application, and nearest sums of products of two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from structmat.projection.target import Target

Pairs = tuple[tuple[int, int], ...]
"""Sizes ``(m_i, n_i)`` of the factors of a product, outermost first."""

MAX_ASPECT = 4
"""Sizes whose most even factors differ by more than this ratio (such as primes) are padded."""

_PADDED_ASPECT = 2

_GRAM_LIMIT = 1 << 26
"""Largest number of entries of the Gram matrices of weighted alternating least squares (512 MB)."""

_WORK_LIMIT = 4e9
"""Most multiply-adds of one sweep of exact weighted alternating least squares (about a second)."""

_RIDGE = 1e-10
_PATIENCE = 1e-7


# ------------------------------------------------------------------------------------------------- sizes and counts


def factor_pairs(size: int) -> list[tuple[int, int]]:
    """All ordered pairs ``(n, p)`` with ``n * p == size``, by ascending ``n``."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    pairs = [(n, size // n) for n in small]
    return pairs + [(p, n) for n, p in reversed(pairs) if n != p]


@lru_cache(maxsize=4096)
def even_factors(size: int, count: int) -> tuple[int, ...]:
    """``count`` factors of ``size``, ascending, with the smallest ratio of the largest to the smallest."""
    if count == 1:
        return (size,)
    options = (tuple(sorted((n, *even_factors(size // n, count - 1)))) for n in range(1, size + 1) if size % n == 0)
    return min(options, key=lambda f: (f[-1] / f[0], f))


@lru_cache(maxsize=4096)
def padded_factors(size: int, count: int) -> tuple[int, ...]:
    """Even factors of ``size``, or of the next larger number whose factors are even enough.

    For two factors the padding is at most ``2 sqrt(size)`` (n = ceil(sqrt(size)), p = ceil(size / n) always serve).
    """
    found = even_factors(size, count)
    if found[-1] <= MAX_ASPECT * found[0] or size < 2**count:
        return found
    larger = size
    while True:
        larger += 1
        found = even_factors(larger, count)
        if found[-1] <= _PADDED_ASPECT * found[0]:
            return found


def balanced_pairs(shape: tuple[int, int], count: int) -> Pairs:
    """Factor sizes for any shape: large outputs go with small inputs, so that all factors hold about equally many."""
    outputs, inputs = padded_factors(shape[0], count), padded_factors(shape[1], count)
    return tuple(zip(outputs, reversed(inputs), strict=True))


def application_order(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The order of applying the factors with the fewest operations: ascending ``1 / n_i - 1 / m_i``.

    Shrinking factors come first, the strongest first (exchange argument; Burrus and Selesnick, "Implementing Kronecker
    products efficiently"). For the transposed factors the rule gives the reversed order.
    """
    return tuple(sorted(range(len(pairs)), key=lambda i: 1 / pairs[i][1] - 1 / pairs[i][0]))


def application_cost(pairs: Sequence[tuple[int, int]], order: Sequence[int]) -> int:
    """Multiply-adds of one product of factors with a vector, applied in this order."""
    sizes = [n for _, n in pairs]
    total = 0
    for i in order:
        total += pairs[i][0] * math.prod(sizes)
        sizes[i] = pairs[i][0]
    return total


def degrees_of_freedom(pairs: Sequence[tuple[int, int]], terms: int) -> int:
    """Dimension of the set of sums of ``terms`` products of two factors."""
    (m, n), (p, q) = pairs
    return terms * (m * n + p * q - terms)


# -------------------------------------------------------------------------------------------------- rearrangement


def rearrange(matrix: Tensor, pairs: Pairs) -> Tensor:
    """The tensor with one axis ``m_i * n_i`` a factor that turns Kronecker products into outer products.

    Van Loan and Pitsianis, "Approximation with Kronecker products" (1993). Only moves entries.
    """
    count = len(pairs)
    grid = matrix.reshape(*(m for m, _ in pairs), *(n for _, n in pairs))
    axes = [axis for i in range(count) for axis in (i, count + i)]
    return grid.permute(axes).reshape([m * n for m, n in pairs])


def restore(tensor: Tensor, pairs: Pairs) -> Tensor:
    """The inverse of :func:`rearrange`."""
    count = len(pairs)
    grid = tensor.reshape([size for pair in pairs for size in pair])
    axes = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
    rows, columns = math.prod(m for m, _ in pairs), math.prod(n for _, n in pairs)
    return grid.permute(axes).reshape(rows, columns)


def observed(target: Target) -> Tensor | None:
    """Mask of the entries that are not padding, None if all are."""
    if not target.is_padded:
        return None
    mask = torch.zeros(target.native, dtype=torch.bool)
    mask[: target.shape[0], : target.shape[1]] = True
    return mask


# ----------------------------------------------------------------------------------- two factors: a (x) b, stacked
# a has shape (k, m n) and b (k, p q): the rearranged matrix is a.T @ b.


def nearest_terms(matrix: Tensor, pairs: Pairs, terms: int) -> tuple[Tensor, Tensor, float]:
    """The nearest sum of ``terms`` Kronecker products, balanced and orthogonal to each other, and its error.

    Optimal in the Frobenius norm: the truncated SVD of the rearranged matrix. Cost of that SVD.
    """
    u, s, vh = torch.linalg.svd(rearrange(matrix, pairs), full_matrices=False)
    root = s[:terms].sqrt()
    return (u[:, :terms] * root).T, root[:, None] * vh[:terms], float(torch.linalg.norm(s[terms:]))


def fill_padding(target: Target, pairs: Pairs, a: Tensor, b: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Better factors where part of the matrix is padding that may hold anything.

    Padding is filled with the present approximation and the whole projected again: the error on the true entries
    never rises (majorisation: the filled problem touches the true one at the present point).
    """
    mask = observed(target)
    assert mask is not None
    dense = restore(a.T @ b, pairs)
    error = target.error(dense)
    for _ in range(sweeps):
        filled = torch.where(mask, target.weight, dense)
        found = nearest_terms(filled, pairs, a.shape[0])
        dense = restore(found[0].T @ found[1], pairs)
        before, error = error, target.error(dense)
        if error > before:
            break
        a, b = found[:2]
        if before - error <= _PATIENCE * before:
            break
    return a, b


def separable_moment(moment: Tensor, inner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Positive semidefinite ``C1`` (n1, n1) and ``C2`` (n2, n2) whose Kronecker product is near ``moment``."""
    n1, n2 = inner
    grid = rearrange(moment, ((n1, n1), (n2, n2)))
    second = torch.eye(n2, dtype=moment.dtype).reshape(-1)
    first = second
    for _ in range(8):  # power iteration: each step maps positive semidefinite matrices to such
        first = grid @ second.conj()
        first = first / torch.linalg.norm(first).clamp(min=1e-300)
        second = first.conj() @ grid
    return first.reshape(n1, n1), second.reshape(n2, n2)


def _power(moment: Tensor, exponent: float, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh((moment + moment.mH) / 2)
    limit = values.max().clamp(min=0.0) * floor
    kept = values > limit
    powers = torch.where(kept, values.clamp(min=1e-300) ** exponent, torch.zeros_like(values))
    result: Tensor = (vectors * powers) @ vectors.mH
    return result


def separable_start(target: Target, pairs: Pairs, terms: int) -> tuple[Tensor, Tensor, float]:
    """Factors that are optimal where the second moment is a Kronecker product, and a lower bound on any error.

    The bound is ``sqrt(alpha)`` times the error in the norm of ``C1 (x) C2``, with ``alpha`` the smallest eigenvalue
    of ``(C1 (x) C2)^(-1/2) C (C1 (x) C2)^(-1/2)``; it is 0 for a singular second moment.
    """
    assert target.second_moment is not None
    (m1, n1), (m2, n2) = pairs
    moment = target.second_moment
    weigh = target.input_fact(("separable", n1, n2), lambda: _Separable(moment, (n1, n2)))
    a, b, tail = nearest_terms(target.weight @ torch.kron(*weigh.roots), pairs, terms)
    a = (a.reshape(-1, m1, n1) @ weigh.inverses[0]).reshape(terms, -1)
    b = (b.reshape(-1, m2, n2) @ weigh.inverses[1]).reshape(terms, -1)
    return a, b, 0.0 if target.is_padded else math.sqrt(weigh.share) * tail


_SEPARABLE_FLOOR = 1e-9
"""Share of the largest eigenvalue below which one of a separable moment counts as zero."""


class _Separable:
    """The roots of ``C1`` and ``C2`` whose Kronecker product is near a moment, and their pseudo-inverses."""

    def __init__(self, moment: Tensor, inner: tuple[int, int]) -> None:
        self.moment = moment
        self.parts = separable_moment(moment, inner)
        self.roots = [_power(part, 0.5, _SEPARABLE_FLOOR) for part in self.parts]
        self.inverses = [_power(part, -0.5, _SEPARABLE_FLOOR) for part in self.parts]

    @cached_property
    def share(self) -> float:
        """The largest known alpha with ``C >= alpha C1 (x) C2``; 0 if one of these is singular."""
        for part in self.parts:
            if float(torch.linalg.eigvalsh(part)[0]) <= _SEPARABLE_FLOOR * float(part.diagonal().real.max()):
                return 0.0
        scale = torch.kron(*self.inverses)
        relative = scale @ self.moment @ scale
        values = torch.linalg.eigvalsh((relative + relative.mH) / 2)
        # less what rounding may have added
        return max(0.0, float(values[0]) - 1e-13 * len(values) * float(values[-1]))


def gram_entries(pairs: Pairs, terms: int) -> int:
    """Entries of the largest array that :func:`weighted_sweep` needs."""
    return terms * terms * max(n * n for _, n in pairs)


def is_affordable(pairs: Pairs, terms: int) -> bool:
    """Whether exact weighted alternating least squares is (it is not near the low-rank corner)."""
    columns = math.prod(n for _, n in pairs)
    work = 2 * (terms * columns) ** 2 + sum((terms * n) ** 3 / 3 for _, n in pairs)
    return gram_entries(pairs, terms) <= _GRAM_LIMIT and work <= _WORK_LIMIT


def weighted_sweep(target: Target, pairs: Pairs, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep of alternating least squares in a weighted norm: both halves are solved exactly, the error never rises.

    Rows that are padding are filled with the present approximation. Cost: ``k^2 in^2`` multiply-adds for the Gram
    matrices and two solves of sizes ``k n_i``.
    """
    moment = target.second_moment
    assert moment is not None
    n1, n2 = pairs[0][1], pairs[1][1]
    grid = moment.reshape(n1, n2, n1, n2)
    rows = target.shape[0]
    wanted = target.weight
    if rows < target.native[0]:
        wanted = wanted.clone()
        wanted[rows:] = restore(a.T @ b, pairs)[rows:]
    reached = rearrange(wanted @ moment, pairs)
    a = _half(a, b, pairs[0], pairs[1], reached, grid.permute(0, 2, 1, 3))
    if rows < target.native[0]:
        wanted[rows:] = restore(a.T @ b, pairs)[rows:]
        reached = rearrange(wanted @ moment, pairs)
    b = _half(b, a, pairs[1], pairs[0], reached.T, grid.permute(1, 3, 0, 2))
    return a, b


def _half(
    own: Tensor, other: Tensor, size: tuple[int, int], fixed: tuple[int, int], reached: Tensor, grid: Tensor
) -> Tensor:
    """The best stacked factors ``own`` for given others; ``grid[l1, j1, l2, j2]`` is the second moment."""
    terms, (m, n), (p, q) = own.shape[0], size, fixed
    others = other.reshape(terms, p, q)
    gram = torch.einsum("spl,tpj->stlj", others, others.conj()).reshape(terms * terms, q * q)
    system = (grid.reshape(n * n, q * q) @ gram.T).reshape(n, n, terms, terms).permute(2, 0, 3, 1)
    system = system.reshape(terms * n, terms * n)  # rows (s, l), columns (t, j)
    wanted = (reached @ other.mH).reshape(m, n, terms).permute(0, 2, 1).reshape(m, terms * n)
    present = own.reshape(terms, m, n).permute(1, 0, 2).reshape(m, terms * n)
    pull = wanted - present @ system
    ridge = _RIDGE * float(system.diagonal().real.mean())
    for _ in range(5):
        shifted = (system + system.mH) / 2 + ridge * torch.eye(len(system), dtype=system.dtype)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if ridge > 0 and not bool(info.any()):
            change = torch.cholesky_solve(pull.mH, factor).mH
            return (present + change).reshape(m, terms, n).permute(1, 0, 2).reshape(terms, m * n)
        ridge *= 100.0
    return own


def weighted_descent(target: Target, pairs: Pairs, a: Tensor, b: Tensor, sweeps: int) -> tuple[Tensor, Tensor, float]:
    """Sweeps until nothing is gained; the factors and their error. Monotone."""
    error = target.error(restore(a.T @ b, pairs))
    for _ in range(sweeps):
        found = weighted_sweep(target, pairs, a, b)
        before, other = error, target.error(restore(found[0].T @ found[1], pairs))
        if other > before:  # rounding: nothing is left to gain
            break
        (a, b), error = found, other
        if before - error <= _PATIENCE * before:
            break
    return a, b, error


def unfolding_bound(target: Target, pairs: Pairs, terms: int) -> float:
    """No sum of ``terms`` products of these factors is nearer, in the Frobenius norm.

    The tensor of :func:`rearrange` unfolded along any factor has rank at most ``terms``. Of a padded target only rows
    of an unfolding that hold no padding count.
    """
    tensor = rearrange(target.weight, pairs)
    mask = observed(target)
    kept = None if mask is None else rearrange(mask, pairs)
    best = 0.0
    for axis in range(len(pairs)):
        unfolded = tensor.movedim(axis, 0).flatten(1)
        if kept is not None:
            unfolded = unfolded[kept.movedim(axis, 0).flatten(1).all(1)]
        if min(unfolded.shape) > terms:
            best = max(best, float(torch.linalg.norm(torch.linalg.svdvals(unfolded)[terms:])))
    return best

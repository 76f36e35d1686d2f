"""Operators of a given matrix found: the nodes and subdiagonals under which its displacement has a small rank.

Nothing is known of the operators but their kind. Any ``rank + 1`` rows of a displacement of that rank are dependent,
which is one equation for each column; what belongs to the column is eliminated from two such equations, and what is
left is linear in products of unknowns: a null space of as many equations as the matrix has columns. Newton steps on the
singular values that ought to be zero take the rounding out. For a matrix that is no member there is no null space, and
the answer is None. Derived for this library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_NULL = 1e-5
"""A smallest singular value below this share of the next but one is that of a null space with rounding."""

_DRAWS = 6
"""Choices of rows that are tried; some are nearly dependent."""

_STEPS = 4
"""Newton steps: each squares the error."""

_EXACT = 1e-13

_VANISHING = 1e-9
"""Entries of a null vector below this share of the largest are none; a generic member has no such ones."""

_OVERDETERMINED = 4
"""Equations of a Newton step, as a multiple of the unknowns: of large matrices random combinations are enough."""


def cauchy_angles(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """``p`` (out,) and ``q`` (in,) with ``sin(p[i] - q[j]) W[i, j]`` of a rank: the nodes of a Cauchy-like matrix.

    Nodes are known up to a map of the projective line, which scales rows and columns of the generators; ``tan`` of
    angles are nodes, and no angle is at infinity. Of 2 (rank + 1) rows in two halves, each half gives
    ``t[j] = (v . W[:, j]) / (u . W[:, j])``; that both agree is linear in ``v u'^T - u v'^T``.

    Args:
        matrix: (out, in), real, in float64.
        rank: at least 1; generic members need ``(rank + 1)^2 < in`` and ``2 (rank + 1) <= out``.
    """
    rows, columns = matrix.shape
    many = rank + 1
    if matrix.is_complex() or many * many >= columns or 2 * many > rows or not bool((matrix != 0).all()):
        return None
    best, least = None, math.inf
    for chosen in _draws(rows, 2 * many):
        one, other = matrix[chosen[:many]], matrix[chosen[many:]]
        products = (one[:, None] * other[None]).reshape(many * many, columns)
        null = _null_vector(products.T)
        if null is None:
            continue
        # The columns of v u'^T - u v'^T are combinations of u and v. Any two of them will do.
        span = torch.linalg.svd(null.reshape(many, many)).U[:, :2]
        q = torch.atan2(span[:, 0] @ one, span[:, 1] @ one)
        p = torch.atan2(span[:, 0], span[:, 1])
        known = torch.linalg.svd(torch.sin(p[:, None] - q) * one).Vh[:rank]
        rest = torch.eye(columns, dtype=matrix.dtype) - known.mT @ known
        # Row i lies in the span of the known ones: sin(p) (cos(q) W[i]) - cos(p) (sin(q) W[i]).
        pair = torch.stack([(torch.cos(q) * matrix) @ rest, -(torch.sin(q) * matrix) @ rest], 2)
        small = torch.linalg.svd(pair, full_matrices=False).Vh[:, -1]
        p = torch.atan2(small[:, 0], small[:, 1])
        for _ in range(_STEPS):
            slope = torch.cos(p[:, None] - q) * matrix
            step = _step(slope, slope, torch.sin(p[:, None] - q) * matrix, rank)
            p, q = p + step[0], q + step[1]
        tail = _tail(torch.sin(p[:, None] - q) * matrix, rank)
        if tail < least:
            best, least = (p, q), tail
        if least < _EXACT:
            break
    return best


def vandermonde_nodes(matrix: Tensor, rank: int) -> Tensor | None:
    """``d`` (out,) with ``diag(d) W - W Z_-1`` of a rank: the nodes of a Vandermonde-like matrix.

    ``sum of c[i] (d[i] W[i] - W[i] Z_-1) = 0`` for any rank + 1 rows: a null vector ``(c d, -c)`` of these rows and
    of the shifted ones.

    Args:
        matrix: (out, in), in float64 or complex128.
        rank: at least 1; generic members need ``2 (rank + 1) <= in`` and ``rank < out``.
    """
    rows, columns = matrix.shape
    many = rank + 1
    if 2 * many > columns or many > rows:
        return None
    moved = torch.cat([matrix[:, 1:], -matrix[:, :1]], 1)
    best, least = None, math.inf
    for chosen in _draws(rows, many):
        null = _null_vector(torch.cat([matrix[chosen], moved[chosen]]).T)
        if null is None or float(null.abs()[many:].min()) <= _VANISHING * float(null.abs().max()):
            continue
        d = -null[:many] / null[many:]
        known = torch.linalg.svd(d[:, None] * matrix[chosen] - moved[chosen]).Vh[:rank]
        rest = torch.eye(columns, dtype=matrix.dtype) - known.mH @ known
        one, other = matrix @ rest, moved @ rest
        d = (one.conj() * other).sum(1) / one.abs().square().sum(1).clamp(min=1e-300)
        for _ in range(_STEPS):
            d = d + _step(matrix, moved[:, :0], d[:, None] * matrix - moved, rank)[0]
        tail = _tail(d[:, None] * matrix - moved, rank)
        if tail < least:
            best, least = d, tail
        if least < _EXACT:
            break
    return best


def subdiagonals(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """``a`` (out - 1,) and ``b`` (in - 1,) with ``W[i + 1, j + 1] - a[i] b[j] W[i, j]`` of a rank.

    They stand below the diagonals of the operators of ``LDRSubdiagonal``; only the products ``a[i] b[j]`` are known.
    Of rank + 2 rows two combinations c vanish, both with ``b[j] = (sum of c[i] W[i + 1, j + 1] / a[i]) / (sum of
    c[i] W[i, j])``; that both agree is linear in the minors of the two, divided by ``a[i]``.

    Args:
        matrix: (out, in), in float64 or complex128.
        rank: at least 1; generic members need ``(rank + 1) (rank + 2) < in`` and ``rank + 2 < out``.
    """
    after, before = matrix[1:, 1:], matrix[:-1, :-1]
    rows, columns = after.shape
    many = rank + 2
    if many * (many - 1) > columns or many > rows:
        return None
    i, k = (torch.arange(many)[:, None] != torch.arange(many)).nonzero(as_tuple=True)
    best, least = None, math.inf
    for chosen in _draws(rows, many):
        one, other = after[chosen], before[chosen]
        null = _null_vector((one[i] * other[k]).T)
        if null is None:
            continue
        # x[i, k] = m[i, k] / a[i] with minors m[i, k] = -m[k, i].
        x = matrix.new_zeros(many, many)
        x[i, k] = null
        if float(null.abs().min()) <= _VANISHING * float(null.abs().max()):  # zeros are those of another structure
            continue
        largest = int(x.abs().clamp(min=1e-300).log().sum(1).argmax())
        inverse = -x[:, largest] / x[largest]
        inverse[largest] = 1.0
        minors = x / inverse[:, None]
        both = torch.linalg.svd((minors - minors.mT) / 2).U[:, :2].conj()
        above, below = both.mT @ (inverse[:, None] * one), both.mT @ other
        b = (below.conj() * above).sum(0) / below.abs().square().sum(0).clamp(min=1e-300)
        known = torch.linalg.svd(inverse[:, None] * one - b * other).Vh[:rank]
        rest = torch.eye(columns, dtype=matrix.dtype) - known.mH @ known
        one, other = after @ rest, (b * before) @ rest
        inverse = (one.conj() * other).sum(1) / one.abs().square().sum(1).clamp(min=1e-300)
        for _ in range(_STEPS):
            step = _step(after, before, inverse[:, None] * after - b * before, rank)
            inverse, b = inverse + step[0], b + step[1]
        tail = _tail(inverse[:, None] * after - b * before, rank)
        if tail < least and bool((inverse != 0).all()):
            best, least = (1 / inverse, b), tail
        if least < _EXACT:
            break
    if best is None:
        return None
    a, b = best
    unit = float((b.abs().clamp(min=1e-300).log().mean() - a.abs().clamp(min=1e-300).log().mean()).exp()) ** 0.5
    return a * unit, b / unit


def corners(matrix: Tensor, a: Tensor, b: Tensor, rank: int) -> tuple[float, float]:
    """The upper right corners of the two operators of a square matrix with these subdiagonals: the first row and the
    first column of the displacement lie in the spans of the others."""
    inner = matrix[1:, 1:] - a[:, None] * b * matrix[:-1, :-1]
    u, _, vh = torch.linalg.svd(inner)
    found = []
    for basis, edge, moved in (
        (vh[rank:].mH, matrix[0, 1:], b * matrix[-1, :-1]),
        (u[:, rank:].conj(), matrix[1:, 0], a * matrix[:-1, -1]),
    ):
        rest, change = edge @ basis, moved @ basis
        size = float(change.abs().square().sum())
        known = float((change.conj() * rest).sum().real) / size if size > 0 else 0.0
        found.append(known if abs(known) > _EXACT else 0.0)
    return found[0], found[1]


def _draws(rows: int, many: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        yield torch.randperm(rows, generator=generator)[:many]


def _null_vector(system: Tensor) -> Tensor | None:
    """The one vector that a system (equations, unknowns) sends to zero, if there is one and only one."""
    system = system / torch.linalg.norm(system, dim=1, keepdim=True).clamp(min=1e-300)
    sizes = torch.linalg.norm(system, dim=0).clamp(min=1e-300)
    _, values, vh = torch.linalg.svd(system / sizes)
    if vh.shape[0] < 2 or len(values) < vh.shape[0] - 1:
        return None
    last = float(values[-1]) if len(values) == vh.shape[0] else 0.0
    if not last <= _NULL * float(values[vh.shape[0] - 2]):
        return None
    null: Tensor = vh[-1].conj() / sizes
    return null


def _step(rows: Tensor, columns: Tensor, displaced: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A Newton step for ``displaced + diag(x) rows - columns diag(y)`` to have a rank: x and y."""
    u, _, vh = torch.linalg.svd(displaced)
    left, right = u[:, rank:].mH, vh[rank:].mH
    unknowns = sum(displaced.shape)
    if left.shape[0] * right.shape[1] > 2 * _OVERDETERMINED * unknowns:
        generator = torch.Generator().manual_seed(1)
        side = math.isqrt(_OVERDETERMINED * unknowns) + 1
        first, second = min(side, left.shape[0]), min(side, right.shape[1])
        left = torch.randn(first, left.shape[0], generator=generator, dtype=torch.float64).to(left) @ left
        right = right @ torch.randn(right.shape[1], second, generator=generator, dtype=torch.float64).to(right)
    by_row = torch.einsum("ai,ib->abi", left, rows @ right)
    by_column = torch.einsum("aj,jb->abj", left @ columns, right[: columns.shape[1]])
    system = torch.cat([by_row, -by_column], 2).flatten(0, 1)
    wanted = -(left @ displaced @ right).reshape(-1, 1)
    solution: Tensor = torch.linalg.lstsq(system, wanted, driver="gelsd").solution[:, 0]
    return solution[: len(displaced)], solution[len(displaced) :]


def _tail(displaced: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(displaced)
    return float(torch.linalg.norm(values[rank:]) / torch.linalg.norm(values).clamp(min=1e-300))

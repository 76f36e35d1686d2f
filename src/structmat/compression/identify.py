"""What a matrix is, by measures that name a structure with no hint: shapes of its support, ranks, known transforms.

Every detector looks for one kind of structure and answers with traits: a name, how far the matrix is from it, and how
many numbers it takes. They are independent, listed in :data:`DETECTORS`, and each costs at most a few products or
decompositions of the size of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee
from torch import Tensor

from structmat import transforms
from structmat.compression import identify_families
from structmat.compression.identify_families import block_values, displacement_ranks
from structmat.compression.traits import NEAR, Detector, Measures, Subject, Trait
from structmat.matrix import StructuredMatrix
from structmat.projection.assignment import assignment
from structmat.projection.chain import fit_chain
from structmat.projection.hierarchical import dense_product
from structmat.projection.orders import find_orders
from structmat.projection.plus_low_rank import support_plus_low_rank
from structmat.projection.reordering import ALIKE, butterfly_reordering, monarch_reordering
from structmat.projection.robust import robust_pca
from structmat.projection.target import Target
from structmat.sizes import Pattern, divisors, smallest_chain, smooth_size

_WORTH = 0.5
"""What takes more than this share of the dense numbers is no structure."""

_LARGEST_TRANSFORM = 2048
"""Sizes up to this are compared with the known transforms."""


_LARGEST_REARRANGED = 1 << 20
"""Matrices of up to so many entries are rearranged for Kronecker ranks."""

_FEW_PRODUCTS = 8
"""Sums of up to so many Kronecker products are looked for among factors of any shape."""

_LARGEST_REORDERED = 512
"""Rows and columns of sides up to this are put in order by their quotients."""


def identify(target: Target, tolerance: float) -> tuple[Measures, tuple[Trait, ...]]:
    """Measures of a matrix, and what it is, exactly or nearly: the traits that take at most half of the dense numbers
    and are within ``NEAR``, exact ones first, then by numbers. None on noise.

    Args:
        target: in the Frobenius norm.
        tolerance: relative errors up to it are rounding.
    """
    measures = measured(target, tolerance)
    if target.norm() == 0:
        return measures, (Trait("zero", 0.0, 0),)
    subject = Subject(target, tolerance, measures)
    found = [trait for detector in DETECTORS for trait in detector(subject)]
    limit = _WORTH * target.weight.numel()
    kept = [trait for trait in found if trait.error <= max(NEAR, tolerance) and trait.numbers <= limit]
    return measures, tuple(sorted(kept, key=lambda t: (t.error > tolerance, t.numbers, t.error)))


def measured(target: Target, tolerance: float) -> Measures:
    """The measures of a matrix."""
    weight = target.weight
    floor = tolerance * target.norm()
    held = weight.abs() > floor / max(1.0, math.sqrt(weight.numel()))
    rows, columns = torch.nonzero(held, as_tuple=True)
    values = target.unweighted().whitened_svd[1]
    blocks = {}
    for count in (2, 4, 8):
        if min(weight.shape) >= 2 * count:
            blocks[count] = int((block_values(weight, count) > floor).sum(-1).max())
    butterfly, monarch, permuted_butterfly, permuted_monarch = _chains(target)
    reordered = _reordered(target, tolerance)
    is_square = weight.shape[0] == weight.shape[1]
    return Measures(
        int((values > floor).sum()),
        blocks,
        _kronecker(target, floor),
        float(held.float().mean()),
        int((rows - columns).abs().max()) if len(rows) else 0,
        _bandwidth(held[_cuthill_mckee(held)][:, _cuthill_mckee(held)]) if is_square else None,
        butterfly,
        monarch,
        permuted_butterfly,
        permuted_monarch,
        None if reordered[0] is None else reordered[0][0],
        None if reordered[1] is None else reordered[1][0],
        displacement_ranks(target, floor),
    )


def _kronecker(target: Target, floor: float) -> tuple[int, tuple[int, int]] | None:
    """The least number of Kronecker products over factors in the proportions of the whole; or over others, where few
    are enough: most shapes are only sketched."""
    weight = target.weight
    height, width = weight.shape
    if weight.numel() > _LARGEST_REARRANGED:
        return None
    best, others = None, []
    for rows in divisors(height):
        for columns in divisors(width):
            if (rows, columns) in ((1, 1), (height, width), (height, 1), (1, width)):
                continue  # the whole matrix, and its rank
            if abs(math.log(rows) * math.log(width) - math.log(columns) * math.log(height)) > 1e-9:
                others.append((rows, columns))
                continue
            rank = int((torch.linalg.svdvals(_rearranged(weight, rows, columns)) > floor).sum())
            if best is None or rank < best[0]:
                best = rank, (rows, columns)
    limit = _WORTH * weight.numel() if best is None else min(_WORTH * weight.numel(), _numbers(weight, *best))
    generator = torch.Generator().manual_seed(0)
    for shape in others:
        grid = _rearranged(weight, *shape)
        most = min(_FEW_PRODUCTS, int(limit / _numbers(weight, 1, shape)))
        if most == 0:
            continue
        sketch = grid @ torch.randn(grid.shape[1], most + 1, generator=generator, dtype=torch.float64).to(grid.dtype)
        if int((torch.linalg.svdvals(sketch) > floor * math.sqrt(most + 1)).sum()) > most:
            continue
        rank = int((torch.linalg.svdvals(grid) > floor).sum())
        if _numbers(weight, rank, shape) < limit:
            best, limit = (rank, shape), _numbers(weight, rank, shape)
    return best


def _rearranged(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Each block of a rows x columns grid as a row: Kronecker products with left factors of that shape have rank 1."""
    grid = weight.reshape(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    return grid.permute(0, 2, 1, 3).reshape(rows * columns, -1)


def _numbers(weight: Tensor, rank: int, left: tuple[int, int]) -> int:
    """Of so many Kronecker products with left factors of that shape."""
    return rank * (left[0] * left[1] + weight.numel() // (left[0] * left[1]))


def _chains(target: Target) -> tuple[float | None, float | None, float | None, float | None]:
    """Errors of the nearest butterfly and Monarch matrix, and of both in the usual orders."""
    shape, size = target.native, target.norm()
    if (smooth_size(shape[0]), smooth_size(shape[1])) != shape or min(shape) < 4 or size == 0:
        return None, None, None, None
    quick = target.unweighted().replace_sweeps(0)
    found = []
    for patterns in (smallest_chain(shape), smallest_chain(shape, 2)):
        plain = _chain_error(quick.weight, patterns) / size
        permuted = plain
        for orders in find_orders(quick.weight, patterns):
            if not orders.is_plain:
                moved = quick.weight[orders.rows[:, None], orders.columns]
                permuted = min(permuted, _chain_error(moved, patterns) / size)
        found.append((plain, permuted))
    (butterfly, permuted_butterfly), (monarch, permuted_monarch) = found
    return butterfly, monarch, permuted_butterfly, permuted_monarch


def _chain_error(weight: Tensor, chain: tuple[Pattern, ...]) -> float:
    shape = weight.shape[0], weight.shape[1]
    found = fit_chain(Target(weight, None, shape, 0), chain)
    product = dense_product([found.tensors[f"factor{i}"] for i in range(len(chain))], chain)
    return float(torch.linalg.norm(weight - product))


_Reordered = tuple[float, Tensor, Tensor]


def _reordered(target: Target, tolerance: float) -> tuple[_Reordered | None, _Reordered | None]:
    """Errors as a butterfly and as a Monarch matrix in the orders that quotients of rows suggest, and these orders."""
    return target.weight_fact("reordered", lambda: _reorder(target.weight, tolerance))


def _reorder(weight: Tensor, tolerance: float) -> tuple[_Reordered | None, _Reordered | None]:
    size = weight.shape[0]
    if weight.shape[1] != size or not 8 <= size <= _LARGEST_REORDERED:
        return None, None
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    norm, alike = float(torch.linalg.norm(wide)), max(ALIKE, 100 * tolerance)

    def error(orders: tuple[Tensor, Tensor] | None, chain: tuple[Pattern, ...]) -> _Reordered | None:
        if orders is None:
            return None
        rows, columns = orders
        return _chain_error(wide[rows[:, None], columns], chain) / norm, rows, columns

    two = smallest_chain((size, size), 2)
    butterfly = error(butterfly_reordering(wide, alike), smallest_chain((size, size)))
    monarch = error(monarch_reordering(wide, two[0][1], alike), two) if len(two) == 2 else None
    return butterfly, monarch


def _cuthill_mckee(held: Tensor) -> Tensor:
    graph = sparse.csr_array((held | held.T).to(torch.int8).numpy())
    return torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))


def _bandwidth(held: Tensor) -> int:
    rows, columns = torch.nonzero(held, as_tuple=True)
    return int((rows - columns).abs().max()) if len(rows) else 0


# ---------------------------------------------------------------------------------------------------------- detectors


def by_rank(subject: Subject) -> Iterator[Trait]:
    """Low rank, exactly or nearly; identity or diagonal plus low rank."""
    values = subject.target.unweighted().whitened_svd[1]
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / subject.norm
    for limit in (subject.tolerance, NEAR):
        rank = int((tails > limit).sum())
        if 0 < rank < len(values):
            yield Trait(
                f"a matrix of rank {rank}", float(tails[rank]), rank * sum(subject.weight.shape), family="LowRank"
            )
            break


def by_support(subject: Subject) -> Iterator[Trait]:
    """Diagonal, permutation, banded, block diagonal and sparse matrices, as given and reordered."""
    weight, norm = subject.weight, subject.norm
    rows, columns = weight.shape
    held = weight.abs() > max(subject.tolerance, 1e-12) * norm / math.sqrt(weight.numel())
    count = int(held.sum())
    if rows == columns:
        order = assignment(weight.abs())
        kept = weight[torch.arange(rows), order]
        error = _beside(weight, torch.arange(rows), order) / norm
        scale = float(kept.abs().mean())
        is_one = bool((kept - kept.mean()).abs().max() <= max(subject.tolerance, NEAR) * max(scale, 1e-300))
        if torch.equal(order, torch.arange(rows)):
            yield Trait(
                "a multiple of the identity" if is_one else "a diagonal matrix",
                error,
                1 if is_one else rows,
                family="Diagonal",
            )
        elif is_one:
            name = "a permutation" if abs(scale - 1) < NEAR else "a multiple of a permutation"
            yield Trait(name, error, rows, None, order, "Permutation")
        else:
            yield Trait("a diagonal matrix with its columns reordered", error, 2 * rows, None, order)
        width = _bandwidth(held)
        if width > 0:
            yield Trait(f"a banded matrix of bandwidth {width}", 0.0, rows * (2 * width + 1))
            alike = _cuthill_mckee(held)
            moved = _bandwidth(held[alike][:, alike])
            if 2 * moved < width:
                name = f"a banded matrix of bandwidth {moved}, rows and columns reordered"
                yield Trait(name, 0.0, rows * (2 * moved + 2), alike, alike)
    parts, label = connected_components(
        sparse.block_array([[None, sparse.csr_array(held.numpy())], [sparse.csr_array(held.numpy()).T, None]]),
        directed=False,
    )
    if 1 < parts < min(rows, columns):
        by_row, by_column = torch.from_numpy(label[:rows]), torch.from_numpy(label[rows:])
        area = int((by_row.bincount(minlength=parts) * by_column.bincount(minlength=parts)).sum())
        in_order = bool((by_row.diff() >= 0).all() and (by_column.diff() >= 0).all())
        name = f"a block diagonal matrix of {parts} blocks{'' if in_order else ', rows and columns reordered'}"
        orders = (by_row.argsort(stable=True), by_column.argsort(stable=True))
        numbers = area + (0 if in_order else rows + columns)
        if in_order:
            yield Trait(name, 0.0, numbers, family="BlockDiagonal")
        elif bool((by_row.diff() >= 0).all()) and torch.equal(by_column, torch.arange(columns) % parts):
            words = f"a block diagonal matrix of {parts} blocks, columns taken in turn"
            yield Trait(words, 0.0, area, *orders, "Reordered" if area * parts == rows * columns else "")
        else:
            yield Trait(name, 0.0, numbers, *orders)
    if count < weight.numel():
        yield Trait(f"a sparse matrix with {count} entries", 0.0, 2 * count, family="Sparse")


def by_kronecker(subject: Subject) -> Iterator[Trait]:
    """Kronecker products of two matrices, and sums of a few."""
    found = subject.measures.kronecker_rank
    if found is None:
        return
    rank, (rows, columns) = found
    height, width = subject.weight.shape
    if rank == 0:
        return
    numbers = rank * (rows * columns + (height // rows) * (width // columns))
    name = "a Kronecker product" if rank == 1 else f"a sum of {rank} Kronecker products"
    words = f"{name} of {rows} x {columns} and {height // rows} x {width // columns} matrices"
    yield Trait(words, 0.0, numbers, family="Kronecker")


def by_transform(subject: Subject) -> Iterator[Trait]:
    """The classical transforms, scaled, with their rows or columns reordered and scaled."""
    size = subject.weight.shape[0]
    if size != subject.weight.shape[1] or not 4 <= size <= _LARGEST_TRANSFORM:
        return
    best: dict[str, Trait] = {}
    for name, known, inverse in _transforms(size, subject.weight.is_complex()):
        found = _as_transform(subject, name, known().to_dense(), None if inverse is None else inverse().to_dense())
        # The Fourier transform with its columns reordered is the inverse one, too: the first name stays.
        names = (name, name.removeprefix("inverse "))
        if found is not None and all(n not in best or found.numbers < best[n].numbers for n in names):
            best[name] = found
    yield from best.values()


def _as_transform(subject: Subject, name: str, known: Tensor, inverse: Tensor | None) -> Trait | None:
    """``W = T P`` or ``P T`` for a known ``T`` and a permutation with factors ``P``. The inverse is needed up to a
    factor, and where T is not orthogonal up to one."""
    size = len(known)
    scale = math.sqrt(size) / float(torch.linalg.norm(known))
    wide = torch.promote_types(known.dtype, subject.weight.dtype)
    known, wanted = scale * known.to(wide), subject.weight.to(wide)
    back = known.mH if inverse is None else inverse.to(wide)
    for side in ("columns", "rows"):
        left, moved, goal = (
            (back @ wanted, known, wanted) if side == "columns" else ((wanted @ back).mT, known.mT, wanted.mT)
        )
        order = left.abs().argmax(0)
        if len(order.unique()) < size:
            continue
        moved = moved[:, order]
        values = (moved.conj() * goal).sum(0) / moved.abs().square().sum(0)
        error = float(torch.linalg.norm(goal - moved * values)) / subject.norm
        if error > NEAR:
            continue
        is_plain = bool((values - values.mean()).abs().max() <= NEAR * values.abs().mean())
        in_order = torch.equal(order, torch.arange(size))
        words = [f"{side} reordered"] * (not in_order) + [f"{side} scaled"] * (not is_plain)
        shown = torch.argsort(order)
        article = "an" if name.startswith("inverse") else "a"
        return Trait(
            ", ".join([f"{article} {name} transform", *words]),
            error,
            size * (not in_order) + (1 if is_plain else size),
            None if in_order or side == "columns" else shown,
            None if in_order or side == "rows" else shown,
        )
    return None


def _beside(matrix: Tensor, rows: Tensor, columns: Tensor) -> float:
    """The size of what is not at these places. (A difference of squares would lose half of the digits.)"""
    rest = matrix.clone()
    rest[rows, columns] = 0
    return float(torch.linalg.norm(rest))


_Make = Callable[[], StructuredMatrix]


def _transforms(size: int, is_complex: bool) -> Iterator[tuple[str, _Make, _Make | None]]:
    """Names, transforms, and inverses up to a factor of those that are not orthogonal up to one."""
    if size & (size - 1) == 0:
        yield "Hadamard", lambda: transforms.hadamard(size), None
        yield "Haar", lambda: transforms.haar(size), None
    if is_complex:
        yield "discrete Fourier", lambda: transforms.dft(size), None
        yield "inverse discrete Fourier", lambda: transforms.dft(size, inverse=True), None
    yield "Hartley", lambda: transforms.hartley(size), None
    inverses = {1: 1, 2: 3, 3: 2, 4: 4}
    for kind, numeral in ((1, "I"), (2, "II"), (3, "III"), (4, "IV")):
        for name, make in (("cosine", transforms.dct), ("sine", transforms.dst)):
            yield f"{name} (type {numeral})", partial(make, size, kind, orthonormal=True), None
            # As it is usually defined, with other weights at one or both ends.
            if kind in (2, 3) or (kind == 1 and name == "cosine"):
                yield f"{name} (type {numeral})", partial(make, size, kind), partial(make, size, inverses[kind])


def by_butterfly(subject: Subject) -> Iterator[Trait]:
    """Butterfly and Monarch matrices, as given and in the usual orders."""
    shape = subject.weight.shape
    measures = subject.measures
    if measures.butterfly is None or measures.monarch is None or measures.permuted_butterfly is None:
        return
    size = sum(a * b * c * d for a, b, c, d in smallest_chain((shape[0], shape[1])))
    two = sum(a * b * c * d for a, b, c, d in smallest_chain((shape[0], shape[1]), 2))
    yield Trait("a butterfly matrix", measures.butterfly, size, family="Butterfly")
    if measures.permuted_butterfly < measures.butterfly:
        name = "a butterfly matrix in another order"
        yield Trait(name, measures.permuted_butterfly, size + sum(shape), family="PermutedButterfly")
    yield Trait("a Monarch matrix", measures.monarch, two, family="Monarch")
    if measures.permuted_monarch is not None and measures.permuted_monarch < measures.monarch:
        yield Trait("a Monarch matrix in another order", measures.permuted_monarch, two + sum(shape))
    for name, number, found in zip(
        ("butterfly", "Monarch"), (size, two), _reordered(subject.target, subject.tolerance), strict=True
    ):
        if found is not None and measures.butterfly > subject.tolerance:
            words = f"a {name} matrix, rows and columns reordered"
            family = "PermutedButterfly" if name == "butterfly" else ""
            yield Trait(words, found[0], number + sum(shape), found[1], found[2], family)


def by_separation(subject: Subject) -> Iterator[Trait]:
    """Diagonal plus low rank, and sparse plus low rank (robust principal component analysis)."""
    weight = subject.weight
    if min(weight.shape) < 8 or max(weight.shape) > 1024:
        return
    if subject.measures.rank < min(weight.shape) // 4 or subject.measures.density < 0.5:
        return
    found = robust_pca(weight)
    if not found.succeeded:
        return
    rows, columns = torch.nonzero(found.sparse, as_tuple=True)
    # The iteration ends at 1e-7 or so: with the places known, the rest is completion.
    held = support_plus_low_rank(weight, found.sparse != 0, found.rank, subject.tolerance) if found.rank else None
    error = float(torch.linalg.norm(weight - found.low_rank - found.sparse)) / subject.norm
    error = error if held is None else min(error, held.error)
    low = found.rank * sum(weight.shape)
    if bool((rows == columns).all()):
        yield Trait(f"a diagonal matrix plus rank {found.rank}", error, low + len(rows), family="Sum")
    else:
        name = f"a sparse matrix with {found.nonzeros} entries plus rank {found.rank}"
        yield Trait(name, error, low + 2 * len(rows), family="Sum")


DETECTORS: tuple[Detector, ...] = (
    by_support,
    by_rank,
    by_kronecker,
    by_transform,
    by_butterfly,
    by_separation,
    *identify_families.DETECTORS,
)
"""What is looked for. A detector of another structure is one more function here."""

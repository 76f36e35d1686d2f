"""Detectors of families: displacement structure, nodes, recurrences, scaled transforms, hierarchies, block factors.

Each is in closed form, but for tridiagonal operators and relaxed permutations, which are descents in few unknowns:
where a matrix is a member, its parameters come out, and the error says whether it is one. Members of what only a longer
descent could find (cascades of several diagonal layers, real parts of complex butterflies) have no detector here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat import transforms
from structmat.compression.traits import NEAR, Subject, Trait
from structmat.displacement import operators
from structmat.matrix import StructuredMatrix
from structmat.projection.found_operators import cauchy_angles, subdiagonals, vandermonde_nodes
from structmat.projection.found_stages import fastfood_tensors, kaleidoscope_factors, relaxed_factors, switch_logits
from structmat.projection.found_tridiagonals import tridiagonal_members
from structmat.projection.found_windows import windows_of
from structmat.projection.plus_low_rank import diagonal_means, support_plus_low_rank, toeplitz_plus_low_rank
from structmat.projection.project import project_target
from structmat.projection.simultaneous import factor_grid, monarch_pair
from structmat.projection.target import Target
from structmat.sizes import divisors
from structmat.structure import Shape, Structure, count_stored
from structmat.structures.cauchy_like import CauchyLike
from structmat.structures.fastfood import Fastfood
from structmat.structures.gblr import GBLR
from structmat.structures.generators import OfDisplacementRank
from structmat.structures.kaleidoscope import Kaleidoscope
from structmat.structures.ldr_subdiagonal import LDRSubdiagonal
from structmat.structures.ldr_tridiagonal import LDRTridiagonal
from structmat.structures.orthogonal_polynomial import OrthogonalPolynomial
from structmat.structures.relaxed_butterfly import RelaxedButterfly
from structmat.structures.soft_permutation import SoftPermutation
from structmat.structures.vandermonde_like import VandermondeLike

_LARGEST = 1024
"""Sides up to this are looked at: most of these detectors decompose the whole matrix."""

_WIDEST = 3
"""The widest recurrence that is looked for."""

_SMALLEST = 8

_STEPS = 4
"""Of alternating least squares for two diagonals."""

_LARGEST_RELAXED = 128

_TOEPLITZ, _HANKEL, _BOTH = "Toeplitz", "Hankel", "Toeplitz plus Hankel"
_VANDERMONDE, _CAUCHY = "Vandermonde", "Cauchy"


def displacement_ranks(target: Target, floor: float) -> dict[str, int]:
    """Ranks under each pair of operators. Nodes are those of a fresh matrix; empty for large and for tiny matrices."""
    found = _displaced(target)
    return {name: int((values > floor * scale).sum()) for name, (values, scale) in found.items()}


def _displaced(target: Target) -> dict[str, tuple[Tensor, float]]:
    """Singular values of the displacements, and how much larger than that of the matrix their rounding is."""
    return target.weight_fact("displaced", lambda: _displace(target.weight))


def _displace(weight: Tensor) -> dict[str, tuple[Tensor, float]]:
    rows, columns = weight.shape
    if max(rows, columns) > _LARGEST or min(rows, columns) < 4:
        return {}
    ends = torch.linspace(-0.7, 0.7, rows, dtype=torch.float64)
    places = torch.arange(max(rows, columns), dtype=torch.float64)
    pairs = {
        _TOEPLITZ: (operators.toeplitz((rows, columns)), 1.0),
        _HANKEL: (operators.hankel((rows, columns)), 1.0),
        _BOTH: (operators.toeplitz_plus_hankel((rows, columns)), 1.0),
        _VANDERMONDE: (operators.vandermonde(ends, columns, -1.0), 1.0),
        # A displacement by nodes is as large as they are apart, and so is its rounding.
        _CAUCHY: (operators.cauchy(places[:rows], places[:columns] + 0.5), float(max(rows, columns))),
    }
    return {name: (torch.linalg.svdvals(pair.displace(weight)), scale) for name, (pair, scale) in pairs.items()}


def by_displacement(subject: Subject) -> Iterator[Trait]:
    """Circulant, Toeplitz and Hankel matrices, the classes of small displacement rank, and Toeplitz plus low rank."""
    weight, norm = subject.weight, subject.norm
    rows, columns = weight.shape
    if min(rows, columns) < 4:
        return
    error = float(torch.linalg.norm(weight - _wrapped_means(weight))) / norm
    words = "a circulant matrix" if rows == columns else "a corner of a circulant matrix"
    yield Trait(words, error, max(rows, columns), family="Circulant")
    for name, turned in ((_TOEPLITZ, weight), (_HANKEL, weight.flip(0))):
        error = float(torch.linalg.norm(turned - diagonal_means(turned))) / norm
        yield Trait(f"a {name} matrix", error, rows + columns - 1, family=name)
        if error > subject.tolerance:
            yield from _plus_low_rank(subject, turned, name)
    # Numbers: so many times the rank, and a few for the nodes.
    numbers = {
        _TOEPLITZ: (2 * max(rows, columns), 0, "ToeplitzLike"),
        _HANKEL: (2 * max(rows, columns), 0, "HankelLike"),
        _BOTH: (2 * max(rows, columns), 0, ""),
        _VANDERMONDE: (rows + columns, rows, "VandermondeLike"),
        _CAUCHY: (rows + columns, rows + columns, "CauchyLike"),
    }
    for name, rank in subject.measures.displacement.items():
        if 0 < rank < min(subject.measures.rank, min(rows, columns) // 2):
            each, nodes, family = numbers[name]
            words = f"a matrix of displacement rank {rank} under the operators of {name} matrices"
            values = _displaced(subject.target)[name][0]
            # Of the displacement: how far the matrix itself is from one of this rank depends on the operators.
            error = float(torch.linalg.norm(values[rank:]) / torch.linalg.norm(values))
            yield Trait(words, error, each * rank + nodes, family=family)


def _plus_low_rank(subject: Subject, turned: Tensor, name: str) -> Iterator[Trait]:
    rows, columns = turned.shape
    if max(rows, columns) > _LARGEST or subject.measures.rank < min(rows, columns) // 4:
        return
    found = toeplitz_plus_low_rank(turned, subject.tolerance * subject.norm)
    # The matrix with constant diagonals must be there: a low rank matrix alone is one without it.
    if found is not None and float(torch.linalg.norm(found.structured)) > NEAR * subject.norm:
        numbers = (found.rank + 1) * (rows + columns) - 1
        yield Trait(f"a {name} matrix plus rank {found.rank}", found.error, numbers, family="Sum")


def _wrapped_means(weight: Tensor) -> Tensor:
    """The means along the diagonals, which wrap around at the longer side."""
    size = max(weight.shape)
    place = (torch.arange(weight.shape[0])[:, None] - torch.arange(weight.shape[1])) % size
    sums = weight.new_zeros(size).index_add(0, place.flatten(), weight.flatten())
    return (sums / place.flatten().bincount(minlength=size))[place]


def _rolled(weight: Tensor) -> Tensor:
    """``W[(j + k) mod m, j]`` in row k and column j: wrapped diagonals become rows."""
    rows, columns = weight.shape
    place = torch.arange(rows)[:, None] + torch.arange(columns)
    return torch.take_along_dim(weight, place % rows, 0)


def by_rolled(subject: Subject) -> Iterator[Trait]:
    """Sums of a few products of a circulant and a diagonal matrix: what one layer of AFDF is, and its real part."""
    size, columns = subject.weight.shape
    if size != columns or not _SMALLEST <= size <= _LARGEST or subject.measures.rank < size // 2:
        return
    values = torch.linalg.svdvals(_rolled(subject.weight))
    floor = subject.tolerance * subject.norm
    rank = int((values > floor).sum())
    if rank < size // 4:
        terms = "the product" if rank == 1 else f"a sum of {rank} products"
        error = float(torch.linalg.norm(values[rank:])) / subject.norm
        family = "ACDC" if rank <= 2 else ""
        yield Trait(f"{terms} of circulant and diagonal matrices", error, 2 * rank * size, family=family)


# ------------------------------------------------------------------------------------------------ nodes and recurrences


def by_nodes(subject: Subject) -> Iterator[Trait]:
    """Cauchy and Vandermonde matrices with any nodes, and those of displacement rank 1."""
    weight, norm = subject.weight, subject.norm
    rows, columns = weight.shape
    if min(rows, columns) < 4 or max(rows, columns) > _LARGEST or subject.measures.rank <= 2:
        return
    first = weight[:, :-1]
    below = first.abs().square().sum(1)
    if bool((below > 0).all()):
        nodes = (first.conj() * weight[:, 1:]).sum(1) / below
        powers = nodes[:, None] ** torch.arange(columns)
        if bool(torch.isfinite(powers.abs()).all()):
            scale = (powers.conj() * weight).sum(1) / powers.abs().square().sum(1)
            error = float(torch.linalg.norm(weight - scale[:, None] * powers)) / norm
            yield Trait("a Vandermonde matrix", error, 2 * rows, family="Vandermonde")
    if bool((weight != 0).all()):
        inverse = 1 / weight
        by_row, by_column = inverse.mean(1, keepdim=True), inverse.mean(0, keepdim=True)
        error = float(torch.linalg.norm(weight - 1 / (by_row + by_column - inverse.mean()))) / norm
        yield Trait("a Cauchy matrix", error, rows + columns + 1, family="Cauchy")
        error = _reciprocal_error(weight, norm)
        name = "a Cauchy matrix with rows and columns scaled"
        yield Trait(name, error, 2 * (rows + columns), family="CauchyLike")


def _reciprocal_error(weight: Tensor, norm: float) -> float:
    """How far a matrix is from having reciprocals of rank 2, which scaled Cauchy matrices have."""
    u, s, vh = torch.linalg.svd(1 / weight, full_matrices=False)
    near = 1 / ((u[:, :2] * s[:2]) @ vh[:2])
    return float(torch.linalg.norm(weight - near)) / norm


_FOUND: tuple[tuple[type[OfDisplacementRank], Callable[[Tensor, int], object], int, str], ...] = (
    (CauchyLike, cauchy_angles, 8, "Cauchy-like matrix, nodes found"),
    (VandermondeLike, vandermonde_nodes, 8, "Vandermonde-like matrix, nodes found"),
    (LDRSubdiagonal, subdiagonals, 8, "matrix for learned subdiagonal operators, found"),
    (LDRTridiagonal, tridiagonal_members, 2, "matrix for learned tridiagonal operators, found"),
)
"""Families, what finds their operators, the highest rank that is tried, and names. The last is a descent."""


def by_found_operators(subject: Subject) -> Iterator[Trait]:
    """Small displacement rank under nodes, subdiagonals and three diagonals that nothing is known of."""
    weight, shape = subject.weight, (subject.weight.shape[0], subject.weight.shape[1])
    if min(shape) < _SMALLEST or max(shape) > _LARGEST or subject.measures.rank < min(shape) // 2:
        return
    for kind, find, highest, name in _FOUND:
        for rank in range(1, highest + 1):
            numbers = kind.numbers(rank, shape)
            if 2 * numbers > weight.numel():
                break
            if find(weight, rank) is not None:
                structure: Structure = kind(rank=rank)  # type: ignore[call-arg]
                plain = subject.target.unweighted()
                error = project_target(plain, structure, dtype=weight.dtype, device=weight.device).error
                words = f"a {name}: displacement rank {rank}"
                yield Trait(words, error, numbers, family=kind.__name__)
                if error <= subject.tolerance:
                    return
                break


def by_recurrence(subject: Subject) -> Iterator[Trait]:
    """Columns that follow from the ones before by a recurrence with nodes: orthogonal polynomials and their relatives.

    The quotient of the first two columns is an affine function of the nodes, and the recurrence absorbs which. Each
    further column is then a least squares problem with ``width + 1`` unknowns.
    """
    weight, norm = subject.weight, subject.norm
    rows, columns = weight.shape
    if rows < 4 * (_WIDEST + 2) or columns < 8 or subject.measures.rank <= _WIDEST + 2 or columns > _LARGEST:
        return
    if not bool((weight[:, 0] != 0).all()):
        return
    nodes = weight[:, 1] / weight[:, 0]
    nodes = nodes / nodes.abs().max().clamp(min=1e-300)
    for width in range(1, _WIDEST + 1):
        left = 0.0
        for j in range(1, columns - 1):
            before = [weight[:, j - k] for k in range(min(width, j + 1))]
            system = torch.stack([nodes * weight[:, j], *before], 1)
            system = system / torch.linalg.norm(system, dim=0).clamp(min=1e-300)
            basis = torch.linalg.qr(system).Q
            wanted = weight[:, j + 1]
            left += float(torch.linalg.norm(wanted - basis @ (basis.mH @ wanted))) ** 2
            if left > (NEAR * norm) ** 2:
                break
        else:
            name = f"a matrix whose columns follow a recurrence of width {width}"
            error = left**0.5 / norm
            yield Trait(name, error, 2 * rows + (width + 1) * columns, family="RecurrenceWidth")
            if error <= subject.tolerance:
                return


# ---------------------------------------------------------------------------------------------------- scaled transforms


def by_scalings(subject: Subject) -> Iterator[Trait]:
    """Known matrices between two diagonals: orthogonal polynomials at Gauss nodes; a layer of ACDC."""
    weight, norm = subject.weight, subject.norm
    rows, columns = weight.shape
    if not 4 <= min(rows, columns) <= max(rows, columns) <= _LARGEST or subject.measures.rank < min(rows, columns) // 2:
        return
    for kind in ("chebyshev", "legendre", "hermite", "laguerre"):
        error = _between_diagonals(weight, _polynomials(kind, (rows, columns)).to(weight)) / norm
        name = f"the {kind.capitalize()} polynomials at their nodes, rows and columns scaled"
        yield Trait(name, error, rows + columns, family="OrthogonalPolynomial")
    if rows == columns:
        cosines = transforms.dct(rows, orthonormal=True).to_dense().to(weight)
        error = _between_diagonals(cosines @ weight, cosines) / norm
        name = "an inverse cosine transform, a diagonal, a cosine transform and a diagonal"
        yield Trait(name, error, 2 * rows, family="ACDC")


@lru_cache(maxsize=16)
def _polynomials(kind: str, shape: Shape) -> Tensor:
    """The orthonormal polynomials at their nodes, (nodes, degrees)."""
    made = StructuredMatrix.random(OrthogonalPolynomial(kind), shape, dtype=torch.float64)
    plain = {**made.tensors, "left": torch.ones(shape[0], dtype=torch.float64)}
    return StructuredMatrix(made.structure, shape, plain).to_dense()


def _between_diagonals(weight: Tensor, known: Tensor) -> float:
    """How far a matrix is from ``diag(a) T diag(b)``: alternating least squares, exact where such diagonals exist."""
    crossed, squares = known.conj() * weight, known.abs().square()
    # The quotients in one row are b up to a factor; the row of which all entries are far from zero.
    row = int(crossed.abs().amin(1).argmax())
    b = crossed[row] / squares[row].clamp(min=1e-300)
    a = weight.new_ones(weight.shape[0])
    for _ in range(_STEPS):
        a = (crossed @ b.conj()) / (squares @ b.abs().square()).clamp(min=1e-300)
        b = (crossed.mT @ a.conj()) / (squares.mT @ a.abs().square()).clamp(min=1e-300)
    return float(torch.linalg.norm(weight - a[:, None] * known * b))


def by_stages(subject: Subject) -> Iterator[Trait]:
    """Fastfood, kaleidoscopes, soft permutations by switches, relaxed permutations before a butterfly."""
    weight = subject.weight
    size = weight.shape[0]
    if weight.shape[1] != size or not _SMALLEST <= size <= _LARGEST or size & (size - 1):
        return
    if weight.is_complex() or subject.measures.rank < size:
        return
    sums = torch.cat([weight.sum(0), weight.sum(1)])
    kinds: list[tuple[str, Structure, Callable[[Tensor], Mapping[str, Tensor] | None]]] = []
    kinds.append(
        ("a diagonal, two Hadamard transforms around a permuted diagonal, a diagonal", Fastfood(), fastfood_tensors)
    )
    if float((sums - 1).abs().max()) <= NEAR and float(weight.min()) >= -NEAR:
        kinds.append(("a permutation softened by switches", SoftPermutation(), switch_logits))
    kinds.append(("a kaleidoscope matrix", Kaleidoscope(), kaleidoscope_factors))
    if size <= _LARGEST_RELAXED and (subject.measures.butterfly or 0.0) > subject.tolerance:
        kinds.append(("a butterfly matrix after a relaxed permutation", RelaxedButterfly(), relaxed_factors))
    for name, structure, find in kinds:
        numbers = count_stored(structure, (size, size))
        tensors = find(weight) if 2 * numbers <= weight.numel() else None
        if tensors is not None:
            near = StructuredMatrix(structure, (size, size), tensors).to_dense()
            error = float(torch.linalg.norm(near - weight)) / subject.norm
            if math.isfinite(error):
                yield Trait(name, error, numbers, family=type(structure).__name__)


# ------------------------------------------------------------------------------------- blocks, supports, products


def block_values(weight: Tensor, count: int) -> Tensor:
    """Singular values (count, count, ...) of the blocks of a grid, the last ones filled up with zeros."""
    height, width = (-(-size // count) for size in weight.shape)
    whole = F.pad(weight, (0, width * count - weight.shape[1], 0, height * count - weight.shape[0]))
    values: Tensor = torch.linalg.svdvals(whole.reshape(count, height, count, width).transpose(1, 2))
    return values


def by_hierarchy(subject: Subject) -> Iterator[Trait]:
    """Off-diagonal blocks of low rank, level by level, and grids of blocks of low rank."""
    weight = subject.weight
    rows, columns = weight.shape
    floor = subject.tolerance * subject.norm
    for count, rank in subject.measures.block_ranks.items():
        if 0 < rank * count < subject.measures.rank:
            name = f"a {count} x {count} grid of blocks of rank {rank}"
            error = float(torch.linalg.norm(block_values(weight, count)[..., rank:])) / subject.norm
            yield Trait(name, error, rank * count * (rows + columns), family="BlockLowRank")
    if min(rows, columns) < _SMALLEST or subject.measures.rank < min(rows, columns) // 2:
        return
    levels, rank = 0, 0
    best: tuple[int, int, int] | None = None
    values: list[Tensor] = []  # of the blocks of each level
    while rows % (2 << levels) == columns % (2 << levels) == 0 and min(rows, columns) >> (levels + 1) >= 2:
        levels += 1
        height, width = rows >> levels, columns >> levels
        grid = weight.reshape(1 << levels, height, 1 << levels, width).permute(0, 2, 1, 3)
        index = torch.arange(1 << levels)
        beside = grid[index, index ^ 1]
        values.append(torch.linalg.svdvals(beside))
        rank = max(rank, int((values[-1] > floor).sum(-1).max()))
        numbers = levels * rank * (rows + columns) + rows * columns // (1 << levels)
        if best is None or numbers < best[0]:
            best = numbers, levels, rank
    if best is not None and best[2] > 0:
        numbers, levels, rank = best
        name = f"a matrix of {levels} levels of off-diagonal blocks of rank {rank}"
        error = math.hypot(*(float(torch.linalg.norm(own[..., rank:])) for own in values[:levels])) / subject.norm
        yield Trait(name, error, numbers, family="HODLR")


def by_bands_of_rows(subject: Subject) -> Iterator[Trait]:
    """Bands of rows, or of columns, of low rank each: a block diagonal matrix times a dense one, or the other way
    round."""
    shape = (subject.weight.shape[0], subject.weight.shape[1])
    plain = subject.measures.rank * sum(shape)
    floor = subject.tolerance * subject.norm
    for weight, words in (
        (subject.weight, "a block diagonal matrix of {} blocks times a dense one of {} rows"),
        (subject.weight.mT, "a dense matrix of {1} columns times a block diagonal one of {0} blocks"),
    ):
        rows, columns = weight.shape
        for count in (2, 4, 8):
            if rows % count or rows // count < 2:
                continue
            values = torch.linalg.svdvals(weight.reshape(count, rows // count, columns))
            rank = int((values > floor).sum(-1).max())
            numbers = rank * (rows + count * columns)
            if rank > 0 and numbers < plain and 2 * numbers <= weight.numel():
                error = float(torch.linalg.norm(values[:, rank:])) / subject.norm
                yield Trait(words.format(count, count * rank), error, numbers, family="Product")


def by_shared_bases(subject: Subject) -> Iterator[Trait]:
    """BLAST: a grid of blocks ``U_i diag(s_ij) V_j`` with fewer terms than rows and columns of a block."""
    weight, limit = subject.weight, subject.weight.numel() // 2
    floor = subject.tolerance * subject.norm
    for count in (2, 4, 8):
        height, width = weight.shape[0] // count, weight.shape[1] // count
        if weight.shape[0] % count or weight.shape[1] % count or min(height, width) < 3:
            continue
        by_row = weight.reshape(count, height, -1)
        by_column = weight.T.reshape(count, width, -1)
        left, values, _ = torch.linalg.svd(by_row, full_matrices=False)
        right, others, _ = torch.linalg.svd(by_column, full_matrices=False)
        rank = int(max((values > floor).sum(-1).max(), (others > floor).sum(-1).max()))
        numbers = rank * (sum(weight.shape) + count * count)
        if not 0 < rank < min(height, width) or numbers > limit or rank >= subject.measures.rank:
            continue
        left, right = left[:, :, :rank], right[:, :, :rank]
        grid = weight.reshape(count, height, count, width).permute(0, 2, 1, 3)
        core = left.mH[:, None] @ grid @ right.conj()[None]
        found = factor_grid(core)
        if found is not None and found.left.dtype == weight.dtype:  # not a real matrix with complex factors
            error = float(torch.linalg.norm(found.blocks - core)) / subject.norm
            yield Trait(f"a BLAST matrix of {count} x {count} blocks and rank {rank}", error, numbers, family="BLAST")


def by_monarch_pair(subject: Subject) -> Iterator[Trait]:
    """A Monarch matrix times a transposed one, which holds kaleidoscopes of width one and networks of switches."""
    size, columns = subject.weight.shape
    if size != columns or size > _LARGEST or subject.measures.rank < size:
        return
    for block in divisors(size):
        if 2 <= block <= size // 2:
            numbers = 2 * size * (size // block) + size * block
            if numbers <= size * size // 2:
                found = monarch_pair(subject.weight, block)
                if found is not None and found.error < NEAR:
                    name = f"a product of a Monarch and a transposed Monarch matrix, {block} columns a block"
                    yield Trait(name, found.error, numbers)  # more matrices are such products than kaleidoscopes
                    return


def by_support_and_rank(subject: Subject) -> Iterator[Trait]:
    """Low rank beside a band, diagonal blocks, or the blocks of a butterfly."""
    weight = subject.weight
    rows, columns = weight.shape
    if rows != columns or not 16 <= rows <= _LARGEST // 2 or subject.measures.rank < rows // 2:
        return
    floor = subject.tolerance * subject.norm
    quarter = rows // 4
    rank = int((torch.linalg.svdvals(weight[:quarter, -quarter:]) > floor).sum())
    if not 0 < rank < quarter:
        return
    places = torch.arange(rows)
    apart = (places[:, None] - places).abs()
    supports: list[tuple[str, str, Tensor]] = [
        (f"a banded matrix of bandwidth {width} plus rank {rank}", "", apart <= width) for width in (1, 2, 3)
    ]
    for blocks in (2, 4, 8, 16, 32):
        if rows % blocks == 0 and rows // blocks >= 2:
            block = places // (rows // blocks)
            name = f"a block diagonal matrix of {blocks} blocks plus rank {rank}"
            supports.append((name, "Sum", block[:, None] == block))
            digits = block[:, None] ^ block
            for strides in range(1, blocks.bit_length()):
                beside = (digits == 0) | ((digits & (digits - 1) == 0) & (digits < 1 << strides))
                if strides > 1:  # one stride is block diagonal
                    name = f"a block butterfly of {blocks} blocks and {strides} strides plus rank {rank}"
                    supports.append((name, "Pixelfly", beside))
    supports.sort(key=lambda entry: int(entry[2].sum()))
    for name, family, support in supports:
        numbers = int(support.sum()) + 2 * rank * rows
        if numbers > rows * columns // 2:
            return
        found = support_plus_low_rank(weight, support, rank, subject.tolerance)
        if found is not None and found.error < NEAR:
            yield Trait(name, found.error, numbers, family=family)
            if found.error <= subject.tolerance:
                return


def by_windows(subject: Subject) -> Iterator[Trait]:
    """Sums of rank-one terms on windows of the rows and of the columns, in fewer numbers than entries."""
    terms = windows_of(subject.target, subject.tolerance)
    if terms is not None:
        shape = (subject.weight.shape[0], subject.weight.shape[1])
        numbers = count_stored(GBLR(terms.count, *terms.totals), shape)
        error = float(torch.linalg.norm(subject.weight - terms.dense())) / subject.norm
        plural = "" if terms.count == 1 else "s"
        yield Trait(f"a sum of {terms.count} rank-one term{plural} on windows", error, numbers, family="GBLR")


def by_orthogonality(subject: Subject) -> Iterator[Trait]:
    """Orthogonal and unitary matrices, up to a factor; orthogonal butterflies."""
    size, columns = subject.weight.shape
    if size != columns or size < 4:
        return
    gram = subject.weight.mH @ subject.weight
    scale = gram.diagonal().mean()
    error = float(torch.linalg.norm(gram - scale * torch.eye(size, dtype=gram.dtype)) / torch.linalg.norm(gram)) / 2
    kind = "a unitary" if subject.weight.is_complex() else "an orthogonal"
    butterfly = subject.measures.butterfly
    if butterfly is not None and butterfly <= NEAR and size & (size - 1) == 0 and error <= NEAR:
        numbers = size * (size.bit_length() - 1) + size
        yield Trait(f"{kind} butterfly matrix", max(error, butterfly), numbers, family="OrthogonalButterfly")
    yield Trait(f"{kind} matrix", error, size * (size - 1) // 2)


DETECTORS = (
    by_displacement,
    by_rolled,
    by_nodes,
    by_found_operators,
    by_recurrence,
    by_scalings,
    by_stages,
    by_hierarchy,
    by_bands_of_rows,
    by_shared_bases,
    by_monarch_pair,
    by_support_and_rank,
    by_windows,
    by_orthogonality,
)
"""What is looked for. A detector of another family is one more function here."""

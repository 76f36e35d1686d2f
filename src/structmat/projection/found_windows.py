"""Windows of a given matrix found: sums of windowed rank-one terms, peeled off where one of them shows alone.

Places that one term covers alone make 2 x 2 blocks of rank one, which in general position no others do. From such a
block a term grows: a row belongs to it where two of its places or more are one multiple of what is known of the
columns, and the other way round, whatever other terms do to the remaining places. What is known of a term is taken off,
which uncovers others. Windows that cross leave places where neither shows: linear least squares. Terms that share one
window show as blocks whose rank is their number. What is left in the end are runs of entries. Derived for this library;
it is the peeling decoder of sparse graph codes, on windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from structmat.projection.found_spans import LOCATIONS, disentangled, numbers, spanned_terms
from structmat.projection.masks import boxcar
from structmat.projection.target import Target
from structmat.projection.windows import Terms, runs

_LOOSE = 1e-9
"""Entries that differ by this share are equal while terms are looked for; in single precision three times its own."""

_COARSEST = 1e-5
"""Matrices of coarser rounding have blocks of low rank by chance."""

_EXACT = 1e-15
"""Relative errors up to this are not made smaller."""

_LARGEST = 256
_HIGHEST = 3
"""Terms of one window that are looked for."""

_GROWN = 32
"""Steps of growing, of which each adds places to a window, many as a rule."""

_TRIED = 24
"""Places along a row from which it is compared with a term, at most."""

_UNKNOWNS = 512
"""Places where windows cross that are solved for together, at most."""

_MOST_DISENTANGLED = 64
"""Terms up to so many are made shorter by one another."""

_FAILED = 8
"""Blocks from which no term grew, after which there are none."""

_SURE = 8
"""From so many patches on, they must take fewer numbers than the entries that they clear."""

_POLISHED = 24
"""Alternations of least squares at the end, at most."""


def windowed_terms(matrix: Tensor, tolerance: float = 1e-12) -> Terms | None:
    """Windowed terms whose sum a matrix (m, n) is, in fewer numbers than it has entries that are not zero, or None.

    Terms are found in general position: no more of them than the rank of a matrix that has not full rank, and of one
    that has such that show alone on a few places, at least once others are taken off. A matrix without a block of low
    rank costs a few passes over its entries.

    Args:
        matrix: float64 or complex128.
        tolerance: relative errors up to it, in the Frobenius norm, are rounding.
    """
    if max(matrix.shape) > _LARGEST or min(matrix.shape) < 2 or tolerance > _COARSEST:
        return None
    sizes = matrix[matrix != 0].abs()
    if 2 * len(sizes.unique()) <= len(sizes):
        return None  # blocks of few different numbers are of low rank by chance; there may be no entries at all
    loose = max(_LOOSE, 3 * tolerance)
    for find in (spanned_terms, _peeled):
        terms = find(matrix, loose)
        settled = None if terms is None else _settled(matrix, terms, tolerance)
        if settled is not None and numbers(settled) < len(sizes):
            return settled
    return None


def windows_of(target: Target, tolerance: float = 1e-12) -> Terms | None:
    """:func:`windowed_terms` of the weight of a target, looked for once."""
    return target.weight_fact(("windows", tolerance), lambda: windowed_terms(target.weight, tolerance))


def _peeled(matrix: Tensor, loose: float) -> Terms | None:
    peeling = _Peeling(matrix, loose)
    if not peeling.run():
        return None
    terms = peeling.terms()
    return disentangled(terms.left, terms.right, loose) if terms.count <= _MOST_DISENTANGLED else terms


def _settled(matrix: Tensor, terms: Terms, tolerance: float) -> Terms | None:
    """The terms with contents as near as can be, if these are the matrix."""
    norm = float(torch.linalg.norm(matrix))
    error = float(torch.linalg.norm(matrix - terms.dense())) / norm
    for _ in range(_POLISHED):
        if error <= _EXACT:
            break
        trial = refitted(matrix, terms)
        moved = float(torch.linalg.norm(matrix - trial.dense())) / norm
        if not moved < error:
            break
        terms, before, error = trial, error, moved
        if moved > 0.9 * before:
            break
    return terms.canonical() if error <= tolerance else None


def refitted(matrix: Tensor, terms: Terms) -> Terms:
    """Contents by least squares, first of all left sides and then of all right ones; windows stay."""
    for _ in range(2):
        inside = boxcar(terms.windows[:, 1], terms.windows[:, 0], terms.left.shape[1])
        patterns, which = torch.unique(inside.mT, dim=0, return_inverse=True)
        left = torch.zeros_like(terms.left)
        for number, pattern in enumerate(patterns):
            own, rows = torch.nonzero(pattern)[:, 0], torch.nonzero(which == number)[:, 0]
            if len(own):
                found = torch.linalg.lstsq(terms.right[own].mT, matrix[rows].mT, driver="gelsd").solution
                left[own[:, None], rows] = found
        # The other side of the transpose.
        terms = Terms(terms.right, left, terms.windows[:, [2, 3, 0, 1]])
        matrix = matrix.mT
    return terms


@dataclass(frozen=True)
class _Patch:
    """Terms that share one window, as far as they are known.

    Args:
        left: (rank, m), zero where nothing is known.
        right: (rank, n).
        rows: start and width of the window.
        columns: likewise.
        known_rows: (m,), those whose contents are known, within the window.
        known_columns: (n,).
    """

    left: Tensor
    right: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int]
    known_rows: Tensor
    known_columns: Tensor

    @property
    def rank(self) -> int:
        return len(self.left)

    @property
    def known(self) -> int:
        return int(self.known_rows.sum()) + int(self.known_columns.sum())

    def dense(self) -> Tensor:
        return self.left.mT @ self.right

    def transposed(self) -> _Patch:
        return _Patch(self.right, self.left, self.columns, self.rows, self.known_columns, self.known_rows)

    def touches(self, other: _Patch) -> bool:
        """Whether the windows share a place or are neighbours."""
        sizes = self.left.shape[1], self.right.shape[1]
        pairs = zip((self.rows, self.columns), (other.rows, other.columns), sizes, strict=True)
        return all((b[0] - a[0]) % size <= a[1] or (a[0] - b[0]) % size <= b[1] for a, b, size in pairs)


class _Peeling:
    """A matrix, less what of its terms is known.

    Args:
        matrix: (m, n).
        loose: entries that differ by this share are equal.
    """

    def __init__(self, matrix: Tensor, loose: float) -> None:
        self.loose = loose
        self.floor = loose * float(matrix.abs().square().mean().sqrt())
        self.patches: list[_Patch] = []
        self.rest = self._cleared(matrix)

    def run(self) -> bool:
        """Take off all that can be found. False if that saves nothing."""
        rank, held = 1, int((self.rest != 0).sum())
        while rank <= _HIGHEST:
            if self._new(rank) or self._crossings():
                rank = 1
            else:
                rank += 1
            if len(self.patches) >= _SURE and not self._saved(held):
                return False
        left = self.rest != 0
        begun = min(int((left & ~left.roll(1, axis)).sum()) for axis in range(2))  # runs
        return self._saved(held - (LOCATIONS + 1) * begun)

    def _saved(self, held: int) -> bool:
        """Whether the patches take fewer numbers than the entries that they clear of so many."""
        stored = sum(p.rank * (p.rows[1] + p.columns[1] + LOCATIONS) for p in self.patches)
        return stored < held - int((self.rest != 0).sum())

    def terms(self) -> Terms:
        """The patches, and what is left as runs of entries."""
        by_columns = runs(self.rest, self.rest != 0)
        by_rows = runs(self.rest.mT, self.rest.mT != 0)
        if numbers(by_rows) < numbers(by_columns):
            left = Terms(by_rows.right, by_rows.left, by_rows.windows[:, [2, 3, 0, 1]])
        else:
            left = by_columns
        windows = [torch.tensor([[*p.rows, *p.columns]] * p.rank) for p in self.patches]
        return Terms(
            torch.cat([*(p.left for p in self.patches), left.left]),
            torch.cat([*(p.right for p in self.patches), left.right]),
            torch.cat([*windows, left.windows]),
        )

    def _cleared(self, rest: Tensor) -> Tensor:
        return torch.where(rest.abs() <= self.floor, torch.zeros_like(rest), rest)

    # ------------------------------------------------------------------------------------------------------ new terms

    def _new(self, rank: int) -> bool:
        """Take off one more patch, and what it uncovers of the others."""
        m, n = self.rest.shape
        for row, column in islice(self._seeds(rank), _FAILED):
            rows, columns = (row + torch.arange(rank + 1)) % m, (column + torch.arange(rank + 1)) % n
            patch = _Patch(
                self.rest.new_zeros(rank, m),
                self.rest.new_zeros(rank, n),
                (row, rank + 1),
                (column, rank + 1),
                torch.zeros(m, dtype=torch.bool),
                torch.zeros(n, dtype=torch.bool),
            )
            patch.right[:, columns] = torch.linalg.svd(self.rest[rows[:, None], columns]).Vh[:rank]
            patch.known_columns[columns] = True
            patch = _grown(self.rest, patch, self.loose, self.floor)
            rest = self._cleared(self.rest - patch.dense())
            if int((rest != 0).sum()) < int((self.rest != 0).sum()):
                self.rest = rest
                self.patches.append(patch)
                self._uncover(len(self.patches) - 1)
                return True
        return False

    def _seeds(self, rank: int) -> Iterator[tuple[int, int]]:
        """First rows and columns of cyclic blocks of ``rank + 1`` rows and columns and of this rank, those first of
        which there are many side by side."""
        m, n = self.rest.shape
        if min(m, n) <= rank:
            return
        steps = range(rank + 1)
        blocks = torch.stack(
            [torch.stack([self.rest.roll((-i, -j), (0, 1)) for j in steps], -1) for i in steps], -2
        )  # (m, n, rows of a block, columns of a block)
        held = torch.nonzero((blocks != 0).flatten(2).all(2))
        blocks = blocks[held[:, 0], held[:, 1]]
        sizes = torch.linalg.norm(blocks, dim=2).prod(1)
        if rank == 1:
            determinants = blocks[:, 0, 0] * blocks[:, 1, 1] - blocks[:, 0, 1] * blocks[:, 1, 0]
        else:
            determinants = torch.linalg.det(blocks)
        held = held[determinants.abs() <= self.loose * sizes]
        is_seed = torch.zeros(m, n)
        is_seed[held[:, 0], held[:, 1]] = 1.0
        around = sum(is_seed.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
        assert isinstance(around, Tensor)
        order = around[held[:, 0], held[:, 1]].argsort(descending=True, stable=True)
        yield from ((row, column) for row, column in held[order].tolist())

    def _uncover(self, number: int) -> None:
        """Let patches grow where others were taken off, beginning beside the patch of this number."""
        waiting = [number]
        while waiting:
            changed = self.patches[waiting.pop(0)]
            for k, patch in enumerate(self.patches):
                if patch is changed or not patch.touches(changed):
                    continue
                before = self.rest + patch.dense()
                grown = _grown(before, patch, self.loose, self.floor)
                if grown.known > patch.known:
                    self.rest = self._cleared(before - grown.dense())
                    self.patches[k] = grown
                    if k not in waiting:
                        waiting.append(k)

    # ------------------------------------------------------------------------------------------------------ crossings

    def _crossings(self) -> bool:
        """Contents that nothing tells but the sums of terms that cross: a linear problem, unless it is too large.

        A place within the window of a term of which neither the row nor the column is known gives no equation.
        """
        m, n = self.rest.shape
        unknowns: list[tuple[int, int, int, int]] = []  # patch, side, term, place
        usable = torch.ones(m, n, dtype=torch.bool)
        for k, patch in enumerate(self.patches):
            free = [
                _inside(window, size) & ~known
                for window, size, known in (
                    (patch.rows, m, patch.known_rows),
                    (patch.columns, n, patch.known_columns),
                )
            ]
            usable &= ~(free[0][:, None] & free[1])
            for side in range(2):
                unknowns += [
                    (k, side, t, i) for i in torch.nonzero(free[side])[:, 0].tolist() for t in range(patch.rank)
                ]
        if not 0 < len(unknowns) <= _UNKNOWNS:
            return False
        system = self.rest.new_zeros(len(unknowns), m, n)
        for number, (k, side, term, place) in enumerate(unknowns):
            patch = self.patches[k]
            if side == 0:
                system[number, place] = patch.right[term]
            else:
                system[number, :, place] = patch.left[term]
        reached = (system != 0).any(0) & usable
        wanted = self.rest[reached]
        matrix = system[:, reached]
        found = torch.linalg.lstsq(matrix.mT, wanted[:, None], driver="gelsd").solution[:, 0]
        is_left = (wanted - found @ matrix).abs() > self.floor
        solved = ~((matrix != 0) & is_left).any(1) & (matrix != 0).any(1)
        # All terms of a patch at one place, or none.
        bad = {
            (k, side, place) for (k, side, _, place), good in zip(unknowns, solved.tolist(), strict=True) if not good
        }
        renewed = list(self.patches)
        progress = False
        for (k, side, term, place), value in zip(unknowns, found, strict=True):
            if (k, side, place) not in bad:
                patch = renewed[k] if side == 0 else renewed[k].transposed()
                left, known = patch.left.clone(), patch.known_rows.clone()
                left[term, place], known[place] = value, True
                patch = replace(patch, left=left, known_rows=known)
                renewed[k] = patch if side == 0 else patch.transposed()
                progress = True
        if progress:
            before = self.rest + sum(p.dense() for p in self.patches)
            self.patches = renewed
            self.rest = self._cleared(before - sum(p.dense() for p in self.patches))
        return progress


def _inside(window: tuple[int, int], size: int) -> Tensor:
    return boxcar(torch.tensor([window[1]]), torch.tensor([window[0]]), size)[0]


# ----------------------------------------------------------------------------------------------------------- growing


def _grown(weight: Tensor, patch: _Patch, loose: float, floor: float) -> _Patch:
    """A patch with all rows and columns that show."""
    for _ in range(_GROWN):
        before = patch.rows, patch.columns, patch.known
        patch = _with_rows(weight, patch, loose, floor)
        patch = _with_rows(weight.mT, patch.transposed(), loose, floor).transposed()
        if before == (patch.rows, patch.columns, patch.known):
            break
    return patch


def _with_rows(weight: Tensor, patch: _Patch, loose: float, floor: float) -> _Patch:
    """A patch with the rows that its known columns tell, and a window that reaches to them."""
    found, shows = _told(weight, patch, loose, floor)
    # Rows between cost a number each, and a term of its own its other side and locations.
    reach = patch.columns[1] + LOCATIONS - 1
    rows = _reaching(patch.rows, shows, reach)
    inside = _inside(rows, len(shows))
    left = torch.where(inside & shows, found, patch.left)
    return replace(patch, left=left, rows=rows, known_rows=(inside & shows) | patch.known_rows)


def _told(weight: Tensor, patch: _Patch, loose: float, floor: float) -> tuple[Tensor, Tensor]:
    """Contents (rank, m) of rows that were not known, of which ``rank + 1`` places at least are one combination of the
    known columns, and which these are (m,)."""
    size, rank = weight.shape[0], patch.rank
    n = weight.shape[1]
    columns = (patch.columns[0] + torch.arange(patch.columns[1])) % n
    columns = columns[patch.known_columns[columns]]
    right, count = patch.right[:, columns], len(columns)
    found, shows = weight.new_zeros(size, rank), torch.zeros(size, dtype=torch.bool)
    if count <= rank:
        return found.mT, shows
    own = weight[:, columns]
    enough = torch.nonzero(((own.abs() > floor).sum(1) > rank) & ~patch.known_rows)[:, 0]
    starts = torch.arange(count - rank + 1)
    starts = starts[:: -(-len(starts) // _TRIED)]
    places = starts[:, None] + torch.arange(rank)
    inverses, failed = torch.linalg.inv_ex(right[:, places].permute(1, 0, 2))  # (starts, places, terms)
    places, inverses = places[failed == 0], inverses[failed == 0]
    if len(enough) == 0 or len(places) == 0:
        return found.mT, shows
    own = own[enough]
    by_start = torch.einsum("isp,spt->ist", own[:, places], inverses)
    near = by_start @ right
    size_of = own.abs()[:, None] + by_start.abs() @ right.abs()
    agrees = ((own[:, None] - near).abs() <= loose * size_of) & (own.abs() > floor)[:, None]
    best = agrees.sum(2).argmax(1)
    agrees = agrees[torch.arange(len(enough)), best]
    good = agrees.sum(1) > rank
    enough, agrees, own = enough[good], agrees[good], own[good]
    if len(enough):
        systems = right.mT * agrees[:, :, None]
        found[enough] = torch.linalg.lstsq(systems, (own * agrees)[:, :, None]).solution[:, :, 0]
        shows[enough] = True
    return found.mT, shows


def _reaching(window: tuple[int, int], shows: Tensor, reach: int) -> tuple[int, int]:
    """The window, longer at both ends as far as there are places that show, no more than ``reach`` others between."""
    held, size = shows.tolist(), len(shows)
    start, width = window
    for step in (1, -1):
        between = 0
        end = start + width if step == 1 else start - 1
        for place in range(size - width):
            if held[(end + step * place) % size]:
                start, width = (start, width + between + 1) if step == 1 else (start - between - 1, width + between + 1)
                between = 0
            else:
                between += 1
                if between > reach:
                    break
    return start % size, width

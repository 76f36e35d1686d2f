"""Sums of windowed rank-one terms: exact intervals, alternating least squares, exact totals of widths.

A matrix is ``sum_k outer(left[k], right[k])`` where ``left`` (terms, out) and ``right`` (terms, in) vanish outside of
cyclic intervals. ``windows`` (terms, 4) holds row location, row width, column location and column width.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structmat.projection.low_rank import truncate
from structmat.projection.masks import boxcar
from structmat.projection.target import Target

_WORK = 2e11
"""Multiply-adds that a fit may take in all: of large matrices fewer sweeps are run than were asked for."""

_IDLE = 5
_PATIENCE = 1e-3
"""A fit ends when this many sweeps in turn have not lowered the squared error by this share."""

_ROUNDS = 2
"""Alternations between the two sides of a term each time that it is visited."""


@dataclass(frozen=True)
class Terms:
    """Windowed rank-one terms, contents written out with zeros outside of their windows.

    Args:
        left: (terms, out).
        right: (terms, in).
        windows: (terms, 4) integers: row location, row width, column location, column width.
    """

    left: Tensor
    right: Tensor
    windows: Tensor

    @property
    def count(self) -> int:
        return int(self.windows.shape[0])

    @property
    def totals(self) -> tuple[int, int]:
        """Sums of the row widths and of the column widths."""
        return int(self.windows[:, 1].sum()), int(self.windows[:, 3].sum())

    @property
    def alive(self) -> Tensor:
        """Which terms have both widths."""
        return (self.windows[:, 1] > 0) & (self.windows[:, 3] > 0)

    def dense(self) -> Tensor:
        return self.left.T @ self.right

    def cropped(self) -> Terms:
        """Contents set to zero outside of the windows."""
        rows = boxcar(self.windows[:, 1], self.windows[:, 0], self.left.shape[1])
        columns = boxcar(self.windows[:, 3], self.windows[:, 2], self.right.shape[1])
        return replace(self, left=self.left * rows, right=self.right * columns)

    def taken(self, which: Tensor) -> Terms:
        """The terms of these numbers."""
        return Terms(self.left[which], self.right[which], self.windows[which])

    def with_count(self, count: int) -> Terms:
        """With empty terms added up to this number."""
        more = count - self.count
        assert more >= 0, (self.count, count)
        return Terms(
            torch.cat([self.left, self.left.new_zeros(more, self.left.shape[1])]),
            torch.cat([self.right, self.right.new_zeros(more, self.right.shape[1])]),
            torch.cat([self.windows, self.windows.new_zeros(more, 4)]),
        )

    def canonical(self) -> Terms:
        """The same matrix: both sides of a term of equal norm, full windows from 0 on, terms in order, empty last."""
        terms = self.cropped()
        sizes = [torch.linalg.norm(side, dim=1) for side in (terms.left, terms.right)]
        seen = (sizes[0] > 0) & (sizes[1] > 0)
        one = torch.ones_like(sizes[0])
        even = torch.where(seen, (sizes[1] / sizes[0].clamp(min=1e-300)).sqrt(), one)[:, None]
        windows = terms.windows.clone()
        for at, size in ((0, terms.left.shape[1]), (2, terms.right.shape[1])):
            windows[:, at] = torch.where(
                (windows[:, at + 1] >= size) | (windows[:, at + 1] == 0), 0, windows[:, at] % size
            )
        terms = Terms(terms.left * even, terms.right / even, windows)
        keys = [(not bool(a), *w) for a, w in zip(terms.alive.tolist(), windows.tolist(), strict=True)]
        return terms.taken(torch.tensor(sorted(range(self.count), key=keys.__getitem__), dtype=torch.int64))


def window_places(start: Tensor, width: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Term and place of every entry that the windows hold, one term after the other; integers (sum of widths,)."""
    term = torch.repeat_interleave(torch.arange(len(width), device=width.device), width)
    first = torch.cumsum(width, 0) - width
    offset = torch.arange(len(term), device=width.device) - first[term]
    return term, (start[term] + offset) % size


def pack(terms: Terms) -> dict[str, Tensor]:
    """Contents of the windows only, one term after the other: ``left``, ``right`` and ``windows``."""
    w = terms.windows
    return {
        "left": terms.left[window_places(w[:, 0], w[:, 1], terms.left.shape[1])],
        "right": terms.right[window_places(w[:, 2], w[:, 3], terms.right.shape[1])],
        "windows": w.clone(),
    }


def unpack(left: Tensor, right: Tensor, windows: Tensor, shape: tuple[int, int]) -> Terms:
    """The inverse of :func:`pack` for a matrix of shape (out, in)."""
    full_left = left.new_zeros(len(windows), shape[0])
    full_right = right.new_zeros(len(windows), shape[1])
    full_left[window_places(windows[:, 0], windows[:, 1], shape[0])] = left
    full_right[window_places(windows[:, 2], windows[:, 3], shape[1])] = right
    return Terms(full_left, full_right, windows)


def published_cost(windows: Tensor) -> int:
    """Numbers as the paper counts them: ``min(row width + column width, their product)`` over terms that have both."""
    rows, columns = windows[:, 1], windows[:, 3]
    return int(torch.minimum(rows + columns, rows * columns).sum())


def runs(dense: Tensor, support: Tensor) -> Terms:
    """One term for each cyclic run of the support within a column: a window of the rows, and one column."""
    m, n = dense.shape
    windows = []
    for j in range(n):
        held = support[:, j]
        if bool(held.all()):
            windows.append((0, m, j, 1))
            continue
        starts = torch.nonzero(held & ~held.roll(1))[:, 0].tolist()
        ends = torch.nonzero(held & ~held.roll(-1))[:, 0].tolist()
        for start in starts:
            end = min((e for e in ends if e >= start), default=min(ends, default=0))
            windows.append((start, (end - start) % m + 1, j, 1))
    table = torch.tensor(windows, dtype=torch.int64).reshape(-1, 4)
    left = dense.T[table[:, 2]] * boxcar(table[:, 1], table[:, 0], m)
    right = torch.zeros(len(table), n, dtype=dense.dtype)
    right[torch.arange(len(table)), table[:, 2]] = 1.0
    return Terms(left, right, table)


# ------------------------------------------------------------------------------------------------------- intervals


def best_interval(gains: Tensor) -> tuple[int, int, float]:
    """Start, width and sum of the cyclic interval with the largest sum of ``gains`` (n,); width 0 if none is positive.

    Kadane's algorithm by running extremes: an interval that passes the end is the whole without the least interval.
    """
    sums = torch.cat([gains.new_zeros(1), torch.cumsum(gains, 0)])
    least, least_at = torch.cummin(sums, 0)
    most, most_at = torch.cummax(sums, 0)
    inner, inner_end = (sums - least).max(0)
    hole, hole_end = (sums - most).min(0)
    outer = sums[-1] - hole
    value = float(torch.maximum(inner, outer))
    if value <= 0:
        return 0, 0, 0.0
    if float(inner) >= float(outer):
        end = int(inner_end)
        start = int(least_at[end])
        return start, end - start, value
    end = int(hole_end)
    start = int(most_at[end])
    return end % len(gains), len(gains) - (end - start), value


def best_segments(squares: Tensor, price: float) -> tuple[int, int, int, float]:
    """Column, start, width and sum of the best (not cyclic) interval of ``squares - price`` over all columns (m, n)."""
    sums = torch.cat([squares.new_zeros(1, squares.shape[1]), torch.cumsum(squares - price, 0)])
    least, least_at = torch.cummin(sums, 0)
    gained = sums - least
    best = int(gained.argmax())
    end, column = best // squares.shape[1], best % squares.shape[1]
    start = int(least_at[end, column])
    return column, start, end - start, float(gained[end, column])


# -------------------------------------------------------------------------------------------------- alternation


@dataclass(frozen=True)
class _Candidate:
    """One term; ``gain`` is by how much it lowers the penalised objective of the residual without it."""

    left: Tensor
    right: Tensor
    window: tuple[int, int, int, int]
    gain: float


class Backfit:
    """Terms refitted one at a time to what the others leave, at given prices of a row and of a column of a window.

    Given one side of a term, the other side's content *and interval* that minimise ``||R - u v^T||^2 + price |I|`` are
    found exactly (:func:`best_interval` on ``|R v|^2 / |v|^2 - price``). A visit compares what alternation finds from
    the present term, from a power iteration and (for empty terms) from the best segment of a single row or column, with
    the term as it is, and takes the best: the penalised objective never rises. A sweep costs about
    ``10 terms out in`` multiply-adds.
    """

    def __init__(self, weight: Tensor, terms: Terms, seed: int = 0) -> None:
        self.left, self.right = terms.left.clone(), terms.right.clone()
        self.windows = terms.windows.clone()
        self.rest = weight - terms.dense()
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def terms(self) -> Terms:
        return Terms(self.left.clone(), self.right.clone(), self.windows.clone())

    def objective(self, prices: tuple[float, float]) -> float:
        """The squared error plus the price of all widths."""
        rows, columns = int(self.windows[:, 1].sum()), int(self.windows[:, 3].sum())
        return float(self.rest.abs().square().sum()) + prices[0] * rows + prices[1] * columns

    def sweep(self, prices: tuple[float, float]) -> None:
        """Visit every term once."""
        for k in range(len(self.windows)):
            self._visit(k, prices)

    def refit(self) -> None:
        """Visit every term once with its windows as they are: contents only."""
        for k, (row, height, column, width) in enumerate(self.windows.tolist()):
            if height == 0 or width == 0:
                continue
            self._take(k)
            rows = boxcar(torch.tensor([height]), torch.tensor([row]), self.left.shape[1])[0]
            columns = boxcar(torch.tensor([width]), torch.tensor([column]), self.right.shape[1])[0]
            u, v = self.left[k], self.right[k]
            if float(v.abs().square().sum()) == 0:
                v = columns.to(u.dtype)
            for _ in range(_ROUNDS):
                size = v.abs().square().sum()
                u = (self.rest @ v.conj()) / size * rows
                size = u.abs().square().sum()
                if float(size) == 0:
                    break
                v = (u.conj() @ self.rest) / size * columns
            self._put(k, u, v)

    def _take(self, k: int) -> None:
        self.rest.addr_(self.left[k], self.right[k])

    def _put(self, k: int, u: Tensor, v: Tensor) -> None:
        self.left[k], self.right[k] = u, v
        self.rest.addr_(u, v, alpha=-1)

    def _visit(self, k: int, prices: tuple[float, float]) -> None:
        is_alive = int(self.windows[k, 1]) > 0 and int(self.windows[k, 3]) > 0
        if is_alive:
            self._take(k)
        found: list[_Candidate | None] = []
        if is_alive:
            found += [self._alternate(self.right[k], prices), self._as_it_is(k, prices)]
        else:
            noise = torch.randn(self.rest.shape[1], generator=self.generator, dtype=torch.float64).to(self.rest.dtype)
            start = self.rest.mH @ (self.rest @ noise)
            found += [self._alternate((self.rest.mH @ (self.rest @ start)).conj(), prices), *self._segments(prices)]
        best = max((c for c in found if c is not None), key=lambda c: c.gain, default=None)
        if best is None or best.gain <= 0:
            self.left[k], self.right[k] = 0, 0
            self.windows[k] = 0
            return
        self.windows[k] = torch.tensor(best.window)
        self._put(k, best.left, best.right)

    def _as_it_is(self, k: int, prices: tuple[float, float]) -> _Candidate:
        u, v = self.left[k].clone(), self.right[k].clone()
        inner = float((u.conj() @ self.rest @ v.conj()).real)
        size = float(u.abs().square().sum() * v.abs().square().sum())
        row, height, column, width = self.windows[k].tolist()
        price = prices[0] * height + prices[1] * width
        return _Candidate(u, v, (row, height, column, width), 2 * inner - size - price)

    def _alternate(self, v: Tensor, prices: tuple[float, float]) -> _Candidate | None:
        """Both sides by turns, intervals and contents, from the content of the columns."""
        m, n = self.rest.shape
        u, window = v, (0, 0, 0, 0)
        for _ in range(_ROUNDS):
            size = v.abs().square().sum()
            if float(size) <= 0:
                return None
            s = self.rest @ v.conj()
            row, height, _ = best_interval(s.abs().square() / size - prices[0])
            if height == 0:
                return None
            u = s / size * _inside(row, height, m)
            size = u.abs().square().sum()
            t = u.conj() @ self.rest
            column, width, _ = best_interval(t.abs().square() / size - prices[1])
            if width == 0:
                return None
            v = t / size * _inside(column, width, n)
            window = (row, height, column, width)
        # v is the best content for u, so the product with the residual is the term's own square.
        energy = float(u.abs().square().sum() * v.abs().square().sum())
        return _Candidate(u, v, window, energy - prices[0] * window[1] - prices[1] * window[3])

    def _segments(self, prices: tuple[float, float]) -> list[_Candidate]:
        m, n = self.rest.shape
        squares = self.rest.abs().square()
        column, start, height, value = best_segments(squares, prices[0])
        at = torch.zeros(n, dtype=self.rest.dtype)
        at[column] = 1.0
        found = [
            _Candidate(
                self.rest[:, column] * _inside(start, height, m), at, (start, height, column, 1), value - prices[1]
            )
        ]
        row, start, width, value = best_segments(squares.T, prices[1])
        at = torch.zeros(m, dtype=self.rest.dtype)
        at[row] = 1.0
        found.append(
            _Candidate(at, self.rest[row] * _inside(start, width, n), (row, 1, start, width), value - prices[0])
        )
        return [c for c in found if c.window[1] > 0 and c.window[3] > 0]


def _inside(start: int, width: int, size: int) -> Tensor:
    return boxcar(torch.tensor([width]), torch.tensor([start]), size)[0]


# -------------------------------------------------------------------------------------------------- exact totals


def settle(weight: Tensor, terms: Terms, rows: int, columns: int) -> Terms:
    """The terms with windows whose widths sum to exactly ``rows`` and ``columns``, contents refitted.

    Windows that are too wide in all lose the ends that matter least; else those are widened where the residual gains
    most. What is left when every window is full goes to empty terms.
    """
    terms = terms.cropped()
    terms = _resized(weight, terms, rows, 0)
    return _resized(weight, terms, columns, 1)


def _resized(weight: Tensor, terms: Terms, total: int, side: int) -> Terms:
    own, other = (terms.left, terms.right) if side == 0 else (terms.right, terms.left)
    size, at = own.shape[1], 2 * side
    windows = terms.windows.clone()
    excess = int(windows[:, at + 1].sum()) - total
    if excess > 0:
        # A term without its other side costs without giving anything: it goes first.
        for k in torch.nonzero((windows[:, at + 1] > 0) & (windows[:, 3 - at] == 0))[:, 0].tolist():
            cut = min(excess, int(windows[k, at + 1]))
            windows[k, at + 1] -= cut
            excess -= cut
    if excess > 0:
        worth = own.abs().square() * other.abs().square().sum(1, keepdim=True)
        _trim(windows, worth, excess, at, size)
    elif excess < 0:
        rest = weight - terms.dense()
        sizes = other.abs().square().sum(1, keepdim=True)
        pull = rest @ other.mH if side == 0 else (other.conj() @ rest).T
        gains = pull.T.abs().square() / sizes.clamp(min=1e-300) * (sizes > 0)
        _widen(windows, gains, -excess, at, size)
    return replace(terms, windows=windows).cropped()


def _trim(windows: Tensor, worth: Tensor, excess: int, at: int, size: int) -> None:
    """Take ``excess`` places off the ends of windows, the least worth first."""
    state = [(w[at], w[at + 1]) for w in windows.tolist()]
    table = worth.tolist()

    def ends(k: int) -> tuple[float, int, bool]:
        start, width = state[k]
        first, last = table[k][start % size], table[k][(start + width - 1) % size]
        return (first, k, True) if first <= last else (last, k, False)

    heap = [ends(k) for k in range(len(state)) if state[k][1] > 0]
    heapq.heapify(heap)
    for _ in range(excess):
        _, k, from_start = heapq.heappop(heap)
        start, width = state[k]
        state[k] = (start + 1 if from_start else start, width - 1)
        if width > 1:
            heapq.heappush(heap, ends(k))
    _write(windows, state, at, size)


def _widen(windows: Tensor, gains: Tensor, missing: int, at: int, size: int) -> None:
    """Add ``missing`` places to the ends of windows, those that gain most first; empty windows begin at their best."""
    state = [(w[at], w[at + 1]) for w in windows.tolist()]
    if float(gains.max() if gains.numel() else 0.0) > 0:
        table, peaks = gains.tolist(), gains.argmax(1).tolist()

        def ends(k: int) -> tuple[float, int, bool] | None:
            start, width = state[k]
            if width >= size:
                return None
            if width == 0:
                state[k] = (peaks[k], 0)
                return (-table[k][peaks[k]], k, False)
            before, after = table[k][(start - 1) % size], table[k][(start + width) % size]
            return (-before, k, True) if before > after else (-after, k, False)

        heap = [e for k in range(len(state)) if (e := ends(k)) is not None and e[0] < 0]
        heapq.heapify(heap)
        while missing > 0 and heap:
            _, k, before = heapq.heappop(heap)
            start, width = state[k]
            state[k] = ((start - 1) % size if before else start, width + 1)
            missing -= 1
            following = ends(k)
            if following is not None:
                heapq.heappush(heap, following)
    for k, (start, width) in enumerate(state):
        more = min(missing, size - width)
        state[k] = (start, width + more)
        missing -= more
    assert missing == 0, "more width than the terms can hold"
    _write(windows, state, at, size)


def _write(windows: Tensor, state: list[tuple[int, int]], at: int, size: int) -> None:
    windows[:, at : at + 2] = torch.tensor([(s % size, w) for s, w in state], dtype=windows.dtype).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------------ whole fits


def low_rank_terms(target: Target, count: int, rows: int, columns: int) -> Terms:
    """The best matrix of the rank that the totals allow with full windows, in ``count`` terms, the rest empty."""
    m, n = target.native
    rank = min(rows // m, columns // n, count, m, n)
    dtype = target.weight.dtype
    empty = Terms(torch.zeros(0, m, dtype=dtype), torch.zeros(0, n, dtype=dtype), torch.zeros(0, 4, dtype=torch.int64))
    if rank == 0:
        return empty.with_count(count)
    left, right, _ = truncate(target, rank)
    windows = torch.tensor([[0, m, 0, n]]).expand(rank, 4)
    return Terms(left.T.contiguous(), right, windows).with_count(count)


def windowed(target: Target, count: int, rows: int, columns: int) -> Terms:
    """A member near the target with exactly these totals: backfitting at prices that steer the totals.

    The start is the best low rank matrix that the totals allow; after every sweep the totals are made exact and the
    best outcome is kept, so that more sweeps are never worse, and low rank of that cost is never better. In a weighted
    norm windows are found for the moment's diagonal, contents refitted in the norm itself by conjugate gradients.
    """
    m, n = target.native
    scale = None
    weight = target.weight
    if target.second_moment is not None:
        scale = target.second_moment.diagonal().real.clamp(min=0.0).sqrt()
        weight = weight * scale
    start = low_rank_terms(target, count, rows, columns)
    best = settle(target.weight, start, rows, columns)
    best_error = target.squared(target.weight - best.dense())
    sweeps = int(min(target.sweeps, max(1.0, _WORK / (14.0 * max(1, count) * m * n))))
    # The first sweep looks for windows and seldom gains yet: alone it is not worth its time.
    if sweeps < 1 or target.sweeps < 2 or count == 0 or best_error == 0:
        return best.canonical()
    rank = int(start.alive.sum())
    values = torch.linalg.svdvals(weight)
    level = float(values[min(rank, len(values) - 1)] ** 2) / (m + n)
    prices = [level, level]
    scaled = start if scale is None else replace(start, right=start.right * scale)
    run = Backfit(weight, scaled, target.seed)
    idle = 0
    for _ in range(sweeps):
        run.sweep((prices[0], prices[1]))
        found = settle(weight, run.terms, rows, columns)
        fixed = Backfit(weight, found)
        fixed.refit()
        found = fixed.terms
        for side, total in enumerate((rows, columns)):
            share = run.terms.totals[side] / max(1, total)
            # Widths that are left over are useless: the price falls fast. One that is too low only costs a trim.
            prices[side] *= min(2.0, share**2) if share > 1 else max(0.25, min(0.5, share**3))
        if scale is not None:
            inverse = torch.where(scale > 0, scale.clamp(min=1e-300).reciprocal(), 0.0)
            found = refit_weighted(target, replace(found, right=found.right * inverse))
        error = target.squared(target.weight - found.dense())
        full = any(own >= total for own, total in zip(run.terms.totals, (rows, columns), strict=True))
        idle = 0 if error < best_error * (1 - _PATIENCE) or not full else idle + 1
        if error < best_error:
            best, best_error = found, error
        if idle == _IDLE:
            break
    return best.canonical()


def refit_weighted(target: Target, terms: Terms, rounds: int = 2, steps: int = 8) -> Terms:
    """Contents in the norm of the target, windows fixed: conjugate gradients on one side, then on the other.

    Each side's problem is a linear least-squares problem, which conjugate gradients never leave worse. ``steps`` cost
    about ``4 steps out in (terms + in)`` multiply-adds a side.
    """
    rows = boxcar(terms.windows[:, 1], terms.windows[:, 0], terms.left.shape[1])
    columns = boxcar(terms.windows[:, 3], terms.windows[:, 2], terms.right.shape[1])
    moment = target.second_moment
    assert moment is not None
    left, right = terms.left, terms.right
    for _ in range(rounds):
        weighted = right @ moment
        # The gradient of ||(W - left^T right) C^(1/2)||^2 by conj(left) is -conj(right) C^T (W - left^T right)^T.
        gram = weighted.conj() @ right.mT
        wanted = weighted.conj() @ target.weight.mT
        left = _conjugate_gradients(left, rows, wanted, lambda x, gram=gram: gram @ x, steps)  # type: ignore[misc]
        outer = left.conj() @ left.mT
        wanted = left.conj() @ target.weight @ moment
        right = _conjugate_gradients(right, columns, wanted, lambda x, outer=outer: outer @ x @ moment, steps)  # type: ignore[misc]
    return replace(terms, left=left, right=right)


def _conjugate_gradients(
    x: Tensor, mask: Tensor, wanted: Tensor, apply: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Minimise the quadratic with the positive semidefinite operator ``apply`` over entries inside of ``mask``."""
    x = x * mask
    residual = (wanted - apply(x)) * mask
    direction, power = residual, float(residual.abs().square().sum())
    for _ in range(steps):
        if power <= 0:
            break
        image = apply(direction) * mask
        curvature = float((direction.conj() * image).sum().real)
        if curvature <= 0:
            break
        step = power / curvature
        x, residual = x + step * direction, residual - step * image
        before, power = power, float(residual.abs().square().sum())
        direction = residual + power / before * direction
    return x

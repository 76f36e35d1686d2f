"""Stages of a given matrix found: kaleidoscopes and switches, relaxed permutations before a butterfly, Fastfood.

Each is in closed form, level by level, or, for relaxed permutations, has three unknowns a level. For a matrix that is
no member the factors that come out do not give it back, which is for the caller to see. Derived for this library, but
for the kaleidoscope, which is the factorization of a product of Monarch matrices again and again.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from structmat.projection.kaleidoscope import kaleidoscope_patterns
from structmat.projection.simultaneous import factor_grid

_STEPS = 30
"""Of Levenberg and Marquardt, for three probabilities."""

_FARTHEST, _PLACES, _FEWEST = 4.0, 8192, 80
"""Logits between minus and plus the first are looked at, at so many places divided by the size, and at least the last;
an even number leaves out zero, where a relaxed step may have no inverse."""

_ZOOMS, _FINER = 5, 17
"""Times that places near the lowest are looked at, and how many."""

_LARGEST_POLISHED = 64
_POLISHED = 4
"""Steps of Gauss and Newton in all tensors at the end, and the size of matrix up to which they are taken."""

_LOOKED_AT = 6
"""Random combinations of the columns that tell whether rows are parallel."""

_TRIED = 8
_WORST = 1e4
_DIFFERENCE = 1e-6

_CERTAIN = 40.0
"""The logit of what is certain."""

_MET = 1e-6
"""Relative errors below this are those of a level found."""

_NO_GRID = 1e-3
"""Relative errors of a grid above this are no rounding."""

_BALANCED = 500
"""Steps that scale rows and columns to equal sums of squares."""


def kaleidoscope_factors(matrix: Tensor) -> dict[str, Tensor] | None:
    """The factors of ``Kaleidoscope()`` for a generic member (n, n), n a power of two from 4 on.

    Pairs of places at a distance of n / 2 make a grid of 2 x 2 blocks ``L[i] diag(K'[i, j], K''[i, j]) R[j]``; K' and
    K'' are kaleidoscopes of half the size. None where a matrix has no such grid, or one with singular blocks or
    complex factors.
    """
    size = matrix.shape[0]
    first: list[Tensor] = []
    last: list[Tensor] = []
    blocks = matrix[None]
    while blocks.shape[-1] > 2:
        half = blocks.shape[-1] // 2
        lefts, rights, inner = [], [], []
        for block in blocks:
            grid = block.reshape(2, half, 2, half).permute(1, 3, 0, 2)
            found = factor_grid(grid)
            if found is None or found.left.dtype != matrix.dtype:
                return None
            if not float(torch.linalg.norm(found.blocks - grid)) <= _NO_GRID * float(torch.linalg.norm(grid)):
                return None
            lefts.append(found.left.permute(1, 2, 0))
            rights.append(found.right.permute(1, 2, 0))
            inner.append(found.middle.permute(2, 0, 1))
        first.append(torch.stack(rights))
        last.append(torch.stack(lefts))
        blocks = torch.cat(inner)
    stages = [*first, blocks[..., None], *last[::-1]]
    # A factor scaled against another is the same matrix: all of one size.
    sizes = [float(stage.abs().square().mean().sqrt()) for stage in stages]
    if not all(math.isfinite(s) and s > 0 for s in sizes):
        return None
    mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
    patterns = kaleidoscope_patterns(size, 1)
    return {
        f"factor{i}": (stage * (mean / own)).reshape(pattern)
        for i, (stage, own, pattern) in enumerate(zip(stages, sizes, patterns, strict=True))
    }


def switch_logits(matrix: Tensor) -> dict[str, Tensor]:
    """The logits of ``SoftPermutation()`` for a generic member (n, n), real, n a power of two.

    A switch keeps the sum of a pair and shrinks its difference. In sums and differences of the pairs at a distance of
    n / 2 a member is ``[[S, T R], [L T, L S R]]`` with diagonals L and R of what is left of differences, and S + T and
    S - T are members of half the size.
    """
    size = matrix.shape[0]
    first: list[Tensor] = []
    last: list[Tensor] = []
    blocks = matrix[None]
    while blocks.shape[-1] > 2:
        half = blocks.shape[-1] // 2
        rows = torch.stack([blocks[:, :half] + blocks[:, half:], blocks[:, :half] - blocks[:, half:]], 1) / 2
        quarters = torch.stack([rows[..., :half] + rows[..., half:], rows[..., :half] - rows[..., half:]], 2)
        s, tr, lt, lsr = quarters[:, 0, 0], quarters[:, 0, 1], quarters[:, 1, 0], quarters[:, 1, 1]
        # l^2 = (l s r) (l t) / (s t r); which of the two roots is free for one row of a block.
        squares = _quotient(lsr * lt, s * tr, 2)
        main = squares.argmax(1, keepdim=True)
        l = squares.take_along_dim(main, 1).clamp(min=0).sqrt()
        own = main[..., None].expand(-1, 1, half)
        r = _quotient(lsr.take_along_dim(own, 1), l[..., None] * s.take_along_dim(own, 1), 1)
        l = _quotient(lsr, s * r[:, None], 2)
        r = _quotient(lsr, l[..., None] * s, 1)
        weights = (l.square()[..., None] + r.square()[:, None]).clamp(min=1e-300)
        t = (l[..., None] * lt + tr * r[:, None]) / weights
        first.append((1 - r) / 2)
        last.append((1 - l) / 2)
        blocks = torch.stack([s + t, s - t], 1).flatten(0, 1)
    crossed = [*first, ((blocks[:, 0, 1] + blocks[:, 1, 0]) / 2)[:, None], *last[::-1]]
    patterns = kaleidoscope_patterns(size, 1)
    return {
        f"logits{i}": torch.logit(own.reshape(pattern[0], pattern[3]), eps=1e-16)
        for i, (own, pattern) in enumerate(zip(crossed, patterns, strict=True))
    }


def _quotient(above: Tensor, below: Tensor, axis: int) -> Tensor:
    """The number x for which ``x below`` is nearest to ``above``, along an axis."""
    return (above * below).sum(axis) / below.square().sum(axis).clamp(min=1e-300)


# ---------------------------------------------------------------------------------------------------------- relaxed


def relaxed_factors(matrix: Tensor) -> dict[str, Tensor] | None:
    """The tensors of ``RelaxedButterfly()`` for a generic member (n, n), real, n a power of two from 4 on.

    Without the first step of its first level, evens before odds, rows i and i + n / 2 of a member are parallel in both
    halves of the columns. What is left are members of half the size behind a reversal each, which their own halves tell
    together with their first step: three unknowns in many equations. A probability of a reversal and its complement
    serve one level alike; the next one tells which it is. Those of the last level are free, and come out as none.
    """
    size = matrix.shape[0]
    found = _levels(matrix[None], size)
    if found is None:
        return None
    levels, stages = found
    free = levels[0].new_full((2,), -_CERTAIN)
    reversals = [*(level[:2] for level in levels[1:]), free]
    logits = [torch.cat([level[2:], own]) for level, own in zip(levels, reversals, strict=True)]
    tensors = {"logits0": torch.stack(logits)}
    sizes = [float(stage.square().mean().sqrt()) for stage in stages]
    mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
    for number, (stage, own_size) in enumerate(zip(reversed(stages), reversed(sizes), strict=True)):
        span = 1 << number
        tensors[f"factor0_{number}"] = (stage * (mean / own_size)).reshape(size // (2 * span), 2, 2, span)
    return _polished(matrix, tensors) if size <= _LARGEST_POLISHED else tensors


def _polished(matrix: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a relaxed permutation and a butterfly after steps of Gauss and Newton, as long as these help."""
    shapes = [t.shape for t in tensors.values()]
    place = torch.cat([t.flatten() for t in tensors.values()])

    def parts(place: Tensor) -> list[Tensor]:
        flat = place.split([shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]

    member, slope = _relaxed_member(*parts(place))
    for _ in range(_POLISHED):
        step = torch.linalg.lstsq(slope, (matrix - member).reshape(-1, 1), driver="gelsd").solution[:, 0]
        trial, slope = _relaxed_member(*parts(place + step))
        if not float(torch.linalg.norm(trial - matrix)) < float(torch.linalg.norm(member - matrix)) / 2:
            break
        place, member = place + step, trial
    return dict(zip(tensors, parts(place), strict=True))


def _relaxed_member(logits: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (n, n) of logits (levels, 3) and of the factors of a butterfly in order of application, and its
    derivatives (n n, numbers) by all of them."""
    size = factors[0].numel() // 2
    eye = torch.eye(size, dtype=logits.dtype)
    stages, changes = [], []
    for level, own in enumerate(torch.sigmoid(logits)):
        block = size >> level
        halves = torch.arange(block).reshape(2, -1)
        inner = [torch.cat([halves.flatten()[0::2], halves.flatten()[1::2]])]
        inner += [torch.cat([halves[0].flip(0), halves[1]]), torch.cat([halves[0], halves[1].flip(0)])]
        for p, order in zip(own, inner, strict=True):
            moved = eye[(torch.arange(0, size, block)[:, None] + order).flatten()]
            stages.append(p * moved + (1 - p) * eye)
            changes.append(p * (1 - p) * (moved - eye))
    for factor in factors:
        a, b, c, d = factor.shape
        stages.append(torch.einsum("abcd,acdk->abdk", factor, eye.reshape(a, c, d, size)).reshape(size, size))
    before = [eye]  # products of the stages before each, and after all
    for stage in stages:
        before.append(stage @ before[-1])
    after, slopes = eye, []
    for number in reversed(range(len(stages))):
        if number < len(changes):
            slopes.append((after @ changes[number] @ before[number])[None])
        else:
            a, b, c, d = factors[number - len(changes)].shape
            left, right = after.reshape(size, a, b, d), before[number].reshape(a, c, d, size)
            slopes.append(torch.einsum("iabd,acdj->abcdij", left, right).reshape(-1, size, size))
        after = after @ stages[number]
    return before[-1], torch.cat(slopes[::-1]).flatten(1).mT


def _levels(blocks: Tensor, whole: int) -> tuple[list[Tensor], list[Tensor]] | None:
    """Logits and stages of the levels from these blocks on, the largest first.

    The logits (3,) of a level are those of the reversals before it, of the blocks in first and in second halves, and of
    its own first step; in blocks of the ``whole`` size the reversals are none.
    """
    size = blocks.shape[-1]
    if size == 2:
        return [], [blocks[..., None]]
    for logits in _three(blocks, whole):
        turned = _undone(blocks, logits)
        half = size // 2
        # (blocks, places, halves of the columns, two rows, columns)
        pairs = turned.reshape(-1, 2, half, 2, half).permute(0, 2, 3, 1, 4)
        u, s, vh = torch.linalg.svd(pairs, full_matrices=False)
        stage = (u[..., 0] * s[..., :1].sqrt()).permute(0, 3, 2, 1)
        inner = (vh[..., 0, :] * s[..., :1].sqrt()).permute(0, 2, 1, 3).flatten(0, 1)
        rest = _levels(inner, whole)
        if rest is not None:
            return [logits, *rest[0]], [stage, *rest[1]]
    return None


def _three(blocks: Tensor, whole: int) -> list[Tensor]:
    """Logits (3,) of a level that leave pairs of rows parallel: none, or those that serve alike."""
    is_first = blocks.shape[-1] == whole
    free = torch.tensor([not is_first, not is_first, True])
    closed = _closed(blocks) if blocks.shape[-1] == 4 and not is_first else blocks.new_zeros(0, 3)
    for start in chain(closed, _starts(blocks, is_first)):
        place, error = _descended(blocks, start, free)
        logits = _logits(place)
        # Where a step has no inverse all rows are parallel: that says nothing.
        if error < _MET and float(torch.linalg.cond(_parted(blocks.shape[-1], logits))) < _WORST:
            return [logits] if is_first else [logits, logits * logits.new_tensor([-1.0, 1.0, 1.0])]
    return []


def _closed(blocks: Tensor) -> Tensor:
    """The three logits of blocks of four, (1, 3), in closed form, or none (0, 3).

    What undoes a reversal keeps the even part ``(a, b, b, a)`` of a row and multiplies the odd part
    ``(c, d, -d, -c)`` by e, as in :func:`_starts`; what undoes the first step multiplies d by ``f = 1 / (1 - 2 p)``
    once more. Two rows are parallel in both halves where ``c b' - b c' + f (a d' - d a')`` and
    ``a b' - b a' + e^2 f (c d' - d c')`` vanish.
    """
    a, b = ((blocks + blocks.flip(-1)) / 2)[..., :2].unbind(-1)
    c, d = ((blocks - blocks.flip(-1)) / 2)[..., :2].unbind(-1)

    def minors(x: Tensor, y: Tensor) -> Tensor:
        return x[:, :2] * y[:, 2:] - y[:, :2] * x[:, 2:]

    f = -_quotient(minors(c, b).flatten(), minors(a, d).flatten(), 0)
    logits = [-2 * torch.atanh(1 / f)]
    for side in (1, 0):
        squares = -_quotient(minors(a, b)[side::2].flatten(), minors(c, d)[side::2].flatten(), 0) / f
        logits.insert(0, (2 * torch.atanh(squares.rsqrt())).log())
    place = torch.stack(logits)[None]
    return place[torch.isfinite(place).all(1)]


def _starts(blocks: Tensor, is_first: bool) -> Tensor:
    """Where to look for three logits, the most promising first: for many of the third the others are known.

    What undoes a reversal of probability p keeps what is even and multiplies what is odd by ``e = 1 / (1 - 2 p)``. Two
    rows are then parallel where ``c + e^2 d`` vanishes, for their minors c in the even and d in the odd part, and the
    minors of the even part of one with the odd part of the other.
    """
    places = max(_FEWEST, _PLACES // blocks.shape[-1])
    third = torch.linspace(-_FARTHEST, _FARTHEST, places + places % 2, dtype=blocks.dtype)
    error, found = _others(blocks, third, is_first)
    edge = error.new_tensor([math.inf])
    is_valley = (error <= torch.cat([edge, error[:-1]])) & (error <= torch.cat([error[1:], edge]))
    # The lowest of all, as near as can be; of the valleys, some of which are narrow; and of all at a coarse grain.
    best, spacing = third[error.argmin()], float(third[1] - third[0])
    nearest = found[:0]
    for _ in range(_ZOOMS):
        error_there, found_there = _others(blocks, best + spacing * torch.linspace(-1, 1, _FINER).to(third), is_first)
        nearest = found_there[error_there.argmin()][None]
        best, spacing = nearest[0, 2], spacing * 2 / (_FINER - 1)
    coarse = torch.arange(0, len(third), max(1, len(third) // _FEWEST))
    valleys = is_valley.nonzero()[:, 0]
    chosen = [own[error[own].argsort()[:_TRIED]] for own in (coarse, valleys)]
    return torch.cat([nearest, found[torch.cat(chosen)]])


def _others(blocks: Tensor, third: Tensor, is_first: bool) -> tuple[Tensor, Tensor]:
    """How far rows are from parallel where the third logits are these (places,), infinitely without an inverse, and all
    three logits there (places, 3), those of the reversals as logarithms."""
    size = blocks.shape[-1]
    half = size // 2
    generator = torch.Generator().manual_seed(0)
    looked_at = torch.randn(half, min(half, _LOOKED_AT), generator=generator, dtype=blocks.dtype)
    inverse = torch.linalg.inv_ex(torch.stack([_parted(size, torch.stack([logit] * 3)) for logit in third])).inverse
    parts = [blocks] if is_first else [(blocks + blocks.flip(-1)) / 2, (blocks - blocks.flip(-1)) / 2]
    pairs = [(part @ inverse[:, None]).reshape(len(third), -1, 2, half, 2, half) @ looked_at for part in parts]
    products = [_crossed(own, own) for own in pairs]
    sizes = torch.stack([own.square().sum((-2, -1), keepdim=True) for own in products]).sum(0).sqrt()
    minors = [(own - own.mT) / sizes.clamp(min=1e-300) for own in products]
    if is_first:
        none = third.new_full((len(third),), math.log(_CERTAIN))
        return minors[0].flatten(1).norm(dim=1).nan_to_num(math.inf), torch.stack([none, none, third], 1)
    error, columns = third.new_zeros(len(third)), []
    mixed = (_crossed(*pairs) + _crossed(*pairs[::-1])) / sizes.clamp(min=1e-300)
    mixed = mixed - mixed.mT
    for side in range(2):
        c, d = (own[:, side::2].flatten(1) for own in minors)
        square = (-(c * d).sum(1) / d.square().sum(1).clamp(min=1e-300)).clamp(min=1 + 1e-6)
        error = error + mixed[:, side::2].flatten(1).norm(dim=1) / c.norm(dim=1).clamp(min=1e-300)
        error = error + (c + square[:, None] * d).norm(dim=1) / c.norm(dim=1).clamp(min=1e-300)
        columns.append((2 * torch.atanh(square.rsqrt())).log())
    return error.nan_to_num(math.inf), torch.stack([*columns, third], 1)


def _crossed(upper: Tensor, lower: Tensor) -> Tensor:
    """Products of what upper rows of pairs are with what lower rows are, for pairs (..., two rows, places, halves,
    combinations) after two axes."""
    return upper[:, :, 0, :, :, :, None] * lower[:, :, 1, :, :, None, :]


def _logits(place: Tensor) -> Tensor:
    """Of a level, from the logarithms of those of the reversals and its own."""
    return torch.cat([-place[:2].exp(), place[2:]])


def _descended(blocks: Tensor, place: Tensor, free: Tensor) -> tuple[Tensor, float]:
    """Where the rest is least, near to a place, and the root of its mean square."""
    damping = 1e-2
    rest = _rest(blocks, _logits(place))
    error = float(torch.linalg.norm(rest))
    directions = _DIFFERENCE * torch.eye(3, dtype=place.dtype)[free]
    for _ in range(_STEPS):
        changes = [_rest(blocks, _logits(place + d)) - _rest(blocks, _logits(place - d)) for d in directions]
        slope = torch.stack(changes, 1) / (2 * _DIFFERENCE)
        normal = slope.mT @ slope
        step = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal() + 1e-12), slope.mT @ rest)
        trial = place.clone()
        trial[free] -= step.clamp(-2, 2)
        moved = _rest(blocks, _logits(trial))
        if float(torch.linalg.norm(moved)) < error:
            before, place, rest, error = error, trial, moved, float(torch.linalg.norm(moved))
            damping /= 10
            if error > 0.999 * before:
                break
        else:
            damping *= 10
            if damping > 1e6:
                break
    return place, error / math.sqrt(rest.numel())


def _rest(blocks: Tensor, logits: Tensor) -> Tensor:
    """The part of the lower row of each pair that is not parallel to the upper one, both of length one."""
    half = blocks.shape[-1] // 2
    pairs = _undone(blocks, logits).reshape(-1, 2, half, 2, half)
    pairs = pairs / torch.linalg.norm(pairs, dim=-1, keepdim=True).clamp(min=1e-300)
    upper, lower = pairs[:, 0], pairs[:, 1]
    rest: Tensor = lower - (upper * lower).sum(-1, keepdim=True) * upper
    return rest.flatten()


def _parted(size: int, logits: Tensor) -> Tensor:
    """The first step of a level: evens before odds, with its probability."""
    eye, p = torch.eye(size, dtype=logits.dtype), torch.sigmoid(logits[2])
    return p * torch.cat([eye[::2], eye[1::2]]) + (1 - p) * eye


def _undone(blocks: Tensor, logits: Tensor) -> Tensor:
    """The blocks times the inverses of the reversals before the level and of its own first step."""
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    p, parted = torch.sigmoid(logits), _parted(blocks.shape[-1], logits)
    levels = torch.stack([parted @ (p[side] * eye.flip(0) + (1 - p[side]) * eye) for side in range(2)])
    sides = torch.arange(len(blocks)) % 2
    found: Tensor = torch.linalg.solve_ex(levels[sides], blocks, left=False).result
    return found


# --------------------------------------------------------------------------------------------------------- Fastfood


def fastfood_tensors(matrix: Tensor) -> dict[str, Tensor] | None:
    """The tensors of ``Fastfood()`` for a generic member (n, n), real, n a power of two from 2 on.

    All rows and columns of ``H G P H`` have one sum of squares: the outer diagonals, up to signs, are those that scale
    the squared entries to equal sums, which are unique. ``S H G^2 H S`` is a function of ``i xor k`` but for the signs
    of S, which follow along single bits. Rows of the Hadamard transform of what is left are rows of H, but for factors
    and the signs of B.
    """
    size = matrix.shape[0]
    if not bool((matrix != 0).all()):
        return None
    squares = matrix.square()
    y = matrix.new_ones(size)
    x = y
    for _ in range(_BALANCED):
        x = 1 / (squares @ y)
        renewed = 1 / (squares.mT @ x)
        change = float((renewed / y - 1).abs().max())
        y = renewed
        if change < 1e-15:
            break
    plain = x.sqrt()[:, None] * matrix * y.sqrt()
    hadamard = matrix.new_ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    gram = plain @ plain.mT
    signs = matrix.new_ones(size)
    for i in range(1, size):
        signs[i] = signs[i & (i - 1)] * torch.sgn(gram[i, i & (i - 1)])
    rows = hadamard @ (signs[:, None] * plain) / size
    first = rows[int(torch.linalg.norm(rows, dim=1).argmax())]
    if not bool((first != 0).all()):
        return None
    quotients = (rows / first) @ hadamard
    order = quotients.abs().argmax(1)
    if len(order.unique()) < size:
        return None
    bent = torch.sgn(first)
    gains = (rows * hadamard[order] * bent).mean(1)
    return {
        "signs": bent / y.sqrt(),
        "gains": gains,
        "scales": signs / x.sqrt(),
        "order": order,
    }

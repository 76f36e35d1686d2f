"""The usual permutations of fast transforms, and which of them make a matrix a butterfly.

Fast algorithms want their inputs, or give their outputs, in an order of their own: bit reversal (Cooley and Tukey),
evens before odds with a half reversed (cosine and sine transforms), Gray code (the sequency order of Walsh). Whether a
matrix is a chain after such orders is asked of small samples: each interface makes the matrix a grid of blocks of low
rank, and the rank of a few small pieces of them tells, without a pass over all entries.
Source: Dao et al., "Learning fast algorithms for linear transforms using butterfly factorizations" (ICML 2019) for the
permutations; Le, Zheng, Riccietti, Gribonval (ICASSP 2022) for trying them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program import Contraction, chainable
from structmat.projection.hierarchical import product_pattern
from structmat.sizes import Pattern, is_power_of_two

_SAMPLES = 24
"""Pieces of each interface that are looked at."""

_MEMBER = 0.05
"""Candidates that leave more than this share of the energy of the sampled pieces are not tried."""


_ROUNDING = 1e-20
"""Shares of energy below this are rounding: the orders are equally good."""

_MOST = 3
"""Candidates beside the plain order that are worth a fit."""


@dataclass(frozen=True, eq=False)
class Orders:
    """Permutations before and after a chain: ``W[rows][:, columns]`` is what is near to it.

    Args:
        rows, columns: integer tensors.
        row_name, column_name: what they are, in words.
        share: of the energy of the sampled pieces that is not of the chain's rank.
    """

    rows: Tensor
    columns: Tensor
    row_name: str
    column_name: str
    share: float

    @property
    def is_plain(self) -> bool:
        return self.row_name == self.column_name == _NATURAL


_NATURAL = "natural"


def usual_orders(size: int, radices: Sequence[int]) -> dict[str, Tensor]:
    """The usual permutations of ``size`` places, by name, without repetition; the identity comes first.

    Args:
        size: their product is that of ``radices``.
        radices: in order of application.
    """
    natural = torch.arange(size)
    found = {_NATURAL: natural}
    reversal = digit_reversal(size, tuple(radices))
    found["digit reversal" if any(r != 2 for r in radices) else "bit reversal"] = reversal
    found["inverse digit reversal"] = torch.argsort(reversal)
    half = (size + 1) // 2
    folded = torch.cat([natural[::2], natural[1::2].flip(0)])
    found["evens, then odds backwards"] = folded
    found["evens, then odds backwards, digits reversed"] = folded[reversal]
    found["evens, then odds"] = torch.cat([natural[::2], natural[1::2]])
    found["backwards"] = natural.flip(0)
    found["digit reversal, backwards"] = reversal.flip(0)
    found["halves exchanged"] = torch.cat([natural[half:], natural[:half]])
    if is_power_of_two(size):
        gray = natural ^ (natural >> 1)
        found["Gray code"] = gray
        found["inverse Gray code"] = torch.argsort(gray)
        found["sequency"] = sequency(size)
        found["inverse sequency"] = torch.argsort(found["sequency"])
        levels = size.bit_length() - 1
        if levels > 1:
            for number in range(8):
                order = natural
                for level in range(levels - 1):
                    order = order[_shared_step(size, size >> level, number)]
                found[f"recursive {number:03b}"] = order
    unique: dict[str, Tensor] = {}
    for name, order in found.items():
        if not any(torch.equal(order, other) for other in unique.values()):
            unique[name] = order
    return unique


def sequency(size: int) -> Tensor:
    """The rows of the Hadamard matrix, a power of two, by their number of changes of sign."""
    natural = torch.arange(size)
    return digit_reversal(size, (2,) * (size.bit_length() - 1))[natural ^ (natural >> 1)]


def _shared_step(size: int, block: int, generators: int) -> Tensor:
    """One level of the permutations that are shared between levels: split evens and odds (4), reverse the first half
    (2), reverse the second half (1)."""
    inner = torch.arange(block)
    if generators & 4:
        inner = torch.cat([inner[::2], inner[1::2]])
    first, second = inner.split([block // 2, block // 2])
    first = first.flip(0) if generators & 2 else first
    second = second.flip(0) if generators & 1 else second
    return (torch.arange(0, size, block)[:, None] + torch.cat([first, second])).flatten()


def digit_reversal(size: int, radices: tuple[int, ...]) -> Tensor:
    """The order of the inputs of a Fourier transform by stages of these radices, in order of application."""

    def reorder(index: Tensor, radices: tuple[int, ...]) -> Tensor:
        if len(radices) <= 1:
            return index
        last = radices[-1]
        return torch.cat([reorder(index[c::last], radices[:-1]) for c in range(last)])

    return reorder(torch.arange(size), radices)


def find_orders(weight: Tensor, patterns: Sequence[Pattern], *, seed: int = 0) -> list[Orders]:
    """The orders of rows and columns under which a matrix may be a chain, most promising first.

    Args:
        weight: (out, in), the shape of the chain.
        patterns: in order of application.
        seed: of the samples.

    Returns:
        A few, the plain order always among them. Cost: a few thousand entries of the matrix for each of some
        hundred pairs of orders.
    """
    rows = usual_orders(weight.shape[0], [b for _, b, _, _ in patterns])
    columns = usual_orders(weight.shape[1], [c for _, _, c, _ in patterns])
    pieces = _pieces(patterns, torch.Generator().manual_seed(seed))
    found = []
    for row_name, row in rows.items():
        for column_name, column in columns.items():
            share = _share(weight, row, column, pieces)
            found.append(Orders(row, column, row_name, column_name, share))
    plain = found[0]
    # Ties go to the first: natural orders come before others. What is a member is one to many digits.
    near = sorted((o for o in found if o.share <= _MEMBER), key=lambda o: max(o.share, _ROUNDING))[:_MOST]
    return near if any(o.is_plain for o in near) else [*near, plain]


@dataclass(frozen=True)
class _Pieces:
    """Row and column places (samples, k) of small pieces of the blocks of one interface, and their rank."""

    rows: Tensor
    columns: Tensor
    rank: int


def _pieces(patterns: Sequence[Pattern], generator: torch.Generator) -> list[_Pieces]:
    whole = product_pattern(patterns)
    if whole[0] * whole[3] != 1:
        return []
    order, found = list(patterns)[::-1], []
    for s in range(1, len(order)):
        left, right = product_pattern(order[:s][::-1]), product_pattern(order[s:][::-1])
        rank = chainable(Contraction("", *right), Contraction("", *left))
        assert rank is not None, f"{left} and {right} are not chainable"
        outer, inner = right[0] // left[0], left[3] // right[3]
        height, width = left[1], right[2]
        size = min(height, width, 2 * rank + 2)
        if size <= rank:
            continue

        def draw(count: int, size: int = size) -> Tensor:
            return torch.rand(_SAMPLES, count, generator=generator).argsort(1)[:, :size]

        group = torch.randint(inner, (_SAMPLES, 1), generator=generator)
        column = torch.randint(outer, (_SAMPLES, 1), generator=generator)
        found.append(_Pieces(draw(height) * inner + group, column * width + draw(width), rank))
    return found


def _share(weight: Tensor, rows: Tensor, columns: Tensor, pieces: Sequence[_Pieces]) -> float:
    """The largest share of energy, over the interfaces, that the sampled pieces have beyond their rank."""
    worst = 0.0
    for piece in pieces:
        sample = weight[rows[piece.rows][:, :, None], columns[piece.columns][:, None, :]]
        values = torch.linalg.svdvals(sample).square()
        total = float(values.sum())
        if total > 0:
            worst = max(worst, float(values[:, piece.rank :].sum()) / total)
        if worst > _MEMBER:
            return worst
    return worst

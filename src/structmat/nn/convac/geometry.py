"""Pooling geometries: the levels of windows of the usual trees, in tree order.

Each function returns ``(leaves, levels)`` for :class:`structmat.nn.convac.tree.ModeTree`. Nodes are renumbered in the
order in which the tree is walked, so that windows read neighbors: a network then permutes its inputs once and never
again. Which partitions of the inputs a network can model well is decided here (Cohen and Shashua, ICLR 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from structmat.errors import ShapeError

NOTHING = -1
"""A position of a window that is empty: it contributes the factor one."""

Levels = list[list[tuple[int, ...]]]
Built = tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], ...], ...]]


def sequence(modes: int, window: int) -> Built:
    """Neighbors, ``window`` at a time."""
    _at_least("modes", modes, 1)
    _at_least("window", window, 2)
    return _grids((modes, 1), lambda height, width: (math.ceil(height / window), 1), _block(window, 1))


def square(height: int, width: int) -> Built:
    """2 x 2 blocks."""
    _image(height, width)
    return _grids((height, width), lambda h, w: (math.ceil(h / 2), math.ceil(w / 2)), _block(2, 2))


def mirror(height: int, width: int) -> Built:
    """Rows i and h - 1 - i, columns j and w - 1 - j."""
    _image(height, width)

    def window(i: int, j: int, h: int, w: int) -> list[tuple[int, int]]:
        rows, columns = (i, h - 1 - i), (j, w - 1 - j)
        # The middle row of an odd height is its own reflection: it is there once.
        row_places = [(r, k == 0 or r != i) for k, r in enumerate(rows)]
        column_places = [(c, k == 0 or c != j) for k, c in enumerate(columns)]
        return [(r, c) if real_r and real_c else (-1, -1) for r, real_r in row_places for c, real_c in column_places]

    return _grids((height, width), lambda h, w: (math.ceil(h / 2), math.ceil(w / 2)), window)


def alternating(height: int, width: int, rows_first: bool) -> Built:
    """Windows of two along one axis, then along the other."""
    _image(height, width)
    along_row = rows_first
    shape, axes = (height, width), list[bool]()
    while shape != (1, 1):
        along_row = (along_row and shape[1] > 1) or shape[0] == 1
        axes.append(along_row)
        shape = (shape[0], math.ceil(shape[1] / 2)) if along_row else (math.ceil(shape[0] / 2), shape[1])
        along_row = not along_row
    turns = iter(axes)
    now = [False]

    def smaller(h: int, w: int) -> tuple[int, int]:
        now[0] = next(turns)
        return (h, math.ceil(w / 2)) if now[0] else (math.ceil(h / 2), w)

    def window(i: int, j: int, h: int, w: int) -> list[tuple[int, int]]:
        return _block(1, 2)(i, j, h, w) if now[0] else _block(2, 1)(i, j, h, w)

    return _grids((height, width), smaller, window)


def chain(modes: int) -> Built:
    """One mode joins at each level."""
    _at_least("modes", modes, 2)
    levels: Levels = [[(0, 1)]]
    for mode in range(2, modes):
        levels.append([(modes + mode - 2, mode)])
    return _frozen(list(range(modes)), levels)


def dilated(order: Sequence[int]) -> Built:
    """Level l joins the modes that differ in bit ``order[l]``."""
    depth = len(order)
    if sorted(order) != list(range(depth)) or depth == 0:
        raise ShapeError(f"The order of dilations must be a permutation of 0..{depth - 1}; got {tuple(order)}.")
    current, start, levels = list(range(2**depth)), 2**depth, Levels()
    labels = {mode: mode for mode in current}  # bits that are not yet joined
    for bit in order:
        windows, after = list[tuple[int, ...]](), dict[int, int]()
        by_label = {labels[node]: node for node in current}
        for label in sorted(by_label):
            if not label >> bit & 1:
                after[start + len(windows)] = label
                windows.append((by_label[label], by_label[label | 1 << bit]))
        levels.append(windows)
        current, labels, start = list(after), after, start + len(windows)
    return _ordered(list(range(2**depth)), levels)


def overlapping(shape: int | Sequence[int], kernels: Sequence[int], strides: Sequence[int] | None) -> Built:
    """Windows of ``kernel`` (squared for images) at steps of ``stride``, then one window of all that is left."""
    height, width = (shape, 1) if isinstance(shape, int) else tuple(shape)
    _image(height, width)
    strides = [1] * len(kernels) if strides is None else strides
    if len(strides) != len(kernels) or not kernels or min(*kernels, *strides) < 1:
        raise ShapeError(
            f"Overlapping windows need one kernel and one stride of at least 1 for each layer; got kernels "
            f"{tuple(kernels)} and strides {tuple(strides)}."
        )
    if any(stride > kernel for kernel, stride in zip(kernels, strides, strict=True)):
        raise ShapeError(
            f"Strides {tuple(strides)} beyond the kernels {tuple(kernels)} leave inputs out. Use stride <= kernel."
        )
    image = not isinstance(shape, int)
    current, start, levels = list(range(height * width)), height * width, Levels()
    for kernel, stride in zip(kernels, strides, strict=True):
        after_h, after_w = math.ceil(height / stride), math.ceil(width / stride) if image else 1
        windows = []
        for i in range(after_h):
            for j in range(after_w):
                places = [
                    (i * stride + a, j * stride + b)
                    for a in range(kernel)
                    for b in (range(kernel) if image else range(1))
                ]
                windows.append(
                    tuple(current[r * width + c] if r < height and c < width else NOTHING for r, c in places)
                )
        levels.append(windows)
        current, start = list(range(start, start + len(windows))), start + len(windows)
        height, width = after_h, after_w
    if len(current) > 1:
        levels.append([tuple(current)])
    modes = math.prod((shape,) if isinstance(shape, int) else shape)
    return _frozen(list(range(modes)), levels)


def nested(tree: Any) -> Built:
    """Nested sequences of modes."""
    leaves = list[int]()
    found: list[list[tuple[tuple[int, int], ...]]] = []  # windows of each level, children as (level, number)

    def walk(part: Any) -> tuple[int, int]:
        if isinstance(part, bool) or not isinstance(part, int | Sequence) or isinstance(part, str):
            raise ShapeError(f"A nested tree holds integers and sequences of them; got {part!r}.")
        if isinstance(part, int):
            leaves.append(part)
            return (-1, len(leaves) - 1)
        if not part:
            raise ShapeError("A nested tree has an empty sequence. Every node needs at least one child.")
        children = tuple(walk(child) for child in part)
        level = 1 + max(child[0] for child in children)
        while len(found) <= level:
            found.append([])
        found[level].append(children)
        return (level, len(found[level]) - 1)

    if walk(tree)[0] < 0:
        raise ShapeError("A nested tree is a sequence; a single mode is written (0,).")
    if sorted(leaves) != list(range(len(leaves))):
        raise ShapeError(
            f"The modes of a nested tree must be 0..{len(leaves) - 1}, each once; got {tuple(leaves)[:12]}."
        )
    starts = [len(leaves)]
    for windows in found:
        starts.append(starts[-1] + len(windows))

    levels = [
        [tuple(n if level < 0 else starts[level] + n for level, n in window) for window in windows] for windows in found
    ]
    return _frozen(leaves, levels)


Window = Callable[[int, int, int, int], list[tuple[int, int]]]


def _block(tall: int, wide: int) -> Window:
    def window(i: int, j: int, h: int, w: int) -> list[tuple[int, int]]:
        places = [(tall * i + a, wide * j + b) for a in range(tall) for b in range(wide)]
        return [(r, c) if r < h and c < w else (-1, -1) for r, c in places]

    return window


def _grids(shape: tuple[int, int], smaller: Callable[[int, int], tuple[int, int]], window: Window) -> Built:
    """Grid after grid until one node is left."""
    height, width = shape
    current, start, levels = list(range(height * width)), height * width, Levels()
    while len(current) > 1 or not levels:
        after_h, after_w = smaller(height, width) if len(current) > 1 else (1, 1)
        windows = []
        for i in range(after_h):
            for j in range(after_w):
                places = window(i, j, height, width) if len(current) > 1 else [(0, 0)]
                windows.append(tuple(NOTHING if r < 0 else current[r * width + c] for r, c in places))
        levels.append(windows)
        current, start = list(range(start, start + len(windows))), start + len(windows)
        height, width = after_h, after_w
    return _ordered(list(range(shape[0] * shape[1])), levels)


def _ordered(leaves: list[int], levels: Levels) -> Built:
    """The same tree with the nodes of each level numbered as a walk from the root meets them."""
    modes = len(leaves)
    starts = [modes]
    for windows in levels:
        starts.append(starts[-1] + len(windows))
    order: list[list[int]] = [[] for _ in range(len(levels) + 1)]
    pending = [(len(levels), 0)]
    while pending:
        level, number = pending.pop()
        order[level].append(number)
        if level == 0:
            continue
        for child in reversed(levels[level - 1][number]):
            if child != NOTHING:
                below = sum(start <= child for start in starts)
                pending.append((below, child - (starts[below - 1] if below else 0)))
    renamed = {NOTHING: NOTHING}
    for level, numbers in enumerate(order):
        offset = starts[level - 1] if level else 0
        renamed |= {offset + old: offset + new for new, old in enumerate(numbers)}
    sorted_levels = [
        [tuple(renamed[c] for c in windows[old]) for old in order[level + 1]] for level, windows in enumerate(levels)
    ]
    return _frozen([leaves[old] for old in order[0]], sorted_levels)


def _frozen(leaves: list[int], levels: Levels) -> Built:
    """Windows of one length in each level."""
    filled = []
    for windows in levels:
        longest = max(map(len, windows))
        equal = [w + (NOTHING,) * (longest - len(w)) for w in windows]
        # A position that is empty in all windows is none: an image of one row has windows of two.
        kept = [p for p in range(longest) if any(w[p] != NOTHING for w in equal)]
        filled.append(tuple(tuple(w[p] for p in kept) for w in equal))
    return tuple(leaves), tuple(filled)


def _image(height: int, width: int) -> None:
    _at_least("height", height, 1)
    _at_least("width", width, 1)


def _at_least(name: str, value: int, least: int) -> None:
    if value != int(value) or value < least:
        raise ShapeError(f"{name} must be an integer of at least {least}; got {value!r}.")

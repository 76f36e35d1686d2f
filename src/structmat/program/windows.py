"""Windows merged into blocks: what a windowed stage becomes for deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.reference import window_matrices
from structmat.program.stages import Contraction, Crop, Pad, Sparse, Windowed

_LONGEST = 512
"""Neighbouring terms that one block may swallow."""

Box = tuple[int, int, int, int]
"""First row, height, first column and width of a block; it does not pass the ends."""


@dataclass(frozen=True)
class Grouping:
    """How the terms of a windowed stage are run.

    Args:
        blocks: dense blocks with the terms that each swallows.
        entries: terms of a single row or column: their product is their content.
        windows: the rest.
        multiplications: in all.
    """

    blocks: tuple[tuple[Box, tuple[int, ...]], ...]
    entries: tuple[int, ...]
    windows: tuple[int, ...]
    multiplications: float


def group_windows(
    windows: Sequence[Sequence[int]], height: int, width: int, worth: float = 1.0, price: float = 0.0
) -> Grouping:
    """The cheapest grouping of neighbours, by dynamic programming in the order of rows and in that of columns.

    A term costs the sum of its widths, or their product if one is 1; a block its area, divided by ``worth``: by how
    much a multiply-add in a block is faster than in a window, and ``price``.

    Args:
        windows: (terms, 4): row location, row width, column location, column width.
        height, width: of the matrix.
        worth: 1 counts operations, with a price of 0.
        price: what a block costs beside its multiply-adds, in those of windows.

    Cost: ``terms * min(terms, 512)`` steps.
    """
    alive = [k for k, (_, h, _, w) in enumerate(windows) if h > 0 and w > 0]
    orders = (
        sorted(alive, key=lambda k: (windows[k][0], windows[k][1], windows[k][2])),
        sorted(alive, key=lambda k: (windows[k][2], windows[k][3], windows[k][0])),
    )
    return min(
        (_grouped(windows, order, height, width, worth, price) for order in orders), key=lambda g: g.multiplications
    )


def _grouped(
    windows: Sequence[Sequence[int]], order: list[int], height: int, width: int, worth: float, price: float
) -> Grouping:
    best = [0.0]
    choice: list[tuple[int, Box | None]] = []
    for end, k in enumerate(order):
        row, h, column, w = windows[k]
        found, start_of, box_of = best[end] + _alone(h, w), end, None
        top, bottom, first, last = height, 0, width, 0
        saved = 0.0  # what the terms of the run would cost by themselves: no block of more can pay
        for start in range(end, max(-1, end - _LONGEST), -1):
            row, h, column, w = windows[order[start]]
            if row + h > height or column + w > width:
                break  # it passes an end
            top, bottom = min(top, row), max(bottom, row + h)
            first, last = min(first, column), max(last, column + w)
            saved += h + w
            area = (bottom - top) * (last - first) / worth + price
            if area > 4 * saved + 4 * (height + width):
                break
            cheaper = best[start] + area
            if cheaper < found or (cheaper == found and start < end):  # of equals a block, which runs faster
                found, start_of, box_of = cheaper, start, (top, bottom - top, first, last - first)
        best.append(found)
        choice.append((start_of, box_of))
    blocks, entries, rest = [], [], []
    at = len(order)
    while at > 0:
        start, box = choice[at - 1]
        members = order[start:at]
        if box is not None and (len(members) > 1 or min(box[1], box[3]) > 1):
            blocks.append((box, tuple(sorted(members))))
        elif min(windows[members[0]][1], windows[members[0]][3]) == 1:
            entries.append(members[0])
        else:
            rest.append(members[0])
        at = start
    return Grouping(tuple(sorted(blocks)), tuple(sorted(entries)), tuple(sorted(rest)), best[-1])


def _alone(h: int, w: int) -> float:
    return float(h * w if min(h, w) == 1 else h + w)


def merge_windows(
    stage: Windowed, tensors: Mapping[str, Tensor], prefix: str, worth: float = 1.0, price: float = 0.0
) -> tuple[Program, dict[str, Tensor]]:
    """An equal program with neighbouring windows merged into dense blocks where that is cheaper.

    Blocks run as contractions between a crop and a pad, terms of a single row or column together as a sparse stage
    (so that each costs its content alone), the others as a windowed stage. It multiplies contents, so it is for
    deployment.

    Args:
        stage: the windowed stage.
        tensors: by name.
        prefix: of the names of new tensors.
        worth, price: see :func:`group_windows`.

    Returns:
        The program and its new tensors.
    """
    windows = tensors[stage.windows].tolist()
    grouping = group_windows(windows, stage.height, stage.width, worth, price)
    left, right = (t.detach() for t in window_matrices(stage, tensors))  # (height, terms), (terms, width)
    made: dict[str, Tensor] = {}
    parts: list[Program] = []
    for number, ((top, height, first, width), members) in enumerate(grouping.blocks):
        which = torch.tensor(members)
        weight = left[top : top + height, which] @ right[which, first : first + width]
        name = f"{prefix}block{number}"
        made[name] = weight.reshape(1, height, width, 1).contiguous()
        parts.append(
            Chain(
                (
                    Crop(stage.width, width, first),
                    Contraction(name, 1, height, width, 1),
                    Pad(height, stage.height, top),
                )
            )
        )
    if grouping.entries:
        which = torch.tensor(grouping.entries)
        matrix = left[:, which] @ right[which]
        held = ((left[:, which] != 0).double() @ (right[which] != 0).double()) > 0
        places = torch.nonzero(held.reshape(-1))[:, 0]
        made[f"{prefix}values"], made[f"{prefix}places"] = matrix.reshape(-1)[places].clone(), places
        if len(places):
            parts.append(Sparse(f"{prefix}values", f"{prefix}places", stage.height, stage.width, len(places)))
    if grouping.windows or not parts:
        kept = torch.tensor(grouping.windows, dtype=torch.int64)
        table = tensors[stage.windows][kept]
        contents = []
        for name, at in ((stage.left, 1), (stage.right, 3)):
            sizes = tensors[stage.windows][:, at].tolist()
            pieces = list(tensors[name].detach().reshape(-1).split(sizes))
            contents.append(torch.cat([tensors[name].new_zeros(0), *(pieces[k] for k in grouping.windows)]))
        made[f"{prefix}left"], made[f"{prefix}right"], made[f"{prefix}windows"] = *contents, table
        parts.append(
            Windowed(
                f"{prefix}left",
                f"{prefix}right",
                f"{prefix}windows",
                stage.height,
                stage.width,
                len(kept),
                len(contents[0]),
                len(contents[1]),
            )
        )
    program: Program = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    if stage.transposed:
        from structmat.program.transpose import transpose

        program = transpose(program)
    return program, made

"""Pictures of learned windows: film strips of a layer as SVG text; plots of budgets and of quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.learn.windows import Snapshot
from structmat.projection.masks import boxcar

_CELLS = 24
"""Squares along each side of a frame."""

_MARKERS = "osD^vPX*"
"""With the colours of matplotlib these tell 80 curves apart."""


def coverage(windows: Tensor, shape: tuple[int, int], cells: int = _CELLS) -> Tensor:
    """How many terms cover each square of a grid on the matrix, on average over its entries, (cells, cells) at most.

    Args:
        windows: (terms, 4) of a matrix of ``shape``.
        shape: (out, in).
        cells: along each side; fewer where the matrix is smaller.
    """
    sides = []
    for at, size in ((0, shape[0]), (2, shape[1])):
        mask = boxcar(windows[:, at + 1].long(), windows[:, at].long(), size).double()
        edges = torch.arange(min(cells, size) + 1) * size // min(cells, size)
        sums = torch.cat([mask.new_zeros(len(mask), 1), mask.cumsum(1)], 1)[:, edges]
        sides.append((sums[:, 1:] - sums[:, :-1]) / (edges[1:] - edges[:-1]))
    return sides[0].T @ sides[1]


def film_strip(
    history: Sequence[Snapshot], layer: str, shape: tuple[int, int], *, side: int = 132, cells: int = _CELLS
) -> str:
    """The windows of a layer over training, one frame a snapshot: darker where more terms cover the matrix.

    Args:
        history: of a :class:`structmat.learn.WindowLearner`.
        layer: its name.
        shape: (out, in) of the layer.
        side: of a frame, in pixels.
        cells: squares along each side of a frame.

    Raises:
        StructureError: there are no snapshots of such a layer.
    """
    frames = [s for s in history if layer in s.windows]
    if not frames:
        known = sorted({name for s in history for name in s.windows})
        raise StructureError(f"No snapshots of {layer!r} are kept. There are some of {', '.join(known) or 'no layer'}.")
    grids = [coverage(s.windows[layer], shape, cells) for s in frames]
    most = max(float(g.max()) for g in grids) or 1.0
    parts = []
    for number, (snapshot, grid) in enumerate(zip(frames, grids, strict=True)):
        left = number * (side + 12) + 6
        height, width = side / grid.shape[0], side / grid.shape[1]
        for i, row in enumerate(grid.tolist()):
            for j, value in enumerate(row):
                if value > 0:
                    parts.append(
                        f'<rect x="{left + j * width:.2f}" y="{22 + i * height:.2f}" width="{width:.2f}" '
                        f'height="{height:.2f}" fill="#1b3a6b" fill-opacity="{(value / most) ** 0.5:.3f}"/>'
                    )
        parts.append(f'<rect x="{left}" y="22" width="{side}" height="{side}" fill="none" stroke="#888"/>')
        windows = snapshot.windows[layer]
        alive = (windows[:, 1] > 0) & (windows[:, 3] > 0)
        numbers = int(windows[alive][:, [1, 3]].sum())
        share = numbers / (shape[0] * shape[1])
        parts.append(f'<text x="{left}" y="16">step {snapshot.step}</text>')
        parts.append(f'<text x="{left}" y="{side + 36}">{int(alive.sum())} terms, {share:.0%}</text>')
    return _svg(len(frames) * (side + 12), side + 44, parts)


def budget_per_layer(history: Sequence[Snapshot], shapes: Mapping[str, tuple[int, int]], axes: Any = None) -> Any:
    """Draw the share of its dense numbers that each layer holds, over the snapshots: one curve a layer.

    Needs matplotlib (``pip install structmat[plot]``).

    Args:
        history: of a learner.
        shapes: (out, in) of the layers by name.
        axes: of matplotlib; a new figure's by default.

    Returns:
        The axes.

    Raises:
        StructureError: no layer has a snapshot.
    """
    curves = {
        name: [(float(s.step), _numbers(s.windows[name]) / (shape[0] * shape[1])) for s in history if name in s.windows]
        for name, shape in shapes.items()
    }
    return _curves(curves, "step", "share of dense", axes)


def quality_against_cost(points: Mapping[str, Sequence[tuple[float, float]]], quality: str, axes: Any = None) -> Any:
    """Draw quality over cost, one curve a method, its points marked.

    Needs matplotlib (``pip install structmat[plot]``).

    Args:
        points: (cost as a share of dense, quality) by method.
        quality: what is measured: the label of the axis.
        axes: of matplotlib; a new figure's by default.

    Returns:
        The axes.

    Raises:
        StructureError: there is no point.
    """
    return _curves({name: sorted(p) for name, p in points.items()}, "share of dense multiply-adds", quality, axes)


def _numbers(windows: Tensor) -> int:
    alive = (windows[:, 1] > 0) & (windows[:, 3] > 0)
    return int(windows[alive][:, [1, 3]].sum())


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, axes: Any) -> Any:
    if not any(curves.values()):
        raise StructureError("There is nothing to draw: no curve has a point.")
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(8, 4), layout="constrained").subplots()
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve, strict=True), marker=_MARKERS[number // 10 % len(_MARKERS)], ms=4, label=name)
    axes.set(xlabel=across, ylabel=up)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return axes


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"

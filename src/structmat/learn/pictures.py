"""Pictures of learned windows as SVG text: film strips of a layer, budgets of layers, quality against cost."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.learn.windows import Snapshot
from structmat.projection.masks import boxcar

_CELLS = 24
"""Squares along each side of a frame."""

_COLORS = ("#1b6ca8", "#d1782c", "#3a8f4d", "#8a4fb0", "#c0262d", "#5b6670", "#b8860b", "#0f8b8d", "#7a5230")


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


def film_strip(history: Sequence[Snapshot], layer: str, shape: tuple[int, int], *, side: int = 132) -> str:
    """The windows of a layer over training, one frame a snapshot: darker where more terms cover the matrix.

    Args:
        history: of a :class:`structmat.learn.WindowLearner`.
        layer: its name.
        shape: (out, in) of the layer.
        side: of a frame, in pixels.

    Raises:
        StructureError: there are no snapshots of such a layer.
    """
    frames = [s for s in history if layer in s.windows]
    if not frames:
        known = sorted({name for s in history for name in s.windows})
        raise StructureError(f"No snapshots of {layer!r} are kept. There are some of {', '.join(known) or 'no layer'}.")
    grids = [coverage(s.windows[layer], shape) for s in frames]
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


def budget_per_layer(history: Sequence[Snapshot], shapes: Mapping[str, tuple[int, int]], *, width: int = 520) -> str:
    """The share of its dense numbers that each layer holds, over the snapshots: one curve a layer.

    Args:
        history: of a learner.
        shapes: (out, in) of the layers by name.
        width: of the plot, in pixels.
    """
    curves = {
        name: [(float(s.step), _numbers(s.windows[name]) / (shape[0] * shape[1])) for s in history if name in s.windows]
        for name, shape in shapes.items()
    }
    return _curves(curves, "step", "share of dense", width)


def quality_against_cost(points: Mapping[str, Sequence[tuple[float, float]]], quality: str, *, width: int = 520) -> str:
    """Quality over cost, one curve a method, its points marked.

    Args:
        points: (cost as a share of dense, quality) by method.
        quality: what is measured: the label of the axis.
        width: of the plot, in pixels.
    """
    return _curves({name: sorted(p) for name, p in points.items()}, "share of dense multiply-adds", quality, width)


def _numbers(windows: Tensor) -> int:
    alive = (windows[:, 1] > 0) & (windows[:, 3] > 0)
    return int(windows[alive][:, [1, 3]].sum())


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, width: int) -> str:
    points = [p for curve in curves.values() for p in curve]
    if not points:
        raise StructureError("There is nothing to draw: no curve has a point.")
    height, left, low, legend = round(0.62 * width), 56, 40, 210
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - 12),
            12 + (y1 - y) / (y1 - y0) * (height - low - 12),
        )

    parts = [
        f'<rect x="{left}" y="12" width="{width - left - 12}" height="{height - low - 12}" fill="none" stroke="#999"/>',
        f'<text x="{(left + width) / 2:.0f}" y="{height - 6}" text-anchor="middle">{html.escape(across)}</text>',
        f'<text x="14" y="{height / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {height / 2:.0f})">{html.escape(up)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        parts.append(f'<text x="{place(x, y0)[0]:.1f}" y="{height - low + 14}" text-anchor="middle">{x:.3g}</text>')
        parts.append(f'<text x="{left - 4}" y="{place(x0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        color = _COLORS[number % len(_COLORS)]
        spots = [place(x, y) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in spots]
        y = 20 + 16 * number
        parts.append(f'<line x1="{width}" x2="{width + 18}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="1.6"/>')
        parts.append(f'<text x="{width + 24}" y="{y + 4}">{html.escape(name)}</text>')
    return _svg(width + legend, max(height, 24 + 16 * len(curves)), parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"

"""Circuits as SVG pictures: node by node while that can be read, as a profile of widths beyond."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from structmat.circuit.arrays import is_unit, owners
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.schedule import live_widths

MOST_NODES = 400
"""Circuits of more nodes, or of three times as many edges, are drawn as a profile."""

MOST_BARS = 160
"""Levels beyond this number share bars, each as high as the widest of its levels."""

_COLORS = {
    Kind.INPUT: "#ffffff",
    Kind.CONSTANT: "#c9c9c9",
    Kind.SUM: "#3b6fb6",
    Kind.PRODUCT: "#e08a1e",
    Kind.QUOTIENT: "#b3372f",
}
_INK, _FAINT, _WEIGHT, _TRAINED = "#222222", "#9a9a9a", "#3b6fb6", "#2f8f5b"
_MARGIN, _HEAD, _GAP = 24, 46, 56


def draw(circuit: Circuit, path: str | Path | None = None, *, transposed: bool | None = None) -> str:
    """An SVG picture: levels from left to right with their widths, and the transposed circuit beside it.

    Thin grey edges have the weight 1, dashed ones -1, blue ones another number, green ones a parameter. A circuit of
    more than 400 nodes is drawn as a profile: for each level its number of gates, and the number of values alive.

    Args:
        circuit: any.
        path: a file to write; None only returns the text.
        transposed: whether to draw the transpose too; by default for linear circuits.

    Returns:
        The SVG document.

    Raises:
        CircuitError: ``transposed`` is true, but the circuit is not linear.
    """
    panels = [(circuit, "circuit")]
    if circuit.is_linear if transposed is None else transposed:
        panels.append((circuit.transpose(), "transposed: every edge reversed"))
    small = all(c.nodes <= MOST_NODES and c.edges <= 3 * MOST_NODES for c, _ in panels)
    drawn = [_nodes_panel(c, title) if small else _profile_panel(c, title) for c, title in panels]
    width = 2 * _MARGIN + sum(w for _, w, _ in drawn) + _GAP * (len(drawn) - 1)
    height = max(h for _, _, h in drawn) + 2 * _MARGIN + 22
    parts = []
    left = float(_MARGIN)
    for body, panel_width, _ in drawn:
        parts.append(f'<g transform="translate({left:.0f} {_MARGIN})">{body}</g>')
        left += panel_width + _GAP
    legend, needed = _legend(height - 16, small, [c for c, _ in panels])
    width = max(width, needed)
    parts.append(legend)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" fill="{_INK}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>'
    )
    if path is not None:
        Path(path).write_text(svg, encoding="utf-8")
    return svg


def _header(circuit: Circuit, title: str) -> str:
    facts = f"{circuit.gates:,} gates, depth {circuit.depth:,}, {circuit.multiplications:,} mult., "
    facts += f"{circuit.additions:,} add."
    if circuit.counts.divisions:
        facts += f", {circuit.counts.divisions:,} div."
    if circuit.parameters:
        facts += f", {circuit.parameters:,} parameters"
    return (
        f'<text x="0" y="12" font-size="13" font-weight="bold">{escape(title)}</text>'
        f'<text x="0" y="29" font-size="11" fill="#555555">{escape(facts)}</text>'
    )


# ------------------------------------------------------------------------------------------------------ node by node


def _nodes_panel(circuit: Circuit, title: str) -> tuple[str, float, float]:
    """The drawing, its width and its height."""
    levels = circuit.levels
    tallest = int(levels.widths.max(initial=1))
    row = min(28.0, max(9.0, 420.0 / tallest))
    radius = min(6.0, row / 2.6)
    column = float(np.clip(row * tallest / 3, 60, 120))
    height = row * max(tallest, 2)
    x, y = _places(circuit, height, column)
    panel = max(column * (levels.count - 1) + 2 * radius + 34, 300.0)
    shapes = [_header(circuit, title)]
    target = owners(circuit.start)
    unit = is_unit(circuit.weight)
    for edge in np.flatnonzero(circuit.operand >= 0).tolist():
        a, b = int(circuit.operand[edge]), int(target[edge])
        style = _edge_style(circuit, edge, unit)
        shapes.append(f'<line x1="{x[a]:.1f}" y1="{y[a]:.1f}" x2="{x[b]:.1f}" y2="{y[b]:.1f}" {style}/>')
    outputs = set(circuit.outputs.tolist())
    for node in range(circuit.nodes):
        kind = Kind(circuit.kind[node])
        name = f"{kind.name.lower()} {node}" + (", output" if node in outputs else "")
        if node in outputs:
            shapes.append(
                f'<line x1="{x[node]:.1f}" y1="{y[node]:.1f}" x2="{x[node] + radius + 7:.1f}" y2="{y[node]:.1f}" '
                f'stroke="{_INK}" stroke-width="2"/>'
            )
        shapes.append(
            f'<circle cx="{x[node]:.1f}" cy="{y[node]:.1f}" r="{radius:.1f}" fill="{_COLORS[kind]}" stroke="{_INK}" '
            f'stroke-width="1"><title>{escape(name)}</title></circle>'
        )
    below = _HEAD + height + 14
    for level, count in enumerate(levels.widths.tolist()):
        shapes.append(
            f'<text x="{radius + column * level:.1f}" y="{below:.1f}" font-size="10" text-anchor="middle" '
            f'fill="#555555">{count}</text>'
        )
    return "".join(shapes), panel, below + 8


def _places(circuit: Circuit, height: float, column: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the nodes are: by level, and within each in the order of their numbers, downwards or upwards, or of the
    mean place of their operands: whichever gives the shortest edges."""
    levels = circuit.levels
    x = 7 + column * levels.of_node.astype(float)
    target = owners(circuit.start)
    read = circuit.operand >= 0

    def placed(upwards: bool, by_mean: bool) -> NDArray[np.float64]:
        y = np.zeros(circuit.nodes)
        for level, nodes in enumerate(levels):
            order = _by_operands(circuit, nodes, y) if by_mean and level else np.arange(len(nodes))
            step = height / max(len(nodes), 1)
            y[nodes[order[::-1] if upwards and level else order]] = _HEAD + step * (np.arange(len(nodes)) + 0.5)
        return y

    def length(y: NDArray[np.float64]) -> float:
        return float(np.abs(y[circuit.operand[read]] - y[target[read]]).sum())

    return x, min((placed(False, False), placed(True, False), placed(False, True)), key=length)


def _by_operands(circuit: Circuit, nodes: NDArray[np.int64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    means = []
    for node in nodes.tolist():
        read = circuit.operand[circuit.start[node] : circuit.start[node + 1]]
        read = read[read >= 0]
        means.append(float(y[read].mean()) if len(read) else float(node))
    return np.argsort(means, kind="stable")


def _edge_style(circuit: Circuit, edge: int, unit: NDArray[np.bool_]) -> str:
    if circuit.parameter[edge] >= 0:
        return f'stroke="{_TRAINED}" stroke-width="1.2"'
    if not unit[edge]:
        return f'stroke="{_WEIGHT}" stroke-width="1.2"'
    dashed = ' stroke-dasharray="4 3"' if circuit.weight[edge] == -1 else ""
    return f'stroke="{_FAINT}" stroke-width="0.8"{dashed}'


# ----------------------------------------------------------------------------------------------------------- profile


def _profile_panel(circuit: Circuit, title: str) -> tuple[str, float, float]:
    """Bars of gates for each level, and a line of the values alive."""
    widths = circuit.levels.widths.astype(float)
    alive = live_widths(circuit).astype(float)
    per_bar = -(-len(widths) // MOST_BARS)
    bars = _maxima(widths, per_bar)
    line = _maxima(alive, per_bar)
    top = max(float(bars.max(initial=1)), float(line.max(initial=1)))
    height, panel = 220.0, 420.0
    step = panel / len(bars)
    shapes = [_header(circuit, title)]
    for place, value in enumerate(bars.tolist()):
        tall = height * value / top
        level = place * per_bar
        name = f"level {level}" if per_bar == 1 else f"levels {level} to {min(level + per_bar, len(widths)) - 1}"
        color = _FAINT if place == 0 else _COLORS[Kind.SUM]
        shapes.append(
            f'<rect x="{place * step:.2f}" y="{_HEAD + height - tall:.2f}" width="{max(0.8, step * 0.8):.2f}" '
            f'height="{tall:.2f}" fill="{color}"><title>{name}: {value:,.0f} nodes</title></rect>'
        )
    points = " ".join(
        f"{(place + 0.4) * step:.2f},{_HEAD + height - height * value / top:.2f}" for place, value in enumerate(line)
    )
    shapes.append(f'<polyline points="{points}" fill="none" stroke="{_COLORS[Kind.QUOTIENT]}" stroke-width="1.5"/>')
    shapes.append(
        f'<line x1="0" y1="{_HEAD + height}" x2="{panel}" y2="{_HEAD + height}" stroke="{_INK}" stroke-width="1"/>'
    )
    below = _HEAD + height + 15
    last = len(widths) - 1
    shapes.append(f'<text x="0" y="{below}" font-size="10" fill="#555555">level 0</text>')
    shapes.append(
        f'<text x="{panel}" y="{below}" font-size="10" text-anchor="end" fill="#555555">level {last:,}; the highest '
        f"bar is {bars.max(initial=0):,.0f} nodes</text>"
    )
    return "".join(shapes), panel, below + 8


def _maxima(values: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    return np.maximum.reduceat(values, np.arange(0, len(values), group))


def _legend(y: float, small: bool, circuits: list[Circuit]) -> tuple[str, float]:
    """What the colors mean, of those that occur; and where it ends."""
    if small:
        kinds = {Kind(k) for c in circuits for k in np.unique(c.kind)}
        marks = [(_COLORS[kind], kind.name.lower(), "circle") for kind in sorted(kinds)]
        marks += [(_FAINT, "1", "line"), (_FAINT, "-1", "dashed"), (_WEIGHT, "other weights", "line")]
        if any(c.parameters for c in circuits):
            marks.append((_TRAINED, "parameters", "line"))
    else:
        marks = [(_COLORS[Kind.SUM], "gates of the level", "bar"), (_COLORS[Kind.QUOTIENT], "values alive", "line")]
        marks.insert(0, (_FAINT, "inputs", "bar"))
    shapes, left = [], float(_MARGIN)
    for color, text, form in marks:
        if form == "circle":
            shapes.append(f'<circle cx="{left + 6:.0f}" cy="{y - 4}" r="5" fill="{color}" stroke="{_INK}"/>')
        elif form == "bar":
            shapes.append(f'<rect x="{left:.0f}" y="{y - 9}" width="12" height="10" fill="{color}"/>')
        else:
            dash = ' stroke-dasharray="4 3"' if form == "dashed" else ""
            shapes.append(
                f'<line x1="{left:.0f}" y1="{y - 4}" x2="{left + 16:.0f}" y2="{y - 4}" stroke="{color}" '
                f'stroke-width="1.6"{dash}/>'
            )
        shapes.append(f'<text x="{left + 20:.0f}" y="{y}" font-size="10" fill="#555555">{text}</text>')
        left += 34 + 6 * len(text)
    return "".join(shapes), left

"""The drawings of the HTML report: inline SVG and HTML fragments, as plain functions of numbers.

Shapes whose texts must stay readable at any width are stretched SVG with the texts in HTML around them; small multiples
are SVG that scales as a whole. Colours are CSS variables: light and dark are one drawing. All texts are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = 10
"""How many colours the page defines for families; further families share the last one."""


def number(value: float) -> str:
    """A count for people: 1,234 or 4.74 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f}&#8239;{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage, with as many digits as it deserves."""
    value = 100 * share
    return f"{value:.0f}&#8239;%" if value >= 99.95 or value == 0 else f"{value:.{1 if value >= 1 else 2}f}&#8239;%"


def milliseconds(value: float) -> str:
    """A time with three digits."""
    return f"{value:.0f}&#8239;ms" if value >= 100 else f"{value:.3g}&#8239;ms"


def figure(value: float) -> str:
    """A figure of quality or an error."""
    return f"{value:.5g}" if abs(value) >= 1 else f"{value:.4g}"


def colour(index: int) -> str:
    """The CSS colour of a family, by its place in the legend; 0 is "kept dense"."""
    return f"var(--f{min(index, COLOURS)})"


def legend(families: Sequence[str], notes: Mapping[str, str] | None = None) -> str:
    """Names of families beside their colours."""
    items = []
    for index, name in enumerate(families):
        note = (notes or {}).get(name, "")
        items.append(
            f'<li><span class="swatch" style="background:{colour(index)}"></span>{escape(name)}'
            f"{f' <small>{note}</small>' if note else ''}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def skyline(layers: Sequence[tuple[str, str, int, float, float]], overall: float) -> str:
    """The network's budget as a picture: a column a layer, its area the numbers that are kept.

    Args:
        layers: name, structure, colour, dense parameters, kept share, from input to output.
        overall: the kept share of all together, drawn as a line.
    """
    total = sum(size for *_, size, _ in layers) or 1.0
    gap = 1000 * 0.0015 if len(layers) > 1 else 0.0
    x, shapes = 0.0, []
    top = max([1.0, *(share for *_, share in layers)])
    for name, structure, index, size, share in layers:
        width = 1000 * size / total
        inner = max(width - gap, 0.4 * width)
        height = 100 * share / top
        text = escape(f"{name}: {structure}, {100 * share:.1f} % of {size:,.0f} parameters")
        shapes.append(
            f'<g><title>{text}</title><rect class="ghost" x="{x:.2f}" y="{100 - 100 / top:.2f}" width="{inner:.2f}" '
            f'height="{100 / top:.2f}"/><rect x="{x:.2f}" y="{100 - height:.2f}" width="{inner:.2f}" '
            f'height="{height:.2f}" fill="{colour(index)}"/></g>'
        )
        x += width
    level = 100 - 100 * overall / top
    note = f'<span class="level" style="top:{level:.2f}%">{percent(overall)} of all</span>'
    return (
        '<figure class="skyline"><div class="plot">'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Kept share of every layer">'
        f'{"".join(shapes)}<line class="rule" x1="0" x2="1000" y1="{level:.2f}" y2="{level:.2f}"/></svg>{note}</div>'
        "<figcaption><span>&#8592; input</span><span>width: parameters of the layer &#183; height: share that is kept"
        "</span><span>output &#8594;</span></figcaption></figure>"
    )


def bar(share: float, width: float, index: int) -> str:
    """A bar in a track: the track's width says how large the layer was, its filling what is kept."""
    return (
        f'<div class="track" style="width:{100 * width:.2f}%"><div class="fill" '
        f'style="width:{min(100.0, 100 * share):.2f}%;background:{colour(index)}"></div></div>'
    )


def candidates(
    points: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, int],
    chosen: tuple[float, float] | None,
    label: str,
    lowest: int,
) -> str:
    """Error against parameters of one layer's candidates: a line a family, a ring around the chosen one.

    Args:
        points: by family, (share of the dense parameters, relative error).
        colours: by family.
        chosen: the same of the chosen candidate.
        label: for people who listen to the page.
        lowest: the error axis is logarithmic and goes from ``10**lowest`` to 1.
    """
    width, height, left, right, top, bottom = 220.0, 130.0, 30.0, 8.0, 8.0, 18.0

    def place(share: float, error: float) -> tuple[float, float]:
        exponent = max(math.log10(error), lowest) if error > 0 else lowest
        y = top + min(1.0, max(0.0, exponent / lowest)) * (height - top - bottom)
        return left + min(1.0, share) * (width - left - right), y

    parts = []
    for exponent in range(lowest, 1):
        y = top + exponent / lowest * (height - top - bottom)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = "1" if exponent == 0 else f'10<tspan dy="-3" font-size="7">&#8722;{-exponent}</tspan>'
        parts.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{text}</text>')
    for share in (0.0, 0.5, 1.0):
        x, _ = place(share, 1.0)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor="{anchor}">{100 * share:.0f} %</text>')
    for family, values in points.items():
        places = [place(*point) for point in sorted(values)]
        # The line joins the best of the family at each size; y grows downwards, towards small errors.
        best = [p for i, p in enumerate(places) if all(p[1] > other[1] for other in places[:i])]
        line = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(best))
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        paint = colour(colours[family])
        parts.append(
            f'<g style="stroke:{paint}"><title>{escape(family)}</title>'
            f'<path class="curve" d="{line}"/><path class="dots" d="{dots}"/></g>'
        )
    if chosen is not None:
        x, y = place(*chosen)
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
    return (
        f'<svg class="small" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def curve(series: Mapping[str, Sequence[tuple[float, float]]], horizontal: str) -> str:
    """Lines over steps, on a logarithmic axis if all values are positive; texts stay outside the stretched drawing."""
    values = [y for line in series.values() for _, y in line]
    ends = [x for line in series.values() for x, _ in line]
    logarithmic = min(values) > 0

    def height(value: float) -> float:
        return math.log(value) if logarithmic else value

    low, high = height(min(values)), height(max(values))
    span, last = (high - low) or 1.0, max(ends) or 1.0
    parts = []
    for index, line in enumerate(series.values()):
        points = " ".join(f"{1000 * x / last:.1f},{96 - 92 * (height(y) - low) / span:.2f}" for x, y in line)
        parts.append(f'<polyline class="line{index}" points="{points}"/>')
    names = "".join(
        f'<li><span class="stroke line{index}"></span>{escape(name)}</li>' for index, name in enumerate(series)
    )
    scale = "logarithmic scale" if logarithmic else "linear scale"
    return (
        f'<ul class="legend">{names}</ul><figure class="curve-figure"><div class="plot"><span class="tick top">'
        f'{figure(max(values))}</span><span class="tick bottom">{figure(min(values))}</span>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Training curve">'
        f"{''.join(parts)}</svg></div><figcaption><span>0</span><span>{escape(horizontal)}, {scale}</span>"
        f"<span>{last:,.0f}</span></figcaption></figure>"
    )


def pair(before: float, after: float, largest: float) -> str:
    """Two bars, before over after, on a common scale."""
    rows = []
    for kind, value in (("before", before), ("after", after)):
        share = value / largest if largest else 0.0
        rows.append(
            f'<div class="pair-row"><span class="pair-bar {kind}" style="width:{max(0.5, 62 * share):.2f}%"></span>'
            f"<span>{milliseconds(value)}</span></div>"
        )
    return f'<div class="pair">{"".join(rows)}</div>'

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


def strip(layers: Sequence[tuple[str, int, float]], total: float, label: str) -> str:
    """Layers side by side in the order of the network, each as wide as what it takes; all of a row is ``total``.

    Args:
        layers: name, colour, and what it takes.
        total: of the whole row, so that two rows can be compared.
        label: for people who listen to the page.
    """
    x, shapes = 0.0, []
    for name, index, value in layers:
        width = 1000 * value / total if total else 0.0
        shapes.append(
            f'<rect x="{x:.2f}" y="0" width="{max(width - 0.6, 0.3 * width):.2f}" height="20" fill="{colour(index)}">'
            f"<title>{escape(name)}</title></rect>"
        )
        x += width
    return (
        f'<svg class="strip" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(shapes)}</svg>'
    )


def layer_card(
    place: int,
    name: str,
    structure: str,
    index: int,
    shape: tuple[int, int],
    largest: int,
    kept: float,
    times: tuple[float, float, float],
) -> str:
    """One layer of the network: its matrix to scale, filled by the share that is kept, and its time below.

    Args:
        place: its place in the network.
        name, structure: as text.
        index: its colour.
        shape: (out, in).
        largest: side of any layer, which the drawing is scaled to.
        kept: share of the parameters.
        times: of the dense layer, of this one, and the longest of all.
    """
    height, width = (max(5.0, 60.0 * (side / largest) ** 0.5) for side in shape)
    x, y = (64 - width) / 2, 62 - height
    fill = min(1.0, kept) * height
    dense, now, most = times
    bars = "".join(
        f'<div class="time {kind}" style="width:{100 * min(1.0, value / most) if most else 0:.1f}%"></div>'
        for kind, value in (("dense", dense), ("slow" if now > 1.03 * dense else "now", now))
    )
    title = escape(
        f"{name}: {structure}, {shape[0]} x {shape[1]}, {100 * kept:.1f} % kept, {now:.1f} of {dense:.1f} us"
    )
    return (
        f'<li class="card" title="{title}"><svg viewBox="0 0 64 64" role="img" aria-label="{title}">'
        f'<rect class="ghost" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5"/>'
        f'<rect x="{x:.1f}" y="{y + height - fill:.1f}" width="{width:.1f}" height="{fill:.1f}" rx="1.5" '
        f'fill="{colour(index)}"/></svg><div class="times-pair">{bars}</div>'
        f"<strong><i>{place}</i> <bdi>{escape(name)}</bdi></strong><span>{escape(structure)}</span></li>"
    )


def scatter(
    line: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float, bool]],
    label: str,
    *,
    logarithmic: bool,
    level: float | None = None,
    bound: float | None = None,
) -> str:
    """Something against the share of the dense cost: a line, dots on it, and level lines.

    Args:
        line: (share, value) by rising share.
        dots: (share, value, whether it gets a ring).
        label: of the vertical axis.
        logarithmic: the vertical axis; values of 0 lie at its foot.
        level: of the original, as a dashed line.
        bound: of what is accepted, as a dotted one.
    """
    width, height, left, right, top, bottom = 520.0, 270.0, 52.0, 14.0, 26.0, 34.0
    values = [v for _, v in line] + [v for _, v, _ in dots] + [v for v in (level, bound) if v is not None]
    positive = [v for v in values if v > 0]
    logarithmic = logarithmic and bool(positive)
    foot = 0.5 * min(positive) if logarithmic else 0.0

    def scaled(value: float) -> float:
        return math.log10(max(value, foot)) if logarithmic else value

    low, high = min(scaled(v) for v in values), max(scaled(v) for v in values)
    span = (high - low) or 1.0
    low, high = low - 0.04 * span, high + 0.06 * span
    least = min([s for s, _ in line] + [s for s, _, _ in dots] + [0.5])

    def place(share: float, value: float) -> tuple[float, float]:
        x = left + math.log(max(share, least) / least) / math.log(1 / least) * (width - left - right)
        return x, top + (high - scaled(value)) / (high - low) * (height - top - bottom)

    parts = [f'<text x="0" y="12">{escape(label)}</text>']
    for tick in _ticks(low, high, logarithmic):
        _, y = place(1.0, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    last = -math.inf
    for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        x, _ = place(share, 1.0)
        if share < least or x - last < 34:
            continue
        last = x
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 16:.0f}" text-anchor="{"end" if share == 1.0 else "middle"}">'
            f"{100 * share:.0f} %</text>"
        )
    for name, value in (("level", level), ("bound", bound)):
        if value is not None:
            _, y = place(1.0, value)
            parts.append(f'<line class="{name}-line" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    drawn = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*p) for p in line))
    parts.append(f'<path class="front" d="{drawn}"/>')
    for share, value, ring in sorted(dots, key=lambda dot: dot[2]):
        x, y = place(share, value)
        text = f"<title>{100 * share:.1f} %: {figure(value)}</title>"
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{text}</circle>')
        if ring:
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7">{text}</circle>')
    return (
        f'<svg class="plane" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label, quote=True)} against size">{"".join(parts)}</svg>'
    )


def _tick(value: float) -> str:
    """A value at an axis: powers of ten that are far from 1 as such."""
    exponent = math.log10(value) if value > 0 else 0.0
    if abs(exponent) > 3 and abs(exponent - round(exponent)) < 1e-9:
        sign = "&#8722;" if exponent < 0 else ""
        return f'10<tspan dy="-4" font-size="8">{sign}{abs(round(exponent))}</tspan>'
    return figure(value)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values between two ends (exponents of 10 on a logarithmic axis), about five."""
    if logarithmic:
        first, last = math.ceil(low), math.floor(high)
        step = max(1, math.ceil((last - first + 1) / 6))
        if last - first >= 1:
            return [10.0**e for e in range(first, last + 1, step)]
        return [
            m * 10.0**e for e in range(first - 1, last + 2) for m in (1, 2, 5) if low <= math.log10(m * 10.0**e) <= high
        ]
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    size = unit * next(m for m in (1, 2, 5, 10) if (high - low) / (m * unit) <= 6)
    return [round(i * size, 12) for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


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

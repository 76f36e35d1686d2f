"""Studies: cells that are run once, and tables and pictures written anew from what is there.

A study is a list of cells. Each is run in turn and written to ``benchmarks/results/<study>/<key>.json`` when it ends: a
study that was interrupted goes on where it stopped, and the table, ``benchmarks/results/<study>.md``, is written after
every cell. Cells that were not run are marked so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.files import RESULTS, environment, write

DOCS = RESULTS.parents[1] / "docs"

NOT_RUN = "not run"

MANY = 60
"""Cells beyond which they are counted, not named."""

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        name: what is run, without the seed.
        run: gives the figures, which JSON can hold.
        seed: of everything random.
        extra: left out unless asked for by ``--all`` or ``--only``: a cell that takes hours.
    """

    name: str
    run: Callable[[int], dict[str, Any]]
    seed: int = 0
    extra: bool = False

    @property
    def key(self) -> str:
        """The name of its file."""
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)
        return f"{plain}_{self.seed}"


@dataclass(frozen=True)
class Study:
    """Cells, and how their figures are shown.

    Args:
        name: of the folder and the files.
        purpose: one sentence.
        cells: in the order in which they are run.
        tables: Markdown lines from the figures by key; see :func:`spread`.
    """

    name: str
    purpose: str
    cells: Sequence[Cell]
    tables: Callable[[Mapping[str, dict[str, Any]]], list[str]]

    def path(self, cell: Cell) -> Path:
        """The figures of a cell."""
        return RESULTS / self.name / f"{cell.key}.json"

    def done(self) -> dict[str, dict[str, Any]]:
        """The figures that are there, by key."""
        paths = {cell.key: self.path(cell) for cell in self.cells}
        return {key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items() if path.exists()}

    def write_tables(self) -> None:
        """``<name>.md``, from what is there."""
        done = self.done()
        missing = [cell.key for cell in self.cells if cell.key not in done]
        lines = [f"# {self.purpose}", "", *_preface(done.values()), "", *self.tables(done)]
        if len(missing) > MANY:
            words = f"{len(missing)} of {len(self.cells)} cells were not run; `list` names them."
            lines += ["", words]
        elif missing:
            lines += ["", f"Cells not run: {', '.join(f'`{key}`' for key in missing)}."]
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = "\n".join(lines).rstrip() + "\n"
        (RESULTS / f"{self.name}.md").write_text(text, encoding="utf-8")

    def main(self) -> None:
        """The command: run what is not done, or write the tables."""
        parser = argparse.ArgumentParser(description=self.purpose)
        parser.add_argument("action", nargs="?", choices=("run", "list", "table"), default="run")
        parser.add_argument("--only", action="append", help="cells whose key contains this")
        parser.add_argument("--all", action="store_true", help="cells that take hours too")
        parser.add_argument("--seeds", type=int, metavar="N", help="only seeds below N")
        options = parser.parse_args()
        chosen = [
            cell
            for cell in self.cells
            if (any(word in cell.key for word in options.only) if options.only else options.all or not cell.extra)
            and (options.seeds is None or cell.seed < options.seeds)
        ]
        if options.action == "list":
            for cell in chosen:
                print(f"{'done' if self.path(cell).exists() else '    '} {cell.key}")
            return
        if options.action == "run":
            self.run(chosen)
        self.write_tables()

    def run(self, chosen: Iterable[Cell]) -> None:
        """Run what is not done."""
        todo = [cell for cell in chosen if not self.path(cell).exists()]
        for number, cell in enumerate(todo, 1):
            if self.path(cell).exists():
                continue  # another process has run it meanwhile
            print(f"[{number}/{len(todo)}] {cell.key}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            found = cell.run(cell.seed)
            found = {**found, "seconds": round(time.perf_counter() - start, 1), "environment": environment()}
            write(self.path(cell), found)
            self.write_tables()


def track(items: Iterable[T], total: int, words: str) -> Iterable[T]:
    """A bar on stderr while a cell runs."""
    from rich.console import Console
    from rich.progress import track as bar

    return bar(items, description=words, total=total, console=Console(stderr=True), transient=True)


def _preface(done: Iterable[dict[str, Any]]) -> list[str]:
    machines = [_machine(cell["environment"]) for cell in done]
    if not machines:
        return ["Nothing has been run yet."]
    told = [f"{key} {' or '.join(_values(machines, key))}" for key in dict.fromkeys(k for m in machines for k in m)]
    return [f"Measured with {', '.join(told)}. The machine was shared: times are indicative."]


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sorted(environment.items()) if isinstance(v, str | int) and k != "commit"}


def _values(machines: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """Of all machines."""
    return sorted({str(machine[key]) for machine in machines if key in machine})


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean, and the standard deviation where there are several seeds."""
    if not values:
        return NOT_RUN
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def of_name(done: Mapping[str, dict[str, Any]], cells: Iterable[Cell], name: str) -> list[dict[str, Any]]:
    """The figures of all seeds of a name that are there."""
    return [done[cell.key] for cell in cells if cell.name == name and cell.key in done]


def save(folder: Path, name: str, picture: str) -> None:
    """Write a picture, unless it is empty; also where the documentation shows it."""
    if not picture:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(picture, encoding="utf-8")
    if folder == RESULTS and (DOCS / name).exists():
        (DOCS / name).write_text(picture, encoding="utf-8")


COLORS = ("#1b6ca8", "#d1782c", "#3a8f4d", "#8a4fb0", "#c0262d", "#5b6670", "#b8860b", "#0f8b8d", "#7a5230")


def bars_svg(groups: Mapping[str, Mapping[int, float]], across: str, up: str) -> str:
    """Histograms side by side over the same integers, in per cent, as SVG; the legend at the right."""
    places = sorted({place for bars in groups.values() for place in bars})
    if not places:
        return ""
    places = list(range(min(places), max(places) + 1))
    width, height, left, right, low = 520, 300, 60, 200, 44
    step = (width - left - 10) / len(places)
    top = max(share for bars in groups.values() for share in bars.values())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + right} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<line x1="{left}" x2="{width - 10}" y1="{height - low}" y2="{height - low}" stroke="#999"/>',
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{across}</text>',
        f'<text x="14" y="{height / 2}" text-anchor="middle" transform="rotate(-90 14 {height / 2})">{up}</text>',
    ]
    for share in (0.0, top / 2, top):
        y = height - low - (height - low - 20) * share / top
        lines.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{share:.0f}</text>')
    for number, place in enumerate(places):
        x = left + step * (number + 0.5)
        lines.append(f'<text x="{x:.1f}" y="{height - low + 14}" text-anchor="middle">{place}</text>')
    for number, (name, bars) in enumerate(groups.items()):
        color, wide = COLORS[number % len(COLORS)], 0.8 * step / len(groups)
        for place, share in bars.items():
            tall = (height - low - 20) * share / top
            x = left + step * (places.index(place) + 0.1) + wide * number
            y = height - low - tall
            lines.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{color}"/>')
        y = 20 + 16 * number
        lines.append(f'<rect x="{width}" y="{y - 5}" width="20" height="10" fill="{color}"/>')
        lines.append(f'<text x="{width + 26}" y="{y + 4}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


POINTS_MARKED = 24
"""Of a curve, so many of which are marked: a curve of one point is nothing else."""


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: a little more than is there."""
    low, high = min(values), max(values)
    more = 0.03 * (high - low) or 0.5
    return low - more, high + more


def _round_numbers(low: float, high: float) -> list[float]:
    """On a logarithmic axis: powers of ten, with their multiples where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = range(1, 10) if high - low < 0.7 else (1, 2, 5) if high - low < 2 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= math.log10(step) + power <= high]


def _even_numbers(low: float, high: float) -> list[float]:
    """On a linear axis: three to nine multiples of one, two or five times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if (high - low) / (power * part) < 9)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curve_svg(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    *,
    dashed: Iterable[str] = (),
    ticks: Sequence[float] = (),
    logarithmic: bool = True,
) -> str:
    """Curves as SVG, the legend at the right. On logarithmic axes values of 0 are left out.

    ``ticks``: of the first axis, by default round numbers, or on linear axes the places of the points.
    """
    points = [(x, y) for curve in curves.values() for x, y in curve if not logarithmic or (x > 0 and y > 0)]
    if not points:
        return ""
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    width, height, left, low = 520, 360, 60, 44
    right = max(200, 40 + 6 * max(map(len, curves)))
    (x0, x1), (y0, y1) = (_range([scale(number) for number in numbers]) for numbers in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across_ = left + (scale(x) - x0) / (x1 - x0) * (width - left - 10)
        return across_, 10 + (y1 - scale(y)) / (y1 - y0) * (height - low - 10)

    if logarithmic:
        marks, levels = list(ticks) or _round_numbers(x0, x1), _round_numbers(y0, y1)
    else:
        marks = list(ticks) or sorted({x for x, _ in points})
        levels = _even_numbers(y0, y1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + right} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect x="{left}" y="10" width="{width - left - 10}" height="{height - low - 10}" fill="none" stroke="#999"/>',
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{across}</text>',
        f'<text x="14" y="{height / 2}" text-anchor="middle" transform="rotate(-90 14 {height / 2})">{up}</text>',
    ]
    free = 0.0
    for mark in marks:
        x, _ = place(mark, points[0][1])
        if x < free:
            continue  # it would stand in the label before
        label = f"{mark:,.12g}"
        free = x + 8 + 6 * len(label)
        lines.append(f'<text x="{x:.1f}" y="{height - low + 14}" text-anchor="middle">{label}</text>')
    for level in levels:
        _, y = place(points[0][0], level)
        lines.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{level:.3g}</text>')
    broken = set(dashed)
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[(number // 2 if broken else number) % len(COLORS)]
        shown = [place(x, y) for x, y in curve if not logarithmic or (x > 0 and y > 0)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in shown)
        dash = ' stroke-dasharray="4 3"' if name in broken else ""
        stroke = f'stroke="{color}" stroke-width="1.6"{dash}'
        lines.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        if len(shown) <= POINTS_MARKED:
            lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.8" fill="{color}"/>' for a, b in shown]
        y = 20 + 16 * number
        lines.append(f'<line x1="{width}" x2="{width + 20}" y1="{y}" y2="{y}" {stroke}/>')
        lines.append(f'<text x="{width + 26}" y="{y + 4}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"

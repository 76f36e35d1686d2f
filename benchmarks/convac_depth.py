"""Depth efficiency: the width that a shallow network needs to follow a deep one; ranks beside minimum cuts.

python -m benchmarks.convac_depth               N = 4 and 8
python -m benchmarks.convac_depth --all         N = 16 too: tensors of 65,536 entries, 256 terms
python -m benchmarks.convac_depth table
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.files import RESULTS
from benchmarks.study import NOT_RUN, Cell, Study, curve_svg, markdown, of_name, save, spread
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac.cpfit import eckart_young, fit_cp

WIDTHS: dict[tuple[int, int], Sequence[int]] = {
    (4, 4): (1, 2, 4, 8, 12, 16),
    (8, 2): (1, 2, 4, 8, 12, 16),
    (8, 3): (1, 9, 27, 54, 81),
    (16, 2): (1, 4, 16, 64, 128, 256),
}
"""Shallow widths by (N, M = r)."""

KINDS = ("random", "orthogonal", "identity")

ARCHITECTURES = (
    (2, (2, 2, 2)), (2, (3, 2, 2)), (3, (2, 3, 2)), (3, (3, 2, 4)), (2, (4, 5, 3)), (3, (3, 3, 1)), (3, (2, 2, 5)),
)  # fmt: skip
"""(M, widths) for N = 8."""


def deep_tensor(kind: str, modes: int, size: int, seed: int) -> Tensor:
    """The coefficient tensor, of norm one, of a deep unshared network with M = r = ``size``."""
    tree = ModeTree.sequence(modes)
    net = ConvAC(None, tree, size, channels=size, sharing="unshared", dtype=torch.float64, initialize=lambda w: None)
    rng = np.random.default_rng(seed)
    levels = []
    for level in range(len(tree.levels)):
        count = modes // 2**level
        levels.append(np.stack([_matrix(kind, level, size, rng) for _ in range(count)]))
    top = {
        "random": rng.standard_normal(size),
        "orthogonal": np.ones(size),
        "identity": np.eye(size)[0] if modes > 2 else np.ones(size),
    }[kind]
    for level, matrices in enumerate(levels):
        net.layers[level][0].weights.set_dense(torch.from_numpy(matrices))
    net.output.weights.set_dense(torch.from_numpy(top)[None, None])
    tensor = net.coefficient_tensor().detach()
    return tensor / tensor.norm()


def _matrix(kind: str, level: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "identity":
        matrix = np.eye(size) if level == 0 else np.zeros((size, size))
        if level:
            matrix[0, : size if level == 1 else 1] = 1
        return matrix
    drawn = rng.standard_normal((size, size)) / math.sqrt(size)
    return drawn if kind == "random" else np.linalg.qr(drawn)[0]


def fits(kind: str, modes: int, size: int, seed: int) -> dict[str, Any]:
    """The error of the best shallow network found, and what none can beat, for each width."""
    tensor = deep_tensor(kind, modes, size, seed)
    sweeps, starts = (60, 4) if modes < 16 else (40, 1)
    found = {}
    for terms in WIDTHS[modes, size]:
        fitted = fit_cp(tensor, terms, sweeps=sweeps, starts=starts, seed=seed)
        found[str(terms)] = {"error": fitted.error, "bound": eckart_young(tensor, terms)}
    return {"widths": found}


ERRORS = (0.1, 0.3)
"""Relative errors that the shallow network may make."""

SIZE = 2
"""M = r of the curve of widths."""


def needed(kind: str, modes: int, seed: int) -> dict[str, Any]:
    """The least width found with which a shallow network comes within an error, and what none can do with less."""
    tensor = deep_tensor(kind, modes, SIZE, seed)
    full, fitted = SIZE ** (modes // 2), dict[int, float]()
    bounds = [eckart_young(tensor, terms) for terms in range(full + 1)]

    def error(terms: int) -> float:
        if terms not in fitted:
            sweeps, starts = (60, 4) if modes < 16 else (40, 1)
            fitted[terms] = fit_cp(tensor, terms, sweeps=sweeps, starts=starts, seed=seed).error
        return fitted[terms]

    found = {}
    for limit in ERRORS:
        low = max(1, next(terms for terms, bound in enumerate(bounds) if bound <= limit))
        if kind == "identity":
            # Its spectrum is flat: keeping the terms of its own sum attains the bound.
            found[str(limit)] = {"width": low, "bound": low}
            continue
        tried, below = low, low - 1
        while error(tried) > limit:
            below, tried = tried, tried + max(1, tried // 2)
        while tried - below > 1:
            middle = (below + tried) // 2
            below, tried = (below, middle) if error(middle) <= limit else (middle, tried)
        found[str(limit)] = {"width": tried, "bound": low}
    return {"full": full, "errors": found, "fits": {str(z): fitted[z] for z in sorted(fitted)}}


def ranks(channels: int, widths: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The generic rank of all 127 partitions of N = 8 against the minimum cut."""
    tree = ModeTree.sequence(8)
    found: dict[str, Any] = {}
    for sharing in ("unshared", "shared"):
        net = ConvAC(None, tree, widths, channels=channels, sharing=sharing)
        parts = [p for size in range(1, 8) for p in itertools.combinations(range(7), size)]
        pairs = [(net.rank(part), net.mincut(part).value) for part in parts]
        found[sharing] = {
            "partitions": len(pairs),
            "equal": sum(r == c for r, c in pairs),
            "above": sum(r > c for r, c in pairs),
            "largest": max(c for _, c in pairs),
        }
    return found


def needed_name(kind: str, modes: int) -> str:
    return f"width needed, {kind}, N={modes}"


def _cells() -> list[Cell]:
    found = []
    for modes, kind in itertools.product((4, 8, 16), KINDS):
        for seed in range(1 if kind == "identity" else 3):
            run = lambda s, kind=kind, modes=modes: needed(kind, modes, s)  # noqa: E731
            extra = modes == 16 and kind != "identity"
            found.append(Cell(needed_name(kind, modes), run, seed, extra=extra))
    for (modes, size), kind in itertools.product(WIDTHS, KINDS):
        for seed in range(1 if kind == "identity" else 3):
            run = lambda s, kind=kind, modes=modes, size=size: fits(kind, modes, size, s)  # noqa: E731
            found.append(Cell(f"{kind}, N={modes}, M={size}", run, seed, extra=modes == 16 or seed > 0))
    for channels, widths in ARCHITECTURES:
        run = lambda s, channels=channels, widths=widths: ranks(channels, widths, s)  # noqa: E731
        found.append(Cell(f"ranks, M={channels}, r={widths}", run))
    return found


def _widths_needed(done: Mapping[str, dict[str, Any]]) -> list[str]:
    """The width that a shallow network needs, against N, for one error: a table and a picture."""
    lines = ["", f"### The width that is needed, M = r = {SIZE}", ""]
    rows, curves, dashed = [], dict[str, list[tuple[float, float]]](), []
    for kind, limit in itertools.product(KINDS, ERRORS):
        cells = []
        for modes in (4, 8, 16):
            found = [f["errors"][str(limit)] for f in of_name(done, CELLS, needed_name(kind, modes))]
            cells.append(
                f"{spread([f['width'] for f in found], '.1f')} / {spread([f['bound'] for f in found], '.1f')}"
                if found
                else NOT_RUN
            )
            if found and limit == ERRORS[0]:
                for what, name in (("width", kind), ("bound", f"{kind}, bound")):
                    mean = sum(f[what] for f in found) / len(found)
                    curves.setdefault(name, []).append((modes, mean))
        rows.append((kind, f"{limit:g}", *cells))
        if limit == ERRORS[0]:
            dashed.append(f"{kind}, bound")
    lines += ["Width found / none smaller can do; a width of 4, 16, 256 can represent any rank of even | odd.", ""]
    lines += markdown(("tensor", "relative error", "N = 4", "N = 8", "N = 16"), rows)
    if curves:
        title = f"width for a relative error of {ERRORS[0]:g}"
        save(RESULTS, "convac_depth.svg", curve_svg(curves, "patches N", title, dashed=dashed, ticks=(4, 8, 16)))
        lines += ["", "![The width that a shallow network needs, by the number of patches](convac_depth.svg)"]
    return lines


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = ["## Width of the shallow network", *_widths_needed(done), ""]
    lines += ["Relative error found / lower bound (Eckart and Young), by width."]
    for (modes, size), widths in WIDTHS.items():
        rows, curves, dashed = [], dict[str, list[tuple[float, float]]](), []
        for kind in KINDS:
            found = of_name(done, CELLS, f"{kind}, N={modes}, M={size}")
            cells = [
                f"{spread([f['widths'][str(z)][what] for f in found], '.3f')}" if found else NOT_RUN
                for z in widths
                for what in ("error", "bound")
            ]
            rows.append((kind, *(f"{e} / {b}" if found else e for e, b in zip(cells[::2], cells[1::2], strict=True))))
            if found:
                for what, name in (("error", kind), ("bound", f"{kind}, bound")):
                    curves[name] = [(z, max(found[0]["widths"][str(z)][what], 1e-3)) for z in widths]
                dashed.append(f"{kind}, bound")
        lines += ["", f"### N = {modes}, M = r = {size}", "", *markdown(("tensor", *map(str, widths)), rows)]
        if curves:
            name = f"convac_depth_{modes}_{size}.svg"
            title = f"relative error, N = {modes}, M = {size}"
            save(RESULTS, name, curve_svg(curves, "width of the shallow network", title, dashed=dashed))
            lines += ["", f"![Errors and bounds by width, from 0.001 on]({name})"]
    rows = []
    for channels, widths in ARCHITECTURES:
        found = of_name(done, CELLS, f"ranks, M={channels}, r={widths}")
        told = (
            [f"{found[0][s]['equal']} of {found[0][s]['partitions']}" for s in ("unshared", "shared")]
            if found
            else [NOT_RUN] * 2
        )
        above = str(found[0]["unshared"]["above"] + found[0]["shared"]["above"]) if found else NOT_RUN
        rows.append((str(channels), str(widths), *told, above))
    head = ("M", "widths", "rank = cut, unshared", "rank = cut, shared", "rank above cut")
    return [
        *lines,
        "",
        "## Generic ranks of all partitions of N = 8 against the minimum cut",
        "",
        *markdown(head, rows),
    ]


CELLS = _cells()
STUDY = Study("convac_depth", "What depth buys: shallow approximations of deep networks", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()

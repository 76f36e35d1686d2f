"""Complete against incomplete depth efficiency: ranks of random deep networks with products and with ReLU and maximum.

    python -m benchmarks.convac_rectifier
    python -m benchmarks.convac_rectifier table

Products give the full even | odd rank with every draw of weights; rectifiers with maximum pooling a rank that spreads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.files import RESULTS
from benchmarks.study import NOT_RUN, Cell, Study, bars_svg, markdown, of_name, save, track
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac.expand import matricize
from structmat.nn.convac.semiring import Plain
from structmat.nn.convac.weights import Weights

DRAWS = 300
SETTINGS = ((4, 2, 4), (8, 2, 2), (8, 2, 4), (8, 2, 8))
"""(N, M, r)."""

SHOWN = (8, 2, 4)
"""The setting of the picture."""


def histogram(pooling: str, modes: int, channels: int, width: int, seed: int) -> dict[str, Any]:
    """Even | odd ranks of the grid tensors of random networks; N(0, 1) weights."""
    options: dict[str, Any] = {} if pooling == "product" else {"activation": "relu", "pooling": pooling}
    part, ranks = range(0, modes, 2), Counter[int]()
    for draw in track(range(DRAWS), DRAWS, pooling):
        generator = torch.Generator().manual_seed(DRAWS * seed + draw)

        def normal(weights: Weights, generator: torch.Generator = generator) -> None:
            weights.set_dense(torch.randn(weights.weight.shape, generator=generator, dtype=torch.float64))

        net = ConvAC(
            None, ModeTree.sequence(modes), width, channels=channels, sharing="unshared", semiring=Plain(),
            initialize=normal, dtype=torch.float64, **options,
        )  # fmt: skip
        if pooling == "product":
            ranks[net.rank(part, method="exact")] += 1
        else:
            grid = net.grid_tensor(torch.eye(channels, dtype=torch.float64)).detach()
            ranks[int(torch.linalg.matrix_rank(matricize(grid, part), rtol=1e-9))] += 1
    return {"ranks": {str(rank): ranks[rank] for rank in sorted(ranks)}, "full": channels ** (modes // 2)}


CELLS = [
    Cell(
        f"{pooling}, N={modes}, M={channels}, r={width}",
        lambda seed, a=(pooling, modes, channels, width): histogram(*a, seed),
    )
    for modes, channels, width in SETTINGS
    for pooling in ("product", "max", "average")
]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    for cell in CELLS:
        found = of_name(done, CELLS, cell.name)
        if not found:
            rows.append((cell.name, NOT_RUN, NOT_RUN, NOT_RUN))
            continue
        ranks, full = {int(k): v for k, v in found[0]["ranks"].items()}, found[0]["full"]
        share = 100 * ranks.get(full, 0) / sum(ranks.values())
        told = ", ".join(f"{rank}: {count}" for rank, count in ranks.items())
        rows.append((cell.name, str(full), f"{share:.0f} %", told))
    head = ("network", "full rank", "draws of full rank", "rank: draws")
    lines = [f"{DRAWS} draws of weights each.", "", *markdown(head, rows)]
    shown = {}
    for pooling in ("product", "max", "average"):
        found = of_name(done, CELLS, "{}, N={}, M={}, r={}".format(pooling, *SHOWN))
        if found:
            ranks = found[0]["ranks"]
            shown[pooling] = {int(rank): 100 * count / sum(ranks.values()) for rank, count in ranks.items()}
    if shown:
        title = "even | odd rank, N = {}, M = {}, r = {}".format(*SHOWN)
        save(RESULTS, "convac_rectifier.svg", bars_svg(shown, title, "draws in per cent"))
        lines += ["", "![Ranks of random networks by pooling](convac_rectifier.svg)"]
    return lines


STUDY = Study(
    "convac_rectifier", "Rectifier against arithmetic: even | odd ranks of random deep networks", CELLS, tables
)

if __name__ == "__main__":
    STUDY.main()

"""A hidden permutation of n places from n / 4 noisy pairs of inputs and outputs.

    python -m benchmarks.hidden_permutation          all cells: 20 permutations for each size and noise
    python -m benchmarks.hidden_permutation table    the table and the picture again

Inputs are Gaussian of unit variance, and so is the noise, times its deviation. The picture shows the share of places
that come back wrong; exact recovery is off its logarithmic axis.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.files import RESULTS
from benchmarks.study import NOT_RUN, Cell, Study, curve_svg, markdown
from structmat.projection.hidden_permutation import recover_permutation

SIZES = (64, 128, 256, 512, 1024)
NOISES = (0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
RUNS = 20


def cell(size: int, seed: int) -> dict[str, Any]:
    """For each noise: how many of the permutations came back whole, and the share of wrong places."""
    found = []
    for noise in NOISES:
        wrong, doubts, times = [], [], []
        for run in range(RUNS):
            generator = torch.Generator().manual_seed(1000 * seed + run)
            order = torch.randperm(size, generator=generator)
            x = torch.randn(size // 4, size, generator=generator, dtype=torch.float64)
            y = x[:, order] + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            start = time.perf_counter()
            recovered = recover_permutation(x, y)
            times.append(time.perf_counter() - start)
            wrong.append(float((recovered.order != order).double().mean()))
            doubts.append(recovered.doubt)
        found.append(
            {
                "noise": noise,
                "exact": sum(w == 0 for w in wrong),
                "wrong": statistics.fmean(wrong),
                "doubt": statistics.median(doubts),
                "seconds_each": statistics.median(times),
            }
        )
    return {"noises": found}


CELLS: Sequence[Cell] = [Cell(f"size {size}", lambda seed, size=size: cell(size, seed)) for size in SIZES]  # type: ignore[misc]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ("n, pairs", *(f"noise {noise:g}" for noise in NOISES), "s at noise 0.1")
    rows, curves = [], {}
    for size, own in zip(SIZES, CELLS, strict=True):
        found = done.get(own.key)
        if found is None:
            rows.append((f"{size}, {size // 4}", *[NOT_RUN] * (len(head) - 1)))
            continue
        cells = found["noises"]
        rows.append(
            (
                f"{size}, {size // 4}",
                *(f"{c['exact']} ({c['wrong']:.1%})" if c["wrong"] else str(c["exact"]) for c in cells),
                f"{cells[0]['seconds_each']:.4f}",
            )
        )
        curves[f"n = {size}, {size // 4} pairs"] = [(c["noise"], c["wrong"]) for c in cells]
    picture = curve_svg(curves, "deviation of the noise, inputs of deviation 1", "share of wrong places")
    if picture:
        (RESULTS / "hidden_permutation.svg").write_text(picture, encoding="utf-8")
    note = f"Of {RUNS} permutations, how many come back whole, and the mean share of places that are wrong."
    return [note, "", *markdown(head, rows), "", "![Share of wrong places](hidden_permutation.svg)"]


STUDY = Study("hidden_permutation", "A hidden permutation from n / 4 noisy pairs", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()

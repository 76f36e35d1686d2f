"""From which size on a structured layer is faster than the dense one.

    python -m benchmarks.break_even                        all families
    python -m benchmarks.break_even run --only Toeplitz
    python -m benchmarks.break_even table                  the table again, from what is there

A cell is one family and one number of rows. Sizes grow by powers of two and three times those, from 32 to 4096; at each
the frozen layer and ``F.linear`` run in turns in one process, float32, on one thread. The break-even size is the
smallest from which on the layer is faster at every size that was measured. The measurement ends after four sizes at
which it took less than two thirds of the time of dense: larger ones favour structure more. Members are those of
``structmat bench --full``: typical ones where there are some, displacement rank 4 where there is one, else the first
configuration within an eighth of the dense parameters.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import structmat as sm
from benchmarks.study import NOT_RUN, Cell, Study, markdown
from structmat.benchmark import every_member, in_turns

SIZES = tuple(sorted({*(2**k for k in range(5, 13)), *(3 * 2**k for k in range(4, 11))}))
BATCHES = (1, 64, 1024)
SECONDS = 0.15
"""To spend on a size."""
CLEAR, CLEAR_SIZES = 1.5, 4
NEVER = f"> {SIZES[-1]}"


def cell(family: str, batch: int, seed: int) -> dict[str, Any]:
    """Microseconds of the layer and of dense, by size."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for size in SIZES:
        structure = next((s for s in every_member((size, size)) if type(s).__name__ == family), None)
        if structure is None:
            continue
        x, weight = (torch.randn(rows, size, generator=generator) for rows in (batch, size))
        layer = sm.nn.StructuredLinear(size, size, bias=False, structure=structure, generator=generator)
        frozen = layer.eval().freeze()
        with torch.inference_mode():
            runs = {"ours": partial(frozen, x), "dense": partial(F.linear, x, weight)}
            ours, dense = (1e6 * statistics.median(times) for times in in_turns(runs, SECONDS)[1].values())
        found.append({"size": size, "structure": str(structure), "ours": ours, "dense": dense})
        last = found[-CLEAR_SIZES:]
        if len(last) == CLEAR_SIZES and all(at["dense"] > CLEAR * at["ours"] for at in last):
            break
    return {"sizes": found}


def break_even(sizes: list[dict[str, Any]]) -> str:
    """The smallest size from which on the layer is faster."""
    best = None
    for at in reversed(sizes):
        if at["ours"] >= at["dense"]:
            break
        best = at["size"]
    if best is None:
        return NEVER
    return str(best) if best > sizes[0]["size"] else f"≤ {best}"


FAMILIES = tuple(dict.fromkeys(type(s).__name__ for s in every_member((1024, 1024))))
"""Those that have a square member; some need more than an eighth of the dense parameters at smaller sizes."""

CELLS = [Cell(f"{family} batch {batch}", partial(cell, family, batch)) for family in FAMILIES for batch in BATCHES]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    return [
        "The smallest n from which on a frozen n x n layer is faster than `F.linear`, float32, by the rows of the "
        "input; and at the largest size measured there, how many times faster.",
        "",
        *markdown(("family", "member (at the largest size)", *(f"{b} rows" for b in BATCHES)), _rows(done)),
    ]


def _rows(done: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    by_name = {cell.name: done.get(cell.key) for cell in CELLS}
    for family in FAMILIES:
        words, member = [], "—"
        for batch in BATCHES:
            found = by_name[f"{family} batch {batch}"]
            if found is None:
                words.append(NOT_RUN)
                continue
            last = found["sizes"][-1]
            member = last["structure"]
            words.append(f"{break_even(found['sizes'])} ({last['dense'] / last['ours']:.1f} at {last['size']})")
        yield family, f"`{member}`", *words


STUDY = Study("break_even", "From which size on structure is faster than dense", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()

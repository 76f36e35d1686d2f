"""What `inspect` calls the members of every family, with no hint: the confusion table.

    python -m benchmarks.identify                   30 matrices a family, 32 x 32, as the library draws them
    python -m benchmarks.identify run --all         the same with every learned number changed by up to a fifth
    python -m benchmarks.identify table             the tables again, from what is there

A cell is one family. Each matrix is drawn with its own seed at a quarter of the dense numbers (half where the family
has no smaller member) and given to `inspect` as a plain float64 tensor. What it is called is the exact structure of
fewest numbers, a trait or a family that was tried; "none" where nothing is exact. Noise comes too.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import structmat as sm
from benchmarks.study import NOT_RUN, Cell, Study, markdown
from structmat.structure import Structure, count_stored, resolve

SIZE = 32
MATRICES = 30
DRAWN: Mapping[str, tuple[Structure, int]] = {
    "GBLR": (sm.GBLR(terms=16, rows=64, columns=128), 32),
    "Kaleidoscope": (sm.Kaleidoscope(), 64),
    "Pixelfly": (sm.Pixelfly(blocks=8, strides=2, rank=1), 32),
    "RealPart": (sm.RealPart(sm.PermutedButterfly()), 64),
}
"""Structures and sizes where those that the library would draw say nothing: windows of half of the sides make a matrix
of low rank, one stride block diagonal blocks; the others have no member within half of the numbers at 32."""
TOLERANCE = 1e-12
SHARES = (1 / 8, 1 / 4, 1 / 2)
FAMILIES = tuple(name for name in sm.families() if name != "Dense")
CHANGED = 0.2


def structure_of(name: str) -> tuple[Structure, int]:
    """The member of a family that is drawn, and its size."""
    family, shape = sm.families()[name], (SIZE, SIZE)
    if name in DRAWN:
        structure, size = DRAWN[name]
        return resolve(structure, (size, size)), size
    for share in (4, 2):
        for found in family.configurations(shape, SIZE * SIZE // share):
            return resolve(found, shape), SIZE
    return resolve(family(), shape), SIZE


def drawn(name: str, seed: int, changed: bool) -> Tensor:
    """One matrix (n, n) of a family, or of none."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    if name == "noise":
        return noise
    if name == "low rank + noise":
        return noise[:, :3] @ noise[:3] + 0.1 * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    structure, size = structure_of(name)
    made = sm.StructuredMatrix.random(structure, (size, size), generator=generator, dtype=torch.float64)
    tensors = dict(made.tensors)
    if name == "PermutedButterfly":  # a fresh one has its rows and columns in order
        tensors |= {key: torch.randperm(size, generator=generator) for key in ("rows", "columns")}
    if changed:
        for key, t in tensors.items():
            if t.is_floating_point():
                by = CHANGED * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1)
                tensors[key] = torch.where(t == 0, by, t * (1 + by))
    return sm.StructuredMatrix(made.structure, made.shape, tensors).to_dense()


def called(matrix: Tensor) -> tuple[str, list[str]]:
    """The family of the exact structure of fewest numbers, or "none", and all families that are exact."""
    found = sm.inspect(matrix, shares=SHARES)
    exact = [(t.numbers, t.family or t.name) for t in found.traits if t.error <= TOLERANCE]
    exact += [(f.numbers, f.family) for f in found.exact]
    exact = sorted((entry for entry in exact if 2 * entry[0] <= matrix.numel()), key=lambda entry: entry[0])
    return (exact[0][1] if exact else "none"), [family for _, family in exact]


def cell(name: str, changed: bool) -> dict[str, Any]:
    """What 30 members are called."""
    first: Counter[str] = Counter()
    among, times = 0, []
    for seed in range(MATRICES):
        matrix = drawn(name, seed, changed)
        start = time.perf_counter()
        family, everything = called(matrix)
        times.append(time.perf_counter() - start)
        first[family] += 1
        among += name in everything
    kind, size = structure_of(name) if name in FAMILIES else (None, SIZE)
    return {
        "structure": f"{kind or name}" if size == SIZE else f"{kind}, {size} x {size}",
        "numbers": count_stored(kind, (size, size)) if kind else SIZE * SIZE,
        "called": dict(first.most_common()),
        "among": among,
        "seconds_each": statistics.median(times),
    }


NAMES = (*FAMILIES, "noise", "low rank + noise")
KINDS = {"drawn": False, "changed": True}
CELLS: Sequence[Cell] = [
    Cell(f"{name} {kind}", lambda _, name=name, changed=changed: cell(name, changed), 0, extra=changed)  # type: ignore[misc]
    for kind, changed in KINDS.items()
    for name in NAMES
    if not (changed and name not in FAMILIES)
]

_NOTES = {
    "drawn": "Members as the library draws them.",
    "changed": f"Members with every learned number multiplied by its own random number between {1 - CHANGED:g} and "
    f"{1 + CHANGED:g}, and with numbers up to {CHANGED:g} in place of zeros: nodes, operators and recurrences are then "
    "no longer those of a fresh matrix.",
}


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = [
        f"{MATRICES} matrices a row, {SIZE} x {SIZE}, float64. *Called*: the family of the exact structure of fewest "
        "numbers that `sm.inspect` reports, and how often. *Own*: how often the matrix's own family is among all exact "
        "ones. A circulant matrix is a Toeplitz matrix too, and a smaller name is no mistake: what matters is that no "
        "member of a family is called nothing, and noise nothing else. *Drawn*: the structure and its numbers, of "
        f"{SIZE * SIZE:,} (of more where another size is given).",
        "",
        "Where the own name does not come first, or not at all: fresh learned operators are shifts, whose matrices are "
        "Toeplitz-like; butterflies of rotations are orthogonal butterflies; the other chains of two factors are "
        "Monarch matrices; a recurrence that is fresh is that of Chebyshev polynomials. The stages of the real part of "
        "a complex butterfly are not found: it is a chain of two factors too, of more numbers.",
    ]
    for kind in KINDS:
        lines += ["", f"## {_NOTES[kind]}", ""]
        rows, missing = [], []
        for name in NAMES:
            found = done.get(Cell(f"{name} {kind}", cell).key)  # type: ignore[arg-type]
            if found is None:
                if not (KINDS[kind] and name not in FAMILIES):
                    missing.append(name)
                continue
            words = ", ".join(f"{family} {count}" for family, count in found["called"].items())
            own = f"{found['among']}" if name in FAMILIES else "—"
            shown = f"`{found['structure']}`, {found['numbers']:,}" if name in FAMILIES else name
            rows.append((name, shown, words, own, f"{found['seconds_each']:.2f}"))
        lines += markdown(("family", "drawn", "called", "own", "s a matrix"), rows) if rows else []
        lines += ["", f"{NOT_RUN.capitalize()}: {', '.join(missing)}."] if missing else []
    return lines


STUDY = Study("identify", "What `inspect` calls members of every family", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()

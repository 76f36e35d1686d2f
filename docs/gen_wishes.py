"""The table of the four wishes in Markdown, computed from the code: ``python docs/gen_wishes.py`` prints it."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

import structmat as sm
from structmat.circuit import Builder, Circuit
from structmat.circuit.catalogue import fourier, hadamard
from structmat.circuit.kaleidoscope import kaleidoscope
from structmat.errors import StructmatError
from structmat.structure import Structure, allows_complex, count_stored

SIZE = 16
MOST = SIZE**2 // 2
"""Stored numbers that a member may have: half of a dense matrix, in which every matrix would be a member."""

EXACT = 1e-10
"""Relative error up to which a projection counts as exact, in double precision."""

HEADER = ("family", "parameters", "product", "gradient", "Hadamard", "DFT", "DFT, reordered", "permutation", "sparse")


def targets() -> dict[str, Circuit]:
    """Circuits of the matrices that are asked for, under the names of their columns."""
    generator = np.random.default_rng(0)
    reversal = np.array([int(f"{i:04b}"[::-1], 2) for i in range(SIZE)])
    transform = fourier(SIZE)
    reordered = Builder(SIZE)
    permuted = reordered.apply(transform, np.argsort(reversal))
    places = np.sort(generator.choice(SIZE**2, 2 * SIZE, replace=False))
    sparse = Builder(SIZE)
    counts = np.bincount(places // SIZE, minlength=SIZE)
    sums = sparse.ragged_sums(counts, places % SIZE, generator.standard_normal(2 * SIZE))
    return {
        "Hadamard": hadamard(SIZE),
        "DFT": transform,
        "DFT, reordered": reordered.build(permuted),
        "permutation": Builder(SIZE).build(generator.permutation(SIZE)),
        "sparse": sparse.build(sums),
    }


def table() -> str:
    """One row for each family, third parties' included, and one for kaleidoscope matrices."""
    asked = targets()
    matrices = {name: torch.from_numpy(_dense(circuit)) for name, circuit in asked.items()}
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [_row(name, family, matrices) for name, family in sorted(sm.families().items())]
    rows.append(_kaleidoscope(asked))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _dense(circuit: Circuit) -> np.ndarray:
    dense = circuit.to_dense()
    return dense.astype(np.complex128 if dense.dtype.kind == "c" else np.float64)


def candidates(family: type[Structure]) -> list[Structure]:
    """What a family proposes for an eighth, a quarter and half of the dense parameters; else its smallest member."""
    shape = (SIZE, SIZE)
    found = [s for budget in (MOST // 4, MOST // 2, MOST) for s in family.configurations(shape, budget)]
    if not found:
        everything = [s for times in (1, 2, 4) for s in family.configurations(shape, times * SIZE**2)]
        found = sorted(everything, key=lambda structure: count_stored(structure, shape))[:1]
    return list(dict.fromkeys(found))


def _row(name: str, family: type[Structure], matrices: dict[str, Tensor]) -> tuple[str, ...]:
    members = candidates(family)
    if not members:
        return (f"`{name}`", *("-" for _ in HEADER[1:]))
    largest = max(members, key=lambda structure: count_stored(structure, (SIZE, SIZE)))
    member = sm.StructuredMatrix.random(largest, (SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    counts = _counted(member.circuit())
    return (f"`{name}`", *counts, *(held(members, matrix) for matrix in matrices.values()))


def _counted(circuit: Circuit) -> tuple[str, str, str]:
    """Parameters, operations of a product, operations of the product and all its derivatives."""
    gradient = circuit.vjp(parameters=bool(circuit.parameters), value=True)
    return f"{circuit.parameters:,}", f"{circuit.counts.operations:,}", f"{gradient.counts.operations:,}"


def held(members: list[Structure], matrix: Tensor) -> str:
    """Whether a member is the matrix: yes, no where a lower bound proves it for all of them, else not found."""
    proved = True
    for structure in members:
        if matrix.is_complex() and not allows_complex(structure):
            continue
        try:
            found = sm.project(matrix, structure)
        except StructmatError:
            proved = False
            continue
        if found.error < EXACT:
            return "yes"
        proved &= found.lower_bound > EXACT
    return "no" if proved else "not found"


def _kaleidoscope(asked: dict[str, Circuit]) -> tuple[str, ...]:
    compiled = [kaleidoscope(circuit) for circuit in asked.values()]
    exact = [np.allclose(k.to_dense(), _dense(c), atol=EXACT) for k, c in zip(compiled, asked.values(), strict=True)]

    return (
        "kaleidoscope `(B B*)^w`",
        _range([k.parameters for k in compiled]),
        _range([k.flops for k in compiled]),
        _range([_gradient_operations(k.parameters, k.flops) for k in compiled]),
        *("yes" if found else "not found" for found in exact),
    )


def _range(counts: list[int]) -> str:
    return f"{min(counts):,} to {max(counts):,}"


def _gradient_operations(parameters: int, flops: int) -> int:
    """The product, the transposed product, and one product for each parameter."""
    return 2 * flops + parameters


if __name__ == "__main__":
    sys.stdout.write(table())

"""What the compilers work on: the layers of a circuit, and which of them are butterfly factors already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.circuit.arrays import Numbers, exact_product
from structmat.circuit.circuit import Circuit
from structmat.circuit.kaleidoscope.recognize import Placed, placed
from structmat.circuit.schedule import Layer, latest_levels, layers, narrow_levels
from structmat.circuit.simplify import prune, without_zero_terms
from structmat.sizes import power_of_two

GENERIC_WIDTH = 3
"""Factors B B* of a layer: one for the permutations before it, two for the sorted, broadcast and summed entries."""


def planned(
    circuit: Circuit, *, recognize: bool, keep_all: bool = False
) -> tuple[tuple[Layer, ...], int, list[Placed | None]]:
    """The layers of the schedule that is cheapest to compile, the size they need, and which of them are recognized."""
    live = prune(without_zero_terms(circuit))
    schedules = [live.levels] if keep_all else [live.levels, latest_levels(live), narrow_levels(live)]
    candidates = []
    for levels in schedules:
        found = layers(live, levels, keep_all=keep_all)
        size, natives = _fitted(circuit, found, recognize)
        width = sum(GENERIC_WIDTH if native is None else 1 for native in natives)
        cost = size * size.bit_length() * width, sum(layer.nonzeros for layer in found)
        candidates.append((cost, found, size, natives))
    _, found, size, natives = min(candidates, key=lambda candidate: candidate[0])
    return found, size, natives


def _fitted(circuit: Circuit, chosen: Sequence[Layer], recognize: bool) -> tuple[int, list[Placed | None]]:
    """The least size for these layers, and those that are butterfly factors in it."""
    size = max(2, power_of_two(max(circuit.in_features, *(max(layer.rows, layer.columns) for layer in chosen))))
    if not recognize:
        return max(size, power_of_two(max(layer.nonzeros for layer in chosen))), [None] * len(chosen)
    while True:
        where, natives = np.arange(circuit.in_features), list[Placed | None]()
        for layer in chosen:
            native = placed(size, where, layer.start, layer.column, layer_values(circuit, layer))
            if native is None and layer.nonzeros > size:
                break
            natives.append(native)
            where = np.arange(layer.rows) if native is None else native.where
        else:
            return size, natives
        size = power_of_two(layer.nonzeros)


def layer_values(circuit: Circuit, layer: Layer) -> Numbers:
    """The numbers of a layer's entries."""
    trained = layer.parameter >= 0
    if not trained.any():
        return layer.weight
    own = circuit.values[np.where(trained, layer.parameter, 0)]
    return exact_product(layer.weight, np.where(trained, own, np.ones_like(own)))

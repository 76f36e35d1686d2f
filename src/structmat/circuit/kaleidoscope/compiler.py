"""Linear circuits as kaleidoscope matrices: the universality theorem as an algorithm.

A circuit of size s and depth d is a product of d sparse matrices. Each is sorted, broadcast, multiplied and summed by
butterfly factors, and the permutations between two of them are routed as one: width at most 3 d + 1, at a size of at
most 2 pow2(s). Source: Dao et al., "Kaleidoscope" (arXiv 2012.14966), theorem 1.
"""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import Ints, is_order, owners
from structmat.circuit.circuit import Circuit
from structmat.circuit.evaluate import require_linear
from structmat.circuit.kaleidoscope.benes import permutation, permutation_starred
from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.planning import GENERIC_WIDTH, layer_values, planned
from structmat.circuit.kaleidoscope.sparse import completed, sparse_factors
from structmat.circuit.kaleidoscope.stage import Stage


def kaleidoscope(
    circuit: Circuit, *, recognize: bool = True, keep_all: bool = False, full: bool = False
) -> Kaleidoscope:
    """The matrix of a linear circuit as a kaleidoscope matrix, exactly: only the circuit's own weights occur.

    Parameters enter with their present values. With d the circuit's depth (gates of unbounded fan-in are one level
    each, so ``circuit.wide.depth``; at least 1) and s its size, the width is at most ``3 d + 1``, and the size at most
    ``2 pow2(s)`` where no output is repeated. Usually both are far smaller: between two levels only the values are kept
    that are still needed, of the earliest, the latest and the narrowest schedule the smallest is taken, identity stages
    are dropped, and levels that are butterfly factors, as they stand or after a permutation, are taken over.

    Args:
        circuit: linear.
        recognize: take levels over that are a single butterfly factor.
        keep_all: keep every value to the end, as in the proof.
        full: emit identity permutations and stages too, as in the proof: the width is exactly ``3 d + 1`` where no
            level is recognized.

    Cost: O(width size log size).

    Raises:
        CircuitError: the circuit is not linear.
    """
    require_linear(circuit, "kaleidoscope")
    chosen, size, natives = planned(circuit, recognize=recognize, keep_all=keep_all)
    stream = _Stream(size, full)
    where = np.arange(circuit.in_features)
    for layer, native in zip(chosen, natives, strict=True):
        if native is None:
            parts = sparse_factors(owners(layer.start), where[layer.column], layer_values(circuit, layer), size)
            stream.permute(parts.gather)
            stream.append(*parts.spread.stages)
            if full or not is_order(parts.sort):
                stream.append(*permutation_starred(parts.sort).stages)
            stream.append(*parts.combine.stages)
            stream.permute(parts.scatter)
            where = np.arange(layer.rows)
            continue
        if native.order is not None:
            stream.permute(native.order)
        if native.stage is not None:
            stream.merge(native.stage)
        where = native.where
    # A value that is several outputs has been copied by the last layer, so that no two are in one place.
    stream.permute(completed(where, size))
    result = Kaleidoscope.packed(size, stream.finished(), circuit.in_features, circuit.out_features)
    assert result.width <= GENERIC_WIDTH * len(chosen) + 1
    return result


class _Stream:
    """Stages in order of application; permutations wait until a stage follows, and are then routed as one."""

    def __init__(self, size: int, full: bool) -> None:
        self.size = size
        self.full = full
        self.stages: list[Stage] = []
        self.waiting: Ints | None = None

    def permute(self, order: Ints) -> None:
        """A permutation ``y[i] = x[order[i]]`` after what is there."""
        self.waiting = order if self.waiting is None else self.waiting[order]

    def append(self, *stages: Stage) -> None:
        """Stages after what is there."""
        if self.waiting is not None and (self.full or not is_order(self.waiting)):
            self._keep(permutation(self.waiting).stages)
        self.waiting = None
        self._keep(stages)

    def merge(self, stage: Stage) -> None:
        """One stage, multiplied to the last switches of the permutation before it where they have its stride."""
        routed = self.waiting is not None and not is_order(self.waiting)
        self.append()
        if routed and self.stages and self.stages[-1].stride == stage.stride:
            stage = stage.after(self.stages.pop())
        self._keep((stage,))

    def _keep(self, stages: tuple[Stage, ...]) -> None:
        self.stages += [stage for stage in stages if self.full or not stage.is_identity]

    def finished(self) -> list[Stage]:
        """All stages."""
        self.append()
        return self.stages

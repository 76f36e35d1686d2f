"""Edges of a circuit under construction, collected part by part."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import Ints, Numbers, joined


class Edges:
    """Lists of (target, operand, weight, parameter), added many at a time."""

    def __init__(self) -> None:
        self.targets: list[Ints] = []
        self.operands: list[Ints] = []
        self.weights: list[Numbers] = []
        self.parameters: list[Ints] = []

    def add(
        self,
        target: Ints,
        operand: Ints,
        weight: Numbers | None = None,
        parameter: Ints | None = None,
    ) -> None:
        """Edges that read ``operand``; the weight is 1 and there is no parameter by default."""
        self.targets.append(target)
        self.operands.append(operand)
        self.weights.append(np.ones(len(target), np.int64) if weight is None else weight)
        self.parameters.append(np.full(len(target), -1) if parameter is None else parameter)

    def joined(self) -> tuple[Ints, Ints, Numbers, Ints]:
        """All of them, in the order in which they were added."""
        return (
            np.concatenate(self.targets),
            np.concatenate(self.operands),
            joined(self.weights),
            np.concatenate(self.parameters),
        )

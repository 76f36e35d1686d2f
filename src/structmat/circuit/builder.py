"""Building circuits: gate by gate, or many gates in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structmat.circuit.arrays import Ints, Numbers, indices, joined, numbers, starts
from structmat.circuit.circuit import Circuit, Group, Kind
from structmat.errors import CircuitError


class Builder:
    """Collects gates, each after its operands, and makes a circuit of them.

    Nodes are integers, and arrays of integers: every method takes and gives NumPy arrays of nodes in any shape, so
    that a whole level of an algorithm is one call. A gate at a time works too, and so do gates of one call that read
    each other: they are numbered from :attr:`nodes` on, in their order.

    Example: the butterfly of two inputs.

        >>> b = Builder(2)
        >>> top = b.sum([0, 1])
        >>> bottom = b.sum([0, 1], [1, -1])
        >>> b.build([top, bottom]).to_dense().tolist()
        [[1, 1], [1, -1]]

    Args:
        inputs: number of inputs; they are the nodes ``0 .. inputs - 1``.

    Raises:
        CircuitError: an operand does not exist yet, or shapes do not fit.
    """

    def __init__(self, inputs: int) -> None:
        if inputs < 0:
            raise CircuitError(f"A circuit can't have {inputs} inputs.")
        self.inputs = np.arange(inputs)
        self._nodes = inputs
        self._kinds: list[NDArray[np.uint8]] = [np.full(inputs, Kind.INPUT, np.uint8)]
        self._counts: list[Ints] = [np.zeros(inputs, np.int64)]
        self._operands: list[Ints] = []
        self._weights: list[Numbers] = []
        self._parameters: list[Ints] = []
        self._values: list[Numbers] = []
        self._groups: list[Group] = []
        self._trained = 0
        self._one: int | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes so far; the next gate has this number."""
        return self._nodes

    # ------------------------------------------------------------------------------------------------------ sources

    @property
    def one(self) -> int:
        """The constant node 1, the same every time."""
        if self._one is None:
            self._one = int(self.constant(1))
        return self._one

    def constant(self, value: ArrayLike) -> Ints:
        """Constant nodes with these numbers, in their shape."""
        values = numbers(value)
        operands = np.full(values.size, -1)
        counts = np.ones(values.size, np.int64)
        return self._add(Kind.CONSTANT, operands, values.ravel(), operands, counts).reshape(values.shape)

    def parameter(self, name: str, values: ArrayLike) -> Ints:
        """A group of parameters with these initial values: their numbers, in their shape.

        The numbers are what ``parameters=`` of sums takes; :meth:`parameter_nodes` makes nodes of them.
        """
        array = numbers(values)
        if any(group.name == name for group in self._groups):
            raise CircuitError(f"The circuit already has parameters named {name!r}. Use another name.")
        self._groups.append(Group(name, array.shape))
        self._values.append(array.ravel())
        first, self._trained = self._trained, self._trained + array.size
        return np.arange(first, self._trained).reshape(array.shape)

    def parameter_nodes(self, parameters: ArrayLike) -> Ints:
        """Constant nodes whose values are these parameters, in their shape."""
        read = indices(parameters, "Parameters")
        ones = np.ones(read.size, np.int64)
        return self._add(Kind.CONSTANT, -ones, ones, read.ravel(), ones).reshape(read.shape)

    # -------------------------------------------------------------------------------------------------------- gates

    def sum(self, operands: ArrayLike, weights: ArrayLike = 1, *, parameters: ArrayLike = -1) -> int:
        """One gate ``sum over k of weights[k] * operands[k]``: its node. No operands: zero."""
        return int(self.sums(indices(operands, "Operands").ravel(), weights, parameters=parameters))

    def sums(self, operands: ArrayLike, weights: ArrayLike = 1, *, parameters: ArrayLike = -1) -> Ints:
        """A gate for each row of operands.

        Args:
            operands: (..., terms) nodes.
            weights: numbers that broadcast to the shape of ``operands``.
            parameters: numbers of parameters that multiply the weights, -1 for none; they broadcast too.

        Returns:
            (...) the gates' nodes.
        """
        read = indices(operands, "Operands")
        weight = self._fitting(numbers(weights), read, "weights")
        trained = self._fitting(indices(parameters, "Parameters"), read, "parameters")
        gates = self._add(Kind.SUM, read.ravel(), weight.ravel(), trained.ravel(), _each(read))
        return gates.reshape(read.shape[:-1])

    def ragged_sums(
        self, counts: ArrayLike, operands: ArrayLike, weights: ArrayLike = 1, *, parameters: ArrayLike = -1
    ) -> Ints:
        """Gates of different numbers of terms, which follow each other in ``operands``.

        Args:
            counts: (gates,) terms of each gate.
            operands: (terms of all gates,) nodes.
            weights: numbers, one for each term or for all.
            parameters: likewise, -1 for none.

        Returns:
            (gates,) their nodes.
        """
        read, terms = indices(operands, "Operands"), indices(counts, "Numbers of terms")
        weight = self._fitting(numbers(weights), read, "weights")
        trained = self._fitting(indices(parameters, "Parameters"), read, "parameters")
        if terms.sum() != len(read):
            raise CircuitError(f"Gates of {terms.sum()} terms together got {len(read)} operands.")
        return self._add(Kind.SUM, read, weight, trained, terms)

    def product(self, operands: ArrayLike) -> int:
        """One gate that multiplies its operands: its node."""
        return int(self.products(indices(operands, "Operands").ravel()))

    def products(self, operands: ArrayLike) -> Ints:
        """A gate for each row of operands (..., factors): their nodes (...)."""
        read = indices(operands, "Operands")
        ones = np.ones(read.size, np.int64)
        return self._add(Kind.PRODUCT, read.ravel(), ones, -ones, _each(read)).reshape(read.shape[:-1])

    def quotient(self, dividend: int, divisor: int) -> int:
        """One gate that divides: its node."""
        return int(self.quotients(dividend, divisor))

    def quotients(self, dividends: ArrayLike, divisors: ArrayLike) -> Ints:
        """Gates that divide elementwise, in the common shape."""
        both = np.stack(np.broadcast_arrays(indices(dividends, "Operands"), indices(divisors, "Operands")), axis=-1)
        ones = np.ones(both.size, np.int64)
        return self._add(Kind.QUOTIENT, both.ravel(), ones, -ones, _each(both)).reshape(both.shape[:-1])

    def apply(self, circuit: Circuit, operands: ArrayLike) -> Ints:
        """Copies of a circuit without parameters, one for each row of operands.

        Args:
            circuit: with ``n`` inputs and ``m`` outputs.
            operands: (..., n) nodes.

        Returns:
            (..., m) the copies' outputs.
        """
        read = indices(operands, "Operands")
        if read.shape[-1:] != (circuit.in_features,):
            raise CircuitError(
                f"A circuit of {circuit.in_features} inputs does not fit operands of shape {read.shape}."
            )
        if circuit.parameters:
            raise CircuitError(f"A circuit with {circuit.parameters} parameters can't be copied into another one.")
        rows = read.reshape(-1, circuit.in_features)
        inner = circuit.nodes - circuit.in_features
        # Row c of `node` holds the nodes of copy c, under their numbers in the circuit.
        first = self._nodes + inner * np.arange(len(rows))[:, None]
        node = np.concatenate([rows, first + np.arange(inner)], axis=1)
        fan_in = np.diff(circuit.start)[circuit.in_features :]
        inside = np.where(circuit.operand >= 0, node[:, circuit.operand], -1)
        copies = len(rows)
        self._add(
            np.tile(circuit.kind[circuit.in_features :], copies),
            inside.ravel(),
            np.tile(circuit.weight, copies),
            np.full(inside.size, -1),
            np.tile(fan_in, copies),
        )
        return node[:, circuit.outputs].reshape(*read.shape[:-1], circuit.out_features)

    # ------------------------------------------------------------------------------------------------------- finish

    def build(self, outputs: ArrayLike) -> Circuit:
        """The circuit with these output nodes, flattened row-major. The builder can go on afterwards."""
        counts = np.concatenate(self._counts)
        return Circuit(
            kind=np.concatenate(self._kinds),
            start=starts(counts),
            operand=_concatenated(self._operands),
            weight=joined(self._weights),
            parameter=_concatenated(self._parameters),
            outputs=indices(outputs, "Outputs").ravel(),
            values=joined(self._values),
            groups=tuple(self._groups),
        )

    def _add(
        self, kind: Kind | NDArray[np.uint8], operands: Ints, weights: Numbers, parameters: Ints, counts: Ints
    ) -> Ints:
        """Append gates of ``counts`` operands each: their nodes."""
        nodes = np.arange(self._nodes, self._nodes + len(counts))
        if len(operands) and isinstance(kind, Kind) and kind is not Kind.CONSTANT:
            # Gates of one call may read each other, in their order.
            gate = np.repeat(nodes, counts) if operands.max() >= self._nodes else self._nodes
            wrong = operands[(operands < 0) | (operands >= gate)]
            if len(wrong):
                raise CircuitError(
                    f"An operand is node {wrong[0]}, but there are {self._nodes} nodes so far, from 0 on. A gate reads "
                    "earlier nodes only."
                )
        if len(parameters) and parameters.max() >= self._trained:
            raise CircuitError(f"A weight reads parameter {parameters.max()}; there are {self._trained} so far.")
        self._nodes += len(counts)
        self._kinds.append(np.full(len(counts), kind, np.uint8) if isinstance(kind, Kind) else kind)
        self._counts.append(counts)
        self._operands.append(operands)
        self._weights.append(weights)
        self._parameters.append(parameters)
        return nodes

    @staticmethod
    def _fitting(array: Numbers, operands: Ints, what: str) -> Numbers:
        try:
            return np.broadcast_to(array, operands.shape)
        except ValueError:
            raise CircuitError(f"The {what} of shape {array.shape} do not fit operands {operands.shape}.") from None


def _each(operands: Ints) -> Ints:
    """The number of operands of the gate of each row."""
    return np.full(math.prod(operands.shape[:-1]), operands.shape[-1])


def _concatenated(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)

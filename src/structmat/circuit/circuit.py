"""The intermediate representation: an arithmetic circuit in arrays.

A circuit is a directed acyclic graph. Its nodes are numbered so that every gate comes after what it reads:

- the inputs ``x[0] .. x[n - 1]`` are the nodes 0 .. n - 1;
- a **constant** is a number, or a parameter;
- a **sum** is ``sum over k of weight[k] * operand[k]``, with any number of terms (none: zero);
- a **product** multiplies at least one operand, a **quotient** divides its first operand by its second.

The weights of sums are constants of the circuit. Each is a number, or a number times a parameter: a trained value that
many weights may share. A circuit whose gates are all sums is *linear*: it computes ``x -> W x``.

Counts are those of the *binary form*, in which a gate has at most two operands: a sum ``alpha * g + beta * h``, a
product ``g * h``. A node of ``k`` operands is ``k - 1`` such gates (a sum of one term is one), arranged in the tree of
least depth. Counts of the nodes themselves, with unbounded fan-in, stand beside: ``circuit.wide``.

Source: Rudra, "Arithmetic Circuits, Structured Matrices and (not so) Deep Learning" (arXiv 2206.12490); Buergisser,
Clausen, Shokrollahi, "Algebraic Complexity Theory" (1997), chapters 4, 7 and 13.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structmat.circuit.arrays import Ints, Numbers, indices, joined, numbers, starts
from structmat.errors import CircuitError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from structmat.circuit.evaluate import Plan
    from structmat.circuit.fields import Field
    from structmat.circuit.kaleidoscope import Kaleidoscope
    from structmat.circuit.measure import Counts, Levels
    from structmat.circuit.module import CircuitModule
    from structmat.circuit.schedule import Layer


class Kind(enum.IntEnum):
    """What a node is."""

    INPUT = 0
    CONSTANT = 1
    SUM = 2
    PRODUCT = 3
    QUOTIENT = 4


@dataclass(frozen=True)
class Group:
    """A named array of parameters; the groups of a circuit number its parameters one after the other, row-major."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """An arithmetic circuit. The arrays are read-only; every transformation returns another circuit.

    Usually made by a :class:`~structmat.circuit.builder.Builder`, by
    :func:`~structmat.circuit.trace.trace`, or from the catalogue.

    Args:
        kind: (nodes,) of :class:`Kind`; the inputs come first.
        start: (nodes + 1,): the edges of node ``t`` are ``start[t] .. start[t + 1] - 1``.
        operand: (edges,) the node that the edge reads, smaller than the node it belongs to. A constant has one edge,
            whose operand is -1 and whose weight is its number.
        weight: (edges,) numbers: int64, float64, complex128, or objects (int, Fraction). 1 on the edges of products
            and quotients.
        parameter: (edges,) the parameter that multiplies the weight, or -1 for none.
        outputs: (outputs,) nodes, which may repeat.
        values: (parameters,) the parameters' current values.
        groups: names and shapes of the parameters.

    Raises:
        CircuitError: the arrays describe no circuit, for example because an operand does not come before its gate.
    """

    kind: NDArray[np.uint8]
    start: Ints
    operand: Ints
    weight: Numbers
    parameter: Ints
    outputs: Ints
    values: Numbers = field(default_factory=lambda: np.zeros(0))
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _frozen(indices(self.kind, "The kinds of nodes"), np.uint8))
        for name in ("start", "operand", "parameter", "outputs"):
            object.__setattr__(self, name, _frozen(indices(getattr(self, name), f"The entries of {name!r}")))
        object.__setattr__(self, "weight", _frozen(numbers(self.weight)))
        object.__setattr__(self, "values", _frozen(numbers(self.values)))
        if not self.groups and self.values.size:
            object.__setattr__(self, "groups", (Group("weight", (self.values.size,)),))
        from structmat.circuit.validation import validate

        validate(self)

    # ------------------------------------------------------------------------------------------------ constructors

    @classmethod
    def from_gates(
        cls,
        inputs: int,
        i: ArrayLike,
        j: ArrayLike,
        alpha: ArrayLike,
        beta: ArrayLike,
        outputs: ArrayLike,
    ) -> Circuit:
        """The linear circuit of the gates ``g[t] = alpha[t] * g[i[t]] + beta[t] * g[j[t]]``.

        Node ``inputs + t`` is gate ``t``. Where ``beta[t]`` is 0 the gate is a scaling, and where ``i[t] == j[t]`` it
        is the scaling by ``alpha[t] + beta[t]``.

        Raises:
            CircuitError: a gate reads itself or a later one, or an operand or output does not exist.
        """
        first, second = indices(i, "Operands").ravel(), indices(j, "Operands").ravel()
        left, right = (np.broadcast_to(numbers(w), first.shape) for w in (alpha, beta))
        same = first == second
        left, right = np.where(same, left + right, left), np.where(same, 0 * right, right)
        two = right != 0
        counts = np.concatenate([np.zeros(inputs, np.int64), 1 + two.astype(np.int64)])
        keep = np.stack([np.ones_like(two), two], axis=1).ravel()
        return cls(
            kind=np.concatenate([np.full(inputs, Kind.INPUT), np.full(len(first), Kind.SUM)]),
            start=starts(counts),
            operand=np.stack([first, second], axis=1).ravel()[keep],
            weight=np.stack([left, right], axis=1).ravel()[keep],
            parameter=np.full(int(counts.sum()), -1),
            outputs=np.asarray(outputs),
        )

    @classmethod
    def from_edges(
        cls,
        kind: ArrayLike,
        target: ArrayLike,
        operand: ArrayLike,
        outputs: ArrayLike,
        *,
        weight: ArrayLike = 1,
        parameter: ArrayLike = -1,
        values: ArrayLike = (),
        groups: Sequence[Group] = (),
    ) -> Circuit:
        """A circuit from edges in any order between nodes in any order: it is sorted here.

        Args:
            kind: (nodes,) what each node is. Inputs keep their order and become the first nodes.
            target: (edges,) the node that the edge belongs to. Among edges of one node the order is kept.
            operand: (edges,) the node that it reads, -1 for the edge of a constant.
            outputs: nodes.
            weight: numbers, one for each edge or for all.
            parameter: parameters of the edges, or -1.
            values: of the parameters.
            groups: of the parameters; by default they are one group named ``weight``.

        Raises:
            CircuitError: the edges contain a cycle, or describe no circuit for another reason.
        """
        from structmat.circuit.sort import sorted_circuit

        return sorted_circuit(kind, target, operand, outputs, weight, parameter, values, groups)

    # ------------------------------------------------------------------------------------------------- what it is

    @cached_property
    def in_features(self) -> int:
        """Number of inputs."""
        return int(np.count_nonzero(self.kind == Kind.INPUT))

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return len(self.outputs)

    @property
    def nodes(self) -> int:
        """Number of nodes, inputs and constants included."""
        return len(self.kind)

    @property
    def edges(self) -> int:
        """Number of operands of all gates together."""
        return len(self.operand) - int(np.count_nonzero(self.kind == Kind.CONSTANT))

    @cached_property
    def is_linear(self) -> bool:
        """Whether every gate that matters is a sum and no constant is added: the form of ``x -> W x``."""
        if np.all((self.kind == Kind.INPUT) | (self.kind == Kind.SUM)):
            return True
        from structmat.circuit.simplify import live

        kinds = self.kind[live(self)]
        return bool(np.all((kinds == Kind.INPUT) | (kinds == Kind.SUM)))

    @cached_property
    def levels(self) -> Levels:
        """The level of every node, unbounded fan-in: 0 for sources, else one more than the deepest operand."""
        from structmat.circuit.measure import levels

        return levels(self)

    @cached_property
    def counts(self) -> Counts:
        """What the binary form holds."""
        from structmat.circuit.measure import binary_counts

        return binary_counts(self)

    @cached_property
    def wide(self) -> Counts:
        """What the nodes as they are hold, with unbounded fan-in."""
        from structmat.circuit.measure import wide_counts

        return wide_counts(self)

    @cached_property
    def plan(self) -> Plan:
        """The order of evaluation and the memory that it takes."""
        from structmat.circuit.evaluate import plan

        return plan(self)

    @property
    def gates(self) -> int:
        """Gates of the binary form, inputs not counted."""
        return self.counts.gates

    @property
    def size(self) -> int:
        """Gates of the binary form and inputs: the size of the kaleidoscope theorem."""
        return self.counts.size

    @property
    def depth(self) -> int:
        """Longest path in gates of the binary form."""
        return self.counts.depth

    @property
    def multiplications(self) -> int:
        """Weights other than 1 and -1, and binary products."""
        return self.counts.multiplications

    @property
    def additions(self) -> int:
        """Binary additions: terms less one, of every sum."""
        return self.counts.additions

    @property
    def parameters(self) -> int:
        """Number of parameters, each once however many weights share it."""
        return len(self.values)

    def group(self, name: str) -> Numbers:
        """The values of a group of parameters, in its shape."""
        begin = 0
        for group in self.groups:
            if group.name == name:
                return self.values[begin : begin + group.size].reshape(group.shape)
            begin += group.size
        known = ", ".join(g.name for g in self.groups) or "none"
        raise CircuitError(f"The circuit has no parameters named {name!r}. It has: {known}.")

    def with_values(self, values: ArrayLike | Mapping[str, ArrayLike]) -> Circuit:
        """The same circuit with other values of its parameters: all in one array, or arrays by group."""
        if not isinstance(values, Mapping):
            array = numbers(values).ravel()
            if len(array) != self.parameters:
                raise CircuitError(f"The circuit has {self.parameters} parameters; got {len(array)} values.")
            return replace(self, values=array)
        unknown = set(values) - {group.name for group in self.groups}
        if unknown:
            self.group(min(unknown))
        parts = []
        for group in self.groups:
            part = numbers(values.get(group.name, self.group(group.name)))
            if part.shape != group.shape:
                raise CircuitError(f"Parameters {group.name!r} have shape {group.shape}; got {part.shape}.")
            parts.append(part.ravel())
        return replace(self, values=joined(parts))

    def __repr__(self) -> str:
        return f"<Circuit: {self.in_features} inputs, {self.nodes} nodes, {self.out_features} outputs>"

    def __str__(self) -> str:
        from structmat.circuit.summary import summary

        return summary(self)

    def _repr_svg_(self) -> str:
        return self.draw()

    # ---------------------------------------------------------------------------------------------------- evaluate

    def evaluate(self, x: ArrayLike, field: Field | None = None, *, parameters: ArrayLike | None = None) -> Numbers:
        """The outputs for one vector or a batch of rows.

        Args:
            x: (inputs,) or (batch, inputs).
            field: the arithmetic; None for floating point of the precision of ``x``, complex where a number is, and
                for exact rationals where ``x`` or a weight is an object (int, Fraction).
            parameters: (parameters,) values in place of the circuit's own.

        Returns:
            (outputs,) or (batch, outputs), numbers of the field.

        Cost: one multiply-add for each edge and vector, level by level; the memory is that of the values alive.

        Raises:
            CircuitError: the shape is wrong, a number is not in the field, or there is a division by zero.
        """
        from structmat.circuit.evaluate import evaluate

        return evaluate(self, x, field, parameters)

    def to_dense(self, field: Field | None = None) -> Numbers:
        """The matrix (outputs, inputs) of a linear circuit.

        Raises:
            CircuitError: the circuit is not linear.
        """
        from structmat.circuit.evaluate import to_dense

        return to_dense(self, field)

    # --------------------------------------------------------------------------------------------------- transform

    def binary(self) -> Circuit:
        """The binary form: every gate has one or two operands; its counts are unchanged."""
        from structmat.circuit.binary import binary

        return binary(self)

    def transpose(self) -> Circuit:
        """The circuit of the transposed matrix: every edge reversed. See :mod:`structmat.circuit.transpose`."""
        from structmat.circuit.transpose import transpose

        return transpose(self)

    @property
    def T(self) -> Circuit:
        """The transpose."""
        return self.transpose()

    def gradient(self, *, parameters: bool = False, value: bool = False) -> Circuit:
        """All partial derivatives of a single output. See :func:`structmat.circuit.gradient.gradient`."""
        from structmat.circuit.gradient import gradient

        return gradient(self, parameters=parameters, value=value)

    def vjp(self, *, parameters: bool = False, value: bool = False) -> Circuit:
        """The vector-Jacobian product. See :func:`structmat.circuit.gradient.vjp`."""
        from structmat.circuit.gradient import vjp

        return vjp(self, parameters=parameters, value=value)

    def jvp(self, *, value: bool = False) -> Circuit:
        """The Jacobian-vector product. See :func:`structmat.circuit.jvp.jvp`."""
        from structmat.circuit.jvp import jvp

        return jvp(self, value=value)

    def linear_part(self, at: ArrayLike | None = None, field: Field | None = None) -> Circuit:
        """The terms of degree 1 around a point. See :func:`structmat.circuit.linear_part.linear_part`."""
        from structmat.circuit.linear_part import linear_part

        return linear_part(self, at, field)

    def simplify(self) -> Circuit:
        """Fewer gates for the same function. See :func:`structmat.circuit.simplify.simplify`."""
        from structmat.circuit.simplify import simplify

        return simplify(self)

    def trainable(self, *, units: bool = False, tied: bool = False, name: str = "weight") -> Circuit:
        """The constants as parameters. See :func:`structmat.circuit.trainable.trainable`."""
        from structmat.circuit.trainable import trainable

        return trainable(self, units=units, tied=tied, name=name)

    def reschedule(self) -> Circuit:
        """The same gates in an order of narrow live ranges. See :func:`structmat.circuit.schedule.reschedule`."""
        from structmat.circuit.schedule import reschedule

        return reschedule(self)

    def layers(self) -> tuple[Layer, ...]:
        """Sparse matrices whose product is a linear circuit. See :func:`structmat.circuit.schedule.layers`."""
        from structmat.circuit.schedule import layers

        return layers(self)

    def kaleidoscope(self, *, recognize: bool = True) -> Kaleidoscope:
        """A linear circuit as a product of butterfly matrices.

        See :func:`structmat.circuit.kaleidoscope.compiler.kaleidoscope`.
        """
        from structmat.circuit.kaleidoscope import kaleidoscope

        return kaleidoscope(self, recognize=recognize)

    # ----------------------------------------------------------------------------------------------------- present

    def draw(self, path: str | Path | None = None, *, transposed: bool | None = None) -> str:
        """An SVG picture, written to ``path`` if given. See :func:`structmat.circuit.draw.draw`."""
        from structmat.circuit.draw import draw

        return draw(self, path, transposed=transposed)

    def to_c(self, name: str = "circuit") -> str:
        """The source of a stand-alone C function. See :func:`structmat.circuit.export_c.to_c`."""
        from structmat.circuit.export_c import to_c

        return to_c(self, name)

    def module(self, dtype: torch.dtype | None = None) -> CircuitModule:
        """The circuit as a trainable ``nn.Module``. See :class:`structmat.circuit.module.CircuitModule`."""
        from structmat.circuit.module import CircuitModule

        return CircuitModule(self, dtype)


def _frozen(array: Any, dtype: Any = None) -> Any:
    """A view that can't be written to; a copy only where the type is another."""
    view = np.asarray(array, dtype=dtype).view()
    view.flags.writeable = False
    return view

"""Circuits as PyTorch modules."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from structmat.circuit.arrays import Ints, Numbers, spread, starts
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.measure import level_edges
from structmat.circuit.simplify import prune
from structmat.errors import CircuitError


@dataclass(frozen=True)
class _Gates:
    """Gates of one kind and fan-in on one level: their edges are ``first .. first + count * fan_in - 1``."""

    kind: Kind
    fan_in: int
    count: int
    first: int


class CircuitModule(nn.Module):
    """A circuit whose parameters are trained: ``(..., inputs)`` to ``(..., outputs)``.

    The parameters keep the names and shapes of the circuit's groups (a dot in a name becomes an underscore); constants
    are buffers that are not saved. Between two levels there are only the values that are still needed. The forward pass
    is a fixed sequence of gathers and sums, so it can be compiled.

    Example:
        >>> from structmat.circuit import trace
        >>> layer = trace(lambda x, w: w @ x, 3, parameters={"w": [[1.0, 2.0, 3.0]]}).module()
        >>> layer(torch.ones(2, 3)).tolist()
        [[6.0], [6.0]]

    Args:
        circuit: any; the constants of one without parameters are made trainable by ``circuit.trainable()``.
        dtype: of parameters and constants; None for PyTorch's default, or the complex type of its precision if the
            circuit has complex numbers.

    Raises:
        CircuitError: two groups of parameters have the same name after dots are replaced.
    """

    def __init__(self, circuit: Circuit, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        circuit = prune(circuit)
        self._circuit = circuit
        is_complex = any(a.dtype.kind == "c" for a in (circuit.weight, circuit.values))
        dtype = dtype or torch.get_default_dtype()
        self.dtype = dtype.to_complex() if is_complex else dtype
        self._names = [group.name.replace(".", "_") for group in circuit.groups]
        if len(set(self._names)) < len(self._names):
            raise CircuitError(f"Groups of parameters have the same name once dots are underscores: {self._names}.")
        for name, group in zip(self._names, circuit.groups, strict=True):
            values = self._tensor(circuit.group(group.name))
            self.register_parameter(name, nn.Parameter(values.reshape(group.shape)))
        self._compile(circuit)

    def _tensor(self, values: Numbers) -> Tensor:
        if values.dtype == object:
            values = values.astype(complex if self.dtype.is_complex else float)
        return torch.tensor(np.asarray(values)).to(self.dtype)

    def _compile(self, circuit: Circuit) -> None:
        """The gathers of every level, as buffers."""
        levels = list(circuit.levels)
        last = np.full(circuit.nodes, -1)
        for level, nodes in enumerate(levels):
            read = circuit.operand[level_edges(circuit, nodes)[1]]
            last[read[read >= 0]] = level
        last[circuit.outputs] = len(levels)
        alive = levels[0]
        constants = alive[circuit.kind[alive] != Kind.INPUT]
        alive = np.concatenate([np.arange(circuit.in_features), constants])
        filled = np.diff(circuit.start)[constants] > 0
        order = [circuit.start[constants[filled]]]
        self._constants = (len(constants), filled.nonzero()[0].tolist())
        self._levels: list[list[_Gates]] = []
        position = np.full(circuit.nodes, -1)
        count = len(order[0])
        for level, nodes in enumerate(levels[1:], start=1):
            position[alive] = np.arange(len(alive))
            kept = alive[last[alive] > level]
            groups, reads, rows = [], [], [kept]
            for kind, fan_in, members in _grouped(circuit, nodes):
                edges = spread(circuit.start[members], np.full(len(members), fan_in))
                groups.append(_Gates(kind, fan_in, len(members), count))
                order.append(edges)
                reads.append(position[circuit.operand[edges]])
                rows.append(members)
                count += len(edges)
            self._levels.append(groups)
            self.register_buffer(f"_kept{level}", torch.from_numpy(position[kept]), persistent=False)
            self.register_buffer(f"_reads{level}", torch.from_numpy(np.concatenate(reads)), persistent=False)
            alive = np.concatenate(rows)
        position[alive] = np.arange(len(alive))
        self.register_buffer("_outputs", torch.from_numpy(position[circuit.outputs]), persistent=False)
        edges = np.concatenate(order)
        self.register_buffer("_weight", self._tensor(circuit.weight[edges]), persistent=False)
        self.register_buffer("_parameter", torch.from_numpy(circuit.parameter[edges] + 1), persistent=False)
        self._trained = bool(circuit.parameters)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for vectors along the last axis."""
        circuit = self._circuit
        if x.shape[-1] != circuit.in_features:
            raise CircuitError(f"The circuit has {circuit.in_features} inputs; got values of shape {tuple(x.shape)}.")
        batch = x.shape[:-1]
        weight = self._effective_weights()
        dtype = torch.promote_types(x.dtype, weight.dtype)
        state = x.reshape(math.prod(batch), circuit.in_features).T.to(dtype)
        weight = weight.to(dtype)
        count, filled = self._constants
        if count:
            values = weight.new_zeros(count)
            places = torch.tensor(filled, dtype=torch.int64, device=x.device)
            values = values.index_put((places,), weight[: len(filled)])
            state = torch.cat([state, values[:, None].expand(-1, state.shape[1])])
        for level, groups in enumerate(self._levels, start=1):
            read = state.index_select(0, self.get_buffer(f"_reads{level}"))
            parts = [state.index_select(0, self.get_buffer(f"_kept{level}"))]
            begin = 0
            for gates in groups:
                size = gates.count * gates.fan_in
                operands = read[begin : begin + size].reshape(gates.count, gates.fan_in, -1)
                parts.append(_apply(gates, operands, weight[gates.first : gates.first + size]))
                begin += size
            state = torch.cat(parts)
        return state.index_select(0, self.get_buffer("_outputs")).T.reshape(*batch, circuit.out_features)

    def _effective_weights(self) -> Tensor:
        constant = self.get_buffer("_weight")
        if not self._trained:
            return constant
        values = [self.get_parameter(name).reshape(-1) for name in self._names]
        return constant * torch.cat([constant.new_ones(1), *values])[self.get_buffer("_parameter")]

    def circuit(self) -> Circuit:
        """The circuit with the current values of the parameters."""
        values = [self.get_parameter(name).detach().cpu().reshape(-1).numpy() for name in self._names]
        return self._circuit.with_values(np.concatenate(values)) if values else self._circuit

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        c = self._circuit
        return f"{c.in_features} -> {c.out_features}, {c.gates} gates, depth {c.depth}"


def _grouped(circuit: Circuit, nodes: Ints) -> list[tuple[Kind, int, Ints]]:
    """The nodes of a level by kind and fan-in."""
    fan_in = np.diff(circuit.start)[nodes]
    key = circuit.kind[nodes].astype(np.int64) + 8 * fan_in
    order = np.argsort(key, kind="stable")
    begin = starts(np.unique(key, return_counts=True)[1])
    groups = []
    for first, end in itertools.pairwise(begin):
        members = nodes[order[first:end]]
        groups.append((Kind(circuit.kind[members[0]]), int(fan_in[order[first]]), members))
    return groups


def _apply(gates: _Gates, operands: Tensor, weight: Tensor) -> Tensor:
    """The gates' values (gates, batch) from their operands (gates, fan-in, batch)."""
    if gates.kind == Kind.PRODUCT:
        return operands.prod(dim=1)
    if gates.kind == Kind.QUOTIENT:
        return operands[:, 0] / operands[:, 1]
    factors = weight.reshape(gates.count, gates.fan_in, 1)
    if gates.fan_in <= 4:
        total = factors[:, 0] * operands[:, 0]
        for term in range(1, gates.fan_in):
            total = torch.addcmul(total, factors[:, term], operands[:, term])
        return total
    return (factors * operands).sum(dim=1)

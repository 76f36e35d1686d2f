"""The transposition principle: reverse every edge."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import owners
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.evaluate import require_linear
from structmat.circuit.rebuild import from_parts, without_copies
from structmat.circuit.simplify import prune


def transpose(circuit: Circuit) -> Circuit:
    """The linear circuit of the transposed matrix, with the same constants and parameters.

    The inputs are the old outputs, and each node sums over the edges that read it. Laws, for a matrix of ``p`` outputs
    and ``q`` inputs without a zero row or column, after dead gates are dropped: the multiplications are equal, and the
    additions change by exactly ``p - q``. A node that ``f`` edges read becomes a sum of ``f`` terms, at most
    ``ceil(log2 f)`` levels deep; so the depth is at most ``(d + 1) * max(1, ceil(log2 f))`` for the largest ``f``.

    Cost: linear in the edges.

    Source: Bordewijk 1956; Kalman; Buergisser, Clausen, Shokrollahi, "Algebraic Complexity Theory", theorem 13.20.

    Raises:
        CircuitError: the circuit is not linear.
    """
    require_linear(circuit, "transpose")
    circuit = prune(circuit)
    sinks, nodes = circuit.out_features, circuit.nodes
    # Node v becomes node `sinks + nodes - 1 - v`: whatever read it now comes before it.
    last = sinks + nodes - 1
    target = np.concatenate([last - circuit.outputs, last - circuit.operand])
    operand = np.concatenate([np.arange(sinks), last - owners(circuit.start)])
    ones = np.ones(sinks, dtype=circuit.weight.dtype)
    reversed_circuit = from_parts(
        kind=np.concatenate([np.full(sinks, Kind.INPUT), np.full(nodes, Kind.SUM)]).astype(np.uint8),
        target=target,
        operand=operand,
        weight=np.concatenate([ones, circuit.weight]),
        parameter=np.concatenate([np.full(sinks, -1), circuit.parameter]),
        outputs=last - np.arange(circuit.in_features),
        values=circuit.values,
        groups=circuit.groups,
    )
    return prune(without_copies(reversed_circuit))

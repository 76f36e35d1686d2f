"""Circuits of Python functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.builder import Builder
from structmat.circuit.circuit import Circuit
from structmat.circuit.linear_part import linear_circuit
from structmat.circuit.tracer import Tracer, as_tracer, parameter_tracer
from structmat.errors import CircuitError


def trace(
    function: Callable[..., Any],
    shape: int | tuple[int, ...],
    *,
    parameters: Mapping[str, ArrayLike] | None = None,
    linear: bool = False,
) -> Circuit:
    """The circuit of a function of arrays, gate by gate.

    The function is called once with a :class:`~structmat.circuit.tracer.Tracer` in place of its argument. It may use
    arithmetic, matrix products, NumPy functions that sum or move entries, and any loop that does not depend on values.

    Example: differences of neighbours, and a polynomial.

        >>> trace(lambda x: x[1:] - x[:-1], 4).to_dense().tolist()
        [[-1, 1, 0, 0], [0, -1, 1, 0], [0, 0, -1, 1]]
        >>> trace(lambda x: (x[0] + x[1]) ** 2, 2).evaluate([3, 4]).tolist()
        [49.0]

    Args:
        function: of one array; with ``parameters`` they come as keyword arguments.
        shape: of the argument; its entries in row-major order are the circuit's inputs.
        parameters: arrays by name whose entries become parameters of the circuit.
        linear: ask for a linear circuit. A function that computes a linear map by products is brought into that form.

    Returns:
        A circuit whose outputs are the entries of what the function returns: an array, or a sequence of arrays.

    Raises:
        CircuitError: the function is not polynomial (or rational), or not linear where that is asked for.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    builder = Builder(int(np.prod(sizes)))
    x = as_tracer(builder, builder.inputs.reshape(sizes))
    trained = {name: parameter_tracer(builder, name, values) for name, values in (parameters or {}).items()}
    try:
        result = function(x, **trained)
    except ValueError as error:
        # Where an array of floats is filled with traced values, NumPy puts an error of its own before ours.
        if isinstance(error.__cause__, CircuitError):
            raise error.__cause__ from None
        raise
    circuit = builder.build(output_nodes(x, result))
    return linear_circuit(circuit) if linear else circuit


def output_nodes(x: Tracer, result: Any) -> np.ndarray:
    """The nodes of what a traced function returned."""
    if isinstance(result, list | tuple):
        return np.concatenate([output_nodes(x, r) for r in result]) if result else np.zeros(0, np.int64)
    if not isinstance(result, Tracer) and not isinstance(result, np.ndarray | int | float | complex | np.generic):
        raise CircuitError(f"A traced function returns arrays; got {type(result).__name__}.")
    return x.lift(result).nodes().ravel()

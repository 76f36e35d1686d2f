"""Complex values inside real PyTorch functions, as pairs of real values.

A convolution by ``irfft(rfft(x) * spectrum)`` is linear over the real numbers, but its last step is not linear over the
complex ones: it drops imaginary parts. So complex values between a real input and a real result are followed as two
real values each. Products of traced values are written out; every other operation is linear over the real numbers, or
it has no circuit, and a test of its matrix tells which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structmat.circuit.torch_trees import leaves, mapped
from structmat.circuit.tracer import Tracer, concatenated, stacked
from structmat.circuit.tracer_matrix import by_matrix
from structmat.errors import CircuitError


@dataclass(frozen=True, eq=False)
class Pair:
    """An array of complex values: real parts and imaginary parts along a last axis of 2."""

    parts: Tracer

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the complex array."""
        return self.parts.shape[:-1]


def needs_pairs(graph: torch.fx.GraphModule, dtype: torch.dtype) -> bool:
    """Whether a function of real values has complex ones on the way to results that are all real."""
    results = [a for node in graph.graph.nodes if node.op == "output" for a in node.all_input_nodes]
    complexes = [node for node in graph.graph.nodes if node.op == "call_function" and is_complex(node)]
    return bool(complexes) and not dtype.is_complex and not any(map(is_complex, results))


def is_complex(node: torch.fx.Node) -> bool:
    """Whether the value of an operation is a complex tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def called(x: Tracer, node: torch.fx.Node, target: Any, name: str, args: Any, kwargs: Any) -> Any:
    """One operation of which an argument or the result is complex.

    Raises:
        CircuitError: it is neither a product nor linear over the real numbers.
    """
    traced = [a for a in leaves((args, kwargs)) if isinstance(a, Tracer | Pair)]
    product = _PRODUCTS.get(name)
    if product is not None and len(traced) == 2:
        return _multiplied(x, product, *args[:2])
    flat = concatenated([_real(leaf).ravel() for leaf in traced])

    def function(array: np.ndarray) -> np.ndarray:
        rest = torch.from_numpy(np.ascontiguousarray(array))
        tensors = []
        for leaf in traced:
            part, rest = rest[: _real(leaf).size], rest[_real(leaf).size :]
            shaped = part.reshape(_real(leaf).shape)
            tensors.append(torch.view_as_complex(shaped) if isinstance(leaf, Pair) else shaped)
        given = iter(tensors)
        fill = mapped((args, kwargs), lambda leaf: next(given) if isinstance(leaf, Tracer | Pair) else leaf)
        result = target(*fill[0], **fill[1])
        if not isinstance(result, Tensor):
            raise CircuitError(f"{name} of complex values gives several results, so it can't be traced.")
        return (torch.view_as_real(result.resolve_conj()) if result.is_complex() else result).numpy()

    made = by_matrix(flat, function, name)
    return Pair(made) if is_complex(node) else made


def _multiplied(x: Tracer, product: Callable[[Tracer, Tracer], Tracer], first: Any, second: Any) -> Pair:
    """Four products and two sums, or two products where a factor is real."""
    if not isinstance(second, Pair):
        parts = [product(part, second) for part in _both(first)]
    elif not isinstance(first, Pair):
        parts = [product(first, part) for part in _both(second)]
    else:
        (a, b), (c, d) = _both(first), _both(second)
        parts = [product(a, c) - product(b, d), product(a, d) + product(b, c)]
    return Pair(stacked(x.builder, parts))


def _both(pair: Pair) -> tuple[Tracer, Tracer]:
    """Real parts and imaginary parts."""
    return pair.parts[..., 0], pair.parts[..., 1]


_PRODUCTS: dict[str, Callable[[Tracer, Tracer], Tracer]] = {
    "mul": lambda a, b: a * b,
    "mm": lambda a, b: a @ b,
    "bmm": lambda a, b: a @ b,
    "mv": lambda a, b: a @ b,
    "dot": lambda a, b: a @ b,
}


def _real(leaf: Any) -> Tracer:
    """The real values that a traced argument holds."""
    values: Tracer = leaf.parts if isinstance(leaf, Pair) else leaf
    return values

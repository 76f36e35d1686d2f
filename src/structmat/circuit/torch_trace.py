"""Circuits of PyTorch functions and modules.

The function is decomposed by PyTorch into its core operations (``make_fx``), and these are followed one by one. What
only moves entries is run on an array of places; arithmetic makes gates; a Fourier transform is the fast algorithm;
anything else of one traced argument, an interpolation for example, is replaced by its matrix if a test shows it to be
linear. Complex values on the way to a real result are pairs of real ones, and transforms of them their matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from structmat.circuit.builder import Builder
from structmat.circuit.circuit import Circuit
from structmat.circuit.linear_part import linear_circuit
from structmat.circuit.torch_complex import Pair, called, is_complex, needs_pairs
from structmat.circuit.torch_trees import leaves, mapped
from structmat.circuit.trace import output_nodes
from structmat.circuit.tracer import Tracer, as_tracer, concatenated, parameter_tracer
from structmat.circuit.tracer_matrix import by_matrix
from structmat.circuit.tracer_numpy import transformed
from structmat.errors import CircuitError


def trace_torch(
    function: Callable[..., Any] | nn.Module,
    shape: int | tuple[int, ...],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    linear: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Circuit:
    """The circuit of a PyTorch function or module, operation by operation.

    Args:
        function: of one tensor. With ``parameters``: called with them as keyword arguments, or, if a module, with them
            in place of its own parameters of these names (``dict(module.named_parameters())``).
        shape: of the argument, with a batch axis of 1 where the function wants one; its entries in row-major order are
            the circuit's inputs.
        parameters: tensors by name whose entries become parameters of the circuit. Others are constants.
        linear: ask for a linear circuit, as in :func:`~structmat.circuit.trace.trace`.
        dtype: of the tensor that the function is run with; a module's parameters are converted to it for the run.

    Returns:
        A circuit whose outputs are the entries of the returned tensor, or of the returned tensors in turn.

    Raises:
        CircuitError: an operation is not polynomial, or not linear where that is asked for.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    given = {name: value.detach().to(dtype) for name, value in (parameters or {}).items()}
    graph = _graph(function, torch.zeros(sizes, dtype=dtype), given)
    builder = Builder(int(np.prod(sizes)))
    x = as_tracer(builder, builder.inputs.reshape(sizes))
    trained = [parameter_tracer(builder, name, value.numpy()) for name, value in given.items()]
    circuit = builder.build(output_nodes(x, _Interpreter(graph, x, dtype).run([x, *trained])))
    return linear_circuit(circuit) if linear else circuit


def _graph(function: Any, x: Tensor, parameters: Mapping[str, Tensor]) -> torch.fx.GraphModule:
    """The core operations of the function, without changes in place."""
    names = list(parameters)

    def call(x: Tensor, *values: Tensor) -> Any:
        replaced = dict(zip(names, values, strict=True))
        if isinstance(function, nn.Module):
            rest = {n: t.detach() for n, t in (*function.named_parameters(), *function.named_buffers())}
            same = {n: t.to(x.dtype) if t.is_floating_point() else t for n, t in rest.items()}
            return torch.func.functional_call(function, {**same, **replaced}, (x,))
        return function(x, **replaced)

    with torch.no_grad():
        plain = torch.func.functionalize(call, remove="mutations_and_views")
        try:
            traced = make_fx(plain, decomposition_table=dict(core_aten_decompositions()))(x, *parameters.values())
        except CircuitError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].split(" - ")[0]
            raise CircuitError(
                f"PyTorch can't take the function apart ({reason}). What a traced function does may not depend on the "
                "values of its inputs."
            ) from error
    return traced


class _Interpreter(torch.fx.Interpreter):
    """Runs the operations on tracers where an argument is one, on tensors otherwise."""

    def __init__(self, graph: torch.fx.GraphModule, x: Tracer, dtype: torch.dtype) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.x = x
        self.pairs = needs_pairs(graph, dtype)

    def run(self, inputs: list[Any]) -> Any:  # type: ignore[override]
        """The returned values, tensors as arrays."""
        result = super().run(*inputs, enable_io_processing=False)
        return _as_arrays(result)

    def run_node(self, n: torch.fx.Node) -> Any:
        """One node of the graph, which `call_function` looks at."""
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        given = leaves((args, kwargs))
        if not any(isinstance(a, Tracer | Pair) for a in given):
            return target(*args, **kwargs)
        if getattr(target, "__name__", "") == "getitem":
            return target(*args)
        name = target.overloadpacket.__name__
        if self.pairs and (is_complex(self.node) or any(isinstance(a, Pair) for a in given)):
            return called(self.x, self.node, target, name, args, kwargs)
        if name in _MOVES:
            return _moved(self.x, target, args, kwargs)
        if name in _COPIES:
            return _copied(args[0], name, args[1:], kwargs)
        handler = _FUNCTIONS.get(name)
        if handler is not None:
            return handler(self.x, *(_as_arrays(a) for a in args), **{k: _as_arrays(v) for k, v in kwargs.items()})
        return _by_matrix(target, name, args, kwargs)


def _as_arrays(tree: Any) -> Any:
    """Tensors as NumPy arrays; the rest as it is."""
    return mapped(tree, lambda leaf: leaf.detach().numpy() if isinstance(leaf, Tensor) else leaf)


def _moved(x: Tracer, target: Any, args: Any, kwargs: Any) -> Any:
    """An operation that moves entries: run on numbers of entries, of all traced and constant arguments together.

    Place 0 is the number 0, which padding and empty tensors hold.
    """
    name = target.overloadpacket.__name__
    filled = name in ("constant_pad_nd", "scatter") and any(isinstance(a, float | int) and a for a in args[-1:])
    added = name == "index_put" and (kwargs.get("accumulate") or args[3:4] == (True,))
    if (filled and len(args) > 2) or added or "reduce" in kwargs or (name == "scatter" and len(args) > 4):
        raise CircuitError(f"{name} that adds or fills with a number is not traced. Write it as a sum.")
    parts: list[Tracer] = []
    count = 1

    def places(leaf: Any) -> Any:
        nonlocal count
        # Integers are indices where the operation takes some; other constants are values that move along.
        if isinstance(leaf, Tensor) and leaf.dtype in _INDICES.get(name, ()):
            return leaf
        if not isinstance(leaf, Tensor | Tracer):
            return leaf
        part = x.lift(leaf.numpy() if isinstance(leaf, Tensor) else leaf)
        parts.append(part.reshape(-1))
        numbered = torch.arange(count, count + part.size).reshape(part.shape)
        count += part.size
        return numbered

    moved = target(*mapped(args, places), **mapped(kwargs, places))
    everything = concatenated(parts)
    return mapped(moved, lambda leaf: everything.take(leaf.numpy() - 1) if isinstance(leaf, Tensor) else leaf)


def _copied(x: Tracer, name: str, args: Any, kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        raise CircuitError(f"A conversion to {dtype} is not polynomial, so it has no circuit.")
    return x


def _by_matrix(target: Any, name: str, args: Any, kwargs: Any) -> Any:
    traced = [a for a in leaves((args, kwargs)) if isinstance(a, Tracer)]
    if len(traced) != 1 or any(isinstance(a, Tracer) for a in kwargs.values()):
        raise CircuitError(
            f"{name} of {len(traced)} traced arguments is not known to be polynomial, so it has no circuit."
        )

    def function(array: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        result = target(*mapped(args, lambda leaf: tensor if isinstance(leaf, Tracer) else leaf), **kwargs)
        if not isinstance(result, Tensor):
            raise CircuitError(f"{name} gives several results and has no gates of its own, so it can't be traced.")
        return result.numpy()

    return by_matrix(traced[0], function, name)


def _product(a: Tracer, dim: int | None, keepdim: bool) -> Tracer:
    result = a.prod(dim)
    return result.move(np.expand_dims, dim) if keepdim and dim is not None else result


def _fourier(x: Tracer, a: Any, dim: Any, normalization: int, forward: bool, onesided: bool = False) -> Tracer:
    """The fast algorithm along each axis; ``normalization`` says whether 1, the root of n or n divides."""
    result = x.lift(a)
    for axis in dim:
        result = transformed(result, axis, inverse=not forward)
    count = math.prod(result.shape[axis] for axis in dim)
    divisor = (1, math.sqrt(count), count)[normalization] / (1 if forward else count)
    kept = result.shape[dim[-1]] // 2 + 1 if onesided else result.shape[dim[-1]]
    result = result.move(np.take, np.arange(kept), dim[-1])
    return result if divisor == 1 else result / divisor


def _axes(dim: Any) -> Any:
    return None if dim is None or dim == [] else tuple(dim) if isinstance(dim, list | tuple) else dim


def _convolution(x: Tracer, *args: Any) -> Tracer:
    """A convolution whose weight may be traced: entries of input windows times the weight, summed."""
    data, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed or not isinstance(weight, Tracer):
        raise AssertionError("handled by its matrix")
    axes = len(stride)
    source, kernel = x.lift(data), x.lift(weight)
    places = np.arange(source.size).reshape(source.shape)
    places = np.pad(places, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=-1)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(places, spans, axis=tuple(range(2, 2 + axes)))
    steps = [1, 1, *stride, *dilation]
    windows = windows[tuple(slice(None, None, step) for step in steps)]
    batch, channels, *out = windows.shape[: 2 + axes]
    inside = channels // groups
    # (batch, groups, places, inside * kernel) times (groups, outputs, inside * kernel)
    shaped = np.moveaxis(windows.reshape(batch, groups, inside, *windows.shape[2:]), 2, 2 + axes)
    columns = source.take(shaped.reshape(batch, groups, int(np.prod(out)), -1))
    rows = kernel.reshape(groups, kernel.shape[0] // groups, -1)
    result = columns @ rows.move(np.swapaxes, -1, -2)
    result = result.move(np.swapaxes, -1, -2).reshape(batch, kernel.shape[0], *out)
    return result if bias is None else result + x.lift(bias).reshape(-1, *([1] * axes))


def _convolved(x: Tracer, *args: Any) -> Tracer:
    data, weight, bias = args[:3]
    if isinstance(weight, Tracer) and not args[6]:
        return _convolution(x, *args)
    if isinstance(weight, Tracer) or isinstance(bias, Tracer):
        raise CircuitError(
            "A transposed convolution with parameters is not traced. Leave its weight and bias out of them."
        )
    tensors = [torch.from_numpy(w) if w is not None else None for w in (weight, bias)]
    run = torch.ops.aten.convolution
    return by_matrix(
        x.lift(data), lambda array: run(torch.from_numpy(array), *tensors, *args[3:]).numpy(), "convolution"
    )


_MOVES = {
    "as_strided", "as_strided_copy", "as_strided_scatter", "cat", "constant_pad_nd", "diagonal", "diagonal_copy",
    "diagonal_scatter", "expand", "expand_copy", "flip", "gather", "index", "index_put", "index_select", "movedim",
    "narrow", "permute", "permute_copy", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d",
    "repeat", "repeat_interleave", "replication_pad1d", "replication_pad2d", "reshape", "roll", "scatter", "select",
    "select_copy", "select_scatter", "slice", "slice_copy", "slice_scatter", "split", "split_copy", "split_with_sizes",
    "split_with_sizes_copy", "squeeze", "squeeze_copy", "stack", "t", "t_copy", "transpose", "transpose_copy", "tril",
    "triu", "unbind", "unbind_copy", "unfold", "unfold_copy", "unsqueeze", "unsqueeze_copy", "view", "view_copy",
    "_unsafe_view", "where",
}  # fmt: skip
"""Operations whose result holds entries of their arguments, and zeros, and nothing else."""

_INDICES: dict[str, tuple[torch.dtype, ...]] = {
    "where": (torch.bool,),
    "index": (torch.int64, torch.int32, torch.bool),
    "index_put": (torch.int64, torch.int32, torch.bool),
    "index_select": (torch.int64, torch.int32),
    "gather": (torch.int64,),
    "scatter": (torch.int64,),
    "repeat_interleave": (torch.int64, torch.int32),
}
"""Types of the arguments that say where entries go."""

_COPIES = {
    "_to_copy", "alias", "alias_copy", "clone", "contiguous", "detach", "detach_copy", "lift_fresh", "lift_fresh_copy",
    "to",
}  # fmt: skip

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, a, b, alpha=1: x.lift(a) + x.lift(b) * alpha,
    "sub": lambda x, a, b, alpha=1: x.lift(a) - x.lift(b) * alpha,
    "rsub": lambda x, a, b, alpha=1: x.lift(b) - x.lift(a) * alpha,
    "mul": lambda x, a, b: x.lift(a) * b,
    "div": lambda x, a, b: x.lift(a) / b,
    "neg": lambda x, a: -a,
    "reciprocal": lambda x, a: 1 / a,
    "square": lambda x, a: a * a,
    "pow": lambda x, a, b: x.lift(a) ** b,
    "prod": lambda x, a, dim=None, keepdim=False, dtype=None: _product(a, dim, keepdim),
    "sum": lambda x, a, dim=None, keepdim=False, dtype=None: a.sum(_axes(dim), keepdim),
    "mean": lambda x, a, dim=None, keepdim=False, dtype=None: a.mean(_axes(dim), keepdim),
    "cumsum": lambda x, a, dim, dtype=None: np.cumsum(a, axis=dim),
    "mm": lambda x, a, b: x.lift(a) @ b,
    "bmm": lambda x, a, b: x.lift(a) @ b,
    "mv": lambda x, a, b: x.lift(a) @ b,
    "dot": lambda x, a, b: x.lift(a) @ b,
    "addmm": lambda x, c, a, b, beta=1, alpha=1: x.lift(c) * beta + (x.lift(a) @ b) * alpha,
    "baddbmm": lambda x, c, a, b, beta=1, alpha=1: x.lift(c) * beta + (x.lift(a) @ b) * alpha,
    "addmv": lambda x, c, a, b, beta=1, alpha=1: x.lift(c) * beta + (x.lift(a) @ b) * alpha,
    "convolution": _convolved,
    "_fft_c2c": _fourier,
    "_fft_r2c": lambda x, a, dim, normalization, onesided: _fourier(x, a, dim, normalization, True, onesided),
    "copy": lambda x, a, b, non_blocking=False: x.lift(b).move(np.broadcast_to, np.shape(a)),
    "fill": lambda x, a, value: x.lift(value).move(np.broadcast_to, np.shape(a)),
    "zeros_like": lambda x, a, **_: torch.zeros(a.shape, dtype=torch.float64),
    "ones_like": lambda x, a, **_: torch.ones(a.shape, dtype=torch.float64),
    "full_like": lambda x, a, value, **_: torch.full(a.shape, float(value), dtype=torch.float64),
    "new_zeros": lambda x, a, size, **_: torch.zeros(size, dtype=torch.float64),
    "new_ones": lambda x, a, size, **_: torch.ones(size, dtype=torch.float64),
    "new_full": lambda x, a, size, value, **_: torch.full(size, float(value), dtype=torch.float64),
}

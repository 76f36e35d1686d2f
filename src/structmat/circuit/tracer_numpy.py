"""What NumPy's functions do to a tracer: what only moves entries, arithmetic, and functions written with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from structmat.circuit.arrays import common_type, starts
from structmat.circuit.builder import Builder
from structmat.circuit.tracer import Tracer, as_tracer, concatenated, stacked
from structmat.errors import CircuitError


def moved(x: Tracer, function: Any, args: Any, kwargs: Any) -> Any:
    """A function that moves entries, of one array or of a sequence of arrays, on each of the three arrays."""
    first, *rest = args
    if isinstance(first, Tracer):
        return _same_structure(
            x.builder, *(function(a, *rest, **kwargs) for a in (first.node, first.scale, first.parameter))
        )
    parts = [x.lift(p) for p in first]
    dtype = common_type(*(p.scale for p in parts))
    columns = ([p.node for p in parts], [p.scale.astype(dtype) for p in parts], [p.parameter for p in parts])
    return _same_structure(x.builder, *(function(c, *rest, **kwargs) for c in columns))


def _same_structure(builder: Builder, node: Any, scale: Any, parameter: Any) -> Any:
    """Lists of arrays become lists of tracers."""
    if isinstance(node, list | tuple):
        return [_same_structure(builder, *parts) for parts in zip(node, scale, parameter, strict=True)]
    return Tracer(builder, np.asarray(node), np.asarray(scale), np.asarray(parameter))


def _einsum(x: Tracer, subscripts: str, *operands: Any) -> Tracer:
    """Axes aligned by letter, multiplied, summed."""
    if "." in subscripts:
        raise CircuitError(f"einsum({subscripts!r}) with an ellipsis can't be traced. Name all axes.")
    terms, arrow, output = subscripts.replace(" ", "").partition("->")
    names = terms.split(",")
    letters = "".join(names)
    if not arrow:
        output = "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    order = output + "".join(sorted(set(letters) - set(output)))
    product: Tracer | None = None
    for name, operand in zip(names, operands, strict=True):
        aligned = x.lift(operand)
        for letter in dict.fromkeys(name):
            while name.count(letter) > 1:
                first, second = name.index(letter), name.rindex(letter)
                aligned = aligned.move(np.diagonal, 0, first, second)
                name = name[:first] + name[first + 1 : second] + name[second + 1 :] + letter
        kept = [a for a in order if a in name]
        aligned = aligned.transpose(tuple(name.index(a) for a in kept))
        shape = tuple(aligned.shape[kept.index(a)] if a in name else 1 for a in order)
        aligned = aligned.reshape(shape)
        product = aligned if product is None else product * aligned
    if product is None:
        raise CircuitError("einsum needs operands.")
    summed = tuple(range(len(output), len(order)))
    return product.sum(axis=summed) if summed else product


def _pad(x: Tracer, array: Tracer, width: Any, mode: str = "constant", **kwargs: Any) -> Tracer:
    places = np.arange(array.size).reshape(array.shape)
    if mode == "constant":
        if np.any(kwargs.get("constant_values", 0)):
            raise CircuitError("np.pad is traced with zeros only.")
        return array.take(np.pad(places, width, constant_values=-1))
    return array.take(np.pad(places, width, mode=mode, **kwargs))  # type: ignore[call-overload]


def _cumsum(x: Tracer, array: Tracer, axis: int | None = None) -> Tracer:
    """One after the other, as NumPy does."""
    values = _first_axis(array, axis)
    if len(values) < 2 or np.any((values.node < 0) | np.asarray(values.scale == 0, dtype=bool)):
        return _accumulated(x, array, axis, Tracer.__add__)
    # All at once: each sum reads the one before it, whose number is known.
    width = values[0].size
    made = x.builder.nodes + np.arange(values.size - width).reshape(values[1:].shape)
    first = Tracer(x.builder, made[:-1], np.ones(made[:-1].shape, np.int64), np.full(made[:-1].shape, -1))
    before = concatenated([values[:1], first])
    terms = stacked(x.builder, [before, values[1:]])
    sums = as_tracer(x.builder, x.builder.sums(terms.node, terms.scale, parameters=terms.parameter))
    return concatenated([values[:1], sums]).move(np.moveaxis, 0, 0 if axis is None else axis)


def _first_axis(array: Tracer, axis: int | None) -> Tracer:
    """The axis moved to the front, or all entries."""
    return array.ravel() if axis is None else array.move(np.moveaxis, axis, 0)


def _accumulated(x: Tracer, array: Tracer, axis: int | None, step: Callable[[Tracer, Tracer], Tracer]) -> Tracer:
    values = _first_axis(array, axis)
    rows = [values[0]]
    for row in range(1, len(values)):
        rows.append(step(rows[-1], values[row]))
    return stacked(x.builder, rows, 0).move(np.moveaxis, 0, 0 if axis is None else axis)


def _diff(x: Tracer, array: Tracer, n: int = 1, axis: int = -1) -> Tracer:
    for _ in range(n):
        values = array.move(np.moveaxis, axis, -1)
        array = (values[..., 1:] - values[..., :-1]).move(np.moveaxis, -1, axis)
    return array


def _kron(x: Tracer, a: Any, b: Any) -> Tracer:
    first, second = x.lift(a), x.lift(b)
    if first.ndim != second.ndim:
        raise CircuitError(f"np.kron is traced for arrays of as many axes; got {first.ndim} and {second.ndim}.")
    axes = range(first.ndim)
    left = first.reshape(tuple(n for a in axes for n in (first.shape[a], 1)))
    right = second.reshape(tuple(n for a in axes for n in (1, second.shape[a])))
    return (left * right).reshape(tuple(first.shape[a] * second.shape[a] for a in axes))


def _cumprod(x: Tracer, array: Tracer, axis: int | None = None) -> Tracer:
    """One after the other, as NumPy does."""
    return _accumulated(x, array, axis, Tracer.__mul__)


def _where(x: Tracer, condition: Any, a: Any, b: Any) -> Tracer:
    if isinstance(condition, Tracer):
        raise CircuitError("np.where is traced for a condition that is known, not one of traced values.")
    first, second = x.lift(a), x.lift(b)
    shape = np.broadcast_shapes(np.shape(condition), first.shape, second.shape)
    both = stacked(x.builder, [first.move(np.broadcast_to, shape), second.move(np.broadcast_to, shape)])
    chosen = np.where(np.broadcast_to(condition, shape), 0, 1)
    return both.move(np.take_along_axis, chosen[..., None], -1)[..., 0]


def _convolve(x: Tracer, a: Any, v: Any, mode: str = "full") -> Tracer:
    """One gate for each product where both are traced, one term of a sum where one is."""
    first, second = x.lift(a), x.lift(v)
    if mode != "full" or first.ndim != 1 or second.ndim != 1 or not first.size or not second.size:
        raise CircuitError(f"np.convolve is traced for two vectors in mode 'full'; got mode {mode!r}.")
    terms = first[:, None] * second[None, :]
    degree = np.add.outer(np.arange(first.size), np.arange(second.size)).ravel()
    # Row d of the padded table holds the terms of degree d, and zeros.
    width = min(first.size, second.size)
    place = np.full((first.size + second.size - 1, width), -1)
    order = np.argsort(degree, kind="stable")
    begin = starts(np.bincount(degree))
    place[degree[order], np.arange(len(order)) - begin[degree[order]]] = order
    return terms.take(place).sum(axis=-1)


def _fourier(inverse: bool) -> Callable[..., Tracer]:
    def function(x: Tracer, array: Any, n: int | None = None, axis: int = -1, norm: str | None = None) -> Tracer:
        data = x.lift(array)
        if n is not None or norm not in (None, "backward"):
            raise CircuitError("np.fft.fft is traced without n and norm. Pad, crop and scale the array itself.")
        return transformed(data, axis, inverse=inverse)

    return function


def transformed(array: Tracer, axis: int, *, inverse: bool = False) -> Tracer:
    """The discrete Fourier transform along an axis by the fast algorithm, or its inverse."""
    from structmat.circuit.catalogue.fourier import fourier

    rows = array.move(np.moveaxis, axis, -1)
    result = array.builder.apply(fourier(rows.shape[-1], inverse=inverse), rows.nodes())
    return as_tracer(array.builder, result).move(np.moveaxis, -1, axis)


MOVES = {
    np.reshape, np.ravel, np.transpose, np.swapaxes, np.moveaxis, np.squeeze, np.expand_dims, np.broadcast_to, np.roll,
    np.flip, np.fliplr, np.flipud, np.rot90, np.take, np.take_along_axis, np.repeat, np.tile, np.diagonal, np.copy,
    np.concatenate, np.stack, np.vstack, np.hstack, np.dstack, np.split, np.array_split, np.hsplit, np.vsplit,
    np.atleast_1d, np.atleast_2d, np.column_stack, np.delete, np.compress,
}  # fmt: skip

UFUNCS: dict[Any, Callable[..., Tracer]] = {
    np.add: lambda a, b: a + b,
    np.subtract: lambda a, b: a - b,
    np.multiply: lambda a, b: a * b,
    np.true_divide: lambda a, b: a / b,
    np.negative: lambda a: -a,
    np.positive: lambda a: a,
    np.square: lambda a: a * a,
    np.reciprocal: lambda a: 1 / a,
    np.power: lambda a, b: a**b,
    np.matmul: lambda a, b: a @ b,
}

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.sum: lambda x, array, axis=None, keepdims=False: x.lift(array).sum(axis, keepdims),
    np.mean: lambda x, array, axis=None, keepdims=False: x.lift(array).mean(axis, keepdims),
    np.dot: lambda x, a, b: x.lift(a) @ b if x.lift(a).ndim and x.lift(b).ndim else x.lift(a) * b,
    np.inner: lambda x, a, b: x.lift(a) @ x.lift(b).T,
    np.vdot: lambda x, a, b: x.lift(a).ravel() @ x.lift(b).ravel(),
    np.outer: lambda x, a, b: x.lift(a).ravel()[:, None] * x.lift(b).ravel()[None, :],
    np.trace: lambda x, array: array.move(np.diagonal).sum(axis=-1),
    np.einsum: _einsum,
    np.pad: _pad,
    np.cumsum: _cumsum,
    np.prod: lambda x, array, axis=None: x.lift(array).prod(axis),
    np.cumprod: _cumprod,
    np.where: _where,
    np.convolve: _convolve,
    np.fft.fft: _fourier(False),
    np.fft.ifft: _fourier(True),
    np.diff: _diff,
    np.kron: _kron,
    np.zeros_like: lambda x, array, **_: np.zeros(array.shape),
    np.ones_like: lambda x, array, **_: np.ones(array.shape),
    np.shape: lambda x, array: array.shape,
    np.ndim: lambda x, array: array.ndim,
    np.size: lambda x, array: array.size,
}

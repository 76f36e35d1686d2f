"""An array of values of a circuit under construction, which follows NumPy functions gate by gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from structmat.circuit.arrays import Bools, Ints, Numbers, common_type, exact_product, numbers
from structmat.circuit.builder import Builder
from structmat.errors import CircuitError


class Tracer:
    """An array whose entries are ``scale * parameter * node``: what a traced function gets in place of numbers.

    Adding, subtracting, multiplying, dividing, matrix products, sums, and whatever only moves entries (indexing,
    reshaping, stacking, ...) make gates where gates are needed. Scaling makes none: the factor is kept beside the node
    until a sum takes it as the weight, so that ``a * x + b * y`` is one gate. A node of -1 stands for 1: such an
    entry is a number, or a parameter.

    Functions of one array that are not in the table are replaced by their matrix if a test shows them to be linear.

    Raises:
        CircuitError: an operation is not polynomial, or would need the values of inputs.
    """

    __array_priority__ = 100

    def __init__(self, builder: Builder, node: Ints, scale: Numbers, parameter: Ints) -> None:
        self.builder = builder
        self.node = node
        self.scale = np.broadcast_to(scale, node.shape)
        self.parameter = np.broadcast_to(parameter, node.shape)

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return self.node.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.node.ndim

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.node.size

    @property
    def T(self) -> Tracer:
        """The axes reversed."""
        return self.move(np.transpose)

    def __len__(self) -> int:
        return len(self.node)

    def __repr__(self) -> str:
        return f"<Tracer of shape {self.shape}>"

    def __iter__(self) -> Iterator[Tracer]:
        return (self[i] for i in range(len(self)))

    @property
    def is_number(self) -> Bools:
        """Which entries are known numbers."""
        return np.asarray((self.node < 0) & (self.parameter < 0))

    def nodes(self) -> Ints:
        """A node for each entry: scalings become gates, numbers constants."""
        copied = (self.node >= 0) & (self.parameter < 0) & np.asarray(self.scale == 1, dtype=bool)
        result = np.where(copied, self.node, -1)
        rest = ~copied
        zero = rest & np.asarray(self.scale == 0, dtype=bool)
        constant = rest & ~zero & self.is_number
        gate = rest & ~zero & ~constant
        result[zero] = self.builder.sums(np.zeros((int(zero.sum()), 0), np.int64))
        result[constant] = self.builder.constant(self.scale[constant])
        read = np.where(self.node[gate] >= 0, self.node[gate], self.builder.one if np.any(self.node[gate] < 0) else 0)
        result[gate] = self.builder.sums(
            read[:, None], self.scale[gate][:, None], parameters=self.parameter[gate][:, None]
        )
        return result

    # ------------------------------------------------------------------------------------------------- moving entries

    def move(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tracer:
        """``function`` of the array, where it only moves entries."""
        return Tracer(self.builder, *(function(a, *args, **kwargs) for a in (self.node, self.scale, self.parameter)))

    def take(self, places: Ints) -> Tracer:
        """Entries by their flat places, in the shape of ``places``; 0 where a place is -1."""
        inside = places >= 0
        where = np.where(inside, places, 0)
        node, scale, parameter = (np.ravel(a)[where] for a in (self.node, self.scale, self.parameter))
        return Tracer(
            self.builder,
            np.where(inside, node, -1),
            np.where(inside, scale, 0 * scale),
            np.where(inside, parameter, -1),
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        raise CircuitError(
            "A traced array can't be changed in place. Put the result together with np.stack or np.concatenate."
        )

    def __getitem__(self, index: Any) -> Tracer:
        return self.move(lambda a: np.asarray(a[index]))

    def reshape(self, *shape: Any) -> Tracer:
        """As of an array."""
        return self.move(np.reshape, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tracer:
        """As of an array."""
        return self.move(np.transpose, (axes[0] if len(axes) == 1 else axes) or None)

    def ravel(self) -> Tracer:
        """As of an array."""
        return self.reshape(-1)

    flatten = ravel

    def swapaxes(self, first: int, second: int) -> Tracer:
        """As of an array."""
        return self.move(np.swapaxes, first, second)

    # ---------------------------------------------------------------------------------------------------- arithmetic

    def __neg__(self) -> Tracer:
        return Tracer(self.builder, self.node, -self.scale, self.parameter)

    def __pos__(self) -> Tracer:
        return self

    def __add__(self, other: Any) -> Tracer:
        return stacked(self.builder, [self, self.lift(other)]).sum(axis=-1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tracer:
        return self + -self.lift(other)

    def __rsub__(self, other: Any) -> Tracer:
        return self.lift(other) + -self

    def __mul__(self, other: Any) -> Tracer:
        return _multiply(self, self.lift(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tracer:
        return _divide(self, self.lift(other))

    def __rtruediv__(self, other: Any) -> Tracer:
        return _divide(self.lift(other), self)

    def __pow__(self, exponent: Any) -> Tracer:
        power = np.asarray(exponent)
        if power.ndim or power.dtype.kind not in "iuf" or power != int(power):
            raise CircuitError(f"x ** {exponent} is not polynomial. Exponents are integers.")
        return _power(self, int(power))

    def __matmul__(self, other: Any) -> Tracer:
        return _matmul(self, self.lift(other))

    def __rmatmul__(self, other: Any) -> Tracer:
        return _matmul(self.lift(other), self)

    def sum(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tracer:
        """The sum over axes, one gate for each result of two terms or more. Zero terms are left out."""
        axes = tuple(range(self.ndim)) if axis is None else tuple(np.atleast_1d(axis).tolist())
        axes = tuple(a % self.ndim for a in axes) if self.ndim else ()
        rest = [a for a in range(self.ndim) if a not in axes]
        rows = self.transpose((*rest, *axes)).reshape(
            math.prod(self.shape[a] for a in rest), math.prod(self.shape[a] for a in axes)
        )
        shape = tuple(1 if a in axes else n for a, n in enumerate(self.shape) if keepdims or a not in axes)
        return _row_sums(rows).reshape(shape)

    def prod(self, axis: int | None = None) -> Tracer:
        """The product over an axis, or of all entries: one gate for each pair, in a tree."""
        factors = self.ravel() if axis is None else self.move(np.moveaxis, axis, 0)
        while len(factors) > 1:
            half = len(factors) // 2
            factors = concatenated([factors[:half] * factors[half : 2 * half], factors[2 * half :]])
        return factors[0] if len(factors) else self.lift(np.ones(factors.shape[1:], np.int64))

    def mean(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tracer:
        """The mean over axes."""
        total = self.sum(axis, keepdims)
        return total / (self.size // max(1, total.size))

    def dot(self, other: Any) -> Tracer:
        """As of an array of one or two axes."""
        return _matmul(self, self.lift(other))

    def lift(self, other: Any) -> Tracer:
        """Anything as a tracer of the same circuit."""
        if isinstance(other, Tracer):
            if other.builder is not self.builder:
                raise CircuitError("Values of two circuits under construction can't be combined.")
            return other
        if isinstance(other, list | tuple):
            return stacked(self.builder, [self.lift(o) for o in other], axis=0)
        array = numbers(other)
        none = np.full(array.shape, -1)
        return Tracer(self.builder, none, array, none)

    # ---------------------------------------------------------------------------------------------- NumPy's protocols

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Tracer:
        if method == "reduce" and ufunc is np.add:
            return self.sum(kwargs.get("axis", 0), bool(kwargs.get("keepdims", False)))
        from structmat.circuit.tracer_numpy import UFUNCS

        function = UFUNCS.get(ufunc)
        if method != "__call__" or function is None or kwargs:
            raise not_polynomial(f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}"))
        operands = [self.lift(i) if n == 0 or ufunc is not np.power else i for n, i in enumerate(inputs)]
        result: Tracer = function(*operands)
        return result

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from structmat.circuit.tracer_numpy import FUNCTIONS, MOVES, moved

        if function in MOVES:
            return moved(self, function, args, kwargs)
        handler = FUNCTIONS.get(function)
        if handler is not None:
            return handler(self, *args, **kwargs)
        if args and args[0] is self and not any(isinstance(a, Tracer) for a in (*args[1:], *kwargs.values())):
            # The matrix of a function is found by tracers.
            from structmat.circuit.tracer_matrix import by_matrix

            return by_matrix(self, lambda array: function(array, *args[1:], **kwargs), f"np.{function.__name__}")
        raise not_polynomial(f"np.{function.__name__}")

    def __getattr__(self, name: str) -> Any:
        # Other methods of arrays are the functions of NumPy of the same name, which say what they can't do.
        if callable(getattr(np.ndarray, name, None)) and callable(getattr(np, name, None)):
            return partial(getattr(np, name), self)
        raise AttributeError(f"A traced array has no attribute {name!r}.")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CircuitError(
            f"{getattr(function, '__name__', 'A function')} is a function of PyTorch, but the traced array is one of "
            "NumPy. Use trace_torch."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise CircuitError(
            "A traced value has no number yet. Use NumPy functions of the array itself; give linear ones of other "
            "libraries by their matrix, and put arrays together with np.stack."
        )

    def __bool__(self) -> bool:
        raise CircuitError("A traced function can't branch on the values of its inputs: it would be no circuit.")

    def __float__(self) -> float:
        raise CircuitError(
            "A traced value has no number yet, so it can't become a float, nor an entry of an array of floats. Put "
            "arrays together with np.stack or np.concatenate."
        )

    def _compare(self, other: Any) -> bool:
        raise CircuitError("A traced function can't compare the values of its inputs: it would be no circuit.")

    __lt__ = __le__ = __gt__ = __ge__ = _compare
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self._compare(other)

    def __abs__(self) -> Tracer:
        raise not_polynomial("abs")


def not_polynomial(name: str) -> CircuitError:
    """The error for a function that can't be traced."""
    return CircuitError(
        f"{name} is not known to be polynomial, so it has no circuit. Use sums, products, quotients and what moves "
        "entries, or trace the parts before and after it."
    )


def stacked(builder: Builder, parts: Sequence[Tracer], axis: int = -1) -> Tracer:
    """Tracers broadcast against each other and stacked along a new axis."""
    shape = np.broadcast_shapes(*(p.shape for p in parts))
    dtype = common_type(*(p.scale for p in parts))
    return Tracer(
        builder,
        np.stack([np.broadcast_to(p.node, shape) for p in parts], axis),
        np.stack([np.broadcast_to(p.scale, shape).astype(dtype) for p in parts], axis),
        np.stack([np.broadcast_to(p.parameter, shape) for p in parts], axis),
    )


def concatenated(parts: Sequence[Tracer]) -> Tracer:
    """At least one tracer, of one circuit, joined along the first axis."""
    dtype = common_type(*(p.scale for p in parts))
    return Tracer(
        parts[0].builder,
        np.concatenate([p.node for p in parts]),
        np.concatenate([p.scale.astype(dtype) for p in parts]),
        np.concatenate([p.parameter for p in parts]),
    )


def _row_sums(rows: Tracer) -> Tracer:
    """The sum of each row of a matrix of entries."""
    number = rows.is_number
    symbolic = ~number & ~np.asarray(rows.scale == 0, dtype=bool)
    constant = np.where(number, rows.scale, 0 * rows.scale).sum(axis=1)
    if rows.scale.dtype == object:
        constant = constant.astype(object)
    with_constant = np.asarray(constant != 0, dtype=bool)
    terms = symbolic.sum(axis=1) + with_constant
    single = (terms == 1) & ~with_constant
    column = symbolic.argmax(axis=1) if rows.shape[1] else np.zeros(len(rows), np.int64)
    index = np.arange(len(rows))
    node = np.full(len(rows), -1)
    scale, parameter = constant.copy(), node.copy()
    if single.any():
        pick = (index[single], column[single])
        node[single], parameter[single] = rows.node[pick], rows.parameter[pick]
        scale[single] = rows.scale[pick]
    many = (terms > 1) | ((terms == 1) & with_constant & symbolic.any(axis=1))
    if many.any():
        used = symbolic[many]
        extra = with_constant[many]
        one = rows.builder.one if extra.any() or np.any(rows.node[many][used] < 0) else -1
        # The constant of a row is its last term.
        mask = np.concatenate([used, extra[:, None]], axis=1)
        add = np.full((len(used), 1), one)
        operand = np.concatenate([np.where(rows.node[many] >= 0, rows.node[many], one), add], axis=1)[mask]
        weight = np.concatenate([rows.scale[many], constant[many][:, None]], axis=1)[mask]
        trained = np.concatenate([rows.parameter[many], np.full_like(add, -1)], axis=1)[mask]
        node[many] = rows.builder.ragged_sums(mask.sum(axis=1), operand, weight, parameters=trained)
        scale[many], parameter[many] = 1, -1
    return Tracer(rows.builder, node, scale, parameter)


def _atoms(values: Tracer, chosen: Bools) -> Ints:
    """Nodes of the chosen entries without their scales: parameters become nodes."""
    part = values[chosen]
    return Tracer(values.builder, part.node, np.ones(part.shape, np.int64), part.parameter).nodes()


def _multiply(a: Tracer, b: Tracer) -> Tracer:
    both = stacked(a.builder, [a, b])
    a, b = both[..., 0], both[..., 1]
    scale = exact_product(a.scale, b.scale)
    node, parameter = np.where(a.node >= 0, a.node, b.node), np.where(a.parameter >= 0, a.parameter, b.parameter)
    gate = ((a.node >= 0) & (b.node >= 0)) | ((a.parameter >= 0) & (b.parameter >= 0))
    gate &= np.asarray(scale != 0, dtype=bool)
    if gate.any():
        node = node.copy()
        node[gate] = a.builder.products(np.stack([_atoms(a, gate), _atoms(b, gate)], axis=-1))
        parameter = np.where(gate, -1, parameter)
    zero = np.asarray(scale == 0, dtype=bool)
    return Tracer(a.builder, np.where(zero, -1, node), scale, np.where(zero, -1, parameter))


def _divide(a: Tracer, b: Tracer) -> Tracer:
    both = stacked(a.builder, [a, b])
    a, b = both[..., 0], both[..., 1]
    if np.any(b.is_number & np.asarray(b.scale == 0, dtype=bool)):
        raise CircuitError("The traced function divides by the number zero.")
    scale = _ratio(a.scale, b.scale)
    node, parameter = a.node, a.parameter
    gate = ~b.is_number & np.asarray(scale != 0, dtype=bool)
    if gate.any():
        node = node.copy()
        node[gate] = a.builder.quotients(_atoms(a, gate), _atoms(b, gate))
        parameter = np.where(gate, -1, parameter)
    return Tracer(a.builder, node, scale, parameter)


def _ratio(above: Numbers, below: Numbers) -> Numbers:
    """Quotients that stay integers or fractions where they are no floats."""
    if above.dtype.kind == below.dtype.kind == "i" and not np.any(above % below):
        return np.asarray(above // below)
    if above.dtype == object:
        result = np.empty(above.shape, dtype=object)
        pairs = zip(above.ravel().tolist(), below.ravel().tolist(), strict=True)
        result.ravel()[:] = [Fraction(a) / b if isinstance(b, int) else a / b for a, b in pairs]
        return result
    return np.asarray(above / below)


def _power(base: Tracer, exponent: int) -> Tracer:
    if exponent < 0:
        return _divide(base.lift(1), _power(base, -exponent))
    result: Tracer | None = None
    square = base
    while exponent:
        if exponent & 1:
            result = square if result is None else result * square
        exponent >>= 1
        if exponent:
            square = square * square
    return base.lift(np.ones(base.shape, np.int64)) if result is None else result


def _matmul(a: Tracer, b: Tracer) -> Tracer:
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise CircuitError(f"Shapes {a.shape} and {b.shape} have no matrix product.")
    left = a if a.ndim > 1 else a[None, :]
    right = b if b.ndim > 1 else b[:, None]
    result = (left[..., :, None, :] * right.move(np.swapaxes, -1, -2)[..., None, :, :]).sum(axis=-1)
    if a.ndim == 1:
        result = result[..., 0, :]
    return result[..., 0] if b.ndim == 1 else result


def as_tracer(builder: Builder, nodes: ArrayLike) -> Tracer:
    """Nodes of a builder as an array to calculate with."""
    array = np.asarray(nodes, dtype=np.int64)
    return Tracer(builder, array, np.ones(array.shape, np.int64), np.full(array.shape, -1))


def parameter_tracer(builder: Builder, name: str, values: ArrayLike) -> Tracer:
    """A new group of parameters as an array to calculate with."""
    numbered = builder.parameter(name, values)
    return Tracer(builder, np.full(numbered.shape, -1), np.ones(numbered.shape, np.int64), numbered)

"""Programs and circuits: the same linear map at block granularity and gate by gate.

:func:`to_circuit` writes the gates of a program; its counts are those of :func:`structmat.program.cost.cost`.
:func:`from_circuit` makes a program of any linear circuit, which then runs on every backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from structmat.circuit import Builder, Circuit
from structmat.circuit.arrays import Ints, Numbers, owners, starts
from structmat.circuit.catalogue import cosine, fourier, hadamard
from structmat.circuit.measure import level_edges
from structmat.errors import ShapeError
from structmat.program.combinators import Chain, Program, Sum, stages
from structmat.program.compiled import Compiled, from_circuit, from_product
from structmat.program.convolve import diagonals, spectrum
from structmat.program.derived import Derived, Phases
from structmat.program.fixed import Cosine, Hadamard, Reorder, cosine_entries, index_of
from structmat.program.pairs import Pairs
from structmat.program.reference import generated_matrix
from structmat.program.stage import Stage
from structmat.program.stages import (
    Complex,
    Contraction,
    Crop,
    Diagonal,
    Fourier,
    Interpolation,
    Pad,
    Permute,
    Real,
    Shuffle,
    Sparse,
    Windowed,
)
from structmat.program.toeplitz import Convolution
from structmat.program.written_out import Call, Generated
from structmat.sizes import is_power_of_two

__all__ = ["Compiled", "from_circuit", "from_product", "to_circuit"]

Tensors = Mapping[str, Tensor]


def to_circuit(program: Program, tensors: Tensors) -> Circuit:
    """The circuit of a program, gate by gate; its parameters are the entries of the learned tensors, under their names.

    ``multiplications`` and ``additions`` are those of :func:`~structmat.program.cost.cost`, in the arithmetic of the
    values: a circuit with complex weights computes with complex numbers, so that it compares with
    ``cost(program, complex_weights=False)``. Products with the zeros of a padded vector and outputs that are cropped
    are counted, since they run; ``circuit.simplify()`` drops them. The depth is at most that of the cost. Two counts
    differ by what the stages say: a Fourier stage states a model of the library that runs it, and a sparse stage
    counts as if no row were empty.

    A program with a real part in it has no circuit over the complex numbers: there, complex values are pairs of real
    ones, and complex tensors are two groups of parameters, ``name.real`` and ``name.imag``. The multiplier of a
    diagonal that is given by its transform is the group ``name.spectrum``, and so are the multipliers of a
    :class:`~structmat.program.toeplitz.Convolution` by transforms. The entries of a matrix that is a function of
    tensors are the group ``name+name.matrix``. A :class:`~structmat.program.written_out.Call` is traced, its tensors
    being constants.

    Args:
        program: with at least one input.
        tensors: by name, learned and fixed.

    Raises:
        ShapeError: a tensor is missing or has the wrong number of entries.
        CircuitError: a called function can't be traced.
    """
    for stage in stages(program):
        _require(stage, tensors)
    own = [tensors[name] for stage in stages(program) for name in stage.weights]
    transforms = any(isinstance(s, Convolution) and s.transform for s in stages(program))
    halved = any(isinstance(s, Real | Pairs) for s in stages(program))
    split = halved or (transforms and not any(t.is_complex() for t in own))
    writer = _Writer(Builder(program.in_features), tensors, split)
    result = writer.run(program, _Value(writer.builder.inputs))
    return writer.builder.build(result.real if result.imag is None else np.concatenate([result.real, result.imag]))


def _require(stage: Stage, tensors: Tensors) -> None:
    sizes: dict[str, int | None] = {**stage.weights, **dict.fromkeys(stage.indices)}
    for name, size in sizes.items():
        if name not in tensors:
            raise ShapeError(f"{stage} reads the tensor {name!r}, which is missing. There are {sorted(tensors)}.")
        if size is not None and tensors[name].numel() != size:
            raise ShapeError(f"{stage} reads {size} numbers of {name!r}; it has shape {tuple(tensors[name].shape)}.")


@dataclass(frozen=True)
class _Value:
    """The nodes of a vector; complex numbers as nodes of their own or, in real arithmetic, as two nodes each."""

    real: Ints
    imag: Ints | None = None

    def __getitem__(self, index: Ints | slice) -> _Value:
        return _Value(self.real[index], None if self.imag is None else self.imag[index])


@dataclass(frozen=True)
class _Weights:
    """Weights of terms: numbers times parameters (-1 for none); imaginary parts where there are any."""

    real: Numbers
    trained: Ints
    imag: Numbers | None = None
    trained_imag: Ints | None = None

    def __getitem__(self, index: Ints) -> _Weights:
        parts = (self.real, self.trained, self.imag, self.trained_imag)
        return _Weights(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]


class _Writer:
    """Writes the gates of stages."""

    def __init__(self, builder: Builder, tensors: Tensors, split: bool) -> None:
        self.builder = builder
        self.tensors = tensors
        self.split = split
        self._known: dict[str, _Weights] = {}
        self._groups: dict[str, Ints] = {}
        self._zero: int | None = None

    def run(self, program: Program, x: _Value) -> _Value:
        """The outputs of a program for the values x."""
        if isinstance(program, Chain):
            for step in program.steps:
                x = self.run(step, x)
            return x
        if isinstance(program, Sum):
            return self._added([self.run(part, x) for part in program.parts])
        match program:
            case Contraction():
                return self._contraction(program, x)
            case Diagonal(weight=name, size=size, spectrum=spectrum):
                weights = self._spectrum(name) if spectrum else self._learned(name)
                return self._sums(x, np.ones(size, dtype=np.int64), np.arange(size), weights)
            case Permute(index=name, inverse=inverse):
                order = self._indices(name)
                return x[np.argsort(order) if inverse else order]
            case Shuffle(sizes=sizes, axes=axes):
                return x[np.arange(program.in_features).reshape(sizes).transpose(axes).ravel()]
            case Fourier(size=size, inverse=inverse):
                return self._embedded(fourier(size, inverse=inverse), x)
            case Convolution():
                return (self._transformed if program.transform else self._convolution)(program, x)
            case Generated():
                return self._generated(program, x)
            case Sparse():
                return self._sparse(program, x)
            case Interpolation():
                return self._interpolation(program, x)
            case Windowed():
                return self._windowed(program, x)
            case Pad(size=size, padded=padded, before=before):
                return self._padded(x, before, padded - size - before)
            case Crop(kept=kept, before=before):
                return x[slice(before, before + kept)]
            case Derived():
                return self.run(program.stage.rename(lambda _: self._derived(program)), x)
            case Pairs():
                return self._pairs(program, x)
            case Reorder():
                return x[index_of(program).numpy()]
            case Hadamard(size=size):
                return self._embedded(hadamard(size), x)
            case Cosine():
                return self._cosine(program, x)
            case Real():
                return _Value(x.real)
            case Complex():
                return x
            case _:
                assert isinstance(program, Call), f"unknown stage {type(program).__name__}"
                return self._embedded(_called(program, self.tensors), x)

    # --------------------------------------------------------------------------------------------------- the stages

    def _contraction(self, stage: Contraction, x: _Value) -> _Value:
        a, b, c, d = stage.pattern
        place = np.arange(stage.weights[stage.weight]).reshape(stage.stored_shape)
        place = place.swapaxes(1, 2) if stage.transposed else place
        # Terms in the order (a, b, d, c): the sums' outputs in order, each with its terms.
        place = np.broadcast_to(place, (a, b, c, d)).transpose(0, 1, 3, 2)
        read = np.arange(a * c * d).reshape(a, 1, c, d).transpose(0, 1, 3, 2)
        operand = np.broadcast_to(read, (a, b, d, c)).ravel()
        weights = self._learned(stage.weight)[place.ravel()]
        return self._sums(x, np.full(a * b * d, c), operand, weights)

    def _convolution(self, stage: Convolution, x: _Value) -> _Value:
        b, c, height, width = stage.outputs, stage.inputs, stage.height, stage.width
        # Which entry of the weight stands on each diagonal, and whether it is twisted there: asked of a weight that
        # holds its own places, counted from one.
        place = torch.arange(1, b * c * stage.entries + 1, dtype=torch.float64)
        signed = diagonals(stage if stage.twist is None else replace(stage, twist=-1.0), place).numpy()
        i, j = np.arange(height)[:, None], np.arange(width)
        spot = i + j if stage.hankel else i - j + width - 1
        signed = signed[:, :, spot].transpose(0, 2, 1, 3).reshape(b * height, c * width)
        own, factor = (
            np.abs(signed).astype(np.int64) - 1,
            np.where(signed < 0, 0.0 if stage.twist is None else stage.twist, 1.0),
        )
        if stage.transposed:
            own, factor = own.T, factor.T
        read = np.broadcast_to(np.arange(own.shape[1]), own.shape).ravel()
        weights = _scaled(self._learned(stage.weight)[own.ravel()], factor.ravel())
        return self._sums(x, np.full(own.shape[0], own.shape[1]), read, weights)

    def _transformed(self, stage: Convolution, x: _Value) -> _Value:
        """A convolution by Fourier transforms. Of real vectors and weights the outcome's real part is used."""
        b, c = (stage.inputs, stage.outputs) if stage.transposed else (stage.outputs, stage.inputs)
        read, kept = (stage.height, stage.width) if stage.transposed else (stage.width, stage.height)
        weight, count = self.tensors[stage.weight].detach().cpu(), stage.length
        values = spectrum(stage, weight.to(torch.complex128)).numpy()
        # The transform of a vector that runs backwards is the inverse one, but for its factor 1 / count.
        forward, values = fourier(count, inverse=stage.hankel), values * (count if stage.hankel else 1)
        parts = [x[slice(block * read, (block + 1) * read)] for block in range(c)]
        parts = [self._embedded(forward, self._padded(part, 0, count - read)) for part in parts]
        joined = parts[0]
        for part in parts[1:]:
            joined = self._joined(joined, part)
        weights = self._parameters(f"{stage.weight}.spectrum", values)
        operand = np.broadcast_to(np.arange(c * count).reshape(c, count).T, (b, count, c)).ravel()
        own = np.arange(b * c * count).reshape(b, c, count).transpose(0, 2, 1).ravel()
        product = self._sums(joined, np.full(b * count, c), operand, weights[own])
        before = 0 if stage.hankel or stage.is_circular else read - 1
        results = []
        for block in range(b):
            result = self._embedded(fourier(count, inverse=True), product[slice(block * count, (block + 1) * count)])
            results.append(result[slice(before, before + kept)])
        total = results[0]
        for result in results[1:]:
            total = self._joined(total, result)
        return _Value(total.real) if x.imag is None and not weight.is_complex() else total

    def _generated(self, stage: Generated, x: _Value) -> _Value:
        key = f"{'+'.join(name for name, _ in stage.tensors)}.matrix"
        if key not in self._known:
            self._known[key] = self._parameters(key, _numbers(generated_matrix(stage, self.tensors)))
        own = np.arange(stage.height * stage.width).reshape(stage.height, stage.width)
        own = own.T if stage.transposed else own
        read = np.broadcast_to(np.arange(own.shape[1]), own.shape).ravel()
        return self._sums(x, np.full(own.shape[0], own.shape[1]), read, self._known[key][own.ravel()])

    def _sparse(self, stage: Sparse, x: _Value) -> _Value:
        row, column = np.divmod(self._indices(stage.places), stage.width)
        target, read = (column, row) if stage.transposed else (row, column)
        order = np.argsort(target, kind="stable")
        counts = np.bincount(target, minlength=stage.out_features)
        return self._sums(x, counts, read[order], self._learned(stage.values)[order])

    def _interpolation(self, stage: Interpolation, x: _Value) -> _Value:
        rank, rest = stage.rank, stage.size - stage.rank
        places = self._indices(stage.places)
        first = np.argsort(places)  # the column that holds each column of [I, w]
        weights = self._learned(stage.weight)
        if stage.transposed:
            operand = np.tile(np.arange(rank), rest)
            by_column = weights[np.arange(rank * rest).reshape(rank, rest).T.ravel()]
            extended = self._sums(x, np.full(rest, rank), operand, by_column)
            return self._joined(x, extended)[places]
        # Row k of [I, w]: one term with the weight 1 before those of w.
        own = np.arange(rank * (rest + 1)).reshape(rank, rest + 1)
        operand = np.concatenate([first[:rank, None], np.broadcast_to(first[rank:], (rank, rest))], axis=1).ravel()
        return self._sums(x, np.full(rank, rest + 1), operand, _with_ones(weights, own[:, 0], own[:, 1:].ravel()))

    def _windowed(self, stage: Windowed, x: _Value) -> _Value:
        windows = self._indices(stage.windows)
        sides = []
        for name, begin, size in ((stage.left, 0, stage.height), (stage.right, 2, stage.width)):
            first, width = windows[:, begin], windows[:, begin + 1]
            term = np.repeat(np.arange(stage.terms), width)
            offset = np.arange(len(term)) - np.repeat(starts(width)[:-1], width)
            sides.append((term, (first[term] + offset) % size, self._learned(name)))
        (out_term, out_place, out_weights), (in_term, in_place, in_weights) = sides[:: -1 if stage.transposed else 1]
        inner = self._sums(x, np.bincount(in_term, minlength=stage.terms), in_place, in_weights)
        order = np.argsort(out_place, kind="stable")
        counts = np.bincount(out_place, minlength=stage.out_features)
        return self._sums(inner, counts, out_term[order], out_weights[order])

    def _padded(self, x: _Value, before: int, after: int) -> _Value:
        def filled(nodes: Ints) -> Ints:
            return np.concatenate([self._zeros(before), nodes, self._zeros(after)])

        return _Value(filled(x.real), None if x.imag is None else filled(x.imag))

    def _embedded(self, circuit: Circuit, x: _Value) -> _Value:
        """A linear circuit without parameters, level by level."""
        imag = np.full(circuit.nodes, -1)
        nodes = _Value(imag.copy(), imag)
        is_complex = x.imag is not None or (self.split and circuit.weight.dtype.kind == "c")
        held = self._with_imag(x) if is_complex else x
        nodes.real[: circuit.in_features] = held.real
        if held.imag is not None:
            imag[: circuit.in_features] = held.imag
        empty = np.flatnonzero((np.arange(circuit.nodes) >= circuit.in_features) & (np.diff(circuit.start) == 0))
        nodes.real[empty] = imag[empty] = self._zeros(len(empty))
        for level in list(circuit.levels)[1:]:
            begin, edges = level_edges(circuit, level)
            weights = self._constants(circuit.weight[edges])
            made = self._sums(
                nodes if is_complex else _Value(nodes.real), np.diff(begin), circuit.operand[edges], weights
            )
            made = self._with_imag(made) if is_complex else made
            nodes.real[level] = made.real
            if made.imag is not None:
                imag[level] = made.imag
        return (nodes if is_complex else _Value(nodes.real))[circuit.outputs]

    def _pairs(self, stage: Pairs, x: _Value) -> _Value:
        half, inner = stage.stage.in_features, stage.stage
        assert x.imag is None, "pairs are real"
        if isinstance(inner, Fourier):
            circuit = fourier(inner.size, inverse=inner.inverse)
            circuit = replace(circuit, weight=circuit.weight.conj()) if stage.conjugate else circuit
            made = self._embedded(circuit, _Value(x.real[:half], x.real[half:]))
        elif stage.is_complex:
            name = next(iter(inner.weights))
            key = f"{name}:pairs{', conjugate' * stage.conjugate}"
            if key not in self._known:
                self._known[key] = self._of_pairs(name, stage.conjugate)
            made = self.run(inner.rename(lambda _: key), _Value(x.real[:half], x.real[half:]))
        else:
            made = self.run(inner, _Value(x.real[:half], x.real[half:]))
        made = self._with_imag(made)
        assert made.imag is not None
        return _Value(np.concatenate([made.real, made.imag]))

    def _of_pairs(self, name: str, conjugate: bool) -> _Weights:
        parts = self._entries(name).reshape(-1, 2)
        ones = np.ones(len(parts), dtype=np.int64)
        return _Weights(ones, parts[:, 0], -ones if conjugate else ones, parts[:, 1])

    def _entries(self, name: str) -> Ints:
        """The circuit's parameters that are the entries of a real tensor, flat."""
        if name not in self._groups:
            self._groups[name] = self.builder.parameter(name, _numbers(self.tensors[name])).ravel()
        return self._groups[name]

    def _derived(self, stage: Derived) -> str:
        """The name of a derived weight: constants of the circuit, beside the parameters that they are functions of."""
        key = f"{stage.name}:{stage.form}"
        if key not in self._known:
            given, made = self.tensors[stage.name], stage.form(self.tensors[stage.name])
            entries = self._entries(stage.name)
            if isinstance(stage.form, Phases):  # the entries themselves, scaled to modulus 1
                self._known[key] = _Weights(_numbers(made / given).ravel(), entries)
            else:
                self._known[key] = self._constants(_numbers(made).ravel())
        return key

    def _cosine(self, stage: Cosine, x: _Value) -> _Value:
        size = stage.size
        if not is_power_of_two(size):  # no fast circuit is known here: the matrix
            matrix = cosine_entries(size).numpy()
            weights = self._constants((matrix.T if stage.inverse else matrix).ravel())
            return self._sums(x, np.full(size, size), np.tile(np.arange(size), size), weights)
        circuit = cosine(size, 2)
        scale = np.full(size, (2.0 / size) ** 0.5)
        scale[0] = (1.0 / size) ** 0.5
        counts, read = np.ones(size, dtype=np.int64), np.arange(size)
        if stage.inverse:
            return self._embedded(circuit.transpose(), self._sums(x, counts, read, self._constants(scale)))
        return self._sums(self._embedded(circuit, x), counts, read, self._constants(scale))

    # ------------------------------------------------------------------------------------------------------ numbers

    def _indices(self, name: str) -> Ints:
        return self.tensors[name].detach().cpu().numpy().astype(np.int64)

    def _zeros(self, count: int) -> Ints:
        """Nodes of value zero: one empty sum serves for all."""
        if count and self._zero is None:
            self._zero = self.builder.sum([])
        return np.full(count, -1 if self._zero is None else self._zero)

    def _with_imag(self, x: _Value) -> _Value:
        return x if x.imag is not None else _Value(x.real, self._zeros(len(x.real)))

    def _learned(self, name: str) -> _Weights:
        """The parameters of a tensor, flat: made once."""
        if name not in self._known:
            self._known[name] = self._parameters(name, _numbers(self.tensors[name]))
        return self._known[name]

    def _spectrum(self, name: str) -> _Weights:
        key = f"{name}.spectrum"
        if key not in self._known:
            self._known[key] = self._parameters(key, np.fft.fft(_numbers(self.tensors[name]).ravel()))
        return self._known[key]

    def _parameters(self, name: str, values: Numbers) -> _Weights:
        ones = np.ones(values.size, dtype=np.int64)
        if not (self.split and values.dtype.kind == "c"):
            return _Weights(ones, self.builder.parameter(name, values).ravel())
        real = self.builder.parameter(f"{name}.real", values.real).ravel()
        imag = self.builder.parameter(f"{name}.imag", values.imag).ravel()
        return _Weights(ones, real, ones, imag)

    def _constants(self, values: Numbers) -> _Weights:
        none = np.full(values.size, -1)
        if not (self.split and values.dtype.kind == "c"):
            return _Weights(values, none)
        return _Weights(values.real, none, values.imag, none)

    # -------------------------------------------------------------------------------------------------------- gates

    def _sums(self, x: _Value, counts: Ints, operand: Ints, weights: _Weights) -> _Value:
        """Sums of ``counts`` terms each of entries of x."""
        if x.imag is None and weights.imag is None:
            read = x.real[operand]
            return _Value(self.builder.ragged_sums(counts, read, weights.real, parameters=weights.trained))
        owner = owners(starts(counts))
        parts: dict[str, tuple[Ints | None, Numbers | None, Ints | None]] = {
            "rr": (x.real, weights.real, weights.trained),
            "ii": (x.imag, None if weights.imag is None else -weights.imag, weights.trained_imag),
            "ri": (x.real, weights.imag, weights.trained_imag),
            "ir": (x.imag, weights.real, weights.trained),
        }
        made = []
        for keys in (("rr", "ii"), ("ri", "ir")):
            targets, reads, numbers, trained = [], [], [], []
            for key in keys:
                nodes, weight, parameter = parts[key]
                if nodes is None or weight is None or parameter is None:
                    continue
                kept = (weight != 0) | (parameter >= 0)
                targets.append(owner[kept])
                reads.append(nodes[operand[kept]])
                numbers.append(weight[kept])
                trained.append(parameter[kept])
            target = np.concatenate(targets)
            order = np.argsort(target, kind="stable")
            sums = self.builder.ragged_sums(
                np.bincount(target, minlength=len(counts)),
                np.concatenate(reads)[order],
                np.concatenate(numbers)[order],
                parameters=np.concatenate(trained)[order],
            )
            made.append(sums)
        return _Value(made[0], made[1])

    def _joined(self, first: _Value, second: _Value) -> _Value:
        """Two vectors, one after the other."""
        if first.imag is None and second.imag is None:
            return _Value(np.concatenate([first.real, second.real]))
        both = [self._with_imag(first), self._with_imag(second)]
        return _Value(
            np.concatenate([v.real for v in both]), np.concatenate([v.imag for v in both if v.imag is not None])
        )

    def _added(self, parts: list[_Value]) -> _Value:
        """The sum of vectors; a part without an imaginary part adds nothing to that of the others."""
        if len(parts) == 1:
            return parts[0]
        real = self.builder.sums(np.stack([part.real for part in parts], axis=-1))
        imaginary = [part.imag for part in parts if part.imag is not None]
        if not imaginary:
            return _Value(real)
        imag = imaginary[0] if len(imaginary) == 1 else self.builder.sums(np.stack(imaginary, axis=-1))
        return _Value(real, imag)


def _with_ones(weights: _Weights, ones: Ints, rest: Ints) -> _Weights:
    """Weights at the places ``rest``, and the number 1 at the places ``ones``."""
    size = len(ones) + len(rest)
    real, trained = np.ones(size, dtype=np.int64), np.full(size, -1)
    real[rest], trained[rest] = weights.real, weights.trained
    if weights.imag is None or weights.trained_imag is None:
        return _Weights(real, trained)
    imag, trained_imag = np.zeros(size, dtype=np.int64), np.full(size, -1)
    imag[rest], trained_imag[rest] = weights.imag, weights.trained_imag
    return _Weights(real, trained, imag, trained_imag)


def _scaled(weights: _Weights, factor: Numbers) -> _Weights:
    """The same parameters times further numbers."""
    imag = None if weights.imag is None else weights.imag * factor
    return _Weights(weights.real * factor, weights.trained, imag, weights.trained_imag)


def _numbers(tensor: Tensor) -> Numbers:
    wide = tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return np.asarray(wide.resolve_conj().resolve_neg().numpy())


def _called(stage: Call, tensors: Tensors) -> Circuit:
    # PyTorch's tracer takes seconds to load, and only this stage needs it.
    from structmat.circuit.torch_trace import trace_torch

    values = [tensors[name].detach() for name, _ in stage.tensors]
    dtype = torch.complex128 if any(value.is_complex() for value in values) else torch.float64
    wide = [value.to(dtype) for value in values]
    circuit: Circuit = trace_torch(lambda x: stage.function(x, *wide), (1, stage.width), linear=True, dtype=dtype)
    return circuit.transpose() if stage.transposed else circuit

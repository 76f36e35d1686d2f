"""The reference backend: programs in PyTorch operations. It is the meaning of a program.

Differentiable (twice), any device and dtype, compilable, exportable. The form of a contraction is chosen by its shape
alone; :func:`form` says which, so that ``explain`` can show it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from structmat.errors import ShapeError
from structmat.modes import is_compiling
from structmat.program.combinators import Chain, Program, Sum
from structmat.program.convolve import convolve
from structmat.program.derived import Derived
from structmat.program.fixed import Cosine, Hadamard, Reorder, cosine_entries, index_entries, index_of
from structmat.program.pairs import Pairs
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

Tensors = Mapping[str, Tensor]


class Form(enum.Enum):
    """How the reference runs a stage."""

    MATMUL = "one matrix product"
    UNROLLED = "unrolled multiply-adds"
    BATCHED = "batched matrix product"
    GATHER = "gather and add"
    MATERIALISED = "one product with the materialised matrix"
    ELEMENTWISE = "elementwise"
    TRANSFORM = "fast Fourier transform"
    HADAMARD = "fast Hadamard transform"
    MOVE = "moves data only"
    FUNCTION = "the given function"


_UNROLLED_LIMIT = 4
"""Contractions of at most 4 x 4 blocks run as multiply-adds: a batched product of so small blocks is all overhead."""

MATERIALISED_DENSITY = 1.0 / 64.0
"""Denser sparse stages run as a dense product: gather and add is an order of magnitude slower a multiplication."""


def form(stage: Stage) -> Form:
    """The form in which the reference runs a stage."""
    if isinstance(stage, Pairs | Derived):
        return form(stage.stage)
    if isinstance(stage, Hadamard):
        return Form.HADAMARD
    if isinstance(stage, Contraction):
        if (stage.a == 1 or stage.shared_a) and (stage.d == 1 or stage.shared_d):
            return Form.MATMUL
        if stage.b <= _UNROLLED_LIMIT and stage.c <= _UNROLLED_LIMIT:
            return Form.UNROLLED
        return Form.BATCHED
    if isinstance(stage, Sparse):
        dense = stage.capacity > MATERIALISED_DENSITY * stage.height * stage.width
        return Form.MATERIALISED if dense else Form.GATHER
    if isinstance(stage, Windowed | Interpolation | Generated):
        return Form.MATERIALISED
    if isinstance(stage, Convolution):
        return Form.TRANSFORM if stage.transform else Form.MATERIALISED
    if isinstance(stage, Diagonal):
        return Form.ELEMENTWISE
    if isinstance(stage, Fourier | Cosine):
        return Form.TRANSFORM
    if isinstance(stage, Call):
        return Form.FUNCTION
    return Form.MOVE


def apply(program: Program, tensors: Tensors, x: Tensor) -> Tensor:
    """Multiply rows: ``x`` (..., in_features) to (..., out_features), as ``torch.nn.functional.linear``.

    Raises:
        ShapeError: the last axis of ``x`` is not ``in_features``.
    """
    rows = _run(program, tensors, as_rows(program, x))
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], program.out_features)


def affine(program: Program, tensors: Tensors, x: Tensor, bias: Tensor) -> Tensor:
    """``apply(program, tensors, x) + bias``, with ``bias`` (out_features,).

    The bias is added before a final ``Crop``, not after: torch.compile with inductor (PyTorch 2.13, CPU) reads beyond
    the end of a vector that is added to the cropped result of blocks which do not divide it.
    """
    last = program.steps[-1] if isinstance(program, Chain) else None
    if not isinstance(program, Chain) or not isinstance(last, Crop):
        return apply(program, tensors, x) + bias
    rows = as_rows(program, x)
    for step in program.steps[:-1]:
        rows = _run(step, tensors, rows)
    after = last.size - last.kept - last.before
    rows = rows + torch.cat([bias.new_zeros(last.before), bias, bias.new_zeros(after)])
    return rows[:, last.before : last.before + last.kept].reshape(*x.shape[:-1], last.kept)


def check_rows(program: Program, x: Tensor) -> None:
    """Raise unless the input has shape (..., in_features)."""
    if x.dim() == 0 or x.shape[-1] != program.in_features:
        raise ShapeError(
            f"The input has shape {tuple(x.shape)}; its last axis must hold in_features={program.in_features} numbers."
        )


def as_rows(program: Program, x: Tensor) -> Tensor:
    """The input (..., in_features) as rows (batch, in_features)."""
    check_rows(program, x)
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _run_steps(steps: Sequence[Program], tensors: Tensors, x: Tensor) -> Tensor:
    for step in steps:
        x = _run(step, tensors, x)
    return x


def _is_stack(program: Sum) -> bool:
    """Whether the parts' outputs lie one after the other, each padded to the whole: nothing is to be added then."""
    place = 0
    for part in program.parts:
        last = part.steps[-1] if isinstance(part, Chain) else None
        if not isinstance(last, Pad) or last.before != place:
            return False
        place += last.size
    return place == program.out_features


def _run(program: Program, tensors: Tensors, x: Tensor) -> Tensor:
    """Rows (batch, in) to rows (batch, out)."""
    if isinstance(program, Chain):
        return _run_steps(program.steps, tensors, x)
    if isinstance(program, Sum):
        if _is_stack(program):
            return torch.cat([_run_steps(part.steps[:-1], tensors, x) for part in program.parts], -1)  # type: ignore[union-attr]
        total = _run(program.parts[0], tensors, x)
        for part in program.parts[1:]:
            total = total + _run(part, tensors, x)
        return total
    if isinstance(program, Contraction):
        return _contract(program, tensors[program.weight], x)
    if isinstance(program, Diagonal):
        weight = tensors[program.weight].reshape(program.size)
        return x * (_fft(weight) if program.spectrum else weight)
    if isinstance(program, Permute):
        index = tensors[program.index]
        return x.index_select(-1, torch.argsort(index) if program.inverse else index)
    if isinstance(program, Shuffle):
        axes = [0, *(axis + 1 for axis in program.axes)]
        return x.reshape(x.shape[0], *program.sizes).permute(axes).reshape(x.shape[0], program.out_features)
    if isinstance(program, Fourier):
        return _ifft(x) if program.inverse else _fft(x)
    if isinstance(program, Sparse):
        return _sparse(program, tensors, x)
    if isinstance(program, Interpolation):
        matrix = interpolation_matrix(program, tensors)
        return x @ matrix if program.transposed else x @ matrix.T
    if isinstance(program, Windowed):
        return _windowed(program, tensors, x)
    if isinstance(program, Convolution):
        return convolve(program, tensors[program.weight], x)
    if isinstance(program, Generated):
        matrix = generated_matrix(program, tensors)
        wide = torch.promote_types(x.dtype, matrix.dtype) if x.is_complex() or matrix.is_complex() else x.dtype
        matrix = matrix.to(wide)
        return x.to(wide) @ (matrix if program.transposed else matrix.T)
    if isinstance(program, Pad):
        return F.pad(x, (program.before, program.padded - program.size - program.before))
    if isinstance(program, Crop):
        return x[:, program.before : program.before + program.kept]
    if isinstance(program, Real):
        return x.real if x.is_complex() else x
    if isinstance(program, Complex):
        return x if x.is_complex() else torch.complex(_wide(x), torch.zeros_like(_wide(x)))
    if isinstance(program, Derived):
        return _run(program.stage, {**tensors, program.name: program.form(tensors[program.name])}, x)
    if isinstance(program, Pairs):
        return _pairs(program, tensors, x)
    if isinstance(program, Reorder):
        index = index_entries(program) if is_compiling() else index_of(program)
        return x.index_select(-1, index.to(x.device))
    if isinstance(program, Hadamard):
        return _hadamard(program, x)
    if isinstance(program, Cosine):
        return _cosine(program, x)
    assert isinstance(program, Call), f"unknown stage {type(program).__name__}"
    return _call(program, tensors, x)


def _contract(stage: Contraction, weight: Tensor, x: Tensor) -> Tensor:
    a, b, c, d = stage.pattern
    weight = weight.reshape(stage.stored_shape)
    if stage.transposed:
        weight = weight.transpose(1, 2)  # (a or 1, b, c, d or 1)
    if x.is_complex():  # constants are real
        weight = weight.to(x.dtype)
    kind = form(stage)
    batch = x.shape[0]
    if kind is Form.MATMUL:
        matrix = weight[0, :, :, 0]
        if a * d == 1:
            return torch.matmul(x, matrix.T)
        if d == 1:
            return torch.matmul(x.reshape(batch, a, c), matrix.T).reshape(batch, a * b)
        rows = torch.matmul(x.reshape(batch, a, c, d).transpose(2, 3), matrix.T)
        return rows.transpose(2, 3).reshape(batch, a * b * d)
    if kind is Form.UNROLLED:
        parts = x.reshape(batch, a, c, d).unbind(2)
        outputs = []
        for i in range(b):
            total = weight[:, i, 0] * parts[0]
            for j in range(1, c):
                total = total + weight[:, i, j] * parts[j]
            outputs.append(total)
        return torch.stack(outputs, 2).reshape(batch, a * b * d)
    if d == 1:  # weight (a, b, c, 1), a not shared
        blocks = x.reshape(batch, a, c).transpose(0, 1) @ weight[..., 0].transpose(1, 2)  # (a, batch, b)
        return blocks.transpose(0, 1).reshape(batch, a * b)
    x4 = x.reshape(batch, a, c, d)
    if stage.shared_d:  # one product a group, the interleaved axis d joins the batch
        rows = x4.permute(1, 0, 3, 2).reshape(a, batch * d, c) @ weight[..., 0].transpose(1, 2)
        return rows.reshape(a, batch, d, b).permute(1, 0, 3, 2).reshape(batch, a * b * d)
    if stage.shared_a or a == 1:
        rows = x4.permute(3, 0, 1, 2).reshape(d, batch * a, c) @ weight[0].permute(2, 1, 0)
        return rows.reshape(d, batch, a, b).permute(1, 2, 3, 0).reshape(batch, a * b * d)
    rows = x4.permute(1, 3, 0, 2).reshape(a * d, batch, c) @ weight.permute(0, 3, 2, 1).reshape(a * d, c, b)
    return rows.reshape(a, d, batch, b).permute(2, 0, 3, 1).reshape(batch, a * b * d)


def _wide(x: Tensor) -> Tensor:
    """Half precision has no complex or Fourier arithmetic on the CPU: go through float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _fft(x: Tensor) -> Tensor:
    if x.numel() == 0:  # MKL refuses an empty batch
        return _wide(x).to(torch.promote_types(_wide(x).dtype, torch.complex64))
    result: Tensor = torch.fft.fft(_wide(x), dim=-1)
    return result


def _ifft(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return _fft(x)
    result: Tensor = torch.fft.ifft(_wide(x), dim=-1)
    return result


def _sparse(stage: Sparse, tensors: Tensors, x: Tensor) -> Tensor:
    values, places = tensors[stage.values], tensors[stage.places]
    if form(stage) is Form.MATERIALISED:
        return x @ sparse_matrix(stage, tensors).T
    rows, columns = places // stage.width, places % stage.width
    reads, writes = (rows, columns) if stage.transposed else (columns, rows)
    terms = values * x.index_select(1, reads)
    return x.new_zeros(x.shape[0], stage.out_features, dtype=terms.dtype).index_add(1, writes, terms)


def sparse_matrix(stage: Sparse, tensors: Tensors) -> Tensor:
    """The matrix of a sparse stage, (out_features, in_features)."""
    matrix = _scatter(tensors[stage.values], tensors[stage.places], stage.height, stage.width)
    return matrix.T if stage.transposed else matrix


def _scatter(values: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    return values.new_zeros(height * width).index_add(0, places, values).reshape(height, width)


def interpolation_matrix(stage: Interpolation, tensors: Tensors) -> Tensor:
    """``[I, w] P`` as a matrix (rank, size).

    Gathering columns of the weight moves far fewer numbers than gathering inputs, for all but the smallest batches,
    and the product with the identity's part costs less than the two passes over the inputs that it saves.
    """
    weight = tensors[stage.weight].reshape(stage.rank, stage.size - stage.rank)
    identity = torch.eye(stage.rank, dtype=weight.dtype, device=weight.device)
    return torch.cat([identity, weight], 1).index_select(1, tensors[stage.places])


def generated_matrix(stage: Generated, tensors: Tensors) -> Tensor:
    """The matrix (height, width) that a function of the tensors makes, in single precision at least."""
    values = [_wide(tensors[name]) for name, _ in stage.tensors]
    return stage.function(*values, *(tensors[name] for name in stage.fixed), *stage.arguments)


def window_matrices(stage: Windowed, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The two factors of a windowed stage as (height, terms) and (terms, width) matrices with zeros outside windows."""
    windows = tensors[stage.windows]
    left = _window_side(tensors[stage.left], windows[:, 0], windows[:, 1], stage.left_size, stage.height, stage.terms)
    right = _window_side(tensors[stage.right], windows[:, 2], windows[:, 3], stage.right_size, stage.width, stage.terms)
    return left.T, right


def _window_side(content: Tensor, start: Tensor, width: Tensor, total: int, size: int, terms: int) -> Tensor:
    # An entry belongs to the term before which as many windows end (repeat_interleave has no ONNX form here).
    ends = torch.cumsum(width, 0)
    term = torch.cumsum(ends.new_zeros(total + 1).index_add(0, ends, torch.ones_like(ends)), 0)[:total]
    first = ends - width
    offset = torch.arange(total, device=width.device) - first[term]
    return _scatter(content.reshape(total), term * size + (start[term] + offset) % size, terms, size)


def _windowed(stage: Windowed, tensors: Tensors, x: Tensor) -> Tensor:
    left, right = window_matrices(stage, tensors)
    return (x @ left) @ right if stage.transposed else (x @ right.T) @ left.T


def _pairs(stage: Pairs, tensors: Tensors, x: Tensor) -> Tensor:
    inner, batch = stage.stage, x.shape[0]
    if isinstance(inner, Fourier):
        return _fourier_of_pairs(inner, stage.conjugate, x)
    planes = x.reshape(2 * batch, inner.in_features)
    if not stage.is_complex:
        return _run(inner, tensors, planes).reshape(batch, stage.out_features)
    name, numel = next(iter(inner.weights.items()))
    weight = tensors[name].reshape(numel, 2)
    real, imag = (
        _run(inner, {**tensors, name: weight[:, part]}, planes).reshape(batch, 2, inner.out_features) for part in (0, 1)
    )
    if stage.unsigned:
        return torch.cat([real[:, 0] + imag[:, 1], real[:, 1] + imag[:, 0]], 1)
    if stage.conjugate:
        return torch.cat([real[:, 0] + imag[:, 1], real[:, 1] - imag[:, 0]], 1)
    return torch.cat([real[:, 0] - imag[:, 1], real[:, 1] + imag[:, 0]], 1)


def _fourier_of_pairs(stage: Fourier, conjugate: bool, x: Tensor) -> Tensor:
    size = stage.size
    if is_compiling():  # code generators and exporters know no complex numbers
        index = torch.arange(size, device=x.device, dtype=torch.float64)
        angle = torch.outer(index, index).remainder(size) * (2 * torch.pi / size)
        cosines, sines = torch.cos(angle), torch.sin(angle) * (1.0 if stage.inverse != conjugate else -1.0)
        if stage.inverse:
            cosines, sines = cosines / size, sines / size
        cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
        re, im = x[:, :size], x[:, size:]
        return torch.cat([re @ cosines - im @ sines, re @ sines + im @ cosines], 1)
    wide = _wide(x)
    values = torch.complex(wide[:, :size], -wide[:, size:] if conjugate else wide[:, size:])
    result = _ifft(values) if stage.inverse else _fft(values)
    return torch.cat([result.real, -result.imag if conjugate else result.imag], 1).to(x.dtype)


def _hadamard(stage: Hadamard, x: Tensor) -> Tensor:
    batch = x.shape[0]
    for level in range(stage.levels):
        pair = x.reshape(batch, stage.size >> (level + 1), 2, 1 << level)
        x = torch.stack([pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]], 2).reshape(batch, stage.size)
    return x


def _cosine(stage: Cosine, x: Tensor) -> Tensor:
    size = stage.size
    if is_compiling() or x.numel() == 0 or x.is_complex():
        matrix = cosine_entries(size).to(device=x.device, dtype=x.dtype)
        return x @ (matrix if stage.inverse else matrix.T)
    # Makhoul 1980: a Fourier transform of the evens, then the odds backwards. Its halves are conjugates, so that the
    # product with a rotation holds the transform of k in its real part and that of n - k in its imaginary one.
    wide = _wide(x)
    angle = torch.arange(size, device=x.device, dtype=wide.dtype) * (-torch.pi / (2 * size))
    scale = torch.full((size,), (2.0 / size) ** 0.5, device=x.device, dtype=wide.dtype)
    scale[0] = (1.0 / size) ** 0.5
    turn = torch.polar(scale, angle)
    if not stage.inverse:
        evens, odds = wide[:, ::2], wide[:, 1::2].flip(1)
        spectrum = torch.fft.fft(torch.cat([evens, odds], 1))
        turned: Tensor = (spectrum * turn).real
        return turned.to(x.dtype)
    # The transpose of the above, step by step.
    spectrum = torch.fft.fft(wide * turn)
    moved, half = spectrum.real, (size + 1) // 2
    result = torch.empty_like(wide)
    result[:, ::2] = moved[:, :half]
    result[:, 1::2] = moved[:, half:].flip(1)
    return result.to(x.dtype)


def _call(stage: Call, tensors: Tensors, x: Tensor) -> Tensor:
    weights = [tensors[name] for name, _ in stage.tensors]
    if not stage.transposed:
        return stage.function(x, *weights)
    start = x.new_zeros(x.shape[0], stage.width)
    pull = torch.func.vjp(lambda v: stage.function(v, *weights), start)[1]
    # The vector-Jacobian product of PyTorch conjugates; the transpose does not.
    result: Tensor = pull(x.conj() if x.is_complex() else x)[0]
    return result.conj() if result.is_complex() else result

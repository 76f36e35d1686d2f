"""Programs written out as explicit matrices, from the definitions of their stages and nothing else.

Slow and simple on purpose: it shares no code with the backends, so that both can't be wrong in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.program import (
    Call,
    Chain,
    Complex,
    Contraction,
    Convolution,
    Cosine,
    Crop,
    Derived,
    Diagonal,
    Fourier,
    Generated,
    Hadamard,
    Interpolation,
    Pad,
    Pairs,
    Permute,
    Program,
    Real,
    Reorder,
    Shuffle,
    Sparse,
    Stage,
    Sum,
    Windowed,
)

Tensors = Mapping[str, Tensor]


def explicit(program: Program, tensors: Tensors) -> Tensor:
    """The matrix (out_features, in_features) of a program, in the dtype of its tensors (float64 where it has none).

    A section between ``Complex`` and ``Real`` is linear over the reals only as a whole: the real part is taken where
    the program says so, which for real inputs is the same as taking it of the matrix.
    """
    if isinstance(program, Chain):
        matrix = explicit(program.steps[0], tensors)
        for step in program.steps[1:]:
            if isinstance(step, Real):
                matrix = matrix.real if matrix.is_complex() else matrix
                continue
            left = explicit(step, tensors)
            wide = torch.promote_types(left.dtype, matrix.dtype)
            matrix = left.to(wide) @ matrix.to(wide)
        return matrix
    if isinstance(program, Sum):
        return torch.stack([explicit(part, tensors) for part in program.parts]).sum(0)
    return _stage(program, tensors)


def _stage(stage: Stage, tensors: Tensors) -> Tensor:
    match stage:
        case Contraction():
            rows, columns = _contraction_support(stage)
            stored = tensors[stage.weight].reshape(stage.stored_shape)
            weight = (stored.transpose(1, 2) if stage.transposed else stored).expand(stage.pattern)
            matrix = weight.new_zeros(stage.out_features, stage.in_features)
            matrix[rows, columns] = weight
            return matrix
        case Diagonal(weight=name, spectrum=spectrum):
            weight = tensors[name].reshape(-1)
            return torch.diag(_fourier(stage.size) @ weight.to(torch.complex128) if spectrum else weight)
        case Permute(index=name, inverse=inverse):
            matrix = torch.zeros(stage.in_features, stage.in_features, dtype=torch.float64)
            for i, j in enumerate(tensors[name].tolist()):
                matrix[(j, i) if inverse else (i, j)] = 1.0
            return matrix
        case Shuffle(sizes=sizes, axes=axes):
            matrix = torch.zeros(stage.in_features, stage.in_features, dtype=torch.float64)
            order = torch.arange(stage.in_features).reshape(sizes).permute(axes).flatten()
            matrix[torch.arange(stage.in_features), order] = 1.0
            return matrix
        case Fourier(size=size, inverse=inverse):
            return _fourier(size).conj() / size if inverse else _fourier(size)
        case Sparse(height=height, width=width):
            matrix = tensors[stage.values].new_zeros(height, width)
            for k, place in enumerate(tensors[stage.places].tolist()):
                matrix[place // width, place % width] += tensors[stage.values].reshape(-1)[k]
            return matrix.T if stage.transposed else matrix
        case Interpolation(rank=rank, size=size):
            weight = tensors[stage.weight].reshape(rank, size - rank)
            matrix = weight.new_zeros(rank, size)
            for j, place in enumerate(tensors[stage.places].tolist()):
                if place < rank:
                    matrix[place, j] = 1.0
                else:
                    matrix[:, j] = weight[:, place - rank]
            return matrix.T if stage.transposed else matrix
        case Windowed():
            left, right = _window_factors(stage, tensors)
            matrix = left @ right
            return matrix.T if stage.transposed else matrix
        case Convolution():
            matrix = _convolution(stage, tensors[stage.weight])
            return matrix.T if stage.transposed else matrix
        case Generated():
            values = [tensors[name] for name in (*(name for name, _ in stage.tensors), *stage.fixed)]
            matrix = stage.function(*values, *stage.arguments)
            return matrix.T if stage.transposed else matrix
        case Pad(before=before) | Crop(before=before):
            offset = -before if isinstance(stage, Pad) else before
            ones = torch.ones(min(stage.in_features, stage.out_features), dtype=torch.float64)
            matrix = torch.zeros(stage.out_features, stage.in_features, dtype=torch.float64)
            matrix.diagonal(offset)[: len(ones)] = ones
            return matrix
        case Derived():
            return _stage(stage.stage, {**tensors, stage.name: stage.form(tensors[stage.name])})
        case Pairs():
            return _pairs(stage, tensors)
        case Reorder():
            matrix = torch.zeros(stage.size, stage.size, dtype=torch.float64)
            for i, j in enumerate(stage.order.index().tolist()):
                matrix[(j, i) if stage.inverse else (i, j)] = 1.0
            return matrix
        case Hadamard(size=size):
            signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
            return torch.tensor(signs, dtype=torch.float64)
        case Cosine(size=size, inverse=inverse):
            number = torch.arange(size, dtype=torch.float64)
            matrix = torch.cos(torch.outer(number, 2 * number + 1) * (math.pi / (2 * size))) * math.sqrt(2 / size)
            matrix[0] *= 0.5**0.5
            return matrix.T if inverse else matrix
        case Real() | Complex():
            return torch.eye(stage.out_features, dtype=torch.float64)
        case _:
            assert isinstance(stage, Call), f"unknown stage {type(stage).__name__}"
            weights = [tensors[name] for name, _ in stage.tensors]
            eye = torch.eye(stage.width, dtype=weights[0].dtype if weights else torch.float64)
            called: Tensor = stage.function(eye, *weights)
            return called if stage.transposed else called.T


def _pairs(stage: Pairs, tensors: Tensors) -> Tensor:
    if not stage.is_complex:
        half = _stage(stage.stage, tensors)
        if not isinstance(stage.stage, Fourier):
            both: Tensor = torch.block_diag(half, half)
            return both
    inner = {name: torch.view_as_complex(tensors[name].reshape(-1, 2)) for name in stage.stage.weights}
    matrix = _stage(stage.stage, {**tensors, **inner}).to(torch.complex128)
    imag = -matrix.imag if stage.conjugate else matrix.imag
    return torch.cat([torch.cat([matrix.real, -imag], 1), torch.cat([imag, matrix.real], 1)], 0)


def _fourier(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    angle = -2 * math.pi * (torch.outer(index, index) % size) / size
    return torch.polar(torch.ones_like(angle), angle)


def _contraction_support(stage: Contraction) -> tuple[Tensor, Tensor]:
    """Row and column of each entry (a, b, c, d) of the full weight."""
    a, b, c, d = stage.pattern
    i, j = torch.arange(a).reshape(-1, 1, 1, 1), torch.arange(b).reshape(1, -1, 1, 1)
    k, l = torch.arange(c).reshape(1, 1, -1, 1), torch.arange(d).reshape(1, 1, 1, -1)
    rows, columns = (i * b + j) * d + l, (i * c + k) * d + l
    return rows.expand(a, b, c, d), columns.expand(a, b, c, d)


def _convolution(stage: Convolution, weight: Tensor) -> Tensor:
    """Diagonal by diagonal, in all blocks at once."""
    height, width = stage.height, stage.width
    weight = weight.reshape(stage.outputs, stage.inputs, stage.entries)
    matrix = weight.new_zeros(stage.outputs, height, stage.inputs, width)
    # Antidiagonals are the diagonals of the columns in reverse order.
    for offset in range(1 - height, width):  # j - i
        place = width - 1 - offset if stage.hankel else -offset
        diagonal = matrix.diagonal(offset, 1, 3)  # (outputs, inputs, length)
        if stage.twist is None:
            diagonal[...] = weight[:, :, place + (0 if stage.hankel else width - 1), None]
        else:
            wrapped = place >= stage.period or place < 0
            diagonal[...] = (stage.twist if wrapped else 1.0) * weight[:, :, place % stage.period, None]
    matrix = matrix.flip(3) if stage.hankel else matrix
    return matrix.reshape(stage.outputs * height, stage.inputs * width)


def _window_factors(stage: Windowed, tensors: Tensors) -> tuple[Tensor, Tensor]:
    left = tensors[stage.left].new_zeros(stage.height, stage.terms)
    right = tensors[stage.right].new_zeros(stage.terms, stage.width)
    at_left = at_right = 0
    for term, (row, height, column, width) in enumerate(tensors[stage.windows].tolist()):
        for step in range(height):
            left[(row + step) % stage.height, term] += tensors[stage.left].reshape(-1)[at_left + step]
        for step in range(width):
            right[term, (column + step) % stage.width] += tensors[stage.right].reshape(-1)[at_right + step]
        at_left, at_right = at_left + height, at_right + width
    return left, right


# --------------------------------------------------------------------------------------------------------- counting


def count_operations(program: Program, tensors: Tensors) -> tuple[int, int, int] | None:
    """Multiplications, additions and empty rows of one product with a real vector, by counting non-zero positions.

    A matrix with ``q`` positions in ``p`` non-empty rows takes ``q`` multiplications and ``q - p`` additions. None
    for a program with stages whose count is a model (``Fourier``, a ``Convolution`` by transforms) or stated
    (``Call``).
    """
    if isinstance(program, Chain | Sum):
        inner = program.steps if isinstance(program, Chain) else program.parts
        counts = [count_operations(part, tensors) for part in inner]
        known = [c for c in counts if c is not None]
        if len(known) < len(counts):
            return None
        joins = program.out_features * (len(inner) - 1) if isinstance(program, Sum) else 0
        return sum(c[0] for c in known), sum(c[1] for c in known) + joins, sum(c[2] for c in known)
    if isinstance(program, Fourier | Cosine | Call) or (isinstance(program, Convolution) and program.transform):
        return None
    if isinstance(program, Pairs) and isinstance(program.stage, Fourier):
        return None
    if isinstance(program, Hadamard):
        return 0, program.size * (program.size.bit_length() - 1), 0
    if isinstance(program, Derived):  # which entries there are does not depend on their values
        sizes = program.stage.weights
        return count_operations(program.stage, {**tensors, **{name: torch.ones(sizes[name]) for name in sizes}})
    if not program.weights:
        return 0, 0, 0
    if isinstance(program, Pairs):  # 4 real products, 2 joins of results
        sizes = program.stage.weights
        half = count_operations(program.stage, {**tensors, **{name: torch.ones(sizes[name]) for name in sizes}})
        if half is None:
            return None
        if not program.is_complex:
            return 2 * half[0], 2 * half[1], 2 * half[2]
        return 4 * half[0], 4 * half[1] + 2 * program.stage.out_features, 2 * half[2]
    ones = {name: torch.ones_like(t) if t.is_floating_point() else t for name, t in tensors.items()}
    if isinstance(program, Windowed):
        left, right = _window_factors(program, ones)
        factors = [left.T, right.T] if program.transposed else [right, left]
    elif isinstance(program, Diagonal):
        factors = [torch.eye(program.size)]
    elif isinstance(program, Convolution | Generated):  # a place is a multiplication, whatever stands there
        factors = [torch.ones(program.out_features, program.in_features)]
    else:
        factors = [explicit(program, ones)]
    entries = [round(float(f.sum())) for f in factors]  # counts an entry that is written twice twice
    filled = [int((f.sum(1) > 0).sum()) for f in factors]
    empty = sum(f.shape[0] for f in factors) - sum(filled)
    copied = program.rank if isinstance(program, Interpolation) else 0  # the identity's ones are no multiplications
    return sum(entries) - copied, sum(entries) - sum(filled), empty

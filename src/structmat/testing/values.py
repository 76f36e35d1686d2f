"""Checks of what a structure computes: linear, equal to its matrix, in every batch shape and dtype."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from structmat.matrix import StructuredMatrix, matmul
from structmat.nn.linear import StructuredLinear
from structmat.program import apply, derive, stages, transpose
from structmat.structure import allows_complex
from structmat.testing.case import Case, SkippedCheckError, absolute, allowed_error, magnitude, roundings
from structmat.testing.oracle import explicit

EXPLICIT_LIMIT = 1 << 15
"""Stages with more positions are not written out as explicit matrices: that would take seconds."""

FLOAT64_EPS = torch.finfo(torch.float64).eps


def small_enough_to_write_out(case: Case) -> bool:
    """Whether the stages' explicit matrices are small enough to be made."""
    return all(s.in_features * s.out_features <= EXPLICIT_LIMIT for s in stages(case.matrix.program))


def check_linearity(case: Case) -> None:
    """``S (2 x - 3 y) = 2 S x - 3 S y`` and ``S 0 = 0``."""
    program, tensors = case.matrix.program, case.matrix.tensors
    x, y = case.rows(4, dtype=torch.float64, draw=1), case.rows(4, dtype=torch.float64, draw=2)
    together = apply(program, tensors, 2 * x - 3 * y)
    apart = 2 * apply(program, tensors, x) - 3 * apply(program, tensors, y)
    allowed = allowed_error(program, tensors, 2 * x.abs() + 3 * y.abs(), torch.float64)
    case.compare("S (2 x - 3 y) against 2 S x - 3 S y", together, apart, 2 * allowed)
    case.compare("S 0", apply(program, tensors, 0 * x), torch.zeros_like(together), 0.0)


def check_dense(case: Case) -> None:
    """``S x``, ``S X``, ``x S``, ``S.T y`` and the layer equal products with the matrix written out."""
    matrix = case.matrix
    out_features, in_features = case.shape
    x, y = case.rows(3, dtype=torch.float64), case.gaussian(3, out_features, dtype=torch.float64)
    case.require(matrix.shape == case.shape, f"its matrix has shape {matrix.shape}.")
    dense = matrix.to_dense()
    forward = 2 * allowed_error(matrix.program, matrix.tensors, x, torch.float64)
    backward = 2 * allowed_error(transpose(matrix.program), matrix.tensors, y, torch.float64)
    if small_enough_to_write_out(case):
        plain, made = derive(matrix.program, matrix.tensors)
        eye = torch.eye(in_features, dtype=torch.float64)
        size = magnitude(plain, absolute(made), eye, made).T
        allowed = 2 * roundings(matrix.program) * FLOAT64_EPS * size
        case.compare("to_dense()", dense, explicit(matrix.program, matrix.tensors), allowed)
    case.compare("S @ X against the dense matrix", matrix @ x.T, dense @ x.T, forward.T)
    case.compare("S @ x for one vector against the dense matrix", matrix @ x[0], dense @ x[0], forward[0])
    case.compare("y @ S against the dense matrix", y @ matrix, y @ dense, backward)
    case.compare("S.T @ Y against the dense matrix", matrix.T @ y.T, dense.T @ y.T, backward.T)
    case.compare("S.T.to_dense()", matrix.T.to_dense(), dense.T, _dense_allowance(matrix).T)
    out = torch.empty(out_features, 3, dtype=torch.float64)
    case.require(matmul(matrix, x.T, out=out) is out, "matmul(out=) does not return out.")
    case.compare("matmul(S, X, out=)", out, matrix @ x.T, 0.0)
    layer = StructuredLinear.from_matrix(matrix)
    case.compare("the layer against the dense matrix", layer(x), x @ dense.T, forward)


def _dense_allowance(matrix: StructuredMatrix) -> Tensor:
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    return 2 * allowed_error(matrix.program, matrix.tensors, eye, torch.float64).T


def check_adjoint(case: Case) -> None:
    """``<S x, y> = <x, S^T y>``."""
    program, tensors = case.matrix.program, case.matrix.tensors
    x, y = case.rows(5, dtype=torch.float64), case.gaussian(5, case.shape[0], dtype=torch.float64, draw=2)
    left = (apply(program, tensors, x) * y).sum(-1)
    right = (x * apply(transpose(program), tensors, y)).sum(-1)
    size = (allowed_error(program, tensors, x, torch.float64) * y.abs()).sum(-1)
    backward = (allowed_error(transpose(program), tensors, y, torch.float64) * x.abs()).sum(-1)
    case.compare("<S x, y> against <x, S^T y>", left, right, 2 * (size + backward))


def check_transpose(case: Case) -> None:
    """The transpose of the transpose is the program itself, and takes as many multiplications."""
    matrix = case.matrix
    case.require(matrix.T.T.program == matrix.program, "S.T.T has another program than S.")
    case.require(matrix.T.shape == matrix.shape[::-1], f"S.T has shape {matrix.T.shape}.")
    case.require(
        matrix.T.cost.multiplications == matrix.cost.multiplications,
        f"S takes {matrix.cost.multiplications} multiplications and S.T {matrix.T.cost.multiplications}; "
        "by the transposition principle they are equal.",
    )
    case.require(
        matrix.T.num_parameters == matrix.num_parameters,
        f"S has {matrix.num_parameters} parameters and S.T {matrix.T.num_parameters}.",
    )


def check_batch_shapes(case: Case) -> None:
    """Any leading axes, batches of size 0 included, give what row by row gives."""
    layer = case.layer(torch.float64)
    bias = layer.bias
    assert bias is not None
    for batch in [(), (0,), (1,), (3,), (2, 3), (2, 0, 3)]:
        x = case.rows(*batch, dtype=torch.float64)
        y = layer(x)
        case.require(
            tuple(y.shape) == (*batch, case.shape[0]),
            f"inputs {tuple(x.shape)} give outputs {tuple(y.shape)} instead of {(*batch, case.shape[0])}.",
        )
        flat = x.reshape(-1, case.shape[1])
        rows = [layer(row) for row in flat]
        expected = torch.stack(rows).reshape(y.shape) if rows else torch.zeros_like(y)
        allowed = allowed_error(layer.matrix.program, layer.tensors(), x, torch.float64) + _bias_error(bias)
        case.compare(f"the layer on inputs {tuple(x.shape)} against row by row", y, expected, 2 * allowed)
        columns = x.transpose(-1, -2) if x.dim() > 1 else x
        product = case.matrix @ columns
        wanted = (case.shape[0],) if x.dim() == 1 else (*batch[:-1], case.shape[0], batch[-1])
        case.require(tuple(product.shape) == wanted, f"S @ {tuple(columns.shape)} has shape {tuple(product.shape)}.")


def _bias_error(bias: Tensor) -> Tensor:
    return 4 * torch.finfo(bias.dtype).eps * bias.detach().abs().to(torch.float64)


def check_non_contiguous(case: Case) -> None:
    """Strided, transposed and expanded inputs give what their contiguous copies give, and stay unchanged."""
    layer = case.layer(torch.float64)
    in_features = case.shape[1]
    wide = case.gaussian(4, 2 * in_features, dtype=torch.float64)
    inputs = {
        "strided": wide[:, ::2],
        "transposed": case.gaussian(in_features, 4, dtype=torch.float64).T,
        "expanded": case.gaussian(1, in_features, dtype=torch.float64).expand(4, -1),
        "offset": case.gaussian(6, in_features + 1, dtype=torch.float64)[1:5, 1:],
    }
    for name, x in inputs.items():
        before = x.clone()
        allowed = 2 * allowed_error(layer.matrix.program, layer.tensors(), x, torch.float64) + _bias_error(
            layer.bias if layer.bias is not None else x.new_zeros(case.shape[0])
        )
        case.compare(
            f"the layer on {name} inputs", layer(x), layer(x.clone(memory_format=torch.contiguous_format)), allowed
        )
        case.require(torch.equal(before, x), f"the layer changes its {name} input.")


def check_dtypes(case: Case) -> None:
    """In float32 and bfloat16 the result has the dtype of the operands and only their rounding errors."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = case.member(dtype)
        x = case.rows(4, dtype=dtype)
        y = apply(matrix.program, matrix.tensors, x)
        case.require(y.dtype == dtype, f"inputs and tensors of {dtype} give {y.dtype}.")
        wide = matrix.to(dtype=torch.float64)
        truth = apply(wide.program, wide.tensors, x.to(torch.float64))
        allowed = allowed_error(matrix.program, matrix.tensors, x, dtype)
        case.compare(f"the product in {dtype} against float64", y, truth, allowed)
        layer = case.layer(dtype)
        case.require(layer(x).dtype == dtype, f"a layer of {dtype} gives {layer(x).dtype}.")


def check_complex(case: Case) -> None:
    """complex64 and complex128: linear over the complex numbers, transposed without conjugation, counted as pairs."""
    if not allows_complex(case.structure):
        raise SkippedCheckError(f"{case.structure} declares that its tensors are real")
    for dtype, real in ((torch.complex64, torch.float32), (torch.complex128, torch.float64)):
        matrix = case.member(dtype)
        x, y = case.rows(3, dtype=dtype), case.gaussian(3, case.shape[0], dtype=dtype, draw=2)
        wide = StructuredMatrix(
            matrix.structure,
            case.shape,
            {n: t.to(torch.complex128) if t.is_complex() else t for n, t in matrix.tensors.items()},
            dtype=torch.complex128,
        )
        truth = x.to(torch.complex128) @ wide.to_dense().T
        got = apply(matrix.program, matrix.tensors, x)
        case.require(got.dtype == dtype, f"inputs and tensors of {dtype} give {got.dtype}.")
        allowed = 4 * allowed_error(matrix.program, matrix.tensors, x, real)
        case.compare(f"the product in {dtype} against the dense matrix", got, truth, allowed)
        adjoint = apply(transpose(matrix.program), matrix.tensors, y)
        size = (allowed * y.abs()).sum(-1) + (
            4 * allowed_error(transpose(matrix.program), matrix.tensors, y, real) * x.abs()
        ).sum(-1)
        case.compare(f"<S x, y> against <x, S^T y> in {dtype}", (got * y).sum(-1), (x * adjoint).sum(-1), 2 * size)
        layer = case.layer(dtype)
        case.require(layer(x).dtype == dtype, f"a layer of {dtype} gives {layer(x).dtype}.")
        learned = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        case.require(
            learned == matrix.num_parameters,
            f"a complex layer holds {learned} real numbers, num_parameters is {matrix.num_parameters}.",
        )


def check_autocast(case: Case) -> None:
    """Under autocast to bfloat16 the output is bfloat16, finite and right to that precision, forward and backward."""
    layer = case.layer(torch.float32)
    assert layer.bias is not None
    x = case.rows(4, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    case.require(y.dtype == torch.bfloat16, f"under autocast to bfloat16 the output is {y.dtype}.")
    wide = copy.deepcopy(layer).to(torch.float64)
    allowed = allowed_error(layer.matrix.program, layer.tensors(), x, torch.bfloat16)
    allowed = 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps * layer.bias.detach().abs().to(torch.float64)
    case.compare("the output under autocast", y, wide(x.detach().to(torch.float64)), allowed)
    y.sum().backward()
    for name, tensor in [("the input", x), *layer.named_parameters()]:
        case.require(
            tensor.grad is not None and tensor.grad.dtype == torch.float32 and bool(tensor.grad.isfinite().all()),
            f"under autocast {name} gets no finite float32 gradient.",
        )

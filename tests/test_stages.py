"""Every stage and combinator: the reference against an explicit dense matrix, transposes, counts, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from structmat.errors import ShapeError
from structmat.program import (
    FOR_REFERENCE,
    Call,
    Chain,
    Complex,
    Contraction,
    Crop,
    Diagonal,
    Fourier,
    Interpolation,
    Pad,
    Permute,
    Program,
    Real,
    Shuffle,
    Sparse,
    Sum,
    Windowed,
    apply,
    cost,
    form,
    rename,
    simplify,
    stages,
    table,
    tensor_sizes,
    transpose,
)
from structmat.program.fuse import fuse
from structmat.program.reference import Form
from structmat.program.scaling import scaling_cut

F64 = torch.float64
C128 = torch.complex128


def dense_contraction(stage: Contraction, tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix entry by entry, from the definition."""
    a, b, c, d = stage.pattern
    weight = tensors[stage.weight].reshape(stage.stored_shape)
    matrix = torch.zeros(a * b * d, a * c * d, dtype=weight.dtype)
    for i in range(a):
        for j in range(b):
            for k in range(c):
                for l in range(d):
                    row, column = (k, j) if stage.transposed else (j, k)
                    entry = weight[0 if stage.shared_a else i, row, column, 0 if stage.shared_d else l]
                    matrix[(i * b + j) * d + l, (i * c + k) * d + l] = entry
    return matrix


def dense_sparse(stage: Sparse, tensors: Mapping[str, Tensor]) -> Tensor:
    matrix = torch.zeros(stage.height, stage.width, dtype=tensors[stage.values].dtype)
    for value, place in zip(tensors[stage.values], tensors[stage.places].tolist(), strict=True):
        matrix[divmod(place, stage.width)] += value
    return matrix


def dense_windowed(stage: Windowed, tensors: Mapping[str, Tensor]) -> Tensor:
    left, right = tensors[stage.left].tolist(), tensors[stage.right].tolist()
    matrix = torch.zeros(stage.height, stage.width, dtype=F64)
    for row, tall, column, wide in tensors[stage.windows].tolist():
        for i in range(tall):
            for j in range(wide):
                matrix[(row + i) % stage.height, (column + j) % stage.width] += left[i] * right[j]
        left, right = left[tall:], right[wide:]
    return matrix.T if stage.transposed else matrix


def dense_fourier(size: int) -> Tensor:
    k = torch.arange(size, dtype=F64)
    return torch.exp(-2j * torch.pi * torch.outer(k, k) / size)


def embedding(size: int, padded: int, before: int) -> Tensor:
    matrix = torch.zeros(padded, size, dtype=F64)
    matrix[before : before + size] = torch.eye(size, dtype=F64)
    return matrix


def scale_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Rows times a tall matrix whose upper part is a diagonal: the function of a ``Call``."""
    return torch.cat([x * weight, x.sum(-1, keepdim=True)], -1)


def check(program: Program, tensors: dict[str, Tensor], dense: Tensor, *, dtype: torch.dtype = F64) -> None:
    """Apply, transposed apply, shapes, laws, gradients in the input and every learned tensor."""
    height, width = dense.shape
    assert (program.out_features, program.in_features) == (height, width)
    x, y = torch.randn(4, width, dtype=dtype), torch.randn(4, height, dtype=dtype)
    expected = x.to(torch.promote_types(dense.dtype, dtype)) @ dense.T.to(torch.promote_types(dense.dtype, dtype))
    torch.testing.assert_close(apply(program, tensors, x), expected, check_dtype=False, rtol=1e-11, atol=1e-12)
    for shape in ((width,), (0, width), (2, 3, width)):
        rows = torch.randn(shape, dtype=dtype)
        assert apply(program, tensors, rows).shape == (*shape[:-1], height)
    with pytest.raises(ShapeError, match="last axis"):
        apply(program, tensors, torch.randn(2, width + 1, dtype=dtype))
    flipped = transpose(program)
    assert transpose(flipped) == program
    back = apply(flipped, tensors, y.to(expected.dtype))
    torch.testing.assert_close(
        back, y.to(expected.dtype) @ dense.to(expected.dtype), check_dtype=False, rtol=1e-11, atol=1e-12
    )
    assert cost(flipped).multiplications == cost(program).multiplications
    torch.testing.assert_close(apply(simplify(program), tensors, x), apply(program, tensors, x))
    assert "total" in table(program)
    named = rename(program, lambda name: f"part_{name}")
    moved = {f"part_{name}": tensor for name, tensor in tensors.items()}
    torch.testing.assert_close(apply(named, moved, x), apply(program, tensors, x))
    learned = sorted(tensor_sizes(program))
    assert all(tensors[name].numel() == size for name, size in tensor_sizes(program).items())
    inputs = [x.clone().requires_grad_(), *(tensors[name].clone().requires_grad_() for name in learned)]

    def run(which: Program):  # type: ignore[no-untyped-def]
        return lambda v, *ws: apply(which, {**tensors, **dict(zip(learned, ws, strict=True))}, v)

    assert torch.autograd.gradcheck(run(program), inputs)
    inputs[0] = y.to(expected.dtype).clone().requires_grad_()
    assert torch.autograd.gradcheck(run(flipped), inputs)


small = st.integers(1, 4)


@given(small, st.integers(1, 6), st.integers(1, 6), small, st.booleans(), st.booleans(), st.booleans())
def test_contraction(a: int, b: int, c: int, d: int, shared_a: bool, shared_d: bool, transposed: bool) -> None:
    stage = Contraction("w", a, b, c, d, shared_a, shared_d, transposed)
    tensors = {"w": torch.randn(stage.stored_shape, dtype=F64)}
    dense = dense_contraction(stage, tensors)
    x = torch.randn(3, stage.in_features, dtype=F64)
    torch.testing.assert_close(apply(stage, tensors, x), x @ dense.T)
    y = torch.randn(3, stage.out_features, dtype=F64)
    torch.testing.assert_close(apply(stage.transpose(), tensors, y), y @ dense)
    assert stage.multiplications == int((dense != 0).sum())
    assert stage.additions == int((dense != 0).sum()) - stage.out_features
    assert form(stage) in (Form.MATMUL, Form.UNROLLED, Form.BATCHED)


@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("pattern", [(1, 6, 5, 1), (3, 2, 4, 2), (2, 5, 6, 3), (2, 6, 5, 1), (1, 5, 6, 2)])
@pytest.mark.parametrize("dtype", [F64, C128])
def test_contraction_in_full(pattern: tuple[int, int, int, int], shared: tuple[bool, bool], dtype: torch.dtype) -> None:
    stage = Contraction("w", *pattern, *shared)
    tensors = {"w": torch.randn(stage.stored_shape, dtype=dtype)}
    check(stage, tensors, dense_contraction(stage, tensors), dtype=dtype)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_diagonal(dtype: torch.dtype) -> None:
    tensors = {"w": torch.randn(6, dtype=dtype)}
    check(Diagonal("w", 6), tensors, tensors["w"].diag(), dtype=dtype)
    assert (cost(Diagonal("w", 6)).macs, cost(Diagonal("w", 6)).additions) == (6, 0)


def test_circulant_by_fourier() -> None:
    """A diagonal of the transformed weight between two transforms is a circulant matrix."""
    n = 6
    weight = torch.randn(n, dtype=F64)
    dense = torch.stack([torch.roll(weight, j) for j in range(n)], 1)
    program = Chain((Complex(n), Fourier(n), Diagonal("w", n, spectrum=True), Fourier(n, inverse=True), Real(n)))
    x = torch.randn(3, n, dtype=F64)
    torch.testing.assert_close(apply(program, {"w": weight}, x), x @ dense.T)
    torch.testing.assert_close(apply(transpose(program), {"w": weight}, x), x @ dense)
    w = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: apply(program, {"w": w}, v), (x.requires_grad_(), w))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_fourier(size: int, inverse: bool) -> None:
    matrix = dense_fourier(size)
    check(Fourier(size, inverse), {}, matrix.conj() / size if inverse else matrix, dtype=C128)
    assert Fourier(8).multiplications == 2 * 8 * 3


def test_real_and_complex() -> None:
    x = torch.randn(3, 5, dtype=C128)
    assert torch.equal(apply(Real(5), {}, x), x.real)
    assert torch.equal(apply(Real(5), {}, x.real), x.real)
    assert torch.equal(apply(Complex(5), {}, x.real), torch.complex(x.real, torch.zeros_like(x.real)))
    assert Real(5).transpose() == Complex(5)
    check(Chain((Complex(5), Real(5))), {}, torch.eye(5, dtype=F64))
    # Over the reals <Re z, y> = Re <z, y>: the adjoint identity of a chain with a complex section.
    tensors = {"w": torch.randn(1, 4, 5, 1, dtype=C128)}
    check(Chain((Complex(5), Contraction("w", 1, 4, 5, 1), Real(4))), tensors, tensors["w"][0, :, :, 0].real)


def test_permute_and_shuffle() -> None:
    index = torch.tensor([2, 0, 3, 1])
    matrix = torch.eye(4, dtype=F64)[index]
    check(Permute("p", 4), {"p": index}, matrix)
    check(Permute("p", 4, inverse=True), {"p": index}, matrix.T)
    order = torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1).reshape(-1)
    check(Shuffle((2, 3, 4), (2, 0, 1)), {}, torch.eye(24, dtype=F64)[order])
    assert cost(Shuffle((2, 3, 4), (2, 0, 1))).flops == 0


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 5))
def test_pad_and_crop(size: int, before: int, after: int) -> None:
    padded = size + before + after
    matrix = embedding(size, padded, before)
    x, y = torch.randn(2, size, dtype=F64), torch.randn(2, padded, dtype=F64)
    assert torch.equal(apply(Pad(size, padded, before), {}, x), x @ matrix.T)
    assert torch.equal(apply(Crop(padded, size, before), {}, y), y @ matrix)
    assert Pad(size, padded, before).transpose() == Crop(padded, size, before)
    assert Crop(padded, size, before).transpose() == Pad(size, padded, before)
    assert simplify(Chain((Pad(size, padded, before), Crop(padded, size, before)))).in_features == size


@pytest.mark.parametrize(("capacity", "kind"), [(3, Form.GATHER), (40, Form.MATERIALISED)])
@pytest.mark.parametrize("dtype", [F64, C128])
def test_sparse(capacity: int, kind: Form, dtype: torch.dtype) -> None:
    """Repeated positions add up; both forms of the reference."""
    stage = Sparse("v", "p", 20, 16, capacity)
    tensors = {"v": torch.randn(capacity, dtype=dtype), "p": torch.randint(0, 20 * 16, (capacity,))}
    tensors["p"][0] = tensors["p"][1]
    assert form(stage) is kind
    check(stage, tensors, dense_sparse(stage, tensors), dtype=dtype)
    assert cost(stage).macs == cost(stage).parameters == capacity


@pytest.mark.parametrize("transposed", [False, True])
def test_windowed(transposed: bool) -> None:
    """Windows that wrap around, overlap, are empty or full."""
    windows = torch.tensor([[0, 3, 4, 2], [5, 4, 3, 5], [2, 0, 1, 3], [1, 7, 0, 6], [6, 1, 5, 1]])
    tall, wide = int(windows[:, 1].sum()), int(windows[:, 3].sum())
    stage = Windowed("l", "r", "w", 7, 6, 5, tall, wide, transposed)
    tensors = {"l": torch.randn(tall, dtype=F64), "r": torch.randn(wide, dtype=F64), "w": windows}
    check(stage, tensors, dense_windowed(stage, tensors))
    assert cost(stage).macs == tall + wide


def test_call() -> None:
    weight = torch.randn(5, dtype=F64)
    dense = torch.cat([weight.diag(), torch.ones(1, 5, dtype=F64)])
    stage = Call(scale_rows, (("w", 5),), 6, 5, 5, 4, 4)
    check(stage, {"w": weight}, dense)
    assert (cost(stage).additions, cost(stage.transpose()).additions) == (4, 5)
    assert form(stage) is Form.FUNCTION
    complex_weight = torch.randn(5, dtype=C128)
    y = torch.randn(2, 6, dtype=C128)
    matrix = torch.cat([complex_weight.diag(), torch.ones(1, 5, dtype=C128)])
    torch.testing.assert_close(apply(stage.transpose(), {"w": complex_weight}, y), y @ matrix)


def test_chain_and_sum() -> None:
    tensors = {
        "a": torch.randn(1, 4, 6, 1, dtype=F64),
        "b": torch.randn(2, 3, 2, 1, dtype=F64),
        "d": torch.randn(6, dtype=F64),
        "v": torch.randn(5, dtype=F64),
        "s": torch.randint(0, 36, (5,)),
        "p": torch.randperm(6),
    }
    first, second = Contraction("a", 1, 4, 6, 1), Contraction("b", 2, 3, 2, 1)
    sparse = Sparse("v", "s", 6, 6, 5)
    program = Sum((Chain((first, second)), Diagonal("d", 6), Chain((Permute("p", 6), sparse))))
    dense = (
        dense_contraction(second, tensors) @ dense_contraction(first, tensors)
        + tensors["d"].diag()
        + dense_sparse(sparse, tensors) @ torch.eye(6, dtype=F64)[tensors["p"]]
    )
    check(program, tensors, dense)
    assert cost(program).macs == 24 + 12 + 6 + 5
    assert cost(program).additions == 20 + 6 + 0 + 0 + 2 * 6
    assert cost(program).parameters == 24 + 12 + 6 + 5
    assert len(stages(program)) == 5


def test_scaling_cut() -> None:
    """Multiplying the tensors of the cut by a number multiplies the matrix by it."""
    first, second = Contraction("a", 1, 4, 6, 1), Contraction("b", 2, 3, 2, 1)
    program = Sum((Chain((first, second)), Diagonal("d", 6)))
    tensors = {
        "a": torch.randn(1, 4, 6, 1, dtype=F64),
        "b": torch.randn(2, 3, 2, 1, dtype=F64),
        "d": torch.randn(6, dtype=F64),
    }
    cut = scaling_cut(program)
    assert cut == {"b", "d"}
    scaled = {name: 3 * t if name in cut else t for name, t in tensors.items()}
    x = torch.randn(2, 6, dtype=F64)
    torch.testing.assert_close(apply(program, scaled, x), 3 * apply(program, tensors, x))
    twice = Chain((Contraction("a", 1, 4, 4, 1), Contraction("a", 1, 4, 4, 1)))
    assert scaling_cut(twice) is None
    assert scaling_cut(Chain((*twice.steps, Diagonal("d", 4)))) == {"d"}
    assert scaling_cut(Call(scale_rows, (("w", 5),), 6, 5, 5, 4, 4)) is None


@given(rank=st.integers(1, 5), others=st.integers(1, 5))
def test_interpolation(rank: int, others: int) -> None:
    weight, places = torch.randn(rank, others, dtype=F64), torch.randperm(rank + others)
    dense = torch.cat([torch.eye(rank, dtype=F64), weight], 1)[:, places]
    stage, tensors = Interpolation("w", "p", rank, rank + others), {"w": weight, "p": places}
    check(stage, tensors, dense)
    program, written = fuse(stage, tensors, replace(FOR_REFERENCE, growth=1.0))
    x = torch.randn(3, rank + others, dtype=F64)
    torch.testing.assert_close(apply(program, written, x), x @ dense.T)
    assert "p" not in written

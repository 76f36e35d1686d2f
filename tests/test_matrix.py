"""Structured matrices as values: products as torch.matmul, out=, errors."""

from __future__ import annotations

import pytest
import torch

import structmat as sm
from structmat.errors import ShapeError


@pytest.fixture
def matrix(generator: torch.Generator) -> sm.StructuredMatrix:
    return sm.StructuredMatrix.random(sm.LowRank(2), (4, 6), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0, 5), (3, 0)])
def test_products_have_the_shapes_of_matmul(matrix: sm.StructuredMatrix, batch: tuple[int, ...]) -> None:
    dense = matrix.to_dense()
    columns = torch.randn(*batch, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(matrix @ columns, dense @ columns)
    rows = torch.randn(*batch, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(rows @ matrix, rows @ dense)
    assert (matrix @ torch.ones(6, dtype=torch.float64)).shape == (4,)


def test_out_is_filled_in_place(matrix: sm.StructuredMatrix) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    strided = torch.zeros(3, 4, dtype=torch.float64).T
    assert sm.matmul(matrix, x, out=strided) is strided
    torch.testing.assert_close(strided, matrix @ x)
    vector = torch.empty(4, dtype=torch.float64)
    torch.testing.assert_close(sm.matmul(matrix, x[:, 0], out=vector), matrix @ x[:, 0])


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32])
def test_out_may_hold_anything_and_be_the_input_itself(out_dtype: torch.dtype) -> None:
    square = sm.StructuredMatrix.random(sm.Monarch(4), (64, 64), dtype=torch.float64)
    x = torch.randn(64, 40, dtype=torch.float64)
    wanted = square @ x
    out = torch.full((64, 40), torch.nan, dtype=out_dtype)
    torch.testing.assert_close(sm.matmul(square, x, out=out), wanted.to(out_dtype))
    repeated = torch.empty(64, 80, dtype=out_dtype)[:, ::2]
    torch.testing.assert_close(sm.matmul(square, x, out=repeated), wanted.to(out_dtype))
    moved = x.clone()
    torch.testing.assert_close(sm.matmul(square, moved, out=moved), wanted)
    shifted = torch.cat([x, torch.zeros(1, 40, dtype=torch.float64)])
    torch.testing.assert_close(sm.matmul(square, shifted[:64], out=shifted[1:]), wanted)


def test_writing_into_what_a_gradient_needs_is_noticed() -> None:
    square = sm.StructuredMatrix.random(sm.Monarch(4), (64, 64), dtype=torch.float64)
    x = torch.randn(64, 40, dtype=torch.float64)
    needed = torch.randn(64, 40, dtype=torch.float64, requires_grad=True).exp()
    outcome = needed.square().sum()
    kept = needed.detach()
    sm.matmul(square, x, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outcome.backward()


def test_wrong_shapes_are_errors_with_the_numbers(matrix: sm.StructuredMatrix) -> None:
    with pytest.raises(ShapeError, match=r"shape \(4, 6\) multiplies vectors \(6,\).*got shape \(5, 3\)"):
        _ = matrix @ torch.ones(5, 3, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"got shape \(\)"):
        _ = matrix @ torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"last axis must hold in_features=4"):
        _ = torch.ones(3, 6, dtype=torch.float64) @ matrix
    with pytest.raises(ShapeError, match=r"out has shape \(4,\); the result has shape \(4, 3\)"):
        sm.matmul(matrix, torch.ones(6, 3, dtype=torch.float64), out=torch.empty(4, dtype=torch.float64))
    with pytest.raises(TypeError):
        _ = [1.0] @ matrix  # type: ignore[operator]


def test_wrong_tensors_are_errors_that_name_them(matrix: sm.StructuredMatrix) -> None:
    tensors = dict(matrix.tensors)
    with pytest.raises(ShapeError, match=r"has the tensors \['left', 'right'\]; got \['left'\]"):
        sm.StructuredMatrix(sm.LowRank(2), (4, 6), {"left": tensors["left"]})
    with pytest.raises(ShapeError, match=r"left of .* has shape \(4, 2\); got \(4, 3\)"):
        sm.StructuredMatrix(sm.LowRank(2), (4, 6), {**tensors, "left": torch.ones(4, 3)})
    with pytest.raises(ShapeError, match="does not fit"):
        sm.StructuredMatrix(sm.LowRank(5), (4, 6), tensors)


def test_a_matrix_is_a_value(matrix: sm.StructuredMatrix) -> None:
    with pytest.raises(TypeError):
        matrix.tensors["left"] = torch.ones(4, 2)  # type: ignore[index]
    transposed = matrix.T
    assert transposed.shape == (6, 4)
    assert matrix.shape == (4, 6)
    assert transposed.tensors["left"] is matrix.tensors["left"]
    assert (transposed.is_transposed, transposed.T.is_transposed) == (True, False)


def test_counts_and_words(matrix: sm.StructuredMatrix) -> None:
    assert matrix.num_parameters == 20
    assert matrix.macs == 20
    assert matrix.flops == 20 + 2 * 5 + 4 * 1
    text = repr(matrix)
    assert "LowRank(rank=2)" in text
    assert "20 parameters = 83.3% of dense" in text
    assert ".T" in repr(matrix.T)
    wide = matrix.to(dtype=torch.complex128)
    assert (wide.dtype, wide.num_parameters) == (torch.complex128, 40)
    assert wide.macs == 4 * matrix.macs


def test_conversion_leaves_index_tensors_alone(generator: torch.Generator) -> None:
    matrix = sm.StructuredMatrix.random(sm.PivotedLowRank(2), (4, 6), generator=generator)
    half = matrix.to(dtype=torch.bfloat16)
    assert half.tensors["places"].dtype == torch.int64
    assert half.dtype == torch.bfloat16
    assert half.to(device="meta").device.type == "meta"

"""What the native library refuses: an error, never a crash."""

from __future__ import annotations

import pytest
import torch
from native_outcomes import needs_native

pytestmark = pytest.mark.filterwarnings("error")


@needs_native
@pytest.mark.parametrize(
    ("program", "tensors", "message"),
    [
        ("rows 2 contract 1 2 3", [(6,)], "bad program"),
        ("rows 1 unknown 1", [], "unknown stage"),
        ("columns 1 crop 1 1 0", [], "begins with columns"),
        ("rows 3 contract 1 4 8 1 0 0 0 0", [(32,)], "another number"),
        ("rows 4 chain 2 crop 8 4 0 crop 8 4 0", [], "sizes"),
        ("rows 4 contract 1 4 8 1 0 0 0 0", [(31,)], "wrong size"),
        ("rows 4 contract 1 4 8 1 0 0 0 0", [], "number of tensors"),
        ("rows 4 contract 1 4 8 1 0 0 0 0 surplus", [(32,)], "follows"),
        ("rows 4 contract 1 4 8 1 0 0 0 3", [(32,)], "never read"),
        ("rows 8 shuffle 2 2 4 0 0", [], "no permutation"),
    ],
)
def test_a_bad_program_is_an_error_and_not_a_crash(program: str, tensors: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.randn(s) for s in tensors], program)


@needs_native
@pytest.mark.parametrize("place", [-1, 64, 10**12])
def test_a_place_out_of_range_is_an_error(place: int) -> None:
    places = torch.arange(5)
    for position in (0, 2, 4):
        own = places.clone()
        own[position] = place
        with pytest.raises(ValueError, match="out of range"):
            torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.randn(5), own], "rows 8 sparse 8 8 5 0 0 1")
    with pytest.raises(ValueError, match="out of range"):
        torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.full((8,), place)], "rows 8 permute 8 0 0")


@needs_native
def test_wrong_dtypes_and_shapes_are_errors() -> None:
    multiply = torch.ops.structmat.multiply.default
    weight, program = torch.randn(32), "rows 4 contract 1 4 8 1 0 0 0 0"
    with pytest.raises(ValueError, match="dtype"):
        multiply(torch.randn(3, 8), [weight.double()], program)
    with pytest.raises(ValueError, match="shape"):
        multiply(torch.randn(3, 9), [weight], program)
    with pytest.raises(ValueError, match="float32"):
        multiply(torch.ones(3, 8, dtype=torch.int64), [torch.ones(32, dtype=torch.int64)], program)

"""Structures as values: sizes, fractions, resolution, JSON, and the words of their errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import structmat as sm
from structmat.errors import FormatError, ShapeError, StructureError
from structmat.program import Program
from structmat.structure import (
    Arange,
    Constant,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    allows_complex,
    check_count,
    check_shape,
    check_size,
    count_parameters,
    count_stored,
    largest_fitting,
    resolve,
    specs,
    to_json,
)
from structmat.structures import from_json


def test_a_rank_that_does_not_fit_is_fact_then_remedy() -> None:
    with pytest.raises(ShapeError) as caught:
        resolve(sm.LowRank(rank=200), (64, 100))
    assert str(caught.value) == (
        "LowRank(rank=200) does not fit a matrix of shape (64, 100): its rank is at most 64. "
        "Use rank=64 or less, or rank=0.5 for half of the dense parameters."
    )
    with pytest.raises(ShapeError, match="at most 64"):
        sm.nn.StructuredLinear(100, 64, structure=sm.LowRank(200))
    with pytest.raises(ShapeError, match="at most 64"):
        sm.project(torch.ones(64, 100), sm.LowRank(200))


@pytest.mark.parametrize("value", [1.0, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_float_is_a_fraction_strictly_between_0_and_1(value: float) -> None:
    with pytest.raises(StructureError, match=r"strictly between 0 and 1\. Use an integer"):
        sm.LowRank(value)


@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_1(value: int) -> None:
    with pytest.raises(StructureError, match="at least 1"):
        sm.LowRank(value)
    with pytest.raises(StructureError, match="at least 1"):
        sm.BlockDiagonal(value)


@pytest.mark.parametrize("value", [True, "8", None, 2 + 0j])
def test_sizes_are_numbers(value: object) -> None:
    with pytest.raises(StructureError):
        check_size(sm.Dense(), "rank", value)
    with pytest.raises(StructureError):
        check_count(sm.Dense(), "blocks", value)


def test_counts_are_integers() -> None:
    with pytest.raises(StructureError, match="is an integer"):
        sm.BlockDiagonal(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 3), (3,), (3, 4, 5), (2.0, 3), ("a", 1), (-1, 2)])
def test_shapes_are_two_positive_integers(shape: tuple[object, ...]) -> None:
    with pytest.raises(ShapeError, match="two integers of at least 1"):
        check_shape(shape)  # type: ignore[arg-type]


@given(st.floats(0.01, 0.99), st.integers(1, 60), st.integers(1, 60))
def test_a_fraction_is_the_largest_size_within_it(fraction: float, rows: int, columns: int) -> None:
    shape = (rows, columns)
    limit = fraction * rows * columns
    try:
        found = resolve(sm.LowRank(fraction), shape)
    except ShapeError:
        assert count_parameters(sm.LowRank(1), shape) > limit
        return
    assert isinstance(found, sm.LowRank)
    assert isinstance(found.rank, int)
    assert count_parameters(found, shape) <= limit
    larger = dataclasses.replace(found, rank=found.rank + 1)
    assert larger.restriction(shape) is not None or count_parameters(larger, shape) > limit
    assert resolve(found, shape) == found


def test_a_fraction_below_the_smallest_member_says_how_much_that_takes() -> None:
    with pytest.raises(ShapeError, match=r"0\.01 of the parameters .* rank=1 takes 0\.4 of them"):
        resolve(sm.LowRank(0.01), (5, 5))


@dataclass(frozen=True)
class Unmoved(Structure):
    """A family whose number of parameters does not depend on its size."""

    size: int | float

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {"weight": ParameterSpec((1,), Normal(1.0))}

    def program(self, shape: Shape) -> Program:
        raise NotImplementedError

    project = program  # type: ignore[assignment]
    configurations = program  # type: ignore[assignment]


def test_a_fraction_of_what_does_not_grow_is_an_error() -> None:
    with pytest.raises(StructureError, match="does not grow with size"):
        resolve(Unmoved(0.5), (8, 8))


def test_counts() -> None:
    assert count_parameters(sm.LowRank(3), (5, 7)) == 3 * 12
    assert count_parameters(sm.LowRank(0.5), (64, 100)) == 19 * 164
    assert count_stored(sm.LowRank(3), (5, 7)) == 3 * 12
    assert count_parameters(sm.PivotedLowRank(3), (5, 7)) == 3 * 5 + 3 * 4
    assert count_stored(sm.PivotedLowRank(3), (5, 7)) == 3 * 5 + 3 * 4 + 7, "the places of the inputs are stored too"
    assert set(specs(sm.LowRank(3), (5, 7))) == {"left", "right"}


@given(st.integers(0, 400), st.integers(1, 40), st.integers(1, 30))
def test_largest_fitting(budget: int, most: int, price: int) -> None:
    found = largest_fitting(lambda size: price * size, budget, most)
    best = min(most, budget // price)
    assert found == (best - best % 8 if best >= 8 else best)


# ------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_plain() -> None:
    assert to_json(sm.LowRank(16)) == {"family": "LowRank", "rank": 16}
    assert to_json(sm.LowRank(0.25)) == {"family": "LowRank", "rank": 0.25}
    assert json.loads(json.dumps(to_json(sm.Dense()))) == {"family": "Dense"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "A structure is an object with a 'family'"),
        ([], "A structure is an object"),
        ({}, "A structure is an object"),
        ({"family": 3}, "A structure is an object"),
        ({"family": "LowRnak", "rank": 1}, "Unknown family 'LowRnak'. Known are .*LowRank"),
        ({"family": "LowRank"}, "no valid LowRank: .*rank"),
        ({"family": "LowRank", "rank": 1, "colour": 2}, "LowRank has no field colour. Its fields are rank"),
        ({"family": "LowRank", "rank": -1}, "at least 1"),
        ({"family": "LowRank", "rank": 1.0}, "strictly between 0 and 1"),
        ({"family": "LowRank", "rank": "many"}, "must be a number"),
        ({"family": "LowRank", "rank": None}, "must be a number"),
        ({"family": "LowRank", "rank": {"family": "Dense"}}, "must be a number"),
    ],
)
def test_what_is_no_structure_is_refused(data: object, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        from_json(data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("LowRank", r"got 'LowRank'\. Give one such as structmat\.LowRank\(rank=0\.25\)"),
        (None, "got None"),
        (sm.LowRank, r"the class LowRank\. Call it.*LowRank\(\.\.\.\)"),
    ],
)
def test_what_is_given_for_a_structure_is_named(value: Any, words: str) -> None:
    with pytest.raises(StructureError, match=words):
        sm.nn.StructuredLinear(8, 8, structure=value)
    with pytest.raises(StructureError, match=words):
        sm.project(torch.eye(8), value)


def test_what_is_given_for_a_family_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(StructureError, match=r"structures holds families.*Linear"):
        sm.compress(model, budget=sm.Parameters(0.5), structures=[torch.nn.Linear])  # type: ignore[list-item]


# -------------------------------------------------------------------------------------------------- initialisations


def test_initialisations(generator: torch.Generator) -> None:
    cpu = torch.device("cpu")
    drawn = Normal(0.5).draw((4000,), generator=generator, dtype=torch.float64, device=cpu)
    assert abs(float(drawn.std()) - 0.5) < 0.03
    complex_drawn = Normal(0.5).draw((4000,), generator=generator, dtype=torch.complex64, device=cpu)
    assert abs(float(complex_drawn.abs().square().mean()) - 0.25) < 0.03
    assert Constant(2.0).draw((2,), generator=None, dtype=torch.float32, device=cpu).tolist() == [2.0, 2.0]
    assert Arange().draw((3,), generator=None, dtype=torch.int64, device=cpu).tolist() == [0, 1, 2]


def test_a_seed_means_the_same_matrix_in_every_precision() -> None:
    single, half = (
        sm.StructuredMatrix.random(sm.LowRank(2), (6, 5), generator=torch.Generator().manual_seed(3), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, tensor in single.tensors.items():
        assert torch.equal(tensor.to(torch.bfloat16), half.tensors[name])


# ------------------------------------------------------------------------------------------------- complex and real


@dataclass(frozen=True)
class RealOnly(Unmoved):
    """A family that declares real tensors."""

    supports_complex = False


def test_a_real_family_refuses_complex_tensors() -> None:
    assert allows_complex(sm.LowRank(2))
    assert not allows_complex(RealOnly(1))
    with pytest.raises(StructureError, match=r"has real tensors and can't be drawn in torch\.complex64"):
        sm.StructuredMatrix.random(RealOnly(1), (3, 3), dtype=torch.complex64)

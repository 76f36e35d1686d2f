"""GBLR: representation, closure, export and projection, by the notes on learned structure (C8, C9, C12, C14)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.program import FOR_FEW_ROWS, FOR_NATIVE, FOR_REFERENCE, Windowed, apply, cost, fuse, stages, transpose
from structmat.program.windows import group_windows, merge_windows
from structmat.projection.windows import Backfit, Terms, best_interval, best_segments, published_cost
from structmat.structure import from_json, to_json
from structmat.testing import CHECKS, check_structure
from structmat.windows import (
    as_windows,
    from_terms,
    hull,
    interpolated,
    joined,
    multiplied,
    scaled,
    shifted,
    submatrix,
    terms_of,
    transposed,
)

COUNTS = st.tuples(st.integers(0, 5), st.integers(0, 5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_terms(m: int, n: int, count: int, seed: int = 0, smallest: int = 0) -> Terms:
    """Windows of any width and place, wrapping ones and empty ones among them."""
    g = generator(seed)
    windows = torch.stack(
        [
            torch.randint(0, m, (count,), generator=g),
            torch.randint(smallest, m + 1, (count,), generator=g),
            torch.randint(0, n, (count,), generator=g),
            torch.randint(smallest, n + 1, (count,), generator=g),
        ],
        1,
    )
    left = torch.randn(count, m, generator=g, dtype=torch.float64)
    right = torch.randn(count, n, generator=g, dtype=torch.float64)
    return Terms(left, right, windows).cropped()


def pixelfly(size: int, block: int, rank: int) -> tuple[sm.StructuredMatrix, int]:
    """Flat block butterfly (the diagonal and two offsets by powers of two) plus low rank, and its count."""
    g = generator(3)
    grid = size // block
    support = torch.zeros(size, size, dtype=torch.bool)
    for i in range(grid):
        for j in (i, i ^ 1, i ^ 2):
            support[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    weight = torch.randn(size, size, generator=g, dtype=torch.float64) * support
    sparse = sm.project(weight, sm.structures.Sparse(nonzeros=int(support.sum()))).matrix
    low = sm.StructuredMatrix.random(sm.LowRank(rank), (size, size), generator=g, dtype=torch.float64)
    tensors = {f"term0_{k}": v for k, v in low.tensors.items()} | {f"term1_{k}": v for k, v in sparse.tensors.items()}
    structure = sm.Sum(sm.LowRank(rank), sm.structures.Sparse(nonzeros=int(support.sum())))
    return sm.StructuredMatrix(structure, (size, size), tensors), int(support.sum()) + 2 * rank * size


def supported(support: Tensor) -> sm.StructuredMatrix:
    weight = torch.randn(support.shape, generator=generator(4), dtype=torch.float64) * support
    return sm.project(weight, sm.structures.Sparse(nonzeros=int(support.sum()))).matrix


def banded(size: int, half: int) -> Tensor:
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    return torch.minimum(distance, size - distance) <= half


def blocks_at(size: int, block: int, places: list[tuple[int, int]]) -> Tensor:
    support = torch.zeros(size, size, dtype=torch.bool)
    for i, j in places:
        support[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    return support


def member(structure: sm.Structure, shape: tuple[int, int] = (24, 24)) -> sm.StructuredMatrix:
    return sm.StructuredMatrix.random(structure, shape, generator=generator(1), dtype=torch.float64)


fly, fly_cost = pixelfly(32, 4, 2)
SPECIAL = {
    "low rank": (member(sm.LowRank(5), (24, 30)), 5 * 54, 5),
    "full rank": (member(sm.LowRank(24)), 24 * 48, 24),
    "diagonal": (member(sm.structures.Diagonal()), 24, 24),
    "block diagonal": (member(sm.BlockDiagonal(4), (24, 36)), 24 * 36 // 4, 24),
    "block sparse": (supported(blocks_at(24, 6, [(0, 0), (0, 3), (2, 1), (3, 3)])), 4 * 36, None),
    "block low rank": (
        member(sm.BlockTensorTrain(2, (4, 6), (4, 6))),
        4 * 4 * 2 * 12,
        4 * 4 * 2,
    ),
    "banded": (supported(banded(24, 2)), 24 * 5, 24),
    "pixelfly": (fly, fly_cost, None),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_learned_C8_special_cases_are_exact_at_their_own_cost(name: str) -> None:
    matrix, wanted, terms = SPECIAL[name]
    found = as_windows(matrix)
    torch.testing.assert_close(found.to_dense(), matrix.to_dense(), rtol=0, atol=1e-12)
    assert published_cost(found.tensors["windows"]) == wanted
    assert terms is None or found.structure.terms == terms  # type: ignore[attr-defined]
    again = as_windows(matrix.T)
    torch.testing.assert_close(again.to_dense(), matrix.to_dense().T, rtol=0, atol=1e-12)
    assert published_cost(again.tensors["windows"]) == wanted


@pytest.mark.parametrize("name", ["diagonal", "block diagonal", "block sparse", "banded", "low rank"])
def test_learned_C8_what_is_deployed_costs_as_much(name: str) -> None:
    """Merged into blocks and single entries, the program itself takes the class's number of multiplications."""
    matrix, wanted, _ = SPECIAL[name]
    found = as_windows(matrix)
    (stage,) = stages(found.program)
    assert isinstance(stage, Windowed)
    program, tensors = merge_windows(stage, found.tensors, "merged")
    assert cost(program).macs <= wanted
    x = torch.randn(3, matrix.shape[1], generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(apply(program, tensors, x), x @ matrix.to_dense().T, rtol=0, atol=1e-12)
    back, tensors = merge_windows(stage.transpose(), found.tensors, "merged")
    y = torch.randn(3, matrix.shape[0], generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(apply(back, tensors, y), y @ matrix.to_dense(), rtol=0, atol=1e-12)


def test_a_dense_block_among_windows_is_found() -> None:
    windows = [[4, 8, j, 1] for j in range(5, 13)] + [[0, 20, 3, 20], [1, 1, 0, 9]]
    grouping = group_windows(windows, 24, 24)
    assert grouping.blocks == (((4, 8, 5, 8), tuple(range(8))),)
    assert (grouping.entries, grouping.windows) == ((9,), (8,))
    assert grouping.multiplications == 64 + 40 + 9


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 12), n=st.integers(1, 12), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_merging_is_exact_and_never_dearer(m: int, n: int, count: int, seed: int) -> None:
    matrix = from_terms(random_terms(m, n, count, seed))
    for stage in (matrix.program, transpose(matrix.program)):
        assert isinstance(stage, Windowed)
        program, tensors = merge_windows(stage, matrix.tensors, "merged")
        assert cost(program).macs <= cost(stage).macs
        x = torch.randn(2, stage.in_features, generator=generator(seed), dtype=torch.float64)
        torch.testing.assert_close(apply(program, tensors, x), apply(stage, matrix.tensors, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("writing", [FOR_NATIVE, FOR_REFERENCE])
def test_frozen_windows_compute_the_same(writing: object) -> None:
    for terms in (random_terms(20, 30, 6, 1), random_terms(20, 30, 60, 2, smallest=10)):
        matrix = from_terms(terms)
        for program in (matrix.program, transpose(matrix.program)):
            fused, tensors = fuse(program, matrix.tensors, writing)  # type: ignore[arg-type]
            x = torch.randn(4, program.in_features, generator=generator(), dtype=torch.float64)
            torch.testing.assert_close(
                apply(fused, tensors, x), apply(program, matrix.tensors, x), rtol=1e-12, atol=1e-11
            )


# ----------------------------------------------------------------------------------------------------- closure


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 10), n=st.integers(1, 10), counts=COUNTS, seed=st.integers(0, 99))
def test_learned_C9_closure(m: int, n: int, counts: tuple[int, int], seed: int) -> None:
    a, b = random_terms(m, n, counts[0], seed), random_terms(m, n, counts[1], seed + 1)
    total = joined(a, b)
    torch.testing.assert_close(total.dense(), a.dense() + b.dense(), rtol=0, atol=1e-11)
    assert published_cost(total.windows) == published_cost(a.windows) + published_cost(b.windows)
    moved = shifted(a, 3, -5)
    torch.testing.assert_close(moved.dense(), a.dense().roll((3, -5), (0, 1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(moved.cropped().dense(), moved.dense(), rtol=0, atol=0)
    rows, columns = torch.rand(m, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    torch.testing.assert_close(
        scaled(a, rows, columns).dense(), rows[:, None] * a.dense() * columns, rtol=0, atol=1e-11
    )
    flipped = transposed(a)
    torch.testing.assert_close(flipped.dense(), a.dense().T, rtol=0, atol=1e-12)
    for other in (moved, flipped):
        assert published_cost(other.windows) == published_cost(a.windows)
    top, first = m // 3, n // 4
    part = submatrix(a, (top, m), (first, n))
    torch.testing.assert_close(part.dense(), a.dense()[top:, first:], rtol=0, atol=1e-12)
    torch.testing.assert_close(part.cropped().dense(), part.dense(), rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(sizes=st.tuples(*[st.integers(1, 9)] * 3), counts=COUNTS, seed=st.integers(0, 99))
def test_learned_C9_products(sizes: tuple[int, int, int], counts: tuple[int, int], seed: int) -> None:
    """From the right: as many terms, the same row windows, columns within the hull. From the left likewise."""
    m, k, n = sizes
    a, b = random_terms(m, k, counts[0], seed), random_terms(k, n, counts[1], seed + 1)
    product = a.dense() @ b.dense()
    for found, kept in (
        (multiplied(a, b.dense()), a.windows[:, :2]),
        (transposed(multiplied(transposed(b), a.dense().T)), None),
    ):
        torch.testing.assert_close(found.dense(), product, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.cropped().dense(), product, rtol=0, atol=1e-10)
        assert kept is None or torch.equal(found.windows[:, :2], kept)
    assert multiplied(a, b.dense()).count == counts[0]


def test_learned_C9_interpolated_windows_cost_no_more() -> None:
    first, second = (random_terms(16, 16, 12, seed).windows for seed in (1, 2))
    for share in (0.0, 0.25, 0.5, 1.0):
        between = interpolated(first, second, share)
        mean = float(between[:, [1, 3]].double().mean())
        assert mean <= max(float(w[:, [1, 3]].double().mean()) for w in (first, second))
    assert torch.equal(interpolated(first, second, 1.0), first)
    with pytest.raises(ShapeError, match="nothing between them"):
        interpolated(first, second[:3], 0.5)


def test_conversion_of_products_and_refusals() -> None:
    a = member(sm.Product(sm.BlockDiagonal(4), sm.LowRank(3), inner=24), (24, 20))
    torch.testing.assert_close(as_windows(a).to_dense(), a.to_dense(), rtol=0, atol=1e-12)
    with pytest.raises(StructureError, match="no sum of windowed terms"):
        as_windows(member(sm.Butterfly(), (16, 16)))
    with pytest.raises(StructureError, match="holds no windows"):
        terms_of(member(sm.LowRank(2)))


def test_hull_is_the_shortest_cyclic_interval() -> None:
    g = generator(5)
    for _ in range(200):
        size = int(torch.randint(1, 9, (1,), generator=g))
        held = torch.rand(size, generator=g) < 0.4
        start, width = hull(held)
        covered = {(start + i) % size for i in range(width)}
        places = set(torch.nonzero(held)[:, 0].tolist())
        assert places <= covered
        shortest = min(w for s in range(size) for w in range(size + 1) if places <= {(s + i) % size for i in range(w)})
        assert width == shortest


# ------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 17), (16, 16)])
def test_learned_C12_compact_form(shape: tuple[int, int]) -> None:
    terms = random_terms(*shape, 8, 12)
    matrix = from_terms(terms)
    alive = int(terms.alive.sum())
    assert matrix.structure.terms == alive  # type: ignore[attr-defined]
    assert matrix.num_parameters == sum(terms.taken(torch.nonzero(terms.alive)[:, 0]).totals)
    torch.testing.assert_close(matrix.to_dense(), terms.dense(), rtol=1e-12, atol=1e-12)
    x = torch.randn(5, shape[1], generator=generator(), dtype=torch.float64)
    layer = sm.nn.StructuredLinear.from_matrix(matrix)
    for name in ("reference", "native"):
        with sm.backend(name):
            torch.testing.assert_close(layer(x), x @ terms.dense().T, rtol=1e-12, atol=1e-11)
    assert matrix.T.T.program == matrix.program
    assert from_json(json.loads(json.dumps(to_json(matrix.structure))), sm.families()) == matrix.structure
    other = sm.nn.StructuredLinear(shape[1], shape[0], bias=False, structure=matrix.structure, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer.freeze()(x), layer(x), rtol=1e-12, atol=1e-11)


def test_learned_C12_no_terms_at_all() -> None:
    matrix = from_terms(random_terms(4, 6, 0))
    layer = sm.nn.StructuredLinear.from_matrix(matrix, torch.arange(4.0).double())
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator())
    assert torch.equal(layer(x), torch.arange(4.0).double().expand(3, 4))
    assert torch.equal(matrix.to_dense(), torch.zeros(4, 6, dtype=torch.float64))
    check_structure(
        sm.GBLR(0), (7, 5), groups=[group for group in CHECKS if group not in ("inductor", "onnx", "export")]
    )


def test_many_small_windows_stay_one_stage() -> None:
    """A block costs more than its multiply-adds: what two terms of two places are merged into would not pay."""
    places = torch.arange(64).repeat_interleave(2) * 2
    matrix = from_terms(
        Terms(
            torch.randn(128, 128, generator=generator()),
            torch.randn(128, 128, generator=generator()),
            torch.stack([places, torch.full_like(places, 2)] * 2, 1),
        ).cropped()
    )
    for writing in (FOR_NATIVE, FOR_FEW_ROWS):
        program, tensors = fuse(matrix.program, matrix.tensors, writing)
        assert len(stages(program)) == 1
        torch.testing.assert_close(apply(program, tensors, torch.eye(128)).mT, matrix.to_dense())


def test_saved_and_loaded(tmp_path: object) -> None:
    def make() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(6, 9))

    model = make().double()
    weight = torch.nn.Parameter(random_terms(9, 6, 4, 3).dense())
    model[0].weight = weight
    model[0] = sm.nn.StructuredLinear.from_matrix(from_terms(random_terms(9, 6, 4, 3)), model[0].bias)
    sm.save(model, str(tmp_path))
    loaded = sm.load(str(tmp_path), make().double())
    torch.testing.assert_close(loaded[0].matrix.to_dense(), weight.detach(), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------- projection


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_intervals_by_brute_force(values: list[float]) -> None:
    gains, size = torch.tensor(values, dtype=torch.float64), len(values)
    sums = [sum(values[(s + i) % size] for i in range(w)) for s in range(size) for w in range(size + 1)]
    start, width, found = best_interval(gains)
    assert found == pytest.approx(max(sums), abs=1e-12)
    assert sum(values[(start + i) % size] for i in range(width)) == pytest.approx(found, abs=1e-12)
    column, begin, height, value = best_segments(gains[:, None].expand(size, 2), 0.5)
    plain = [sum(v - 0.5 for v in values[s:e]) for s in range(size + 1) for e in range(s, size + 1)]
    assert value == pytest.approx(max(plain), abs=1e-12)
    assert sum(v - 0.5 for v in values[begin : begin + height]) == pytest.approx(value, abs=1e-12)
    assert column in (0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_learned_C14_every_visit_lowers_the_penalised_objective(dtype: torch.dtype) -> None:
    weight = torch.randn(18, 25, generator=generator(14), dtype=dtype)
    start = random_terms(18, 25, 9, 14)
    run = Backfit(weight, Terms(start.left.to(dtype), start.right.to(dtype), start.windows))
    prices = (0.3, 0.5)
    before = run.objective(prices)
    for _ in range(4):
        for k in range(9):
            run._visit(k, prices)
            after = run.objective(prices)
            assert after <= before + 1e-9
            before = after
    torch.testing.assert_close(run.rest, weight - run.terms.dense(), rtol=0, atol=1e-10)
    torch.testing.assert_close(run.terms.cropped().dense(), run.terms.dense(), rtol=0, atol=0)
    squared = float(run.rest.abs().square().sum())
    run.refit()
    assert float(run.rest.abs().square().sum()) <= squared + 1e-9


def test_learned_C14_planted_low_rank_and_diagonals() -> None:
    g = generator(16)
    weight = torch.randn(128, 16, generator=g, dtype=torch.float64) @ torch.randn(
        16, 96, generator=g, dtype=torch.float64
    )
    for structure in (sm.GBLR(16, 16 * 128, 16 * 96), sm.GBLR(32, 16 * 128, 16 * 96)):
        assert sm.project(weight, structure).error < 1e-6
    diagonal = torch.diag(torch.randn(24, generator=g, dtype=torch.float64))
    assert sm.project(diagonal, sm.GBLR(24, 24, 24)).error < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_learned_C14_never_worse_than_low_rank_of_its_cost(seed: int) -> None:
    weight = torch.randn(40, 32, generator=generator(seed), dtype=torch.float64)
    found = sm.project(weight, sm.GBLR(30, 10 * 40, 10 * 32))
    assert found.error <= sm.project(weight, sm.LowRank(10)).error + 1e-12
    assert found.matrix.num_parameters == 10 * 72


def test_planted_windows_are_found() -> None:
    """Off-grid windows: the projection beats every fixed family of at least its cost by far."""
    terms = random_terms(64, 64, 10, 21, smallest=8)
    terms = Terms(terms.left, terms.right, terms.windows.clamp(max=28)).cropped()
    weight, (rows, columns) = terms.dense(), terms.totals
    found = sm.project(weight, sm.GBLR(24, rows, columns)).error
    budget = rows + columns
    others = [
        sm.project(weight, member).error
        for family in (sm.LowRank, sm.BlockDiagonal, sm.Monarch, sm.BLAST, sm.BlockTensorTrain)
        for member in family.configurations((64, 64), int(1.1 * budget))
    ]
    assert found < 0.6 * min(others)


def test_weighted_projection_uses_the_norm() -> None:
    g = generator(8)
    weight = torch.randn(20, 24, generator=g, dtype=torch.float64)
    x = torch.randn(60, 24, generator=g, dtype=torch.float64) @ torch.randn(24, 24, generator=g, dtype=torch.float64)
    moment = x.T @ x / 60
    structure = sm.GBLR(12, 120, 144)
    aware = sm.project(weight, structure, second_moment=moment)
    plain = sm.project(weight, structure).matrix.to_dense()
    size = float(torch.linalg.norm(weight @ x.T))
    assert aware.error < 0.95 * float(torch.linalg.norm((weight - plain) @ x.T)) / size


def test_sizes() -> None:
    assert sm.structure.resolve(sm.GBLR(3), (10, 7)) == sm.GBLR(3, 15, 12)  # type: ignore[attr-defined]
    quarter = sm.structure.resolve(sm.GBLR(0.25), (64, 64))  # type: ignore[attr-defined]
    assert quarter == sm.GBLR(16, 512, 512)
    with pytest.raises(ShapeError, match="hold 30 in all"):
        sm.StructuredMatrix.random(sm.GBLR(3, 31, 5), (10, 7))
    with pytest.raises(ShapeError, match="less than one term"):
        sm.StructuredMatrix.random(sm.GBLR(0.01), (4, 4))
    with pytest.raises(StructureError, match="a fraction stands for itself"):
        sm.GBLR(0.5, rows=3)
    assert math.isclose(cost(sm.StructuredMatrix.random(sm.GBLR(4, 9, 11), (8, 6)).program).macs, 20)

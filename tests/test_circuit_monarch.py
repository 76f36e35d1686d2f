"""The universality theorem in Monarch products, of sizes that are no powers of two; exact."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from circuits import random_linear
from hypothesis import given

from structmat.circuit import Builder, Circuit, PrimeField, Rationals
from structmat.circuit.catalogue import fourier, haar, hadamard, prefix_sums
from structmat.circuit.kaleidoscope import (
    MonarchProduct,
    MonarchStage,
    bound,
    compare,
    edge_colors,
    kaleidoscope,
    monarch,
    monarch_broadcast,
    monarch_permutation,
    monarch_permutation_starred,
    monarch_segment_sums,
    monarch_sparse,
    monarch_total,
)
from structmat.errors import CircuitError

seeds = st.integers(0, 100_000)
EXACT = Rationals()
P = PrimeField()


def apply(stages: Any, x: Any) -> Any:
    values = P.array(np.asarray(x))[:, None]
    for stage in stages:
        values = stage.apply(values, P)
    return values[:, 0]


def random_product(size: int, block: int, width: int, seed: int) -> MonarchProduct:
    rng = np.random.default_rng(seed)
    stages = []
    for across in (True, False, False, True) * width:
        row, column = np.divmod(np.arange(size * size), size)
        inside = (row - column) % block == 0 if across else row // block == column // block
        value = rng.integers(-2, 3, int(inside.sum()))
        stages.append(MonarchStage.of_entries(size, block, across, row[inside], column[inside], value))
    return MonarchProduct(size, block, tuple(stages), size, size)


def dense_stage(stage: MonarchStage) -> Any:
    """The matrix from the definition, entry by entry."""
    a, b, c, d = stage.pattern
    matrix = np.zeros((stage.size, stage.size), dtype=np.int64)
    for i, j, k, l in itertools.product(range(a), range(b), range(c), range(d)):
        matrix[(i * b + j) * d + l, (i * c + k) * d + l] = stage.weight[i, j, k, l]
    return matrix


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_edges_of_a_regular_bipartite_graph_are_colored(left: int, degree: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ends = np.repeat(np.arange(left), degree)
    other = rng.permutation(ends)
    colors = edge_colors(ends, other, degree)
    for vertices in (ends, other):
        assert len(set(zip(vertices.tolist(), colors.tolist(), strict=True))) == left * degree
    assert set(colors.tolist()) == set(range(degree))


@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (5, 7), (16, 16), (12, 30)])
def test_circuits_K1_permutations_in_one_monarch_product(blocks: int, block: int) -> None:
    size = blocks * block
    x = np.arange(size)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(size)
        product = monarch_permutation(order, block)
        assert product.width == 1
        assert np.array_equal(product.multiply(x, P), order)
        assert product.parameters == 2 * (size * block + size * blocks)
        starred = monarch_permutation_starred(order, block)
        assert [stage.across for stage in starred] == [False, True, False]
        assert np.array_equal(apply(starred, x), order)
        for stage in (*product.stages, *starred):
            assert np.all(stage.value == 1)
            assert len(stage.value) == size


def test_circuits_K1_every_permutation_of_six() -> None:
    for order in itertools.permutations(range(6)):
        assert monarch_permutation(order, 2).multiply(np.arange(6), P).tolist() == list(order)


@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_circuits_K2_monarch_broadcast_and_segment_sums(blocks: int, block: int, seed: int) -> None:
    size = blocks * block
    rng = np.random.default_rng(seed)
    source = np.concatenate([[0], np.cumsum(rng.random(size - 1) < rng.random())])
    spread, sums = monarch_broadcast(source, block), monarch_segment_sums(source, block)
    assert [stage.across for stage in (*spread, *sums)] == [True, False, False, True]
    x = rng.integers(0, 10, size)
    assert np.array_equal(apply(spread, x), x[source])
    assert np.array_equal(apply(sums, x), [x[source == r].sum() for r in range(size)])


@pytest.mark.parametrize(("size", "block"), [(4, 2), (6, 3), (15, 5), (30, 6)])
def test_circuits_K2_sparse_lemma_in_monarch_products(size: int, block: int) -> None:
    rng = np.random.default_rng(size)
    every = np.arange(size)
    places = [(0 * every, every), (every, 0 * every), (every, every), (every[:0], every[:0])]
    for count in range(1, size + 1):
        chosen = rng.choice(size * size, count, replace=False)
        places.append((chosen // size, chosen % size))
    for rows, columns in places:
        values = rng.integers(1, 9, len(rows))
        expected = np.zeros((size, size), dtype=np.int64)
        expected[rows, columns] = values
        matrix = monarch_sparse(rows, columns, values, (size, size), block=block, size=size)
        assert matrix.width == 4
        assert np.array_equal(matrix.to_dense(EXACT), expected)


def test_circuits_K3_sums_of_monarch_products() -> None:
    for widths in ([1], [2], [1, 1], [1, 2], [2, 1, 1]):
        terms = [random_product(6, 3, width, seed) for seed, width in enumerate(widths)]
        summed = monarch_total(terms)
        assert summed.width == sum(widths)
        assert summed.expansion == 3
        assert np.array_equal(summed.to_dense(EXACT), sum(term.to_dense(EXACT) for term in terms))


@given(seed=seeds, keep_all=st.booleans(), block=st.sampled_from([None, 1, 2, 5]))
def test_circuits_K4_circuits_as_monarch_products(seed: int, keep_all: bool, block: int | None) -> None:
    circuit = random_linear(seed, parameters=seed % 3)
    product = monarch(circuit, keep_all=keep_all, block=block)
    assert np.array_equal(product.to_dense(P), circuit.to_dense(P))
    depth = max(circuit.wide.depth, 1)
    assert product.width <= 3 * depth + 1
    blocks = product.size // product.block
    assert product.parameters == 2 * product.width * product.size * (blocks + product.block)


@pytest.mark.parametrize("circuit", [hadamard(16), prefix_sums(13), fourier(12), haar(16)])
def test_circuits_K4_catalogue_as_monarch_products(circuit: Circuit) -> None:
    product = monarch(circuit)
    np.testing.assert_allclose(product.to_dense(), circuit.to_dense(), atol=1e-13)
    # Of order d s^1.5: the size is below 2 pow2(s), and a block the root of it.
    assert product.parameters <= 8 * (3 * circuit.depth + 1) * (4 * circuit.size) ** 1.5


def test_circuits_K5_closure_of_monarch_products() -> None:
    first, second = random_product(12, 4, 2, 0), random_product(12, 4, 1, 1)
    a, b = first.to_dense(EXACT), second.to_dense(EXACT)
    assert np.array_equal(first.T.to_dense(EXACT), a.T)
    corner = MonarchProduct(12, 4, second.stages, 12, 7)
    wide = MonarchProduct(12, 4, first.stages, 7, 12)
    product = wide @ corner
    assert product.width == 3
    assert np.array_equal(product.to_dense(EXACT), a[:, :7] @ b[:7])
    assert np.array_equal(first.multiply(np.arange(12), EXACT), a @ np.arange(12))


def test_stages_equal_their_definition() -> None:
    for stage in random_product(12, 3, 1, 3).stages:
        x = np.eye(12, dtype=np.int64).astype(object)
        assert np.array_equal(stage.apply(x, EXACT), dense_stage(stage))
        assert np.array_equal(stage.transpose().apply(x, EXACT), dense_stage(stage).T)
        assert not stage.is_identity
    assert MonarchStage.identity(6, 2, True).is_identity


@pytest.mark.parametrize(
    "circuit", [hadamard(32), prefix_sums(32), fourier(16), haar(32), random_linear(7, wide=False)]
)
def test_circuits_K4_comparison(circuit: Circuit) -> None:
    """The promise is kept, each improvement improves, and what is reported is what is there."""
    found = compare(circuit)
    assert (found.size, found.depth) == (circuit.size, circuit.depth)
    assert found.edges <= 2 * circuit.gates
    assert found.bound == bound(circuit)
    assert found.bound.width == 3 * found.depth + 1
    assert found.kept.parameters <= found.bound.parameters
    assert found.generic.parameters <= found.kept.parameters
    assert found.recognized.parameters <= found.generic.parameters
    compiled = kaleidoscope(circuit)
    assert (found.recognized.width, found.recognized.parameters) == (compiled.width, compiled.parameters)
    assert f"{found.bound.parameters:,}" in str(found)
    assert math.prod((4, compiled.width, compiled.size, compiled.size.bit_length() - 1)) == compiled.parameters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: monarch_permutation([0, 1, 2], 2), "do not divide"),
        (lambda: monarch_permutation([0, 0, 1], 3), "no permutation"),
        (lambda: monarch_broadcast([0, 2], 1), "grow by 0 or 1"),
        (lambda: monarch_broadcast([0, 1, 1], 2), "do not divide"),
        (lambda: monarch_sparse([0] * 5, [0] * 5, [1] * 5, (4, 4), block=2, size=4), "at most 4 entries"),
        (lambda: monarch_sparse([4], [0], [1], (4, 4), block=2, size=4), "outside"),
        (lambda: monarch_sparse([0], [0], [1], (9, 4), block=2, size=4), "does not fit"),
        (lambda: monarch_total([]), "at least one"),
        (lambda: monarch_total([random_product(4, 2, 1, 0), random_product(6, 2, 1, 0)]), "one shape"),
        (lambda: MonarchStage.of_entries(4, 2, True, np.array([0]), np.array([1])), "outside of the pattern"),
        (lambda: MonarchProduct(4, 2, (MonarchStage.identity(4, 2, False),), 4, 4), "repeats factors"),
        (lambda: MonarchProduct(4, 2, (), 5, 4), "do not fit"),
        (lambda: random_product(4, 2, 1, 0).multiply([1, 2]), "inputs"),
        (lambda: random_product(4, 2, 1, 0) @ random_product(6, 2, 1, 0), "can't follow"),
        (lambda: monarch(square()), "linear"),
        (lambda: monarch(hadamard(4), block=0), "at least one place"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        call()


def square() -> Circuit:
    builder = Builder(1)
    return builder.build([builder.product([0, 0])])


@pytest.mark.parametrize("compiler", [kaleidoscope, monarch])
def test_fractions_stay_exact(compiler: Any) -> None:
    builder = Builder(3)
    first = builder.sum([0, 1, 2], np.array([Fraction(1, 3), 2, Fraction(-1, 7)], dtype=object))
    second = builder.sum([first, 1], np.array([Fraction(2, 5), 1], dtype=object))
    circuit = builder.build([second, first, 0])
    product = compiler(circuit)
    assert np.array_equal(product.to_dense(EXACT), circuit.to_dense(EXACT))
    assert product.multiply([1, 2, 3])[0] == Fraction(374, 105)


@pytest.mark.parametrize("compiler", [kaleidoscope, monarch])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(0, []), (3, []), (1, [0]), (2, [1, 1, 1]), (3, [2, 0]), (2, [0, 1, 0, 1, 0])]
)
def test_circuits_without_gates(compiler: Any, inputs: int, outputs: list[int]) -> None:
    product = compiler(Builder(inputs).build(outputs))
    assert np.array_equal(product.to_dense(EXACT), np.eye(inputs, dtype=int)[outputs].reshape(len(outputs), inputs))

"""Butterfly factors, and linear circuits as kaleidoscope matrices. Exact over the rationals or a prime field."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from circuits import random_linear, up
from hypothesis import given

from structmat.circuit import Builder, Circuit, Floats, PrimeField, Rationals, layers
from structmat.circuit.catalogue import cosine, fourier, haar, hadamard, prefix_sums, toeplitz
from structmat.circuit.kaleidoscope import (
    ButterflyProduct,
    Kaleidoscope,
    Stage,
    broadcast,
    kaleidoscope,
    permutation,
    permutation_starred,
    placed,
    segment_sums,
    sparse,
    sparse_factors,
    sparse_sum,
    total,
)
from structmat.circuit.kaleidoscope.stage import bit_reversal
from structmat.circuit.simplify import prune
from structmat.errors import CircuitError

seeds = st.integers(0, 100_000)
EXACT = Rationals()
P = PrimeField()


def random_matrix(size: int, width: int, seed: int) -> Kaleidoscope:
    """Random integer twiddles in (B B*)^width."""
    rng = np.random.default_rng(seed)
    strides = (*reversed(up(size)), *up(size)) * width
    stages = [Stage.of(rng.integers(-2, 3, (size // (2 * s), 2, 2, s))) for s in strides]
    return Kaleidoscope(ButterflyProduct(size, tuple(stages)), size, size)


def dense_stage(stage: Stage) -> Any:
    """The matrix from the definition, entry by entry."""
    matrix = np.zeros((stage.size, stage.size), dtype=object)
    blocks, _, _, stride = stage.shape
    for a, b, c, d in itertools.product(range(blocks), range(2), range(2), range(stride)):
        matrix[(2 * a + b) * stride + d, (2 * a + c) * stride + d] = stage.weight[a, b, c, d]
    return matrix


# ------------------------------------------------------------------------------------------------------ the checks


def test_circuits_K1_every_permutation_of_four() -> None:
    for order in itertools.permutations(range(4)):
        assert_routed(np.array(order))


@pytest.mark.parametrize("size", [2, 8, 16, 128, 1024])
def test_circuits_K1_random_permutations(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(100 if size == 8 else 5):
        assert_routed(rng.permutation(size))
    assert_routed(np.arange(size))
    assert all(stage.is_identity for stage in permutation(np.arange(size)).stages)


@pytest.mark.slow
def test_circuits_K1_every_permutation_of_eight() -> None:
    x = np.arange(8)
    for order in itertools.permutations(range(8)):
        assert np.array_equal(permutation(order).multiply(x, P), order)


def assert_routed(order: Any) -> None:
    size = len(order)
    x = np.arange(size)
    strides = up(size)
    for routed, expected in (
        (permutation(order), (*reversed(strides), *strides)),
        (permutation_starred(order), (*strides, *reversed(strides))),
    ):
        assert routed.strides == expected
        assert np.array_equal(routed.multiply(x, P), order)
        for stage in routed.stages:
            weight = stage.weight
            assert np.array_equal(weight[:, 0, 0], weight[:, 1, 1])
            assert np.array_equal(weight[:, 0, 1], weight[:, 1, 0])
            assert np.array_equal(weight[:, 0, 0] + weight[:, 0, 1], np.ones_like(weight[:, 0, 0]))


@given(levels=st.integers(1, 7), seed=seeds)
def test_circuits_K2_broadcast_and_segment_sums(levels: int, seed: int) -> None:
    size = 1 << levels
    rng = np.random.default_rng(seed)
    source = np.concatenate([[0], np.cumsum(rng.random(size - 1) < rng.random())])
    spread, sums = broadcast(source), segment_sums(source)
    assert spread.strides == up(size)[::-1]
    assert sums.strides == up(size)
    x = rng.integers(-9, 10, size)
    assert np.array_equal(spread.multiply(x, EXACT), x[source])
    assert np.array_equal(sums.multiply(x, EXACT), [x[source == r].sum() for r in range(size)])


@pytest.mark.parametrize("size", [2, 4, 16, 32])
def test_circuits_K2_sparse_lemma(size: int) -> None:
    rng = np.random.default_rng(size)
    every = np.arange(size)
    places = [
        (np.zeros(size, np.int64), every),
        (every, np.full(size, size - 1)),
        (every, every),
        (every, rng.permutation(size)),
        (every[:0], every[:0]),
    ]
    for count in range(1, size + 1):
        chosen = rng.choice(size * size, count, replace=False)
        places.append((chosen // size, chosen % size))
    for rows, columns in places:
        values = rng.integers(1, 9, len(rows))
        matrix = sparse(rows, columns, values, (size, size), size=size)
        expected = np.zeros((size, size), dtype=np.int64)
        expected[rows, columns] = values
        assert matrix.width == 4
        assert matrix.size == size
        assert np.array_equal(matrix.to_dense(EXACT), expected)
        assert all(stage.packed for stage in matrix.product.stages) or np.any(values != 1)


def test_circuits_K3_sums() -> None:
    for widths in ([1], [2], [1, 1], [1, 2], [2, 1, 1]):
        terms = [random_matrix(4, width, seed) for seed, width in enumerate(widths)]
        summed = total(terms)
        assert summed.width == sum(widths)
        assert summed.size == 4 * 4
        assert np.array_equal(summed.to_dense(EXACT), sum(term.to_dense(EXACT) for term in terms))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_circuits_K3_sparse_sums(size: int) -> None:
    rng = np.random.default_rng(size)
    for entries in (size, size * 5 // 4, size * 5 // 2, size * size // 2):
        chosen = rng.choice(size * size, entries, replace=False)
        values = rng.integers(1, 9, entries)
        expected = np.zeros(size * size, dtype=np.int64)
        expected[chosen] = values
        matrix = sparse_sum(chosen // size, chosen % size, values, (size, size))
        assert matrix.width == 4 * math.ceil(entries / size)
        assert matrix.expansion == 4
        assert np.array_equal(matrix.to_dense(EXACT).ravel(), expected)


CATALOGUE = {
    "hadamard": lambda: hadamard(16),
    "prefix": lambda: prefix_sums(16, "kogge-stone"),
    "prefix_odd": lambda: prefix_sums(13),
    "fourier": lambda: fourier(16),
    "fourier_odd": lambda: fourier(12),
    "cosine": lambda: cosine(16),
    "haar": lambda: haar(16),
    "toeplitz": lambda: toeplitz(np.arange(1, 8), np.arange(1, 8)),
}


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("options", [{}, {"recognize": False}, {"full": True}, {"keep_all": True}])
def test_circuits_K4_catalogue(name: str, options: dict[str, bool]) -> None:
    circuit = CATALOGUE[name]()
    assert_compiled(circuit, **options)


@given(seed=seeds, options=st.sampled_from([{}, {"recognize": False}, {"full": True}, {"keep_all": True}]))
def test_circuits_K4_random_circuits(seed: int, options: dict[str, bool]) -> None:
    assert_compiled(random_linear(seed, parameters=seed % 3), **options)


def assert_compiled(circuit: Circuit, **options: bool) -> None:
    """Equal modulo a prime, in which a wrong entry has nowhere to hide; the constants of the theorem hold."""
    matrix = kaleidoscope(circuit, **options)
    assert np.array_equal(matrix.to_dense(P), circuit.to_dense(P))
    assert matrix.width <= 3 * max(circuit.depth, 1) + 1
    if len(set(circuit.outputs.tolist())) == circuit.out_features:
        assert matrix.size <= 2 * (1 << max(circuit.size - 1, 1).bit_length())
    assert matrix.parameters == 4 * matrix.width * matrix.size * (matrix.size.bit_length() - 1)


def test_circuits_K4_table_of_compiled_sizes() -> None:
    table = [(hadamard(16), 32, 13, 8_320), (hadamard(64), 128, 19, 68_096)]
    table.append((prefix_sums(16, "kogge-stone"), 32, 13, 8_320))
    for circuit, size, width, parameters in table:
        matrix = kaleidoscope(circuit, recognize=False, full=True)
        assert (matrix.size, matrix.width, matrix.parameters) == (size, width, parameters)
        shorter = kaleidoscope(circuit, recognize=False)
        assert shorter.parameters < parameters
    kept = kaleidoscope(hadamard(16), recognize=False, full=True, keep_all=True)
    assert (kept.size, kept.width) == (128, 13)


def test_circuits_K4_table_of_the_proof_as_it_stands() -> None:
    """Every value kept, four pairs for each layer, one for the order of the outputs: width 4 d + 1."""
    circuit = hadamard(16)
    matrix = permutation_matrix(128)
    for layer in reversed(layers(circuit, circuit.levels, keep_all=True)):
        row = np.repeat(np.arange(layer.rows), np.diff(layer.start))
        matrix = matrix @ sparse(row, layer.column, layer.weight, (128, 128), size=128)
    assert (matrix.width, matrix.parameters) == (4 * circuit.depth + 1, 60_928)
    assert np.array_equal(matrix.to_dense(P)[:16, :16], circuit.to_dense(P))


def permutation_matrix(size: int) -> Kaleidoscope:
    return Kaleidoscope(permutation(np.arange(size)), size, size)


def test_circuits_K4_table_of_random_circuits() -> None:
    """8 inputs, 20 gates that all matter, 8 outputs, depth 5: some take the size 32 of the table, others only 16."""
    found = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        builder = Builder(8)
        ends = np.arange(8)
        for _ in range(20):
            place = rng.integers(8)
            ends[place] = builder.sum([ends[place], rng.integers(builder.nodes)], rng.integers(1, 4, 2))
        circuit = builder.build(ends)
        if circuit.depth == 5:
            matrix = kaleidoscope(circuit, recognize=False, full=True)
            found.add((circuit.size, matrix.size, matrix.width, matrix.parameters))
    assert found == {(28, 16, 16, 4_096), (28, 32, 16, 10_240)}


@pytest.mark.parametrize(
    ("circuit", "size", "width"),
    [
        (hadamard(64), 64, 1),  # strides 1, 2, .., 32: one butterfly matrix
        (fourier(64), 64, 2),  # the same in the other direction, and the bit reversal
        (haar(64), 64, 3),
    ],
)
def test_circuits_K4_recognized_levels(circuit: Circuit, size: int, width: int) -> None:
    matrix = kaleidoscope(circuit)
    assert (matrix.size, matrix.width) == (size, width)
    if circuit.weight.dtype == np.int64:
        assert np.array_equal(matrix.to_dense(P), circuit.to_dense(P))
    np.testing.assert_allclose(matrix.to_dense(), circuit.to_dense(), atol=1e-12)


def test_circuits_K4_recognition_after_a_permutation() -> None:
    """Pairs at all distances: one permutation brings each together, and its last switches take the stage in."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(16).reshape(8, 2)
    builder = Builder(16)
    sums = builder.sums(np.concatenate([pairs, pairs]), rng.integers(2, 9, (16, 2)))
    circuit = builder.build(rng.permutation(sums))
    matrix = kaleidoscope(circuit)
    assert (matrix.size, matrix.width) == (16, 2)
    assert np.array_equal(matrix.to_dense(P), circuit.to_dense(P))
    found = placed(16, np.arange(16), np.arange(0, 33, 2), np.repeat(pairs, 2, axis=0).ravel(), np.ones(32, np.int64))
    assert found is not None
    assert found.order is not None
    assert found.stage is not None
    assert found.stage.stride == 8


@given(seed=seeds)
def test_circuits_K4_a_placed_layer_is_its_layer(seed: int) -> None:
    """A layer of groups of at most two rows and two columns, its values at random places: always recognized in 16."""
    rng = np.random.default_rng(seed)
    where = rng.permutation(16)[:8]
    entries = []
    columns = iter(rng.permutation(8).tolist())
    rows = iter(rng.permutation(16).tolist())
    for kind in rng.integers(0, 5, 4):
        a, b = next(columns), next(columns)
        group = [[(a,), (b,)], [(a, b)], [(a, b), (b, a)], [(a, b), (b,)], [(a,), (a,)]][kind]
        entries += [(next(rows), read) for read in group]
    entries.sort()
    start = np.concatenate([[0], np.cumsum([len(read) for _, read in entries])])
    column = np.array([c for _, read in entries for c in read])
    values = rng.integers(1, 5, len(column))
    found = placed(16, where, start, column, values)
    assert found is not None
    x = rng.integers(0, 100, 16)
    y = x if found.order is None else x[found.order]
    y = y if found.stage is None else ButterflyProduct(16, (found.stage,)).multiply(y, P)
    expected = [
        sum(values[e] * x[where[column[e]]] for e in range(a, b)) for a, b in itertools.pairwise(start.tolist())
    ]
    assert y[found.where].tolist() == expected
    assert len(set(found.where.tolist())) == len(entries)


@pytest.mark.parametrize(
    ("start", "column"),
    [
        ([0, 2, 4], [0, 1, 1, 2]),  # a value in two pairs
        ([0, 3], [0, 1, 2]),  # three terms
        ([0, 2], [0, 0]),  # one value twice
        ([0, 0, 1], [0]),  # a row of nothing
        ([0, 1, 2, 3], [0, 0, 0]),  # three rows of one value
    ],
)
def test_circuits_K4_other_layers_are_not_recognized(start: list[int], column: list[int]) -> None:
    assert placed(4, np.arange(3), np.array(start), np.array(column), np.ones(len(column), np.int64)) is None


def long_circuit(inputs: int, gates: int, reach: int, seed: int) -> Circuit:
    """A random circuit without dead gates: each replaces one of ``inputs`` values by a sum of it and a recent node."""
    rng = np.random.default_rng(seed)
    node = inputs + np.arange(gates)
    place = np.concatenate([np.arange(inputs), rng.integers(0, inputs, gates)])
    order = np.argsort(place, kind="stable")
    before = np.empty(len(order), dtype=np.int64)
    before[order[1:]] = order[:-1]
    other = rng.integers(np.maximum(0, node - reach), node)
    last = np.concatenate([order[:-1][place[order[1:]] != place[order[:-1]]], order[-1:]])
    return Circuit.from_gates(inputs, before[inputs:], other, *rng.integers(1, 4, (2, gates)), last)


def assert_large(circuit: Circuit, seconds: float) -> None:
    begin = time.process_time()
    matrix = kaleidoscope(circuit, recognize=False)
    assert time.process_time() - begin < seconds
    x = np.random.default_rng(0).integers(0, 1000, circuit.in_features)
    assert np.array_equal(matrix.multiply(x, P), circuit.evaluate(x, P))
    assert prune(circuit).gates == circuit.gates
    assert matrix.width <= 3 * circuit.depth + 1
    assert matrix.size <= 2 * (1 << (circuit.size - 1).bit_length())


def test_circuits_K4_ten_thousand_random_gates() -> None:
    assert_large(long_circuit(256, 10_000, 1024, 0), 30)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "reach"), [(512, 2048), (8192, 32768), (4096, 10**6)])
def test_circuits_K4_a_hundred_thousand_random_gates_in_a_minute(inputs: int, reach: int) -> None:
    assert_large(long_circuit(inputs, 100_000, reach, 0), 60)


@pytest.mark.slow
def test_circuits_K4_a_large_hadamard_circuit_unrecognized_in_a_minute() -> None:
    circuit = hadamard(8192)
    assert circuit.gates > 100_000
    assert_large(circuit, 60)


@pytest.mark.parametrize("circuit", [hadamard(16), prefix_sums(8), random_linear(4, wide=False)])
def test_circuits_K4_layers_one_by_one(circuit: Circuit) -> None:
    """The proof without routing two permutations as one: width 4 for each layer of all values."""
    size = 2 * (1 << (circuit.size - 1).bit_length())
    product: Kaleidoscope | None = None
    found = layers(circuit, circuit.levels, keep_all=True)
    for layer in found:
        row = np.repeat(np.arange(layer.rows), np.diff(layer.start))
        factor = sparse(row, layer.column, layer.weight, (layer.rows, layer.columns), size=size)
        assert factor.width == 4
        product = factor if product is None else factor @ product
    assert product is not None
    assert product.width == 4 * len(found)
    assert np.array_equal(product.to_dense(P), circuit.to_dense(P))
    assert product.parameters == 16 * len(found) * size * (size.bit_length() - 1)


@pytest.mark.parametrize("circuit", [hadamard(4), random_linear(4, wide=False)])
def test_circuits_K4_layers_as_sums(circuit: Circuit) -> None:
    """The theorem by sums of parts of n entries: width 4 ceil(entries / n) for each layer, in size 4 n."""
    product: Kaleidoscope | None = None
    for layer in layers(circuit, circuit.levels, keep_all=True):
        row = np.repeat(np.arange(layer.rows), np.diff(layer.start))
        factor = sparse_sum(row, layer.column, layer.weight, (layer.rows, layer.columns))
        block = factor.size // 4
        assert factor.width == 4 * max(1, math.ceil(layer.nonzeros / block))
        assert factor.width <= 8  # a layer has at most two entries for each value
        product = factor if product is None else factor @ product
    assert product is not None
    assert np.array_equal(product.to_dense(P), circuit.to_dense(P))


@pytest.mark.parametrize("seed", range(4))
def test_circuits_K5_closure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_matrix(8, 2, seed), random_matrix(16, 1, seed + 10)
    a, b = first.to_dense(EXACT), second.to_dense(EXACT)
    assert np.array_equal(first.T.to_dense(EXACT), a.T)
    assert first.T.width == 2
    corner = Kaleidoscope(second.product, 16, 8)
    product = first @ corner
    assert product.width == 3
    assert np.array_equal(product.to_dense(EXACT), a @ b[:8])
    padded = corner.T @ Kaleidoscope(first.product, 5, 8)
    assert np.array_equal(padded.to_dense(EXACT), b[:8].T @ a[:, :5])
    field = PrimeField(10007)
    shapes = [(8 // (2 * s), 2, 2, s) for s in (4, 2, 1, 1, 2, 4)]
    random = ButterflyProduct(8, tuple(Stage.of(rng.integers(0, 10007, shape)) for shape in shapes))
    invertible = Kaleidoscope(random, 8, 8)
    both = invertible.inverse(field) @ invertible
    assert both.width == 2
    assert np.array_equal(both.to_dense(field), np.eye(8))


@pytest.mark.parametrize(("size", "width"), [(2, 1), (8, 1), (16, 3)])
def test_circuits_K5_parameters(size: int, width: int) -> None:
    matrix = random_matrix(size, width, 1)
    levels = size.bit_length() - 1
    assert matrix.parameters == 4 * width * size * levels
    assert matrix.flops == 6 * width * size * levels
    merged = matrix.product.merged()
    expected = 2 * size * (width * (2 * levels - 2) + 1)
    assert merged.parameters == matrix.merged_parameters == expected
    assert np.array_equal(merged.to_dense(EXACT), matrix.to_dense(EXACT))


# ------------------------------------------------------------------------------------------------------ the values


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_stages_equal_their_definition(stride: int) -> None:
    rng = np.random.default_rng(stride)
    for weight in (rng.integers(-3, 4, (8 // stride, 2, 2, stride)), rng.integers(0, 2, (8 // stride, 2, 2, stride))):
        stage = Stage.of(weight)
        assert np.array_equal(stage.weight, weight)
        matrix = ButterflyProduct(16, (stage,))
        assert np.array_equal(matrix.to_dense(EXACT), dense_stage(stage))
        assert np.array_equal(matrix.T.to_dense(EXACT), dense_stage(stage).T)
        reversal = bit_reversal(16)
        turned = dense_stage(stage.bit_reversed())
        assert np.array_equal(turned, dense_stage(stage)[reversal][:, reversal])
        assert stage.nonzeros == np.count_nonzero(weight)


@pytest.mark.parametrize("field", [Floats(), Floats(complex), EXACT, P])
def test_multiply_in_every_field(field: Any) -> None:
    matrix = kaleidoscope(prefix_sums(5))
    x = np.arange(10).reshape(2, 5)
    assert np.array_equal(matrix.multiply(x, field), np.cumsum(x, axis=1))
    assert np.array_equal(matrix.multiply(x[1], field), np.cumsum(x[1]))


@given(seed=seeds)
def test_kaleidoscope_to_circuit_and_back(seed: int) -> None:
    circuit = random_linear(seed)
    matrix = circuit.kaleidoscope()
    assert matrix.product.strides == kaleidoscope(circuit).product.strides
    again = matrix.circuit()
    assert np.array_equal(again.to_dense(P), circuit.to_dense(P))
    assert again.in_features == circuit.in_features
    assert random_matrix(8, 1, seed).product.circuit().gates <= 6 * 8


def test_permutations_make_no_gates() -> None:
    assert permutation(np.random.default_rng(0).permutation(32)).circuit().gates == 0


def test_sparse_factors_multiply_to_the_matrix() -> None:
    parts = sparse_factors([3, 0, 3], [1, 1, 2], [5, 6, 7], 4)
    x = np.array([1, 2, 3, 4])
    slots = parts.spread.multiply(x[parts.gather], EXACT)[parts.sort]
    assert parts.combine.multiply(slots, EXACT)[parts.scatter].tolist() == [12, 0, 0, 10 + 21]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation([0, 1, 2]), "power of two"),
        (lambda: permutation([0, 0]), "no permutation"),
        (lambda: broadcast([0, 2, 3, 4]), "grow by 0 or 1"),
        (lambda: segment_sums([0.0, 1.0]), "integers"),
        (lambda: sparse_factors([0] * 5, [0] * 5, [1] * 5, 4), "at most 4 entries"),
        (lambda: sparse([4], [0], [1], (4, 4)), "outside"),
        (lambda: sparse([0], [0], [1], (4, 4), size=2), "does not fit"),
        (lambda: total([]), "at least one"),
        (lambda: total([random_matrix(4, 1, 0), sparse([0], [0], [1], (2, 4))]), "one shape"),
        (lambda: Stage.of(np.zeros((3, 2, 2, 1))), "powers of two"),
        (lambda: Stage.of(np.zeros((1, 2, 2, 1))).inverse(P), "singular"),
        (lambda: Kaleidoscope(permutation_starred([1, 0, 3, 2]), 4, 4), "strides"),
        (lambda: Kaleidoscope(permutation([1, 0]), 3, 1), "do not fit"),
        (lambda: ButterflyProduct(4, (Stage.identity(8, 1),)), "size 8"),
        (lambda: random_matrix(4, 1, 0).multiply([1, 2]), "inputs"),
        (lambda: random_matrix(4, 1, 0) @ random_matrix(8, 1, 0), "can't follow"),
        (lambda: random_matrix(4, 1, 0).expanded(2), "can't be expanded"),
        (lambda: kaleidoscope(square()), "linear"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        call()


def square() -> Circuit:
    builder = Builder(1)
    return builder.build([builder.product([0, 0])])

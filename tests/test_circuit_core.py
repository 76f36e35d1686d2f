"""The circuit as data: construction, validation, counts, bounds, schedules."""

from __future__ import annotations

import ast
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from circuits import fft, hadamard, random_linear, random_polynomial
from hypothesis import given
from scipy import linalg

import structmat.circuit
from structmat.circuit import (
    Builder,
    Circuit,
    Kind,
    Layer,
    PrimeField,
    Rationals,
    counting,
    equal,
    fan_in_depth,
    hadamard_rigidity,
    latest_levels,
    layers,
    live_widths,
    morgenstern,
    narrow_levels,
    peak_live,
)
from structmat.circuit.measure import degrees, largest_weight, max_fan_out
from structmat.errors import CircuitError

seeds = st.integers(0, 100_000)
EXACT = Rationals()


def depth_by_recursion(circuit: Circuit) -> int:
    """The depth of the binary form by merging the two shallowest operands of each node in turn."""
    depth: list[int] = []
    for node in range(circuit.nodes):
        waiting = sorted(depth[u] for u in circuit.operand[circuit.start[node] : circuit.start[node + 1]] if u >= 0)
        if len(waiting) == 1:
            waiting = [waiting[0] + 1]
        while len(waiting) > 1:
            waiting = sorted([*waiting[2:], max(waiting[:2]) + 1])
        depth.append(waiting[0] if waiting else 0)
    return max((depth[o] for o in circuit.outputs), default=0)


def gates_by_counting(circuit: Circuit) -> int:
    fan_in = [int(circuit.start[t + 1] - circuit.start[t]) for t in range(circuit.nodes)]
    return sum(max(k - 1, min(k, 1)) for k, kind in zip(fan_in, circuit.kind, strict=True) if kind >= Kind.SUM)


def path_sum(circuit: Circuit) -> np.ndarray:
    """The matrix as a sum over all paths of the product of their weights."""
    matrix = np.zeros((circuit.out_features, circuit.in_features), dtype=object)

    def walk(node: int, product: int, row: int) -> None:
        if node < circuit.in_features:
            matrix[row, node] += product
        for edge in range(circuit.start[node], circuit.start[node + 1]):
            walk(int(circuit.operand[edge]), product * int(circuit.weight[edge]), row)

    for row, output in enumerate(circuit.outputs.tolist()):
        walk(output, 1, row)
    return matrix


# ------------------------------------------------------------------------------------------------------ the checks


@given(seeds)
def test_circuits_C1_evaluation_is_the_dense_product_and_counts_agree_two_ways(seed: int) -> None:
    circuit = random_linear(seed, integers=False)
    x = np.random.default_rng(seed).standard_normal((3, circuit.in_features))
    dense = circuit.to_dense()
    scale = max(1.0, float(np.abs(dense).max(initial=0)))
    assert np.abs(circuit.evaluate(x) - x @ dense.T).max(initial=0) <= 1e-12 * scale * 100
    exact = random_linear(seed)
    whole = np.arange(exact.in_features)
    assert np.array_equal(exact.evaluate(whole, EXACT), exact.to_dense(EXACT) @ whole)
    assert circuit.gates == gates_by_counting(circuit)
    assert circuit.size == circuit.gates + circuit.in_features
    assert circuit.depth == depth_by_recursion(circuit)
    assert circuit.binary().wide == circuit.binary().counts == circuit.counts


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 5, 8])
def test_circuits_C6_hadamard_and_fourier(levels: int) -> None:
    size = 1 << levels
    circuit = hadamard(levels)
    assert (circuit.gates, circuit.depth) == (size * levels, levels)
    assert (circuit.multiplications, circuit.additions) == (0, size * levels)
    assert np.array_equal(circuit.to_dense(EXACT), linalg.hadamard(size))
    fourier = fft(levels)
    assert (fourier.gates, fourier.depth) == (size * levels, levels)
    assert fourier.gates <= 2 * size * max(levels, 1)
    reference = np.fft.fft(np.eye(size))
    assert np.abs(fourier.to_dense() - reference).max() <= 1e-12 * size


def test_circuits_C7_morgenstern_on_random_invertible_circuits() -> None:
    invertible = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 5))
        builder = Builder(size)
        for _ in range(12):
            builder.sum(rng.integers(0, builder.nodes, 2), rng.uniform(-2, 2, 2))
        circuit = builder.build(np.arange(builder.nodes - size, builder.nodes))
        dense = circuit.to_dense()
        if abs(np.linalg.det(dense)) < 1e-9:
            continue
        invertible += 1
        bound = morgenstern(dense, largest_weight(circuit))
        determinant = abs(np.linalg.det(dense))
        expected = math.log2(determinant) / math.log2(2 * max(1.0, largest_weight(circuit)))
        assert bound == pytest.approx(max(0.0, expected), abs=1e-9)
        assert circuit.gates >= bound
    assert invertible > 100
    assert morgenstern(linalg.hadamard(8)) == pytest.approx(12)
    assert morgenstern(np.fft.fft(np.eye(64))) == pytest.approx(192)
    assert hadamard(3).gates == 24
    assert fft(6).gates == 384


@given(seeds)
def test_circuits_C8_layers_multiply_to_the_matrix(seed: int) -> None:
    circuit = random_linear(seed)
    circuit = replace(circuit, outputs=np.unique(circuit.outputs)).binary()
    dense = circuit.to_dense(EXACT).astype(float)
    keep_all, short = layers(circuit, keep_all=True), circuit.layers()
    for made in (keep_all, short):
        assert np.array_equal(product(made), dense)
    bound = 2 * (1 << (circuit.size - 1).bit_length())
    assert all(layer.nonzeros <= bound for layer in keep_all)
    assert all(a.rows <= b.rows for a, b in zip(short, keep_all, strict=True))
    widths = live_widths(circuit.simplify())
    assert [layer.rows for layer in circuit.simplify().layers()[:-1]] == widths[1:-1].tolist()


def product(made: tuple[Layer, ...]) -> np.ndarray:
    result = np.eye(made[0].columns)
    for layer in made:
        result = layer.matrix() @ result
    return result


@given(seeds)
def test_circuits_C9_paths_give_the_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    builder = Builder(int(rng.integers(1, 4)))
    for _ in range(int(rng.integers(0, 13))):
        terms = int(rng.integers(1, 3))
        builder.sum(rng.integers(0, builder.nodes, terms), rng.integers(-3, 4, terms))
    circuit = builder.build(rng.integers(0, builder.nodes, 3))
    assert np.array_equal(circuit.to_dense(EXACT), path_sum(circuit))


# ------------------------------------------------------------------------------------------------------ construction


def test_gates_as_arrays_are_the_builder_circuit() -> None:
    circuit = Circuit.from_gates(2, [0, 0, 2, 3], [1, 1, 2, 3], [1, 1, 5, 2], [1, -1, 0, 3], [4, 5, 3])
    assert circuit.to_dense().tolist() == [[5, 5], [5, -5], [1, -1]]
    assert np.diff(circuit.start).tolist() == [0, 0, 2, 2, 1, 1], "beta = 0 and i = j are scalings"
    assert circuit.gates == 4


@given(seeds)
def test_edges_in_any_order_are_sorted(seed: int) -> None:
    circuit = random_polynomial(seed)
    rng = np.random.default_rng(seed)
    place = rng.permutation(circuit.nodes)
    # Inputs keep their order among themselves.
    place[: circuit.in_features] = np.sort(place[: circuit.in_features])
    kind = np.empty_like(circuit.kind)
    kind[place] = circuit.kind
    target = np.repeat(place, np.diff(circuit.start))
    operand = np.where(circuit.operand >= 0, place[circuit.operand], -1)
    shuffle = rng.permutation(len(target))
    again = Circuit.from_edges(
        kind, target[shuffle], operand[shuffle], place[circuit.outputs], weight=circuit.weight[shuffle]
    )
    assert again.counts == circuit.counts
    assert equal(circuit, again, seed=0)


def test_a_million_gates_are_built_and_sorted_in_bulk() -> None:
    size, levels = 1 << 14, 64
    builder = Builder(size)
    x = builder.inputs
    for _ in range(levels):
        x = builder.sums(np.stack([x, np.roll(x, 1)], axis=-1), [1, -1])
    circuit = builder.build(x)
    assert (circuit.gates, circuit.depth) == (size * levels, levels)


def test_bulk_and_single_gates_agree() -> None:
    one, many = Builder(4), Builder(4)
    operands, weights = np.array([[0, 1], [2, 3], [1, 2]]), np.array([[1, 2], [3, 4], [5, 6]])
    singles = [one.sum(o, w) for o, w in zip(operands, weights, strict=True)]
    assert many.sums(operands, weights).tolist() == singles
    assert one.product([4, 5]) == many.products([[4, 5]])[0]
    assert one.quotient(7, 6) == many.quotients([7], [6])[0]
    assert many.ragged_sums([0, 1, 2], [3, 4, 5], [1, 2, 3]).tolist() == [
        one.sum([]), one.sum([3], [1]), one.sum([4, 5], [2, 3])
    ]  # fmt: skip
    assert equal(one.build(np.arange(12)), many.build(np.arange(12)))


def test_gates_of_one_call_may_read_each_other() -> None:
    builder = Builder(2)
    chain = builder.sums([[0, 1], [2, 1], [3, 2]])
    assert builder.build(chain).to_dense(EXACT).tolist() == [[1, 1], [1, 2], [2, 3]]
    with pytest.raises(CircuitError, match="An operand is node 6, but there are 5 nodes"):
        builder.sums([[0, 1], [6, 1]])


def test_copies_of_a_circuit_inside_another() -> None:
    builder = Builder(8)
    once = builder.apply(hadamard(2), builder.inputs.reshape(2, 4))
    twice = builder.apply(hadamard(1), once.T)
    assert np.array_equal(builder.build(twice.T).to_dense(), linalg.hadamard(8))
    with pytest.raises(CircuitError, match=r"circuit of 2 inputs .* shape \(4,\)"):
        builder.apply(hadamard(1), [0, 1, 2, 3])


def test_parameters_are_shared_and_named() -> None:
    builder = Builder(2)
    w = builder.parameter("w", [[1.5, 2.0]])
    b = builder.parameter("b", 4.0)
    gates = builder.sums([[0, 1], [0, 1]], [[1, 1], [-2, 1]], parameters=[[w[0, 0], w[0, 1]], [w[0, 0], -1]])
    circuit = builder.build(gates)
    assert circuit.parameters == 3
    assert circuit.group("w").tolist() == [[1.5, 2.0]]
    assert circuit.group("b") == circuit.values[b]
    assert circuit.to_dense().tolist() == [[1.5, 2.0], [-3.0, 1.0]]
    assert circuit.with_values({"w": [[1, 0]]}).to_dense().tolist() == [[1, 0], [-2, 1]]
    assert circuit.evaluate([1, 1], parameters=[2, 3, 0]).tolist() == [5, -3]
    assert circuit.multiplications == 3
    with pytest.raises(CircuitError, match=r"no parameters named 'v'\. It has: w, b"):
        circuit.group("v")
    with pytest.raises(CircuitError, match=r"'w' have shape \(1, 2\); got \(2,\)"):
        circuit.with_values({"w": [1, 2]})
    with pytest.raises(CircuitError, match="no parameters named 'x'"):
        circuit.with_values({"x": [1, 2]})
    with pytest.raises(CircuitError, match="already has parameters named 'w'"):
        builder.parameter("w", 1)


def test_arrays_are_read_only_and_not_copied() -> None:
    operand = np.array([0, 1])
    circuit = Circuit([0, 0, 2], [0, 0, 0, 2], operand, [1, 1], [-1, -1], [2])
    with pytest.raises(ValueError, match="read-only"):
        circuit.operand[0] = 1
    assert np.shares_memory(circuit.operand, operand)
    operand[0] = 0


# ------------------------------------------------------------------------------------------------------ bad input


def arrays(**changes: object) -> dict[str, object]:
    """x0 + x1, then its square."""
    good: dict[str, object] = {
        "kind": [0, 0, 2, 3],
        "start": [0, 0, 0, 2, 4],
        "operand": [0, 1, 2, 2],
        "weight": [1, 1, 1, 1],
        "parameter": [-1, -1, -1, -1],
        "outputs": [3],
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operand": [0, 3, 2, 2]}, "node 3, which does not come before it: there is a cycle, or"),
        ({"operand": [0, 2, 2, 2]}, "Node 2 reads node 2, which does not come before"),
        ({"operand": [0, 7, 2, 2]}, "Node 2 reads node 7, but the circuit has 4 nodes"),
        ({"operand": [0, -1, 2, 2]}, "Node 2 reads node -1. Operands are nodes from 0 on"),
        ({"operand": [0, 1, 2]}, "4 nodes over 3 edges must begin at 0"),
        ({"outputs": [4]}, "Output node 4 does not exist: the circuit has 4 nodes"),
        ({"kind": [0, 0, 2, 9]}, "kind 9, which does not exist"),
        ({"kind": [2, 0, 0, 3]}, "inputs of a circuit are its first nodes"),
        ({"kind": [0, 0, 1, 3]}, "Node 2 is of kind CONSTANT and has 2 operands"),
        ({"weight": [1, 1, 1, 2]}, "Node 3 is a product or quotient with a weight"),
        ({"weight": [1, math.nan, 1, 1]}, "Node 2 has the weight nan"),
        ({"weight": [1, 1, 1]}, "one operand, weight and parameter; got 4, 3 and 4"),
        ({"parameter": [-1, 0, -1, -1]}, "reads parameter 0, but the circuit has 0 parameters"),
        ({"outputs": [[3]]}, "one axis each"),
    ],
)
def test_what_is_no_circuit_is_refused(changes: dict[str, object], message: str) -> None:
    assert Circuit(**arrays()).evaluate([2, 3]).tolist() == [25]  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match=message):
        Circuit(**arrays(**changes))  # type: ignore[arg-type]


def test_a_cycle_is_found_and_shown() -> None:
    with pytest.raises(CircuitError, match=r"has a cycle: node \d reads node \d reads node \d reads node \d"):
        Circuit.from_edges([0, 2, 2, 2], [1, 2, 3, 1], [3, 1, 2, 0], [3])
    with pytest.raises(CircuitError, match="joins nodes 1 to 9, but the nodes are 0 to 1"):
        Circuit.from_edges([0, 2], [1], [9], [1])
    with pytest.raises(CircuitError, match="Outputs 5 to 5"):
        Circuit.from_edges([0, 2], [1], [0], [5])


def test_wrong_operands_are_refused_by_the_builder() -> None:
    builder = Builder(2)
    with pytest.raises(CircuitError, match="operand is node 2, but there are 2 nodes so far"):
        builder.sum([0, 2])
    with pytest.raises(CircuitError, match=r"weights of shape \(3,\) do not fit operands \(2,\)"):
        builder.sum([0, 1], [1, 2, 3])
    with pytest.raises(CircuitError, match="reads parameter 0; there are 0 so far"):
        builder.sum([0, 1], parameters=[0, -1])
    with pytest.raises(CircuitError, match="Gates of 3 terms together got 2 operands"):
        builder.ragged_sums([1, 2], [0, 1])
    with pytest.raises(CircuitError, match="-1 inputs"):
        Builder(-1)


def test_what_is_no_integer_or_no_number_is_refused() -> None:
    """Floats would be cut to nodes without a word."""
    builder = Builder(2)
    for call, message in (
        (lambda: builder.sum([0.5, 1]), "Operands are integers; got an array of float64"),
        (lambda: builder.sum([0, 1], parameters=[0.5, 0]), "Parameters are integers"),
        (lambda: builder.sum([0], ["a"]), "Numbers are needed; got an array of <U1"),
        (lambda: builder.sum([-1, 0]), "node -1, but there are 2 nodes so far"),
        (lambda: builder.build([0.0]), "Outputs are integers"),
        (lambda: Circuit.from_gates(1, [0.0], [0], 1, 1, [1]), "Operands are integers"),
        (lambda: Circuit.from_edges([0, 2], [1.0], [0], [1]), "Targets are integers"),
        (lambda: replace(hadamard(1), outputs=np.zeros(2)), "entries of 'outputs' are integers"),
    ):
        with pytest.raises(CircuitError, match=message):
            call()


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(CircuitError, match="0 parameters; got 1 values"):
        hadamard(1).with_values([1.0])
    for field in ("float", PrimeField):
        with pytest.raises(CircuitError, match="is an instance of Field"):
            hadamard(1).evaluate([1, 2], field)  # type: ignore[arg-type]
    circuit = hadamard(1)
    with pytest.raises(CircuitError, match=r"2 inputs; got values of shape \(3,\)"):
        circuit.evaluate([1, 2, 3])
    with pytest.raises(CircuitError, match="0 parameters; got 1 values"):
        circuit.evaluate([1, 2], parameters=[1])
    with pytest.raises(CircuitError, match=r"to_dense needs a linear circuit.*1 products"):
        Circuit(**arrays()).to_dense()  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- measures


def test_counts_with_unbounded_fan_in_stand_beside() -> None:
    builder = Builder(8)
    total = builder.sum(builder.inputs)
    circuit = builder.build([builder.sum([total, 0], [2, 1])])
    assert (circuit.wide.gates, circuit.wide.depth) == (2, 2)
    assert (circuit.gates, circuit.depth) == (8, 4)
    assert circuit.wide.additions == circuit.additions == 8
    assert circuit.multiplications == 1
    assert max_fan_out(circuit) == 2
    assert circuit.edges == 10


def test_the_depth_of_a_very_uneven_sum_is_exact() -> None:
    builder = Builder(3)
    deep = 0
    for _ in range(60):
        deep = builder.sum([deep, 1])
    exact = builder.build([builder.sum([deep, 0, 1, 2])])
    assert exact.depth == depth_by_recursion(exact) == 61
    twice = builder.build([builder.sum([deep, deep, 0])])
    assert twice.depth == depth_by_recursion(twice) == 62


def test_degrees_bound_the_polynomials() -> None:
    builder = Builder(2)
    square = builder.product([0, 0])
    ratio = builder.quotient(square, builder.sum([0, 1]))
    twice = builder.sum([ratio, ratio, 0])
    above, below = degrees(builder.build([twice]))
    assert (above[square], below[square]) == (2, 0)
    assert (above[ratio], below[ratio]) == (2, 1)
    assert (above[twice], below[twice]) == (3, 2)


# ------------------------------------------------------------------------------------------------ bounds, scheduling


def test_bounds() -> None:
    assert counting(64 * 64) == 2048
    assert counting(7) == 4
    assert fan_in_depth(linalg.hadamard(8)) == 3
    assert fan_in_depth(np.eye(3)) == 0
    assert fan_in_depth(2 * np.eye(3)) == 1
    rectangular = linalg.hadamard(8)[:3]
    minors = [abs(np.linalg.det(rectangular[:, list(c)])) for c in itertools.combinations(range(8), 3)]
    assert 0 < morgenstern(rectangular) <= math.log2(max(minors)) + 1e-12
    assert morgenstern(rectangular.T) == pytest.approx(morgenstern(rectangular))
    assert morgenstern(np.zeros((2, 2))) == 0
    assert hadamard_rigidity(16, 2) == 32
    with pytest.raises(CircuitError, match="got size 16 and rank 16"):
        hadamard_rigidity(16, 16)
    with pytest.raises(CircuitError, match=r"got shape \(3,\)"):
        morgenstern([1, 2, 3])


@given(seeds)
def test_other_schedules_give_the_same_product(seed: int) -> None:
    circuit = random_linear(seed).simplify()
    dense = circuit.to_dense(EXACT).astype(float)
    for levels in (latest_levels(circuit), narrow_levels(circuit)):
        assert np.array_equal(product(layers(circuit, levels)), dense)
    assert live_widths(circuit, narrow_levels(circuit)).max() <= live_widths(circuit).max()
    again = circuit.reschedule()
    assert equal(circuit, again, seed=0)
    assert again.counts == circuit.counts
    assert peak_live(again) <= peak_live(circuit)


def test_rescheduling_shortens_live_ranges() -> None:
    """Sums of far neighbours made first and read last: depth first needs a few at a time."""
    builder = Builder(1)
    powers = [0]
    for _ in range(20):
        powers.append(builder.sum([powers[-1]], [2]))
    side = [builder.sum([p], [3]) for p in powers]
    total = side[-1]
    for s in reversed(side[:-1]):
        total = builder.sum([total, s])
    circuit = builder.build([total])
    assert peak_live(circuit) == 22
    assert peak_live(circuit.reschedule()) == 22, "no order needs less"
    chain = Builder(1)
    late = [chain.sum([0], [k]) for k in range(2, 22)]
    total = late[0]
    for gate in late[1:]:
        total = chain.sum([total, gate])
    wide = chain.build([total])
    assert peak_live(wide) == 21
    assert peak_live(wide.reschedule()) == 4
    assert live_widths(wide)[1] == 20
    assert live_widths(wide, narrow_levels(wide)).max() == 3


def test_a_schedule_that_is_none_is_refused() -> None:
    circuit = hadamard(2)
    levels = latest_levels(circuit)
    with pytest.raises(CircuitError, match="not after all that it reads"):
        layers(circuit, type(levels)(0 * levels.of_node, levels.start, levels.order))


def test_layers_with_parameters() -> None:
    builder = Builder(2)
    w = builder.parameter("w", [3.0])
    circuit = builder.build([builder.sum([0, 1], [1, 2], parameters=[w[0], -1])])
    (layer,) = circuit.layers()
    assert layer.matrix(circuit.values).toarray().tolist() == [[3, 2]]
    with pytest.raises(CircuitError, match="This layer reads parameters"):
        layer.matrix()


def test_importing_circuits_does_not_import_torch() -> None:
    code = "import structmat.circuit, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_circuits_import_nothing_else_of_the_library() -> None:
    """But errors, and the arithmetic of sizes: plain Python that imports nothing of the library itself."""
    folder = Path(structmat.circuit.__file__).parent
    leaves = [folder.parent / f"{leaf}.py" for leaf in ("errors", "sizes")]
    for path in [*folder.rglob("*.py"), *leaves]:
        allowed = () if path in leaves else ("structmat.circuit", "structmat.errors", "structmat.sizes")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] == "structmat":
                    assert name.startswith(allowed), f"{path.name} imports {name}"

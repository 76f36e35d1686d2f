"""Transformations of circuits: transpose, derivatives, linear part, simplification. Exact over a prime field."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from circuits import fft, hadamard, random_linear, random_polynomial
from hypothesis import given

from structmat.circuit import Builder, Circuit, Floats, PrimeField, Rationals, equal
from structmat.circuit.measure import max_fan_out
from structmat.circuit.simplify import prune
from structmat.errors import CircuitError

seeds = st.integers(0, 100_000)
EXACT = Rationals()
P = PrimeField()


def torch_values(circuit: Circuit, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The outputs gate by gate in PyTorch: an independent evaluation with gradients."""
    nodes: list[torch.Tensor] = []
    for node in range(circuit.nodes):
        span = range(circuit.start[node], circuit.start[node + 1])
        weights = [
            float(circuit.weight[e]) * (values[circuit.parameter[e]] if circuit.parameter[e] >= 0 else x.new_ones(()))
            for e in span
        ]
        reads = [nodes[circuit.operand[e]] for e in span if circuit.operand[e] >= 0]
        match int(circuit.kind[node]):
            case 0:
                value = x[node]
            case 1:
                value = weights[0]
            case 2:
                value = sum((w * r for w, r in zip(weights, reads, strict=True)), start=x.new_zeros(()))
            case 3:
                value = torch.stack(reads).prod()
            case _:
                value = reads[0] / reads[1]
        nodes.append(value)
    return torch.stack([nodes[o] for o in circuit.outputs])


# ------------------------------------------------------------------------------------------------------ the checks


def without_zero_rows(circuit: Circuit) -> tuple[Circuit, int, int]:
    """The pruned circuit of the rows that are not zero by structure, and how many outputs and inputs it joins."""
    pruned = prune(circuit.simplify())
    reached = np.abs(pruned.to_dense(P)) > 0
    rows = reached.any(axis=1)
    fewer = replace(pruned, outputs=pruned.outputs[rows])
    return prune(fewer), int(rows.sum()), int(reached.any(axis=0).sum())


@given(seeds)
def test_circuits_C2_transposition_principle(seed: int) -> None:
    circuit = random_linear(seed)
    turned = circuit.transpose()
    assert np.array_equal(turned.to_dense(EXACT), circuit.to_dense(EXACT).T)
    clean, outputs, inputs = without_zero_rows(circuit)
    back = clean.T
    assert back.multiplications == clean.multiplications
    # Cancelling paths could hide an input in the matrix that the circuit still reads.
    read = len(
        {int(u) for u in clean.operand if u < clean.in_features}
        | {int(o) for o in clean.outputs if o < clean.in_features}
    )
    assert inputs <= read
    assert back.additions == clean.additions + outputs - read
    again = back.T
    assert (again.multiplications, again.additions) == (clean.multiplications, clean.additions)
    assert equal(again, clean, seed=0)


@given(seeds)
def test_the_depth_of_the_transpose_is_bounded(seed: int) -> None:
    circuit = prune(random_linear(seed))
    fan_out = max(1, math.ceil(math.log2(max_fan_out(circuit) or 1)))
    assert circuit.T.depth <= (circuit.wide.depth + 1) * fan_out


def test_transposed_transforms_keep_their_costs() -> None:
    for circuit in (hadamard(5), fft(5)):
        turned = circuit.T
        assert (turned.gates, turned.depth) == (circuit.gates, circuit.depth)
        assert (turned.multiplications, turned.additions) == (circuit.multiplications, circuit.additions)
        assert np.allclose(turned.to_dense(), circuit.to_dense().T, atol=1e-12)


def test_a_shared_sum_is_balanced_by_depth() -> None:
    """One node read at every depth of a chain: its adjoint adds the shallow terms first."""
    builder = Builder(2)
    node = 0
    for _ in range(50):
        node = builder.sum([node, 1], [2, 3])
    circuit = builder.build([node])
    assert circuit.T.depth <= circuit.depth + 2
    assert np.array_equal(circuit.T.to_dense(EXACT), circuit.to_dense(EXACT).T)


def test_a_circuit_that_is_not_linear_has_no_transpose() -> None:
    builder = Builder(2)
    circuit = builder.build([builder.product([0, 1])])
    with pytest.raises(CircuitError, match=r"transpose needs a linear circuit.*1 products"):
        circuit.transpose()
    dead = builder.build([builder.sum([0, 1])])
    assert dead.is_linear, "the product is read by nothing"
    assert dead.T.to_dense().tolist() == [[1], [1]]


@given(seeds, st.booleans())
def test_circuits_C3_operations_of_the_gradient(seed: int, divisions: bool) -> None:
    circuit = prune(random_polynomial(seed, outputs=1, divisions=divisions))
    both = circuit.gradient(value=True)
    assert both.counts.operations <= 5 * circuit.counts.operations
    assert both.gates <= 5 * max(1, circuit.gates)


@given(seeds)
def test_circuits_C3_operations_for_linear_circuits_with_trained_constants(seed: int) -> None:
    """Binary gates alpha g + beta h with every constant a parameter: 3 operations forward, at most 9 in all."""
    rng = np.random.default_rng(seed)
    builder = Builder(int(rng.integers(1, 5)))
    gates = int(rng.integers(1, 15))
    constants = builder.parameter("constants", rng.standard_normal((gates, 2)))
    for gate in range(gates):
        builder.sum(rng.integers(0, builder.nodes, 2), parameters=constants[gate])
    circuit = prune(builder.build([builder.nodes - 1]))
    forward = circuit.counts.operations
    assert forward == 3 * circuit.gates
    assert circuit.vjp(parameters=True, value=True).counts.operations <= 3 * forward


@given(seeds, st.booleans())
def test_circuits_C4_gradients_match_autograd(seed: int, divisions: bool) -> None:
    circuit = random_polynomial(seed, outputs=1, parameters=2, divisions=divisions)
    rng = np.random.default_rng(seed)
    point = rng.uniform(0.5, 1.0, circuit.in_features)
    x = torch.tensor(point, requires_grad=True)
    theta = torch.tensor(circuit.values.astype(float), requires_grad=True)
    value = torch_values(circuit, x, theta)[0]
    grads = torch.autograd.grad(value, [x, theta], allow_unused=True) if value.requires_grad else (None, None)
    expected = np.concatenate(
        [np.zeros(len(old)) if new is None else new.numpy() for new, old in zip(grads, (x, theta), strict=True)]
    )
    result = circuit.gradient(parameters=True, value=True).evaluate(point)
    assert result[0] == pytest.approx(value.item(), rel=1e-12)
    scale = max(1.0, float(np.abs(expected).max()), abs(value.item()))
    assert np.abs(result[1:] - expected).max() <= 1e-11 * scale


@given(seeds)
def test_circuits_C4_gradients_match_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    builder = Builder(3)
    for _ in range(8):
        builder.sum(rng.integers(0, builder.nodes, 2), rng.uniform(-1, 1, 2))
        builder.product(rng.integers(0, builder.nodes, 2))
    circuit = builder.build([builder.nodes - 1])
    x = rng.uniform(-1, 1, 3)
    step = 1e-5
    ends = circuit.evaluate(np.concatenate([x + step * np.eye(3), x - step * np.eye(3)]))[:, 0]
    expected = (ends[:3] - ends[3:]) / (2 * step)
    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(circuit.gradient().evaluate(x) - expected).max() <= 1e-6 * scale


def test_circuits_C5_linear_part_of_an_expanded_product() -> None:
    builder = Builder(2)
    one = builder.constant(1)
    shifted = [builder.sum([0, one]), builder.sum([1, one])]
    product, plain = builder.product(shifted), builder.product([0, 1])
    circuit = builder.build([builder.sum([product, plain, one], [1, -1, -1])])
    linear = circuit.linear_part()
    assert linear.is_linear
    assert linear.to_dense(EXACT).tolist() == [[1, 1]]
    assert linear.gates == 1
    assert linear.gates <= circuit.gates
    assert linear.depth <= circuit.depth
    far = circuit.linear_part(at=[5, -3])
    assert far.to_dense(EXACT).tolist() == [[1, 1]]
    assert far.gates <= circuit.gates
    assert far.depth <= circuit.depth


# ------------------------------------------------------------------------------------------------------ derivatives


@given(seeds, st.booleans())
def test_jacobians_agree_in_all_three_ways(seed: int, divisions: bool) -> None:
    """Forward, backward and at a point, over a prime field: exactly."""
    circuit = random_polynomial(seed, parameters=seed % 2, divisions=divisions)
    n, m = circuit.in_features, circuit.out_features
    x = P.random((n,), np.random.default_rng(seed))
    matrix = circuit.linear_part(x, P).to_dense(P)
    forward = circuit.jvp(value=True).evaluate(np.concatenate([np.tile(x, (n, 1)), np.eye(n, dtype=int)], axis=1), P)
    assert np.array_equal(forward[:, m:].T, matrix)
    assert np.array_equal(forward[0, :m], circuit.evaluate(x, P))
    backward = circuit.vjp(value=True).evaluate(np.concatenate([np.tile(x, (m, 1)), np.eye(m, dtype=int)], axis=1), P)
    assert np.array_equal(backward[:, m:], matrix)
    assert np.array_equal(backward[0, :m], circuit.evaluate(x, P))


@given(seeds)
def test_linear_circuits_are_their_own_derivative(seed: int) -> None:
    circuit = prune(random_linear(seed, parameters=2))
    n = circuit.in_features
    dense = circuit.to_dense(EXACT)
    assert circuit.vjp().gates == circuit.T.gates
    assert np.array_equal(circuit.vjp().to_dense(EXACT)[:, n:], dense.T)
    assert not circuit.vjp().to_dense(EXACT)[:, :n].any()
    assert np.array_equal(circuit.jvp().to_dense(EXACT)[:, n:], dense)
    assert circuit.jvp().gates <= circuit.gates
    assert equal(circuit.linear_part(at=np.arange(n)), circuit, seed=0)


def test_the_gradient_of_a_product_of_many_factors() -> None:
    builder = Builder(6)
    circuit = builder.build([builder.product(builder.inputs)])
    x = np.array([2, 3, 5, 7, 11, 13])
    assert circuit.gradient().evaluate(x, EXACT).tolist() == [30030 // v for v in x.tolist()]
    assert circuit.gradient(value=True).gates <= 5 * circuit.gates


def test_the_gradient_is_of_one_output() -> None:
    with pytest.raises(CircuitError, match=r"gradient is of one output; the circuit has 4. Use vjp\(\)"):
        hadamard(2).gradient()


def test_expansion_at_a_division_by_zero_is_refused() -> None:
    builder = Builder(2)
    circuit = builder.build([builder.quotient(0, 1)])
    with pytest.raises(CircuitError, match=r"no expansion at this point: Gate 2 divides by zero.*at="):
        circuit.linear_part()
    at_one = circuit.linear_part(at=[3, 2])
    assert [str(w) for w in at_one.to_dense().ravel()] == ["1/2", "-3/4"]
    with pytest.raises(CircuitError, match=r"shape \(3,\); the circuit has 2 inputs"):
        circuit.linear_part(at=[1, 2, 3])


def test_a_linear_map_computed_with_divisions_has_a_linear_circuit() -> None:
    """(x^2 - y^2) / (x - y) + x * x / x = 2 x + y, anywhere but on the diagonal and the axes."""
    builder = Builder(2)
    squares = builder.sum([builder.product([0, 0]), builder.product([1, 1])], [1, -1])
    ratio = builder.quotient(squares, builder.sum([0, 1], [1, -1]))
    circuit = builder.build([builder.sum([ratio, builder.quotient(builder.product([0, 0]), 0)])])
    linear = circuit.linear_part(at=[3, 1])
    assert linear.to_dense().tolist() == [[2, 1]]
    assert linear.gates <= circuit.gates
    assert linear.depth <= circuit.depth


# ---------------------------------------------------------------------------------------------------------- simplify


@given(seeds, st.booleans())
def test_simplified_circuits_are_equal_and_smaller(seed: int, divisions: bool) -> None:
    circuit = random_polynomial(seed, parameters=seed % 3, divisions=divisions)
    simple = circuit.simplify()
    assert equal(circuit, simple, seed=0)
    assert simple.gates <= circuit.gates
    assert simple.depth <= circuit.depth
    assert simple.simplify().counts == simple.counts


@given(seeds)
def test_simplified_linear_circuits_stay_linear(seed: int) -> None:
    circuit = random_linear(seed, parameters=seed % 3)
    simple = circuit.simplify()
    assert simple.is_linear
    assert np.array_equal(simple.to_dense(EXACT), circuit.to_dense(EXACT))
    assert simple.counts.operations <= circuit.counts.operations


def test_equal_gates_become_one() -> None:
    builder = Builder(3)
    first, second = builder.sum([0, 1], [1, 2]), builder.sum([1, 0], [2, 1])
    ratios = [builder.quotient(first, 2), builder.quotient(second, 2), builder.quotient(2, first)]
    products = [builder.product([ratios[0], ratios[2]]), builder.product([ratios[2], ratios[1]])]
    circuit = builder.build(products)
    assert circuit.simplify().gates == 4
    assert circuit.simplify().outputs[0] == circuit.simplify().outputs[1]


def test_constants_are_folded() -> None:
    builder = Builder(1)
    two, three = builder.constant([2, 3])
    six = builder.product([two, three])
    seven = builder.sum([six, builder.constant(1)])
    scaled = builder.product([seven, 0])
    half = builder.quotient(scaled, two)
    zero = builder.product([builder.sum([two, two], [1, -1]), 0])
    circuit = builder.build([builder.sum([half, zero])]).simplify()
    assert circuit.is_linear
    assert [str(w) for w in circuit.to_dense().ravel()] == ["7/2"]
    assert circuit.gates <= 2


def test_folding_keeps_parameters_and_divisions_by_zero() -> None:
    builder = Builder(1)
    theta = builder.parameter_nodes(builder.parameter("theta", [2]))
    zero = builder.sum([])
    bad = builder.quotient(builder.constant(1), zero)
    kept = builder.build([builder.product([0, theta[0]])]).simplify()
    assert kept.evaluate([3], parameters=[5]).tolist() == [15]
    with pytest.raises(CircuitError, match="divides by zero"):
        builder.build([bad]).simplify().evaluate([1])


def test_repeated_and_zero_terms_are_merged() -> None:
    builder = Builder(2)
    circuit = builder.build([builder.sum([0, 1, 0, 1], [1, 2, 2, -2])]).simplify()
    assert circuit.counts == builder.build([builder.sum([0], [3])]).simplify().counts
    chain = builder.sum([builder.sum([builder.sum([0], [-1])], [-1]), 1])
    assert builder.build([chain]).simplify().gates == 1


def test_floating_point_constants_fold_within_rounding() -> None:
    circuit = fft(4)
    assert np.allclose(circuit.simplify().to_dense(Floats(complex)), circuit.to_dense(), atol=1e-14)
    assert circuit.simplify().gates == circuit.gates

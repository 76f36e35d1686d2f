"""Programs gate by gate, and circuits as programs: the same matrices, the same counts, on every backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import market
import numpy as np
import pytest
import torch
from circuits import random_linear, random_polynomial
from hypothesis import given
from native_programs import programs, tensors_of
from torch import Tensor

import structmat as sm
from structmat.circuit import Builder, Circuit, PrimeField, trace_torch
from structmat.circuit.catalogue import cosine, fourier, haar, hadamard, prefix_sums, toeplitz
from structmat.circuit.kaleidoscope import kaleidoscope, monarch
from structmat.errors import CircuitError, ShapeError
from structmat.kernels import apply, native
from structmat.program import (
    Call,
    Chain,
    Complex,
    Contraction,
    Cosine,
    Crop,
    Diagonal,
    Fourier,
    Generated,
    Interpolation,
    Pad,
    Permute,
    Program,
    Real,
    Shuffle,
    Sparse,
    Sum,
    Windowed,
    cost,
    reference,
    stages,
    tensor_sizes,
    transpose,
)
from structmat.program.circuit import from_circuit, from_product, to_circuit
from structmat.program.derived import has_derived
from structmat.structure import Shape, Structure
from structmat.testing.oracle import explicit

seeds = st.integers(0, 100_000)


def name(value: object) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value).replace("/", "-")


def assert_agrees(program: Program, tensors: Mapping[str, Tensor]) -> Circuit:
    """The circuit of a program has its matrix and its counts."""
    circuit = to_circuit(program, tensors)
    np.testing.assert_allclose(circuit.to_dense(), explicit(program, tensors).numpy(), rtol=1e-10, atol=1e-12)
    counted = cost(program)
    if not any(isinstance(s, Generated) for s in stages(program)):  # whose parameters are the entries of matrices
        assert circuit.parameters == counted.parameters
        assert {g.name: g.size for g in circuit.groups} == tensor_sizes(program)
    if any(isinstance(stage, Cosine) for stage in stages(program)):
        return circuit  # its cost is a model
    if has_derived(program):  # weights that come out as 1 are no multiplications
        assert circuit.multiplications <= counted.multiplications
        return circuit
    assert circuit.multiplications == counted.multiplications
    assert circuit.additions == counted.additions + added_by_empty_rows(program, tensors)
    assert circuit.depth <= counted.depth or any(isinstance(s, Sparse | Windowed) for s in stages(program))
    return circuit


def added_by_empty_rows(program: Program, tensors: Mapping[str, Tensor]) -> int:
    """A sum of no terms has no addition to save, which the sparse stages count as if they had."""
    total = 0
    for stage in stages(program):
        if isinstance(stage, Sparse):
            row, column = np.divmod(tensors[stage.places].numpy(), stage.width)
            filled = len(np.unique(column if stage.transposed else row))
            total += stage.capacity - filled - stage.additions
        if isinstance(stage, Windowed):
            windows = tensors[stage.windows].numpy()
            sides = [(windows[:, 0], windows[:, 1], stage.height), (windows[:, 2], windows[:, 3], stage.width)]
            (first, width, size), (_, reads, _) = sides[:: -1 if stage.transposed else 1]
            covered = {(f + k) % size for f, w in zip(first, width, strict=True) for k in range(w)}
            inner = reads.sum() - np.count_nonzero(reads)
            total += int(inner + width.sum() - len(covered)) - stage.additions
    return total


@pytest.mark.parametrize(("structure", "shape"), market.cases(), ids=name)
def test_circuits_of_every_family(structure: Structure, shape: Shape) -> None:
    """What the plan counts, the gates count a second time."""
    matrix = sm.StructuredMatrix.random(
        structure, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for member in (matrix, matrix.T):
        circuit = assert_agrees(member.program, member.tensors)
        if has_derived(member.program) or any(isinstance(stage, Cosine) for stage in stages(member.program)):
            continue
        if not any(isinstance(s, Generated) for s in stages(member.program)):
            assert circuit.parameters == matrix.num_parameters
        correction = added_by_empty_rows(member.program, member.tensors)
        assert circuit.counts.operations == member.flops + correction
        assert member.circuit().multiplications == member.macs
        assert (circuit.out_features, circuit.in_features) == member.shape


@pytest.mark.parametrize(("structure", "shape"), market.one_a_family((8, 8), (13, 17)), ids=name)
def test_circuits_of_families_are_differentiable_in_their_parameters(structure: Structure, shape: Shape) -> None:
    matrix = sm.StructuredMatrix.random(
        structure, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    if has_derived(matrix.program):
        pytest.skip("weights that are functions of parameters are constants of the circuit")
    circuit = matrix.circuit()
    doubled = {k: 2 * v.double().numpy() for k, v in matrix.tensors.items() if v.is_floating_point()}
    other = sm.StructuredMatrix(
        structure, shape, {**matrix.tensors, **{k: torch.as_tensor(v) for k, v in doubled.items()}}, dtype=torch.float64
    )
    if any(isinstance(s, Generated) for s in stages(matrix.program)):  # its parameters are entries, not the tensors
        assert {g.name.rpartition(".")[2] for g in circuit.groups} >= {"matrix"}
        return
    np.testing.assert_allclose(circuit.with_values(doubled).to_dense(), other.to_dense().numpy(), atol=1e-10)


@given(programs(), seeds)
def test_random_programs(program: Program, seed: int) -> None:
    tensors = tensors_of(program, torch.float64, seed)
    assert_agrees(program, tensors)
    assert_agrees(transpose(program), tensors)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cumsum(x * weight, -1)[:, :3]


N = 6
EVERY_STAGE: tuple[Program, ...] = (
    Contraction("w", 2, 3, 3, 1, shared_a=True),
    Diagonal("v", N),
    Permute("p", N, inverse=True),
    Shuffle((2, 3), (1, 0)),
    Sparse("s", "places", 4, N, 5),
    Interpolation("f", "p", 2, N),
    Windowed("l", "r", "windows", 5, N, 2, 5, 6),
    Pad(N, 9, 2),
    Crop(N, 3, 1),
    Call(scaled, (("v", N),), 3, N, 6, 5, 4),
    Sum((Diagonal("v", N), Contraction("w", 2, 3, 3, 1, shared_a=True), Shuffle((2, 3), (1, 0)))),
    Chain((Complex(N), Fourier(N), Diagonal("v", N, spectrum=True), Fourier(N, inverse=True), Real(N))),
    Chain((Complex(N), Diagonal("u", N), Fourier(N), Interpolation("f", "p", 2, N), Real(2))),
    Chain((Complex(N), Fourier(N), Interpolation("z", "p", 2, N), Real(2))),
    Chain((Complex(N), Sum((Diagonal("u", N), Diagonal("v", N))), Pad(N, 8), Real(8))),
    Chain((Complex(2), Interpolation("z", "p", 2, N, transposed=True), Fourier(N), Real(N))),
    Chain((Complex(N), Diagonal("u", N), Call(scaled, (("v", N),), 3, N, 6, 5, 4), Real(3))),
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    return {
        "w": normal(1, 3, 3, 1),
        "v": normal(N),
        "u": normal(N, dtype=torch.complex128),
        "z": normal(2, N - 2, dtype=torch.complex128),
        "p": torch.randperm(N, generator=g),
        "s": normal(5),
        "places": torch.tensor([0, 3, 7, 13, 20]),
        "f": normal(2, N - 2),
        "l": normal(5),
        "r": normal(6),
        "windows": torch.tensor([[3, 3, 1, 2], [0, 2, 4, 4]]),
    }


@pytest.mark.parametrize("program", EVERY_STAGE, ids=range(len(EVERY_STAGE)))
def test_every_stage(program: Program, tensors: dict[str, Tensor]) -> None:
    parts = stages(program)
    for own in (program, transpose(program)):
        circuit = to_circuit(own, tensors)
        expected = explicit(own, tensors)
        assert not expected.is_complex()
        np.testing.assert_allclose(circuit.to_dense(), expected.numpy(), atol=1e-12)
        if not any(isinstance(stage, Fourier | Call | Real) for stage in parts):
            assert_agrees(own, tensors)


@pytest.mark.parametrize(
    "program",
    [
        Chain((Complex(N), Fourier(N), Diagonal("u", N), Fourier(N, inverse=True))),
        Chain((Complex(N), Fourier(N), Diagonal("v", N, spectrum=True), Pad(N, 8))),
        Interpolation("z", "p", 2, N),
    ],
)
def test_programs_of_complex_values(program: Program, tensors: dict[str, Tensor]) -> None:
    """Without a real part the gates are complex."""
    circuit = to_circuit(program, tensors)
    np.testing.assert_allclose(circuit.to_dense(), explicit(program, tensors).numpy(), atol=1e-12)
    assert circuit.out_features == program.out_features
    # Over the reals the way into complex values is transposed to the real part.
    expected = circuit.to_dense().T
    expected = expected.real if isinstance(program, Chain) else expected
    np.testing.assert_allclose(to_circuit(transpose(program), tensors).to_dense(), expected, atol=1e-12)


def test_products_of_complex_numbers_count_as_four(tensors: dict[str, Tensor]) -> None:
    """In a program with a real part the gates are real, and so are the counts."""
    program = Chain((Complex(N), Diagonal("u", N), Diagonal("u", N), Real(N)))
    circuit = to_circuit(program, tensors)
    # A real number times a complex one is 2 products; then 4 products and 2 sums.
    assert (circuit.multiplications, circuit.additions) == (6 * N, 2 * N)
    assert {g.name for g in circuit.groups} == {"u.real", "u.imag"}


@pytest.mark.parametrize("structure", [sm.Butterfly(), sm.Monarch(blocks=2), sm.LowRank(2), sm.BLAST(blocks=2, rank=2)])
def test_complex_members(structure: Structure) -> None:
    matrix = sm.StructuredMatrix.random(
        structure, (8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.complex128
    )
    circuit = matrix.circuit()
    np.testing.assert_allclose(circuit.to_dense(), matrix.to_dense().numpy(), atol=1e-12)
    in_complex = cost(matrix.program)
    assert (circuit.multiplications, circuit.additions) == (in_complex.multiplications, in_complex.additions)
    assert matrix.flops == 6 * circuit.multiplications + 2 * circuit.additions


def test_bad_tensors_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeError, match="missing"):
        to_circuit(Diagonal("none", N), tensors)
    with pytest.raises(ShapeError, match="numbers"):
        to_circuit(Diagonal("v", 5), tensors)
    with pytest.raises(CircuitError, match="linear"):
        to_circuit(Call(squared, (), 2, 2, 1, 1, 1), {})


def squared(x: Tensor) -> Tensor:
    return x * x


# ------------------------------------------------------------------------------------------------- and back again


def run(circuit: Circuit, **options: bool) -> Any:
    compiled = from_circuit(circuit, **options)
    given = compiled.tensors(dtype=torch.float64)
    eye = torch.eye(circuit.in_features, dtype=next((t.dtype for t in given.values() if t.is_complex()), torch.float64))
    return compiled, reference.apply(compiled.program, given, eye).T.numpy()


CATALOGUE = {
    "hadamard": hadamard(16),
    "prefix": prefix_sums(13),
    "fourier": fourier(16),
    "fourier_odd": fourier(15),
    "cosine": cosine(16),
    "haar": haar(16),
    "toeplitz": toeplitz(np.arange(1, 8), np.arange(1, 8)),
}


@pytest.mark.parametrize("recognize", [True, False])
@pytest.mark.parametrize("circuit", CATALOGUE.values(), ids=CATALOGUE)
def test_catalogue_as_programs(circuit: Circuit, recognize: bool) -> None:
    _, dense = run(circuit, recognize=recognize)
    np.testing.assert_allclose(dense, circuit.to_dense(), atol=1e-11 * max(1, float(np.abs(circuit.to_dense()).max())))


@given(seed=seeds, recognize=st.booleans())
def test_random_circuits_as_programs(seed: int, recognize: bool) -> None:
    circuit = random_linear(seed, parameters=seed % 3)
    compiled, dense = run(circuit, recognize=recognize)
    np.testing.assert_array_equal(dense, circuit.to_dense())
    assert (compiled.program.in_features, compiled.program.out_features) == (circuit.in_features, circuit.out_features)


def patterns(program: Program) -> list[tuple[int, int, int, int]]:
    return [stage.pattern for stage in stages(program) if isinstance(stage, Contraction)]


def test_a_hadamard_circuit_is_a_butterfly() -> None:
    compiled, _ = run(hadamard(16))
    assert all(isinstance(stage, Contraction) for stage in stages(compiled.program))
    assert patterns(compiled.program) == [(8, 2, 2, 1), (4, 2, 2, 2), (2, 2, 2, 4), (1, 2, 2, 8)]


def test_a_fourier_circuit_is_a_permutation_and_a_chain() -> None:
    compiled, _ = run(fourier(12, radices=(2, 3, 2)))
    # The inputs are read in the order of reversed digits; each contraction finds its blocks where the last left them.
    assert sorted(b for _, b, _, _ in patterns(compiled.program)) == [2, 2, 3]
    assert sum(isinstance(stage, Permute) for stage in stages(compiled.program)) <= 1
    assert not any(isinstance(stage, Sparse) for stage in stages(compiled.program))


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (sm.Dense(), (5, 7)),
        (sm.LowRank(3), (9, 8)),
        (sm.BlockDiagonal(4), (8, 12)),
        (sm.Monarch(blocks=4), (16, 16)),
        (sm.Butterfly(), (16, 16)),
        (sm.Kronecker(terms=1), (12, 12)),
        (sm.Diagonal(), (7, 7)),
    ],
    ids=name,
)
def test_families_are_recognized_in_their_circuits(structure: Structure, shape: Shape) -> None:
    """The stages of the program come back, with as many multiplications, whatever the order of the gates."""
    matrix = sm.StructuredMatrix.random(
        structure, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    compiled = from_circuit(matrix.circuit())
    assert cost(compiled.program).multiplications == matrix.macs
    assert cost(compiled.program).additions == cost(matrix.program).additions
    assert not any(isinstance(stage, Sparse) for stage in stages(compiled.program))
    given = compiled.tensors(dtype=torch.float64)
    eye = torch.eye(shape[1], dtype=torch.float64)
    np.testing.assert_allclose(reference.apply(compiled.program, given, eye).T, matrix.to_dense(), atol=1e-12)


@pytest.mark.parametrize("make", [kaleidoscope, monarch], ids=["kaleidoscope", "monarch"])
@pytest.mark.parametrize("circuit", [hadamard(8), prefix_sums(5), cosine(8), random_linear(3)])
def test_products_become_programs(circuit: Circuit, make: Any) -> None:
    """Every factor is a contraction, all of whose entries are learned: a trainable matrix that starts as known."""
    product = make(circuit)
    compiled = from_product(product)
    given = {name: t.requires_grad_() for name, t in compiled.tensors(dtype=torch.float64).items()}
    assert sum(t.numel() for t in given.values()) == product.parameters
    eye = torch.eye(circuit.in_features, dtype=torch.float64)
    rows = reference.apply(compiled.program, given, eye)
    np.testing.assert_allclose(rows.T.detach(), circuit.to_dense(), atol=1e-12)
    rows.square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in given.values())
    with torch.no_grad():
        np.testing.assert_allclose(apply(compiled.program, given, eye).T, circuit.to_dense(), atol=1e-12)


def test_moves_cost_nothing() -> None:
    builder = Builder(6)
    program = from_circuit(builder.build([4, 1, 0, 2])).program
    assert [type(stage) for stage in stages(program)] == [Permute, Crop]
    assert from_circuit(Builder(3).build([0, 1, 2])).program == Crop(3, 3)
    scaled_only = Builder(3)
    diagonal = scaled_only.sums(np.array([[2], [0], [1]]), np.array([[2], [3], [5]]))
    assert cost(from_circuit(scaled_only.build(diagonal)).program).multiplications == 3
    zero = Builder(2)
    _, dense = run(zero.build([zero.sum([]), 1]))
    assert dense.tolist() == [[0, 0], [0, 1]]


def test_shared_parameters_are_differentiable() -> None:
    """The gradients of a shared parameter are those of the circuit's own module."""
    circuit = random_linear(11, parameters=3)
    compiled = from_circuit(circuit)
    x = torch.randn(4, circuit.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.tensor(circuit.values.astype(float), requires_grad=True)
    out = reference.apply(compiled.program, compiled.tensors(values), x)
    module = circuit.module(torch.float64)
    expected = module(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    (theta,) = module.parameters()
    assert values.grad is not None
    assert theta.grad is not None
    torch.testing.assert_close(values.grad, theta.grad.ravel())
    assert torch.autograd.gradcheck(lambda v: reference.apply(compiled.program, compiled.tensors(v), x), values)


def test_constants_are_differentiable() -> None:
    compiled = from_circuit(cosine(8))
    given = compiled.tensors(dtype=torch.float64)
    learned = {k: t.requires_grad_() for k, t in given.items() if t.is_floating_point()}
    assert set(learned) == set(compiled.sources)
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference.apply(compiled.program, given, x).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in learned.values())


@pytest.mark.skipif(not native().available, reason="the native library is not built: pip install -e .")
@pytest.mark.parametrize("recognize", [True, False])
@pytest.mark.parametrize("key", ["hadamard", "prefix", "cosine", "haar"])
def test_compiled_circuits_run_on_every_backend(key: str, recognize: bool) -> None:
    circuit = CATALOGUE[key]
    compiled = from_circuit(circuit, recognize=recognize)
    given = compiled.tensors(dtype=torch.float64)
    x = torch.randn(20, circuit.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = circuit.evaluate(x.numpy())
    scale = np.abs(expected).max()
    for backend in ("native", "reference", "auto"):
        with sm.backend(backend), torch.no_grad():
            np.testing.assert_allclose(apply(compiled.program, given, x).numpy(), expected, atol=1e-11 * scale)


def test_a_traced_function_becomes_a_program() -> None:
    circuit = trace_torch(lambda x: torch.cumsum(2 * x, -1) + torch.roll(x, 1, -1), 6, linear=True)
    compiled = from_circuit(circuit)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cumsum(2 * x, -1) + torch.roll(x, 1, -1)
    torch.testing.assert_close(reference.apply(compiled.program, compiled.tensors(dtype=torch.float64), x), expected)


@given(seed=seeds)
def test_a_program_of_a_circuit_has_its_circuit(seed: int) -> None:
    circuit = random_linear(seed)
    compiled = from_circuit(circuit)
    again = to_circuit(compiled.program, compiled.tensors(dtype=torch.float64))
    field = PrimeField()
    assert np.array_equal(again.to_dense(field), circuit.to_dense(field))


def test_circuits_that_are_no_programs_are_refused() -> None:
    general = next(c for c in map(random_polynomial, itertools.count()) if not c.is_linear)
    with pytest.raises(CircuitError, match="linear"):
        from_circuit(general)
    with pytest.raises(CircuitError, match="inputs and outputs"):
        from_circuit(Builder(2).build([]))
    with pytest.raises(ShapeError, match="parameters"):
        from_circuit(random_linear(11, parameters=3)).tensors(torch.ones(2))

"""Stages without tensors, on pairs of reals and with derived weights: definitions, transposes, counts, circuits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from structmat.program import (
    Chain,
    Contraction,
    Cosine,
    Crop,
    Derived,
    Diagonal,
    Fourier,
    Hadamard,
    Pad,
    Pairs,
    Permute,
    Program,
    Reorder,
    apply,
    cost,
    derive,
    on_pairs,
    simplify,
    transpose,
)
from structmat.program.circuit import to_circuit
from structmat.program.derived import Mixing, Phases, Rotations, Sinkhorn, Switches
from structmat.program.fixed import EvensFirst, Exchanged, HalfReversed
from structmat.testing.oracle import count_operations, explicit

F64 = torch.float64


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=F64)

    return {
        "w": normal(2, 3, 2, 2, 2),
        "v": normal(8, 2),
        "p": torch.randperm(8, generator=generator),
        "r": normal(2, 2, 2),
        "l": normal(2, 2),
        "u": normal(8),
        "s": normal(8, 8),
        "q": normal(1),
    }


PROGRAMS: list[Program] = [
    Hadamard(8),
    Hadamard(1),
    Cosine(8),
    Cosine(7, inverse=True),
    Cosine(1),
    Reorder(EvensFirst(12, 6)),
    Reorder(HalfReversed(12, 6), inverse=True),
    Reorder(HalfReversed(10, 5, second=True)),
    Reorder(Exchanged(12, 3, 1)),
    Pairs(Contraction("w", 2, 3, 2, 2)),
    Pairs(Contraction("w", 2, 3, 2, 2), conjugate=True),
    Pairs(Diagonal("v", 8)),
    Pairs(Permute("p", 8, inverse=True)),
    Pairs(Fourier(8)),
    Pairs(Fourier(6, inverse=True), conjugate=True),
    Chain((Pad(8, 16), Pairs(Contraction("w", 2, 3, 2, 2)), Crop(24, 12))),
    Derived(Contraction("r", 2, 2, 2, 2), Rotations()),
    Derived(Contraction("l", 2, 2, 2, 2), Switches()),
    Derived(Diagonal("u", 8), Phases()),
    Derived(Contraction("s", 1, 8, 8, 1), Sinkhorn(20)),
    Derived(Contraction("q", 6, 1, 1, 1, shared_a=True), Mixing(other=True)),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_stage_is_its_matrix(program: Program) -> None:
    held, generator = tensors(), torch.Generator().manual_seed(1)
    matrix = explicit(program, held)
    x = torch.randn(5, program.in_features, generator=generator, dtype=F64)
    y = torch.randn(5, program.out_features, generator=generator, dtype=F64)
    torch.testing.assert_close(apply(program, held, x), x @ matrix.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apply(transpose(program), held, y), y @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(explicit(transpose(program), held), matrix.T, rtol=1e-12, atol=1e-12)
    assert transpose(transpose(program)) == program
    assert cost(transpose(program)).multiplications == cost(program).multiplications
    plain, made = derive(program, held)
    torch.testing.assert_close(apply(plain, made, x), x @ matrix.T, rtol=1e-12, atol=1e-12)
    for direction in (program, transpose(program)):
        counted = count_operations(direction, held)
        if counted is not None:
            amount = cost(direction)
            assert (amount.multiplications, amount.additions) == counted[:2]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_stage_is_its_circuit(program: Program) -> None:
    held = tensors()
    circuit = to_circuit(program, held)
    np.testing.assert_allclose(circuit.to_dense(), explicit(program, held).numpy(), rtol=1e-10, atol=1e-12)
    assert circuit.parameters == cost(program).parameters
    counted = count_operations(program, held)
    if counted is not None:
        assert (circuit.multiplications, circuit.additions) == counted[:2]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15])
def test_fixed_transforms_are_those_of_scipy(size: int) -> None:
    eye = torch.eye(size, dtype=F64)
    wanted = scipy.fft.dct(np.eye(size), norm="ortho", axis=0)
    np.testing.assert_allclose(apply(Cosine(size), {}, eye).T, wanted, atol=1e-14)
    np.testing.assert_allclose(apply(Cosine(size, inverse=True), {}, eye).T, wanted.T, atol=1e-14)
    power = 1 << (size - 1).bit_length()
    wanted = scipy.linalg.hadamard(power).astype(float)
    np.testing.assert_array_equal(apply(Hadamard(power), {}, torch.eye(power, dtype=F64)), wanted)


def test_neighbours_cancel() -> None:
    order = EvensFirst(8, 4)
    held = tensors()
    for first in (Cosine(8), Reorder(order)):
        assert simplify(Chain((first, transpose(first), Diagonal("u", 8)))) == Diagonal("u", 8)
    assert explicit(simplify(Chain((Hadamard(1), Diagonal("q", 1)))), held).shape == (1, 1)


def test_pairs_are_complex_numbers() -> None:
    held, x = tensors(), torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    values = torch.view_as_complex(x)
    stage = Contraction("w", 2, 3, 2, 2)
    inner = torch.view_as_complex(held["w"])
    wanted = apply(stage, {"w": inner}, values)
    got = apply(on_pairs(stage), held, torch.cat([values.real, values.imag], 1))
    torch.testing.assert_close(got, torch.cat([wanted.real, wanted.imag], 1))


def test_complex_rotations_are_special_unitary() -> None:
    generator = torch.Generator().manual_seed(3)
    pair = torch.randn(3, 2, 5, generator=generator, dtype=torch.complex128)
    blocks = Rotations()(pair).permute(0, 3, 1, 2)
    eye = torch.eye(2, dtype=torch.complex128).expand(3, 5, 2, 2)
    torch.testing.assert_close(blocks @ blocks.mH, eye)
    torch.testing.assert_close(torch.linalg.det(blocks), torch.ones(3, 5, dtype=torch.complex128))


@pytest.mark.parametrize("shape", [(4, 8), (0, 8)])
def test_transforms_in_compiled_graphs(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=F64)
    for program in (Chain((Pad(8, 16), Pairs(Fourier(8)), Crop(16, 8))), Cosine(8), Hadamard(8)):
        compiled = torch.compile(lambda v, p=program: apply(p, {}, v), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), apply(program, {}, x))
    torch._dynamo.reset()

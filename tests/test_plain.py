"""Stages that follow from others, in plain ones: the same matrices, natively, frozen or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.kernels import native, runs_native, tuning
from structmat.kernels.operator import FEW_ROWS
from structmat.matrix import draw
from structmat.program import (
    FOR_NATIVE,
    FOR_REFERENCE,
    Chain,
    Contraction,
    Diagonal,
    Fourier,
    Hadamard,
    Pairs,
    Program,
    build,
    fuse,
    reference,
    stages,
    transpose,
)
from structmat.program.plain import plain, plain_form
from structmat.structure import resolve

FAMILIES = [
    sm.OrthogonalButterfly(),
    sm.RealPart(sm.PermutedButterfly()),
    sm.RealPart(sm.RelaxedButterfly()),
    sm.Fastfood(),
    sm.RelaxedButterfly(),
    sm.Pixelfly(),
    sm.SoftPermutation(),
]

needs_native = pytest.mark.skipif(not native().available, reason="no native library")


def drawn(structure: sm.Structure, size: int, dtype: torch.dtype) -> tuple[Program, dict[str, Tensor]]:
    resolved, shape = resolve(structure, (size, size)), (size, size)
    return build(resolved, shape), draw(resolved, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("structure", FAMILIES, ids=str)
def test_the_plain_form_is_the_same_matrix(structure: sm.Structure, dtype: torch.dtype) -> None:
    if dtype.is_complex and isinstance(structure, sm.RealPart | sm.SoftPermutation):
        pytest.skip("its tensors are real")
    program, tensors = drawn(structure, 32, dtype)
    for own in (program, transpose(program)):
        plain_program, made = plain(own, tensors)
        assert plain_form(plain_program) is None
        x = torch.eye(32, dtype=dtype)
        torch.testing.assert_close(reference.apply(plain_program, made, x), reference.apply(own, tensors, x))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32, 64])
def test_a_hadamard_transform_is_one_of_contractions(size: int) -> None:
    for program in (Hadamard(size), Pairs(Hadamard(size))):
        form = plain_form(program)
        assert form is not None
        made = form.tensors({}, torch.float64, torch.device("cpu"))
        x = torch.eye(program.in_features, dtype=torch.float64)
        assert torch.equal(reference.apply(form.program, made, x), reference.apply(program, {}, x))


def test_fourier_transforms_on_pairs_stay() -> None:
    program = Chain((Pairs(Diagonal("w", 8)), Pairs(Fourier(8))))
    tensors = {"w": torch.randn(8, 2, dtype=torch.float64)}
    found, made = plain(program, tensors)
    assert any(isinstance(stage, Pairs) for stage in stages(found))
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(reference.apply(found, made, x), reference.apply(program, tensors, x))


@needs_native
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("structure", FAMILIES, ids=str)
def test_layers_run_it_natively_frozen_or_not(structure: sm.Structure, rows: int) -> None:
    torch.manual_seed(0)
    net = sm.nn.StructuredLinear(32, 32, structure=structure)
    x, program = torch.randn(rows, 32), net.program
    assert runs_native(program, net.tensors(), rows)
    frozen = net.freeze(rows)
    assert plain_form(frozen.program) is None
    with sm.backend("reference"):
        wanted = net(x)
        torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), sm.backend("native"):
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.matrix @ x.T, wanted.T - net.bias[:, None], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert calls(net, x) == {"structmat::multiply"}
        frozen(x)
        assert calls(frozen, x) == {"structmat::multiply" if rows >= FEW_ROWS else "structmat::multiply_standing"}
        with sm.backend("reference"):
            assert not calls(net, x)


def calls(net: torch.nn.Module, x: Tensor) -> set[str]:
    """The native operators that a call of it reaches."""
    with torch.profiler.profile() as seen:
        net(x)
    return {event.key for event in seen.key_averages() if event.key.startswith("structmat::")}


@needs_native
@pytest.mark.parametrize("structure", FAMILIES, ids=str)
def test_their_gradients_are_native_too(structure: sm.Structure) -> None:
    torch.manual_seed(0)
    net = sm.nn.StructuredLinear(32, 32, structure=structure).double()
    x = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    found = {}
    for name in ("native", "reference"):
        with sm.backend(name):
            found[name] = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    for one, two in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(one, two)


@needs_native
def test_they_are_differentiable_twice() -> None:
    net = sm.nn.StructuredLinear(8, 8, structure=sm.OrthogonalButterfly()).double()
    x = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    with sm.backend("native"):
        assert torch.autograd.gradgradcheck(net, (x,))


def test_what_is_frozen_reads_constants() -> None:
    """Of functions of tensors nothing is left to compute, and what can be merged is."""
    program, tensors = drawn(sm.OrthogonalButterfly(), 32, torch.float64)
    x = torch.eye(32, dtype=torch.float64)
    wanted = reference.apply(program, tensors, x)
    for writing in (FOR_NATIVE, FOR_REFERENCE):
        frozen, made = fuse(program, tensors, writing)
        assert all(isinstance(stage, Contraction) for stage in stages(frozen))
        assert len(stages(frozen)) < len(stages(program))
        torch.testing.assert_close(reference.apply(frozen, made, x), wanted)


def test_nothing_is_frozen_of_a_program_without_tensors() -> None:
    """It runs in any precision."""
    program, made = fuse(Hadamard(8), {})
    for dtype in (torch.float32, torch.float64):
        assert reference.apply(program, made, torch.eye(8, dtype=dtype)).dtype == dtype


def test_a_program_is_tuned_by_its_plain_form() -> None:
    program, _ = drawn(sm.Fastfood(), 32, torch.float32)
    form = plain_form(program)
    assert form is not None
    assert tuning.name_of(program, torch.float32) == tuning.name_of(form.program, torch.float32)


@pytest.mark.parametrize("structure", [sm.Fastfood(), sm.OrthogonalButterfly(), sm.RelaxedButterfly()], ids=str)
def test_complex_layers_are_equal_in_every_form(structure: sm.Structure) -> None:
    """Constants are real beside complex weights."""
    torch.manual_seed(0)
    net = sm.nn.StructuredLinear(32, 32, structure=structure, dtype=torch.complex128)
    x = torch.randn(20, 32, dtype=torch.complex128)
    with torch.no_grad():
        with sm.backend("reference"):
            wanted, frozen = net(x), net.freeze()
            torch.testing.assert_close(frozen(x), wanted)
        for layer in (net, frozen, net.freeze()):
            torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("structure", [sm.RealPart(sm.PermutedButterfly()), sm.Pixelfly(), sm.Fastfood()], ids=str)
def test_frozen_layers_are_exported_and_compiled(structure: sm.Structure) -> None:
    frozen = sm.nn.StructuredLinear(32, 32, structure=structure).freeze()
    x = torch.randn(20, 32)
    exported = torch.export.export(frozen, (x,)).module()
    torch.testing.assert_close(exported(x), frozen(x), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-4, atol=1e-5)

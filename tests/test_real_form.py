"""Complex programs as real ones: equal products and gradients, on the reference and on the native backend."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from native_programs import programs, tensors_of
from torch import Tensor

import structmat as sm
from structmat.errors import StructureError
from structmat.kernels import affine, apply, native
from structmat.program import (
    Chain,
    Complex,
    Contraction,
    Crop,
    Diagonal,
    Fourier,
    Interpolation,
    Pad,
    Program,
    Real,
    Shuffle,
    Sparse,
    Sum,
    Windowed,
    reference,
    simplify,
    stages,
    transpose,
)
from structmat.program.real_form import RealForm, real_form

needs_native = pytest.mark.skipif(not native().available, reason="no native library")

STRUCTURES = [sm.Monarch(4), sm.Butterfly(), sm.Monarch(3, rank=2), sm.BLAST(4, rank=3), sm.Sparse(density=.2),
              sm.Kronecker(terms=2), sm.LowRank(3), sm.Diagonal(), sm.SparsePlusLowRank(rank=2,
              density=.1)]  # fmt: skip


def run(form: RealForm, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The reference on parts, which is exact to rounding."""
    parts = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
    found = reference.apply(form.program, form.tensors(tensors), parts).contiguous()
    return torch.view_as_complex(found.unflatten(-1, (-1, 2))) if form.complex_out else found


@settings(deadline=None, max_examples=150)
@given(programs(depth=2), st.integers(0, 3), st.integers(0, 10**6), st.booleans())
def test_the_real_form_is_the_same_map(program: Program, share: int, seed: int, complex_in: bool) -> None:
    """Whichever tensors are complex, in rows that are and rows that are not, and transposed."""
    tensors = dict(tensors_of(program, torch.float64, seed))
    generator = torch.Generator().manual_seed(seed)
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.is_floating_point() and (number + share) % 3 == 0:
            tensors[name] = torch.complex(tensor, torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    chosen = frozenset(name for name, tensor in tensors.items() if tensor.is_complex())
    for own in (program, transpose(program)):
        dtype = torch.complex128 if complex_in else torch.float64
        x = torch.randn(4, own.in_features, generator=generator, dtype=dtype)
        form = real_form(own, chosen, complex_in)
        mixed = any(isinstance(s, Windowed | Interpolation) or (isinstance(s, Sparse) and not complex_in)
                    for s in stages(own))  # fmt: skip
        if form is None:
            assert mixed
            continue
        if not complex_in and chosen:  # the reference multiplies real rows by complex weights where PyTorch does
            x = x.to(torch.complex128)
            wanted = reference.apply(own, {n: t.to(torch.complex128) if t.is_floating_point() else t
                                           for n, t in tensors.items()}, x)  # fmt: skip
            found = run(form, tensors, x.real)
        else:
            wanted, found = reference.apply(own, _alike(tensors, complex_in), x), run(form, tensors, x)
        assert found.is_complex() is (complex_in or bool(chosen))
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-10, atol=1e-10)


def _alike(tensors: dict[str, Tensor], complex_in: bool) -> dict[str, Tensor]:
    return {n: t.to(torch.complex128) if complex_in and t.is_floating_point() else t for n, t in tensors.items()}


def test_complex_sections_of_real_programs() -> None:
    inside = Chain((Pad(6, 8, 1), Complex(8), Diagonal("g", 8), Contraction("w", 2, 3, 4, 1), Real(6), Crop(6, 4, 1)))
    tensors = {"g": torch.randn(8, dtype=torch.complex128), "w": torch.randn(2, 3, 4, 1, dtype=torch.complex128)}
    for program in (inside, transpose(inside), Sum((inside, Contraction("r", 1, 4, 6, 1)))):
        own = {**tensors, "r": torch.randn(1, 4, 6, 1, dtype=torch.float64)}
        form = real_form(program, frozenset(tensors), False)
        assert form is not None
        assert not form.complex_out
        x = torch.randn(5, program.in_features, dtype=torch.float64)
        torch.testing.assert_close(run(form, own, x), reference.apply(program, own, x))


def test_transforms_have_no_real_form() -> None:
    assert real_form(Chain((Complex(8), Fourier(8), Real(8))), frozenset(), False) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Shuffle((3, 4, 2), (0, 2, 1)), Shuffle((6, 2, 2), (0, 2, 1))),
        (Shuffle((2, 12), (1, 0)), Shuffle((4, 3, 2), (2, 0, 1))),
        (Shuffle((2, 3, 4), (2, 0, 1)), Shuffle((8, 3), (1, 0))),
        (Shuffle((5, 7), (1, 0)), Shuffle((7, 5), (1, 0))),
        (Shuffle((2, 3), (1, 0)), Shuffle((2, 3), (1, 0))),
        (Shuffle((1, 6, 4), (2, 0, 1)), Shuffle((2, 2, 6), (2, 1, 0))),
    ],
)
def test_shuffles_are_merged_exactly(first: Shuffle, second: Shuffle) -> None:
    x = torch.arange(first.in_features, dtype=torch.float64)[None]
    merged = simplify(Chain((first, second)))
    assert torch.equal(reference.apply(merged, {}, x), reference.apply(Chain((first, second)), {}, x))


@given(st.permutations(range(4)), st.permutations(range(4)), st.integers(0, 2))
def test_shuffles_with_common_pieces_become_one(one: list[int], two: list[int], joined: int) -> None:
    sizes = (2, 3, 2, 5)
    first = Shuffle(sizes, tuple(one))
    between = [sizes[axis] for axis in one]
    cut = [*between[:joined], between[joined] * between[joined + 1], *between[joined + 2 :]]
    second = Shuffle(tuple(cut), tuple(sorted(range(3), key=lambda axis: two[axis])))
    x = torch.arange(60, dtype=torch.float64)[None]
    merged = simplify(Chain((first, second)))
    assert len(stages(merged)) == 1
    assert torch.equal(reference.apply(merged, {}, x), reference.apply(Chain((first, second)), {}, x))


# ------------------------------------------------------------------------------------------------- the native backend


@needs_native
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_complex_products_and_gradients(structure: sm.Structure, dtype: torch.dtype, rows: int) -> None:
    layer = sm.nn.StructuredLinear(36, 48, structure=structure, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, rows, 36, dtype=dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    found: dict[str, list[Tensor]] = {}
    for name in ("native", "reference"):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        with sm.backend(name):
            y = layer(own)
            (y * y.conj()).real.sum().backward()
            with torch.no_grad():
                columns = layer.matrix @ x[0].T
        found[name] = [y.detach(), columns, own.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]
    for one, other in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@needs_native
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("rows", [1, 64])
def test_frozen_complex_layers(structure: sm.Structure, rows: int) -> None:
    layer = sm.nn.StructuredLinear(36, 48, structure=structure, dtype=torch.complex64)
    x = torch.randn(rows, 36, dtype=torch.complex64)
    with torch.no_grad():
        wanted = layer(x)
    frozen = layer.freeze(rows)
    assert (frozen.in_features, frozen.out_features) == (36, 48)
    for name in ("auto", "reference"):
        with sm.backend(name), torch.no_grad():
            torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(frozen(x.real), layer(x.real + 0j), rtol=1e-4, atol=1e-4)
    frozen.hold_dense()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-4)


@needs_native
def test_large_complex_layers_are_native_and_say_so() -> None:
    layer = sm.nn.StructuredLinear(256, 256, structure=sm.Monarch(16), dtype=torch.complex64)
    assert "Without gradients: native backend" in layer.explain(64)
    assert "on_parts" not in layer.freeze().extra_repr()
    x = torch.randn(4, 256, dtype=torch.complex64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@needs_native
def test_a_bias_of_either_kind_and_conjugated_rows() -> None:
    program = Contraction("w", 4, 3, 2, 5)
    tensors = {"w": torch.randn(4, 3, 2, 5, dtype=torch.complex128)}
    x = torch.randn(9, 40, dtype=torch.complex128).conj()
    for bias in (torch.randn(60, dtype=torch.float64), torch.randn(60, dtype=torch.complex128)):
        with sm.backend("native"):
            found = affine(program, tensors, x, bias)
        torch.testing.assert_close(found, reference.affine(program, tensors, x, bias))


@needs_native
def test_forcing_the_native_backend_on_transforms_is_refused() -> None:
    program = Chain((Complex(8), Fourier(8), Real(8)))
    with sm.backend("native"), pytest.raises(StructureError, match="As complex has no native kernel"):
        apply(program, {}, torch.randn(4, 8))
    with sm.backend("native"), pytest.raises(StructureError, match="has no native kernel"):
        apply(Fourier(8), {}, torch.randn(4, 8, dtype=torch.complex64))

"""Which backend runs a layer, and the short and the frozen ways to it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.utils.parametrize
from native_outcomes import here, needs_native
from torch import Tensor
from torch.autograd import forward_ad

import structmat as sm
from structmat.errors import StructureError
from structmat.kernels import apply, choice
from structmat.kernels.choice import native_text, prefers_native
from structmat.program import Chain, Complex, Contraction, Fourier, Real, Sparse, build, rename, stages
from structmat.structure import resolve

pytestmark = pytest.mark.filterwarnings("error")


def layer(**options: object) -> sm.nn.StructuredLinear:
    return sm.nn.StructuredLinear(
        64, 96, structure=sm.Monarch(4, rank=2), generator=torch.Generator().manual_seed(0), **options
    )


@needs_native
def test_a_layer_runs_native_with_gradients_and_without() -> None:
    net, x = layer(), torch.randn(2, 33, 64)
    program, tensors = net._program, net.tensors()
    assert native_text(program, tensors, x, net.bias) is not None  # its parameters want gradients
    with torch.no_grad():
        assert native_text(program, tensors, x, net.bias) is not None
        found = net(x)
        with sm.backend("reference"):
            assert native_text(program, tensors, x, net.bias) is None
            wanted = net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert net(x).requires_grad
    net.requires_grad_(False)
    assert not net(x).requires_grad
    assert net(x.requires_grad_()).requires_grad
    assert "native backend" in net.explain(batch=64)
    with sm.backend("reference"):
        assert "native backend" not in net.explain(batch=64)


@needs_native
def test_inputs_of_any_strides_and_shape() -> None:
    net = layer().requires_grad_(False)
    wide = torch.randn(40, 128)
    for x in (wide[:, :64], wide[:, ::2], wide[::3, 64:], torch.randn(64, 40).T, torch.randn(64), torch.randn(0, 64),
              torch.randn(3, 1, 64).expand(3, 5, 64), torch.randn(2, 0, 64)):  # fmt: skip
        with sm.backend("native"):
            found = net(x)
        with sm.backend("reference"):
            wanted = net(x)
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@needs_native
def test_forcing_the_native_backend_says_why_it_can_not() -> None:
    net = layer()
    with sm.backend("native"), pytest.raises(StructureError, match="differentiated forwards"), forward_ad.dual_level():
        net(torch.randn(3, 64))
    transforms = Chain((Complex(8), Fourier(8), Real(8)))
    with sm.backend("native"), pytest.raises(StructureError, match="no native kernel"):
        apply(transforms, {}, torch.randn(3, 8))
    with sm.backend("native"), torch.no_grad(), pytest.raises(StructureError, match="other dtypes"):
        net(torch.randn(3, 64, dtype=torch.float64))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(StructureError, match="cuda"), sm.backend("cuda"):
        pass


@needs_native
def test_transforms_and_compiled_graphs_run_on_the_reference() -> None:
    net = layer().requires_grad_(False)
    x = torch.randn(5, 64)
    jacobian = torch.func.jacrev(lambda v: net(v))(x[0])
    torch.testing.assert_close(jacobian, net.matrix.to_dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@needs_native
def test_what_pytorch_does_as_well_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Decided as on a processor with AVX2.
    monkeypatch.setattr(choice, "native", lambda: replace(here, instruction_set="avx2"))
    monkeypatch.setattr(choice, "has_bfloat16", lambda: False)

    def chosen(structure: sm.Structure, rows: int, dtype: torch.dtype = torch.float32) -> bool:
        program = rename(build(resolve(structure, (256, 256)), (256, 256)), lambda name: name)  # not decided yet
        return prefers_native(program, rows, dtype)

    assert chosen(sm.LowRank(8), 1)
    assert chosen(sm.LowRank(8), 1000)
    assert not chosen(sm.LowRank(8), 10000)
    assert not chosen(sm.LowRank(8), 1, torch.bfloat16)
    assert chosen(sm.Dense(), 7)
    assert not chosen(sm.Dense(), 1000)
    assert not chosen(sm.Dense(), 7, torch.bfloat16)
    assert chosen(sm.Butterfly(), 1)
    assert chosen(sm.Sparse(density=0.2), 64)
    assert chosen(sm.Sparse(density=0.2), 1)
    assert not chosen(sm.Sparse(density=0.7), 1000)
    assert chosen(sm.BlockDiagonal(2), 1)
    assert not chosen(sm.BlockDiagonal(2), 1, torch.bfloat16)
    assert chosen(sm.BlockDiagonal(2), 8, torch.float16)
    assert chosen(sm.BlockDiagonal(2), 8, torch.bfloat16)


@needs_native
def test_what_runs_natively_depends_on_the_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(structure: sm.Structure, rows: int) -> bool:
        program = rename(build(resolve(structure, (2048, 2048)), (2048, 2048)), lambda name: name)  # not decided yet
        return prefers_native(program, rows, torch.bfloat16)

    large, small, mixed = sm.BlockDiagonal(2), sm.Monarch(32), sm.Sum(sm.BlockDiagonal(2), sm.Diagonal())
    for name, has_instructions, has_tiles, wanted in (
        ("avx2", False, False, (True, True, True)),  # PyTorch has nothing better
        ("avx512", True, False, (False, False, False)),
        ("avx512_bf16", True, False, (False, True, False)),  # tiles of bfloat16 know no diagonal
        ("avx512_bf16", True, True, (False, False, False)),  # where PyTorch has AMX
        ("amx", True, True, (False, True, False)),
    ):
        monkeypatch.setattr(choice, "native", lambda name=name: replace(here, instruction_set=name))
        monkeypatch.setattr(choice, "has_bfloat16", lambda has=has_instructions: has)
        monkeypatch.setattr(choice, "_has_tiles", lambda has=has_tiles: has)
        assert (chosen(large, 16), chosen(large, 256), chosen(mixed, 256)) == wanted
        assert chosen(small, 16)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("structure", [sm.Dense(), sm.LowRank(3), sm.LowRank(40), sm.Sparse(density=0.2),
                                       sm.Butterfly(), sm.PivotedLowRank(5), sm.Monarch(blocks=4),
                                       sm.Kronecker(terms=2)])  # fmt: skip
def test_the_short_way_is_the_long_way(structure: sm.Structure, bias: bool, frozen: bool) -> None:
    trained = sm.nn.StructuredLinear(64, 64, bias, structure=structure).requires_grad_(False)
    net = trained.freeze() if frozen else trained
    matrix = trained.matrix.to_dense()
    generator = torch.Generator().manual_seed(0)
    for size in ((64,), (0, 64), (1, 64), (3, 2, 64), (20, 64), (2, 0, 64), (5, 13, 64)):
        x = torch.randn(size, generator=generator)
        wanted = torch.nn.functional.linear(x, matrix, trained.bias)
        with sm.backend("reference"):
            torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)
        assert net(x).shape == wanted.shape
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)
        strided = torch.randn(*size[:-1], 128, generator=generator)[..., ::2]
        wanted = torch.nn.functional.linear(strided, matrix, trained.bias)
        torch.testing.assert_close(net(strided), wanted, rtol=1e-4, atol=1e-5)
    swapped = torch.randn(7, 5, 64, generator=generator).transpose(0, 1)
    torch.testing.assert_close(net(swapped), net(swapped.contiguous()))
    with pytest.raises(sm.errors.ShapeError, match="in_features=64"):
        net(torch.randn(3, 63))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        assert net(x.bfloat16()).dtype == torch.bfloat16
    pickled = copy.deepcopy(net)
    torch.testing.assert_close(pickled(x), net(x))
    wanted = net(x).double()
    torch.testing.assert_close(net.double()(x.double()), wanted, rtol=1e-4, atol=1e-5)


def test_the_short_way_follows_gradients_and_parametrizations() -> None:
    net = sm.nn.StructuredLinear(64, 64, structure=sm.LowRank(8))
    x = torch.randn(4, 64)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    name = next(n for n, p in net.named_parameters() if n != "bias")

    class Doubled(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    with torch.no_grad():
        before = net(x) - net.bias
        torch.nn.utils.parametrize.register_parametrization(net, name, Doubled())
        torch.testing.assert_close(net(x) - net.bias, 2 * before)


@needs_native
@pytest.mark.parametrize("rows", [None, 1, 64])
@pytest.mark.parametrize("structure", [sm.Sparse(density=0.2), sm.Sparse(density=0.6), sm.PivotedLowRank(5),
                                       sm.Butterfly(), sm.SparsePlusLowRank(2, 0.1)])  # fmt: skip
def test_frozen_layers_are_equal_in_every_form(structure: sm.Structure, rows: int | None) -> None:
    net = sm.nn.StructuredLinear(64, 96, structure=structure)
    frozen = net.freeze(rows)
    for count in (1, 70):
        x = torch.randn(count, 64)
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
    if isinstance(structure, sm.Sparse):
        assert isinstance(stages(frozen.program)[0], Contraction) == (rows == 1 or structure != sm.Sparse(density=0.2))


@needs_native
def test_freezing_keeps_sparse_matrices_for_many_rows_and_writes_them_out_for_one() -> None:
    net = sm.nn.StructuredLinear(64, 96, structure=sm.Sparse(density=0.2))
    assert isinstance(net.freeze().program, Sparse)
    assert isinstance(net.freeze(rows=1).program, Contraction)
    with sm.backend("reference"):
        assert isinstance(net.freeze().program, Contraction)

"""The native backend: equal to the reference for every stage, dtype, instruction set and batch."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.utils.parametrize
from hypothesis import given, settings
from instruction_sets import every, printed_by
from native_programs import programs, tensors_of
from torch import Tensor
from torch.autograd import forward_ad

import structmat as sm
from structmat.errors import StructureError
from structmat.kernels import apply, choice, native, operator
from structmat.kernels.choice import native_text, prefers_native
from structmat.kernels.text import Text, text_of
from structmat.matrix import draw
from structmat.program import (
    Chain,
    Complex,
    Contraction,
    Diagonal,
    Fourier,
    Pad,
    Permute,
    Program,
    Real,
    Shuffle,
    Sparse,
    Sum,
    build,
    reference,
    rename,
    simplify,
    stages,
    transpose,
)
from structmat.structure import resolve
from structmat.structures import families

here = native()


def test_the_library_is_there_where_it_must_be() -> None:
    if os.environ.get("STRUCTMAT_REQUIRE_NATIVE") == "1":
        assert here.available, here.reason
    if not here.available:
        pytest.skip(f"no native library: {here.reason}")
    assert here.instruction_set in here.supported


pytestmark = pytest.mark.filterwarnings("error")
needs_native = pytest.mark.skipif(not here.available, reason=f"no native library: {here.reason}")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def assert_equal(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None = None) -> None:
    """The native outcome is the float64 reference, to the rounding of the dtype."""
    text = text_of(program)
    assert isinstance(text, Text), text
    given, words = operator.arguments(text, tensors, bias), text.plain if bias is None else text.biased
    x = x if operator.is_by_rows(x) else x.contiguous()
    found = operator.run(x, given, words)
    if x.dim() == 2 and len(x) >= operator.FEW_ROWS:  # the other layout of the input, of the outcome, or of both
        columns = x.T.contiguous().T
        into = torch.full((program.out_features + 1, 2 * len(x)), torch.nan, dtype=x.dtype)
        y = into[1:, : len(x)].T
        if operator.is_by_features(columns) and operator.is_by_features(y):
            assert torch.equal(operator.run(columns, given, words), found)
            for source in (x, columns):
                operator.run_into(source, given, words, y.fill_(torch.nan))
                assert torch.equal(y, found)
            assert into[0].isnan().all()
            assert into[:, len(x) :].isnan().all()
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wanted = reference.apply(program, wide, x.double())
    if bias is not None:
        wanted = wanted + bias.double()
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    if found.numel():
        size = float(wanted.abs().max())
        assert float((found.double() - wanted).abs().max()) <= TOLERANCE[x.dtype] * max(size, 1e-3), program


# ------------------------------------------------------------------------------------------------ random programs


@needs_native
@settings(deadline=None, max_examples=150)
@given(programs(), st.sampled_from(list(TOLERANCE)), st.integers(0, 70), st.integers(0, 10**6), st.booleans())
def test_random_programs(program: Program, dtype: torch.dtype, batch: int, seed: int, with_bias: bool) -> None:
    tensors = tensors_of(program, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, program.in_features, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(program.out_features, generator=generator).to(dtype) if with_bias else None
    assert_equal(program, tensors, x, bias)
    y = torch.randn(batch, program.out_features, generator=generator, dtype=torch.float64).to(dtype)
    assert_equal(transpose(program), tensors, y)
    assert_equal(simplify(program), tensors, x)


@needs_native
@pytest.mark.slow
@settings(deadline=None, max_examples=5000)
@given(programs(depth=3), st.sampled_from(list(TOLERANCE)), st.integers(0, 200), st.integers(0, 10**6))
def test_thousands_of_random_programs(program: Program, dtype: torch.dtype, batch: int, seed: int) -> None:
    tensors = tensors_of(program, dtype, seed)
    x = torch.randn(batch, program.in_features, dtype=torch.float64).to(dtype)
    assert_equal(program, tensors, x)


# ------------------------------------------------------------------------------------------------------- families


@needs_native
@pytest.mark.parametrize("name", sorted(families()))
@pytest.mark.parametrize("shape", [(64, 64), (17, 23), (96, 40), (1, 9), (688, 256)])
def test_every_family(name: str, shape: tuple[int, int]) -> None:
    members = list(families()[name].configurations(shape, shape[0] * shape[1] // 2))
    for member in members[:3]:
        structure = resolve(member, shape)
        tensors = draw(structure, shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        program = build(structure, shape)
        if isinstance(text_of(program), str):
            continue
        assert_equal(program, tensors, torch.randn(37, shape[1]))
        assert_equal(transpose(program), tensors, torch.randn(37, shape[0]))


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_wide_stages_and_full_tiles(dtype: torch.dtype) -> None:
    """Sizes beyond one block of the inner loops: more than 256 terms, several tiles, a last one that is not full."""
    program = Chain((Contraction("w", 2, 40, 300, 1), Contraction("v", 1, 33, 5, 16, shared_d=True)))
    tensors = tensors_of(program, dtype, 1)
    assert_equal(program, tensors, torch.randn(131, 600, dtype=torch.float64).to(dtype))


@needs_native
@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("base", [2, 4])
@pytest.mark.parametrize("features", [64, 3 * 4**3, 4**5])
def test_stages_of_small_blocks_in_registers(features: int, base: int, upwards: bool) -> None:
    """Several stages a pass, in both orders and directions, with one row, part of a tile, and several tiles."""
    distances = [base**k for k in range(10) if features % base ** (k + 1) == 0]
    steps = [
        Contraction(f"w{d}", features // (base * d), base, base, d, transposed=bool(d.bit_length() % 3))
        for d in (distances if upwards else reversed(distances))
    ]
    program = Chain(tuple(steps))
    for dtype, rows in itertools.product((torch.float32, torch.float64, torch.bfloat16), (1, 33, 140)):
        x = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert_equal(program, tensors_of(program, dtype, 0), x)


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("a", "b", "c", "d"), [(1, 64, 64, 64), (2, 21, 5, 37), (3, 16, 300, 16), (1, 8, 2, 3)])
def test_matrices_for_every_d_are_the_same_packed(a: int, b: int, c: int, d: int, transposed: bool) -> None:
    """Weights are packed where several tiles share them: the outcome for a row does not change."""
    program = Contraction("w", a, b, c, d, transposed=transposed)
    for dtype in TOLERANCE:
        tensors = tensors_of(program, dtype, 0)
        x = torch.randn(200, program.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert_equal(program, tensors, x)
        assert_equal(program, tensors, x[:3])


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [(1, 70, 300, 1), (6, 5, 33, 1), (3, 17, 9, 1), (2, 9, 40, 37), (1, 64, 64, 64), (5, 4, 4, 4), (2, 33, 77, 8)],
)
def test_few_rows_run_vector_by_vector(
    a: int, b: int, c: int, d: int, shared: tuple[bool, bool], transposed: bool, rows: int
) -> None:
    first = Contraction("w", a, b, c, d, *shared, transposed)
    others = [Contraction("l", 1, 3, c * a * d, 1), Contraction("r", 1, a * b * d, 3, 1), Diagonal("g", a * b * d)]
    program = Sum((first, Chain(tuple(others))))
    for dtype in (torch.float32, torch.float64):
        tensors = tensors_of(program, dtype, 0)
        x = torch.randn(rows, program.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert_equal(program, tensors, x, torch.randn(program.out_features).to(dtype))


@needs_native
@pytest.mark.parametrize("rows", [16, 31, 64, 200])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [(1, 70, 300, 1), (6, 5, 33, 1), (2, 8, 6, 64), (2, 9, 40, 37), (1, 64, 64, 64), (5, 4, 4, 4), (1, 24, 7, 96)],
)
def test_bfloat16_by_pairs(
    a: int, b: int, c: int, d: int, shared: tuple[bool, bool], transposed: bool, rows: int
) -> None:
    first = Contraction("w", a, b, c, d, *shared, transposed)
    others = [Contraction("l", 1, 3, c * a * d, 1), Shuffle((3, 1), (1, 0)), Contraction("r", 1, a * b * d, 3, 1)]
    program = Chain((Permute("p", a * c * d), Sum((first, Chain(tuple(others)))), Pad(a * b * d, a * b * d + 5, 2)))
    assert choice.runs_by_pairs(program) is here.multiplies_pairs
    tensors = tensors_of(program, torch.bfloat16, 0)
    x = torch.randn(rows, program.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_equal(program, tensors, x)
    assert_equal(program, tensors, x, torch.randn(program.out_features).bfloat16())


@needs_native
@pytest.mark.parametrize("name", every())
def test_every_instruction_set_of_this_machine(name: str) -> None:
    if name not in here.supported:
        pytest.skip(f"this machine has no {name}")
    code = (
        "import torch, structmat as sm\n"
        "from structmat.kernels import backend, native\n"
        "torch.manual_seed(0)\n"
        "structures = [sm.Monarch(4, rank=2), sm.Butterfly(), sm.Sparse(density=0.2), sm.PivotedLowRank(5),\n"
        "              sm.Kronecker(terms=2), sm.BLAST(4, rank=8), sm.TensorTrain(rank=4)]\n"
        "for structure in structures:\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        S = sm.StructuredMatrix.random(structure, (96, 64), dtype=torch.float64).to(dtype=dtype)\n"
        "        x = torch.randn(64, 75, dtype=torch.float64).to(dtype)\n"
        "        wanted = S.to(dtype=torch.float64).to_dense() @ x.double()\n"
        "        with backend('native'):\n"
        "            found = (S @ x).double()\n"
        "        error = float((found - wanted).abs().max() / wanted.abs().max())\n"
        "        assert error < 8 * torch.finfo(dtype).eps, (structure, dtype, error)\n"
        "        with backend('native'):\n"
        "            few = (S @ x[:, :7]).double()\n"
        "        error = float((few - wanted[:, :7]).abs().max() / wanted.abs().max())\n"
        "        assert error < 8 * torch.finfo(dtype).eps, (structure, dtype, error)\n"
        "frozen = sm.freeze(sm.nn.StructuredLinear(512, 512, structure=sm.Butterfly()))\n"
        "x = torch.randn(75, 512)\n"
        "with torch.no_grad(), backend('native'):\n"
        "    found = frozen(x)\n"
        "with torch.no_grad(), backend('reference'):\n"
        "    assert float((found - frozen(x)).abs().max()) < 1e-5\n"
        "print(native().instruction_set)\n"
    )
    assert printed_by(code, name) == name


@needs_native
def test_without_operators_it_is_called_by_address() -> None:
    code = (
        "import torch, structmat as sm\n"
        "from structmat.kernels import native\n"
        "assert not hasattr(torch.ops.structmat, 'multiply')\n"
        "assert native().by_address and 'STRUCTMAT_OPERATORS' in native().reason\n"
        "torch.set_num_threads(3)\n"
        "for structure in (sm.Monarch(4, rank=2), sm.Sparse(density=0.2), sm.BLAST(4, rank=8)):\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16):\n"
        "        layer = sm.nn.StructuredLinear(64, 96, structure=structure, dtype=dtype)\n"
        "        for shape in ((75, 64), (3, 64), (2, 40, 64), (0, 64)):\n"
        "            found, wanted = [], []\n"
        "            for name, into in (('native', found), ('reference', wanted)):\n"
        "                x = torch.linspace(-1, 1, 64, dtype=dtype).expand(shape).clone().requires_grad_()\n"
        "                layer.zero_grad()\n"
        "                with sm.backend(name):\n"
        "                    y = layer(x)\n"
        "                    y.square().sum().backward()\n"
        "                into += [y.detach(), x.grad, *(p.grad for p in layer.parameters())]\n"
        "            for one, other in zip(found, wanted, strict=True):\n"
        "                size = float(other.abs().max()) if other.numel() else 0.0\n"
        "                torch.testing.assert_close(one, other, rtol=0, atol=30 * size * torch.finfo(dtype).eps)\n"
        "        S, x = layer.matrix, torch.randn(64, 40).to(dtype)\n"
        "        out = torch.empty(96, 40, dtype=dtype)\n"
        "        with torch.no_grad(), sm.backend('native'):\n"
        "            assert torch.equal(sm.matmul(S, x, out=out), S @ x)\n"
        "try:\n"
        "    native().by_address.multiply(torch.ones(4, 8), [], 'rows 8 diagonal 8 0')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "STRUCTMAT_OPERATORS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "structmat: the number of tensors is wrong", done.stderr


@needs_native
def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch() -> None:
    S = sm.StructuredMatrix.random(sm.Monarch(8, rank=2), (128, 96), generator=torch.Generator().manual_seed(0))
    x = torch.randn(96, 203)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        few = []
        large = sm.StructuredMatrix.random(sm.Monarch(16, rank=1), (1024, 1024))  # threads share even one row's work
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append(S @ x)
            with sm.backend("native"):
                few.append(large @ torch.ones(1024, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(few[0], few[1])
    assert torch.equal(few[0], few[2])
    assert torch.equal((S @ x[:, 50:150]), outcomes[0][:, 50:150])


# ------------------------------------------------------------------------------------------------ choice, and layers


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


# ------------------------------------------------------------------------------------------------------ bad input


@needs_native
@pytest.mark.parametrize(
    ("program", "tensors", "message"),
    [
        ("rows 2 contract 1 2 3", [(6,)], "bad program"),
        ("rows 1 unknown 1", [], "unknown stage"),
        ("columns 1 crop 1 1 0", [], "begins with columns"),
        ("rows 3 contract 1 4 8 1 0 0 0 0", [(32,)], "another number"),
        ("rows 4 chain 2 crop 8 4 0 crop 8 4 0", [], "sizes"),
        ("rows 4 contract 1 4 8 1 0 0 0 0", [(31,)], "wrong size"),
        ("rows 4 contract 1 4 8 1 0 0 0 0", [], "number of tensors"),
        ("rows 4 contract 1 4 8 1 0 0 0 0 surplus", [(32,)], "follows"),
        ("rows 4 contract 1 4 8 1 0 0 0 3", [(32,)], "never read"),
        ("rows 8 shuffle 2 2 4 0 0", [], "no permutation"),
    ],
)
def test_a_bad_program_is_an_error_and_not_a_crash(program: str, tensors: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.randn(s) for s in tensors], program)


@needs_native
@pytest.mark.parametrize("place", [-1, 64, 10**12])
def test_a_place_out_of_range_is_an_error(place: int) -> None:
    places = torch.arange(5)
    for position in (0, 2, 4):
        own = places.clone()
        own[position] = place
        with pytest.raises(ValueError, match="out of range"):
            torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.randn(5), own], "rows 8 sparse 8 8 5 0 0 1")
    with pytest.raises(ValueError, match="out of range"):
        torch.ops.structmat.multiply.default(torch.randn(3, 8), [torch.full((8,), place)], "rows 8 permute 8 0 0")


@needs_native
def test_wrong_dtypes_and_shapes_are_errors() -> None:
    multiply = torch.ops.structmat.multiply.default
    weight, program = torch.randn(32), "rows 4 contract 1 4 8 1 0 0 0 0"
    with pytest.raises(ValueError, match="dtype"):
        multiply(torch.randn(3, 8), [weight.double()], program)
    with pytest.raises(ValueError, match="shape"):
        multiply(torch.randn(3, 9), [weight], program)
    with pytest.raises(ValueError, match="float32"):
        multiply(torch.ones(3, 8, dtype=torch.int64), [torch.ones(32, dtype=torch.int64)], program)


@needs_native
def test_no_memory_grows() -> None:
    """Ten thousand calls leave the process as large as it was after the first hundred."""
    code = (
        "import resource, torch, structmat as sm\n"
        "net = sm.nn.StructuredLinear(64, 64, structure=sm.Sparse(density=0.2)).requires_grad_(False)\n"
        "x = torch.randn(64, 64)\n"
        "def run(count):\n"
        "    for _ in range(count):\n"
        "        net(x)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = run(200)\n"
        "print(run(10000) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048, f"{done.stdout} KB more"


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 1599), max_size=120), st.booleans(), st.booleans()
)
def test_places_in_any_order_and_more_than_once(
    height: int, width: int, drawn: list[int], in_order: bool, transposed: bool
) -> None:
    """Sorted ones are read in one pass, others are sorted first: also where only one pair is the wrong way round."""
    places = torch.tensor([p % (height * width) for p in (sorted(drawn) if in_order else drawn)], dtype=torch.int64)
    values = torch.randn(len(places), dtype=torch.float64)
    program = Sparse("v", "p", height, width, len(places), transposed)
    if not len(places):
        return
    x = torch.randn(9, program.in_features, dtype=torch.float64)
    for order in (places, places.roll(1)):
        assert_equal(program, {"v": values, "p": order}, x)
        assert_equal(program, {"v": values, "p": order}, x[:2])


@needs_native
@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_row_may_hold_more_entries_than_columns(row: int) -> None:
    program = Sparse("v", "p", 5, 3, 14)
    places = torch.tensor([0, 1, 4, 13, *[3 * row + column for column in (0, 0, 1, 1, 1, 2, 2, 2, 2, 2)]]).sort().values
    tensors = {"v": torch.randn(14, dtype=torch.float64), "p": places}
    assert_equal(program, tensors, torch.randn(9, 3, dtype=torch.float64))
    assert_equal(program, tensors, torch.randn(2, 3, dtype=torch.float64))


@needs_native
def test_many_places_are_shared_between_threads() -> None:
    program = Sparse("v", "p", 300, 700, 60000)
    places = torch.randperm(300 * 700, generator=torch.Generator().manual_seed(0))[:60000].sort().values
    values = torch.randn(60000, dtype=torch.float64)
    x = torch.randn(9, 700, dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for order in (places, places.flip(0), torch.cat([places[30000:], places[:30000]])):
                assert_equal(program, {"v": values, "p": order}, x)
                assert_equal(program, {"v": values, "p": order}, x[:1])
    finally:
        torch.set_num_threads(threads)

"""The native backend: equal to the reference for every stage, dtype, instruction set and batch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from instruction_sets import every, printed_by
from native_outcomes import TOLERANCE, assert_equal, here, needs_native
from native_programs import programs, tensors_of

import structmat as sm
from structmat.kernels import choice
from structmat.kernels.text import text_of
from structmat.matrix import draw
from structmat.program import (
    Chain,
    Contraction,
    Diagonal,
    Pad,
    Permute,
    Program,
    Shuffle,
    Sparse,
    Sum,
    build,
    simplify,
    transpose,
)
from structmat.structure import resolve
from structmat.structures import families


def test_the_library_is_there_where_it_must_be() -> None:
    if os.environ.get("STRUCTMAT_REQUIRE_NATIVE") == "1":
        assert here.available, here.reason
    if not here.available:
        pytest.skip(f"no native library: {here.reason}")
    assert here.instruction_set in here.supported


pytestmark = pytest.mark.filterwarnings("error")


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

"""The native kernels under AddressSanitizer and UBSan, on random programs, without PyTorch in the process."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from native_driver import STORAGE, build, case, case_of, compiler, held, instruction_sets
from native_programs import programs, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from structmat.kernels.text import Text, text_of, transposed_text
from structmat.nn import KroneckerNetwork
from structmat.nn.kronecker import Slopes
from structmat.program import Pad, Program


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for the tests of this module, with both sanitizers."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return build(tmp_path_factory.mktemp("driver"), flags)


def run(driver: Path, cases: list[bytes], instruction_set: str | None = None) -> subprocess.CompletedProcess[str]:
    file = driver.parent / "cases"
    file.write_bytes(b"".join(cases))
    chosen = {} if instruction_set is None else {"STRUCTMAT_ISA": instruction_set}
    return subprocess.run([driver, file], env={**os.environ, **chosen}, capture_output=True, text=True)


def activated_cases() -> list[bytes]:
    """Networks of Kronecker blocks with every activation, values kept or not, and every way to spread a bias."""
    made = []
    functions = [torch.relu, torch.tanh, torch.sigmoid, F.silu, F.gelu, nn.GELU(approximate="tanh"), Slopes(0.3)]
    shapes = [(3, 5), 13, (7, 2), (2, 5)]
    for function, bias, recompute in itertools.product(functions, ("full", "axis"), (True, False)):
        outer = torch.tanh if isinstance(function, Slopes) else function
        order = ["left", "right"] if recompute else "right"
        network = KroneckerNetwork(
            shapes, 2, inner=function, outer=outer, last=outer, bias=bias, order=order, recompute=recompute
        )
        text = network._way.text
        assert text is not None
        blocks = network.layers()
        given = [
            getattr(blocks[number].chains[place] if place >= 0 else blocks[number], name).detach()
            for number, place, name in network._way.places
        ]
        for dtype, rows in itertools.product((torch.float32, torch.float64), (1, 3, 16, 37, 131)):
            tensors = [tensor.to(dtype) for tensor in given]
            made.append(case_of(text.keeping, 15, tensors, dtype, rows))
            made.append(case_of(text.words, 15, tensors, dtype, rows))
    return made


def pooled_cases() -> list[bytes]:
    """Layers of convolutional arithmetic circuits: every semiring, gaps, scales, matrices shared or not."""
    made = []
    shapes = [(1, 1, 1, 1), (3, 4, 5, 7), (9, 4, 17, 3), (2, 3, 1, 33), (2, 11, 6, 2), (1, 2, 70, 12)]
    options = itertools.product(shapes, range(4), (False, True), (False, True), (torch.float32, torch.float64))
    for number, ((windows, window, inside, outside), semiring, lifts, lowers, dtype) in enumerate(options):
        batch, locations = (1, 3, 16, 64, 70, 128, 150)[number % 7], windows * window + 1
        child = torch.randperm(locations)[: windows * window]
        child[::5] = -1
        copies = (1, window, windows * window)[number % 3]
        index = torch.stack([child, torch.arange(windows * window) % copies])
        weight = torch.rand(copies, outside, inside, dtype=dtype) * 3
        scale = torch.randint(-9, 9, (locations, batch)) if semiring == 1 and not lifts else torch.empty(0)
        words = f"pool {semiring} {lifts:d} {lowers:d} {windows} {window} {inside} {outside} {copies}"
        x = torch.rand(locations, inside, batch, dtype=dtype)
        parts = [struct.pack("<q", len(words)), words.encode()]
        parts += [struct.pack("<qqq", batch, STORAGE[dtype], locations), held(x), struct.pack("<q", 3)]
        for tensor in (weight, index, scale):
            parts += [struct.pack("<q", tensor.numel()), held(tensor)]
        made.append(b"".join(parts))
    return made


def recurrent_cases() -> list[bytes]:
    """Every cell, forwards and backwards in time, on dense, blocked, sparse and windowed matrices of the state; and the
    way back of each."""
    made = []
    families = (sm.Dense(), sm.Monarch(2), sm.LowRank(2), sm.Sparse(0.3), sm.GBLR(2))
    options = itertools.product(range(4), families, (1, 7, 16, 40), (torch.float32, torch.float64))
    for number, (cell, family, rows, dtype) in enumerate(options):
        size, times, wide, kept = 6 + number % 17, 1 + number % 5, (4, 3, 1, 1)[cell], (5, 4, 0, 0)[cell]
        layer = sm.nn.StructuredLinear(size, wide * size, structure=family, dtype=dtype).freeze()
        text, back = text_of(layer.program), transposed_text(layer.program)
        assert isinstance(text, Text)
        assert isinstance(back, Text)
        state, memory = torch.randn(2, rows, size, dtype=dtype)
        gates, states = torch.randn(times, rows, wide * size, dtype=dtype), torch.rand(times, rows, size, dtype=dtype)
        tensors = [layer.tensors()[name] for name in text.names]
        made.append(sequence(f"recur {cell} {times} {number % 2} {text.biased}", rows, gates, [
            *tensors, layer.bias, state, memory,
        ]))  # fmt: skip
        tensors = [layer.tensors()[name] for name in back.names]
        made.append(sequence(f"unrecur {cell} {times} {number % 2} {back.plain}", rows, torch.randn_like(states), [
            *tensors, state, memory, torch.rand(times, rows, kept * size, dtype=dtype), states,
        ]))  # fmt: skip
    return made


def convolution_cases() -> list[bytes]:
    """One or two convolutions of every geometry, whole and by their entries; small images and large ones."""
    made = []
    sizes = ((1, 1), (3, 7), (8, 8), (17, 5), (16, 32), (33, 70))
    options = itertools.product(sizes, (1, 2), (1, 2, 3), (False, True), (torch.float32, torch.float64))
    for number, ((height, width), groups, stride, by_entries, dtype) in enumerate(options):
        inside, middle, out = groups * (1 + number % 5), groups * (1 + number % 9), 1 + number % 11
        if height * width > 2000:
            inside *= 40  # more than are dealt to a plane for each column
        taps, padding, dilation = 1 + number % 3, 2 + number % 2, 1 + number % 2
        geometry = f"{taps} {stride} {padding} {dilation} {4 - taps} {1 + number % 2} {padding} {dilation}"
        words = [f"{3 if by_entries else 1} {inside} {middle} {groups} {geometry}"]
        kernel = torch.randn(middle, inside // groups, taps, 4 - taps, dtype=dtype)
        tensors = entries(kernel) if by_entries else [kernel]
        if number % 3:
            words.append(f"1 {middle} {out} 1 1 1 0 1 1 1 0 1")
            tensors.append(torch.randn(out, middle, dtype=dtype))
        has_bias = number % 4 == 0
        if has_bias:
            tensors.append(torch.randn(out if number % 3 else middle, dtype=dtype))
        x = torch.randn(number % 4, inside, height, width, dtype=dtype)
        made.append(sequence(f"convolve {height} {width} {has_bias:d} {' '.join(words)}", len(x), x, tensors))
    return made


def entries(kernel: Tensor) -> list[Tensor]:
    """Every other number of a kernel: values, beginnings of the rows, columns."""
    rows = kernel.flatten(1)
    row, column = (torch.rand(rows.shape) < 0.5).nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(rows) + 1))
    return [rows[row, column], start.to(torch.int32), column.to(torch.int32)]


def sequence(words: str, rows: int, x: Tensor, tensors: list[Tensor]) -> bytes:
    """A case of a recurrent net, or of images."""
    parts = [struct.pack("<q", len(words)), words.encode(), struct.pack("<qqq", rows, STORAGE[x.dtype], 0)]
    parts += [held(x), struct.pack("<q", len(tensors))]
    for tensor in tensors:
        parts += [struct.pack("<q", tensor.numel()), held(tensor)]
    return b"".join(parts)


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_the_kernels_are_clean_under_sanitizers(driver: Path) -> None:
    # A program without a tensor comes first: nothing is summed for it, and nothing was reserved before it.
    cases = [case(Pad(5, 9, 2), {}, dtype, 3) for dtype in STORAGE]

    @settings(deadline=None, max_examples=400, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs(depth=3), st.sampled_from(list(STORAGE)), st.integers(0, 70), st.integers(0, 10**6), st.booleans())
    def collect(program: Program, dtype: torch.dtype, rows: int, seed: int, with_bias: bool) -> None:
        cases.append(case(program, tensors_of(program, dtype, seed), dtype, rows, with_bias))

    collect()
    assert len(cases) >= 400
    cases += activated_cases() + pooled_cases() + recurrent_cases() + convolution_cases()
    for name in instruction_sets():
        done = run(driver, cases, name)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.startswith(f"{len(cases)} cases")


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_the_sanitizers_see_what_is_wrong(driver: Path) -> None:
    """A read beyond the end of a tensor ends the driver: the test above can fail."""
    words = b"rows 4 contract 1 4 8 1 0 0 0 0"
    x, weight = torch.randn(2 * 8), torch.randn(31)  # one number is missing, though the case says 32
    parts = [struct.pack("<q", len(words)), words, struct.pack("<qqq", 2, 0, 8), held(x), struct.pack("<qq", 1, 32)]
    done = run(driver, [*parts, held(weight)])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr

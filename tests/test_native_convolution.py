"""Convolutions in one native call compute what PyTorch's do, whole or by their entries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from instruction_sets import every, printed_by
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from structmat.errors import StructmatError
from structmat.kernels import convolve as native
from structmat.kernels.convolve import Along, Steps, convolve, convolved
from structmat.nn import StructuredConv1d, StructuredConv2d
from structmat.nn.convolution.entries import EntriesConvolution
from structmat.structure import Structure

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no operators of the native backend")


@dataclass(frozen=True)
class Step:
    """A convolution and its kernel, which may have zeros."""

    kernel: Tensor
    axes: tuple[Along, ...]
    groups: int
    by_entries: bool

    def dense(self, x: Tensor) -> Tensor:
        """By PyTorch."""
        stride, padding, dilation = ([getattr(a, n) for a in self.axes] for n in ("stride", "padding", "dilation"))
        run = F.conv2d if len(self.axes) == 2 else F.conv1d
        return run(x, self.kernel, None, stride, padding, dilation, self.groups)

    def tensors(self) -> list[Tensor]:
        """As the native call takes them."""
        return entries(self.kernel) if self.by_entries else [self.kernel]


def entries(kernel: Tensor) -> list[Tensor]:
    """Values, beginnings and columns."""
    rows = kernel.flatten(1)
    row, column = rows.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(rows) + 1)).to(torch.int32)
    return [rows[row, column], start, column.to(torch.int32)]


def run(steps: Sequence[Step], x: Tensor, bias: Tensor | None) -> Tensor:
    """All in one native call, whatever is faster."""
    given = Steps([convolved(s.kernel.shape, s.groups, s.axes, by_entries=s.by_entries) for s in steps])
    with sm.backend("native"), torch.no_grad():
        found = convolve(given, [t for s in steps for t in s.tensors()], x, bias)
    assert found is not None
    return found


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Step], Tensor, Tensor | None]:
    """Up to three convolutions of every geometry, of images or sequences."""
    dtype, dims = draw(st.sampled_from((torch.float32, torch.float64))), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    sizes = [draw(st.integers(1, 40)) for _ in range(dims)]
    channels = draw(st.integers(1, 13))
    x = torch.randn(draw(st.integers(0, 6)), channels, *sizes, dtype=dtype)
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3, channels) if channels % g == 0]))
        out = groups * draw(st.integers(1, 9))
        pointwise = draw(st.integers(0, 3)) == 0
        axes = []
        for axis, size in enumerate(sizes):
            taps, stride, padding, dilation = 1, 1, 0, 1
            if not pointwise:
                taps, stride, padding = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
                dilation = draw(st.integers(1, 3))
            padding = max(padding, -(-(dilation * (taps - 1) + 1 - size) // 2))
            axes.append(Along(taps, stride, padding, dilation))
            sizes[axis] = axes[-1].places(size)
        kernel = torch.randn(out, channels // groups, *(a.kernel for a in axes), dtype=dtype)
        by_entries = draw(st.booleans())
        if by_entries:
            kernel *= torch.rand(kernel.shape) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
        steps.append(Step(kernel, tuple(axes), groups, by_entries))
        channels = out
    return steps, x, torch.randn(channels, dtype=dtype) if draw(st.booleans()) else None


@given(chains(), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_it_computes_what_pytorch_does(given: tuple[list[Step], Tensor, Tensor | None], threads: int) -> None:
    steps, x, bias = given
    wanted = x
    for step in steps:
        wanted = step.dense(wanted)
    if bias is not None:
        wanted = wanted + bias.reshape(-1, *[1] * (x.dim() - 2))
    before, held = torch.get_num_threads(), x.clone()
    torch.set_num_threads(threads)
    try:
        found = run(steps, x, bias)
    finally:
        torch.set_num_threads(before)
    exact = x.dtype is torch.float64
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=(1e-13 if exact else 1e-5) * max(scale, 1.0))
    assert torch.equal(x, held)


@pytest.mark.parametrize("size", [(16, 150, 130), (70, 40, 41)])
@pytest.mark.parametrize("by_entries", [False, True])
def test_images_larger_than_the_caches(size: tuple[int, int, int], by_entries: bool) -> None:
    """Their rows have the padding between them."""
    channels, height, width = size
    kernel = torch.randn(9, channels, 3, 3, dtype=torch.float64)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    for stride, dilation in ((1, 1), (1, 2), (2, 1)):
        step = Step(kernel, (Along(3, stride, 1, dilation), Along(3, 1, 1, 1)), 1, by_entries)
        torch.testing.assert_close(run([step], x, None), step.dense(x))


@pytest.mark.parametrize("instruction_set", every())
def test_every_instruction_set(instruction_set: str) -> None:
    code = (
        "import torch; from torch.nn import functional as F\n"
        "import structmat as sm; from structmat.kernels.convolve import *\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.float64):\n"
        "    for n in (1, 5, 8, 9, 16, 17, 33, 64, 70):\n"
        "        x = torch.randn(2, 5, 3, n, dtype=dtype)\n"
        "        first, second = torch.randn(13, 5, 3, 3, dtype=dtype), torch.randn(7, 13, 1, 1, dtype=dtype)\n"
        "        three, one = (Along(3, 1, 1, 1),) * 2, (Along(1, 1, 0, 1),) * 2\n"
        "        steps = Steps([convolved(first.shape, 1, three), convolved(second.shape, 1, one)])\n"
        "        with sm.backend('native'):\n"
        "            y = convolve(steps, [first, second], x, None)\n"
        "        torch.testing.assert_close(y, F.conv2d(F.conv2d(x, first, padding=1), second), rtol=1e-4, atol=1e-4)\n"
        "print('done')\n"
    )
    assert printed_by(code, instruction_set) == "done"


def test_entries_that_are_none_of_the_kernel_are_refused() -> None:
    x, y, kernel = torch.randn(1, 2, 5, 5), torch.empty(1, 3, 3, 3), torch.randn(3, 2, 3, 3)
    values, start, column = entries(kernel)
    call, words = torch.ops.structmat.convolve.default, "3 2 3 1 3 1 0 1 3 1 0 1"
    call(x, [values, start, column], y, words)
    torch.testing.assert_close(y, F.conv2d(x, kernel))
    wrong = [
        (values, start, column + 1),
        (values, start, column - 1),
        (values, start - 1, column),
        (values, start.flip(0), column),
        (values[1:], start, column[1:]),
        (values, start[1:], column),
    ]
    for tensors in wrong:
        with pytest.raises((ValueError, RuntimeError), match="structmat"):
            call(x, list(tensors), y, words)
    for bad in ("", "2 2 3 1 3 1 0 1 3 1 0 1", "3 2 3 2 3 1 0 1 3 1 0 1", "3 2 3 1 3 0 0 1 3 1 0 1", words + " 1"):
        with pytest.raises((ValueError, RuntimeError), match="structmat"):
            call(x, [values, start, column], y, bad)
    with pytest.raises((ValueError, RuntimeError), match="too small"):
        call(x[..., :2].contiguous(), [values, start, column], y, words)
    with pytest.raises((ValueError, RuntimeError), match="structmat"):
        call(x, [values, start, column], y[:, :2], words)


SUM = sm.Sum(sm.LowRank(1), sm.Sparse(0.1))
FAMILIES: tuple[Structure, ...] = (sm.LowRank(3), sm.Sparse(0.2), sm.Sparse(0.5), sm.Sparse(0.9), SUM)


@pytest.mark.parametrize("structure", FAMILIES, ids=str)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_frozen_layers_compute_the_same_in_every_way(structure: Structure, mode: str) -> None:
    layer = StructuredConv2d(6, 8, 3, stride=2, padding=1, groups=2, padding_mode=mode, structure=structure).double()
    frozen, dense = layer.freeze(), layer.to_conv()
    for shape in ((2, 6, 9, 8), (6, 9, 8), (0, 6, 9, 8), (40, 6, 9, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            wanted = dense(x)
            for hold in (False, True):
                frozen.hold_dense(hold)
                torch.testing.assert_close(frozen(x), wanted)
                torch.testing.assert_close(copy.deepcopy(frozen)(x), wanted)
                with sm.backend("reference"):
                    torch.testing.assert_close(frozen(x), wanted)
    frozen.hold_dense(False)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    several = torch.randn(3, 2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(frozen)(several), torch.func.vmap(dense)(several))
    with pytest.raises((StructmatError, RuntimeError), match=r"channels|shape"):
        frozen(torch.randn(2, 5, 9, 8, dtype=torch.float64))


def test_graphs_hold_the_whole_kernel() -> None:
    """Compilers and exporters follow PyTorch's convolution."""
    layer, x = StructuredConv2d(4, 6, 3, structure=sm.Sparse(0.2)), torch.randn(2, 4, 7, 8)
    frozen = layer.freeze()
    assert frozen.dense is None
    with torch.no_grad():
        wanted = layer.to_conv()(x)
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        exported = torch.export.export(frozen, (x,)).module()
        for run in (compiled, exported):
            torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)


def test_sequences_run_too() -> None:
    x = torch.randn(3, 4, 50)
    for structure in (sm.LowRank(2), sm.Sparse(0.2)):
        layer = StructuredConv1d(4, 6, 5, padding=2, dilation=2, structure=structure)
        frozen = layer.freeze()
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), layer.to_conv()(x), rtol=1e-4, atol=1e-5)


def test_what_is_held_follows_how_many_entries_there_are() -> None:
    def frozen(share: float) -> nn.Module:
        return StructuredConv2d(8, 8, 3, structure=sm.Sparse(share)).freeze()

    few, many, most = frozen(0.2), frozen(0.5), frozen(0.9)
    assert isinstance(few.entries, EntriesConvolution)
    assert few.dense is None
    assert isinstance(many.entries, EntriesConvolution)
    assert many.dense is not None
    assert most.entries is None
    assert most.dense is not None
    kernel = few.layer.to_conv().weight
    torch.testing.assert_close(few.entries.kernel, kernel)


def test_tune_names_the_ways_of_convolutions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path))
    model = nn.Sequential(
        StructuredConv2d(4, 8, 3, structure=sm.Sparse(0.1)), StructuredConv2d(8, 8, 3, structure=sm.LowRank(2))
    )
    tuned = sm.tune(sm.freeze(model), [1], allow_dense=True, example=torch.randn(1, 4, 12, 12), seconds=0.001)
    assert [sorted(way.value for way in layer.microseconds) for layer in tuned.layers] == [["dense", "native"]] * 2

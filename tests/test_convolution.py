"""Structured convolutions: equal to dense ones of the written-out kernel, whatever runs; counts and memory."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import market
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import structmat as sm
from structmat.errors import ShapeError, StructureError
from structmat.nn import StructuredConv1d, StructuredConv2d, StructuredConvTranspose1d, StructuredConvTranspose2d
from structmat.nn.convolution import KernelForm
from structmat.nn.kronecker import KernelSizes
from structmat.structure import Structure, count_parameters

Layer = StructuredConv1d | StructuredConv2d | StructuredConvTranspose1d | StructuredConvTranspose2d

TAPS_FIRST = (1, 2, 0)

FORMS: tuple[KernelForm, ...] = (
    sm.nn.Separable(2),
    sm.nn.CP(3),
    sm.nn.CP(2, joint=True),
    sm.nn.Tucker((2, 3)),
    sm.nn.Tucker(0.9),
    sm.nn.KroneckerKernel(2),
    sm.nn.KroneckerKernel(1, KernelSizes((2, 2, 3, 1), (2, 3, 1, 3))),
)
"""For 4 outputs, 6 inputs and 3 x 3 taps."""

LOWERED: tuple[tuple[Structure | KernelForm, tuple[int, ...] | None], ...] = (
    (sm.Dense(), None),
    (sm.LowRank(2), None),
    (sm.LowRank(3), TAPS_FIRST),
    (sm.BlockDiagonal(2), None),
    (sm.BlockDiagonal(3), None),
    (sm.Monarch((3, 2), 2), None),
    (sm.Monarch((2, 2), 1), None),
    (sm.Monarch((9, 2), 1), TAPS_FIRST),
    (sm.BlockDiagonal(3), TAPS_FIRST),
    (sm.Sum(sm.LowRank(1), sm.BlockDiagonal(2)), None),
    (sm.Product(sm.Diagonal(), sm.LowRank(2)), None),
    (sm.Chain(((6, 2, 9, 1), (1, 4, 12, 1))), None),
    *((form, None) for form in FORMS),
)
"""What runs without patches being written out, for 4 outputs, 6 inputs and 3 x 3 taps."""


def dense(layer: Layer, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """What PyTorch's own function makes of the written-out kernel."""
    made = layer.to_conv().to(x.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")  # PyTorch's, of itself
        return made(x) if output_size is None else made(x, output_size)


def filled(layer: Layer) -> Layer:
    """The bias of a fresh layer is never so small that its absence would not be seen."""
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.arange(1.0, 1 + len(layer.bias)))
    return layer


@pytest.mark.parametrize(("structure", "order"), LOWERED, ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": (1, 2), "dilation": (2, 1)}], ids=["plain", "wide"])
def test_lowered_equals_dense(
    structure: Structure | KernelForm, order: tuple[int, ...] | None, options: dict[str, Any]
) -> None:
    layer = filled(StructuredConv2d(6, 4, 3, structure=structure, order=order, dtype=torch.float64, **options))
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    assert layer.is_lowered
    torch.testing.assert_close(layer(x), dense(layer, x))
    torch.testing.assert_close(layer(x[0]), dense(layer, x[0]))
    assert float(layer.kernel.detach().abs().max()) > 0.01


@pytest.mark.parametrize(("structure", "order"), LOWERED, ids=str)
def test_transposed_lowered_equals_dense(structure: Structure | KernelForm, order: tuple[int, ...] | None) -> None:
    layer = StructuredConvTranspose2d(
        6, 4, 3, (2, 3), (1, 2), (1, 0), dilation=(1, 2), structure=structure, order=order, dtype=torch.float64
    )
    filled(layer)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert layer.is_lowered
    torch.testing.assert_close(layer(x), dense(layer, x))


@pytest.mark.parametrize("structure", market.members((4, 54)), ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forwards", "transposed"])
def test_conv_every_family_equals_dense(structure: Structure, transposed: bool) -> None:
    kind = StructuredConvTranspose2d if transposed else StructuredConv2d
    layer = filled(kind(6, 4, 3, stride=2, padding=1, dilation=2, structure=structure, dtype=torch.float64))
    x = torch.randn(3, 6, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x))


SIZES = st.integers(1, 3)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, Tensor]:
    """A layer of any kind, and an input that fits it."""
    dims, transposed, groups = draw(st.sampled_from([1, 2])), draw(st.booleans()), draw(st.integers(1, 3))
    inputs, outputs = draw(SIZES), draw(SIZES)
    kernel, dilation = ([draw(SIZES) for _ in range(dims)] for _ in range(2))
    padding: Any = [draw(st.integers(0, 2)) for _ in range(dims)]
    stride = [draw(SIZES) for _ in range(dims)]
    options: dict[str, Any] = {}
    if transposed:
        options["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        word = draw(st.sampled_from(["same", "valid", None]))
        padding = word or padding
        stride = [1] * dims if word == "same" else stride
    shape = (outputs, inputs * math.prod(kernel))
    members: list[Structure | KernelForm] = [
        sm.Dense(),
        sm.Monarch((inputs, 1), 1),
        sm.BlockDiagonal(min(inputs, outputs)),
    ]
    members += [sm.LowRank(1), sm.nn.CP(1), sm.nn.Tucker(1), sm.nn.KroneckerKernel(1), *market.members(shape)]
    order = draw(st.permutations(range(1 + dims)))
    structure = draw(st.sampled_from(members))
    kinds = {
        (1, False): StructuredConv1d,
        (2, False): StructuredConv2d,
        (1, True): StructuredConvTranspose1d,
        (2, True): StructuredConvTranspose2d,
    }
    make: Callable[..., Layer] = kinds[dims, transposed]
    layer = make(
        inputs * groups,
        outputs * groups,
        kernel,
        stride,
        padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        structure=structure,
        order=None if isinstance(structure, KernelForm) else order,
        dtype=torch.float64,
        **options,
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [n + draw(st.integers(5, 8)) for n in reach]  # also the output of a transposed one is not empty
    x = torch.randn(draw(st.integers(0, 3)), inputs * groups, *sizes, dtype=torch.float64)
    return layer, x


@given(layers())
@settings(max_examples=100)
def test_conv_C13_any_layer_equals_the_dense_one(case: tuple[Layer, Tensor]) -> None:
    layer, x = case
    if layer.padding_mode != "zeros" and len(x) == 0:
        x = x.new_zeros(1, *x.shape[1:])  # PyTorch pads no empty batch
    torch.testing.assert_close(filled(layer)(x), dense(layer, x))


@given(layers())
def test_conv_operations_are_those_that_run(case: tuple[Layer, Tensor]) -> None:
    """Held against PyTorch's own counter, which counts convolutions but no products with single numbers."""
    layer, x = case
    if not layer.is_lowered or "Diagonal" in layer.explain():
        return
    with FlopCounterMode(display=False) as counter:
        layer(x.new_zeros(1, *x.shape[1:]))
    assert counter.get_total_flops() == 2 * layer.macs(*x.shape[2:])


def test_operations_of_the_forms() -> None:
    """By hand: 4 outputs, 6 inputs, 3 x 3 taps, an input of 8 x 10 with stride 2 and padding 1 gives 4 x 5 places."""

    def macs(structure: Structure | KernelForm) -> int:
        return StructuredConv2d(6, 4, 3, 2, 1, structure=structure).macs(8, 10)

    assert macs(sm.Dense()) == 4 * 5 * 4 * 54
    assert macs(sm.LowRank(2)) == 4 * 5 * (2 * 54 + 4 * 2)
    assert macs(sm.BlockDiagonal(2)) == 4 * 5 * 4 * 27
    # Once along the height, at all columns; then along the width.
    assert macs(sm.nn.Separable(2)) == 4 * 10 * 2 * 18 + 4 * 5 * 4 * 6
    assert macs(sm.nn.Tucker((2, 3))) == 8 * 10 * 3 * 6 + 4 * 5 * (2 * 27 + 4 * 2)
    assert macs(sm.nn.CP(3)) == 8 * 10 * 3 * 6 + 4 * 10 * 3 * 3 + 4 * 5 * (3 * 3 + 4 * 3)
    joint = StructuredConv2d(12, 4, 3, 2, 1, structure=sm.nn.CP(3, joint=True))
    assert joint.macs(8, 10) == 8 * 10 * 3 * 12 + 4 * 5 * (3 * 9 + 4 * 3)
    layer = StructuredConv2d(6, 4, 3, 2, 1, structure=sm.Sparse(nonzeros=7))
    assert layer.macs(8, 10) == 4 * 5 * 7
    assert layer.dense_macs(8, 10) == 4 * 5 * 4 * 54
    transposed = StructuredConvTranspose2d(6, 4, 3, 2, structure=sm.LowRank(2))  # 4 x 5 places to 9 x 11
    assert transposed.macs(4, 5) == 4 * 5 * 2 * 54 + 9 * 11 * 4 * 2
    assert transposed.dense_macs(4, 5) == 4 * 5 * 4 * 54


def test_parameters_of_the_forms() -> None:
    def count(structure: Structure | KernelForm) -> int:
        layer = StructuredConv2d(16, 24, 3, bias=False, structure=structure)
        return sum(p.numel() for p in layer.parameters())

    assert count(sm.LowRank(5)) == 5 * (24 + 144)
    assert count(sm.nn.Separable(5)) == 5 * (16 * 3 + 24 * 3)
    assert count(sm.nn.Tucker((6, 4))) == 24 * 6 + 6 * 4 * 9 + 4 * 16
    assert count(sm.nn.CP(5)) == 5 * (24 + 16 + 3 + 3)
    assert count(sm.nn.CP(5, joint=True)) == 5 * (24 + 16 + 9)
    assert count(sm.nn.KroneckerKernel(2, KernelSizes((6, 4, 1, 1), (4, 4, 3, 3)))) == 2 * (24 + 144)
    for form in (sm.nn.Separable(0.3), sm.nn.Tucker(0.3), sm.nn.CP(0.3), sm.LowRank(0.3), sm.nn.KroneckerKernel(0.3)):
        assert 0.2 * 24 * 144 < count(form) <= 0.3 * 24 * 144, form


class Storages(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key and key not in self.seen and size and not tensor._is_view():
                    self.seen.add(key)
                    self.held += size
                    self.most = max(self.most, self.held)
                    weakref.finalize(storage, self._forget, key, size)
        return made

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


def peak(run: Callable[[], object]) -> int:
    with Storages() as mode:
        run()
    return mode.most


@pytest.mark.parametrize(
    ("structure", "maps"),
    [
        (sm.LowRank(4), 1.5),
        (sm.BlockDiagonal(4), 1.0),
        (sm.nn.Separable(4), 1.5),
        (sm.nn.Tucker((4, 4)), 1.75),
        (sm.nn.CP(8), 2.0),
        (sm.nn.KroneckerKernel(1, KernelSizes((4, 4, 1, 1), (4, 4, 3, 3))), 4.0),
    ],
    ids=str,
)
def test_memory_is_that_of_a_few_maps(structure: Structure | KernelForm, maps: float) -> None:
    """Patches written out would take 9 maps of 16 channels."""
    layer = StructuredConv2d(16, 16, 3, padding=1, structure=structure)
    x = torch.randn(4, 16, 32, 32)
    with torch.no_grad():
        most = peak(lambda: layer(x))
    assert most <= 1.05 * maps * x.numel() * x.element_size() + 8 * layer.kernel.numel()


KERNELS = "structmat.nn.convolution.base.KERNEL_ROWS"


@pytest.mark.parametrize("structure", [sm.Sparse(density=0.3), sm.Circulant(), sm.SparsePlusLowRank(1, 0.2)], ids=str)
@pytest.mark.parametrize("which", range(4))
def test_a_kernel_written_out_is_the_product_with_patches(
    structure: Structure, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, sizes = (
        (StructuredConv2d(6, 4, 3, 2, 1, 2, groups=2, structure=structure, order=TAPS_FIRST), (7, 6)),
        (StructuredConv1d(4, 6, 3, padding=1, padding_mode="reflect", structure=structure), (9,)),
        (StructuredConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, structure=structure), (5, 4)),
        (StructuredConvTranspose1d(4, 6, 4, 3, bias=False, structure=structure), (5,)),
    )[which]
    layer.double()
    assert not layer.is_lowered
    x = torch.randn(3, layer.in_channels, *sizes, dtype=torch.float64)
    found = []
    for rows in (0, 10**9):
        monkeypatch.setattr(KERNELS, rows)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for written, patches in zip(*found, strict=True):
        torch.testing.assert_close(written, patches)
    torch.testing.assert_close(found[0][0], layer.to_conv()(x))


def test_large_calls_of_sparse_convolutions_write_the_kernel_and_no_patches() -> None:
    layer = StructuredConv2d(16, 16, 3, padding=1, structure=sm.Sparse(density=0.05))
    x = torch.randn(16, 16, 32, 32)
    size = x.numel() * x.element_size()
    assert "From 64 places a call on" in layer.explain()
    with torch.no_grad():
        assert peak(lambda: layer(x)) <= 1.1 * size, "the outcome alone"
        small = peak(lambda: layer(x[:1, :, :7, :7]))
    assert small >= 9 * 16 * 49 * x.element_size(), "49 places: patches"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert "From" not in StructuredConv2d(16, 16, 3, structure=sm.LowRank(2)).explain()


def test_patches_are_written_out_for_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KERNELS, 10**9)
    layer = StructuredConv2d(16, 16, 3, padding=1, structure=sm.Sparse(density=0.05))
    assert not layer.is_lowered
    x = torch.randn(64, 16, 32, 32, requires_grad=True)
    size = x.numel() * x.element_size()  # the patches take nine times as much
    with torch.no_grad():
        half, full = (peak(lambda n=n: layer(x[:n])) for n in (32, 64))  # type: ignore[misc]
    assert half > size / 2, "the memory is seen"
    assert full - half <= 1.1 * size, "of the other images only the outcome: in parts, and put together"
    with Storages() as mode:
        y = layer(x)
        held = mode.held
    assert held <= 2.1 * size, "patches are not kept for the backward pass"
    (gradient,) = torch.autograd.grad(y.square().sum(), [x])
    (expected,) = torch.autograd.grad(layer.to_conv()(x).square().sum(), [x])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("structure", "order"),
    [
        (sm.LowRank(1), None),
        (sm.nn.Separable(1), None),
        (sm.nn.CP(1), None),
        (sm.nn.Tucker((1, 2)), None),
        (sm.Chain(((9, 1, 2, 1), (1, 1, 9, 1))), TAPS_FIRST),
        (sm.Sparse(nonzeros=5), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True], ids=["forwards", "transposed"])
def test_gradients(structure: Structure | KernelForm, order: tuple[int, ...] | None, transposed: bool) -> None:
    kind = StructuredConvTranspose2d if transposed else StructuredConv2d
    layer = kind(4, 2, 3, 2, 1, groups=2, structure=structure, order=order, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return made

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


CONVS: tuple[tuple[type[Layer], nn.Module], ...] = (
    (StructuredConv1d, nn.Conv1d(4, 6, 3, 2, 1, 2, 2, padding_mode="reflect")),
    (StructuredConv2d, nn.Conv2d(4, 6, (3, 2), (2, 1), "valid", groups=2, bias=False)),
    (StructuredConv2d, nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")),
    (StructuredConvTranspose1d, nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2)),
    (StructuredConvTranspose2d, nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), 1, (1, 0), 2, True, 2)),
)


@pytest.mark.parametrize(("kind", "conv"), CONVS, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["channels first", "taps first"])
def test_from_conv_and_back(kind: Any, conv: Any, turned: bool) -> None:
    conv = copy.deepcopy(conv).double().eval()
    order = (*range(1, 1 + kind.dims), 0) if turned else None
    layer = kind.from_conv(conv, sm.Dense(), order=order)
    assert not layer.training
    x = torch.randn(2, 4, *[9] * kind.dims, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    back = layer.to_conv()
    assert repr(back) == repr(conv)
    torch.testing.assert_close(back.weight, conv.weight)
    assert back.training == conv.training
    if conv.bias is not None:
        assert torch.equal(back.bias, conv.bias)
        conv.bias.data.zero_()
        assert float(layer.bias.detach().abs().sum()) > 0, "the layer owns its bias"


@pytest.mark.parametrize(
    "form",
    [
        sm.LowRank(2), sm.nn.Separable(2), sm.nn.Tucker((2, 3)), sm.nn.CP(2), sm.nn.CP(2, joint=True),
        sm.nn.KroneckerKernel(2), sm.BlockDiagonal(2),
    ],
    ids=str,
)  # fmt: skip
def test_members_are_found_again(form: Structure | KernelForm) -> None:
    """The projection of a member's kernel is the member."""
    layer = StructuredConv2d(6, 4, 3, structure=form, dtype=torch.float64)
    again = StructuredConv2d.from_conv(layer.to_conv(), form, sweeps=200)
    torch.testing.assert_close(again.kernel, layer.kernel, rtol=1e-4, atol=1e-5)


def test_tucker_is_no_worse_than_the_higher_order_svd() -> None:
    conv = nn.Conv2d(12, 10, 3, dtype=torch.float64)
    kernel = conv.weight.detach()
    made = StructuredConv2d.from_conv(conv, sm.nn.Tucker((4, 5))).kernel.detach()
    u = torch.linalg.svd(kernel.flatten(1))[0][:, :4]
    v = torch.linalg.svd(kernel.transpose(0, 1).flatten(1))[0][:, :5]
    truncated = torch.einsum("op,pr,iq,qj,rjhw->oihw", u, u.T, v, v.T, kernel)
    error = float((made - kernel).norm())
    assert error < float((truncated - kernel).norm())
    tails = [
        torch.linalg.svdvals(m)[r:].norm() for m, r in ((kernel.flatten(1), 4), (kernel.transpose(0, 1).flatten(1), 5))
    ]
    assert error > max(map(float, tails))


def test_the_second_moment_of_patches_is_weighed() -> None:
    """Inputs in a subspace of patches: what the layer does on them is kept exactly by a low rank."""
    conv = nn.Conv2d(3, 8, 3, dtype=torch.float64)
    x = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    x[:, 1] = torch.randn(2, 1, 1, dtype=torch.float64)  # constant images of one channel: patches of rank 1
    patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    for order in (None, TAPS_FIRST, (2, 0, 1)):
        layer = StructuredConv2d.from_conv(conv, sm.LowRank(1), patches.T @ patches, order=order)
        torch.testing.assert_close(layer(x), conv(x))
    with pytest.raises(ShapeError, match=r"has shape \(27, 27\); got \(3, 3\)"):
        StructuredConv2d.from_conv(conv, sm.LowRank(1), torch.eye(3))


def test_second_moments_of_groups() -> None:
    conv = nn.Conv1d(4, 6, 2, groups=2, dtype=torch.float64)
    moments = torch.zeros(2, 4, 4, dtype=torch.float64)
    moments[0, 0, 0] = moments[1, 3, 3] = 1.0  # group 0 meets its first number alone, group 1 its last
    layer = StructuredConv1d.from_conv(conv, sm.LowRank(1), moments)
    torch.testing.assert_close(layer.kernel[:3, 0, 0], conv.weight[:3, 0, 0])
    torch.testing.assert_close(layer.kernel[3:, 1, 1], conv.weight[3:, 1, 1])
    assert len(layer.matrices) == 2
    with pytest.raises(StructureError, match="2 groups"):
        _ = layer.matrix


def test_state_names_and_shapes() -> None:
    plain = StructuredConv2d(4, 6, 3, structure=sm.LowRank(2))
    assert {n: tuple(t.shape) for n, t in plain.state_dict().items()} == {
        "left": (6, 2),
        "right": (2, 36),
        "bias": (6,),
    }
    grouped = StructuredConv2d(4, 6, 3, groups=2, bias=False, structure=sm.PivotedLowRank(2))
    assert {n: tuple(t.shape) for n, t in grouped.named_buffers()} == {"places": (2, 18)}
    other = StructuredConv2d(4, 6, 3, groups=2, bias=False, structure=sm.PivotedLowRank(2))
    other.load_state_dict(grouped.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(other(x), grouped(x))
    assert torch.equal(copy.deepcopy(grouped)(x), grouped(x))
    assert plain.matrix.shape == (6, 36)
    torch.testing.assert_close(plain.matrix.to_dense().view(6, 4, 3, 3), plain.kernel)


@pytest.mark.parametrize("structure", [sm.LowRank(2), sm.nn.Separable(2), sm.Butterfly()], ids=str)
def test_dtypes_and_devices(structure: Structure | KernelForm) -> None:
    layer = StructuredConv2d(4, 4, 3, structure=structure, dtype=torch.bfloat16)
    x = torch.randn(2, 4, 6, 6)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer.float()(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    meta = StructuredConv2d(4, 4, 3, groups=2, structure=sm.LowRank(2), device="meta")
    assert meta(torch.empty(2, 4, 6, 6, device="meta")).shape == (2, 4, 4, 4)
    with pytest.raises(StructureError, match="complex64"):
        StructuredConv2d(4, 4, 3, structure=structure, dtype=torch.complex64)


def test_the_start_has_the_variance_of_a_dense_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 12, 12, generator=generator)
    reference = float(nn.Conv2d(32, 64, 3, bias=False)(x).detach().var())
    for structure in (sm.LowRank(16), sm.Monarch(4, 4), sm.nn.Separable(16), sm.nn.Tucker((24, 24)), sm.nn.CP(64)):
        layer = StructuredConv2d(32, 64, 3, bias=False, structure=structure, generator=generator)
        assert 0.6 < float(layer(x).detach().var()) / reference < 1.6, structure
    bias = StructuredConv2d(4, 4000, 2, structure=sm.LowRank(1), generator=generator).bias
    assert bias is not None
    assert 0.24 < float(bias.detach().abs().max()) <= 0.25
    again = [
        StructuredConv2d(4, 6, 3, groups=2, structure=sm.LowRank(1), generator=torch.Generator().manual_seed(3))
        for _ in "ab"
    ]
    assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), again[1].parameters(), strict=True))
    first, second = again[0].matrices
    assert not torch.equal(first.to_dense(), second.to_dense())


def test_optimizer_groups_are_those_of_the_unfolded_kernel() -> None:
    linear = sm.nn.StructuredLinear(36, 6, structure=sm.LowRank(2))
    for kind in (StructuredConv2d, StructuredConvTranspose2d):
        layer = kind(8, 12, 3, groups=2, structure=sm.LowRank(2))
        assert layer.unfolded_shape == (6, 36)
        rates = [
            {name: group["lr"] for name, p in module.named_parameters() for group in groups if p is group["params"][0]}
            for module in (linear, layer)
            for groups in [sm.parameter_groups(module, lr=0.1, weight_decay=0.1)]
        ]
        assert rates[0] == rates[1]
        assert rates[0]["left"] != rates[0]["right"]


def test_output_size_of_a_transposed_layer() -> None:
    layer = StructuredConvTranspose2d(2, 3, 3, 2, structure=sm.LowRank(2), dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert layer(x, [10, 9]).shape == (1, 3, 10, 9)
    torch.testing.assert_close(layer(x, [1, 3, 10, 9]), dense(layer, x, [10, 9]))
    with pytest.raises(ShapeError, match=r"between \(9, 9\) and \(10, 10\)"):
        layer(x, [11, 9])


def test_explain_says_what_runs() -> None:
    text = StructuredConv2d(16, 8, 3, stride=2, structure=sm.LowRank(2)).explain(9, 9)
    assert "1. Contraction (1, 2, 144, 1): convolution 3 x 3, 16 -> 2 channels, stride 2 x 2" in text
    assert "2. Contraction (1, 8, 2, 1): convolution 1 x 1, 2 -> 8 channels" in text
    assert "An input of 9 x 9: 4864 multiply-adds, 26.4% of the dense layer's" in text
    assert "patches, written out" in StructuredConv2d(16, 8, 3, structure=sm.Sparse(0.1)).explain()
    assert "in 4 groups" in StructuredConv2d(16, 8, 3, structure=sm.BlockDiagonal(4)).explain()
    each = StructuredConv2d(16, 9, 3, structure=sm.BlockDiagonal(9), order=TAPS_FIRST).explain()
    assert "one for each of 9 taps" in each
    layer = StructuredConv2d(16, 8, 3, padding="same", dilation=2, groups=2, structure=sm.LowRank(2), order=TAPS_FIRST)
    assert "padding='same', dilation=(2, 2), groups=2, order=(1, 2, 0), structure=LowRank(rank=2)" in repr(layer)


def test_bad_arguments_are_clear_errors() -> None:
    with pytest.raises(ShapeError, match="not 3 equal groups"):
        StructuredConv2d(4, 6, 3, groups=3, structure=sm.LowRank(1))
    with pytest.raises(ShapeError, match="stride of 1"):
        StructuredConv2d(4, 6, 3, 2, padding="same", structure=sm.LowRank(1))
    with pytest.raises(ShapeError, match="neither a number"):
        StructuredConv2d(4, 6, 3, padding="full", structure=sm.LowRank(1))
    with pytest.raises(ShapeError, match="none of zeros"):
        StructuredConv2d(4, 6, 3, padding_mode="mirror", structure=sm.LowRank(1))
    with pytest.raises(ShapeError, match="kernel_size"):
        StructuredConv2d(4, 6, (3, 3, 3), structure=sm.LowRank(1))
    with pytest.raises(StructureError, match="no permutation"):
        StructuredConv2d(4, 6, 3, structure=sm.LowRank(1), order=(0, 1))
    with pytest.raises(StructureError, match="brings its own order"):
        StructuredConv2d(4, 6, 3, structure=sm.nn.CP(1), order=TAPS_FIRST)
    with pytest.raises(ShapeError, match="Use LowRank"):
        StructuredConv1d(4, 6, 3, structure=sm.nn.Separable(1))
    with pytest.raises(ShapeError, match="share an axis"):
        StructuredConv2d(4, 4, 4, structure=sm.nn.KroneckerKernel(1, KernelSizes((2, 2, 2, 2), (2, 2, 2, 2))))
    with pytest.raises(ShapeError, match="already take"):
        StructuredConv2d(4, 4, 3, structure=sm.nn.Tucker(0.05))
    with pytest.raises(ShapeError, match="output_padding"):
        StructuredConvTranspose2d(4, 4, 3, output_padding=1, structure=sm.LowRank(1))
    layer = StructuredConv2d(4, 6, 3, structure=sm.LowRank(1))
    with pytest.raises(ShapeError, match=r"takes \(batch, 4, height, width\)"):
        layer(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ShapeError, match="too small"):
        layer(torch.zeros(1, 4, 2, 5))


@pytest.mark.parametrize("structure", [sm.LowRank(2), sm.nn.CP(2), sm.Butterfly()], ids=str)
def test_layers_compile_and_export(structure: Structure | KernelForm) -> None:
    layer = StructuredConv2d(4, 6, 3, 2, 1, structure=structure)
    x = torch.randn(2, 4, 7, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(("rank", "match"), [((1,), "2 interfaces"), ((1, 100), "at most"), ((0, 1), "at least 1")])
def test_tensor_trains_take_a_rank_an_interface(rank: tuple[int, ...], match: str) -> None:
    with pytest.raises((ShapeError, StructureError), match=match):
        sm.StructuredMatrix.random(sm.TensorTrain(rank), (8, 27))
    given = sm.TensorTrain((2, 3))
    assert count_parameters(given, (8, 27)) == 2 * 3 * 2 + 2 * 2 * 3 * 3 + 3 * 2 * 3
    assert sm.structures.from_json(sm.structure.to_json(given)) == given

"""Convolutions of one and two dimensions, forwards and transposed: the unfolded kernel of each group is a matrix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from structmat.compression.layers.base import Content, Described, Layer, Load, Members
from structmat.compression.timing import LAYER_SECONDS, interleaved
from structmat.errors import ModelError, ShapeError
from structmat.matrix import StructuredMatrix
from structmat.nn.convolution import (
    CP,
    KernelForm,
    KroneckerKernel,
    Separable,
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
    Tucker,
)
from structmat.program import build, cost
from structmat.structure import Shape, Structure, count_stored, largest_fitting, resolve
from structmat.structures.dense import Dense
from structmat.structures.reordered import Reordered
from structmat.structures.tensor_train import TensorTrain

Conv = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
Structured = StructuredConv1d | StructuredConv2d | StructuredConvTranspose1d | StructuredConvTranspose2d

_CLASSES: tuple[tuple[type[Conv], type[Structured]], ...] = (
    (nn.Conv1d, StructuredConv1d),
    (nn.Conv2d, StructuredConv2d),
    (nn.ConvTranspose1d, StructuredConvTranspose1d),
    (nn.ConvTranspose2d, StructuredConvTranspose2d),
)


@dataclass(frozen=True)
class Convolution:
    """What the cost of a convolution depends on."""

    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]

    def dense(self) -> nn.Module:
        """The layer, without values."""
        options = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
            "bias": False,
            "device": "meta",
        }
        if self.kind.startswith("ConvTranspose"):
            options["output_padding"] = self.output_padding
        made: nn.Module = getattr(nn, self.kind)(self.in_channels, self.out_channels, self.kernel, **options)
        return made


@final
class ConvolutionLayer(Layer):
    """The unfolded kernels of the groups; rows are patches, one for each place of the output."""

    kinds = tuple(dense.__name__ for dense, _ in _CLASSES)
    form_names = ("Bottleneck", "CP", "KroneckerKernel", "Separable", "Tucker")

    def kind(self, module: nn.Module) -> str | None:
        return next((dense.__name__ for dense, _ in _CLASSES if isinstance(module, dense)), None)

    def is_structured(self, module: nn.Module) -> bool:
        return isinstance(module, Structured)

    def refusal(self, module: nn.Module) -> str | None:
        _, shape = self.shape(module)
        if min(shape) < 2:
            return f"each group has a matrix of shape {shape}, which has no structure to find"
        return None

    def doubt(self, module: nn.Module) -> str | None:
        dense = next(dense for dense, _ in _CLASSES if isinstance(module, dense))
        for name in ("forward", "_conv_forward", "_output_padding"):  # the latter two are called by the first
            if getattr(type(module), name, None) is not getattr(dense, name, None):
                return f"{type(module).__name__} has a {name} of its own"
        return None

    def shape(self, module: nn.Module) -> tuple[int, Shape]:
        conv = _dense(module)
        taps = math.prod(conv.kernel_size)
        return conv.groups, (conv.out_channels // conv.groups, conv.in_channels // conv.groups * taps)

    def detail(self, module: nn.Module) -> Hashable:
        conv = _dense(module)
        return Convolution(
            self.kind(module) or "",
            conv.in_channels,
            conv.out_channels,
            tuple(conv.kernel_size),
            tuple(conv.stride),
            conv.padding if isinstance(conv.padding, str) else tuple(conv.padding),
            tuple(conv.dilation),
            conv.groups,
            conv.padding_mode,
            tuple(conv.output_padding),
        )

    def matrices(self, module: nn.Module) -> Tensor:
        return _twin(module).unfold(_dense(module).weight)

    def assign(self, module: nn.Module, matrices: Tensor) -> None:
        with torch.no_grad():
            _dense(module).weight.copy_(_twin(module).fold(matrices))

    def rows(self, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
        return (module if isinstance(module, Structured) else _twin(module)).patches(x)

    def output_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        return _twin(module).output_rows(y)

    def sizes(self, module: nn.Module, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[-len(_dense(module).kernel_size) :])

    def overlap(self, module: nn.Module) -> int:
        return math.prod(_dense(module).kernel_size)

    def build(self, module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
        conv = _dense(module)
        return _like(conv, matrices[0].structure, dtype=conv.weight.dtype).load(matrices, conv.bias)

    def empty(self, module: nn.Module, structure: Structure, dtype: torch.dtype, **more: Any) -> nn.Module:
        dense = _bare(module) if isinstance(module, Structured) else _dense(module)
        return _like(dense, structure, order=more.get("order"), dtype=dtype)

    def content(self, module: nn.Module) -> Content:
        layer = _structured(module)
        return Content(layer.structure, layer.unfolded_shape, layer.groups, layer.matrices[0].dtype)

    def saved(self, module: nn.Module) -> Mapping[str, Any]:
        return {"order": list(_structured(module).axis_order)}

    def longest_saved(self) -> Mapping[str, Any]:
        return {"order": [0, 1, 2]}

    def to_dense(self, module: nn.Module) -> nn.Module:
        layer = _structured(module)
        conv = layer.to_conv()
        required = [p.requires_grad for n, p in layer.named_parameters() if n != "bias"]
        conv.get_parameter("weight").requires_grad_(any(required))
        if layer.bias is not None:
            conv.get_parameter("bias").requires_grad_(layer.bias.requires_grad)
        return conv

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module:
        return _structured(module).freeze(rows)

    def forms(self, site: Described) -> Mapping[str, Members]:
        detail = site.detail
        assert isinstance(detail, Convolution), site
        out, taps = site.shape[0], math.prod(detail.kernel)
        if taps == 1:
            return {}
        return {
            "Bottleneck": lambda most: _bottlenecks(out, detail, most),
            "CP": lambda most: _fractions((CP(_share(site, most)), CP(_share(site, most), joint=True)), out, detail),
            "KroneckerKernel": lambda most: _fractions((KroneckerKernel(_share(site, most)),), out, detail),
            "Separable": lambda most: _fractions((Separable(_share(site, most)),), out, detail),
            "Tucker": lambda most: _tuckers(out, detail, most),
        }

    def flops(self, site: Described, structure: Structure, load: Load) -> float:
        plain = site.copies * cost(build(structure, site.shape)).flops * load.rows
        return plain * _lowering(cast(Convolution, site.detail), structure, load.sizes) if load.sizes else plain

    def microseconds(self, site: Described, structure: Structure, load: Load, samples: int) -> float:
        detail = cast(Convolution, site.detail)
        sizes = load.sizes or tuple(4 * size for size in detail.kernel)
        return _microseconds(detail, structure, sizes, samples)


def _dense(module: nn.Module) -> Conv:
    if not isinstance(module, Conv):
        raise ModelError(f"A {type(module).__name__} is no convolution of one or two dimensions.")
    return module


def _structured(module: nn.Module) -> Structured:
    if not isinstance(module, Structured):
        raise ModelError(f"A {type(module).__name__} is no structured convolution.")
    return module


def _like(conv: Conv, structure: Structure, **options: Any) -> Structured:
    own: Any = next(own for dense, own in _CLASSES if isinstance(conv, dense))
    made: Structured = own.like(conv, structure, **options)
    return made


def _twin(module: nn.Module) -> Structured:
    """Knows how the kernel of a dense layer is unfolded and what its patches are; has no values."""
    return module if isinstance(module, Structured) else _like(_dense(module), Dense())


def _bare(layer: Structured) -> Conv:
    """The dense layer of the geometry of a structured one, without values."""
    kind = next(dense.__name__ for dense, own in _CLASSES if isinstance(layer, own))
    detail = Convolution(
        kind,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        layer.output_padding,
    )
    made = _dense(detail.dense())
    if layer.bias is not None:
        made.bias = nn.Parameter(torch.empty(layer.out_channels, device="meta"))
    return made


# ------------------------------------------------------------------------------------------------------------ forms


def _share(site: Described, most: int) -> float:
    return min(max(most / (site.shape[0] * site.shape[1]), 1e-9), 1 - 1e-9)


def _fractions(forms: Sequence[KernelForm], out: int, detail: Convolution) -> Iterator[Structure]:
    """Forms whose size is a fraction, as structures of the unfolded kernel; those that can't be so small are left
    out."""
    inputs = detail.in_channels // detail.groups
    shape = (out, inputs * math.prod(detail.kernel))
    for form in forms:
        try:
            structure, order = form.unfolded(out, inputs, detail.kernel)
            yield resolve(_ordered(structure, (inputs, *detail.kernel), order), shape)
        except ShapeError:
            continue


def _ordered(structure: Structure, sizes: tuple[int, ...], order: tuple[int, ...]) -> Structure:
    """A structure of the index in an order of (channels, *kernel), as one of the index in its usual order."""
    return structure if order == tuple(range(len(sizes))) else Reordered(structure, sizes, order)


PROPORTIONS = (1.0, 0.5, 2.0)
"""Of the share of outputs that a Tucker form keeps to that of the inputs."""


def _tuckers(out: int, detail: Convolution, most: int) -> Iterator[Structure]:
    """Tucker-2 forms with their ranks in several proportions."""
    inputs = detail.in_channels // detail.groups
    taps = math.prod(detail.kernel)
    shape = (out, inputs * taps)
    seen = set()
    for proportion in PROPORTIONS:

        def pair(size: int, proportion: float = proportion) -> tuple[int, int]:
            p = max(1, min(out, round(size * proportion**0.5 * out / max(out, inputs))))
            q = max(1, min(inputs, round(size * proportion**-0.5 * inputs / max(out, inputs))))
            return min(p, q * taps), min(q, p * taps)

        def made(ranks: tuple[int, int]) -> Structure:
            structure, order = Tucker(ranks).unfolded(out, inputs, detail.kernel)
            return _ordered(structure, (inputs, *detail.kernel), order)

        size = largest_fitting(lambda s: count_stored(made(pair(s)), shape), most, 2 * max(out, inputs), 1)
        if size and pair(size) not in seen:
            seen.add(pair(size))
            yield resolve(made(pair(size)), shape)


def _bottlenecks(out: int, detail: Convolution, most: int) -> Iterator[Structure]:
    """A 1 x 1 convolution to few channels, then the kernel on these: low rank on the side of the inputs, as a train
    of two cores."""
    inputs = detail.in_channels // detail.groups
    taps = math.prod(detail.kernel)
    rank = min(most // (out * taps + inputs), inputs)
    if rank >= 1:
        inner = TensorTrain((rank,), 2, (out, 1), (taps, inputs))
        order = (*range(1, 1 + len(detail.kernel)), 0)
        yield resolve(Reordered(inner, (inputs, *detail.kernel), order), (out, inputs * taps))


# ------------------------------------------------------------------------------------------------------------ costs


@lru_cache(maxsize=65536)
def _lowering(detail: Convolution, structure: Structure, sizes: tuple[int, ...]) -> float:
    """Multiply-adds as it runs, by those of the program at every place of the output."""
    layer = _like(_dense(detail.dense()), structure)
    rows = math.prod(layer.out_sizes(sizes)) * layer.groups
    plain = rows * cost(build(structure, layer.unfolded_shape)).macs
    return layer.macs(*sizes) / plain if plain else 1.0


@lru_cache(maxsize=16384)
def _microseconds(detail: Convolution, structure: Structure, sizes: tuple[int, ...], samples: int) -> float:
    """The time of one float32 layer, frozen, on the CPU: as
    :func:`structmat.compression.timing.layer_microseconds`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, detail.in_channels, *sizes, generator=generator)
    dense = replace_values(detail.dense(), generator)
    with torch.inference_mode():
        if isinstance(structure, Dense):
            first, second = interleaved(lambda: dense(x), lambda: dense(x), seconds=LAYER_SECONDS)
            return 1e6 * statistics.median(first + second)
        twin = _like(_dense(detail.dense()), structure)
        matrices = [
            StructuredMatrix.random(structure, twin.unfolded_shape, generator=generator) for _ in range(detail.groups)
        ]
        layer = twin.load(matrices, None).freeze()
        first, second = interleaved(lambda: dense(x), lambda: layer(x), seconds=LAYER_SECONDS)
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return ratio * _microseconds(detail, Dense(), sizes, samples)


def replace_values(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module from the meta device with values on the CPU."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module

"""Convolutions by the entries of their kernels alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structmat.kernels.convolve import Along, Steps, convolve, convolved, is_available
from structmat.nn.convolution.geometry import Geometry

if TYPE_CHECKING:
    from structmat.nn.convolution.base import StructuredConvolution

MOST = 0.6
"""Of a kernel's numbers that may be entries: with more the dense kernel was faster wherever it was measured."""


class EntriesConvolution(nn.Module):
    """A convolution with fixed tensors whose kernel is mostly zeros: no others are multiplied.

    Args:
        kernel: (out, in / groups, *kernel), with its zeros.
        bias: (out,) or None.
        geometry: padded by equally many on both sides.
        groups: of the channels.
    """

    values: Tensor
    start: Tensor
    column: Tensor
    bias: Tensor | None

    def __init__(self, kernel: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> None:
        super().__init__()
        self.geometry, self.groups = geometry, groups
        self.kernel_shape = tuple(kernel.shape)
        rows = kernel.flatten(1)
        row, column = rows.nonzero(as_tuple=True)
        start = torch.zeros(len(rows) + 1, dtype=torch.int32)
        start[1:] = torch.bincount(row, minlength=len(rows)).cumsum(0)
        self.register_buffer("values", rows[row, column])
        self.register_buffer("start", start)
        self.register_buffer("column", column.to(torch.int32))
        self.register_buffer("bias", bias)
        after = geometry.after_padding
        each = zip(after.kernel, after.stride, after.padding, after.dilation, strict=True)
        axes = [Along(size, stride, padding[0], dilation) for size, stride, padding, dilation in each]
        self._steps = Steps([convolved(kernel.shape, groups, axes, by_entries=True)])

    @property
    def size(self) -> int:
        """Numbers of the dense kernel."""
        return math.prod(self.kernel_shape)

    @property
    def kernel(self) -> Tensor:
        """Written out."""
        made = self.values.new_zeros(self.kernel_shape)
        rows, count = torch.arange(len(made), device=made.device), len(self.values)
        row = torch.repeat_interleave(rows, self.start.diff(), output_size=count)  # which graphs must know
        made.flatten(1)[row, self.column.long()] = self.values
        return made

    def forward(self, input: Tensor) -> Tensor:
        """As of the layer with this kernel."""
        dims = self.geometry.dims
        if input.dim() == 1 + dims:
            y: Tensor = self(input.unsqueeze(0))[0]
            return y
        input = self.geometry.padded(input)
        found = convolve(self._steps, [self.values, self.start, self.column], input, self.bias)
        if found is not None:
            return found
        return self.geometry.after_padding.convolve(input, self.kernel, self.bias, self.groups, range(dims))

    def extra_repr(self) -> str:
        return f"{self.values.numel()} of {self.size} numbers of the kernel"


def by_entries(layer: StructuredConvolution[Any]) -> EntriesConvolution | None:
    """A layer by the entries of its kernel, where the native backend has a kernel for that and they are few."""
    even = all(before == after for before, after in layer.geometry.after_padding.padding)
    if layer.is_transposed or not even or not is_available():
        return None
    with torch.no_grad():
        kernel = layer.to_conv().weight.detach()
    if not kernel.is_cpu or kernel.dtype not in (torch.float32, torch.float64):
        return None
    if int(kernel.count_nonzero()) > MOST * kernel.numel():
        return None
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return EntriesConvolution(kernel, bias, layer.geometry, layer.groups)

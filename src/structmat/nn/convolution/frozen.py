"""The form of convolutions for deployment."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from structmat.kernels.convolve import is_available
from structmat.nn.convolution.entries import by_entries
from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.nn.convolution.base import StructuredConvolution

_FEW = 0.35
"""Of a kernel's numbers that are entries, up to which multiplying by these alone was faster for batches of any size."""


class FrozenConvolution(nn.Module):
    """A convolution with fixed tensors: what ``freeze`` of a structured one returns. Called like that one.

    Args:
        layer: the structured convolution, which is copied.
    """

    def __init__(self, layer: StructuredConvolution[Any]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.output_padding = layer.padding, layer.padding_mode, layer.output_padding
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        self.entries = None if layer.is_lowered else by_entries(layer)
        self.dense: nn.Module | None = None
        if self.entries is not None:
            self.hold_dense(self.entries.values.numel() > _FEW * self.entries.size)
        else:
            sizes = [size * 4 for size in layer.kernel_size]
            self.hold_dense(not layer.is_lowered or layer.macs(*sizes) >= layer.dense_macs(*sizes))
        self.eval()

    @property
    def structured(self) -> nn.Module:
        """What runs where the dense kernel does not."""
        return self.layer if self.entries is None else self.entries

    @property
    def is_native(self) -> bool:
        """Whether that is the native backend."""
        return self.entries is not None or (self.layer.is_chain and is_available())

    def hold_dense(self, hold: bool = True) -> None:
        """Multiply by the dense kernel, or no longer."""
        dense = self.layer.to_conv() if hold else None
        if dense is not None and not self.layer.is_transposed:  # which runs natively where that is faster
            dense = type(self.layer).from_conv(dense, Dense())
        self.dense = None if dense is None else dense.requires_grad_(False)

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Tensor:
        """As of the layer that was frozen."""
        own = self._modules  # a module as an attribute takes half a microsecond
        run = own.get("dense") or own.get("entries") or own["layer"]
        y: Tensor = run(input, *more, **named)  # type: ignore[misc]
        return y

    def extra_repr(self) -> str:
        return "dense kernel" if self.dense is not None else "entries" if self.entries is not None else ""

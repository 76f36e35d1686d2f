"""The form of convolutions for deployment."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.nn.convolution.base import StructuredConvolution


class FrozenConvolution(nn.Module):
    """A convolution with fixed tensors: what ``freeze`` of a structured one returns. Called like that one.

    Args:
        layer: the structured convolution, which is copied.
    """

    def __init__(self, layer: StructuredConvolution[Any]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        self.dense: nn.Module | None = None
        sizes = [size * 4 for size in layer.kernel_size]
        self.hold_dense(not layer.is_lowered or layer.macs(*sizes) >= layer.dense_macs(*sizes))
        self.eval()

    def hold_dense(self, hold: bool = True) -> None:
        """Multiply by the dense kernel, or no longer."""
        dense = self.layer.to_conv() if hold else None
        if dense is not None and not self.layer.is_transposed:  # few images run natively then
            dense = type(self.layer).from_conv(dense, Dense())
        self.dense = None if dense is None else dense.requires_grad_(False)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """As of the layer that was frozen."""
        dense = self._modules.get("dense")  # a module as an attribute takes half a microsecond
        y: Tensor = (self._modules["layer"] if dense is None else dense)(x, *more, **named)  # type: ignore[misc]
        return y

    def extra_repr(self) -> str:
        return "dense kernel" if self.dense is not None else ""

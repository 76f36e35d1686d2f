"""Layers made of matrices: convolutions whose kernel is one matrix or one a tap, and fused projections taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from structmat.errors import ModelError, ShapeError

Pair = tuple[int, int]


class MatrixConv2d(nn.Module):
    """A convolution (groups of 1, zero padding) whose kernel is made of matrices that are layers of any kind.

    Two forms: one matrix (out, taps * in) on unfolded inputs, tap after tap, so that a window of its columns covers
    whole taps and then channels; or one matrix (out, in) for each tap, whose outputs are added up. The bias is apart.

    Args:
        matrices: one layer that maps (..., taps * in) to (..., out), or one a tap that maps (..., in) to (..., out).
        in_channels, out_channels: of the convolution.
        kernel_size, stride, padding, dilation: as of ``nn.Conv2d``, pairs.
        bias: (out,) or None.

    Raises:
        ShapeError: the number of matrices is neither 1 nor that of the taps.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        matrices: Sequence[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        taps = kernel_size[0] * kernel_size[1]
        if len(matrices) not in (1, taps):
            raise ShapeError(f"A kernel of {taps} taps is one matrix or {taps} of them; got {len(matrices)}.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.matrices = nn.ModuleList(matrices)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach().clone())

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, make: Callable[[nn.Linear], nn.Module] | None = None, *, taps: bool = False
    ) -> MatrixConv2d:
        """The same convolution, its matrices as ``make(linear)`` of dense ones: ``StructuredLinear.from_linear`` with a
        structure, for instance. As ``nn.Linear`` if None, which :class:`structmat.learn.WindowLearner` replaces.

        Args:
            conv: with groups of 1 and zero padding.
            make: from an ``nn.Linear`` without bias.
            taps: one matrix a tap instead of one in all.

        Raises:
            ModelError: the convolution has groups, or pads otherwise.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ModelError(
                f"A Conv2d with groups={conv.groups}, padding_mode={conv.padding_mode!r}, padding={conv.padding!r} is "
                "not made of matrices here. Give groups=1, zeros and numbers, or one convolution a group."
            )
        kernel = conv.weight.detach().permute(2, 3, 0, 1)  # (height, width, out, in)
        out, inputs = conv.out_channels, conv.in_channels
        count = kernel.shape[0] * kernel.shape[1]
        parts = kernel.reshape(count, out, inputs)
        weights = list(parts) if taps else [parts.permute(1, 0, 2).reshape(out, count * inputs)]
        layers = [_linear(weight) for weight in weights]
        made = layers if make is None else [make(layer) for layer in layers]
        return cls(
            made,
            inputs,
            out,
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=_pair(conv.padding),
            dilation=_pair(conv.dilation),
            bias=conv.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height', width')."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(
                f"The input has shape {tuple(x.shape)}; a convolution takes (batch, {self.in_channels}, height, width)."
            )
        size = [
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        ]
        if min(size) < 1:
            raise ShapeError(
                f"A kernel of size {self.kernel_size} is larger than the padded input of shape {tuple(x.shape)}."
            )
        columns = nn.functional.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        count = self.kernel_size[0] * self.kernel_size[1]
        rows = columns.view(x.shape[0], self.in_channels, count, -1).permute(0, 3, 2, 1)  # (batch, places, taps, in)
        if len(self.matrices) == 1:
            y: Tensor = self.matrices[0](rows.flatten(2))
        else:
            y = torch.stack([layer(rows[:, :, tap]) for tap, layer in enumerate(self.matrices)]).sum(0)
        if self.bias is not None:
            y = y + self.bias
        return y.transpose(1, 2).reshape(x.shape[0], self.out_channels, *size)


def _pair(value: int | tuple[int, ...]) -> Pair:
    pair = (value, value) if isinstance(value, int) else value
    return int(pair[0]), int(pair[1])


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    out, inputs = weight.shape
    layer = nn.Linear(inputs, out, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class FusedLinear(nn.Module):
    """Several linear layers of one input, their outputs one after the other: a fused projection taken apart.

    Windows of a fused matrix of queries, keys and values would straddle them, so each is a layer of its own.

    Args:
        parts: layers of the same ``in_features``.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @classmethod
    def from_linear(cls, linear: nn.Linear, sizes: int | Sequence[int]) -> FusedLinear:
        """A dense layer taken apart into so many equal parts, or parts of these numbers of outputs.

        Raises:
            ShapeError: the parts do not make up the outputs.
        """
        out = linear.out_features
        if isinstance(sizes, int):
            if sizes < 1 or out % sizes:
                raise ShapeError(f"{out} outputs are not {sizes} equal parts. Give the size of each part.")
            sizes = [out // sizes] * sizes
        if sum(sizes) != out or min(sizes) < 1:
            raise ShapeError(f"Parts of {tuple(sizes)} outputs are {sum(sizes)} in all; the layer has {out}.")
        biases: list[Tensor | None] = [None] * len(sizes)
        if isinstance(linear.bias, Tensor):
            biases = list(linear.bias.detach().split(list(sizes)))
        weights = linear.weight.detach().split(list(sizes))
        return cls([_linear(w, b) for w, b in zip(weights, biases, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., in_features) to (..., sum of the parts' outputs)."""
        return torch.cat([part(x) for part in self.parts], -1)

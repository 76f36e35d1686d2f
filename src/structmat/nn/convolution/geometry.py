"""Where a convolution reads: kernel, stride, padding and dilation along each axis, forwards or transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from structmat.errors import ShapeError

Sizes = tuple[int, ...]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """The taps of a kernel at every place of the output. A *tap* is one place of the kernel.

    At place ``p`` of an axis, tap ``t`` reads ``x[p * stride + t * dilation - before]``; of a transposed convolution it
    reads ``x[q]`` with ``q * stride = p + before - t * dilation``, and zero where there is no such ``q``.

    Args:
        kernel, stride, dilation: one number an axis.
        padding: (before, after) for each axis.
        mode: one of :data:`PADDING_MODES`.
        transposed: whether it is the transpose of a convolution.
        output_padding: what a transposed one adds at the end of each axis.
    """

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"
    transposed: bool = False
    output_padding: Sizes = ()

    @property
    def dims(self) -> int:
        """Axes of the kernel."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    def reach(self, axis: int) -> int:
        """From the first tap of an axis to the last."""
        return self.dilation[axis] * (self.kernel[axis] - 1)

    def extra(self, axis: int) -> int:
        """Output padding of an axis."""
        return self.output_padding[axis] if self.transposed else 0

    def out_size(self, axis: int, size: int) -> int:
        """Places of the output for ``size`` of the input."""
        before, after = self.padding[axis]
        if self.transposed:
            return (size - 1) * self.stride[axis] - before - after + self.reach(axis) + 1 + self.extra(axis)
        return (size + before + after - self.reach(axis) - 1) // self.stride[axis] + 1

    def out_sizes(self, sizes: Sequence[int]) -> Sizes:
        """Places of the output for an input of these sizes."""
        return tuple(self.out_size(axis, size) for axis, size in enumerate(sizes))

    def check(self, sizes: Sequence[int]) -> None:
        """Raise unless every axis has a place in the output."""
        if min(self.out_sizes(sizes)) < 1:
            raise ShapeError(
                f"The input of size {tuple(sizes)} is too small for a kernel of size {self.kernel} with "
                f"dilation={self.dilation} and padding={self.padding}: the output would be {self.out_sizes(sizes)}."
            )

    @property
    def pads_first(self) -> bool:
        """Whether the padding is not of zeros, and so is done before anything else."""
        return self.mode != "zeros" and any(before or after for before, after in self.padding)

    @property
    def after_padding(self) -> Geometry:
        """What is left to do after :meth:`padded`."""
        none = ((0, 0),) * self.dims
        return Geometry(self.kernel, self.stride, self.dilation, none) if self.pads_first else self

    def padded(self, x: Tensor) -> Tensor:
        """The input (.., *sizes) with all padding that is not of zeros done."""
        if not self.pads_first:
            return x
        widths = [width for before, after in reversed(self.padding) for width in (before, after)]
        return F.pad(x, widths, mode=self.mode)

    def select(self, x: Tensor, axis: int, tap: int) -> Tensor:
        """What one tap of one axis reads at every place of the output: (.., *sizes) with that axis done."""
        before, after = self.padding[axis]
        where = x.dim() - self.dims + axis
        size = self.out_size(axis, x.shape[where])
        x = x.movedim(where, -1)
        offset = tap * self.dilation[axis] - before
        if self.transposed:
            x = _spread(x, self.stride[axis])
            x = F.pad(x, (offset, size - offset - x.shape[-1]))
        else:
            x = F.pad(x, (before, after)) if before or after else x
            first = tap * self.dilation[axis]
            x = x[..., first : first + (size - 1) * self.stride[axis] + 1 : self.stride[axis]]
        return x.movedim(-1, where)

    def windows(self, x: Tensor) -> Tensor:
        """All that is read: (batch, .., *sizes) to (batch, .., *places, *kernel), a view of the padded input."""
        widths = []
        first = x.dim() - self.dims
        for axis in reversed(range(self.dims)):
            before, after = self.padding[axis]
            if self.transposed:  # a convolution of the input with zeros in between, with the taps turned round
                x = _spread(x.movedim(first + axis, -1), self.stride[axis]).movedim(-1, first + axis)
                excess = 1 - self.stride[axis]
                before, after = self.reach(axis) - before, self.reach(axis) - after + self.extra(axis) + excess
            widths += [before, after]
        x = F.pad(x, widths) if any(widths) else x
        for axis in range(self.dims):
            step = 1 if self.transposed else self.stride[axis]
            x = x.unfold(first + axis, self.reach(axis) + 1, step)[..., :: self.dilation[axis]]
        return x.flip(tuple(range(-self.dims, 0))) if self.transposed else x

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int, axes: Sequence[int]) -> Tensor:
        """A convolution along some axes; the kernel has size 1 along the others, which stay as they are.

        Args:
            x: (batch, channels, *sizes).
            kernel: (outputs, inputs / groups, *kernel).
            bias: (outputs,) or None.
            groups: of channels.
            axes: along which the geometry applies.
        """
        chosen = set(axes)
        if any(self.padding[axis][0] != self.padding[axis][1] for axis in chosen):
            widths: list[int] = []
            for axis in reversed(range(self.dims)):
                widths += self.padding[axis] if axis in chosen else (0, 0)
            x, padding = F.pad(x, widths), [0] * self.dims
        else:
            padding = [self.padding[axis][0] if axis in chosen else 0 for axis in range(self.dims)]
        stride = [self.stride[axis] if axis in chosen else 1 for axis in range(self.dims)]
        dilation = [self.dilation[axis] if axis in chosen else 1 for axis in range(self.dims)]
        if not self.transposed:
            plain = (F.conv1d, F.conv2d)[self.dims - 1]
            return plain(x, kernel, bias, stride, padding, dilation, groups)
        outputs, inputs = kernel.shape[0] // groups, kernel.shape[1]
        kernel = (
            kernel.unflatten(0, (groups, outputs)).transpose(1, 2).reshape(groups * inputs, outputs, *kernel.shape[2:])
        )
        extra = [self.extra(axis) if axis in chosen else 0 for axis in range(self.dims)]
        transposed = (F.conv_transpose1d, F.conv_transpose2d)[self.dims - 1]
        return transposed(x, kernel, bias, stride, padding, extra, groups, dilation)

    def __str__(self) -> str:
        return " x ".join(map(str, self.kernel))


def _spread(x: Tensor, stride: int) -> Tensor:
    """The last axis with ``stride - 1`` zeros after each number."""
    return x if stride == 1 else F.pad(x.unsqueeze(-1), (0, stride - 1)).flatten(-2)


def as_sizes(value: int | Sequence[int], dims: int, name: str, minimum: int) -> Sizes:
    """One number an axis.

    Raises:
        ShapeError: of the wrong number, or too small.
    """
    sizes = (value,) * dims if isinstance(value, int) else tuple(int(size) for size in value)
    if len(sizes) != dims or min(sizes) < minimum:
        raise ShapeError(f"{name}={value!r}: give one integer of at least {minimum}, or {dims} of them.")
    return sizes


def as_padding(
    value: int | str | Sequence[int], kernel: Sizes, stride: Sizes, dilation: Sizes
) -> tuple[tuple[int, int], ...]:
    """(before, after) for each axis, as PyTorch reads ``padding``: numbers, "valid" or "same".

    Raises:
        ShapeError: another word, or "same" with a stride.
    """
    if isinstance(value, str):
        if value not in ("same", "valid"):
            raise ShapeError(f"padding={value!r} is neither a number nor 'same' nor 'valid'.")
        if value == "same" and max(stride) > 1:
            raise ShapeError(f"padding='same' goes with a stride of 1; got stride={stride}. Give numbers.")
        totals = [d * (k - 1) if value == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in as_sizes(value, len(kernel), "padding", 0))


def places(sizes: Sequence[int]) -> int:
    """The product of some sizes."""
    count = 1
    for size in sizes:
        count *= size
    return count

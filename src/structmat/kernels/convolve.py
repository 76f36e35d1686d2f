"""Convolutions one after the other in one call of the native backend, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.kernels.choice import Backend, forced, wants_gradient
from structmat.kernels.library import native
from structmat.kernels.operator import convolution
from structmat.modes import is_compiling, is_quiet

FEW_IMAGES = 4
"""Up to so many a single dense convolution is faster here, since PyTorch's own prepares as long as it runs; and so is
one of many places, whose outcome that one writes twice. Others stay there. Two or more in a row are faster here for any
number of images: what lies between them stays in the cache. Measured with 3 to 256 channels of 8 x 8 to 224 x 224
places."""

MANY_PLACES = 32 * 32
"""Of the outcome."""


@dataclass(frozen=True)
class Along:
    """Of one axis of places: ``y[p]`` reads ``x[p * stride + t * dilation - padding]`` at tap ``t``."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def places(self, size: int) -> int:
        """Of the outcome."""
        return (size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Convolved:
    """One convolution with a kernel (out, in / groups, height, width).

    Args:
        in_channels, out_channels, groups: of the maps.
        height, width: along these axes.
        by_entries: whether the kernel comes as the entries of (out, in / groups * taps): values, beginnings of the rows
            and columns, these two int32.
    """

    in_channels: int
    out_channels: int
    groups: int
    height: Along
    width: Along
    by_entries: bool = False


class Steps:
    """Convolutions, each of which reads what the one before it puts out.

    Args:
        steps: one or more.
    """

    def __init__(self, steps: Sequence[Convolved]) -> None:
        self.steps = tuple(steps)
        self.text = " ".join(map(_words, steps))
        self.by_entries = any(step.by_entries for step in steps)


def convolved(kernel: Sequence[int], groups: int, axes: Sequence[Along], *, by_entries: bool = False) -> Convolved:
    """A convolution with a kernel (out, in / groups, *kernel) along one axis or two."""
    height, width = axes if len(axes) == 2 else (Along(1, 1, 0, 1), axes[0])
    return Convolved(kernel[1] * groups, kernel[0], groups, height, width, by_entries)


def is_available() -> bool:
    """Whether the native backend can be called for convolutions."""
    return native().available and convolution() is not None


def _words(step: Convolved) -> str:
    numbers = [3 if step.by_entries else 1, step.in_channels, step.out_channels, step.groups]
    for along in (step.height, step.width):
        numbers += [along.kernel, along.stride, along.padding, along.dilation]
    return " ".join(map(str, numbers))


def convolve(given: Steps, kernels: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Images (batch, channels, height, width) or sequences (batch, channels, length) through all steps, without
    gradients; None where the native backend is not to do it, or PyTorch is faster.

    Args:
        given: the steps; of sequences the width is the length.
        kernels: one a step, or three where it comes by its entries.
        x: the input.
        bias: added to the last outcome, (channels,), or None.
    """
    if is_compiling() or type(x) is not Tensor or not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
        return None
    tensors = [*kernels] if bias is None else [*kernels, bias]
    known = (x.dtype, torch.int32) if given.by_entries else (x.dtype,)
    if any(t.dtype not in known or not t.is_cpu for t in tensors) or wants_gradient(x, tensors, None):
        return None
    wanted = forced()
    if wanted is Backend.REFERENCE or not is_quiet() or torch.is_autocast_enabled("cpu"):
        return None
    steps, call = given.steps, convolution() if native().available else None
    if call is None or x.shape[1] != steps[0].in_channels:
        return None
    is_flat = x.dim() == 3
    height, width = (1, x.shape[2]) if is_flat else (x.shape[2], x.shape[3])
    for step in steps:
        height, width = step.height.places(height), step.width.places(width)
    if min(height, width) < 1:
        return None
    is_faster = len(steps) > 1 or given.by_entries or x.shape[0] <= FEW_IMAGES or height * width >= MANY_PLACES
    if not is_faster and x.dtype is torch.float32 and wanted is Backend.AUTO:
        return None
    y = x.new_empty(x.shape[0], steps[-1].out_channels, height, width)
    if is_flat:  # kernels have three axes then
        x, tensors = x.unsqueeze(2), [t.unsqueeze(2) if t.dim() == 3 else t for t in tensors]
    call(x.contiguous(), [t.contiguous() for t in tensors], y, given.text)
    return y.squeeze(2) if is_flat else y

"""The layers: convolutions whose kernel, unfolded, is a structured matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.convolution.base import StructuredConvolution
from structmat.nn.convolution.forms import KernelForm
from structmat.nn.convolution.geometry import Geometry, as_padding, as_sizes
from structmat.structure import Structure

Straight = TypeVar("Straight", bound=nn.Conv1d | nn.Conv2d)
Turned = TypeVar("Turned", bound=nn.ConvTranspose1d | nn.ConvTranspose2d)


class _Forwards(StructuredConvolution[Straight]):
    """What the layers of one and two dimensions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        structure: Structure | KernelForm,
        order: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        kernel = as_sizes(kernel_size, self.dims, "kernel_size", 1)
        steps = as_sizes(stride, self.dims, "stride", 1)
        apart = as_sizes(dilation, self.dims, "dilation", 1)
        geometry = Geometry(kernel, steps, apart, as_padding(padding, kernel, steps, apart), padding_mode)
        self._build(
            in_channels, out_channels, geometry, padding, groups, bias, structure, order, device, dtype, generator
        )

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, *sizes) to (batch, out_channels, *places), or without the batch."""
        return self._run(input, self._geometry)


class _Transposed(StructuredConvolution[Turned]):
    """What the transposed layers of one and two dimensions share."""

    is_transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        structure: Structure | KernelForm,
        order: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros" or isinstance(padding, str):
            raise ShapeError(
                f"A transposed convolution pads with numbers of zeros; got padding={padding!r} and "
                f"padding_mode={padding_mode!r}."
            )
        kernel = as_sizes(kernel_size, self.dims, "kernel_size", 1)
        steps = as_sizes(stride, self.dims, "stride", 1)
        apart = as_sizes(dilation, self.dims, "dilation", 1)
        extra = as_sizes(output_padding, self.dims, "output_padding", 0)
        widths = as_padding(padding, kernel, steps, apart)
        geometry = Geometry(kernel, steps, apart, widths, "zeros", True, extra)
        if any(e >= max(s, d) for e, s, d in zip(extra, steps, apart, strict=True)):
            raise ShapeError(f"output_padding={extra} must be below the stride {steps} or the dilation {apart}.")
        self._build(
            in_channels, out_channels, geometry, padding, groups, bias, structure, order, device, dtype, generator
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(batch, in_channels, *sizes) to (batch, out_channels, *places), or without the batch.

        Args:
            input: the input.
            output_size: the places wanted, as of ``nn.ConvTranspose2d``: it replaces ``output_padding``.
        """
        if output_size is None:
            return self._run(input, self._geometry)
        wanted = tuple(output_size)[-self.dims :]
        least = replace(self._geometry, output_padding=(0,) * self.dims).out_sizes(input.shape[-self.dims :])
        extra = tuple(w - n for w, n in zip(wanted, least, strict=True))
        most = tuple(n + s - 1 for n, s in zip(least, self.stride, strict=True))
        if any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            raise ShapeError(f"output_size={tuple(output_size)}: from this input it is between {least} and {most}.")
        return self._run(input, replace(self._geometry, output_padding=extra))


@final
class StructuredConv2d(_Forwards[nn.Conv2d]):
    """``nn.Conv2d`` whose kernel, unfolded, is a member of ``structure``: a matrix of shape
    (out_channels / groups, in_channels / groups * height * width) for each group.

    It runs as convolutions and products on channels, without patches being written out, where the structure's first
    stages allow it (:mod:`structmat.nn.convolution.plan` says which): dense, low rank, block diagonal and Monarch
    matrices whose blocks are of whole channels, Kronecker sums and tensor trains whose factors hold whole axes of the
    kernel, and the forms :class:`Separable`, :class:`Tucker`, :class:`CP` and :class:`KroneckerKernel`. Of other
    families a large call writes the kernel out and is a dense convolution by it; a small one multiplies patches,
    written out for a few images at a time. :meth:`explain` says what runs, :meth:`macs` counts what the structure asks.

    The tensors are ordinary parameters and buffers under the structure's own names, with a leading axis of groups if
    there are several.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as of ``nn.Conv2d``; ``padding`` may be "same" or "valid".
        structure: the family (fractions are resolved for the unfolded kernel of a group), or a form of the kernel.
        order: how the unfolded index runs over (channels, height, width), as of ``torch.permute``. (0, 1, 2), the
            default, is the order of ``weight.flatten(1)`` and of ``F.unfold``; with (1, 2, 0) blocks of columns are
            taps, and strided ones channels.
        generator: source of randomness of the initialisation, which has the output variance of ``nn.Conv2d``'s.

    Raises:
        ShapeError: the structure refuses the shape, or the groups do not divide the channels.
        StructureError: no permutation is given as the order, or a complex dtype.
    """

    dims = 2
    dense_class = nn.Conv2d


@final
class StructuredConv1d(_Forwards[nn.Conv1d]):
    """:class:`StructuredConv2d` as ``nn.Conv1d``."""

    dims = 1
    dense_class = nn.Conv1d


@final
class StructuredConvTranspose2d(_Transposed[nn.ConvTranspose2d]):
    """:class:`StructuredConv2d` as ``nn.ConvTranspose2d``.

    The kernel is unfolded as that of the convolution that reads at each place of the output the inputs that reach it:
    (out_channels / groups, in_channels / groups * taps).
    """

    dims = 2
    dense_class = nn.ConvTranspose2d


@final
class StructuredConvTranspose1d(_Transposed[nn.ConvTranspose1d]):
    """:class:`StructuredConv2d` as ``nn.ConvTranspose1d``.

    The kernel is unfolded as that of the convolution that reads at each place of the output the inputs that reach it:
    (out_channels / groups, in_channels / groups * taps).
    """

    dims = 1
    dense_class = nn.ConvTranspose1d

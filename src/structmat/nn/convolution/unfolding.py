"""Between the kernel of a convolution and its matrices: one a group, with a row for each channel that comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import ShapeError


@dataclass(frozen=True)
class Unfolding:
    """How columns of the matrices run over what a kernel reads.

    Args:
        sizes: (channels of a group, *kernel).
        groups: of channels.
        order: how the columns run over these axes, as of ``torch.permute``.
        transposed: whether the weight is that of a transposed convolution, with the channels that come in first.
    """

    sizes: tuple[int, ...]
    groups: int
    order: tuple[int, ...]
    transposed: bool

    def kernels(self, matrices: Sequence[Tensor]) -> Tensor:
        """Matrices (outputs, columns) of the groups as (groups, outputs, inputs, *kernel)."""
        axes = [0, 1, *(2 + self.order.index(axis) for axis in range(len(self.order)))]
        found: Tensor = torch.stack(list(matrices)).unflatten(2, [self.sizes[axis] for axis in self.order])
        return found.permute(axes)

    def fold(self, matrices: Sequence[Tensor]) -> Tensor:
        """Matrices of the groups as a weight of the dense layer."""
        kernels = self.kernels(matrices)
        if self.transposed:  # (groups, in, out, ..)
            kernels = kernels.transpose(1, 2)
        result: Tensor = kernels.flatten(0, 1).contiguous()
        return result

    def unfold(self, weight: Tensor) -> list[Tensor]:
        """The weight of a dense layer as one matrix a group."""
        kernels = weight.detach().unflatten(0, (self.groups, -1))
        kernels = kernels.transpose(1, 2) if self.transposed else kernels
        return list(kernels.permute(0, 1, *(2 + axis for axis in self.order)).flatten(2))

    def moments(self, moment: Tensor | None) -> list[Tensor | None]:
        """The second moment of the patches of each group, in the order of the columns.

        Args:
            moment: in the order (channels, *kernel), with a leading axis of groups if there are several; or None.

        Raises:
            ShapeError: it has another shape.
        """
        if moment is None:
            return [None] * self.groups
        size = math.prod(self.sizes)
        wanted = (size, size) if self.groups == 1 else (self.groups, size, size)
        if tuple(moment.shape) != wanted:
            raise ShapeError(f"The second moment of the patches has shape {wanted}; got {tuple(moment.shape)}.")
        number = torch.arange(size, device=moment.device).reshape(self.sizes).permute(self.order).flatten()
        return [m[number][:, number] for m in moment.reshape(self.groups, size, size)]

"""How learned tensors lie as matrices: what an optimizer that looks at rows and columns needs to know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat.nn.convolution.base import StructuredConvolution
from structmat.nn.embedding import StructuredEmbedding
from structmat.nn.linear import StructuredLinear
from structmat.program import Contraction, Sparse, Stage, build, stages


@dataclass(frozen=True)
class Layout:
    """A tensor as a stack of matrices (count, rows, columns).

    Args:
        viewed: the tensor's shape on the way.
        order: of the axes of ``viewed`` in the stack.
        shape: of the stack.
        places: of a list of entries in the one matrix, row * columns + column; all others are zero.
    """

    viewed: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int]
    places: Tensor | None = None

    def matrices(self, tensor: Tensor) -> Tensor:
        """The stack of a tensor, which may share its memory."""
        if self.places is not None:
            entries = tensor.new_zeros(math.prod(self.shape))
            return entries.index_copy_(0, self.places, tensor.reshape(-1)).view(self.shape)
        return tensor.reshape(self.viewed).permute(self.order).reshape(self.shape)

    def tensor(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The tensor of a stack, in the shape of another; of a list the entries at its places."""
        if self.places is not None:
            return matrices.reshape(-1)[self.places].view(like.shape)
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        between = [self.viewed[axis] for axis in self.order]
        return matrices.reshape(between).permute(inverse).reshape(like.shape)


def plain_layout(tensor: Tensor) -> Layout | None:
    """Of a tensor of which nothing is known: the first axis are rows, all others columns; None for a vector."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return None
    shape = (1, tensor.shape[0], tensor.numel() // tensor.shape[0])
    return Layout(shape, (0, 1, 2), shape)


def layouts(model: nn.Module) -> dict[Tensor, Layout]:
    """Of the parameters of a model: of structured layers each block by itself and lists of entries at their places, of
    all others as :func:`plain_layout`; vectors have none."""
    found: dict[Tensor, Layout] = {}
    for parameter in model.parameters():
        layout = plain_layout(parameter)
        if layout is not None:
            found[parameter] = layout
    for module in model.modules():
        for stage in _stages(module):
            tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            copies = module.groups if isinstance(module, StructuredConvolution) else 1
            if isinstance(stage, Sparse):
                found |= _of_entries(stage, tensors, copies)
            elif isinstance(stage, Contraction):
                found |= _of_blocks(stage, tensors, copies)
    return found


def _stages(module: nn.Module) -> tuple[Stage, ...]:
    if isinstance(module, StructuredLinear | StructuredConvolution):
        return stages(module.program)
    if isinstance(module, StructuredEmbedding):
        return stages(build(module.structure, (module.num_embeddings, module.embedding_dim)))
    return ()


def _of_entries(stage: Sparse, tensors: Mapping[str, Tensor], copies: int) -> dict[Tensor, Layout]:
    values, places = tensors.get(stage.values), tensors.get(stage.places)
    if values is None or places is None or values.shape != places.shape or values.numel() != copies * stage.capacity:
        return {}
    size = stage.height * stage.width
    first = size * torch.arange(copies, device=places.device).repeat_interleave(stage.capacity)
    rows, columns = (stage.width, stage.height) if stage.transposed else (stage.height, stage.width)
    return {values: Layout(tuple(values.shape), (), (copies, rows, columns), places.reshape(-1).long() + first)}


def _of_blocks(stage: Contraction, tensors: Mapping[str, Tensor], copies: int) -> dict[Tensor, Layout]:
    weight, (a, rows, columns, d) = tensors.get(stage.weight), stage.stored_shape
    # Pairs of a real and an imaginary part, which are twice as many, are no blocks.
    if weight is None or weight.numel() != copies * math.prod(stage.stored_shape):
        return {}
    return {weight: Layout((copies, a, rows, columns, d), (0, 1, 4, 2, 3), (copies * a * d, rows, columns))}

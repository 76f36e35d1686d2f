"""Layers that start smaller or larger: the matrix of a layer multiplied by a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from structmat.errors import StructureError
from structmat.nn.convolution.base import StructuredConvolution
from structmat.nn.embedding import StructuredEmbedding
from structmat.nn.linear import StructuredLinear
from structmat.nn.windows import WindowedLinear
from structmat.program.scaling import scaling_cut

_Dense = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_Structured = (StructuredLinear, StructuredConvolution, StructuredEmbedding)


@torch.no_grad()
def scale_(layer: nn.Module, factor: float) -> None:
    """Multiply the matrix of a layer by ``factor``, in place; the bias and the structure stay.

    For starts that depend on where a layer is: the layers that write to the residual stream of a transformer with L
    blocks by ``1 / sqrt(2 L)`` (Radford et al., "Language Models are Unsupervised Multitask Learners", 2.3), heads by
    0. Of a structured layer the tensors nearest to the output are multiplied that every path crosses once, so the
    values in between keep their size.

    Args:
        layer: a linear layer, a convolution or an embedding, PyTorch's or structured, or a
            :class:`~structmat.nn.WindowedLinear`. Tensors that are shared with another layer change there too.
        factor: finite; 0 is allowed.

    Raises:
        StructureError: the layer is of another kind, its family has no tensor that scales it (permutations, orthogonal
            matrices), or the factor is not finite.
    """
    if not math.isfinite(factor):
        raise StructureError(f"scale_(..., factor={factor!r}): the factor must be a finite number.")
    for tensor in _tensors(layer):
        tensor.mul_(factor)


def _tensors(layer: nn.Module) -> list[Tensor]:
    """What to multiply."""
    if isinstance(layer, _Dense):
        assert isinstance(layer.weight, Tensor)
        return [layer.weight]
    if isinstance(layer, WindowedLinear):
        return [layer.left]
    if not isinstance(layer, _Structured):
        raise StructureError(
            f"scale_ multiplies linear layers, convolutions and embeddings, dense or structured, not "
            f"{type(layer).__name__}. Give the layers inside of it one by one."
        )
    cut = scaling_cut(layer.program)
    learned = dict(layer.named_parameters(recurse=False))
    if cut is None or not cut <= learned.keys():
        raise StructureError(
            f"A layer of {layer.structure} can't be scaled: there are no learned tensors that each path through it "
            f"crosses once. Multiply its output instead, or take sm.Product(sm.Diagonal(), ...) of it."
        )
    return [learned[name] for name in sorted(cut)]

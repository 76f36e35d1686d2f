"""Soft choices of layers, such as permutations: a penalty that makes them, and the models in which they are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structmat.nn.linear import StructuredLinear


def choice_penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of all layers with soft choices (:meth:`Structure.penalty`): 0 where all are made.

    Added to the loss with a weight that rises during training, it anneals soft permutations to hard ones; then
    :func:`harden_choices` changes little. A scalar that gradients flow through; zero for a model without such layers.
    """
    found = []
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            shape = (module.out_features, module.in_features)
            penalty = module.structure.penalty(shape, module.tensors())
            if penalty is not None:
                found.append(penalty)
    return torch.stack(found).sum() if found else torch.zeros(())


def harden_choices(model: nn.Module) -> nn.Module:
    """Replace every layer with soft choices, in place, by the one in which they are made.

    The other layers stay the same objects, so that their optimizer states stay good; the new ones have new parameters.

    Returns:
        The model; or, if the model itself is such a layer, the layer that stands for it.
    """
    if isinstance(model, StructuredLinear):
        return _hardened(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StructuredLinear):
                setattr(parent, name, _hardened(child))
    return model


def _hardened(layer: StructuredLinear) -> StructuredLinear:
    shape = (layer.out_features, layer.in_features)
    with torch.no_grad():
        structure = layer.structure.harden(shape, layer.tensors())[0]
    return layer if structure == layer.structure else layer.harden()

"""Learning rates of Kronecker blocks under Adam."""

from __future__ import annotations

from collections.abc import Mapping

from structmat.nn.kronecker.block import KroneckerBlock

HIGHEST = 1e-2
"""Above this rate Adam's steps are large beside any factor's entries, whatever the layer."""


def rate_multipliers(block: KroneckerBlock, lr: float) -> Mapping[str, float]:
    """By which factor each parameter's learning rate exceeds that of a dense layer of the same size.

    A factor that sums c numbers for one output has entries larger than those of a dense layer with N inputs by
    ``sqrt(N / c)``; the rate is larger by as much, so that a step changes it by the same share, but at most so that it
    is 0.01. Biases and slopes have the rate of the dense layer's bias. The published experiments use one rate for
    everything: an optimizer of ``model.parameters()``.

    Args:
        block: any.
        lr: of the dense layer, for the cap.

    Returns:
        The factors by name, as in ``block.named_parameters()``.
    """
    shape = block.shape
    found = {}
    for name, _ in block.named_parameters():
        kind = name.rpartition(".")[2]
        if kind.startswith("factor"):
            axis = int(kind.removeprefix("factor"))
            chain = block.chains[int(name.split(".")[1])]
            terms = shape.terms if axis == chain.layout.order[-1] else 1
            raised = max(1.0, shape.in_features / (terms * shape.inputs[axis])) ** 0.5
            found[name] = max(1.0, min(raised, HIGHEST / lr))
        else:
            found[name] = 1.0
    return found

"""Networks of the study of Kronecker networks: one architecture, its wide layers of every kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import structmat as sm
from structmat.nn import KroneckerBlock, KroneckerNetwork, StructuredLinear
from structmat.nn.kronecker import balanced_, source_
from structmat.structure import Structure, count_parameters

Shape = tuple[int, int]
TERMS = (1, 2, 4)
FAMILIES: dict[str, str] = {
    "low rank": "LowRank",
    "Monarch": "Monarch",
    "BLAST": "BLAST",
    "block tensor-train": "BlockTensorTrain",
}


@dataclass(frozen=True)
class Method:
    """One kind of wide layers.

    Args:
        name: of the row.
        terms: of the Kronecker network whose size it has; 0 for the fully connected network.
    """

    name: str
    terms: int = 0

    @property
    def key(self) -> str:
        """With the size."""
        return f"{self.name} k={self.terms}" if self.terms else self.name


METHODS = (
    *(Method("Kronecker", k) for k in TERMS),
    *(Method("Kronecker, linear inside", k) for k in TERMS),
    Method("fully connected"),
    *(Method("fully connected, narrow", k) for k in TERMS),
    *(Method(name, k) for name in FAMILIES for k in TERMS),
)


def build(
    method: Method, sizes: Sequence[Shape], activation: Callable[[Tensor], Tensor], seed: int, published: bool
) -> nn.Module:
    """A network of the given arrays with layers of a kind.

    Args:
        method: of which kind.
        sizes: arrays of input, hidden layers and output.
        activation: after every layer but the last; in Kronecker blocks inside too.
        seed: of the start.
        published: Kronecker blocks start as in the paper, with its full biases; otherwise balanced, with full biases.
    """
    torch.manual_seed(seed)
    features = [math.prod(s) for s in sizes]
    if method.name.startswith("Kronecker"):
        inner = None if method.name.endswith("inside") else activation
        start = source_ if published else balanced_
        return KroneckerNetwork(sizes, method.terms, inner=inner, outer=activation, initialize=start)
    if method.name == "fully connected":
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(features)]
    elif method.name == "fully connected, narrow":
        budget = KroneckerNetwork(sizes, method.terms).counts.parameters
        width = narrow_width(features[0], features[-1], len(features) - 2, budget)
        layers = [
            nn.Linear(a, b) for a, b in itertools.pairwise([features[0], *[width] * (len(features) - 2), features[-1]])
        ]
    else:
        layers = [_structured(method, a, b) for a, b in itertools.pairwise(sizes)]
    if published:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return _stacked(layers, activation)


class Activation(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.function(x)


def _stacked(layers: Sequence[nn.Module], activation: Callable[[Tensor], Tensor]) -> nn.Sequential:
    mixed = [m for layer in layers for m in (layer, Activation(activation))]
    return nn.Sequential(*mixed[:-1])


def narrow_width(inputs: int, outputs: int, hidden: int, budget: int) -> int:
    """The width of hidden layers with which a fully connected network has at most so many parameters."""

    def size(width: int) -> int:
        widths = [inputs, *[width] * hidden, outputs]
        return sum(a * b + b for a, b in itertools.pairwise(widths))

    return max(1, next(w for w in itertools.count(1) if size(w + 1) > budget))


def _structured(method: Method, given: Shape, made: Shape) -> nn.Module:
    """A layer with at most as many parameters as the Kronecker block has, or the family's smallest."""
    from structmat.nn.kronecker import block_shape

    block = block_shape(
        math.prod(given), math.prod(made), _most(method.terms, given, made), in_shape=given, out_shape=made
    )
    return StructuredLinear(
        block.in_features,
        block.out_features,
        structure=member(
            FAMILIES[method.name], (block.out_features, block.in_features), block.parameters - block.out_features
        ),
    )


def _most(terms: int, given: Shape, made: Shape) -> int:
    return min(terms, made[0] * given[0], made[1] * given[1])


def member(family: str, shape: Shape, budget: int) -> Structure:
    """The largest member within a budget, or the smallest one that there is."""
    kind = sm.families()[family]
    while True:
        found = list(kind.configurations(shape, budget))
        if found:
            return max(found, key=lambda s: count_parameters(s, shape))
        budget = math.ceil(budget * 1.1)


def counts(model: nn.Module) -> dict[str, int]:
    """Weights, biases, and multiply-adds for a sample, of all layers."""
    weights = biases = macs = 0
    for module in model.modules():
        if isinstance(module, KroneckerBlock):
            shape = module.shape
            weights, biases = weights + shape.weights, biases + shape.inner_biases + shape.outer_biases
            macs += shape.macs
        elif isinstance(module, nn.Linear):
            weights, biases = weights + module.weight.numel(), biases + module.bias.numel()
            macs += module.weight.numel()
        elif isinstance(module, StructuredLinear):
            weights += module.matrix.num_parameters
            biases += 0 if module.bias is None else module.bias.numel()
            macs += module.matrix.macs
    return {"weights": weights, "biases": biases, "parameters": weights + biases, "macs": macs}


class WithTrunk(nn.Module):
    """The convolutions of the published network for CIFAR-10 in front of a head that reads 4,096 numbers.

    Three times 3 x 3, ReLU and the maximum of 2 x 2; dropout of 0.2. The head reads 4 x 4 places of 256 channels,
    channels last, as 64 x 64. The maximum is taken before ReLU, which commutes with it and then has a quarter to do.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 16), (16, 64), (64, 256)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Dropout(0.2)).to(memory_format=torch.channels_last)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, 3, 32, 32) to scores."""
        features = self.trunk(x.contiguous(memory_format=torch.channels_last))
        scores: Tensor = self.head(features.permute(0, 2, 3, 1).flatten(1))
        return scores

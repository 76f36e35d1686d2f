"""Kronecker blocks that the tests share, and their definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structmat.nn import KroneckerBlock
from structmat.nn.kronecker import Bias

F64 = torch.float64
BIASES = tuple(bias.value for bias in Bias)
MIXED = ("left", "right", "left", "right")
SHAPES: dict[str, dict[str, object]] = {
    "left": {"in_shape": (3, 5), "out_shape": (4, 2), "order": "left"},
    "right": {"in_shape": (3, 5), "out_shape": (4, 2), "order": "right"},
    "mixed": {"in_shape": (3, 5), "out_shape": (4, 2), "order": MIXED, "terms": 4},
    "three factors": {"in_shape": (3, 5, 2), "out_shape": (4, 2, 3), "activated": (True, True)},
    "three factors, some places": {"in_shape": (2, 5, 3), "out_shape": (4, 2, 3), "activated": (False, True)},
    "four factors": {"in_shape": (2, 1, 2, 3), "out_shape": (2, 3, 1, 2), "activated": (True,) * 3, "order": "right"},
}


def random_block(out: int | None = None, **options: object) -> KroneckerBlock:
    """A block in float64 with nothing equal to zero."""
    features = [math.prod(options[name]) for name in ("in_shape", "out_shape")]  # type: ignore[call-overload]
    terms = options.pop("terms", 2)
    block = KroneckerBlock(*features, terms, **{"dtype": F64, "inner": torch.tanh, "outer": torch.tanh, **options})  # type: ignore[arg-type, misc]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


def by_hand(block: KroneckerBlock, x: Tensor) -> Tensor:
    """The definition, written with matrices and loops over terms (two factors)."""
    total = x.new_zeros(*x.shape[:-2], *block.shape.outputs)
    for chain in block.chains:
        left, turned = chain.factors()
        bias = chain.natural_bias(chain.layout.gaps[0])
        for t in range(chain.layout.terms):
            c = 0.0 if bias is None else bias[t]
            right = turned[t].T
            if chain.layout.order == (0, 1):
                total = total + torch.tanh(left[t] @ x + c) @ right
            else:
                total = total + left[t] @ torch.tanh(x @ right + c)
    return torch.tanh(total if block.bias is None else total + block.bias.reshape(block.shape.outputs))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result

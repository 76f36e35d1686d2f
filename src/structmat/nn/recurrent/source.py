"""What a linear layer multiplies by, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from structmat.kernels import tuning
from structmat.nn.linear import FrozenLinear, StructuredLinear
from structmat.nn.recurrent.gates import GateLinear
from structmat.program import Program, build
from structmat.structures.dense import Dense

Source = tuple[Program, Mapping[str, Tensor], Tensor | None]
"""A program, what it reads, and the bias."""

_WEIGHT = "weight"


def source(
    layer: nn.Module, rows: int, name: Callable[[Program, torch.dtype], str], ways: tuple[tuning.Way, ...]
) -> Source | None:
    """What a layer multiplies so many rows by; None where it is no program.

    Args:
        layer: any.
        rows: of its input.
        name: by which measurements of a program and a dtype are found.
        ways: that were measured: a frozen layer that holds its dense matrix takes that if it is the fastest of them.
    """
    if type(layer) is nn.Linear:
        return _dense(layer.out_features, layer.in_features), {_WEIGHT: layer.weight}, layer.bias
    if not isinstance(layer, StructuredLinear | FrozenLinear | GateLinear) or layer.program is None:
        return None
    if isinstance(layer, FrozenLinear) and layer.dense is not None:
        found = tuning.best(name(layer.program, layer.dense.dtype), rows, ways)
        if found is tuning.Way.DENSE:
            return _dense(layer.out_features, layer.in_features), {_WEIGHT: layer.dense}, layer.bias
    return layer.program, layer.tensors(), layer.bias


@lru_cache(maxsize=256)
def _dense(out_features: int, in_features: int) -> Program:
    return build(Dense(), (out_features, in_features))

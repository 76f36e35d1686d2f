"""Kronecker blocks that compression put in the place of linear layers: a rectifier is learned between the factors.

No dense module is of this kind: :mod:`structmat.compression.layers.linear` finds the matrices and builds the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from structmat.compression.layers.base import Content, Described, Layer, Load
from structmat.compression.layers.linear import empty_linear
from structmat.errors import ModelError
from structmat.matrix import StructuredMatrix
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.rectified import PATHS, structure_of
from structmat.structure import Shape, Structure


@final
class KroneckerBlockLayer(Layer):
    """Structured modules alone."""

    kinds = ()

    def kind(self, module: nn.Module) -> str | None:
        return None

    def is_structured(self, module: nn.Module) -> bool:
        return isinstance(module, KroneckerBlock) and structure_of(module) is not None

    def content(self, module: nn.Module) -> Content:
        block, structure = _block(module)
        return Content(structure, (block.out_features, block.in_features), 1, block.factors()[0].dtype)

    def paths(self, module: nn.Module) -> Mapping[str, str]:
        return PATHS

    def empty(self, module: nn.Module, structure: Structure, dtype: torch.dtype, **more: Any) -> nn.Module:
        block, _ = _block(module)
        return empty_linear(structure, (block.out_features, block.in_features), block.bias is not None, dtype)

    def rows(self, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
        block, _ = _block(module)
        yield x.reshape(1, -1, block.in_features)

    def output_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        block, _ = _block(module)
        return y.reshape(1, -1, block.out_features)

    def to_dense(self, module: nn.Module) -> nn.Module:
        """The dense layer if all slopes are 1; otherwise no matrix is equal to the block, and it stays."""
        block, _ = _block(module)
        return block.to_structured(0.0).to_linear() if block.is_linear(0.0) else copy.deepcopy(block)

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module:
        """A merged linear layer if all slopes are 1; otherwise the block, which runs as one pass as it is."""
        block, _ = _block(module)
        return block.to_structured(0.0).freeze(rows) if block.is_linear(0.0) else copy.deepcopy(block)

    # Of dense modules, which are none of its business.

    def shape(self, module: nn.Module) -> tuple[int, Shape]:
        _not_dense(module)

    def matrices(self, module: nn.Module) -> Tensor:
        _not_dense(module)

    def assign(self, module: nn.Module, matrices: Tensor) -> None:
        _not_dense(module)

    def build(self, module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
        _not_dense(module)

    def flops(self, site: Described, structure: Structure, load: Load) -> float:
        raise ModelError(f"{site.kind} is no kind of Kronecker blocks.")

    def microseconds(self, site: Described, structure: Structure, load: Load, samples: int) -> float:
        raise ModelError(f"{site.kind} is no kind of Kronecker blocks.")


def _block(module: nn.Module) -> tuple[KroneckerBlock, Structure]:
    structure = structure_of(module) if isinstance(module, KroneckerBlock) else None
    if structure is None or not isinstance(module, KroneckerBlock):
        raise ModelError(f"A {type(module).__name__} is no rectified Kronecker block.")
    return module, structure


def _not_dense(module: nn.Module) -> NoReturn:
    raise ModelError(f"A {type(module).__name__} is no dense layer that compression knows.")

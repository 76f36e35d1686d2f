"""``nn.Linear``, and ``Conv1D`` of transformers, which is one with its weight stored transposed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from structmat.compression.layers.base import Content, Described, Layer, Load
from structmat.compression.timing import layer_microseconds
from structmat.errors import ModelError
from structmat.matrix import StructuredMatrix
from structmat.nn.kronecker.rectified import block_of, rectified_block
from structmat.nn.linear import StructuredLinear
from structmat.program import build, cost
from structmat.structure import Shape, Structure
from structmat.structures.nonlinear.rectified_kronecker import RectifiedKronecker


@final
class LinearLayer(Layer):
    """One matrix; rows are all leading axes."""

    kinds = ("Linear", "Conv1D")

    def kind(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.Linear):
            return "Linear"
        origin = type(module)
        if origin.__name__ == "Conv1D" and origin.__module__.startswith("transformers."):
            return "Conv1D"
        return None

    def is_structured(self, module: nn.Module) -> bool:
        return isinstance(module, StructuredLinear)

    def doubt(self, module: nn.Module) -> str | None:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "it is of a class that marks weights which the parent reads"
        if self.kind(module) == "Linear" and type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        return None

    def shape(self, module: nn.Module) -> tuple[int, Shape]:
        weight = self._weight(module)
        return 1, (weight.shape[0], weight.shape[1])

    def _weight(self, module: nn.Module) -> Tensor:
        """(out, in), a view."""
        weight = cast(Tensor, module.weight)
        return weight.T if self.kind(module) == "Conv1D" else weight

    def matrices(self, module: nn.Module) -> Tensor:
        return self._weight(module).detach().unsqueeze(0)

    def assign(self, module: nn.Module, matrices: Tensor) -> None:
        with torch.no_grad():
            self._weight(module).copy_(matrices[0])

    def rows(self, module: nn.Module, x: Tensor) -> Iterator[Tensor]:
        yield x.reshape(1, -1, x.shape[-1])

    def output_rows(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.reshape(1, -1, y.shape[-1])

    def build(self, module: nn.Module, matrices: Sequence[StructuredMatrix]) -> nn.Module:
        bias = cast(Tensor | None, module.bias)
        if isinstance(matrices[0].structure, RectifiedKronecker):
            return block_of(matrices[0], bias)
        return StructuredLinear.from_matrix(matrices[0], bias)

    def empty(self, module: nn.Module, structure: Structure, dtype: torch.dtype, **more: Any) -> nn.Module:
        out, inputs = (
            (module.out_features, module.in_features) if isinstance(module, StructuredLinear) else self.shape(module)[1]
        )
        return empty_linear(structure, (out, inputs), getattr(module, "bias", None) is not None, dtype)

    def content(self, module: nn.Module) -> Content:
        layer = _structured(module)
        return Content(layer.structure, (layer.out_features, layer.in_features), 1, layer.matrix.dtype)

    def to_dense(self, module: nn.Module) -> nn.Module:
        layer = _structured(module)
        linear = layer.to_linear()
        required = [p.requires_grad for n, p in layer.named_parameters() if n != "bias"]
        linear.weight.requires_grad_(any(required))
        if layer.bias is not None:
            linear.bias.requires_grad_(layer.bias.requires_grad)
        return linear

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module:
        return _structured(module).freeze(rows)

    def nonlinear(self) -> bool:
        return True

    def stacks(self) -> bool:
        return True

    def flops(self, site: Described, structure: Structure, load: Load) -> float:
        return site.copies * cost(build(structure, site.shape)).flops * load.rows

    def microseconds(self, site: Described, structure: Structure, load: Load, samples: int) -> float:
        return site.copies * layer_microseconds(structure, site.shape, max(1, round(load.rows * samples)))


def empty_linear(structure: Structure, shape: Shape, bias: bool, dtype: torch.dtype) -> nn.Module:
    """The layer of a structure without values, on the meta device."""
    if isinstance(structure, RectifiedKronecker):
        return rectified_block(structure, shape, bias=bias, device="meta", dtype=dtype)
    return StructuredLinear(shape[1], shape[0], bias, structure=structure, device="meta", dtype=dtype)


def _structured(module: nn.Module) -> StructuredLinear:
    if not isinstance(module, StructuredLinear):
        raise ModelError(f"A {type(module).__name__} is no structured linear layer.")
    return module

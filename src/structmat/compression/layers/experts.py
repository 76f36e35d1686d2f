"""Mixtures of experts whose weights are tensors of three axes: a layer for each expert."""

from __future__ import annotations

from typing import cast, final

from torch import nn

from structmat.compression.layers.base import Splitter
from structmat.nn.experts import ExpertsLinear, SplitExperts
from structmat.nn.fused_experts import SplitFusedExperts, is_fused_experts


@final
class ExpertsSplitter(Splitter):
    """:class:`structmat.nn.ExpertsLinear`, into ``0``, ``1`` and so on."""

    name = "experts"

    def splits(self, module: nn.Module) -> bool:
        return type(module) is ExpertsLinear

    def is_split(self, module: nn.Module) -> bool:
        return isinstance(module, SplitExperts)

    def split(self, module: nn.Module) -> nn.Module:
        return SplitExperts.from_experts(cast(ExpertsLinear, module))

    def join(self, module: nn.Module) -> nn.Module:
        return cast(SplitExperts, module).to_experts()

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module | None:
        return None


@final
class FusedExpertsSplitter(Splitter):
    """Expert modules of transformers, into ``gate_up_proj.0`` and so on."""

    name = "fused experts"

    def splits(self, module: nn.Module) -> bool:
        return is_fused_experts(module)

    def is_split(self, module: nn.Module) -> bool:
        return isinstance(module, SplitFusedExperts)

    def split(self, module: nn.Module) -> nn.Module:
        return SplitFusedExperts.from_module(module)

    def join(self, module: nn.Module) -> nn.Module:
        return cast(SplitFusedExperts, module).to_module()

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module | None:
        return None

"""``nn.MultiheadAttention``: projections of queries, keys and values, which it holds as one weight, and of outputs."""

from __future__ import annotations

from typing import cast, final

from torch import nn

from structmat.compression.layers.base import Splitter
from structmat.nn.attention import SplitAttention


@final
class AttentionSplitter(Splitter):
    """Into ``query``, ``key``, ``value`` and ``output``."""

    name = "attention"

    def splits(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def is_split(self, module: nn.Module) -> bool:
        return isinstance(module, SplitAttention)

    def split(self, module: nn.Module) -> nn.Module:
        return SplitAttention.from_attention(cast(nn.MultiheadAttention, module))

    def join(self, module: nn.Module) -> nn.Module:
        return cast(SplitAttention, module).to_attention()

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module | None:
        return None

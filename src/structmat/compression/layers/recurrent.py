"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: matrices of inputs, states and projections of each layer and direction."""

from __future__ import annotations

from typing import cast, final

from torch import nn

from structmat.compression.layers.base import Splitter
from structmat.nn.recurrent import Recurrent, joined, split


@final
class RecurrentSplitter(Splitter):
    """Into ``ih_l0``, ``hh_l0`` and so on."""

    name = "recurrent"

    def splits(self, module: nn.Module) -> bool:
        return type(module) in (nn.LSTM, nn.GRU, nn.RNN)

    def is_split(self, module: nn.Module) -> bool:
        return isinstance(module, Recurrent)

    def split(self, module: nn.Module) -> nn.Module:
        return split(cast(nn.RNNBase, module))

    def join(self, module: nn.Module) -> nn.Module:
        return joined(cast(Recurrent, module))

    def gates(self, module: nn.Module, part: str) -> int:
        return 1 if part.startswith("hr") else len(cast(Recurrent, module).cell.gates)

    def feeds_back(self, part: str) -> bool:
        return part.startswith(("hh", "hr"))

    def freeze(self, module: nn.Module, rows: int | None) -> nn.Module | None:
        return cast(Recurrent, module).freeze(rows)

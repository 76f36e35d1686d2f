"""What the tests of recurrent layers share: the kinds, PyTorch's twin of a layer, and outcomes as lists."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.nn import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.recurrent import Recurrent

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LSTM": (StructuredLSTM, {}),
    "projected": (StructuredLSTM, {"proj_size": 3}),
    "GRU": (StructuredGRU, {}),
    "tanh": (StructuredRNN, {}),
    "relu": (StructuredRNN, {"nonlinearity": "relu"}),
}


def dense(layer: Recurrent) -> nn.RNNBase:
    """PyTorch's layer with the same outputs."""
    if isinstance(layer, StructuredLSTM):
        return layer.to_lstm()
    if isinstance(layer, StructuredGRU):
        return layer.to_gru()
    assert isinstance(layer, StructuredRNN)
    return layer.to_rnn()


def flat(outcome: Any) -> list[Tensor]:
    """All tensors of an outcome, in order."""
    if isinstance(outcome, PackedSequence):
        return [outcome.data]
    return [outcome] if isinstance(outcome, Tensor) else [t for part in outcome for t in flat(part)]

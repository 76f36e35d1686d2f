"""PyTorch's recurrent layers taken apart into their matrices, and put together again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from structmat.errors import ModelError
from structmat.nn.recurrent.base import Recurrent
from structmat.nn.recurrent.layers import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.structures.dense import Dense

_KINDS: tuple[type[StructuredLSTM] | type[StructuredGRU] | type[StructuredRNN], ...] = (
    StructuredLSTM,
    StructuredGRU,
    StructuredRNN,
)


def split(layer: nn.RNNBase) -> Recurrent:
    """The same recurrent layer; its matrices are ``nn.Linear`` that share the memory of the given weights.

    Each can then be replaced by a layer of any kind: ``made.ih_l0 = StructuredLinear.from_linear(made.ih_l0, ...)``.

    Raises:
        ModelError: it is no ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
    """
    kind = next((kind for kind in _KINDS if isinstance(layer, kind.torch_class)), None)
    if kind is None:
        raise ModelError(f"An nn.LSTM, nn.GRU or nn.RNN is split; got a {type(layer).__name__}.")
    more: dict[str, Any] = {}
    if kind is StructuredLSTM:
        more["proj_size"] = layer.proj_size
    if kind is StructuredRNN:
        more["nonlinearity"] = layer.nonlinearity
    with warnings.catch_warnings():  # of a dropout that does nothing PyTorch's layer has warned
        warnings.simplefilter("ignore")
        made = kind(
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            bias=layer.bias,
            batch_first=layer.batch_first,
            dropout=layer.dropout,
            bidirectional=layer.bidirectional,
            structure=Dense(),
            device="meta",
            dtype=next(layer.parameters()).dtype,
            **more,
        )
    held = dict(layer.named_parameters())
    for name, shape, has_bias in made.options.shapes(len(made.cell.gates)):
        linear = nn.Linear(shape[1], shape[0], has_bias, device="meta")
        linear.weight = nn.Parameter(held[f"weight_{name}"])
        if has_bias:
            linear.bias = nn.Parameter(held[f"bias_{name}"])
        for own, source in ((linear.weight, f"weight_{name}"), (linear.bias, f"bias_{name}")):
            if isinstance(own, Tensor):
                own.requires_grad_(held[source].requires_grad)
        made.add_module(name, linear)
    return made.train(layer.training)


def joined(layer: Recurrent) -> nn.RNNBase:
    """PyTorch's layer with the same outputs, its matrices written out."""
    if isinstance(layer, StructuredLSTM):
        return layer.to_lstm()
    if isinstance(layer, StructuredGRU):
        return layer.to_gru()
    assert isinstance(layer, StructuredRNN), f"no recurrent layer: {type(layer).__name__}"
    return layer.to_rnn()

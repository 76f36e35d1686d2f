"""What the tests of recurrent layers share: kinds, PyTorch's twin of a layer, drawn calls, outcomes as lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import structmat as sm
from structmat.nn import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.recurrent import Recurrent
from structmat.structure import Structure

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LSTM": (StructuredLSTM, {}),
    "projected": (StructuredLSTM, {"proj_size": 3}),
    "GRU": (StructuredGRU, {}),
    "tanh": (StructuredRNN, {}),
    "relu": (StructuredRNN, {"nonlinearity": "relu"}),
}

UNPROJECTED = sorted(KINDS.keys() - {"projected"})


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


@dataclass(frozen=True)
class Called:
    """Two layers without a projection, and what they are called with.

    Args:
        layer: the layers, in training mode.
        x: sequences.
        parts: of an initial state, whether it is given or not.
        state: what follows ``x`` in the call: the parts as PyTorch takes them, or nothing.
    """

    layer: Recurrent
    x: Tensor
    parts: tuple[Tensor, ...]
    state: tuple[Any, ...]


@st.composite
def calls_of(draw: st.DrawFn, structures: Sequence[Structure]) -> Called:
    """Every kind, size, direction and dtype that the native backend knows."""
    kind, dtype = draw(st.sampled_from(UNPROJECTED)), draw(st.sampled_from((torch.float32, torch.float64)))
    width, hidden = draw(st.integers(1, 9)), draw(st.integers(4, 37))
    times, rows = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    batch_first, bidirectional = draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1000)))
    made, more = KINDS[kind]
    layer = made(
        width, hidden, 2, bias=draw(st.booleans()), batch_first=batch_first, bidirectional=bidirectional,
        structure=draw(st.sampled_from(structures)), input_structure=sm.Dense(), per_gate=draw(st.booleans()),
        dtype=dtype, **more,
    )  # fmt: skip
    x = torch.randn(rows, times, width, dtype=dtype) if batch_first else torch.randn(times, rows, width, dtype=dtype)
    shape = (2 * (1 + bidirectional), rows, hidden)
    parts = tuple(torch.randn(shape, dtype=dtype) for _ in range(1 + (kind == "LSTM")))
    state = () if draw(st.booleans()) else (parts,) if kind == "LSTM" else parts
    return Called(layer, x, parts, state)

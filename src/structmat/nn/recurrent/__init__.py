"""Recurrent layers whose matrices are structured, with the interface of PyTorch's."""

from structmat.nn.recurrent.base import Recurrent
from structmat.nn.recurrent.frozen import FrozenRecurrent
from structmat.nn.recurrent.gates import GateLinear
from structmat.nn.recurrent.layers import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.recurrent.moments import second_moments
from structmat.nn.recurrent.split import joined, split

__all__ = [
    "FrozenRecurrent",
    "GateLinear",
    "Recurrent",
    "StructuredGRU",
    "StructuredLSTM",
    "StructuredRNN",
    "joined",
    "second_moments",
    "split",
]

"""Modules: structured layers as drop-in replacements of PyTorch's."""

from structmat.nn.convac import ConvAC, ModeTree, TensorialMixture
from structmat.nn.kronecker import KroneckerBlock, KroneckerNetwork
from structmat.nn.linear import StructuredLinear
from structmat.nn.matrices import FusedLinear, MatrixConv2d
from structmat.nn.recurrent import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.windows import WindowedLinear

__all__ = [
    "ConvAC",
    "FusedLinear",
    "KroneckerBlock",
    "KroneckerNetwork",
    "MatrixConv2d",
    "ModeTree",
    "StructuredGRU",
    "StructuredLSTM",
    "StructuredLinear",
    "StructuredRNN",
    "TensorialMixture",
    "WindowedLinear",
]

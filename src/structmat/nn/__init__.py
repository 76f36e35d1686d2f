"""Modules: structured layers as drop-in replacements of PyTorch's."""

from structmat.nn.attention import SplitAttention
from structmat.nn.convac import ConvAC, ModeTree, TensorialMixture
from structmat.nn.convolution import (
    CP,
    KroneckerKernel,
    Separable,
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
    Tucker,
)
from structmat.nn.embedding import StructuredEmbedding
from structmat.nn.experts import ExpertsLinear, SplitExperts
from structmat.nn.kronecker import KroneckerBlock, KroneckerNetwork
from structmat.nn.linear import StructuredLinear
from structmat.nn.matrices import FusedLinear, MatrixConv2d
from structmat.nn.recurrent import StructuredGRU, StructuredLSTM, StructuredRNN
from structmat.nn.scale import scale_
from structmat.nn.windows import WindowedLinear

__all__ = [
    "CP",
    "ConvAC",
    "ExpertsLinear",
    "FusedLinear",
    "KroneckerBlock",
    "KroneckerKernel",
    "KroneckerNetwork",
    "MatrixConv2d",
    "ModeTree",
    "Separable",
    "SplitAttention",
    "SplitExperts",
    "StructuredConv1d",
    "StructuredConv2d",
    "StructuredConvTranspose1d",
    "StructuredConvTranspose2d",
    "StructuredEmbedding",
    "StructuredGRU",
    "StructuredLSTM",
    "StructuredLinear",
    "StructuredRNN",
    "TensorialMixture",
    "Tucker",
    "WindowedLinear",
    "scale_",
]

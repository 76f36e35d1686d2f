"""Modules: structured layers as drop-in replacements of PyTorch's."""

from structmat.nn.convac import ConvAC, ModeTree, TensorialMixture
from structmat.nn.kronecker import KroneckerBlock, KroneckerNetwork
from structmat.nn.linear import StructuredLinear

__all__ = ["ConvAC", "KroneckerBlock", "KroneckerNetwork", "ModeTree", "StructuredLinear", "TensorialMixture"]

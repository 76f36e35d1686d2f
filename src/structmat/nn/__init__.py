"""Modules: structured layers as drop-in replacements of PyTorch's."""

from structmat.nn.linear import StructuredLinear

__all__ = ["StructuredLinear"]

"""Convolutions with structured kernels: where they read, how a program becomes steps on maps, and the layers."""

from structmat.nn.convolution.forms import CP, KernelForm, KroneckerKernel, Separable, Tucker
from structmat.nn.convolution.frozen import FrozenConvolution
from structmat.nn.convolution.layer import (
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
)

__all__ = [
    "CP",
    "FrozenConvolution",
    "KernelForm",
    "KroneckerKernel",
    "Separable",
    "StructuredConv1d",
    "StructuredConv2d",
    "StructuredConvTranspose1d",
    "StructuredConvTranspose2d",
    "Tucker",
]

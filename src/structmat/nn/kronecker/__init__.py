"""Kronecker multi-layer networks: dense layers become two thin ones with an activation between.

Hogue, Kirby and Narayan, "Weight Matrix Dimensionality Reduction in Deep Learning via Kronecker Multi-layer
Architectures" (2022).
"""

from structmat.nn.kronecker.activation import Slopes, gain
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.choose import choose, choose_all
from structmat.nn.kronecker.convolution import KernelSizes, KroneckerConv2d, kernel_sizes, nearest_kernel
from structmat.nn.kronecker.extended import Convention, Extended, draw_matrices
from structmat.nn.kronecker.initialize import balanced_, calibrate_, source_
from structmat.nn.kronecker.network import Counts, KroneckerNetwork
from structmat.nn.kronecker.perturbation import Perturbation, perturbation
from structmat.nn.kronecker.rates import rate_multipliers
from structmat.nn.kronecker.rectified import block_of, structure_of
from structmat.nn.kronecker.shape import Bias, BlockShape, block_shape
from structmat.nn.kronecker.slopes import absorb_, pruned, set_slopes
from structmat.nn.kronecker.source import SourceTerm, from_source, to_source
from structmat.structures.nonlinear.rectified_kronecker import RectifiedKronecker

__all__ = [
    "Bias",
    "BlockShape",
    "Convention",
    "Counts",
    "Extended",
    "KernelSizes",
    "KroneckerBlock",
    "KroneckerConv2d",
    "KroneckerNetwork",
    "Perturbation",
    "RectifiedKronecker",
    "Slopes",
    "SourceTerm",
    "absorb_",
    "balanced_",
    "block_of",
    "block_shape",
    "calibrate_",
    "choose",
    "choose_all",
    "draw_matrices",
    "from_source",
    "gain",
    "kernel_sizes",
    "nearest_kernel",
    "perturbation",
    "pruned",
    "rate_multipliers",
    "set_slopes",
    "source_",
    "structure_of",
    "to_source",
]

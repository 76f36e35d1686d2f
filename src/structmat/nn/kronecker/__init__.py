"""Kronecker multi-layer networks: dense layers become two thin ones with an activation between.

Hogue, Kirby and Narayan, "Weight Matrix Dimensionality Reduction in Deep Learning via Kronecker Multi-layer
Architectures" (2022).
"""

from structmat.nn.kronecker.activation import Slopes, gain
from structmat.nn.kronecker.block import KroneckerBlock
from structmat.nn.kronecker.choose import choose, choose_all
from structmat.nn.kronecker.extended import Convention, Extended, draw_matrices
from structmat.nn.kronecker.initialize import balanced_, calibrate_, source_
from structmat.nn.kronecker.network import Counts, KroneckerNetwork
from structmat.nn.kronecker.shape import Bias, BlockShape, block_shape
from structmat.nn.kronecker.source import SourceTerm, from_source, to_source

__all__ = [
    "Bias",
    "BlockShape",
    "Convention",
    "Counts",
    "Extended",
    "KroneckerBlock",
    "KroneckerNetwork",
    "Slopes",
    "SourceTerm",
    "balanced_",
    "block_shape",
    "calibrate_",
    "choose",
    "choose_all",
    "draw_matrices",
    "from_source",
    "gain",
    "source_",
    "to_source",
]

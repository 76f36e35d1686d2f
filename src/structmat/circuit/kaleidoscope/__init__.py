"""Kaleidoscope matrices: every small linear circuit as a product of butterfly matrices."""

from structmat.circuit.kaleidoscope.benes import permutation, permutation_starred
from structmat.circuit.kaleidoscope.compiler import kaleidoscope
from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.monotone import broadcast, segment_sums
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.sparse import SparseFactors, sparse, sparse_factors, sparse_sum
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.circuit.kaleidoscope.sums import total

__all__ = [
    "ButterflyProduct",
    "Kaleidoscope",
    "SparseFactors",
    "Stage",
    "broadcast",
    "kaleidoscope",
    "permutation",
    "permutation_starred",
    "segment_sums",
    "sparse",
    "sparse_factors",
    "sparse_sum",
    "total",
]

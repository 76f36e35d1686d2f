"""Kaleidoscope matrices: every small linear circuit as a product of butterfly matrices, or of Monarch matrices."""

from structmat.circuit.kaleidoscope.benes import permutation, permutation_starred
from structmat.circuit.kaleidoscope.clos import (
    monarch,
    monarch_broadcast,
    monarch_permutation,
    monarch_permutation_starred,
    monarch_segment_sums,
    monarch_sparse,
    monarch_total,
)
from structmat.circuit.kaleidoscope.coloring import edge_colors
from structmat.circuit.kaleidoscope.comparison import Comparison, Product, bound, compare
from structmat.circuit.kaleidoscope.compiler import kaleidoscope
from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.monarch import MonarchProduct, MonarchStage
from structmat.circuit.kaleidoscope.monotone import broadcast, segment_sums
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.recognize import Placed, placed
from structmat.circuit.kaleidoscope.sparse import SparseFactors, sparse, sparse_factors, sparse_sum
from structmat.circuit.kaleidoscope.stage import Stage
from structmat.circuit.kaleidoscope.sums import total

__all__ = [
    "ButterflyProduct",
    "Comparison",
    "Kaleidoscope",
    "MonarchProduct",
    "MonarchStage",
    "Placed",
    "Product",
    "SparseFactors",
    "Stage",
    "bound",
    "broadcast",
    "compare",
    "edge_colors",
    "kaleidoscope",
    "monarch",
    "monarch_broadcast",
    "monarch_permutation",
    "monarch_permutation_starred",
    "monarch_segment_sums",
    "monarch_sparse",
    "monarch_total",
    "permutation",
    "permutation_starred",
    "placed",
    "segment_sums",
    "sparse",
    "sparse_factors",
    "sparse_sum",
    "total",
]

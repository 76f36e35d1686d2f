"""Classical algorithms as circuits, built gate by gate, each with its counts beside the best published ones."""

from structmat.circuit.catalogue.cosine import cosine, hartley, sine
from structmat.circuit.catalogue.fourier import fourier, split_radix
from structmat.circuit.catalogue.hadamard import daubechies, haar, hadamard
from structmat.circuit.catalogue.polynomials import evaluation, interpolation, toeplitz
from structmat.circuit.catalogue.prefix import prefix_sums
from structmat.circuit.catalogue.products import circular_convolution, polynomial_product, strassen
from structmat.circuit.catalogue.published import Published, real_operations
from structmat.circuit.catalogue.table import Entry, entries, table

__all__ = [
    "Entry",
    "Published",
    "circular_convolution",
    "cosine",
    "daubechies",
    "entries",
    "evaluation",
    "fourier",
    "haar",
    "hadamard",
    "hartley",
    "interpolation",
    "polynomial_product",
    "prefix_sums",
    "real_operations",
    "sine",
    "split_radix",
    "strassen",
    "table",
    "toeplitz",
]

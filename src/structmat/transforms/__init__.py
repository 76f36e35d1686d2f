"""The classical fast transforms as exact members of families, to start training from or to compare with.

Each function returns a :class:`~structmat.matrix.StructuredMatrix` with the values of SciPy's transform to rounding, in
float64 (complex128) unless another dtype is asked for.
"""

from structmat.transforms.elementary import convolution, householder, permutation
from structmat.transforms.fast_fourier import fourier, fourier_monarch
from structmat.transforms.signs import haar, hadamard, walsh
from structmat.transforms.trigonometric import dct, dft, dst, hartley

__all__ = [
    "convolution",
    "dct",
    "dft",
    "dst",
    "fourier",
    "fourier_monarch",
    "haar",
    "hadamard",
    "hartley",
    "householder",
    "permutation",
    "walsh",
]

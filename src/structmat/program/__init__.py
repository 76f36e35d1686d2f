"""Linear circuits at block granularity: stages, combinators, one pass a file, and the reference backend."""

from structmat.program.build import build
from structmat.program.combinators import Chain, Program, Sum, rename, stages, tensor_sizes
from structmat.program.cost import Cost, cost
from structmat.program.derived import Derived, derive
from structmat.program.fixed import Cosine, Hadamard, Reorder
from structmat.program.fuse import (
    FOR_FEW_ROWS,
    FOR_NATIVE,
    FOR_REFERENCE,
    Writing,
    chainable,
    fuse,
    merge,
    merged_pattern,
)
from structmat.program.lookup import LookupCost, lookup_cost, take_rows
from structmat.program.pairs import Pairs, on_pairs, unsigned
from structmat.program.reference import affine, apply, form
from structmat.program.simplify import simplify
from structmat.program.stage import Stage
from structmat.program.stages import (
    Complex,
    Contraction,
    Crop,
    Diagonal,
    Fourier,
    Interpolation,
    Pad,
    Permute,
    Real,
    Shuffle,
    Sparse,
    Windowed,
)
from structmat.program.table import table
from structmat.program.toeplitz import Convolution, convolution
from structmat.program.transpose import transpose
from structmat.program.written_out import Call, Generated

__all__ = [
    "FOR_FEW_ROWS",
    "FOR_NATIVE",
    "FOR_REFERENCE",
    "Call",
    "Chain",
    "Complex",
    "Contraction",
    "Convolution",
    "Cosine",
    "Cost",
    "Crop",
    "Derived",
    "Diagonal",
    "Fourier",
    "Generated",
    "Hadamard",
    "Interpolation",
    "LookupCost",
    "Pad",
    "Pairs",
    "Permute",
    "Program",
    "Real",
    "Reorder",
    "Shuffle",
    "Sparse",
    "Stage",
    "Sum",
    "Windowed",
    "Writing",
    "affine",
    "apply",
    "build",
    "chainable",
    "convolution",
    "cost",
    "derive",
    "form",
    "fuse",
    "lookup_cost",
    "merge",
    "merged_pattern",
    "on_pairs",
    "rename",
    "simplify",
    "stages",
    "table",
    "take_rows",
    "tensor_sizes",
    "transpose",
    "unsigned",
]

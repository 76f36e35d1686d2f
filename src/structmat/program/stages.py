"""The stages of a program, as frozen dataclasses of names and shapes.

Conventions: vectors are flattened row-major; a stage maps ``in_features`` numbers to ``out_features`` numbers.
``multiplications`` and ``additions`` count scalar operations for one vector, in the arithmetic of the values that pass
(the pass :func:`structmat.program.cost.cost` prices complex arithmetic). ``depth`` is the number of levels of gates
``alpha * g + beta * h`` in the binary circuit.

Every stage can be transposed, and the transpose uses the same tensors: ``stage.transpose().transpose() == stage``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from structmat.program.stage import Square, Stage, Turned, Unweighted, binary_depth


@dataclass(frozen=True)
class Contraction(Stage):
    """Kronecker-sparse factor: ``y[a, b, d] = sum over c of w[a, b, c, d] * x[a, c, d]``.

    A matrix of shape (abd, acd) supported on ``I_a (x) 1_{b x c} (x) I_d``. The tensor is stored with shape
    ``(a, b, c, d)``, the axes ``a`` and ``d`` having size 1 where they are shared, or in any shape with the same
    entries in the same order; ``(a, c, b, d)`` where ``transposed``.
    """

    weight: str
    a: int
    b: int
    c: int
    d: int
    shared_a: bool = False
    shared_d: bool = False
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.a * self.c * self.d

    @property
    def out_features(self) -> int:
        return self.a * self.b * self.d

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        b, c = (self.c, self.b) if self.transposed else (self.b, self.c)
        return (1 if self.shared_a else self.a, b, c, 1 if self.shared_d else self.d)

    @property
    def pattern(self) -> tuple[int, int, int, int]:
        return (self.a, self.b, self.c, self.d)

    def transpose(self) -> Contraction:
        return replace(self, b=self.c, c=self.b, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.weight: math.prod(self.stored_shape)}

    def rename(self, name: Callable[[str], str]) -> Contraction:
        return replace(self, weight=name(self.weight))

    @property
    def multiplications(self) -> int:
        return self.a * self.b * self.c * self.d

    @property
    def additions(self) -> int:
        return self.a * self.b * (self.c - 1) * self.d

    @property
    def depth(self) -> int:
        return binary_depth(self.c)

    def __str__(self) -> str:
        shared = "".join(axis for axis, is_shared in (("a", self.shared_a), ("d", self.shared_d)) if is_shared)
        note = f" shared over {', '.join(shared)}" if shared else ""
        return f"Contraction ({self.a}, {self.b}, {self.c}, {self.d}){note}"


@dataclass(frozen=True)
class Diagonal(Square):
    """``y = w * x``. Where ``spectrum`` is set the multiplier is the discrete Fourier transform of ``w``."""

    weight: str
    size: int
    spectrum: bool = False

    def transpose(self) -> Diagonal:
        return self

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.weight: self.size}

    def rename(self, name: Callable[[str], str]) -> Diagonal:
        return replace(self, weight=name(self.weight))

    @property
    def multiplications(self) -> int:
        return self.size

    @property
    def additions(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 1

    def __str__(self) -> str:
        return "Diagonal of the transformed weight" if self.spectrum else "Diagonal"


@dataclass(frozen=True)
class Permute(Square, Unweighted):
    """``y[i] = x[p[i]]`` with ``p`` an integer tensor; the transpose is the inverse permutation."""

    index: str
    size: int
    inverse: bool = False

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.index,)

    def transpose(self) -> Permute:
        return replace(self, inverse=not self.inverse)

    def rename(self, name: Callable[[str], str]) -> Permute:
        return replace(self, index=name(self.index))

    def __str__(self) -> str:
        return "Permute by the inverse index" if self.inverse else "Permute"


@dataclass(frozen=True)
class Shuffle(Unweighted):
    """A permutation of axes: view the vector as an array of ``sizes``, permute its ``axes``, flatten."""

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert sorted(self.axes) == list(range(len(self.sizes))), self

    @property
    def in_features(self) -> int:
        return math.prod(self.sizes)

    @property
    def out_features(self) -> int:
        return math.prod(self.sizes)

    def transpose(self) -> Shuffle:
        inverse = tuple(self.axes.index(i) for i in range(len(self.axes)))
        return Shuffle(tuple(self.sizes[i] for i in self.axes), inverse)

    def __str__(self) -> str:
        return f"Shuffle {self.sizes} -> {tuple(self.sizes[i] for i in self.axes)}"


@dataclass(frozen=True)
class Fourier(Square, Unweighted):
    """The discrete Fourier transform ``F[k, j] = exp(-2 pi i j k / n)``, or its inverse (which carries the 1/n).

    Both are symmetric matrices, hence their own transposes. Cost model: the usual ``5 n log2 n`` real operations of a
    complex transform, two fifths of them multiplications.
    """

    size: int
    inverse: bool = False

    def transpose(self) -> Fourier:
        return self

    @property
    def multiplications(self) -> int:
        return round(2 * self.size * math.log2(self.size))

    @property
    def additions(self) -> int:
        return round(3 * self.size * math.log2(self.size))

    @property
    def depth(self) -> int:
        return 2 * binary_depth(self.size)

    def __str__(self) -> str:
        return "Inverse Fourier" if self.inverse else "Fourier"


@dataclass(frozen=True)
class Sparse(Turned):
    """``y[i] += values[k] * x[j]`` for a fixed number of entries, where the integer tensor ``places`` holds
    ``i * width + j``: their places in the matrix (height, width), row by row."""

    values: str
    places: str
    height: int
    width: int
    capacity: int
    transposed: bool = False

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.places,)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.values: self.capacity}

    def rename(self, name: Callable[[str], str]) -> Sparse:
        return replace(self, values=name(self.values), places=name(self.places))

    @property
    def multiplications(self) -> int:
        return self.capacity

    @property
    def additions(self) -> int:
        """Exact when every row has an entry; an empty row makes it one more."""
        return max(0, self.capacity - self.out_features)

    @property
    def depth(self) -> int:
        """For entries spread evenly over the rows: which rows hold them is in the tensors."""
        return binary_depth(max(1, math.ceil(self.capacity / self.out_features)))

    def __str__(self) -> str:
        return f"Sparse with {self.capacity} entries"


@dataclass(frozen=True)
class Interpolation(Stage):
    """``[I, w] P``: ``rank`` chosen inputs, to which the others are added with weights.

    ``weight`` is (rank, size - rank); ``places`` is an integer tensor (size,): column ``j`` of the matrix is column
    ``places[j]`` of ``[I, w]``. The right factor of an interpolative decomposition (Cheng, Gimbutas, Martinsson,
    Rokhlin 2005).
    """

    weight: str
    places: str
    rank: int
    size: int
    transposed: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.rank < self.size, self

    @property
    def in_features(self) -> int:
        return self.rank if self.transposed else self.size

    @property
    def out_features(self) -> int:
        return self.size if self.transposed else self.rank

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.places,)

    def transpose(self) -> Interpolation:
        return replace(self, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.weight: self.rank * (self.size - self.rank)}

    def rename(self, name: Callable[[str], str]) -> Interpolation:
        return replace(self, weight=name(self.weight), places=name(self.places))

    @property
    def multiplications(self) -> int:
        return self.rank * (self.size - self.rank)

    @property
    def additions(self) -> int:
        terms = self.rank - 1 if self.transposed else self.rank
        return terms * (self.size - self.rank)

    @property
    def depth(self) -> int:
        return binary_depth(self.rank if self.transposed else self.size - self.rank + 1)

    def __str__(self) -> str:
        return f"Interpolation of rank {self.rank}{', transposed' if self.transposed else ''}"


@dataclass(frozen=True)
class Windowed(Turned):
    """A sum of windowed rank-one terms (generalized block low rank).

    Term ``k`` reads ``z = sum_j right[j] * x[column_j]`` over a cyclic interval of columns and adds ``left[i] * z`` to
    a cyclic interval of rows. ``windows`` is an integer tensor (terms, 4) of row location, row width, column location
    and column width; ``left`` and ``right`` hold the contents one term after the other, ``left_size`` and
    ``right_size`` numbers in all (the sums of the widths, which is what makes the capacity static).
    Source: Lee and Kim, "Differentiable Learning of Generalized Structured Matrices" (ICLR 2024).
    """

    left: str
    right: str
    windows: str
    height: int
    width: int
    terms: int
    left_size: int
    right_size: int
    transposed: bool = False

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.windows,)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.left: self.left_size, self.right: self.right_size}

    def rename(self, name: Callable[[str], str]) -> Windowed:
        return replace(self, left=name(self.left), right=name(self.right), windows=name(self.windows))

    @property
    def multiplications(self) -> int:
        return self.left_size + self.right_size

    @property
    def additions(self) -> int:
        read, written = (self.left_size, self.right_size) if self.transposed else (self.right_size, self.left_size)
        return max(0, read - self.terms) + max(0, written - self.out_features)

    @property
    def depth(self) -> int:
        read = self.left_size if self.transposed else self.right_size
        return binary_depth(max(1, math.ceil(read / max(1, self.terms)))) + binary_depth(max(1, self.terms))

    def __str__(self) -> str:
        return f"Windowed with {self.terms} terms{', transposed' if self.transposed else ''}"


@dataclass(frozen=True)
class Pad(Unweighted):
    """Embeds the vector in a longer one, from position ``before`` on; the rest is zero."""

    size: int
    padded: int
    before: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.before <= self.padded - self.size, self

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.padded

    def transpose(self) -> Crop:
        return Crop(self.padded, self.size, self.before)

    def __str__(self) -> str:
        return f"Pad from {self.before}" if self.before else "Pad"


@dataclass(frozen=True)
class Crop(Unweighted):
    """Keeps ``kept`` numbers from position ``before`` on."""

    size: int
    kept: int
    before: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.before <= self.size - self.kept, self

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.kept

    def transpose(self) -> Pad:
        return Pad(self.kept, self.size, self.before)

    def __str__(self) -> str:
        return f"Crop from {self.before}" if self.before else "Crop"


@dataclass(frozen=True)
class Real(Square, Unweighted):
    """The real part of complex values. Its transpose over the reals is :class:`Complex`."""

    size: int

    def transpose(self) -> Complex:
        return Complex(self.size)

    def __str__(self) -> str:
        return "Real part"


@dataclass(frozen=True)
class Complex(Square, Unweighted):
    """Real values taken as complex ones: what precedes a complex section of an otherwise real chain."""

    size: int

    def transpose(self) -> Real:
        return Real(self.size)

    def __str__(self) -> str:
        return "As complex"

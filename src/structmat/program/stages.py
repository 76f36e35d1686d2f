"""The stages of a program and the two combinators, as frozen dataclasses of names and shapes.

Conventions: vectors are flattened row-major; a stage maps ``in_features`` numbers to ``out_features`` numbers.
``multiplications`` and ``additions`` count scalar operations for one vector, in the arithmetic of the values that pass
(the pass :func:`structmat.program.cost.cost` prices complex arithmetic). ``depth`` is the number of levels of gates
``alpha * g + beta * h`` in the binary circuit.

Every stage can be transposed, and the transpose uses the same tensors: ``stage.transpose().transpose() == stage``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch


def binary_depth(terms: int) -> int:
    """Levels of fan-in-2 gates that a weighted sum of ``terms`` values takes (a scaling alone is one gate)."""
    return max(1, math.ceil(math.log2(terms))) if terms > 0 else 0


class Stage(ABC):
    """One linear map of a chain. Subclasses are frozen dataclasses and final."""

    @property
    @abstractmethod
    def in_features(self) -> int: ...

    @property
    @abstractmethod
    def out_features(self) -> int: ...

    @abstractmethod
    def transpose(self) -> Stage: ...

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, int]:
        """The learned tensors that the stage reads: name and number of entries."""

    @property
    def indices(self) -> tuple[str, ...]:
        """The fixed integer tensors that the stage reads."""
        return ()

    @abstractmethod
    def rename(self, name: Callable[[str], str]) -> Stage:
        """The same stage reading tensors under other names."""

    @property
    @abstractmethod
    def multiplications(self) -> int: ...

    @property
    @abstractmethod
    def additions(self) -> int: ...

    @property
    @abstractmethod
    def depth(self) -> int: ...

    @abstractmethod
    def __str__(self) -> str: ...


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
class Diagonal(Stage):
    """``y = w * x``. Where ``spectrum`` is set the multiplier is the discrete Fourier transform of ``w``."""

    weight: str
    size: int
    spectrum: bool = False

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size

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


class _Unweighted(Stage):
    """What the stages without learned tensors share."""

    @property
    def weights(self) -> Mapping[str, int]:
        return {}

    def rename(self, name: Callable[[str], str]) -> Stage:
        return self

    @property
    def multiplications(self) -> int:
        return 0

    @property
    def additions(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 0


@dataclass(frozen=True)
class Permute(_Unweighted):
    """``y[i] = x[p[i]]`` with ``p`` an integer tensor; the transpose is the inverse permutation."""

    index: str
    size: int
    inverse: bool = False

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size

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
class Shuffle(_Unweighted):
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
class Fourier(_Unweighted):
    """The discrete Fourier transform ``F[k, j] = exp(-2 pi i j k / n)``, or its inverse (which carries the 1/n).

    Both are symmetric matrices, hence their own transposes. Cost model: the usual ``5 n log2 n`` real operations of a
    complex transform, two fifths of them multiplications.
    """

    size: int
    inverse: bool = False

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size

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
class Sparse(Stage):
    """``y[i] += values[k] * x[j]`` for a fixed number of entries, where the integer tensor ``places`` holds
    ``i * width + j``: their places in the matrix (height, width), row by row."""

    values: str
    places: str
    height: int
    width: int
    capacity: int
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.height if self.transposed else self.width

    @property
    def out_features(self) -> int:
        return self.width if self.transposed else self.height

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.places,)

    def transpose(self) -> Sparse:
        return replace(self, transposed=not self.transposed)

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
class Windowed(Stage):
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
    def in_features(self) -> int:
        return self.height if self.transposed else self.width

    @property
    def out_features(self) -> int:
        return self.width if self.transposed else self.height

    @property
    def indices(self) -> tuple[str, ...]:
        return (self.windows,)

    def transpose(self) -> Windowed:
        return replace(self, transposed=not self.transposed)

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
class Pad(_Unweighted):
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
class Crop(_Unweighted):
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
class Real(_Unweighted):
    """The real part of complex values. Its transpose over the reals is :class:`Complex`."""

    size: int

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size

    def transpose(self) -> Complex:
        return Complex(self.size)

    def __str__(self) -> str:
        return "Real part"


@dataclass(frozen=True)
class Complex(_Unweighted):
    """Real values taken as complex ones: what precedes a complex section of an otherwise real chain."""

    size: int

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def out_features(self) -> int:
        return self.size

    def transpose(self) -> Real:
        return Real(self.size)

    def __str__(self) -> str:
        return "As complex"


@dataclass(frozen=True)
class Call(Stage):
    """Any linear PyTorch function ``function(x, *tensors)`` of rows ``x`` (batch, width), with a stated cost.

    ``function`` is a module-level function (so that equal stages compare equal). The transpose is its vector-Jacobian
    product. It has no native kernel: this is how an idea works on its first day.
    """

    function: Callable[..., torch.Tensor]
    tensors: tuple[tuple[str, int], ...]
    height: int
    width: int
    forward_multiplications: int
    forward_additions: int
    forward_depth: int
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.height if self.transposed else self.width

    @property
    def out_features(self) -> int:
        return self.width if self.transposed else self.height

    def transpose(self) -> Call:
        return replace(self, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return dict(self.tensors)

    def rename(self, name: Callable[[str], str]) -> Call:
        return replace(self, tensors=tuple((name(n), size) for n, size in self.tensors))

    @property
    def multiplications(self) -> int:
        return self.forward_multiplications

    @property
    def additions(self) -> int:
        """By the transposition principle the transpose of a p x q circuit takes p - q additions more."""
        change = self.height - self.width if self.transposed else 0
        return max(0, self.forward_additions + change)

    @property
    def depth(self) -> int:
        return self.forward_depth

    def __str__(self) -> str:
        return f"Call {self.function.__name__}{', transposed' if self.transposed else ''}"


@dataclass(frozen=True)
class Convolution(Stage):
    """Blocks of Toeplitz or Hankel matrices: ``y[b] = sum over c of T(w[b, c]) x[c]``.

    ``x`` is (inputs, width), ``y`` (outputs, height), ``weight`` (outputs, inputs, entries), or of any shape with the
    same entries in the same order. Without a ``twist`` a block is a free Toeplitz matrix,
    ``T[i, j] = w[i - j + width - 1]``, with ``height + width - 1`` entries. With a twist f and ``period`` entries it is
    the corner of an f-circulant matrix, ``T[i, j] = w[i - j]`` on and below the diagonal and
    ``f * w[i - j + period]`` above. Where ``hankel`` is set the entries run the other way:
    ``T[i, j] = w[i + j]``, and ``f * w[i + j - period]`` from the period on.

    ``transform`` says which algorithm runs: fast Fourier transforms, which are stable here since nothing is divided,
    or one product with the blocks written out, which is faster for small ones. Cost model of the transforms: half of a
    complex transform (:class:`Fourier`) for each input and output block, and a complex multiply-add for each pair of
    blocks and frequency; the transforms of the weights are not counted, since they serve a whole batch.
    Source: Golub and Van Loan, Matrix Computations, section 4.8 and 12.1; Thomas et al. (NeurIPS 2018).
    """

    weight: str
    outputs: int
    inputs: int
    height: int
    width: int
    twist: float | None = None
    period: int = 0
    hankel: bool = False
    transform: bool = False
    transposed: bool = False
    length: int = field(init=False, compare=False, repr=False)
    """Of the Fourier transforms."""
    is_circular: bool = field(init=False, compare=False, repr=False)
    """Whether the blocks are corners of circulant matrices of a size that transforms are fast for."""

    def __post_init__(self) -> None:
        assert self.twist is None or self.period >= max(self.height, self.width), self
        circular = self.twist == 1.0 and smooth_size(self.period) == self.period
        object.__setattr__(self, "is_circular", circular)
        object.__setattr__(self, "length", self.period if circular else smooth_size(self.height + self.width - 1))

    @property
    def entries(self) -> int:
        """Numbers in the weight of a block."""
        return self.height + self.width - 1 if self.twist is None else self.period

    @property
    def in_features(self) -> int:
        return self.outputs * self.height if self.transposed else self.inputs * self.width

    @property
    def out_features(self) -> int:
        return self.inputs * self.width if self.transposed else self.outputs * self.height

    def transpose(self) -> Convolution:
        return replace(self, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return {self.weight: self.outputs * self.inputs * self.entries}

    def rename(self, name: Callable[[str], str]) -> Convolution:
        return replace(self, weight=name(self.weight))

    @property
    def multiplications(self) -> int:
        if not self.transform:
            return self.in_features * self.out_features
        transforms = (self.inputs + self.outputs) * round(self.length * math.log2(self.length))
        return transforms + 4 * self.outputs * self.inputs * (self.length // 2 + 1)

    @property
    def additions(self) -> int:
        if not self.transform:
            return (self.in_features - 1) * self.out_features
        transforms = (self.inputs + self.outputs) * round(1.5 * self.length * math.log2(self.length))
        kept = self.inputs if self.transposed else self.outputs
        products = 4 * self.outputs * self.inputs - 2 * kept
        return transforms + products * (self.length // 2 + 1)

    @property
    def depth(self) -> int:
        if not self.transform:
            return binary_depth(self.in_features)
        joined = self.outputs if self.transposed else self.inputs
        return 4 * binary_depth(self.length) + binary_depth(2 * joined)

    def __str__(self) -> str:
        kind = "Hankel" if self.hankel else "Toeplitz"
        kind = kind if self.twist is None else f"{kind}, {self.twist:g}-circulant"
        size = f"{self.outputs} x {self.inputs} blocks of {self.height} x {self.width}"
        how = f"Fourier transforms of {self.length}" if self.transform else "written out"
        return f"Convolution ({kind}), {size}, {how}{', transposed' if self.transposed else ''}"


def convolution(
    weight: str,
    outputs: int,
    inputs: int,
    height: int,
    width: int,
    *,
    twist: float | None = None,
    period: int = 0,
    hankel: bool = False,
) -> Convolution:
    """A convolution with the algorithm chosen by its size: transforms where they take ``WRITTEN_OUT`` times fewer
    multiplications than the product with the blocks written out."""
    stage = Convolution(weight, outputs, inputs, height, width, twist, period, hankel)
    by_transforms = replace(stage, transform=True)
    return by_transforms if stage.multiplications > WRITTEN_OUT * by_transforms.multiplications else stage


WRITTEN_OUT = 6
"""A multiplication in a matrix product is so many times faster than one in a Fourier transform (float32, PyTorch 2.13
on a CPU with AVX-512: at n = 256 both ways take the same time)."""


@lru_cache(maxsize=4096)
def smooth_size(size: int) -> int:
    """The smallest number of at least ``size`` without prime factors above 5: Fourier transforms are fast there."""
    best = 1 << max(0, size - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes << max(0, -(-size // threes) - 1).bit_length()
            best = min(best, twos) if twos >= size else best
            threes *= 3
        fives *= 5
    return best


@dataclass(frozen=True)
class Generated(Stage):
    """One product with a matrix whose entries are a function of the tensors: it is written out at each call, and then
    multiplied by.

    The explicit and stable form of what has faster forms only where these are stable: Cauchy, Vandermonde and Krylov
    matrices, values of polynomials. ``function(*tensors, *fixed, *arguments)`` is a module-level function that gives
    the matrix (height, width), differentiable, in the dtype of the tensors; its own operations are not counted, since
    they serve a whole batch.

    Args:
        function: makes the matrix.
        tensors: names and numbers of entries, in the order of its arguments.
        arguments: further ones, plain values.
        height, width: of the matrix.
        fixed: names of integer tensors, which come after the others.
        linear: names of the tensors in each of which the matrix is linear.
        signed: names of those that count with their sign in ``size``.
        roundings: relative errors, in units of the precision, that an entry may have against ``size``.
        size: what rounding errors of the entries are proportional to, like ``function`` but of the moduli of the
            tensors; ``function`` itself if None, as is right for sums of products.
        fast: what stands for the stage when its tensors are fixed, where that is stable; None writes the matrix out.
    """

    function: Callable[..., torch.Tensor]
    tensors: tuple[tuple[str, int], ...]
    arguments: tuple[int | float | str, ...]
    height: int
    width: int
    fixed: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()
    roundings: int = 4
    size: Callable[..., torch.Tensor] | None = None
    fast: Callable[..., tuple[Program, dict[str, torch.Tensor]] | None] | None = None
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.height if self.transposed else self.width

    @property
    def out_features(self) -> int:
        return self.width if self.transposed else self.height

    def transpose(self) -> Generated:
        return replace(self, transposed=not self.transposed)

    @property
    def weights(self) -> Mapping[str, int]:
        return dict(self.tensors)

    def rename(self, name: Callable[[str], str]) -> Generated:
        tensors = tuple((name(n), size) for n, size in self.tensors)
        fixed, linear, signed = (tuple(map(name, names)) for names in (self.fixed, self.linear, self.signed))
        return replace(self, tensors=tensors, fixed=fixed, linear=linear, signed=signed)

    @property
    def indices(self) -> tuple[str, ...]:
        return self.fixed

    @property
    def multiplications(self) -> int:
        return self.height * self.width

    @property
    def additions(self) -> int:
        return self.out_features * (self.in_features - 1)

    @property
    def depth(self) -> int:
        return binary_depth(self.in_features)

    def __str__(self) -> str:
        return f"{self.function.__name__.replace('_', ' ').capitalize()} written out{', transposed' * self.transposed}"


# --------------------------------------------------------------------------------------------------- combinators


@dataclass(frozen=True)
class Chain:
    """Programs one after the other, first applied first. Never empty: the identity is a chain of one ``Crop``."""

    steps: tuple[Program, ...]

    def __post_init__(self) -> None:
        assert self.steps, "a chain has at least one step"
        for first, second in zip(self.steps, self.steps[1:], strict=False):
            assert first.out_features == second.in_features, f"{first} does not feed {second}"

    @property
    def in_features(self) -> int:
        return self.steps[0].in_features

    @property
    def out_features(self) -> int:
        return self.steps[-1].out_features

    def __str__(self) -> str:
        from structmat.program.table import table

        return table(self)


@dataclass(frozen=True)
class Sum:
    """Programs of the same shape side by side, their outputs added."""

    parts: tuple[Program, ...]

    def __post_init__(self) -> None:
        assert self.parts, "a sum has at least one part"
        assert len({(p.in_features, p.out_features) for p in self.parts}) == 1, self.parts

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        return self.parts[0].out_features

    def __str__(self) -> str:
        from structmat.program.table import table

        return table(self)


Program = Stage | Chain | Sum


def stages(program: Program) -> tuple[Stage, ...]:
    """All stages of a program, in order of application."""
    if isinstance(program, Stage):
        return (program,)
    inner = program.steps if isinstance(program, Chain) else program.parts
    return tuple(stage for part in inner for stage in stages(part))


def rename(program: Program, name: Callable[[str], str]) -> Program:
    """The same program reading its tensors under other names."""
    if isinstance(program, Stage):
        return program.rename(name)
    if isinstance(program, Chain):
        return Chain(tuple(rename(step, name) for step in program.steps))
    return Sum(tuple(rename(part, name) for part in program.parts))


def tensor_sizes(program: Program) -> dict[str, int]:
    """Number of entries of every learned tensor that the program reads, each once."""
    sizes: dict[str, int] = {}
    for stage in stages(program):
        for name, size in stage.weights.items():
            assert sizes.setdefault(name, size) == size, f"{name} is read with two sizes"
    return sizes

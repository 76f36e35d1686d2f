"""What a family of structured matrices is: a frozen dataclass of hyper-parameters with four members.

A family says which tensors it has (:meth:`Structure.parameters`), which linear circuit they drive
(:meth:`Structure.program`), which of its members is nearest to a given matrix (:meth:`Structure.project`) and
which sizes are worth trying (:meth:`Structure.configurations`). Everything else follows from these.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from structmat.errors import FormatError, ShapeError, StructureError
from structmat.places import is_packed, packed_shape, stored_places

if TYPE_CHECKING:
    from structmat.displacement.form import CauchyForm
    from structmat.matrix import StructuredMatrix
    from structmat.program import Program
    from structmat.projection.target import Fit, Target

Shape = tuple[int, int]
"""``(out_features, in_features)``, as the shape of ``nn.Linear.weight``."""

DENSE_GAIN = 1.0 / 3.0
"""Output variance of ``nn.Linear``'s default initialisation, per unit mean square of the input."""


@runtime_checkable
class Init(Protocol):
    """How a tensor is drawn. Implementations are frozen dataclasses."""

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A fresh tensor of this shape; equal generators draw equal numbers on every device."""
        ...


@dataclass(frozen=True)
class Normal:
    """Independent zero-mean Gaussian entries; for complex dtypes ``std**2`` is the mean squared modulus."""

    std: float

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        # Drawn on the CPU so that a seed means the same matrix on every device.
        wide = torch.promote_types(dtype, torch.float32)
        return (torch.randn(shape, generator=generator, dtype=wide) * self.std).to(dtype=dtype, device=device)


@dataclass(frozen=True)
class Constant:
    """All entries equal."""

    value: float

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.full(shape, self.value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Arange:
    """The integers 0, 1, 2, ... in order: the identity permutation."""

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.arange(math.prod(shape), dtype=dtype, device=device).reshape(shape)


@dataclass(frozen=True)
class Scaled:
    """Another initialisation times a constant."""

    init: Init
    factor: float

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self.init.draw(shape, generator=generator, dtype=dtype, device=device) * self.factor


@dataclass(frozen=True)
class ParameterSpec:
    """One named tensor of a family.

    Args:
        shape: the tensor's shape.
        init: how it is drawn at the start.
        learned: a parameter (True) or a fixed buffer (False), such as the support of a sparse matrix.
        dtype: ``None`` for the dtype of the layer; indices say ``torch.int64``.
        places_in: if positive, the tensor holds ascending places in ``range(places_in)``, without repetition; a file
            then keeps one bit a place, or the list if that is shorter.
    """

    shape: tuple[int, ...]
    init: Init
    learned: bool = True
    dtype: torch.dtype | None = None
    places_in: int = 0

    @property
    def numel(self) -> int:
        """Numbers of the tensor in use."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Numbers that a file holds for the tensor: one for each entry or index, one for 32 bits."""
        return stored_places(self.numel, self.places_in) if self.places_in else self.numel

    @property
    def is_packed(self) -> bool:
        """Whether a file holds the tensor as bits."""
        return self.places_in > 0 and is_packed(self.numel, self.places_in)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The tensor's shape in a file."""
        return packed_shape(self.places_in) if self.is_packed else self.shape

    @property
    def file_dtype(self) -> torch.dtype | None:
        """Its dtype there; ``None`` for that of the layer."""
        return torch.uint8 if self.is_packed else self.dtype


class Structure(ABC):
    """A family with its hyper-parameters. Subclasses are frozen dataclasses, final, one file each.

    A hyper-parameter typed ``int | float`` may be given as a float strictly between 0 and 1: that fraction of the
    dense parameter count (see :func:`resolve`). ``parameters``, ``program`` and ``project`` are only ever called on a
    resolved structure and on a shape that :meth:`native_shape` maps to itself: padding is done outside.
    """

    closed_under_scaling: ClassVar[bool] = True
    """False for families such as orthogonal matrices: ``2 * S`` is not a member. Their initial gain is 1."""

    supports_complex: ClassVar[bool] = True
    """False where the tensors must be real; of a family with parts, :func:`allows_complex` asks these too."""

    weighs_outputs: ClassVar[bool] = False
    """Whether :meth:`project` honours a target's output moment; otherwise its fit is refined from outside."""

    keeps_variance: ClassVar[bool] = True
    """False for averages, such as soft permutations, whose outputs vary less at the start than those of others."""

    by_default: ClassVar[bool] = True
    """Whether ``compress`` tries the family where the user names none. False for those that few weights of a network
    are near to: each is a fit of every layer at every size."""

    is_matrix: ClassVar[bool] = True
    """False for what is a matrix only at the start: a layer of it is another module, which learns to be nonlinear."""

    @abstractmethod
    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        """Names, shapes and initialisation of the tensors; the output has the variance of a dense layer's."""

    @abstractmethod
    def program(self, shape: Shape) -> Program:
        """The stages that multiply by a member."""

    @abstractmethod
    def project(self, target: Target) -> Fit:
        """The best member that can be found for a given matrix, with a certificate of how good it is."""

    @classmethod
    @abstractmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Members worth trying with at most ``budget`` stored numbers (:func:`count_stored`), on the machine's grid.

        Empty only if the cheapest member exceeds the budget.
        """

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        """What is left when what was soft while learning is decided: another structure and its tensors."""
        return self, tensors

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """What is added to a loss so that hardening will change little, 0 where it changes nothing; None for families
        without soft choices."""
        return None

    def restriction(self, shape: Shape) -> str | None:
        """Why this shape is refused, as one sentence with numbers and a remedy, or None."""
        return None

    def native_shape(self, shape: Shape) -> Shape:
        """The smallest shape, at least ``shape``, that the family is defined on; the rest is padded and cropped."""
        return shape

    def resolve(self, shape: Shape) -> Structure:
        """The same structure with automatic choices (such as the shapes of factors) made for this shape."""
        return self

    def inversion(self, matrix: StructuredMatrix) -> CauchyForm | Tensor | None:
        """What solving with a square member (not transposed) can use: its generators, or the first column (n,) of a
        circulant matrix; None where its dense matrix is all there is."""
        return None

    def __str__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) is not None]
        return f"{type(self).__name__}({', '.join(f'{n}={_show(v)}' for n, v in shown)})"


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))}{',' if len(value) == 1 else ''})"
    return str(value) if isinstance(value, Structure) else repr(value)


def parts(structure: Structure) -> Iterator[Structure]:
    """The structures that a sum or a product is made of; none for the others."""
    for field in dataclasses.fields(structure):  # type: ignore[arg-type]
        value = getattr(structure, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Structure):
                yield part


def allows_complex(structure: Structure) -> bool:
    """Whether the tensors may be complex: the family and all its parts say so."""
    return type(structure).supports_complex and all(allows_complex(part) for part in parts(structure))


def is_matrix(structure: Structure) -> bool:
    """Whether a layer of it is linear: the structure and all its parts say so."""
    return type(structure).is_matrix and all(is_matrix(part) for part in parts(structure))


def keeps_variance(structure: Structure) -> bool:
    """Whether a fresh member has the output variance of a dense layer's: the family and all its parts say so."""
    return type(structure).keeps_variance and all(keeps_variance(part) for part in parts(structure))


# ---------------------------------------------------------------------------------------------------------- sizes


def check_size(family: object, name: str, value: object, *, minimum: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum`` or a float strictly between 0 and 1."""
    owner = type(family).__name__
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StructureError(f"{owner}({name}={value!r}): {name} must be a number, not {type(value).__name__}.")
    if isinstance(value, float):
        if not 0.0 < value < 1.0:
            raise StructureError(
                f"{owner}({name}={value!r}): a float means a fraction of the dense parameter count and lies strictly "
                f"between 0 and 1. Use an integer of at least {minimum}, or a fraction such as {name}=0.25."
            )
    elif value < minimum:
        raise StructureError(f"{owner}({name}={value!r}): {name} is at least {minimum}.")


def check_count(family: object, name: str, value: object, *, minimum: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise StructureError(f"{type(family).__name__}({name}={value!r}): {name} is an integer of at least {minimum}.")


def whole(value: int | float | None) -> int:
    """The integer that a resolved hyper-parameter is."""
    assert isinstance(value, int), f"unresolved size {value!r}"
    return value


def check_shape(shape: Sequence[int]) -> Shape:
    """Validate ``(out_features, in_features)``."""
    sizes: tuple[object, ...] = tuple(shape)
    if len(sizes) != 2 or not all(isinstance(s, int) and s >= 1 for s in sizes):
        raise ShapeError(f"A shape is (out_features, in_features), two integers of at least 1; got {tuple(shape)!r}.")
    return int(shape[0]), int(shape[1])


# ---------------------------------------------------------------------------------------------------- resolution


@lru_cache(maxsize=4096)
def check_is_structure(value: object) -> None:
    """Raise unless a value is a family with its hyper-parameters.

    Raises:
        StructureError: it is anything else; a class wants to be called.
    """
    if isinstance(value, Structure):
        return
    if isinstance(value, type) and issubclass(value, Structure):
        told = f"the class {value.__name__}. Call it, with its hyper-parameters if it has some: {value.__name__}(...)"
    else:
        told = f"{value!r}. Give one such as structmat.LowRank(rank=0.25)"
    raise StructureError(f"A structure is a member of a family; got {told}.")


def resolve(structure: Structure, shape: Shape) -> Structure:
    """``structure`` with every automatic or fractional size replaced by integers for this shape.

    A float field in (0, 1) becomes the largest integer with which the family holds at most that fraction of the
    ``out * in`` parameters of a dense matrix. Idempotent.

    Raises:
        StructureError: it is no structure.
        ShapeError: the shape is refused, or the fraction is below what the smallest member needs.
    """
    check_is_structure(structure)
    shape = check_shape(shape)
    structure = structure.resolve(shape)
    for field in dataclasses.fields(structure):  # type: ignore[arg-type]
        value = getattr(structure, field.name)
        if isinstance(value, float):
            structure = _resolve_fraction(structure, field.name, value, shape)
    reason = structure.restriction(shape)
    if reason is not None:
        raise ShapeError(f"{structure} does not fit a matrix of shape {shape}: {reason}")
    return structure


def _resolve_fraction(structure: Structure, name: str, fraction: float, shape: Shape) -> Structure:
    limit = fraction * shape[0] * shape[1]

    def fits(size: int) -> bool:
        candidate: Structure = dataclasses.replace(structure, **{name: size})  # type: ignore[type-var]
        if candidate.restriction(shape) is not None:
            return False
        return count_parameters(candidate, shape) <= limit

    if not fits(1):
        smallest: Structure = dataclasses.replace(structure, **{name: 1})  # type: ignore[type-var]
        reason = smallest.restriction(shape)
        if reason is not None:
            raise ShapeError(f"{smallest} does not fit a matrix of shape {shape}: {reason}")
        share = count_parameters(smallest, shape) / (shape[0] * shape[1])
        raise ShapeError(
            f"{structure} asks for {fraction:.4g} of the parameters of a matrix of shape {shape}, but already "
            f"{name}=1 takes {share:.4g} of them. Use {name}=1 or a larger fraction."
        )
    low, high = 1, 2
    while fits(high):
        if high > limit:
            raise StructureError(
                f"{structure}: the number of parameters does not grow with {name}, so it can't be a fraction of them. "
                f"Use an integer."
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return dataclasses.replace(structure, **{name: low})  # type: ignore[type-var]


def specs(structure: Structure, shape: Shape) -> Mapping[str, ParameterSpec]:
    """The tensors of ``structure`` for any shape (native or to be padded)."""
    structure = resolve(structure, shape)
    return structure.parameters(structure.native_shape(shape))


def count_parameters(structure: Structure, shape: Shape) -> int:
    """How many learned numbers the structure holds at this shape (indices are not counted)."""
    structure = structure.resolve(shape)
    if any(isinstance(getattr(structure, f.name), float) for f in dataclasses.fields(structure)):  # type: ignore[arg-type]
        structure = resolve(structure, shape)
    tensors = structure.parameters(structure.native_shape(shape))
    return sum(spec.numel for spec in tensors.values() if spec.learned)


def count_stored(structure: Structure, shape: Shape) -> int:
    """How many numbers a file must hold: learned ones, one for every index of a permutation, and for the support of
    sparse entries one for every place or for 32 bits, whichever is less. This is what a budget in parameters counts.
    """
    resolved = resolve(structure, shape)
    return sum(spec.stored for spec in resolved.parameters(resolved.native_shape(shape)).values())


def largest_fitting(cost: Any, budget: int, most: int, grid: int = 8) -> int:
    """The largest size in ``1..most`` whose ``cost(size)`` is within budget, on a multiple of ``grid`` where it can be.

    ``cost`` is non-decreasing. Sizes of at least ``grid`` are rounded down to its multiples, since sizes off the
    machine's grid run slower; returns 0 if not even size 1 fits.
    """
    if most < 1 or cost(1) > budget:
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low - low % grid if low >= grid else low


# ---------------------------------------------------------------------------------------------------------- JSON


def to_json(structure: Structure) -> dict[str, Any]:
    """Plain JSON values: ``{"family": "LowRank", "rank": 16}``; parts of a sum or product are nested."""
    data: dict[str, Any] = {"family": type(structure).__name__}
    for field in dataclasses.fields(structure):  # type: ignore[arg-type]
        data[field.name] = _encode(getattr(structure, field.name))
    return data


def _encode(value: Any) -> Any:
    if isinstance(value, Structure):
        return to_json(value)
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    assert value is None or isinstance(value, bool | int | float | str), f"not a plain value: {value!r}"
    return value


def from_json(data: object, families: Mapping[str, type[Structure]]) -> Structure:
    """Read what :func:`to_json` wrote.

    Raises:
        FormatError: the family is unknown, or a field is missing, unknown or illegal.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("family"), str):
        raise FormatError(f"A structure is an object with a 'family', such as {{'family': 'LowRank'}}; got {data!r}.")
    name = data["family"]
    if name not in families:
        raise FormatError(f"Unknown family {name!r}. Known are {', '.join(sorted(families))}.")
    family = families[name]
    known = {f.name for f in dataclasses.fields(family)}  # type: ignore[arg-type]
    given = {k: _decode(v, families) for k, v in data.items() if k != "family"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise FormatError(f"{name} has no field {', '.join(unknown)}. Its fields are {', '.join(sorted(known))}.")
    try:
        return family(**given)
    except (TypeError, StructureError) as error:
        raise FormatError(f"{data!r} is no valid {name}: {error}") from error


def _decode(value: Any, families: Mapping[str, type[Structure]]) -> Any:
    if isinstance(value, Mapping):
        return from_json(value, families)
    if isinstance(value, list | tuple):
        return tuple(_decode(v, families) for v in value)
    return value

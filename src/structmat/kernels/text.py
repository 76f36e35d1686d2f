"""Programs as text, the form in which the native backend reads them."""

from __future__ import annotations

from dataclasses import dataclass

from structmat.program import Cosine, Derived, Hadamard, Pairs, Program, Reorder
from structmat.program.combinators import Chain, Sum
from structmat.program.plain import plain_form
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
from structmat.program.toeplitz import Convolution
from structmat.program.transpose import transpose
from structmat.program.written_out import Call, Generated


@dataclass(frozen=True)
class Text:
    """A program as the native backend reads it.

    Args:
        plain: what is put out (``rows``), how many numbers a row of it has, and the stages in prefix order, in which
            tensors are numbered.
        biased: the same with a bias (``rows+bias``), the last of the tensors.
        names: of the other tensors, by number.
        indices: which of them hold integers.
    """

    plain: str
    biased: str
    names: tuple[str, ...]
    indices: frozenset[str]


class NotNativeError(Exception):
    """A stage has no native kernel; the message says which."""


_KEPT = "_native_text"
_KEPT_TRANSPOSED = "_native_text_of_transpose"


def text_of(program: Program) -> Text | str:
    """The text of a program, or the reason why it has none."""
    # Kept with the program itself: hashing one, for a table, takes longer than a small product.
    kept: Text | str | None = program.__dict__.get(_KEPT)
    if kept is None:
        kept = program.__dict__[_KEPT] = _text_of(program)
    return kept


def transposed_text(program: Program) -> Text | str:
    """The text of the transposed program, which reads the same tensors, or the reason why it has none."""
    kept: Text | str | None = program.__dict__.get(_KEPT_TRANSPOSED)
    if kept is None:
        kept = program.__dict__[_KEPT_TRANSPOSED] = _text_of(transpose(program))
    return kept


def running_text(program: Program) -> Text | str:
    """The text of what runs natively for a program: of its plain form, where some of its stages follow from others."""
    form = plain_form(program)
    return text_of(program if form is None else form.program)


def _text_of(program: Program) -> Text | str:
    names: dict[str, int] = {}
    indices: set[str] = set()
    try:
        words = words_of(program, names, indices)
    except NotNativeError as reason:
        return str(reason)
    body = f"{program.out_features} {words}"
    return Text(f"rows {body}", f"rows+bias {body}", tuple(names), frozenset(indices))


def words_of(program: Program, names: dict[str, int], indices: set[str]) -> str:
    """The stages of a program in prefix order; the tensors that they read are numbered in ``names``, as they come up.

    Raises:
        NotNativeError: a stage has no native kernel.
    """
    if isinstance(program, Chain | Sum):
        parts = program.steps if isinstance(program, Chain) else program.parts
        inner = " ".join(words_of(part, names, indices) for part in parts)
        return f"{'chain' if isinstance(program, Chain) else 'sum'} {len(parts)} {inner}"
    return _stage(program, names, indices)


def _stage(stage: Stage, names: dict[str, int], indices: set[str]) -> str:
    def tensor(name: str) -> int:
        return names.setdefault(name, len(names))

    def index(name: str) -> int:
        indices.add(name)
        return tensor(name)

    def words(kind: str, *numbers: int) -> str:
        return " ".join([kind, *(str(int(n)) for n in numbers)])

    if isinstance(stage, Contraction):
        shared = (stage.shared_a, stage.shared_d, stage.transposed)
        return words("contract", *stage.pattern, *shared, tensor(stage.weight))
    if isinstance(stage, Diagonal) and not stage.spectrum:
        return words("diagonal", stage.size, tensor(stage.weight))
    if isinstance(stage, Permute):
        return words("permute", stage.size, stage.inverse, index(stage.index))
    if isinstance(stage, Shuffle):
        return words("shuffle", len(stage.sizes), *stage.sizes, *stage.axes)
    if isinstance(stage, Sparse):
        numbers = (stage.height, stage.width, stage.capacity, stage.transposed)
        return words("sparse", *numbers, tensor(stage.values), index(stage.places))
    if isinstance(stage, Interpolation):
        return words("interpolate", stage.rank, stage.size, stage.transposed, tensor(stage.weight), index(stage.places))
    if isinstance(stage, Windowed):
        held = (stage.height, stage.width, stage.terms, stage.left_size, stage.right_size, stage.transposed)
        return words("windowed", *held, tensor(stage.left), tensor(stage.right), index(stage.windows))
    if isinstance(stage, Pad):
        return words("pad", stage.size, stage.padded, stage.before)
    if isinstance(stage, Crop):
        return words("crop", stage.size, stage.kept, stage.before)
    others = Fourier | Real | Complex | Call | Diagonal | Convolution | Generated
    others |= Pairs | Derived | Hadamard | Cosine | Reorder
    assert isinstance(stage, others), f"unknown stage {type(stage).__name__}"
    raise NotNativeError(f"{stage} has no native kernel")

"""Which backend runs a program: decided from its stages and sizes, never by timing."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.kernels import tuning
from structmat.kernels.library import native
from structmat.kernels.operator import FEW_ROWS
from structmat.kernels.text import Text, text_of
from structmat.modes import is_quiet, is_traced
from structmat.program import FOR_NATIVE, Program, stages
from structmat.program.combinators import Chain
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Crop, Interpolation, Pad, Permute, Shuffle, Sparse

_BY_VECTORS = (torch.float32, torch.float64)

_SMALL_BLOCK = 64 * 64
"""Blocks up to this size cost more to call for than to multiply: one pass wins even for a single row."""

_LARGE_BLOCK = 256 * 256
"""Blocks from this size on are multiplied faster in bfloat16 by instructions for it; those of 64 x 128 are not yet."""

_LARGE_PLAIN = 1 << 22
"""Multiply-adds of plain products from which PyTorch's are faster, unless ours use registers of 512 bits and keep what
lies between two of them in the cache."""

_FEWEST_PLAIN = 256
"""Rows from which a chain of plain products with gradients gains from one pass in each direction."""

_FEWEST_PAIRED = 128
"""Rows from which bfloat16 with large blocks is native where pairs are multiplied: fewer leave one of the threads idle,
or share the packing of large weights."""

MANY_ROWS = 64
"""What is assumed where nothing is known of the batch."""


class Backend(enum.Enum):
    """Who runs programs."""

    AUTO = "auto"
    NATIVE = "native"
    REFERENCE = "reference"


_forced: ContextVar[Backend] = ContextVar("structmat_backend", default=Backend.AUTO)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context all programs run on one backend.

    Args:
        name: ``"auto"`` (by the cost model, the default outside), ``"native"`` or ``"reference"``.

    Raises:
        StructureError: there is no such backend; or, when a program runs under ``"native"``, it can't run there.
    """
    try:
        wanted = Backend(name)
    except ValueError:
        raise StructureError(f"Unknown backend {name!r}. Known are {', '.join(b.value for b in Backend)}.") from None
    token = _forced.set(wanted)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> Backend:
    """Which backend is to run programs here."""
    return _forced.get()


def is_usual() -> bool:
    """Whether no backend is forced, no autocast is on, and :func:`structmat.modes.is_quiet` holds."""
    return _forced.get() is Backend.AUTO and is_quiet() and not torch.is_autocast_enabled("cpu")


def wants_gradient(x: Tensor, tensors: Iterable[Tensor], bias: Tensor | None) -> bool:
    """Whether a product is to be recorded for gradients."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t.requires_grad for t in tensors) or (bias is not None and bias.requires_grad)


def native_text(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Text | None:
    """The program's text if the native backend is to run it on these tensors; None for the reference, which also is
    what graphs are traced with.

    Raises:
        StructureError: the native backend is forced, and can't run it.
    """
    text = possible_text(program, tensors, x, bias)
    if text is None or _forced.get() is Backend.NATIVE:
        return text
    rows = x.numel() // max(1, x.shape[-1])
    recorded = wants_gradient(x, tensors.values(), bias)
    return text if prefers_native(program, rows, x.dtype, recorded) else None


def possible_text(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Text | None:
    """The program's text if the native backend can run it on these tensors, whatever is faster.

    Raises:
        StructureError: the native backend is forced, and can't run it.
    """
    if is_traced():
        return None  # compilers fuse PyTorch's operations, and know nothing of ours
    wanted = _forced.get()
    if wanted is Backend.REFERENCE:
        return None
    reason = _obstacle(program, tensors, x, bias)
    if reason is None:
        text = text_of(program)
        assert isinstance(text, Text)
        return text
    if wanted is Backend.NATIVE:
        raise StructureError(f"The native backend can't run this: {reason}. Use backend('auto').")
    return None


NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def runs_native(
    program: Program, tensors: Mapping[str, Tensor], rows: int | None = None, recorded: bool = False
) -> bool:
    """Whether the native backend will run a program for so many rows (many by default), with gradients or without."""
    text = text_of(program)
    if isinstance(text, str) or _forced.get() is Backend.REFERENCE or not native().available:
        return False
    learned = [tensors[name] for name in text.names if name not in text.indices]
    dtypes = {t.dtype for t in learned}
    if len(dtypes) > 1 or not dtypes <= set(NATIVE_DTYPES) or any(t.device.type != "cpu" for t in learned):
        return False
    dtype = dtypes.pop() if dtypes else torch.float32
    return prefers_native(program, MANY_ROWS if rows is None else rows, dtype, recorded)


def _obstacle(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> str | None:
    """Why the native backend can't run a program on these tensors, or None."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return f"its input is a {type(x).__name__} on {x.device}"
    text = text_of(program)
    if isinstance(text, str):
        return text
    if x.dtype not in NATIVE_DTYPES:
        return f"its input is {x.dtype}"
    if not is_quiet():
        return "it runs under a transform of torch.func, or is differentiated forwards"
    learned = [tensors[name] for name in text.names if name not in text.indices]
    if bias is not None:
        learned.append(bias)
    if any(t.dtype != x.dtype for t in learned):
        return "its tensors have other dtypes than its input"
    found = native()
    return None if found.available else f"there is no native library: {found.reason}"


def prefers_native(program: Program, rows: int, dtype: torch.dtype, recorded: bool = False) -> bool:
    """Whether one pass over tiles beats PyTorch's operations, see :func:`native_rows` and :func:`recorded_rows`."""
    return rows in (recorded_rows if recorded else native_rows)(program, dtype)


class Tuned:
    """Numbers of rows for which the native backend was measured to be faster, or is assumed to be where nothing was.

    Args:
        name: of the program and the dtype, see :func:`structmat.kernels.tuning.name_of`.
        assumed: by the cost model.
    """

    def __init__(self, name: str, assumed: range) -> None:
        self.name, self.assumed = name, assumed

    def __contains__(self, rows: object) -> bool:
        if not isinstance(rows, int):
            return False
        way = tuning.best(self.name, rows, _BACKENDS)
        return rows in self.assumed if way is None else way is tuning.Way.NATIVE


_BACKENDS = (tuning.Way.NATIVE, tuning.Way.REFERENCE)

Rows = range | Tuned


def native_rows(program: Program, dtype: torch.dtype) -> Rows:
    """For how many rows one pass over tiles beats PyTorch's operations: as measured by :func:`structmat.tune`, else by
    what either has to do.

    Chains of plain matrix products (low rank, dense) run in one pass with registers of 512 bits; with others while
    calls cost as much as the work, and for a few rows; in half precision they stay with PyTorch. Everything else gains
    from one pass, unless half precision fills only a small part of a tile and reads its weights as large blocks. In
    bfloat16 programs with large blocks stay with PyTorch where it has instructions that ours lack.
    """
    assumed = _kept(program, dtype, _native_rows)
    kept: dict[torch.dtype, tuple[int, Rows]] = program.__dict__.setdefault(_TUNED, {})
    newest = tuning.generation
    if dtype not in kept or kept[dtype][0] != newest:
        name = tuning.name_of(program, dtype)
        kept[dtype] = newest, Tuned(name, assumed) if tuning.is_known(name) else assumed
    return kept[dtype][1]


def recorded_rows(program: Program, dtype: torch.dtype) -> range:
    """The same with gradients, for a pass in each direction."""
    return _kept(program, dtype, _recorded_rows)


def _kept(program: Program, dtype: torch.dtype, count: Callable[[Program, torch.dtype], range]) -> range:
    # Kept with the program itself: this is asked at every call.
    kept: dict[object, range] = program.__dict__.setdefault(_KEPT, {})
    if (count, dtype) not in kept:
        kept[count, dtype] = count(program, dtype)
    return kept[count, dtype]


_KEPT = "_native_rows"
_TUNED = "_tuned_rows"


def plain_products(program: Program) -> tuple[Contraction, ...]:
    """The stages of a chain of unstructured matrix products, or nothing if it is none."""
    parts = stages(program)
    found = tuple(s for s in parts if isinstance(s, Contraction) and s.a * s.d == 1)
    return found if isinstance(program, Chain | Contraction) and len(found) == len(parts) else ()


def _native_rows(program: Program, dtype: torch.dtype) -> range:
    parts = stages(program)
    if plain := plain_products(program):
        if dtype not in _BY_VECTORS:
            return range(0)
        if len(plain) > 1 and _has_wide_registers():
            return range(1, sys.maxsize)
        return range(1, max(FEW_ROWS, _LARGE_PLAIN // sum(stage.b * stage.c for stage in plain) + 1))
    if any(isinstance(s, Sparse) and s.capacity > FOR_NATIVE.sparse_from * s.height * s.width for s in parts):
        return range(0)
    largest = max((_block(s) for s in parts), default=1)
    is_sparse = any(isinstance(s, Sparse) for s in parts)
    if dtype is torch.bfloat16 and largest >= _LARGE_BLOCK and not is_sparse and has_bfloat16():
        lacks_tiles = _has_tiles() and not native().multiplies_matrices
        return range(_FEWEST_PAIRED, sys.maxsize) if runs_by_pairs(program) and not lacks_tiles else range(0)
    return range(1 if largest <= _SMALL_BLOCK or dtype in _BY_VECTORS else FEW_ROWS, sys.maxsize)


def _block(stage: Stage) -> int:
    """Numbers of the largest dense block that a stage multiplies by."""
    if isinstance(stage, Interpolation):
        return stage.rank * (stage.size - stage.rank)
    return stage.b * stage.c if isinstance(stage, Contraction) else 1


def runs_by_pairs(program: Program) -> bool:
    """Whether the native backend multiplies pairs of bfloat16 numbers here: tiles of them know no other stages."""
    if not native().multiplies_pairs:
        return False
    moves = (Shuffle, Permute, Pad, Crop)
    return all(
        (isinstance(s, Contraction) and (s.b != 2 or s.c != 2))
        or (isinstance(s, moves) and not (isinstance(s, Permute) and s.inverse))
        for s in stages(program)
    )


def _has_wide_registers() -> bool:
    return native().instruction_set.startswith("avx512") and not _has_tiles()


@cache
def _has_tiles() -> bool:
    """Whether the processor multiplies small matrices (AMX), which PyTorch uses."""
    known: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return known is not None and known()


@cache
def has_bfloat16() -> bool:
    """Whether PyTorch's products of bfloat16 use instructions for it: with large blocks ours in float32 are slower."""
    known: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return known is not None and known()


def _recorded_rows(program: Program, dtype: torch.dtype) -> range:
    """Dense and nearly full sparse matrices stay with PyTorch, and so does what fills little of a tile; chains of plain
    products run in one pass where they do without gradients, but for few rows and for large weights, whose gradients
    are summed for each thread."""
    parts = stages(program)
    if plain := plain_products(program):
        is_one_pass = len(plain) > 1 and dtype in _BY_VECTORS and _has_wide_registers()
        is_small = sum(stage.b * stage.c for stage in plain) <= _LARGE_PLAIN
        return range(_FEWEST_PLAIN, sys.maxsize) if is_one_pass and is_small else range(0)
    if any(isinstance(s, Sparse) and s.capacity > FOR_NATIVE.sparse_from * s.height * s.width for s in parts):
        return range(0)
    return range(FEW_ROWS, sys.maxsize)

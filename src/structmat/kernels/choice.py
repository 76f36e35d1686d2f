"""Which backend runs a program: decided from its stages and sizes, never by timing."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.kernels.library import native
from structmat.kernels.text import Text, text_of
from structmat.program import FOR_NATIVE, Program, form, stages
from structmat.program.reference import Form
from structmat.program.stages import Chain, Contraction, Sparse

FEW_ROWS = 8
"""Fewer rows than this leave most of a tile empty: then each number of a weight is read for few products, and PyTorch's
matrix-vector products are as good."""


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


def native_text(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Text | None:
    """The program's text if the native backend is to run it on these tensors; None for the reference, which also is
    what graphs are traced with.

    Raises:
        StructureError: the native backend is forced, and can't run it.
    """
    if torch.compiler.is_compiling():
        return None  # compilers fuse PyTorch's operations, and know nothing of ours
    wanted = _forced.get()
    if wanted is Backend.REFERENCE:
        return None
    reason = _obstacle(program, tensors, x, bias)
    if reason is None:
        text = text_of(program)
        assert isinstance(text, Text)
        rows = x.numel() // max(1, x.shape[-1])
        return text if wanted is Backend.NATIVE or prefers_native(program, rows, x.dtype) else None
    if wanted is Backend.NATIVE:
        raise StructureError(f"The native backend can't run this: {reason}. Use backend('auto').")
    return None


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def runs_native(program: Program, tensors: Mapping[str, Tensor], rows: int | None = None) -> bool:
    """Whether the native backend will run a program without gradients, for so many rows (many by default)."""
    text = text_of(program)
    if isinstance(text, str) or _forced.get() is Backend.REFERENCE or not native().available:
        return False
    learned = [tensors[name] for name in text.names if name not in text.indices]
    dtypes = {t.dtype for t in learned}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES) or any(t.device.type != "cpu" for t in learned):
        return False
    dtype = dtypes.pop() if dtypes else torch.float32
    return prefers_native(program, MANY_ROWS if rows is None else rows, dtype)


def _obstacle(program: Program, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> str | None:
    """Why the native backend can't run a program on these tensors, or None."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return f"its input is a {type(x).__name__} on {x.device}"
    if x.dtype not in _DTYPES:
        return f"its input is {x.dtype}"
    if torch._C._are_functorch_transforms_active():
        return "it runs under a transform of torch.func"
    text = text_of(program)
    if isinstance(text, str):
        return text
    learned = [tensors[name] for name in text.names if name not in text.indices]
    if bias is not None:
        learned.append(bias)
    if any(t.dtype != x.dtype for t in learned):
        return "its tensors have other dtypes than its input"
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in learned)):
        return "a gradient is wanted"
    found = native()
    return None if found.available else f"there is no native library: {found.reason}"


def prefers_native(program: Program, rows: int, dtype: torch.dtype) -> bool:
    """Whether one pass over tiles beats PyTorch's operations, by what either has to do.

    Chains of plain matrix products (low rank, dense) stay with PyTorch's, which are as fast, and faster in half
    precision. Everything else gains from one pass unless the batch fills only a small part of a tile and the weights
    are read as large blocks.
    """
    parts = stages(program)
    plain = isinstance(program, Chain | Contraction) and all(
        isinstance(stage, Contraction) and form(stage) is Form.MATMUL and stage.a * stage.d == 1 for stage in parts
    )
    if plain:
        return False
    if any(isinstance(s, Sparse) and s.capacity > FOR_NATIVE.sparse_from * s.height * s.width for s in parts):
        return False
    if rows >= FEW_ROWS:
        return True
    blocks = [stage for stage in parts if isinstance(stage, Contraction)]
    small = all(stage.b * stage.c <= _SMALL_BLOCK for stage in blocks)
    return small and not any(isinstance(stage, Sparse) and form(stage) is Form.MATERIALISED for stage in parts)


_SMALL_BLOCK = 64 * 64
"""Blocks up to this size cost more to call for than to multiply: one pass wins even for a single row."""

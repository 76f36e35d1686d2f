"""The short way of layers whose tensors stand: what depends on these alone is asked and prepared once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from structmat.kernels import tuning
from structmat.kernels.choice import NATIVE_DTYPES, Rows, is_usual, native_rows
from structmat.kernels.library import native
from structmat.kernels.operator import FEW_ROWS, multiplier, standing
from structmat.kernels.quick import Held, quick
from structmat.kernels.text import Text
from structmat.program import Program, stages
from structmat.program.stages import Sparse


class Standing:
    """The short way of a frozen layer: its tensors stand, so that they are asked once what
    :class:`structmat.kernels.quick.Quick` asks at each call.

    For few rows in float32 and float64 places and windows are read once, too: with a sparse matrix, which must find the
    entries of each of its rows, this is most of the time.

    Args:
        program: what the layer multiplies by.
    """

    def __init__(self, program: Program) -> None:
        self.quick = quick(program)
        self.known: _Known | None = None

    def __deepcopy__(self, memo: object) -> Standing:
        return Standing(self.quick.program)

    def __reduce__(self) -> tuple[Callable[[Program], Standing], tuple[Program]]:
        return Standing, (self.quick.program,)

    def __call__(self, x: Tensor, own: Held) -> Tensor | None:
        """Rows (..., in_features) to (..., out_features), or None where :func:`structmat.kernels.apply` is to decide.

        Args:
            x: the input.
            own: the layer's own dictionary of buffers, with the key ``"bias"``.
        """
        known = self.known
        if (
            known is not None
            and type(x) is Tensor
            and x.dtype is known.dtype
            and known.generation == tuning.generation
            and x.is_contiguous()
            and x.is_cpu
            and not torch.is_grad_enabled()
            and is_usual()
        ):
            for name, tensor in known.pairs:
                if own[name] is not tensor:
                    break
            else:
                width, shape = self.quick.in_features, x.shape
                if shape and shape[-1] == width:
                    rows = x.numel() // width
                    if rows in known.rows:
                        return known.product(x, rows)
                return self.quick(x, own)
        self.known = self._asked(x, own)
        return self.quick(x, own)

    def _asked(self, x: Tensor, own: Held) -> _Known | None:
        """What is the same in all calls that are like this one and record no gradient; None where they take another
        way."""
        text, dtype = self.quick.text, x.dtype
        if text is None or dtype not in NATIVE_DTYPES or torch.is_grad_enabled() or not native().available:
            return None
        if "bias" not in own:
            return None
        bias = own["bias"]
        pairs = tuple((name, own.get(name)) for name in (*text.names, "bias"))
        given = [tensor for _, tensor in pairs if tensor is not None]
        if len(given) < len(text.names) + (bias is not None):  # one is computed, by a parametrization for instance
            return None
        for name, tensor in pairs:
            if tensor is None:
                continue
            wanted = torch.int64 if name in text.indices else dtype
            if tensor.dtype is not wanted or not tensor.is_contiguous() or not tensor.is_cpu:
                return None
        return _Known(self.quick.program, text, dtype, pairs)


class _Known:
    """A call of the native operator but for its input.

    Args:
        program, text: what is multiplied by.
        dtype: of the rows.
        pairs: the tensors by name, None for no bias.
    """

    __slots__ = (
        "__weakref__", "dtype", "generation", "given", "multiply", "multiply_standing", "number", "pairs", "prepares",
        "rows", "standing", "watched", "words",
    )  # fmt: skip

    def __init__(
        self, program: Program, text: Text, dtype: torch.dtype, pairs: tuple[tuple[str, Tensor | None], ...]
    ) -> None:
        self.dtype, self.pairs, self.generation = dtype, pairs, tuning.generation
        self.rows: Rows = native_rows(program, dtype)
        self.given = [tensor for _, tensor in pairs if tensor is not None]
        self.words = text.plain if pairs[-1][1] is None else text.biased
        self.multiply = multiplier()
        self.number: int | None = None  # of the prepared product
        # What may be read once, and sorted: writing to it is noticed.
        sorted_ones = {s.values for s in stages(program) if isinstance(s, Sparse)}
        watched = [t for n, t in pairs if t is not None and (n in text.indices or n in sorted_ones)]
        self.standing = standing()
        self.multiply_standing: Callable[..., Tensor] = self.multiply  # until there is one
        by_vectors = dtype in (torch.float32, torch.float64)
        # Tensors of the inference mode do not count what is written to them.
        counted = not any(tensor.is_inference() for tensor in watched)
        self.prepares = by_vectors and counted and self.standing is not None
        self.watched = [(tensor, tensor._version) for tensor in watched] if self.prepares else []

    def product(self, x: Tensor, rows: int) -> Tensor:
        """The product with so many rows."""
        if not self.prepares or rows >= FEW_ROWS or rows == 0:
            return self.multiply(x, self.given, self.words)
        for tensor, version in self.watched:
            if tensor._version != version:
                self.prepares = False  # somebody writes to what should stand
                return self.multiply(x, self.given, self.words)
        if self.number is None:
            assert self.standing is not None
            stand, self.multiply_standing, fall = self.standing
            self.number = stand(self.given, self.words)
            weakref.finalize(self, fall, self.number).atexit = False
        return self.multiply_standing(x, self.number)

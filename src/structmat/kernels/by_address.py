"""The native library called with addresses, by ctypes: where the loaded PyTorch lacks what its operators need.

The functions have the signatures of the operators in :mod:`structmat.kernels.operator`. Calls take longer, are not seen
by PyTorch's profiler, and start threads of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_Pointers = ctypes.Array[ctypes.c_void_p]
_Counts = ctypes.Array[ctypes.c_int64]


@dataclass(frozen=True)
class ByAddress:
    """The three operators as functions of one library."""

    forward: Callable[..., bytes | None]
    backward: Callable[..., bytes | None]

    @classmethod
    def of(cls, library: ctypes.CDLL) -> ByAddress:
        """The functions of the library, with the types of their arguments."""
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        rows = (pointer, number, ctypes.c_int)
        forward = library.structmat_multiply
        forward.argtypes = (ctypes.c_char_p, *rows, *rows, number, ctypes.c_int, pointer, pointer, number, ctypes.c_int)
        backward = library.structmat_multiply_backward
        several = (pointer, pointer, pointer, number)
        backward.argtypes = (
            ctypes.c_char_p,
            *rows[:2],
            *rows[:2],
            pointer,
            number,
            ctypes.c_int,
            *several,
            ctypes.c_int,
        )
        for function in (forward, backward):
            function.restype = ctypes.c_char_p
        return cls(forward, backward)

    def multiply(self, x: Tensor, tensors: list[Tensor], program: str) -> Tensor:
        """As the operator of this name."""
        y = x.new_empty(*x.shape[:-1], int(program.split(maxsplit=2)[1]))
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        self.multiply_into(rows, tensors, y.view(rows.shape[0], y.shape[-1]), program)
        return y

    def multiply_into(self, x: Tensor, tensors: list[Tensor], y: Tensor, program: str) -> None:
        """As the operator of this name."""
        if x.shape[0] == 0:
            return
        data, counts = _addresses(tensors)
        threads = torch.get_num_threads()
        words = program.encode()
        storage, number = _STORAGE[x.dtype], len(tensors)
        failed = self.forward(words, *_rows(x), *_rows(y), x.shape[0], storage, data, counts, number, threads)
        if failed:
            raise RuntimeError(failed.decode())

    def multiply_backward(
        self, x: Tensor, grad: Tensor, tensors: list[Tensor], grad_x: Tensor, grads: list[Tensor], program: str
    ) -> None:
        """As the operator of this name."""
        data, counts = _addresses(tensors)
        wanted, _ = _addresses(grads)
        x, grad = (t if t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in (x, grad))
        into = grad_x.data_ptr() if grad_x.numel() else None
        shape = (x.shape[0], _STORAGE[x.dtype])
        failed = self.backward(
            program.encode(), x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0), into, *shape,
            data, counts, wanted, len(tensors), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise RuntimeError(failed.decode())


def _rows(x: Tensor) -> tuple[int, int, bool]:
    """Where rows lie, the distance of neighbouring ones, and whether that is the distance of features."""
    by_features = x.stride(0) == 1 and x.stride(1) != 1 and x.shape[1] > 1
    return x.data_ptr(), x.stride(1) if by_features else x.stride(0), by_features


def _addresses(tensors: list[Tensor]) -> tuple[_Pointers, _Counts]:
    count = len(tensors)
    data = (ctypes.c_void_p * count)(*(t.data_ptr() if t.numel() else None for t in tensors))
    return data, (ctypes.c_int64 * count)(*(t.numel() for t in tensors))

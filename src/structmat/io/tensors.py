"""Tensors of a model under their names, and what a file holds of each."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from structmat.errors import FormatError
from structmat.places import pack, unpack
from structmat.structure import ParameterSpec


class Kind(enum.Enum):
    """What a tensor is to its module."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    COMPUTED = "computed"
    """A buffer that is not persistent: the module makes it anew."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Kind]]:
    """Every parameter and buffer under each of its names, with its kind."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield start + name, parameter, Kind.PARAMETER
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield start + name, buffer, Kind.BUFFER if persistent else Kind.COMPUTED


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; integers never are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def written(tensor: Tensor, spec: ParameterSpec | None, copies: int = 1) -> Tensor:
    """What a file holds of a tensor: real and contiguous, or bits where the structure's specification says so.

    Args:
        tensor: as it is used.
        spec: of the structure that it belongs to, or None.
        copies: how many of the structure's tensors it holds, along its first axis if there are several.
    """
    if spec is None or not spec.is_packed:
        return _plain(tensor)
    parts = [pack(part, spec.places_in) for part in (tensor if copies > 1 else [tensor])]
    return torch.stack(parts) if copies > 1 else parts[0]


def _plain(tensor: Tensor) -> Tensor:
    """What is written: real and contiguous, with memory that holds nothing else."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.contiguous().clone()


def unpacked(name: str, tensor: Tensor, spec: ParameterSpec | None, copies: int = 1) -> Tensor:
    """The tensor as it is used, from what the file holds; see :func:`written`.

    Raises:
        FormatError: bits in another dtype, or another number of them than the specification asks for.
    """
    if spec is None or not spec.is_packed:
        return tensor
    if tensor.dtype != spec.file_dtype:
        raise FormatError(f"The tensor {name!r} holds bits: it is {tensor.dtype} and must be {spec.file_dtype}.")
    parts = [unpack(part, spec.numel, spec.places_in, name) for part in (tensor if copies > 1 else [tensor])]
    return torch.stack(parts) if copies > 1 else parts[0]

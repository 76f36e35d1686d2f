"""Ascending places in a range, as files keep them: one bit a place of the range, or a list where that is shorter."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.errors import FormatError

_BITS = 32
"""Bits to a stored number."""


def stored_places(count: int, size: int) -> int:
    """How many numbers ``count`` places in ``range(size)`` take."""
    return min(count, -(-size // _BITS))


def is_packed(count: int, size: int) -> bool:
    """Whether a file holds bits: a list would be longer."""
    return stored_places(count, size) < count


def packed_shape(size: int) -> tuple[int]:
    """Of the bytes that hold one bit for each place."""
    return (-(-size // 8),)


def pack(places: Tensor, size: int) -> Tensor:
    """Bits, the first place in the lowest bit of the first byte: (ceil(size / 8),) of uint8."""
    bits = torch.zeros(packed_shape(size)[0] * 8, dtype=torch.uint8, device=places.device)
    bits[places] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=places.device)
    return (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int, size: int, name: str) -> Tensor:
    """The places (count,) of int64, ascending.

    Raises:
        FormatError: another number of bits is set, or one beyond the range.
    """
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    places = torch.nonzero((packed[:, None] & weights).reshape(-1))[:, 0]
    if len(places) != count or (count and int(places[-1]) >= size):
        raise FormatError(
            f"{name!r} sets {len(places)} bits, up to place {int(places[-1]) if len(places) else 'none'}; "
            f"it must set {count} of {size}."
        )
    return places

"""Batches without end, reproducibly: a run that is entered in the middle reads what it would have read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from structmat.errors import DataError

_END = object()


def endless(data: Iterable[Any], seed: int, skip: int) -> Iterator[Any]:
    """The batches, pass after pass; each pass begins with its own seed.

    Args:
        data: can be read again and again.
        seed: of the first pass, for loaders that shuffle.
        skip: batches that have been seen.

    Raises:
        DataError: a pass has no batches.
    """
    epoch = 0
    while True:
        # The training steps draw from the global generator too: keep the loader's draws apart from theirs.
        outside = torch.random.get_rng_state()
        torch.manual_seed(seed + epoch)
        batches = iter(data)
        inside = torch.random.get_rng_state()
        torch.random.set_rng_state(outside)
        count = 0
        while True:
            outside = torch.random.get_rng_state()
            torch.random.set_rng_state(inside)
            batch = next(batches, _END)
            inside = torch.random.get_rng_state()
            torch.random.set_rng_state(outside)
            if batch is _END:
                break
            count += 1
            if skip > 0:
                skip -= 1
            else:
                yield batch
        if count == 0:
            raise DataError("The data for recovery has no batches.")
        epoch += 1

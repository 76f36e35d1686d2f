"""Work on many layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from structmat.compression.progress import Progress

Item = TypeVar("Item")
Found = TypeVar("Found")


def side_by_side(
    work: Callable[[Item], Found], items: Sequence[Item], title: str, *, progress: bool, alone: bool = False
) -> list[Found]:
    """``[work(item) for item in items]`` by as many workers as PyTorch has threads, each with one: decompositions of
    small matrices gain little from more. An error, or an interruption, ends it after the items in hand.

    Args:
        work: on one item; must not depend on the others.
        items: in the order in which they are begun.
        title: of the progress bar.
        progress: show it.
        alone: one after the other with all threads, as where times are measured.
    """
    threads = torch.get_num_threads()
    if alone:
        with Progress(progress) as bar:
            return [work(item) for item in bar.track(items, title)]
    torch.set_num_threads(1)
    try:
        # SciPy has a BLAS of its own.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool, Progress(progress) as bar:
            pending = [pool.submit(work, item) for item in items]
            try:
                return [job.result() for job in bar.track(pending, title)]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)

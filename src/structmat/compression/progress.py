"""Progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from structmat.compression.running import length_of

T = TypeVar("T")


class Progress:
    """A progress bar on stderr, or nothing: bars that do not show cost nothing."""

    def __init__(self, show: bool) -> None:
        self._bar: Bar | None = None
        if show:
            self._bar = Bar(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """No bar meanwhile: something else is printed."""
        if self._bar is None:
            yield
            return
        self._bar.live.transient = True
        self._bar.stop()
        yield
        self._bar.live.transient = False
        self._bar.start()

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass the items on, one step of the bar each."""
        if self._bar is None:
            yield from items
            return
        size = total if total is not None else length_of(items)
        task = self._bar.add_task(description, total=size)
        for item in items:
            yield item
            self._bar.advance(task)

"""Models that stand still at a layer: what it reads is looked at, it is replaced, and the model goes on from there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward, call, device_of, evaluating, input_of, to_device


class _Closed(BaseException):
    """Nobody waits for this walk: unwinds its thread."""


class Walks:
    """The batches that are on their way through one model, in evaluation mode and without gradients.

    A walk runs in a thread of its own, which stands still whenever nobody waits for it: one at a time runs. To look at
    all layers of a model in their order costs one pass for each batch, where a run from the beginning to each of them
    costs as many passes as half its layers.

    A layer at which a walk stands may be replaced meanwhile (under its name in the model): the walk then goes on with
    what the new one puts out.

    Args:
        model: to run.
        names: of the layers where a walk may stand.
        forward: ``forward(model, batch)``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], forward: Forward | None = None) -> None:
        self.model, self.forward = model, forward
        self.here = threading.local()  # .walk: that of the thread, if it is one of ours
        self.replaced: set[str] = set()
        self._open: list[Walk] = []
        self._hooks = contextlib.ExitStack()
        for name in names:
            self._watch(name, model.get_submodule(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for walk in self._open:
            walk.close()
        self._hooks.close()

    def start(self, batch: Any) -> Walk:
        """A walk of a batch, which stands before the first layer."""
        walk = Walk(self, batch)
        self._open.append(walk)
        return walk

    def end(self, walk: Walk) -> None:
        """Where it is not needed any longer."""
        walk.close()
        self._open.remove(walk)

    def _watch(self, name: str, layer: nn.Module) -> None:
        def arrived(_: nn.Module, given: Sequence[Any], named: dict[str, Any]) -> None:
            walk: Walk | None = getattr(self.here, "walk", None)
            if walk is not None:
                walk.arrived(name, input_of(given, named))

        def left(_: nn.Module, given: Sequence[Any], named: dict[str, Any], __: Any) -> Any:
            walk: Walk | None = getattr(self.here, "walk", None)
            if walk is None:
                return None
            now = self.model.get_submodule(name)
            if now is not layer:  # replaced while the walk stood here, or held by code that took it before
                return now(*given, **named)
            walk.passed.add(name)
            return None

        for handle in (
            layer.register_forward_pre_hook(arrived, with_kwargs=True),
            layer.register_forward_hook(left, with_kwargs=True),
        ):
            self._hooks.callback(handle.remove)


class Walk:
    """One batch on its way; made by :meth:`Walks.start`."""

    def __init__(self, walks: Walks, batch: Any) -> None:
        self._walks, self._batch = walks, batch
        self.passed: set[str] = set()
        self._name, self._calls = "", 0
        self._found: list[Tensor] = []
        self._error: BaseException | None = None
        self._over = self._closing = False
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def reaches(self, name: str) -> bool:
        """Whether going on leads to a layer as a run from the beginning would: it lies ahead, and nothing was replaced
        that was called before."""
        return not self._over and name not in self.passed and not self.passed & self._walks.replaced

    def inputs(self, name: str, calls: int) -> list[Tensor]:
        """What a layer reads, in the order of its calls for the batch; the walk then stands at the last of them.

        Args:
            name: one of those watched.
            calls: how often it is called; if less often than this, the walk is over.

        Raises:
            whatever the model raises.
        """
        self._name, self._calls, self._found = name, calls, []
        with evaluating(self._walks.model):
            self._resume()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, []
        return found

    def arrived(self, name: str, value: Tensor) -> None:
        """A layer is about to run."""
        if name != self._name:
            return
        last = len(self._found) + 1 >= self._calls
        # What follows may work in place, on the same memory.
        self._found.append(value.detach() if last else value.detach().clone())
        if last:
            self._name = ""
            self._stands.release()
            self._go.acquire()
            if self._closing:
                raise _Closed

    def close(self) -> None:
        """End the thread where it stands."""
        self._closing = True
        if self._thread is not None and not self._over:
            self._resume()
        self._batch = None

    def _resume(self) -> None:
        if self._thread is None:
            # Modes of PyTorch that belong to a thread are those of the caller.
            kind = device_of(self._walks.model).type
            mixed = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            device = torch.get_default_device()
            self._thread = threading.Thread(target=self._run, args=(mixed, device), daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._stands.acquire()

    def _run(self, mixed: torch.autocast, device: torch.device) -> None:
        walks = self._walks
        walks.here.walk = self
        try:
            with torch.no_grad(), mixed, device:
                call(walks.model, to_device(self._batch, device_of(walks.model)), walks.forward)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._over = True
            self._stands.release()

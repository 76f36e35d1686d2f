"""Fitting a layer behind layers that are already compressed: on the inputs that it will get, for the outputs of before.

A layer behind compressed ones reads ``x`` where it used to read ``z``. What it should put out is still ``W z``, and the
best linear guess of that from ``x`` is ``W E[z x^T] E[x x^T]^(-1) x``: a corrected weight, whose structured fit in the
norm of ``E[x x^T]`` also makes up for what the layers before it lost. Recomputing the moment of the inputs alone does
not. Source: the closed-form updates of Wang et al., "SVD-LLM" (2025), for any structure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward
from structmat.compression.scan import adapter_of
from structmat.compression.walking import Walk, Walks

logger = logging.getLogger(__name__)

ROWS_PER_INPUT, FEWEST_ROWS = 24, 4096
"""Rows of calibration data to read: so many for each input feature, and at least so many in all; of patches that
overlap only those that are new count."""

_KEPT = 16
"""So many batches stand in the models, each with what the layer that it stands at needs of them; others start anew."""

DAMPING = 1e-3
"""Of the second moment before it is inverted, as a share of its mean eigenvalue."""


@dataclass(frozen=True)
class Prefix:
    """What a layer reads behind a compressed prefix.

    Args:
        second_moment: (copies, in, in), ``E[x x^T]`` of what its matrices multiply in the compressed model.
        cross_moment: (copies, in, in), ``E[z x^T]`` with what they multiply in the original model, ``z``.
    """

    second_moment: Tensor
    cross_moment: Tensor


class Prefixes:
    """What layers read in a model behind those that were replaced so far, in the order of their calls.

    Both models run side by side, batch by batch, and stand at each layer until it has been fitted
    (:mod:`structmat.compression.walking`).

    Args:
        original: the model before compression.
        model: the same, whose layers are being replaced.
        names: of the layers that will be replaced.
        loader, forward: as for :func:`structmat.compression.calibrate.calibrate`; the beginning of the data is read.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        names: Sequence[str],
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
    ) -> None:
        self._model, self._loader = model, loader
        self._before, self._after = Walks(original, names, forward), Walks(model, names, forward)
        self._pairs: dict[int, tuple[Walk, Walk]] = {}  # by the number of the batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._before.__exit__(kind, error, at)
        finally:
            self._after.__exit__(kind, error, at)

    def replaced(self, name: str) -> None:
        """A layer was."""
        self._after.replaced.add(name)

    def moments(self, name: str, calls: int = 1) -> Prefix | None:
        """What a layer reads in both models.

        Args:
            name: of the layer, which is still dense in both.
            calls: how often the layer is called for one batch.

        Returns:
            The moments; None if the two models do not call the layer alike (as where inputs are routed by their
            values).
        """
        second: Tensor | None = None
        cross: Tensor | None = None
        rows = 0
        layer = self._model.get_submodule(name)
        adapter = adapter_of(layer)
        for number, batch in enumerate(self._loader):
            before, after = self._inputs(number, batch, name, calls)
            if [x.shape for x in before] != [x.shape for x in after]:
                logger.info("%s: the compressed model calls it otherwise; its weight is not corrected", name)
                return None
            for old, new in zip(before, after, strict=True):
                for z, x in zip(adapter.rows(layer, old), adapter.rows(layer, new), strict=True):
                    z, x = z.double(), x.double()
                    own, both = (x.mT @ x).cpu(), (z.mT @ x).cpu()
                    second, cross = (own, both) if second is None or cross is None else (second + own, cross + both)
                    rows += x.shape[1]
            if second is not None:
                fewest = max(FEWEST_ROWS, ROWS_PER_INPUT * second.shape[-1])
                if rows >= fewest * adapter.overlap(layer):
                    break
        if second is None or cross is None or rows == 0:
            return None
        return Prefix(second / rows, cross / rows)

    @torch.no_grad()
    def _inputs(self, number: int, batch: Any, name: str, calls: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of one batch: of that which is on its way already, if there is one."""
        pair = self._pairs.get(number)
        if pair is not None and not all(walk.reaches(name) for walk in pair):
            self._end(number, pair)
            pair = None
        if pair is None:
            pair = self._pairs[number] = self._before.start(batch), self._after.start(batch)
        found = pair[0].inputs(name, calls), pair[1].inputs(name, calls)
        if number >= _KEPT:
            self._end(number, pair)
        return found

    def _end(self, number: int, pair: tuple[Walk, Walk]) -> None:
        del self._pairs[number]
        self._before.end(pair[0])
        self._after.end(pair[1])


def corrected(weights: Tensor, prefix: Prefix) -> Tensor:
    """The weights (copies, out, in) that put out what ``weights`` did, as well as linear maps of the new inputs can.

    ``W (I + (E[z x^T] - E[x x^T]) (E[x x^T] + d I)^(-1))``: equal to ``W`` where the prefix changed nothing.
    """
    size = prefix.second_moment.shape[-1]
    damping = DAMPING * prefix.second_moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    wide = weights.detach().cpu().double()
    if bool((damping <= 0).any()):
        return weights
    regular = prefix.second_moment + damping[:, None, None] * torch.eye(size, dtype=torch.float64)
    change: Tensor = torch.linalg.solve(regular, prefix.cross_moment - prefix.second_moment, left=False)
    return torch.baddbmm(wide, wide, change)

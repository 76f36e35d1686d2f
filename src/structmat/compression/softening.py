"""The temperature at which a classifier says something of most of its data.

A classifier is certain of nearly all that it was trained on. Of such data neither the divergence between its outputs
and another model's nor its Fisher information sees more than the few terms that it is in doubt about: of ResNet-20 on
its training images, 4 in 100. Divided by a temperature (Hinton, Vinyals, Dean 2015, section 2) the logits say how the
other classes compare, term for term.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compression.running import Forward, call, device_of, evaluating, outcome, to_device

TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0)
"""What is chosen from. The choice need not be fine: at ResNet-20 on CIFAR-10, 4 and 8 do equally well."""

SHARE = 0.5
"""The least share of the terms that should count."""

TERMS = 2048
"""Terms of the loss that the choice is made by."""


def effective_share(logits: Tensor) -> float:
    """Which share of the terms counts: ``(sum w)^2 / (n sum w^2)``, Kish's effective sample size by ``n``, where a term
    weighs ``w = 1 - sum_c p_c^2``, the trace of its Fisher information in the logits.

    Args:
        logits: (terms, classes).
    """
    weights = 1.0 - torch.softmax(logits.detach().double(), -1).square().sum(-1)
    squares = weights.square().sum() * len(weights)
    return float(weights.sum().square() / squares) if float(squares) > 0 else 0.0


def temperature_for(logits: Tensor) -> float:
    """The least of ``TEMPERATURES`` at which at least half of the terms count; 1 if already they do.

    Args:
        logits: (terms, classes). Terms that are certain at every temperature, all other classes being ruled out by
            logits of minus infinity, are left aside, and those that are not finite at all.
    """
    found = logits.detach().double()
    kept = found[torch.isfinite(found).sum(-1) > 1]
    kept = kept[~(kept.isnan() | (kept == torch.inf)).any(-1)]
    if not len(kept):
        return 1.0
    return next((t for t in TEMPERATURES if effective_share(kept / t) >= SHARE), TEMPERATURES[-1])


@torch.no_grad()
def peeked(model: nn.Module, data: Iterable[Any], forward: Forward | None) -> tuple[float, Iterable[Any]]:
    """The temperature for a model on the beginning of some data, and the data from their beginning.

    Args:
        model: called in evaluation mode.
        data: batches. Of what can be read only once the first batch alone counts, so that no others are held.
        forward: ``forward(model, batch)``, if a batch is none of the usual.

    Returns:
        1 for outputs that are not logits.
    """
    once = isinstance(data, Iterator)
    device, batches = device_of(model), iter(data)
    held: list[Any] = []
    logits: list[Tensor] = []
    for batch in batches:
        if once:
            held.append(batch)
        with evaluating(model):
            moved = to_device(batch, device)
            result = outcome(call(model, moved, forward), moved)
        if not result.classes:
            break
        logits.append(result.values.float().cpu())
        if once or sum(map(len, logits)) >= TERMS:
            break
    temperature = temperature_for(torch.cat(logits)) if logits else 1.0
    return temperature, _again(held, batches) if once else data


def _again(held: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    """What was read and the rest, without keeping anything that has passed."""
    while held:
        yield held.pop(0)
    yield from rest

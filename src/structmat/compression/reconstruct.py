"""Layer-wise reconstruction in closed form: last factors solved again for what the compressed prefix puts in.

In the order of calls, each layer gets the last factor (see :mod:`structmat.compression.last_factor`) and the bias whose
outputs, on the inputs that it has in the compressed model, are nearest to those of the original layer on its own. The
layers that were kept dense are solved too: they read other inputs now. Nothing is trained, and nothing changes where
data that was left out says that it would not help.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from structmat.compression.last_factor import Moments, refit
from structmat.compression.layers import layer_of, splitters, structured_layer_of
from structmat.compression.layers.base import Layer
from structmat.compression.running import Forward, call, device_of, evaluating, inputs_at, outputs_at, to_device
from structmat.compression.scan import parent_and_child
from structmat.compression.sequential import FEWEST_ROWS, ROWS_PER_INPUT
from structmat.compression.split import split_apart
from structmat.errors import DataError
from structmat.matrix import StructuredMatrix
from structmat.structures.dense import Dense

logger = logging.getLogger(__name__)

JUDGES = 3
"""Every so many-th batch is left out and judges."""


@dataclass(frozen=True)
class Reconstructed:
    """One layer: the squared error of its outputs on the batches left out, as a share of their mean square."""

    name: str
    before: float
    after: float


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Any],
    *,
    forward: Forward | None = None,
) -> tuple[Reconstructed, ...]:
    """Solve the last factor and the bias of every layer again, in place and in the order of calls.

    Both models run over a part of the batches for every layer, up to that layer: with ``L`` layers about ``L`` passes.
    Left as they are: parts of recurrent nets that read their own earlier outputs, layers with weights that another
    module has too or that require no gradient, and families that end in no learned contraction.

    Args:
        model: compressed.
        original: whose layers' outputs are wanted; restored to what it is.
        batches: at least two; every third judges.
        forward: ``forward(model, batch)`` returns the output.

    Returns:
        What became better, layer by layer.

    Raises:
        DataError: there is one batch only.
    """
    if len(batches) < 2:
        raise DataError(f"Reconstruction leaves batches out to judge by; {len(batches)} is too few. Give at least 2.")
    judges = {i for i in range(len(batches)) if i % JUDGES == JUDGES - 1} or {len(batches) - 1}
    done = []
    names = [name for name, _ in model.named_modules()]
    with split_apart(original, names), evaluating(model), evaluating(original):
        calls = _calls(model, original, batches[0], forward)
        for name in calls:
            found = _solved(model, original, name, calls[name], batches, judges, forward)
            if found is not None:
                done.append(found)
                logger.info("%s: error of the outputs %.4g, was %.4g", name, found.after, found.before)
    return tuple(done)


def _calls(model: nn.Module, original: nn.Module, batch: Any, forward: Forward | None) -> dict[str, int]:
    """How often each layer is called for a batch, by name and in the order of the first calls: from the first
    structured one on."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    present = dict(original.named_modules())
    counts: dict[str, int] = {}
    handles = []

    def count(name: str, is_structured: bool) -> None:
        if counts or is_structured:
            counts[name] = counts.get(name, 0) + 1

    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        is_structured = structured_layer_of(module) is not None
        known = is_structured or layer_of(module) is not None
        if not known or name not in present or layer_of(present[name]) is None or _feeds_back(model, name):
            continue
        if not own or any(owners[id(p)] > 1 or not p.requires_grad for p in own):
            continue
        handles.append(
            module.register_forward_pre_hook(lambda _, __, name=name, known=is_structured: count(name, known))
        )
    try:
        call(model, to_device(batch, device_of(model)), forward)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _feeds_back(model: nn.Module, name: str) -> bool:
    if not name:
        return False
    parent, child = parent_and_child(model, name)
    return any(splitter.is_split(parent) and splitter.feeds_back(child) for splitter in splitters())


def _solved(
    model: nn.Module,
    original: nn.Module,
    name: str,
    calls: int,
    batches: Sequence[Any],
    judges: set[int],
    forward: Forward | None,
) -> Reconstructed | None:
    module, dense = model.get_submodule(name), original.get_submodule(name)
    teacher = layer_of(dense)
    assert teacher is not None, "layers that the original has not are not counted"
    fit: list[Moments] = []
    judge: list[Moments] = []
    for number, batch in enumerate(batches):
        found = _moments(model, original, name, calls, batch, forward)
        if found is None:
            logger.info("%s: the compressed model calls it otherwise; it stays as it is", name)
            return None
        into = judge if number in judges else fit
        into[:] = found if not into else [a + b for a, b in zip(into, found, strict=True)]
        enough = max(FEWEST_ROWS, ROWS_PER_INPUT * found[0].inputs.shape[0]) * teacher.overlap(dense)
        if judge and fit and fit[0].rows >= enough:
            break
    bias = cast(Tensor | None, module.bias)
    shares = [None] * len(fit) if bias is None else list(bias.reshape(len(fit), -1))
    solved = [
        refit(matrix, share, a, b) for matrix, share, a, b in zip(_matrices(module), shares, fit, judge, strict=True)
    ]
    done = [found for found in solved if found is not None]
    if len(done) < len(solved) or not any(found.after < found.before for found in done):
        return None
    _write(module, [found.matrix for found in done])
    if bias is not None:
        parts = [found.bias for found in done if found.bias is not None]
        bias.copy_(torch.cat(parts).to(bias))
    energies = [moments.outputs for moments in judge]
    total = max(sum(energies), 1e-300)
    before, after = (
        sum(error * energy for error, energy in zip(errors, energies, strict=True)) / total
        for errors in ([found.before for found in done], [found.after for found in done])
    )
    return Reconstructed(name, before, after)


def _adapter(module: nn.Module) -> Layer:
    adapter = structured_layer_of(module) or layer_of(module)
    assert adapter is not None, "only layers of known kinds are counted"
    return adapter


def _matrices(module: nn.Module) -> list[StructuredMatrix]:
    """Of a structured layer those that it multiplies by, which share its memory; of a dense one copies."""
    if structured_layer_of(module) is not None:
        several = getattr(module, "matrices", None)
        return list(several) if several is not None else [cast(StructuredMatrix, module.matrix)]
    matrices = _adapter(module).matrices(module).detach()
    return [StructuredMatrix(Dense(), (own.shape[0], own.shape[1]), {"weight": own.clone()}) for own in matrices]


def _write(module: nn.Module, matrices: Sequence[StructuredMatrix]) -> None:
    if structured_layer_of(module) is None:
        _adapter(module).assign(module, torch.stack([matrix.tensors["weight"] for matrix in matrices]))
        return
    for held, found in zip(_matrices(module), matrices, strict=True):
        for name, tensor in held.tensors.items():
            if tensor.is_floating_point():
                tensor.copy_(found.tensors[name].to(tensor))


def _moments(
    model: nn.Module, original: nn.Module, name: str, calls: int, batch: Any, forward: Forward | None
) -> list[Moments] | None:
    """For each matrix of a layer: what it reads in the compressed model, and what it puts out in the original."""
    read = inputs_at(model, name, calls, batch, forward)
    wanted = outputs_at(original, name, calls, batch, forward)
    if not read or len(read) != len(wanted):
        return None
    module, dense = model.get_submodule(name), original.get_submodule(name)
    adapter, teacher = _adapter(module), layer_of(dense)
    assert teacher is not None
    found: list[Moments] = []
    for x, y in zip(read, wanted, strict=True):
        goals, start = teacher.output_rows(dense, y), 0
        for rows in adapter.rows(module, x):
            goal = goals[:, start : start + rows.shape[1]]
            start += rows.shape[1]
            if goal.shape[:2] != rows.shape[:2]:
                return None
            new = [Moments.of(*pair) for pair in zip(rows, goal, strict=True)]
            found = [a + b for a, b in zip(found, new, strict=True)] if found else new
        if start != goals.shape[1]:
            return None
    return found


def first_batches(data: Iterable[Any], count: int, seed: int) -> list[Any]:
    """The beginning of the data; a loader that shuffles does so by the seed."""
    random = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        found = []
        for batch in data:
            found.append(batch)
            if len(found) >= count:
                break
        return found
    finally:
        torch.random.set_rng_state(random)

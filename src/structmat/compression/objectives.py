"""What a recovery makes small: distances of outputs, and of what parts of two models put out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.compression.layers import layer_of, splitters, structured_layer_of
from structmat.compression.running import Forward, Outcome, call
from structmat.errors import DataError, ModelError
from structmat.nn.windows import WindowedLinear

DIVERGENCE, SQUARES = "divergence of the logits", "squared error of the output"


def distance(student: Outcome, teacher: Outcome, temperature: float, weights: Tensor | None) -> Tensor:
    """The mean over terms of ``T^2 KL(teacher || student)`` at temperature ``T`` for logits, else the squared error as
    a share of the teacher's mean square."""
    wanted, reached = teacher.values.float(), student.values.float()
    if teacher.classes:
        log_p = F.log_softmax(wanted / temperature, -1)
        log_q = F.log_softmax(reached / temperature, -1)
        # A logit of minus infinity forbids a class: it contributes nothing, not 0 * inf.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
        return terms.mean() if weights is None else (terms * weights).sum() / weights.sum().clamp(min=1.0)
    return (reached - wanted).square().mean() / wanted.square().mean().clamp(min=1e-30)


def padding(batch: Any, teacher: Outcome) -> Tensor | None:
    """1 for terms that count and 0 for padding, where the batch says so by an ``attention_mask``."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if isinstance(mask, Tensor) and teacher.classes and mask.numel() == teacher.values.shape[0]:
        return mask.reshape(-1).to(teacher.values.device, torch.float32)
    return None


# ------------------------------------------------------------------------------------------------- parts of a model


def structured_names(model: nn.Module) -> list[str]:
    """The names of all structured layers, those whose windows move too."""
    return [
        name
        for name, module in model.named_modules()
        if structured_layer_of(module) is not None or isinstance(module, WindowedLinear)
    ]


def block_names(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """The parts that are reconstructed as wholes.

    Args:
        model: compressed.
        patterns: globs of names; without them, the innermost elements of lists and sequences that hold two layers or
            more, at least one of them structured, and, where a structured layer is in none, the recurrent net or
            attention that it is a part of, or itself.

    Raises:
        ModelError: a pattern matches nothing.
    """
    named = dict(model.named_modules())
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise ModelError(f"The pattern {pattern!r} in blocks matches no module of the model. Look at its names.")
    if patterns:
        return [name for name in named if name and any(fnmatch.fnmatch(name, p) for p in patterns)]
    found: dict[str, None] = {}
    for name in structured_names(model):
        found[_block_of(name, named)] = None
    return list(found)


def _block_of(name: str, named: Mapping[str, nn.Module]) -> str:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        own, parent = ".".join(parts[:count]), named[".".join(parts[: count - 1])]
        is_element = isinstance(parent, nn.ModuleList | nn.Sequential)
        inside = sum(1 for m in named[own].modules() if structured_layer_of(m) or layer_of(m))
        if is_element and inside >= 2:
            return own
    parent_name = ".".join(parts[:-1])
    if parent_name and any(splitter.is_split(named[parent_name]) for splitter in splitters()):
        return parent_name
    return name


class Parts:
    """What parts of two models put out for a batch, compared as they run.

    Args:
        model, original: the compressed model and the one to imitate; each part has one name in both.
        names: of the parts.
        apart: whether each part of the compressed model is cut off from those before it: no gradient passes into its
            inputs.
    """

    def __init__(self, model: nn.Module, original: nn.Module, names: Sequence[str], *, apart: bool) -> None:
        present = dict(original.named_modules())
        self.names = [name for name in names if name in present]
        self._model, self._original, self._apart = model, original, apart
        self._wanted: dict[str, list[Tensor]] = {}

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """While the original runs: its parts' outputs are kept."""
        self._wanted = {name: [] for name in self.names}
        handles = []
        for name in self.names:

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                found = main_tensor(output)
                if found is not None:
                    # What follows may work in place, on the same memory.
                    self._wanted[name].append(found.detach().clone())

            handles.append(self._original.get_submodule(name).register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def comparing(self, errors: list[Tensor]) -> Iterator[None]:
        """While the model runs: the squared error of each part's outputs, as a share of their mean square, goes into
        the list."""
        queues = {name: iter(outputs) for name, outputs in self._wanted.items()}
        handles = []
        for name in self.names:

            def compare(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                reached, wanted = main_tensor(output), next(queues[name], None)
                # The original may call a part less often, for data-dependent control flow.
                if reached is not None and wanted is not None and reached.shape == wanted.shape:
                    size = wanted.float().square().mean().clamp(min=1e-30)
                    errors.append((reached.float() - wanted.float()).square().mean() / size)

            part = self._model.get_submodule(name)
            if self._apart:
                handles.append(part.register_forward_pre_hook(_cut, with_kwargs=True))
            handles.append(part.register_forward_hook(compare))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def error(self, batch: Any, forward: Forward | None) -> Tensor:
        """The mean over calls of the parts' errors on a batch, nothing of the outputs.

        Raises:
            DataError: the model called none of the parts.
        """
        with torch.no_grad(), self.teaching():
            call(self._original, batch, forward)
        errors: list[Tensor] = []
        with self.comparing(errors):
            call(self._model, batch, forward)
        if not errors:
            raise DataError("The model called none of its structured layers: there is nothing to reconstruct.")
        return torch.stack(errors).mean()


def main_tensor(output: Any) -> Tensor | None:
    """The output, or the first tensor of numbers in it."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, nn.utils.rnn.PackedSequence):
        return output.data
    items: Sequence[Any] = (
        list(output.values()) if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    return next((found for item in items if (found := main_tensor(item)) is not None), None)


def _cut(_: nn.Module, arguments: Any, named: Any) -> tuple[Any, Any]:
    return _detached(arguments), _detached(named)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(item) for item in value)
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return value

"""Running a user's model on a user's batches: calls, losses, modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from structmat.errors import DataError

Forward = Callable[[nn.Module, Any], Any]
"""A user's way to run a model: ``forward(model, batch)`` returns its output."""

Loss = Callable[[Any, Any], Tensor]
"""A user's loss: ``loss(output, batch)`` returns a scalar."""

GIVEN, LABELS, SQUARES = "given loss", "labels sampled from the model", "squared error of the output"
"""The three ways in which an effect on the output is measured."""

IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


def call(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run a model on a batch: a tensor, a tuple ``(inputs,)`` or ``(inputs, labels)``, or a dict of arguments.

    Raises:
        DataError: the batch is none of these and no ``forward`` was given.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        try:
            return model(batch[0])
        except TypeError as error:
            if len(batch) == 2 and "missing" in str(error) and "positional argument" in str(error):
                raise DataError(
                    f"A pair is (inputs, labels), and {type(model).__name__} was called with the first alone: {error}. "
                    f"If both are inputs, pass dicts of arguments, or forward=lambda model, batch: model(*batch)."
                ) from error
            raise
    size = f" of {len(batch)} items" if isinstance(batch, tuple | list) else ""
    raise DataError(
        f"A batch is a tensor, a tuple (inputs, labels) or a dict of arguments; got {type(batch).__name__}{size}. "
        f"Pass forward=lambda model, batch: ... to say how to run the model."
    )


def inputs_at(model: nn.Module, name: str, calls: int, batch: Any, forward: Forward | None) -> list[Tensor]:
    """What a layer reads for one batch, in the order of its calls; the model runs no further than to the last one.

    Args:
        model: in evaluation mode, if its inputs shall be those of evaluation.
        name: of the layer.
        calls: how often it is called for a batch.
        batch, forward: see :func:`call`.
    """
    layer = model.get_submodule(name)
    return _kept(
        model,
        lambda keep: layer.register_forward_pre_hook(
            lambda _, given, named: keep(input_of(given, named)), with_kwargs=True
        ),
        calls,
        batch,
        forward,
    )


def outputs_at(model: nn.Module, name: str, calls: int, batch: Any, forward: Forward | None) -> list[Tensor]:
    """What a layer puts out, as :func:`inputs_at`."""
    layer = model.get_submodule(name)
    return _kept(
        model, lambda keep: layer.register_forward_hook(lambda _, __, output: keep(output)), calls, batch, forward
    )


def input_of(given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What a layer was called with, by position or by name: the arguments of a hook with ``with_kwargs``."""
    if given:
        return given[0]
    return named["input"] if "input" in named else next(iter(named.values()))


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """The layer has been reached: what follows it need not run."""


def _kept(
    model: nn.Module,
    register: Callable[[Callable[[Tensor], None]], RemovableHandle],
    calls: int,
    batch: Any,
    forward: Forward | None,
) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(value: Tensor) -> None:
        if len(found) + 1 >= calls:
            found.append(value.detach())
            raise _Stop
        found.append(value.detach().clone())  # what follows may work in place, on the same memory

    handle = register(keep)
    try:
        call(model, to_device(batch, device_of(model)), forward)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)([to_device(item, device) for item in batch]) if type(batch) in (tuple, list) else batch
    return batch


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape yet: not that of a lazy module that never ran."""
    return not is_lazy(tensor)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the first axis of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    items: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch if _is_sequence(batch) else ()
    for item in items:
        if isinstance(item, Tensor):
            return samples_in(item)
    return 1


def first_samples(batch: Any, count: int) -> Any:
    """The batch cut to its first samples, where all its tensors agree on their number; else the batch itself."""
    whole = samples_in(batch)
    if whole <= count:
        return batch
    if isinstance(batch, Tensor):
        return batch[:count]
    if isinstance(batch, Mapping):
        if all(isinstance(v, Tensor) and v.dim() and v.shape[0] == whole for v in batch.values()):
            return {key: value[:count] for key, value in batch.items()}
        return batch
    if type(batch) in (tuple, list) and all(isinstance(v, Tensor) and v.dim() and v.shape[0] == whole for v in batch):
        return type(batch)([value[:count] for value in batch])
    return batch


def _is_sequence(batch: Any) -> bool:
    return isinstance(batch, tuple | list)


def check_loader(loader: Iterable[Any], what: str = "The calibration data") -> None:
    """Raise unless a loader is one of batches that can be read more than once.

    Args:
        loader: what was given.
        what: it is for.

    Raises:
        DataError: it is a single batch, a generator or an iterator.
    """
    if isinstance(loader, Tensor):
        raise DataError(
            f"{what}: an iterable of batches is needed; got one tensor of shape {tuple(loader.shape)}, whose rows "
            f"would be taken for batches. Pass [x], or x.split(64)."
        )
    if isinstance(loader, Mapping):
        raise DataError(
            f"{what}: an iterable of batches is needed; got a {type(loader).__name__} with the keys "
            f"{', '.join(map(repr, list(loader)[:4]))}. Pass [batch] if it is one."
        )
    if isinstance(loader, str) or not isinstance(loader, Iterable):
        raise DataError(f"{what}: an iterable of batches is needed; got {type(loader).__name__}.")
    if isinstance(loader, Iterator):
        raise DataError(
            f"{what}: a {type(loader).__name__} can be read only once, and several steps read it. "
            f"Pass a DataLoader, a list of batches, or an object whose __iter__ starts anew."
        )


def length_of(data: object) -> int | None:
    """If it has one: a loader of a dataset that is read as it comes says so only when it is asked."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


@torch.no_grad()
def can_run(model: nn.Module, batch: Any, forward: Forward | None) -> bool:
    """Whether a model takes a batch that was cut from one it takes: not if what was cut are no samples, as the steps of
    a sequence or the nodes of a graph that lie along the first axis, with other arguments of their number."""
    try:
        with evaluating(model):
            call(model, to_device(batch, device_of(model)), forward)
    except Exception:  # whatever a user's model raises; the whole batch, run next, says what is wrong
        return False
    return True


# -------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Outcome:
    """What a model put out, as far as effects on it are measured.

    Args:
        values: (terms, classes) logits, or (terms, features) of another output.
        classes: whether they are logits.
    """

    values: Tensor
    classes: bool

    def softened(self, temperature: float) -> Outcome:
        """Logits divided by a temperature; other outputs as they are."""
        return Outcome(self.values / temperature, True) if self.classes and temperature != 1.0 else self


def outcome(output: Any, batch: Any) -> Outcome:
    """Find the logits or the main tensor of an output.

    An output has logits if it says so by an attribute or key ``logits``, or if integer labels come with the batch
    whose shape is that of the output without its last axis (or, as in ``F.cross_entropy``, without its second). Logits
    are of two classes at least: a single number for each label is one to be compared as it is.

    Raises:
        DataError: there is no floating point tensor in the output.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return Outcome(logits.reshape(-1, logits.shape[-1]), logits.shape[-1] > 1)
    found = _first_tensor(output)
    if found is None:
        raise DataError(
            f"The model's output, a {type(output).__name__}, holds no floating point tensor. "
            f"Pass forward=lambda model, batch: ... that returns one."
        )
    labels = labels_of(batch)
    if labels is not None and not labels.is_floating_point() and found.dim() >= 2:
        if labels.shape == found.shape[:-1] and found.shape[-1] > 1:
            return Outcome(found.reshape(-1, found.shape[-1]), True)
        if labels.shape == found.shape[:1] + found.shape[2:] and found.shape[1] > 1:
            return Outcome(found.movedim(1, -1).reshape(-1, found.shape[1]), True)
    return Outcome(found.reshape(-1, found.shape[-1] if found.dim() else 1), False)


def labels_of(batch: Any) -> Tensor | None:
    """The labels that come with a batch: the second item of a pair, or the key ``labels``."""
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif _is_sequence(batch) and len(batch) == 2:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) else None


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items: Iterable[Any] = output.values() if isinstance(output, Mapping) else output if _is_sequence(output) else ()
    for item in items:
        found = _first_tensor(item)
        if found is not None:
            return found
    return None


def sampled_loss(result: Outcome, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient in the output has the Fisher information as its second moment, summed over terms.

    For logits the cross-entropy to labels that are drawn from the model's own softmax (the Fisher information of the
    model, which is what the divergence from the original grows with); for other outputs their product with a standard
    normal vector (that of a Gaussian with unit variance: the Gauss-Newton matrix of half the squared error).
    """
    values = result.values.float()
    if result.classes:
        probabilities = torch.softmax(values.detach(), -1).cpu()
        if not bool(torch.isfinite(probabilities).all()):
            raise DataError(
                "The model's logits are NaN or infinite on the calibration data. "
                "Look at the batches, or run the model in float32."
            )
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return F.cross_entropy(values, labels.to(values.device), reduction="sum")
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
    return (values * noise.to(values.device)).sum()


def own_loss(output: Any, batch: Any, loss: Loss | None) -> Tensor | None:
    """The loss of a batch: the user's, the output's own, or cross-entropy to the labels.

    None if there is none: no labels, or some that are no class (only the user knows what 255 stands for).
    """
    if loss is not None:
        given: object = loss(output, batch)
        if not isinstance(given, Tensor) or given.numel() != 1:
            raise DataError(f"loss(output, batch) returns a scalar tensor; got {_described(given)}.")
        return given.reshape(())
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    labels = labels_of(batch)
    if labels is None or isinstance(batch, Mapping):
        return None
    result = outcome(output, batch)
    if result.classes:
        if labels.numel() != result.values.shape[0]:
            return None  # the output leaves some out, such as padding: which are whose is the user's to say
        wanted = labels.reshape(-1).long()
        counted = wanted[wanted != IGNORED]
        if not counted.numel() or int(counted.min()) < 0 or int(counted.max()) >= result.values.shape[1]:
            return None
        return F.cross_entropy(result.values.float(), wanted, ignore_index=IGNORED)
    if labels.is_floating_point() and labels.numel() == result.values.numel():
        return F.mse_loss(result.values.float(), labels.reshape(result.values.shape).float())
    return None


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# --------------------------------------------------------------------------------------------------------- modes


@contextlib.contextmanager
def evaluating(model: nn.Module, *, fast: bool = False) -> Iterator[None]:
    """Evaluation mode; every mode is restored.

    Unless ``fast``, without PyTorch's fused encoder layers, which pass by their parts.
    """
    modes = [(module, module.training) for module in model.modules()]
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled and fast)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; what did is restored."""
    required = [(p, p.requires_grad) for p in model.parameters() if has_values(p)]
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)


def detached(value: Tensor | None) -> float | None:
    """A loss as a number without its graph."""
    return None if value is None else float(value.detach())

"""The places of a model for what a file holds, with its structured layers in place of dense ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from structmat.compression.layers import layer_of, structured_layer_of
from structmat.compression.scan import parent_and_child
from structmat.errors import FormatError
from structmat.file_format import Header, LayerEntry, some
from structmat.io.tensors import Kind, named_tensors


@dataclass(frozen=True)
class Slot:
    """A place for one tensor of the model that is being loaded.

    Args:
        module: whose tensor it is.
        attribute: its name there.
        current: what is there.
        kind: what it is there.
        layer: the name of the structured layer that it belongs to, or None.
    """

    module: nn.Module
    attribute: str
    current: Tensor
    kind: Kind
    layer: str | None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter."""
        return self.kind is Kind.PARAMETER


def structured_layers(header: Header, model: nn.Module) -> dict[str, nn.Module]:
    """The layers to put in by name, on the meta device; one that stands in two places of the model is made once.

    Raises:
        FormatError: the model has no such layer, or one of another kind or shape.
    """
    made: dict[str, nn.Module] = {}
    same: dict[tuple[int, LayerEntry], nn.Module] = {}
    for prefix, layer in header.layers.items():
        try:
            old = model.get_submodule(prefix)
        except AttributeError as error:
            raise FormatError(
                f"The model has no layer {prefix!r}, which the file holds as {layer.structure}."
            ) from error
        adapter = layer_of(old) or structured_layer_of(old)
        if adapter is None:
            raise FormatError(
                f"Layer {prefix!r} of the model is a {type(old).__name__}; the file holds {layer.structure} "
                f"in place of a linear layer."
            )
        if adapter.is_structured(old):
            held = adapter.content(old)
            copies, shape = held.copies, held.shape
        else:
            copies, shape = adapter.shape(old)
        bias = getattr(old, "bias", None) is not None
        if (copies, shape, bias) != (layer.copies, layer.shape, layer.bias):
            raise FormatError(
                f"Layer {prefix!r} of the model has shape {shape}{_times(copies)} and bias={bias}; "
                f"the file has shape {layer.shape}{_times(layer.copies)} and bias={layer.bias}. "
                f"Build the architecture that was saved."
            )
        key = (id(old), layer)
        if key not in same:
            more = json.loads(layer.more)
            new = adapter.empty(old, layer.structure, layer.dtype, **more)
            if dict(adapter.saved(new)) != more:
                raise FormatError(f"Layer {prefix!r} of the file says {more}, which a {type(old).__name__} is not.")
            same[key] = new.train(old.training)
        made[prefix] = same[key]
    return made


def _times(copies: int) -> str:
    return "" if copies == 1 else f" ({copies} times)"


def slots_of(model: nn.Module, made: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """All places by the names that their tensors have in a file, of a model in which these layers are put."""
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = next((p for p in made if prefix == p or not p or prefix.startswith(f"{p}.")), None)
        if inside is None:
            for name, tensor, kind in _own_tensors(module):
                slots[f"{prefix}.{name}" if prefix else name] = Slot(module, name, tensor, kind, None)
    for prefix, layer in made.items():
        start = f"{prefix}." if prefix else ""
        for name, tensor, kind in _own_tensors(layer):
            slots[start + name] = Slot(layer, name, tensor, kind, prefix)
        adapter = structured_layer_of(layer)
        for name, path in {} if adapter is None else adapter.paths(layer).items():
            holder, attribute = parent_and_child(layer, path)
            tensor = getattr(holder, attribute)
            kind = Kind.PARAMETER if attribute in holder._parameters else Kind.BUFFER
            slots[start + name] = Slot(holder, attribute, tensor, kind, prefix)
    return slots


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor, Kind]]:
    return [entry for entry in named_tensors(module) if "." not in entry[0]]


def check_architecture(
    header: Header, slots: Mapping[str, Slot], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raise unless a model has the tensors of a file.

    Args:
        header: of the file.
        slots: of the model.
        stored: the shapes that tensors have in use, by each of their names.
        folder: for the message.

    Raises:
        FormatError: what is missing, unexpected or of another shape.
    """
    needed = {
        name for name, slot in slots.items() if slot.kind is not Kind.COMPUTED or slot.current.device.type == "meta"
    }
    missing = sorted(needed - set(stored))
    unexpected = sorted(name for name in set(stored) - set(slots) if name not in header.computed)
    other = [
        f"{name} {tuple(slots[name].current.shape)} in the model, {shape} in the file"
        for name, shape in sorted(stored.items())
        if name in slots and name not in header.computed and tuple(slots[name].current.shape) != shape
    ]
    faults = [
        f"{what}: {some(names)}"
        for what, names in (("missing in the file", missing), ("not in the model", unexpected), ("other shape", other))
        if names
    ]
    if faults:
        raise FormatError(
            f"The model is not the architecture saved in {folder}; {'; '.join(faults)}. "
            f"Build the same architecture with the same sizes."
        )

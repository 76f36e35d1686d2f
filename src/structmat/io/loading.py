"""Reading what was saved: checked completely before a model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from structmat.compression.layers import splitter_named
from structmat.compression.replace import decline_fast_paths
from structmat.compression.split import Splits, split_, whole_again_
from structmat.errors import FormatError, ModelError
from structmat.file_format import Header, LayerEntry, check_content, check_file, read_header
from structmat.io.slots import check_architecture, slots_of, structured_layers
from structmat.io.tensors import is_finite, named_tensors, unpacked
from structmat.matrix import StructuredMatrix
from structmat.structure import ParameterSpec, specs

Model = TypeVar("Model", bound=nn.Module)


@overload
def load(folder: str | os.PathLike[str], model: None = None, *, device: torch.device | str | None = None) -> Any: ...
@overload
def load(folder: str | os.PathLike[str], model: Model, *, device: torch.device | str | None = None) -> Model: ...
def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> Any:
    """Read what :func:`structmat.save` wrote.

    The file is checked against the model completely before anything is changed: on an error the model is as before.

    Args:
        folder: where it was saved.
        model: the architecture, freshly built and dense, on any device including meta; its layers are replaced in place
            by the structured ones, without a dense copy. Left out, a single matrix is read.
        device: of the tensors; by default that of the model, and the CPU for one on the meta device.

    Returns:
        ``model`` (the new layer if the model itself is one linear layer), with the dtypes of the file, or the
        :class:`StructuredMatrix`.

    Raises:
        FormatError: the folder holds nothing of this format, or a newer version of it; a file is damaged; a family is
            unknown; the architecture does not match (the message names what is missing, unexpected or of another
            shape).
    """
    folder = Path(folder)
    header = read_header(folder)
    path = folder / header.file
    check_file(path, header)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_content(header, shapes, path)
            if header.kind == "matrix":
                if model is not None:
                    raise FormatError(f"{folder} holds one matrix, not a model. Call load(folder) without a model.")
                return _load_matrix(header, file, torch.device(device or "cpu"))
            if model is None:
                raise FormatError(f"{folder} holds a model. Build its architecture and call load(folder, model).")
            splits = _split(header, model)
            try:
                return _load_model(header, file, shapes, model, device, folder)
            except BaseException:
                whole_again_(model, splits)
                raise
    except SafetensorError as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}. Get the file again.") from error


def _read(
    file: Any, name: str, device: torch.device, spec: ParameterSpec | None, copies: int = 1, *, finite: bool
) -> Tensor:
    """A tensor of the file as it is used, of a structure's specification if there is one."""
    tensor: Tensor = file.get_tensor(name)
    if finite and not is_finite(tensor):
        raise FormatError(f"The parameter {name!r} of the file has entries that are NaN or infinite.")
    return unpacked(name, tensor.to(device), spec, copies)


def _load_matrix(header: Header, file: Any, device: torch.device) -> StructuredMatrix:
    layer = header.layers[""]
    tensors = {}
    for name, spec in specs(layer.structure, layer.shape).items():
        tensor = _read(file, name, device, spec, finite=True)
        _check_dtype(name, tensor, layer, spec)
        tensors[name] = torch.view_as_complex(tensor) if layer.dtype.is_complex and spec.dtype is None else tensor
    return StructuredMatrix(layer.structure, layer.shape, tensors, transposed=layer.transposed)


def _split(header: Header, model: nn.Module) -> Splits:
    """Take apart what was so when it was saved. Raises FormatError; then nothing is changed."""
    splits = split_(model, header.split)
    for name, kind in header.split.items():
        try:
            found = splitter_named(kind).is_split(model.get_submodule(name))
        except (AttributeError, ModelError):
            found = False
        if not found:
            whole_again_(model, splits)
            raise FormatError(
                f"The file holds the matrices of {name!r}, a module of kind {kind!r}, as layers; the model has no such "
                f"module there. Build the architecture that was saved."
            )
    return splits


def _declared(header: Header) -> dict[str, tuple[ParameterSpec, LayerEntry]]:
    """The tensors that structures call for, by their full names, with their layers."""
    return {
        f"{prefix}.{name}" if prefix else name: (spec, layer)
        for prefix, layer in header.layers.items()
        for name, spec in specs(layer.structure, layer.shape).items()
    }


def _check_dtype(name: str, tensor: Tensor, layer: LayerEntry, spec: ParameterSpec | None) -> None:
    wanted = (spec.dtype if spec is not None else None) or layer.dtype.to_real()
    if tensor.dtype != wanted:
        raise FormatError(f"The tensor {name!r} of {layer.structure} is {tensor.dtype}; it must be {wanted}.")


def _load_model(
    header: Header,
    file: Any,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    device: torch.device | str | None,
    folder: Path,
) -> nn.Module:
    made = structured_layers(header, model)
    where = {prefix: _device_of(model.get_submodule(prefix), device) for prefix in made}
    slots = slots_of(model, made)
    stored = {name: header.shared.get(name, name) for name in (*shapes, *header.shared)}
    declared = _declared(header)
    packed = {name: layer.stacked(spec.shape) for name, (spec, layer) in declared.items() if spec.is_packed}
    whole = {name: packed.get(name, shape) for name, shape in shapes.items()}
    check_architecture(header, slots, {name: whole[owner] for name, owner in stored.items()}, folder)

    def read(name: str, device: torch.device, *, finite: bool) -> Tensor:
        spec, layer = declared.get(name, (None, None))
        return _read(file, name, device, spec, 1 if layer is None else layer.copies, finite=finite)

    # Everything is read before the model is touched, so that a bad tensor leaves it as it was.
    values: dict[tuple[str, torch.device], Tensor] = {}
    plan: list[tuple[nn.Module, str, Tensor]] = []
    owners: dict[int, str] = {}
    parameters: dict[tuple[str, torch.device, bool], nn.Parameter] = {}
    for name, slot in slots.items():
        if name not in stored or (name in header.computed and slot.current.device.type != "meta"):
            continue
        target = where[slot.layer] if slot.layer is not None else _place(slot.current, device)
        key = (stored[name], target)
        if key not in values:
            values[key] = read(*key, finite=slot.is_parameter)
        value = values[key]
        if slot.layer is not None:
            _check_dtype(name, value, header.layers[slot.layer], declared[name][0] if name in declared else None)
        earlier = owners.setdefault(id(slot.current), stored[name])
        if earlier != stored[name] and not torch.equal(value, read(earlier, target, finite=False)):
            raise FormatError(
                f"{earlier!r} and {name!r} are one tensor in the model but differ in {folder}. Untie them to load it."
            )
        if slot.is_parameter:
            trained = slot.current.requires_grad
            parameter = (earlier, target, trained)
            if parameter not in parameters:
                parameters[parameter] = nn.Parameter(value, requires_grad=trained and _is_differentiable(value))
            value = parameters[parameter]
        plan.append((slot.module, slot.attribute, value))
    for module, attribute, value in plan:
        if isinstance(value, nn.Parameter):
            module._parameters[attribute] = value
        else:
            module._buffers[attribute] = value
    if "" in made:
        return made[""]
    for prefix, layer_module in made.items():
        model.set_submodule(prefix, layer_module)
        decline_fast_paths(model, prefix)
    return model


def _device_of(module: nn.Module, device: torch.device | str | None) -> torch.device:
    tensor = next((t for _, t, _ in named_tensors(module)), None)
    return torch.device(device or "cpu") if tensor is None else _place(tensor, device)


def _place(tensor: Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()

"""Saving and loading: safetensors and one JSON file, never pickle, never a dense copy.

The format is specified in :mod:`structmat.file_format`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from structmat.compression.layers import layer_named, layer_of, splitter_named, splitters, structured_layer_of
from structmat.compression.replace import decline_fast_paths
from structmat.compression.scan import Site, parent_and_child
from structmat.compression.split import Splits, split_, whole_again_
from structmat.errors import DataError, FormatError, ModelError
from structmat.file_format import (
    FORMAT,
    HEADER,
    TENSOR_FILE,
    VERSION,
    Header,
    LayerEntry,
    check_content,
    check_file,
    read_header,
    sha256,
    some,
)
from structmat.files import write_named, write_text
from structmat.matrix import StructuredMatrix
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.linear import FrozenLinear
from structmat.places import pack, unpack
from structmat.structure import ParameterSpec, Structure, specs, to_json

Model = TypeVar("Model", bound=nn.Module)


# -------------------------------------------------------------------------------------------------------- saving


def save(value: nn.Module | StructuredMatrix, folder: str | os.PathLike[str]) -> Path:
    """Write a model with structured layers, or one structured matrix, into a folder.

    Args:
        value: the model (its structured layers by structure and tensors, everything else by its tensors), or a matrix.
        folder: made if absent; a model saved there before is replaced, atomically.

    Returns:
        The folder.

    Raises:
        DataError: a parameter is NaN or infinite.
        ModelError: the model is (partly) on the meta device, holds frozen layers or state that is not a tensor.
        FormatError: the folder's path is a file.
    """
    if isinstance(value, StructuredMatrix):
        tensors, header = _matrix_content(value)
    else:
        tensors, header = _model_content(value)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file. Name a folder to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    digest = ""

    def write_tensors(path: Path) -> str:
        nonlocal digest
        save_file(tensors, path, metadata={"format": "pt"})
        digest = sha256(path)
        return f"model-{digest[:16]}.safetensors"

    path = write_named(folder, write_tensors)
    header["tensors"] = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
    text = json.dumps({name: header[name] for name in sorted(header)}, indent=1, allow_nan=False)
    write_text(folder / HEADER, text + "\n")
    for old in folder.iterdir():
        if TENSOR_FILE.fullmatch(old.name) and old.name != path.name:
            old.unlink()
    return folder


def _matrix_content(matrix: StructuredMatrix) -> tuple[dict[str, Tensor], dict[str, Any]]:
    transposed = matrix._transposed
    layer = {
        "structure": to_json(matrix.structure),
        "shape": list(matrix.T.shape if transposed else matrix.shape),
        "transposed": transposed,
        "dtype": _dtype_name(matrix.dtype),
    }
    tensors = {}
    declared = specs(matrix.structure, matrix.T.shape if transposed else matrix.shape)
    for name, tensor in matrix.tensors.items():
        _check_tensor(name, tensor, parameter=True)
        tensors[name] = _written(tensor, declared[name])
    return tensors, _header("matrix", {"": layer}, {}, {}, [])


def _model_content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers: dict[str, Any] = {}
    declared: dict[str, tuple[ParameterSpec, int]] = {}
    renamed: dict[str, str] = {}
    split: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FrozenLinear | FrozenConvolution):
            raise ModelError(
                f"Layer {name!r} is frozen: its fused tensors belong to no structure. Save the model before freezing."
            )
        for splitter in splitters():
            if splitter.is_split(module):
                split[name] = splitter.name
        adapter = structured_layer_of(module)
        if adapter is None:
            continue
        held = adapter.content(module)
        layers[name] = {
            "structure": to_json(held.structure),
            "shape": list(held.shape),
            "bias": getattr(module, "bias", None) is not None,
            "dtype": _dtype_name(held.dtype),
        }
        more = dict(adapter.saved(module))
        if held.copies > 1:
            layers[name]["copies"] = held.copies
        if more:
            layers[name]["more"] = more
        start = f"{name}." if name else ""
        declared |= {start + n: (s, held.copies) for n, s in specs(held.structure, held.shape).items()}
        renamed |= {start + path: start + n for n, path in adapter.paths(module).items()}
    extra = [name for name in model.state_dict() if name.endswith("_extra_state")]
    if extra:
        raise ModelError(f"The model holds state that is not a tensor: {some(extra)}. Only tensors are saved.")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    computed: list[str] = []
    first: dict[tuple[Any, ...], str] = {}
    used: set[int] = set()
    for path, tensor, kind in _named_tensors(model):
        name = renamed.get(path, path)
        _check_tensor(name, tensor, parameter=kind == "parameter")
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), kind)
        owner = first.setdefault(key if tensor.numel() else (name,), name)
        if owner != name:
            shared[name] = owner
            continue
        plain = _written(tensor, *declared.get(name, (None, 1)))
        memory = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if memory in used else plain  # views of one memory, of other shapes
        used.add(memory)
        if kind == "computed":
            computed.append(name)
    return tensors, _header("model", layers, split, shared, computed)


def _header(
    kind: str, layers: dict[str, Any], split: dict[str, str], shared: dict[str, str], computed: list[str]
) -> dict[str, Any]:
    from structmat import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "kind": kind,
        "layers": layers,
        "split": split,
        "shared": shared,
        "computed": sorted(computed),
    }


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Every parameter and buffer under each of its names, with its kind: parameter, buffer or computed."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield start + name, parameter, "parameter"
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield start + name, buffer, "buffer" if persistent else "computed"


def _check_tensor(name: str, tensor: Tensor, *, parameter: bool) -> None:
    if tensor.device.type == "meta":
        raise ModelError(f"{name!r} is on the meta device and has no values. Load or initialise the model first.")
    if parameter and not _is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{name!r} has {bad} entries that are NaN or infinite. Look at the training that made it.")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def _plain(tensor: Tensor) -> Tensor:
    """What is written: real and contiguous, with memory that holds nothing else."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.contiguous().clone()


def _written(tensor: Tensor, spec: ParameterSpec | None, copies: int = 1) -> Tensor:
    if spec is None or not spec.is_packed:
        return _plain(tensor)
    parts = [pack(part, spec.places_in) for part in (tensor if copies > 1 else [tensor])]
    return torch.stack(parts) if copies > 1 else parts[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------- loading


@overload
def load(folder: str | os.PathLike[str], model: None = None, *, device: torch.device | str | None = None) -> Any: ...
@overload
def load(folder: str | os.PathLike[str], model: Model, *, device: torch.device | str | None = None) -> Model: ...
def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> Any:
    """Read what :func:`save` wrote.

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


def _read(file: Any, name: str, device: torch.device, *, finite: bool) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if finite and not _is_finite(tensor):
        raise FormatError(f"The parameter {name!r} of the file has entries that are NaN or infinite.")
    return tensor.to(device)


def _load_matrix(header: Header, file: Any, device: torch.device) -> StructuredMatrix:
    layer = header.layers[""]
    tensors = {}
    for name, spec in specs(layer.structure, layer.shape).items():
        tensor = _unpacked(name, _read(file, name, device, finite=True), spec)
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


def _unpacked(name: str, tensor: Tensor, spec: ParameterSpec | None, copies: int = 1) -> Tensor:
    """The tensor as it is used, from what the file holds."""
    if spec is None or not spec.is_packed:
        return tensor
    if tensor.dtype != spec.file_dtype:
        raise FormatError(f"The tensor {name!r} holds bits: it is {tensor.dtype} and must be {spec.file_dtype}.")
    parts = [unpack(part, spec.numel, spec.places_in, name) for part in (tensor if copies > 1 else [tensor])]
    return torch.stack(parts) if copies > 1 else parts[0]


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
    made = _structured_layers(header, model)
    where = {prefix: _device_of(model.get_submodule(prefix), device) for prefix in made}
    slots = _slots(model, made)
    stored = {name: header.shared.get(name, name) for name in (*shapes, *header.shared)}
    declared = _declared(header)
    packed = {name: found for name, found in declared.items() if found[0].is_packed}
    whole = {
        name: packed[name][1].stacked(packed[name][0].shape) if name in packed else shape
        for name, shape in shapes.items()
    }
    _check_architecture(header, slots, {name: whole[owner] for name, owner in stored.items()}, folder)
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
            value = _read(file, stored[name], target, finite=slot.is_parameter)
            if stored[name] in packed:
                spec, layer = packed[stored[name]]
                value = _unpacked(stored[name], value, spec, layer.copies)
            values[key] = value
        value = values[key]
        if slot.layer is not None:
            _check_dtype(name, value, header.layers[slot.layer], declared[name][0] if name in declared else None)
        earlier = owners.setdefault(id(slot.current), stored[name])
        if earlier != stored[name] and not torch.equal(value, _read(file, earlier, target, finite=False)):
            raise FormatError(
                f"{earlier!r} and {name!r} are one tensor in the model but differ in {folder}. Untie them to load it."
            )
        if slot.is_parameter:
            trained = slot.current.requires_grad
            parameter = (stored[name] if earlier == stored[name] else earlier, target, trained)
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


@dataclass(frozen=True)
class _Slot:
    """A place for one tensor of the model that is being loaded."""

    module: nn.Module
    attribute: str
    current: Tensor
    kind: str
    layer: str | None  # the structured layer that it belongs to

    @property
    def is_parameter(self) -> bool:
        return self.kind == "parameter"


def _structured_layers(header: Header, model: nn.Module) -> dict[str, nn.Module]:
    """The layers to put in, on the meta device; a layer that stands in two places of the model is made once."""
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


def _slots(model: nn.Module, made: Mapping[str, nn.Module]) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = next((p for p in made if prefix == p or not p or prefix.startswith(f"{p}.")), None)
        if inside is None:
            for name, tensor, kind in _named_tensors_of(module):
                slots[f"{prefix}.{name}" if prefix else name] = _Slot(module, name, tensor, kind, None)
    for prefix, layer in made.items():
        start = f"{prefix}." if prefix else ""
        for name, tensor, kind in _named_tensors_of(layer):
            slots[start + name] = _Slot(layer, name, tensor, kind, prefix)
        adapter = structured_layer_of(layer)
        for name, path in {} if adapter is None else adapter.paths(layer).items():
            holder, attribute = parent_and_child(layer, path)
            tensor = getattr(holder, attribute)
            kind = "parameter" if attribute in holder._parameters else "buffer"
            slots[start + name] = _Slot(holder, attribute, tensor, kind, prefix)
    return slots


def _named_tensors_of(module: nn.Module) -> list[tuple[str, Tensor, str]]:
    return [entry for entry in _named_tensors(module) if "." not in entry[0]]


def _check_architecture(
    header: Header, slots: Mapping[str, _Slot], stored: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    needed = {name for name, slot in slots.items() if slot.kind != "computed" or slot.current.device.type == "meta"}
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


def _device_of(module: nn.Module, device: torch.device | str | None) -> torch.device:
    tensor = next((t for _, t, _ in _named_tensors(module)), None)
    return torch.device(device or "cpu") if tensor is None else _place(tensor, device)


def _place(tensor: Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def size_on_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes of what :func:`save` wrote into a folder."""
    header = read_header(Path(folder))
    return header.size + (Path(folder) / HEADER).stat().st_size


class StoredSize:
    """Bytes that :func:`save` writes of a model some of whose layers get structures, without making these.

    Sums of its figures are at most some bytes a tensor above what is written, and never below it: the headers' numbers
    are counted as long as they can be.

    Args:
        model: with dense weights in these layers.
        layers: their names, each with further names of the same module.

    Attributes:
        beside: bytes of all that is not the weight of one of these layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, Sequence[str]]]) -> None:
        tensors, header = _model_content(model)
        self._digits = len(str(2 * sum(_bytes(t) for t in tensors.values())))
        own = {f"{name}.weight": name for name, _ in layers}
        other = {f"{alias}.weight" for _, aliases in layers for alias in aliases}
        self._dense = {own[n]: self._tensor(n, t.shape, t.dtype) for n, t in tensors.items() if n in own}
        header["shared"] = {n: owner for n, owner in header["shared"].items() if n not in other}
        # The JSON also names the tensor file, its size and its digest; the tensor file's header is padded.
        text = {**header, "tensors": {"file": "model-.safetensors" + 16 * "0", "bytes": 10**15, "sha256": 64 * "0"}}
        self.beside = (
            len(json.dumps(text, indent=1).encode())
            + len('{"__metadata__":{"format":"pt"}}')
            + 24
            + sum(self._tensor(n, t.shape, t.dtype) for n, t in tensors.items() if n not in own)
        )

    def dense(self, name: str) -> int:
        """Of a layer's weight as it is; 0 if it is stored under the name of another."""
        return self._dense.get(name, 0)

    def structured(self, site: Site, structure: Structure) -> int:
        """Of a layer with a structure in the place of its weight, and the description of it."""
        kind: torch.dtype = getattr(torch, site.dtype)
        total = 0
        declared = specs(structure, site.shape)
        copies = (site.copies,) if site.copies > 1 else ()
        for tensor, spec in declared.items():
            total += self._tensor(f"{site.name}.{tensor}", (*copies, *spec.file_shape), spec.file_dtype or kind)
        entry = {
            "structure": to_json(structure),
            "shape": list(site.shape),
            "bias": site.bias,
            "dtype": site.dtype,
            "copies": site.copies,
            "more": dict(layer_named(site.kind).longest_saved()),
        }
        for own in (site.name, *site.aliases, *site.tied):
            total += len(json.dumps({"layers": {own: entry}}, indent=1).encode())
        for alias in (*site.aliases, *site.tied):
            total += sum(len(f'\n  "{alias}.{t}": "{site.name}.{t}",'.encode()) for t in declared)
        return total

    def _tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        """A tensor's bytes and its line in the header of the tensor file."""
        offsets = 2 * self._digits
        line = len(json.dumps({name: {"dtype": "BF16", "shape": list(shape), "data_offsets": []}}).encode()) + offsets
        return math.prod(shape) * dtype.itemsize + line


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

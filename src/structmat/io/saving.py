"""Writing models and matrices: safetensors and one JSON file, never pickle, never a dense copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from structmat.compression.layers import splitters, structured_layer_of
from structmat.errors import DataError, FormatError, ModelError
from structmat.file_format import (
    FORMAT,
    HEADER,
    TENSOR_FILE,
    VERSION,
    sha256,
    some,
)
from structmat.files import write_named, write_text
from structmat.io.tensors import Kind, is_finite, named_tensors, written
from structmat.matrix import StructuredMatrix
from structmat.nn.convolution import FrozenConvolution
from structmat.nn.linear import FrozenLinear
from structmat.structure import ParameterSpec, specs, to_json


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
        tensors, header = model_content(value)
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
        tensors[name] = written(tensor, declared[name])
    return tensors, _header("matrix", {"": layer}, {}, {}, [])


def model_content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model's file by name, and the fields of its header but for what tells of that file.

    Raises:
        DataError: a parameter is NaN or infinite.
        ModelError: the model is (partly) on the meta device, holds frozen layers or state that is not a tensor.
    """
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
    for path, tensor, kind in named_tensors(model):
        name = renamed.get(path, path)
        _check_tensor(name, tensor, parameter=kind is Kind.PARAMETER)
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), kind)
        owner = first.setdefault(key if tensor.numel() else (name,), name)
        if owner != name:
            shared[name] = owner
            continue
        plain = written(tensor, *declared.get(name, (None, 1)))
        memory = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if memory in used else plain  # views of one memory, of other shapes
        used.add(memory)
        if kind is Kind.COMPUTED:
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


def _check_tensor(name: str, tensor: Tensor, *, parameter: bool) -> None:
    if tensor.device.type == "meta":
        raise ModelError(f"{name!r} is on the meta device and has no values. Load or initialise the model first.")
    if parameter and not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{name!r} has {bad} entries that are NaN or infinite. Look at the training that made it.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

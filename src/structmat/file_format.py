"""The file format: what :mod:`structmat.io` writes, and the checks of what it reads.

The format, version 2. A folder holds two files:

- ``structmat.json``: one UTF-8 JSON object with exactly these fields
    - ``format``: ``"structmat"``;  ``version``: ``2``;  ``library``: the version that wrote it (for people)
    - ``kind``: ``"model"`` or ``"matrix"``
    - ``tensors``: ``{"file": name, "bytes": size, "sha256": digest}`` of the tensor file
    - ``layers``: layer name -> ``{"structure": ..., "shape": [out, in], "bias": true, "dtype": "float32"}``, the
      structured layers only; ``structure`` as :func:`structmat.structure.to_json` writes it, sizes resolved to
      integers. A layer of several matrices of one shape (the groups of a convolution) says how many, ``"copies"``, and
      its tensors have an axis in front for them; what else its kind needs is ``"more"``, such as the order of a
      convolution's unfolded index. A matrix is the one layer named ``""``, with ``"transposed"`` in place of ``"bias"``
    - ``split``: name -> ``"recurrent"``, ``"attention"``, ``"experts"`` or ``"fused experts"`` of modules whose
      matrices are layers of their own: those of the model that is loaded into are taken apart first (a file of
      version 1 has none)
    - ``shared``: tensor name -> the name under which the same tensor is stored
    - ``computed``: names of non-persistent buffers, which are read only into a model on the meta device
- ``model-<first 16 digits of the sha256>.safetensors``: the tensors by their names in the model; those of a
  structured layer under the structure's own names. Complex ones are real with a last axis of 2 (the layer's ``dtype``
  tells). No metadata is read.

The tensor file is written first and the JSON is renamed into place last: a folder holds the old model or the new one,
whenever the writer is killed. Not allowed, and refused with a :class:`~structmat.errors.FormatError`: other versions,
unknown fields or families, files of another size or digest, a tensor file outside the folder, tensors that the
structures do not call for or that have other shapes, parameters that are NaN or infinite. The architecture is not
stored: whoever loads builds it, and it must have the same tensors outside the structured layers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structmat.errors import FormatError, ShapeError, StructmatError
from structmat.structure import Shape, Structure, check_shape, resolve, specs
from structmat.structures import from_json

FORMAT, VERSION, HEADER = "structmat", 2, "structmat.json"

TENSOR_FILE = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_FIELDS = {"format", "version", "library", "kind", "tensors", "layers", "split", "shared", "computed"}
_HEADER_LIMIT = 256 * 2**20
"""No honest header comes near this size; a larger one is not read into memory."""

_SHOWN = 5
"""How many names an error lists."""


@dataclass(frozen=True)
class LayerEntry:
    """One structured layer of the header.

    Args:
        structure, shape: of each of its matrices.
        bias: whether it has one.
        transposed: of a single matrix, whether it stands for the transpose.
        dtype: of its numbers.
        copies: how many matrices it has.
        more: what its kind needs beside, as JSON.
    """

    structure: Structure
    shape: Shape
    bias: bool
    transposed: bool
    dtype: torch.dtype
    copies: int = 1
    more: str = "{}"

    def stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor that each matrix has one of."""
        return shape if self.copies == 1 else (self.copies, *shape)


@dataclass(frozen=True)
class Header:
    """The JSON, parsed and checked."""

    kind: str
    file: str
    size: int
    digest: str
    layers: Mapping[str, LayerEntry]
    split: Mapping[str, str]
    shared: Mapping[str, str]
    computed: frozenset[str]


def read_header(folder: Path) -> Header:
    """Read and check the JSON of a folder. Raises FormatError."""
    path = folder / HEADER
    try:
        if path.stat().st_size > _HEADER_LIMIT:
            raise FormatError(f"{path} has {path.stat().st_size} bytes; no header is that long.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"{folder} has no readable {HEADER}: nothing was saved there by structmat.") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: it is damaged or was not written by structmat.") from error
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON ({error}): it is damaged. Save the model again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path} was not written by structmat: it does not say 'format': {FORMAT!r}.")
    version = data.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path} states the version {version!r}; versions are integers from 1 to {VERSION}.")
    if version > VERSION:
        raise FormatError(
            f"{path} has version {version} of the format (written by structmat {data.get('library')!r}); "
            f"this structmat reads versions up to {VERSION}. Update structmat."
        )
    try:
        return _parse_header(data)
    except StructmatError as error:
        raise FormatError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise FormatError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return data


def _parse_header(data: dict[str, Any]) -> Header:
    fields = _FIELDS - {"split"} if data["version"] == 1 else _FIELDS
    if set(data) != fields:
        missing, unknown = sorted(fields - set(data)), sorted(set(data) - fields)
        raise FormatError(f"fields missing: {missing}, unknown: {unknown}.")
    kind = data["kind"]
    if kind not in ("model", "matrix"):
        raise FormatError(f"kind is 'model' or 'matrix', not {kind!r}.")
    tensors = data["tensors"]
    if set(tensors) != {"file", "bytes", "sha256"} or not TENSOR_FILE.fullmatch(str(tensors["file"])):
        raise FormatError(f"{tensors!r} names no tensor file of this folder.")
    layers = {str(name): _parse_layer(name, entry, kind) for name, entry in data["layers"].items()}
    if kind == "matrix" and set(layers) != {""}:
        raise FormatError(f"a matrix has one layer named ''; got {some(list(layers))}.")
    split, shared, computed = data.get("split", {}), data["shared"], data["computed"]
    if not all(isinstance(kind, str) for kind in split.values()):
        raise FormatError("'split' holds the kinds of modules by their names.")
    if not all(isinstance(owner, str) for owner in shared.values()) or not all(isinstance(n, str) for n in computed):
        raise FormatError("'shared' and 'computed' hold names.")
    return Header(
        kind,
        tensors["file"],
        int(tensors["bytes"]),
        str(tensors["sha256"]),
        layers,
        dict(split),
        shared,
        frozenset(computed),
    )


def _parse_layer(name: str, entry: dict[str, Any], kind: str) -> LayerEntry:
    flag = "bias" if kind == "model" else "transposed"
    optional = {"copies", "more"} if kind == "model" else set()
    if set(entry) - optional != {"structure", "shape", "dtype", flag} or not isinstance(entry[flag], bool):
        raise FormatError(f"layer {name!r} has the fields {sorted(entry)}.")
    copies, more = entry.get("copies", 1), entry.get("more", {})
    if type(copies) is not int or copies < 1 or not isinstance(more, dict):
        raise FormatError(f"layer {name!r} has {copies!r} matrices and the details {more!r}.")
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"layer {name!r} has the unknown dtype {entry['dtype']!r}.")
    shape = check_shape(tuple(entry["shape"]))
    structure = from_json(entry["structure"])
    try:
        resolved = resolve(structure, shape)
    except ShapeError as error:
        raise FormatError(f"layer {name!r}: {error}") from error
    if resolved != structure:
        raise FormatError(f"layer {name!r} has {structure}, whose sizes are not resolved to integers.")
    bias = entry["bias"] if kind == "model" else False
    details = json.dumps(more, sort_keys=True)
    return LayerEntry(structure, shape, bias, kind == "matrix" and entry[flag], dtype, copies, details)


def _stored_shapes(layer: LayerEntry, kind: str) -> dict[str, tuple[int, ...]]:
    last = (2,) if layer.dtype.is_complex else ()
    shapes = {}
    for name, spec in specs(layer.structure, layer.shape).items():
        shapes[name] = layer.stacked(spec.file_shape + (last if spec.dtype is None else ()))
    if kind == "model" and layer.bias:
        shapes["bias"] = (layer.copies * layer.shape[0], *last)
    return shapes


def check_file(path: Path, header: Header) -> None:
    """The tensor file is there, of the right size and digest. Raises FormatError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FormatError(f"{path} is missing: the folder was copied without it. Copy both files.") from error
    if size != header.size:
        state = "truncated" if size < header.size else "too long"
        raise FormatError(f"{path} is {state}: it has {size} bytes, {HEADER} says {header.size}. Get the file again.")
    if sha256(path) != header.digest:
        raise FormatError(f"{path} is damaged: its sha256 is not the one in {HEADER}. Get the file again.")


def check_content(header: Header, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """The tensor file against the header: what the structures call for is there, nothing else is in the layers."""
    for name, owner in header.shared.items():
        if owner not in shapes or name in shapes:
            raise FormatError(f"{path.name}: {name!r} is said to be shared with {owner!r}, which is not so.")
    if not header.computed <= set(shapes):
        raise FormatError(f"{path.name} lacks {some(sorted(header.computed - set(shapes)))}.")
    everything = {**shapes, **{name: shapes[owner] for name, owner in header.shared.items()}}
    for prefix, layer in header.layers.items():
        start = f"{prefix}." if prefix else ""
        wanted = {start + name: shape for name, shape in _stored_shapes(layer, header.kind).items()}
        present = {name: shape for name, shape in everything.items() if name.startswith(start)}
        if present != wanted:
            raise FormatError(
                f"{path.name}: {layer.structure} at {prefix!r} has the tensors {wanted}; the file has {present}."
            )


def sha256(path: Path) -> str:
    """The digest of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: list[str]) -> str:
    """The first few of the names, for a message."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

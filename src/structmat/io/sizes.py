"""How many bytes a saved model takes, and would take."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from structmat.compression.layers import layer_named
from structmat.compression.scan import Site
from structmat.file_format import HEADER, read_header
from structmat.io.saving import model_content
from structmat.structure import Structure, specs, to_json


def size_on_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes of what :func:`structmat.save` wrote into a folder."""
    header = read_header(Path(folder))
    return header.size + (Path(folder) / HEADER).stat().st_size


class StoredSize:
    """Bytes that :func:`structmat.save` writes of a model some of whose layers get structures, without making these.

    Sums of its figures are at most some bytes a tensor above what is written, and never below it: the headers' numbers
    are counted as long as they can be.

    Args:
        model: with dense weights in these layers.
        layers: their names, each with further names of the same module.

    Attributes:
        beside: bytes of all that is not the weight of one of these layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, Sequence[str]]]) -> None:
        tensors, header = model_content(model)
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

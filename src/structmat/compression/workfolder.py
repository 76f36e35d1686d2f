"""What a pipeline keeps on disk between its steps, so that interrupted work resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structmat.compression.running import length_of
from structmat.errors import FormatError
from structmat.files import write_atomically, write_text

FORMAT = 1
"""Version of the files; work of another version is refused."""


class WorkFolder:
    """A folder of finished pieces of work, each a file that appears whole or not at all.

    A piece has a name and a *key*: a digest of what it was made from. A piece with another key is not found, so that
    changed settings or weights never meet old results. With ``path=None`` nothing is kept, or only in memory if
    ``remember`` says so.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, remember: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self._memory: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Tensor]]] | None = {} if remember else None
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The data and tensors of a finished piece of work, or None.

        Raises:
            FormatError: the file is no such piece, is damaged, or is of another version.
        """
        if self.path is None:
            known, data, tensors = (self._memory or {}).get(name, ("", {}, {}))
            return (json.loads(json.dumps(data)), dict(tensors)) if known == key else None
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["structmat"])
                version = header["version"]
                if version == FORMAT and header["key"] == key:
                    return header["data"], {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file} is not a piece of work of structmat, or is damaged. Remove it.") from error
        if version != FORMAT:
            raise FormatError(
                f"{file} was written by version {version} of the format; this is {FORMAT}. Use an empty folder."
            )
        return None

    def store(self, name: str, key: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep a piece of work; JSON values and tensors."""
        if self.path is None:
            if self._memory is not None:
                self._memory[name] = key, data, tensors or {}
            return
        header = json.dumps({"version": FORMAT, "key": key, "data": data})
        # One of the tensors may be shared between names, which the format forbids.
        whole = {k: t.detach().cpu().contiguous().clone() for k, t in (tensors or {}).items()}
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: save_file(whole, path, metadata={"structmat": header}))

    def _file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / f"{name}.safetensors"


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON atomically, for people too: indented, keys in the given order."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_text(Path(path), text)


def digest(*parts: Any) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def fingerprint(model: nn.Module) -> str:
    """A digest of all parameters and buffers: names, shapes, types and values."""
    total = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):  # of a lazy module that never ran
            total.update(name.encode())
            continue
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            total.update(_raw(tensor))
    return total.hexdigest()[:24]


def form_and_start(loader: Iterable[Any]) -> tuple[list[Any], str]:
    """What tells data apart whatever its order (numbers of batches and samples, shapes and types in the first batch),
    and a digest of the values in the first batch."""
    lengths = [length_of(d) for d in (loader, getattr(loader, "dataset", None))]
    tensors = list(_tensors(next(iter(loader), None)))
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(_raw(tensor))
    return [*lengths, [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]], total.hexdigest()[:24]


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Of a batch, however nested."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

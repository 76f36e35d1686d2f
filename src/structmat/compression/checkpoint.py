"""A checkpoint on disk: facts as JSON and tensors as safetensors, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from structmat.errors import FormatError
from structmat.files import write_atomically

NAME = "recovery.safetensors"
_KEY = "structmat.recovery"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run.

    Args:
        identity: JSON values that must be equal for the run to go on.
        facts: JSON values.
        tensors: by name.
    """

    identity: Mapping[str, Any]
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint. The facts travel in the tensor file's metadata: one file, one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"identity": checkpoint.identity, "facts": checkpoint.facts})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    write_atomically(folder / NAME, lambda path: save_file(tensors, path, metadata={_KEY: text}))


def read_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none.

    Raises:
        FormatError: it is damaged, or of a run with another identity.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            data = json.loads((file.metadata() or {})[_KEY])
            found = Checkpoint(
                data["identity"],
                data["facts"],
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a checkpoint of a recovery ({error}). Delete it to start anew.") from error
    wanted = json.loads(json.dumps(identity))
    if found.identity != wanted:
        names = sorted(n for n in {*wanted, *found.identity} if wanted.get(n) != found.identity.get(n))
        raise FormatError(
            f"{path} belongs to another run: {', '.join(names)} differ. Delete it, or use another folder."
        )
    return found

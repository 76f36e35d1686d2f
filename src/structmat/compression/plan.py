"""What becomes of each layer: a small JSON file that a person can edit and apply again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structmat.compression.budget import Budget
from structmat.compression.goals import Goals, read_goals
from structmat.compression.workfolder import write_json
from structmat.errors import FormatError
from structmat.structure import Shape, Structure, check_shape, resolve
from structmat.structure import to_json as structure_to_json
from structmat.structures import from_json as structure_from_json
from structmat.structures.dense import Dense

VERSION = 1
"""Of the file's format."""


@dataclass(frozen=True)
class Plan:
    """The structure of every layer, resolved to integers; ``Dense()`` keeps a layer as it is.

    Args:
        layers: structure by the layer's name.
        shapes: ``(out_features, in_features)`` by the layer's name.
        budget: what the plan was made for, if it was made by allocation: one budget, or several goals.
        seed: of its making.
        version: of the file's format.
    """

    layers: Mapping[str, Structure]
    shapes: Mapping[str, Shape]
    budget: Budget | Goals | None = None
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        if set(self.layers) != set(self.shapes):
            missing = sorted(set(self.layers) ^ set(self.shapes))
            raise FormatError(f"A plan has a shape for every layer; {', '.join(missing)} has only one of the two.")
        resolved = {name: resolve(s, self.shapes[name]) for name, s in self.layers.items()}
        object.__setattr__(self, "layers", resolved)

    @property
    def changed(self) -> dict[str, Structure]:
        """The layers that do not stay as they are."""
        return {name: s for name, s in self.layers.items() if not isinstance(s, Dense)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; :meth:`from_json` reads them."""
        return {
            "structmat_plan": self.version,
            "budget": None if self.budget is None else read_goals(self.budget).to_json(),
            "seed": self.seed,
            "layers": {
                name: {"shape": list(self.shapes[name]), "structure": structure_to_json(structure)}
                for name, structure in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read what :meth:`to_json` wrote, also after a person edited it: fractions are resolved.

        Raises:
            FormatError: a field is missing or wrong, a family is unknown, or the version is newer.
            ShapeError: a structure does not fit its shape.
        """
        if not isinstance(data, Mapping) or "structmat_plan" not in data:
            raise FormatError("A plan is an object with 'structmat_plan' and 'layers'; this is none.")
        version = data["structmat_plan"]
        if version != VERSION:
            raise FormatError(f"This plan has version {version!r}; this structmat reads {VERSION}. Update structmat.")
        entries = data.get("layers")
        if not isinstance(entries, Mapping):
            raise FormatError("A plan has an object 'layers' with the structure of every layer; here it is missing.")
        layers: dict[str, Structure] = {}
        shapes: dict[str, Shape] = {}
        for name, entry in entries.items():
            if not isinstance(entry, Mapping) or not {"shape", "structure"} <= set(entry):
                raise FormatError(f"The layer {name} of a plan has a 'shape' and a 'structure'; got {entry!r}.")
            if not isinstance(entry["shape"], list):
                raise FormatError(f"The shape of {name} is a list [out, in]; got {entry['shape']!r}.")
            shapes[name] = check_shape(entry["shape"])
            layers[name] = structure_from_json(entry["structure"])
        budget, seed = data.get("budget"), data.get("seed", 0)
        if not isinstance(seed, int):
            raise FormatError(f"The seed of a plan is an integer; got {seed!r}.")
        goals = None if budget is None else Goals.from_json(budget)
        return cls(layers, shapes, goals and goals.simplest, seed, version)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan's JSON file. Raises :class:`~structmat.errors.FormatError`, as :meth:`from_json`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is not JSON: {error}. A plan is a JSON file that structmat wrote.") from error
        return cls.from_json(data)

"""What differs between two results, or two saved models: layer by layer, and in all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from structmat.compression.budget import flops
from structmat.compression.report_json import read_report
from structmat.errors import FormatError
from structmat.file_format import HEADER, read_header
from structmat.io import size_on_disk
from structmat.structure import Shape, count_stored
from structmat.structures.dense import Dense


@dataclass(frozen=True)
class LayerSide:
    """A layer on one side; what is not recorded there is None.

    Args:
        shape: ``(out_features, in_features)``.
        structure: as text.
        parameters: stored numbers of the weight.
        flops: of one product with a vector.
        microseconds: at one sample, on the machine of the report.
        error: relative, of the fit.
    """

    shape: Shape
    structure: str
    parameters: int
    flops: int
    microseconds: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        title: its path.
        layers: by name, in the order of the network where it is known.
        totals: figures by name.
        dense: shapes of weights that are stored as they are, by the layer's name: shown where the other side has a
            structure there.
    """

    title: str
    layers: Mapping[str, LayerSide]
    totals: Mapping[str, float]
    dense: Mapping[str, Shape] = field(default_factory=dict)

    def layer(self, name: str) -> LayerSide | None:
        """The layer, dense ones too; None if there is none of that name."""
        if name in self.layers or name not in self.dense:
            return self.layers.get(name)
        shape = self.dense[name]
        return LayerSide(shape, "Dense()", shape[0] * shape[1], flops(Dense(), shape))


@dataclass(frozen=True)
class Difference:
    """Two sides beside each other.

    Args:
        a, b: the sides.
        layers: name, and the layer on both sides, None where it is missing.
        totals: name, and the figure on both sides.
    """

    a: Side
    b: Side
    layers: tuple[tuple[str, LayerSide | None, LayerSide | None], ...]
    totals: tuple[tuple[str, float | None, float | None], ...]

    @property
    def changed(self) -> int:
        """Layers whose structure differs."""
        return sum(a is None or b is None or a.structure != b.structure for _, a, b in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""

        def plain(side: LayerSide | None) -> dict[str, Any] | None:
            return None if side is None else {**side.__dict__, "shape": list(side.shape)}

        return {
            "a": self.a.title,
            "b": self.b.title,
            "changed": self.changed,
            "layers": {name: {"a": plain(a), "b": plain(b)} for name, a, b in self.layers},
            "totals": {name: {"a": a, "b": b} for name, a, b in self.totals},
        }


def difference(a: Side, b: Side) -> Difference:
    """All layers of either side in the order of the first, and all totals."""
    names = dict.fromkeys([*a.layers, *b.layers])
    totals = dict.fromkeys([*a.totals, *b.totals])
    return Difference(
        a,
        b,
        tuple((name, a.layer(name), b.layer(name)) for name in names),
        tuple((name, a.totals.get(name), b.totals.get(name)) for name in totals),
    )


def read_side(path: str | os.PathLike[str]) -> Side:
    """Read a folder of results (``report.json``), such a file, or the folder of a saved model.

    Raises:
        FormatError: it is none of these, or is damaged.
    """
    place = Path(path)
    if place.is_file():
        return _of_report(place)
    if (place / "report.json").is_file():
        return _of_report(place / "report.json")
    for folder in (place, place / "model"):
        if (folder / HEADER).is_file():
            return _of_model(folder)
    raise FormatError(f"{place} holds neither report.json nor {HEADER}. Name a folder of results or of a saved model.")


def _of_report(path: Path) -> Side:
    data = read_report(path)
    try:
        layers = {
            str(layer["name"]): LayerSide(
                (int(layer["shape"][0]), int(layer["shape"][1])),
                str(layer["structure"]),
                int(layer["parameters"]),
                int(layer["flops"]),
                float(layer["microseconds"]),
                float(layer["error"]),
            )
            for layer in data["layers"]
        }
        totals = {
            "parameters, compressible layers": float(data["parameters"]["after"]),
            "parameters, whole model": float(data["model_parameters"]["after"]),
            "bytes of all tensors": float(data["model_bytes"]["after"]),
            "FLOPs a sample, those layers": float(data["flops"]["after"]),
            "predicted loss": float(data["predicted_loss"]),
        }
        for timing in data["timings"]:
            kind = "model" if timing["model_after"] is not None else "layers"
            totals[f"milliseconds, batch {timing['batch']}, {kind}"] = float(timing[f"{kind}_after"])
        quality = data["quality"].get("recovered", data["quality"].get("after", {}))
        totals |= {f"quality: {name}": float(value) for name, value in quality.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError(f"{path} is no report of structmat, or is damaged: {error!r}.") from error
    return Side(str(path.parent), layers, totals)


def _of_model(folder: Path) -> Side:
    header = read_header(folder)
    path = folder / header.file
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}. Get the file again.") from error
    layers = {
        name: LayerSide(e.shape, str(e.structure), count_stored(e.structure, e.shape), flops(e.structure, e.shape))
        for name, e in header.layers.items()
    }
    dense = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name.removesuffix(".weight") not in layers
    }
    totals = {
        "parameters, structured layers": float(sum(layer.parameters for layer in layers.values())),
        "bytes of the saved model": float(size_on_disk(folder)),
    }
    return Side(str(folder), layers, totals, dense)

"""Checks of what is saved and copied: JSON, safetensors, deepcopy, the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import safetensors.torch
import torch

from structmat.nn.linear import StructuredLinear
from structmat.structure import Structure, from_json, parts, resolve, to_json
from structmat.structures import families
from structmat.testing.case import Case


def check_json(case: Case) -> None:
    """A structure, as given and resolved, survives JSON; it is hashable and prints its family."""
    known = {**families(), **{type(part).__name__: type(part) for part in _parts(case.structure)}}
    for structure in (case.structure, case.resolved):
        text = json.dumps(to_json(structure))
        again = from_json(json.loads(text), known)
        case.require(again == structure, f"{structure} comes back from JSON as {again}.")
        case.require(hash(again) == hash(structure), f"{structure} and its copy from JSON hash differently.")
        case.require(type(structure).__name__ in str(structure), f"its text {structure!s} lacks the family's name.")
    case.require(resolve(case.resolved, case.shape) == case.resolved, f"resolving {case.resolved} again changes it.")


def _parts(structure: Structure) -> Iterator[Structure]:
    yield structure
    for part in parts(structure):
        yield from _parts(part)


def _same_output(case: Case, what: str, first: StructuredLinear, second: StructuredLinear) -> None:
    x = case.rows(3, dtype=torch.float64)
    case.require(torch.equal(first(x), second(x)), f"{what} gives other outputs.")


def check_state_dict(case: Case) -> None:
    """A layer's state survives safetensors and a strict load into another layer, bit by bit."""
    layer, other = case.layer(torch.float64), case.layer(torch.float64, draw=9)
    state = layer.state_dict()
    names = {*layer.tensors(), "bias"}
    case.require(set(state) == names, f"the state holds {sorted(state)} instead of {sorted(names)}.")
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)), strict=True)
    _same_output(case, "a layer loaded from safetensors", layer, other)


def check_deepcopy(case: Case) -> None:
    """A deep copy computes the same and shares no memory."""
    layer = case.layer(torch.float64)
    twin = copy.deepcopy(layer)
    _same_output(case, "a deep copy", layer, twin)
    for (name, first), second in zip(layer.named_parameters(), twin.parameters(), strict=True):
        case.require(first.data_ptr() != second.data_ptr() or first.numel() == 0, f"a deep copy shares {name}.")
    linear = layer.to_linear()
    case.require(linear.weight.shape == torch.Size(case.shape), f"to_linear() has shape {tuple(linear.weight.shape)}.")


def check_meta_device(case: Case) -> None:
    """A layer is built on the meta device without memory, tells its output's shape, and can be filled from a state."""
    out_features, in_features = case.shape
    empty = StructuredLinear(in_features, out_features, structure=case.structure, device="meta", dtype=torch.float64)
    for name, tensor in empty.state_dict().items():
        case.require(tensor.is_meta, f"{name} of a layer built on the meta device lies on {tensor.device}.")
    y = empty(torch.empty(3, in_features, device="meta", dtype=torch.float64))
    case.require(y.is_meta and tuple(y.shape) == (3, out_features), f"on the meta device the output is {y.shape}.")
    layer = case.layer(torch.float64)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict(), strict=True)
    _same_output(case, "a layer built on the meta device and filled", layer, empty)

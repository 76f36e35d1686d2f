"""Arithmetic circuits as data: build, measure, evaluate, transform."""

from structmat.circuit.bounds import counting, fan_in_depth, hadamard_rigidity, morgenstern
from structmat.circuit.builder import Builder
from structmat.circuit.circuit import Circuit, Group, Kind
from structmat.circuit.equality import Equality, equal
from structmat.circuit.fields import Field, Floats, PrimeField, Rationals
from structmat.circuit.measure import Counts, Levels
from structmat.circuit.schedule import Layer, latest_levels, layers, live_widths, narrow_levels, peak_live
from structmat.circuit.trace import trace
from structmat.circuit.tracer import Tracer

__all__ = [
    "Builder",
    "Circuit",
    "Counts",
    "Equality",
    "Field",
    "Floats",
    "Group",
    "Kind",
    "Layer",
    "Levels",
    "PrimeField",
    "Rationals",
    "Tracer",
    "counting",
    "equal",
    "fan_in_depth",
    "hadamard_rigidity",
    "latest_levels",
    "layers",
    "live_widths",
    "morgenstern",
    "narrow_levels",
    "peak_live",
    "trace",
    "trace_torch",
]


def __getattr__(name: str) -> object:
    # PyTorch is loaded only for what needs it.
    if name == "trace_torch":
        from structmat.circuit.trace_torch import trace_torch

        return trace_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Arithmetic circuits as data: build, measure, evaluate, transform."""

from structmat.circuit.bounds import counting, fan_in_depth, hadamard_rigidity, morgenstern
from structmat.circuit.builder import Builder
from structmat.circuit.circuit import Circuit, Group, Kind
from structmat.circuit.equality import Equality, equal
from structmat.circuit.fields import Field, Floats, PrimeField, Rationals
from structmat.circuit.measure import Counts, Levels
from structmat.circuit.schedule import Layer, latest_levels, layers, live_widths, narrow_levels, peak_live

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
]

"""The errors that structmat raises on bad input.

Each is also a ``ValueError``. The message states the fact with its numbers, then the remedy.
What can only be a mistake of the library itself is an ``assert``.
"""

from __future__ import annotations


class StructmatError(ValueError):
    """Base of all errors that are raised for a user's input."""


class StructureError(StructmatError):
    """A hyper-parameter of a structure is not one of its legal values."""


class ShapeError(StructmatError):
    """A shape does not fit: a structure and a matrix, or a matrix and its operand."""


class DataError(StructmatError):
    """Weights or calibration data can't be used: NaN, infinite, empty, or of the wrong kind."""


class ModelError(StructmatError):
    """A model holds something that can't be handled: an unknown layer type, a name that matches nothing."""


class BudgetError(StructmatError):
    """A budget can't be met or makes no sense."""


class FormatError(StructmatError):
    """A file is foreign, damaged, newer than this version, or does not match."""


class CircuitError(StructmatError):
    """An arithmetic circuit is ill-formed, or can't do what is asked: a cycle, no linear map, a division by zero."""

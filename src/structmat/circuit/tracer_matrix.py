"""Functions that are not followed gate by gate, replaced by their matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from structmat.circuit.arrays import Numbers
from structmat.circuit.tracer import Tracer, not_polynomial
from structmat.errors import CircuitError

_TOLERANCE = 1e-9
"""Relative deviation up to which an unknown function counts as linear."""

_SMALL = 4096
"""Entries of an argument up to which an unknown function is replaced by its matrix."""


def by_matrix(x: Tracer, function: Callable[[Any], Any], name: str) -> Tracer:
    """An unknown function of one array, by its matrix, if a test shows that it is linear (or affine).

    Raises:
        CircuitError: it is not, or the array is too large for this.
    """
    if x.size > _SMALL:
        raise CircuitError(
            f"{name} has no gates of its own, and its argument has {x.size} entries: more than {_SMALL} are not "
            "replaced by a matrix. Write it with sums and products."
        )
    shape = x.shape
    is_complex = np.iscomplexobj(x.scale)
    generator = np.random.default_rng(0)
    probe = generator.standard_normal(shape) + (1j * generator.standard_normal(shape) if is_complex else 0)
    try:
        offset = np.asarray(function(np.zeros(shape, dtype=probe.dtype)))
        unit = np.eye(x.size).astype(probe.dtype)
        columns = [np.asarray(function(e.reshape(shape))) - offset for e in unit]
        value, other = np.asarray(function(probe)), np.asarray(function(-2 * probe))
    except CircuitError:
        raise
    except Exception as error:
        raise not_polynomial(name) from error
    matrix = np.stack([np.ravel(c) for c in columns], axis=-1) if columns else np.zeros((offset.size, 0))
    for factor, result in ((1, value), (-2, other)):
        expected = factor * (matrix @ np.ravel(probe)) + np.ravel(offset)
        scale = max(1.0, float(np.abs(result).max(initial=0)))
        if not np.abs(expected - np.ravel(result)).max(initial=0) <= _TOLERANCE * scale:
            raise CircuitError(
                f"{name} is not linear, and not polynomial in a way that is known here: it has no circuit."
            )
    flat = _times(x.ravel(), matrix)
    return (flat + np.ravel(offset) if np.any(offset) else flat).reshape(offset.shape)


def _times(x: Tracer, matrix: Numbers) -> Tracer:
    """A matrix times a vector of entries; a row with few numbers that are not zero takes only their room."""
    row, column = np.nonzero(matrix)
    counts = np.bincount(row, minlength=len(matrix))
    place = np.full((len(matrix), int(counts.max(initial=0))), -1)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    place[row, slot] = column
    weight = np.zeros(place.shape, dtype=matrix.dtype)
    weight[row, slot] = matrix[row, column]
    return (x.take(place) * weight).sum(axis=-1)

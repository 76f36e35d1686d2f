"""Vectors and batches of rows, as the padded columns that the products work on."""

from __future__ import annotations

import numpy as np

from structmat.circuit.arrays import Numbers
from structmat.errors import CircuitError


def columns_of(array: Numbers, in_features: int, size: int) -> Numbers:
    """One vector (in_features,) or rows (batch, in_features) as columns (size, batch), padded with zeros.

    Raises:
        CircuitError: the shape is wrong.
    """
    if array.ndim not in (1, 2) or array.shape[-1] != in_features:
        raise CircuitError(
            f"A matrix of {in_features} inputs takes ({in_features},) or (batch, {in_features}); got {array.shape}."
        )
    if in_features == size:
        return np.atleast_2d(array).T
    columns = np.zeros((size, 1 if array.ndim == 1 else len(array)), dtype=array.dtype)
    columns[:in_features] = np.atleast_2d(array).T
    return columns


def rows_of(columns: Numbers, out_features: int, like: Numbers) -> Numbers:
    """The first ``out_features`` of columns (size, batch) as rows, or as a vector where ``like`` was one."""
    rows = columns[:out_features].T
    return rows[0] if like.ndim == 1 else np.ascontiguousarray(rows)

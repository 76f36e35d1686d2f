"""Prefix sums ``y[k] = x[0] + ... + x[k]``: the classical networks between least size and least depth."""

from __future__ import annotations

from typing import Literal

import numpy as np

from structmat.circuit.arrays import Ints
from structmat.circuit.builder import Builder
from structmat.circuit.catalogue.published import Published
from structmat.circuit.circuit import Circuit
from structmat.errors import CircuitError

Network = Literal["serial", "kogge-stone", "sklansky", "brent-kung"]


def prefix_sums(size: int, network: Network = "brent-kung") -> Circuit:
    """All prefix sums. For ``n = 2^L``:

    ============  ==================  ===============  ==========================================
    network       additions           depth            source
    ============  ==================  ===============  ==========================================
    serial        ``n - 1``           ``n - 1``
    kogge-stone   ``n L - n + 1``     ``L``            Kogge and Stone 1973, fan-out 2
    sklansky      ``n L / 2``         ``L``            Sklansky 1960, least size of this depth here
    brent-kung    ``2 n - 2 - L``     ``2 L - 1``      Brent and Kung 1982 (``L >= 1``)
    ============  ==================  ===============  ==========================================

    Args:
        size: any, at least 1.
        network: one of the four.

    Raises:
        CircuitError: the size is below 1, or there is no such network.
    """
    if size < 1:
        raise CircuitError(f"Prefix sums need at least one input; got {size}.")
    builder = Builder(size)
    x = builder.inputs.copy()
    networks = {"serial": _serial, "kogge-stone": _kogge_stone, "sklansky": _sklansky, "brent-kung": _brent_kung}
    if network not in networks:
        raise CircuitError(f"There is no network of prefix sums named {network!r}. There are: {', '.join(networks)}.")
    return builder.build(networks[network](builder, x))


def published_prefix_sums(size: int) -> Published:
    """Of a network of depth ``2 log2 n``; size and depth together are at least ``2 n - 2`` (Snir 1986)."""
    return Published(2 * size - 2 - (size.bit_length() - 1), "Brent and Kung 1982")


def _add(builder: Builder, x: Ints, at: Ints, earlier: Ints) -> None:
    """``x[at] += x[earlier]``, all at once."""
    if len(at):
        x[at] = builder.sums(np.stack([x[earlier], x[at]], axis=-1))


def _serial(builder: Builder, x: Ints) -> Ints:
    # Each sum reads the one before it, which has the number before its own.
    before = np.append(x[0], builder.nodes + np.arange(len(x) - 2))
    if len(x) > 1:
        x[1:] = builder.sums(np.stack([before, x[1:]], axis=-1))
    return x


def _kogge_stone(builder: Builder, x: Ints) -> Ints:
    distance = 1
    while distance < len(x):
        at = np.arange(distance, len(x))
        _add(builder, x, at, at - distance)
        distance *= 2
    return x


def _sklansky(builder: Builder, x: Ints) -> Ints:
    """The second half of each block adds the last sum of the first half."""
    span = 1
    while span < len(x):
        at = np.arange(len(x))
        at = at[at // span % 2 == 1]
        _add(builder, x, at, at // span * span - 1)
        span *= 2
    return x


def _brent_kung(builder: Builder, x: Ints) -> Ints:
    """Up a tree of sums of blocks, and down again."""
    span = 1
    while span < len(x):
        at = np.arange(2 * span - 1, len(x), 2 * span)
        _add(builder, x, at, at - span)
        span *= 2
    while span > 1:
        span //= 2
        at = np.arange(3 * span - 1, len(x), 2 * span)
        _add(builder, x, at, at - span)
    return x

"""Permutations as products of butterfly factors with 2 x 2 blocks that pass or swap: Benes networks.

Source: Benes, "Optimal rearrangeable multistage connecting networks" (1964); Dao et al., "Kaleidoscope"
(arXiv 2012.14966), section 2 and the appendix on permutations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse import csgraph

from structmat.circuit.arrays import Bools, Ints
from structmat.circuit.kaleidoscope.product import ButterflyProduct
from structmat.circuit.kaleidoscope.stage import Stage, bit_reversal
from structmat.errors import CircuitError
from structmat.sizes import is_power_of_two


def permutation(order: ArrayLike) -> ButterflyProduct:
    """``y[i] = x[order[i]]`` as a member of B B*: strides n / 2, .., 1, then 1, .., n / 2; all blocks pass or swap.

    Args:
        order: (n,) a permutation, n a power of two, at least 2. The identity is routed with all switches straight.

    Cost: O(n log n); all blocks of a level are routed at once.

    Raises:
        CircuitError: it is no permutation of such a size.
    """
    current = _require_routable(order)
    size = len(current)
    every = np.arange(size)
    entry, leave = [], []
    half = size // 2
    while half:
        # Two outputs half a block apart go through different half blocks, and so do two inputs. An output and the
        # output `forced` of it are on the same side: the cycles of `forced` are colored one by one.
        partner = every ^ half
        inverse = np.empty(size, dtype=np.int64)
        inverse[current] = every
        side = alternating(partner, inverse[current[partner] ^ half])
        leave.append(_switches(side, half))
        entry.append(_switches(side[inverse], half))
        inner = np.empty(size, dtype=np.int64)
        lower = np.where(side, half, 0)
        inner[(every & ~half) | lower] = (current & ~half) | lower
        current = inner
        half //= 2
    return ButterflyProduct(size, (*entry, *reversed(leave)))


def permutation_starred(order: ArrayLike) -> ButterflyProduct:
    """The same in B* B: strides 1, .., n / 2, then n / 2, .., 1. The bit reversal exchanges the two forms.

    Raises:
        CircuitError: ``order`` is no permutation of a power of two.
    """
    checked = _require_routable(order)
    reversal = bit_reversal(len(checked))
    routed = permutation(reversal[checked[reversal]])
    return ButterflyProduct(routed.size, tuple(stage.bit_reversed() for stage in routed.stages))


def _switches(crossed: Bools, half: int) -> Stage:
    return Stage.switches(crossed.reshape(-1, 2, half)[:, 0])


def alternating(partner: Ints, forced: Ints) -> Bools:
    """Two sides such that partners are on different ones and ``forced`` stays on one side.

    Args:
        partner: an involution.
        forced: a permutation: what must be on the side of each. Its cycles come in pairs that ``partner`` exchanges.
    """
    size = len(forced)
    every = np.arange(size)
    graph = sparse.csr_array((np.ones(size), forced, np.arange(size + 1)), shape=(size, size))
    cycles, label = csgraph.connected_components(graph, directed=True, connection="strong")
    least = np.empty(cycles, dtype=np.int64)
    # Of several writes to one place the last one stays, which in this order is the least.
    least[label[::-1]] = every[::-1]
    return np.asarray(least[label] > least[label[partner]])


def _require_routable(order: ArrayLike) -> Ints:
    if np.ndim(order) != 1 or np.size(order) < 2 or not is_power_of_two(np.size(order)):
        raise CircuitError(
            "A permutation is routed on a power of two of places, at least 2; got shape "
            f"{np.shape(order)}. Pad it with fixed points."
        )
    return require_permutation(order)


def require_permutation(order: ArrayLike) -> Ints:
    """The order as integers.

    Raises:
        CircuitError: it is no permutation.
    """
    array = np.asarray(order)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not np.array_equal(np.sort(array), np.arange(array.size)):
        raise CircuitError(f"The {array.size} entries are no permutation of 0 .. {array.size - 1}.")
    return array.astype(np.int64)

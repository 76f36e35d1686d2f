"""Ranks without tolerances: arithmetic modulo a prime.

The rank of a matricisation, as a function of the weights, takes its maximum almost everywhere, so that one random draw
measures the generic rank. Spectra of random networks decay fast, and floating-point ranks underestimate soon (N = 16
with two channels is at the limit of float64); modulo p = 2^31 - 1 there is nothing to underestimate: the rank never
exceeds the true generic one, and is smaller with probability degree / p only.

The matricisation is never formed. k random functionals that are products over the modes of each side sketch it: S = P A
Q^T has rank min(k, rank A) with probability one (up to degree / p), and the network is evaluated once on all pairs by
broadcasting. Cost: k^2 times the multiply-adds of the nodes that have modes of both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from structmat.errors import ShapeError, StructureError
from structmat.nn.convac.expand import fold
from structmat.nn.convac.tree import check_partition
from structmat.nn.convac.weights import EdgeMap, Weights
from structmat.program import apply

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC

PRIME = 2**31 - 1
PRIMES = (PRIME, 2**31 - 19)
LARGEST_SKETCH = 2048
"""Functionals on each side: elimination takes k^3 steps."""
EXTRA = 8
"""Functionals beyond the bound: a rank below k proves that k was enough."""

Ints = NDArray[np.int64]


def product_mod(a: Ints, b: Ints, prime: int = PRIME) -> Ints:
    """``a @ b`` modulo a prime below 2^31; the left factor is split in 16 bits so that int64 holds the sums."""
    high, low = a >> 16, a & 0xFFFF
    return ((high @ b % prime << 16) + low @ b) % prime


def rank_mod(matrix: Ints, prime: int = PRIME) -> int:
    """Rank over the integers modulo a prime, by elimination."""
    work, rank = matrix.copy() % prime, 0
    for column in range(work.shape[1]):
        below = np.flatnonzero(work[rank:, column])
        if not below.size:
            continue
        pivot = rank + int(below[0])
        work[[rank, pivot]] = work[[pivot, rank]]
        inverse = pow(int(work[rank, column]), prime - 2, prime)
        row = work[rank, column:] * inverse % prime
        factors = work[rank + 1 :, column].copy()
        work[rank + 1 :, column:] = (work[rank + 1 :, column:] - factors[:, None] * row % prime) % prime
        rank += 1
        if rank == work.shape[0]:
            break
    return rank


def to_field(values: NDArray[np.float64], prime: int = PRIME) -> Ints:
    """Floats as the rational numbers that they are, modulo a prime: ``m 2^e`` has an exact image."""
    mantissa, exponent = np.frexp(values)
    whole = (mantissa * 2.0**53).astype(np.int64) % prime
    powers = [pow(2, int(e - 53) % (prime - 1), prime) for e in exponent.flat]
    return whole * np.array(powers, dtype=np.int64).reshape(exponent.shape) % prime


def generic_rank(network: ConvAC, part: Sequence[int], *, seed: int = 0) -> int:
    """The rank that almost all weights give, of this architecture with its sharing and its families.

    With overlapping windows it is that of the grid tensor on M templates.

    Args:
        network: with product pooling.
        part: modes of one side.
        seed: of weights and functionals.

    Raises:
        ShapeError: the sketch needs more than 2048 functionals on a side, or the network has rectifiers.
        StructureError: a family whose entries are not integers for integer parameters (a Fourier stage).
    """
    rng = np.random.default_rng(seed)
    drawn: dict[int, Ints] = {}

    def matrices(weights: Weights) -> Ints:
        if id(weights) not in drawn:
            drawn[id(weights)] = _random_matrices(weights, rng)
        return drawn[id(weights)]

    return _sketched_rank(network, part, matrices, 0, rng, PRIME)


def weights_rank(network: ConvAC, part: Sequence[int], *, output: int = 0, seed: int = 0) -> int:
    """The rank that these very weights give, as the rational numbers that the floats are; the larger of two primes.

    Raises:
        ShapeError: as :func:`generic_rank`.
    """
    ranks = []
    for prime in PRIMES:

        def matrices(weights: Weights, prime: int = prime) -> Ints:
            return to_field(weights.dense().detach().double().cpu().numpy(), prime)

        ranks.append(_sketched_rank(network, part, matrices, output, np.random.default_rng(seed), prime))
    return max(ranks)


def _random_matrices(weights: Weights, rng: np.random.Generator) -> Ints:
    if weights.structure is None:
        return rng.integers(0, PRIME, (weights.copies, *weights.shape), dtype=np.int64)
    eye = torch.eye(weights.shape[1], dtype=torch.float64)
    found = []
    for copy in range(weights.copies):
        tensors = {}
        for name in weights._names:
            stored: torch.Tensor = getattr(weights, name)[copy]
            if name in weights._learned:
                stored = torch.from_numpy(rng.integers(-4000, 4001, tuple(stored.shape)).astype(np.float64))
            tensors[name] = stored
        dense = apply(weights._program, tensors, eye).T
        if not torch.equal(dense, dense.round()) or float(dense.abs().max()) >= 2.0**53:
            raise StructureError(
                f"{weights.structure} has entries that are no integers for integer parameters, so that its rank "
                "can't be found in a finite field. Use rank(part, method='exact'), which takes the weights as they are."
            )
        found.append(dense.numpy().astype(np.int64) % PRIME)
    return np.stack(found)


def _sketched_rank(
    network: ConvAC,
    part: Sequence[int],
    matrices: Callable[[Weights], Ints],
    output: int,
    rng: np.random.Generator,
    prime: int,
) -> int:
    tree, channels = network.tree, network.channels
    if network.pooling.value != "product":
        raise ShapeError(
            "A rectifier network has no matricisation in a finite field: maximum and ReLU need an order. Write the "
            "grid tensor out and take its singular values."
        )
    inside = check_partition(tree.modes, part)
    leaves = _grid_leaves if tree.overlaps else _random_leaves
    bound = network.mincut(part).value if not tree.overlaps else 0
    leaf = leaves(inside, tree.modes, channels, bound + EXTRA, rng, prime)
    weights = [_edge_numbers(network, level, matrices) for level in range(len(tree.levels))]

    def edge(level: int, window: int, position: int, x: Ints) -> Ints:
        flat = product_mod(x.reshape(-1, x.shape[-1]), weights[level][window, position].T, prime)
        return flat.reshape(*x.shape[:-1], -1)

    def multiply(parts: list[Ints]) -> Ints:
        result = parts[0]
        for other in parts[1:]:
            result = result * other % prime
        return result

    root = fold(tree, leaf, edge, multiply)
    row = matrices(network.output.weights)[0, output]
    scores = product_mod(root.reshape(-1, root.shape[-1]), row[:, None], prime).reshape(root.shape[:-1])
    return rank_mod(scores, prime)


def _edge_numbers(network: ConvAC, level: int, matrices: Callable[[Weights], Ints]) -> dict[tuple[int, int], Ints]:
    found = {}
    edges = list(network.tree.edges(level))
    maps: Any = network.layers[level]
    for source, edge_map in zip(network._sources[level], maps, strict=True):
        assert isinstance(edge_map, EdgeMap)
        numbers = matrices(edge_map.weights)
        mine = [e for e in edges if network.tree.level_of(e.node) == source]
        for edge, copy in zip(mine, edge_map.slot.index, strict=True):
            found[edge.window, edge.position] = numbers[copy]
    return found


Leaf = Callable[[int], Ints]


def _random_leaves(
    inside: frozenset[int], modes: int, channels: int, count: int, rng: np.random.Generator, prime: int
) -> Leaf:
    """Random functionals, products over the modes: rows (k, 1, M), columns (1, k, M)."""
    if count > LARGEST_SKETCH:
        raise ShapeError(
            f"The rank may be as large as {count - EXTRA}, and a sketch has at most {LARGEST_SKETCH} functionals a "
            "side. Use mincut(part), which is the generic rank of unshared networks, or a smaller network."
        )
    drawn = rng.integers(0, prime, (modes, count, channels), dtype=np.int64)
    return lambda mode: drawn[mode][:, None] if mode in inside else drawn[mode][None]


def _grid_leaves(
    inside: frozenset[int], modes: int, channels: int, count: int, rng: np.random.Generator, prime: int
) -> Leaf:
    """All tuples of templates on each side, or random ones where these are too many."""
    sides = {}
    for rows in (True, False):
        members = [m for m in range(modes) if (m in inside) == rows]
        if channels ** len(members) <= LARGEST_SKETCH // 2:
            digits = np.array(list(itertools.product(range(channels), repeat=len(members))), dtype=np.int64)
        else:
            digits = rng.integers(0, channels, (LARGEST_SKETCH // 2, len(members)))
        digits = digits.reshape(-1, len(members))
        for place, mode in enumerate(members):
            vectors = np.eye(channels, dtype=np.int64)[digits[:, place]]
            sides[mode] = vectors[:, None] if rows else vectors[None]
    return lambda mode: sides[mode]

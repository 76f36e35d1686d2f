"""The catalogue as a table: what is built beside the best counts of the literature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from structmat.circuit.catalogue.cosine import cosine, hartley, published_cosine, published_hartley, sine
from structmat.circuit.catalogue.fourier import fourier, published_fourier, split_radix
from structmat.circuit.catalogue.hadamard import daubechies, haar, hadamard, published_haar, published_hadamard
from structmat.circuit.catalogue.polynomials import evaluation, interpolation, published_evaluation
from structmat.circuit.catalogue.prefix import prefix_sums, published_prefix_sums
from structmat.circuit.catalogue.products import polynomial_product, published_karatsuba, published_strassen, strassen
from structmat.circuit.catalogue.published import Published, real_operations
from structmat.circuit.circuit import Circuit


@dataclass(frozen=True)
class Entry:
    """A circuit of the catalogue at one size.

    Attributes:
        name: of the algorithm.
        circuit: itself.
        published: the count to compare it with, or None.
    """

    name: str
    circuit: Circuit
    published: Published | None

    @property
    def operations(self) -> int:
        """Counted as the published number counts."""
        is_real = self.published is not None and self.published.real
        return real_operations(self.circuit) if is_real else self.circuit.counts.operations


def entries(size: int) -> list[Entry]:
    """All circuits of the catalogue at a power of two, matrix products at its square root."""
    n = size
    side = 1 << ((n.bit_length() - 1) // 2)
    points = np.arange(n)
    made: list[tuple[str, Callable[[], Circuit], Published | None]] = [
        ("Fourier, radix 2", partial(fourier, n, folded=False), published_fourier(n)),
        ("Fourier, split radix", partial(split_radix, n), published_fourier(n)),
        *((f"cosine, type {k}", partial(cosine, n, k), published_cosine(n, k)) for k in (2, 3, 4)),
        *((f"sine, type {k}", partial(sine, n, k), published_cosine(n, k)) for k in (2, 3, 4)),
        ("cosine, type 1", partial(cosine, n + 1, 1), None),
        ("sine, type 1", partial(sine, n - 1, 1), None),
        ("Hartley", partial(hartley, n), published_hartley(n)),
        ("Hadamard", partial(hadamard, n), published_hadamard(n)),
        ("Haar wavelet", partial(haar, n), published_haar(n)),
        ("Daubechies wavelet, 2 moments", partial(daubechies, n, 2), None),
        ("prefix sums, Brent and Kung", partial(prefix_sums, n), published_prefix_sums(n)),
        ("matrix product, Winograd", partial(strassen, side), published_strassen(side)),
        ("polynomial product, Karatsuba", partial(polynomial_product, n), published_karatsuba(n)),
        ("evaluation at n points", partial(evaluation, points), published_evaluation(n)),
        ("interpolation at n points", partial(interpolation, points), None),
    ]
    return [Entry(name, make(), published) for name, make, published in made]


def table(size: int) -> str:
    """The catalogue at one size, as text: gates and depth of the binary form, operations beside the published ones."""
    lines = [f"{'n = ' + str(size):<31}{'gates':>8}{'depth':>7}{'operations':>12}{'published':>11}  source"]
    for entry in entries(size):
        published = f"{entry.published.operations:>11,}  {entry.published.source}" if entry.published else f"{'-':>11}"
        c = entry.circuit
        lines.append(f"{entry.name:<31}{c.gates:>8,}{c.depth:>7}{entry.operations:>12,}{published}")
    return "\n".join(lines)

"""The catalogue as a table: what is built beside the best counts of the literature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from structmat.circuit.bounds import fan_in_depth
from structmat.circuit.catalogue.cosine import cosine, hartley, published_cosine, published_hartley, sine
from structmat.circuit.catalogue.fourier import (
    fourier,
    published_convolution,
    published_fourier,
    published_mixed_radix,
    require_power_of_two,
    split_radix,
)
from structmat.circuit.catalogue.hadamard import (
    daubechies,
    haar,
    hadamard,
    published_daubechies,
    published_haar,
    published_hadamard,
)
from structmat.circuit.catalogue.polynomials import (
    evaluation,
    interpolation,
    published_evaluation,
    published_interpolation,
    toeplitz,
)
from structmat.circuit.catalogue.prefix import prefix_sums, published_prefix_sums
from structmat.circuit.catalogue.products import (
    circular_convolution,
    polynomial_product,
    published_karatsuba,
    published_strassen,
    strassen,
)
from structmat.circuit.catalogue.published import Published, real_operations
from structmat.circuit.circuit import Circuit
from structmat.circuit.fields import PrimeField


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

    @property
    def least_depth(self) -> int:
        """What no circuit of the function can go below: ``log2`` of the inputs that an output depends on."""
        field = PrimeField()
        point = field.random((self.circuit.in_features,), np.random.default_rng(0))
        return fan_in_depth(self.circuit.linear_part(point, field).to_dense(field))


def entries(size: int) -> list[Entry]:
    """All circuits of the catalogue at a power of two from 4 on, matrix products at its square root.

    Raises:
        CircuitError: another size.
    """
    require_power_of_two(size, "The catalogue", 4)
    n = size
    side = 1 << ((n.bit_length() - 1) // 2)
    points = np.arange(n)
    made: list[tuple[str, Callable[[], Circuit], Published | None]] = [
        ("Fourier, radix 2", partial(fourier, n, folded=False), published_fourier(n)),
        ("Fourier, split radix", partial(split_radix, n), published_fourier(n)),
        ("Fourier, 3 n / 4 points", partial(fourier, 3 * n // 4, folded=False), published_mixed_radix(3 * n // 4)),
        *((f"cosine, type {k}", partial(cosine, n, k), published_cosine(n, k)) for k in (2, 3, 4)),
        *((f"sine, type {k}", partial(sine, n, k), published_cosine(n, k)) for k in (2, 3, 4)),
        ("cosine, type 1", partial(cosine, n + 1, 1), None),
        ("sine, type 1", partial(sine, n - 1, 1), None),
        ("Hartley", partial(hartley, n), published_hartley(n)),
        ("Hadamard", partial(hadamard, n), published_hadamard(n)),
        ("Haar wavelet", partial(haar, n), published_haar(n)),
        ("Daubechies wavelet, 2 moments", partial(daubechies, n, 2), published_daubechies(n)),
        ("prefix sums, Brent and Kung", partial(prefix_sums, n), published_prefix_sums(n)),
        ("matrix product, Winograd", partial(strassen, side), published_strassen(side)),
        ("polynomial product, Karatsuba", partial(polynomial_product, n), published_karatsuba(n)),
        (
            "polynomial product, Fourier",
            partial(polynomial_product, n, "fourier"),
            published_convolution(2 * n, 3),
        ),
        ("circular convolution", partial(circular_convolution, n, folded=False), published_convolution(n, 3)),
        (
            "Toeplitz product",
            partial(toeplitz, points + 1, -points, folded=False),
            published_convolution(2 * n, 2),
        ),
        ("evaluation at n points", partial(evaluation, points), published_evaluation(n)),
        ("interpolation at n points", partial(interpolation, points), published_interpolation(n)),
    ]
    return [Entry(name, make(), published) for name, make, published in made]


def table(size: int) -> str:
    """The catalogue at one size, as text.

    Gates and depth of the binary form, beside the least depth that any circuit of the function has; operations beside
    those of the classical algorithm and, where that is another, the fewest that are known.
    """
    head = f"{'gates':>8}{'depth':>7}{'least':>6}{'operations':>12}{'classical':>11}{'fewest':>9}  source"
    lines = [f"{'n = ' + str(size):<31}{head}"]
    for entry in entries(size):
        c, known = entry.circuit, entry.published
        counts = f"{'-':>11}{'-':>9}"
        if known is not None:
            record = f"{known.record:,}" if known.record is not None and known.record < known.operations else "-"
            source = known.source if record == "-" else f"{known.source}; {known.record_source}"
            counts = f"{known.operations:>11,}{record:>9}  {source}"
        measured = f"{c.gates:>8,}{c.depth:>7}{entry.least_depth:>6}{entry.operations:>12,}"
        lines.append(f"{entry.name:<31}{measured}{counts}")
    return "\n".join(lines)

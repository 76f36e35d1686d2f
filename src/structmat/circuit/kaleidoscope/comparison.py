"""What the universality theorem promises for a circuit, what the compilers make of it, and what the circuit costs."""

from __future__ import annotations

from dataclasses import dataclass

from structmat.circuit.circuit import Circuit
from structmat.circuit.kaleidoscope.clos import monarch
from structmat.circuit.kaleidoscope.compiler import kaleidoscope
from structmat.circuit.kaleidoscope.matrix import Kaleidoscope
from structmat.circuit.kaleidoscope.monarch import MonarchProduct
from structmat.circuit.kaleidoscope.planning import GENERIC_WIDTH
from structmat.sizes import power_of_two


@dataclass(frozen=True)
class Product:
    """The measures of a product of factors ``B B*`` or ``M M*``.

    Attributes:
        width: number of factors.
        size: of the factors.
        parameters: stored numbers, zeros and ones included.
        flops: real operations of a product with a vector, those with zeros and ones included.
    """

    width: int
    size: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class Comparison:
    """One circuit, natively and as products.

    Attributes:
        inputs: of the circuit.
        size: gates and inputs of the circuit, s.
        depth: of the circuit, d.
        edges: constants of the circuit's binary gates, at most 2 a gate: its native number of parameters.
        operations: multiplications and additions of the circuit, where 1 and -1 cost no multiplication.
        bound: what the theorem promises: width 3 d + 1 in size 2 pow2(s).
        kept: compiled as in the proof: every value kept to the end, nothing recognized.
        generic: compiled with live ranges, nothing recognized.
        recognized: compiled with live ranges, levels that are butterfly factors taken over.
        monarch: compiled to Monarch products with live ranges, nothing recognized.
    """

    inputs: int
    size: int
    depth: int
    edges: int
    operations: int
    bound: Product
    kept: Product
    generic: Product
    recognized: Product
    monarch: Product

    def __str__(self) -> str:
        head = f"{self.inputs} inputs, size {self.size}, depth {self.depth}"
        rows: list[tuple[str, ...]] = [("", "width", "size", "parameters", "operations")]
        named = {"bound": self.bound, "kept": self.kept, "live ranges": self.generic, "recognized": self.recognized}
        for name, product in (*named.items(), ("Monarch", self.monarch)):
            numbers = (product.width, product.size, product.parameters, product.flops)
            rows.append((name, *(f"{number:,}" for number in numbers)))
        rows.append(("circuit", "", "", f"{self.edges:,}", f"{self.operations:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([head, *lines])


def bound(circuit: Circuit) -> Product:
    """The theorem's promise for a linear circuit: width 3 d + 1 in size 2 pow2(s), of a depth d of at least 1."""
    width, size = GENERIC_WIDTH * max(circuit.depth, 1) + 1, 2 * power_of_two(max(circuit.size, 1))
    levels = size.bit_length() - 1
    return Product(width, size, 4 * width * size * levels, 6 * width * size * levels)


def compare(circuit: Circuit) -> Comparison:
    """The theorem's promise, four compiled products and the circuit's own cost, side by side.

    Cost: that of the four compilations; the one that keeps every value has size about 2 s.

    Raises:
        CircuitError: the circuit is not linear.
    """
    counts = circuit.counts
    return Comparison(
        inputs=circuit.in_features,
        size=circuit.size,
        depth=circuit.depth,
        edges=circuit.binary().edges,
        operations=counts.operations,
        bound=bound(circuit),
        kept=_measured(kaleidoscope(circuit, recognize=False, keep_all=True)),
        generic=_measured(kaleidoscope(circuit, recognize=False)),
        recognized=_measured(kaleidoscope(circuit)),
        monarch=_measured(monarch(circuit)),
    )


def _measured(product: Kaleidoscope | MonarchProduct) -> Product:
    return Product(product.width, product.size, product.parameters, product.flops)

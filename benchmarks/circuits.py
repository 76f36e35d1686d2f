"""What circuits cost on the clock: one of a million gates, one as deep as large, and the kaleidoscope compilers.

    python -m benchmarks.circuits
    python -m benchmarks.circuits table

The Fourier circuit of 65,536 inputs (1,048,576 complex gates) is built, transposed, differentiated and evaluated on 64
complex vectors, and so is a chain of 100,000 gates on real ones. The compilers get circuits of 100,000 gates, with the
recognition of known patterns on and off: random ones, each of whose gates adds one of the last nodes to a value, and a
Hadamard and a Fourier circuit of 8,192 inputs. What they make is compared with the circuit at a random vector: modulo a
prime, or in floating point where constants are complex.

Each figure is seconds on the clock, in brackets the processor's; one run each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from benchmarks.study import Cell, Study, markdown
from structmat.circuit import Circuit, PrimeField
from structmat.circuit.catalogue import fourier, hadamard
from structmat.circuit.kaleidoscope import kaleidoscope, monarch

SIZE, VECTORS = 1 << 16, 64
GATES = 100_000

T = TypeVar("T")


class Watch:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def step(self, name: str, run: Callable[[], T]) -> T:
        """The result of a step, whose time is noted: on the clock and of the processor."""
        clock, processor = time.perf_counter(), time.process_time()
        result = run()
        self.seconds[name] = [round(time.perf_counter() - clock, 3), round(time.process_time() - processor, 3)]
        return result


def random_circuit(inputs: int, reach: int, seed: int) -> Circuit:
    """Each gate replaces one of ``inputs`` values by a sum of it and one of the last ``reach`` nodes: none is dead."""
    rng = np.random.default_rng(seed)
    node = inputs + np.arange(GATES)
    place = np.concatenate([np.arange(inputs), rng.integers(0, inputs, GATES)])
    order = np.argsort(place, kind="stable")
    before = np.empty(len(order), dtype=np.int64)
    before[order[1:]] = order[:-1]
    other = rng.integers(np.maximum(0, node - reach), node)
    last = np.concatenate([order[:-1][place[order[1:]] != place[order[:-1]]], order[-1:]])
    return Circuit.from_gates(inputs, before[inputs:], other, *rng.integers(1, 4, (2, GATES)), last)


def chain() -> Circuit:
    """Prefix sums one after the other: as deep as it has gates."""
    gate = GATES + 1 + np.arange(GATES)
    return Circuit.from_gates(GATES + 1, np.append(0, gate[:-1]), np.arange(1, GATES + 1), 1, 1, gate)


def passes(make: Callable[[], Circuit], expected: Callable[[Any], Any]) -> dict[str, Any]:
    """A circuit built, transposed, differentiated, evaluated and simplified; its error on the vectors."""
    watch = Watch()
    circuit = watch.step("build", make)
    transposed = watch.step("transpose", circuit.transpose)
    gradient = watch.step("differentiate", circuit.vjp)
    x = np.random.default_rng(0).standard_normal((VECTORS, circuit.in_features))
    x = x + 0j if circuit.weight.dtype.kind == "c" else x
    values = watch.step("evaluate", lambda: circuit.evaluate(x))
    again = watch.step("evaluate again", lambda: circuit.evaluate(x))
    watch.step("simplify", circuit.simplify)
    wanted = expected(x)
    error = max(float(np.abs(r - wanted).max() / np.abs(wanted).max()) for r in (values, again))
    # The transpose and the gradient of a linear circuit are one matrix: <y, W x> = <W^T y, x>.
    y = np.random.default_rng(1).standard_normal((1, circuit.out_features))
    left = (y * wanted[:1]).sum()
    for back in (transposed.evaluate(y), gradient.evaluate(np.concatenate([x[:1], y], axis=1))):
        error = max(error, float(abs((back * x[:1]).sum() - left) / np.linalg.norm(y) / np.linalg.norm(wanted[:1])))
    return {"steps": watch.seconds, "gates": circuit.gates, "depth": circuit.depth, "error": error}


def compiled(circuit: Circuit) -> dict[str, Any]:
    """One circuit through both compilers."""
    watch = Watch()
    found = {
        "recognized": watch.step("recognized", lambda: kaleidoscope(circuit)),
        "not recognized": watch.step("not recognized", lambda: kaleidoscope(circuit, recognize=False)),
        "Monarch": watch.step("Monarch", lambda: monarch(circuit)),
    }
    is_complex = circuit.weight.dtype.kind == "c"
    field = None if is_complex else PrimeField()
    x = np.random.default_rng(1).integers(0, 1000, circuit.in_features) + (0j if is_complex else 0)
    expected = circuit.evaluate(x, field)
    products = {}
    for name, product in found.items():
        difference = np.abs(product.multiply(x, field) - expected).max() / np.abs(expected).max()
        products[name] = {
            "width": product.width,
            "size": product.size,
            "parameters": product.parameters,
            "error": float(difference),
        }
    return {
        "steps": watch.seconds,
        "gates": circuit.gates,
        "depth": circuit.depth,
        "bound": 3 * circuit.depth + 1,
        "products": products,
    }


PASSES = {
    f"Fourier circuit of {SIZE:,} inputs": Cell("Fourier circuit", lambda _: passes(lambda: fourier(SIZE), np.fft.fft)),
    f"Serial prefix sums of {GATES + 1:,} inputs": Cell(
        "serial prefix sums", lambda _: passes(chain, lambda x: np.cumsum(x, axis=1)[:, 1:])
    ),
}
COMPILED = [
    *(
        Cell(
            f"random, {inputs:,} inputs, reach {reach:,}",
            lambda seed, inputs=inputs, reach=reach: compiled(random_circuit(inputs, reach, seed)),
        )
        for inputs, reach in ((512, 512), (512, 2048), (8192, 32768), (4096, GATES))
    ),
    Cell("Hadamard, 8,192 inputs", lambda _: compiled(hadamard(8192))),
    Cell("Fourier, 8,192 inputs", lambda _: compiled(fourier(8192))),
]

TOGETHER = ("build", "transpose", "differentiate", "evaluate")
"""The steps that shall take less than ten seconds together for the Fourier circuit."""


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    """Both tables, of the cells that are there."""
    lines = []
    for name, cell in PASSES.items():
        if cell.key not in done:
            continue
        found = done[cell.key]
        steps = {step: tuple(pair) for step, pair in found["steps"].items()}
        total = tuple(sum(steps[step][k] for step in TOGETHER) for k in range(2))
        rows = [(step, _seconds(pair)) for step, pair in steps.items()]
        rows.insert(len(TOGETHER), (f"**{', '.join(TOGETHER)} together**", _seconds(total)))
        lines += [
            f"{name}: {found['gates']:,} gates, depth {found['depth']:,}, evaluated on {VECTORS} vectors; relative "
            f"error {found['error']:.0e}.",
            "",
            *markdown(("step", "seconds (processor)"), rows),
            "",
        ]
    rows = []
    for cell in COMPILED:
        if cell.key not in done:
            continue
        found = done[cell.key]
        for name, product in found["products"].items():
            figures = (product["width"], product["size"], product["parameters"])
            numbers = [f"{n:,}" for n in (found["gates"], found["depth"], found["bound"], *figures)]
            time_taken = _seconds(found["steps"][name])
            rows.append((cell.name, name, time_taken, *numbers, f"{product['error']:.0e}" if product["error"] else "0"))
    head = ("circuit", "compiler", "seconds (processor)", "gates", "depth", "3 d + 1", "width", "size", "parameters")
    lines += ["The compilers, *Monarch* without recognition.", "", *markdown((*head, "error"), rows)]
    return lines


def _seconds(pair: Any) -> str:
    clock, processor = pair
    return f"{clock:.2f} ({processor:.2f})"


STUDY = Study("circuits", "Circuits on the clock", [*PASSES.values(), *COMPILED], tables)

if __name__ == "__main__":
    STUDY.main()

"""Circuits as stand-alone C functions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from structmat.circuit.arrays import owners
from structmat.circuit.circuit import Circuit, Kind
from structmat.circuit.simplify import prune
from structmat.errors import CircuitError

MOST_STATEMENTS = 20_000
"""Circuits of more edges become tables and a loop: compilers take too long over longer functions."""

_RESERVED = {
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern", "float",
    "for", "free", "goto", "if", "inline", "int", "long", "main", "malloc", "register", "restrict", "return", "short",
    "signed", "sizeof", "static", "struct", "switch", "theta", "typedef", "union", "unsigned", "void", "volatile",
    "while", "x", "y",
}  # fmt: skip


def to_c(circuit: Circuit, name: str = "circuit") -> str:
    """The source of a C11 function that computes the outputs for one vector.

    ``int name(const double *x, double *y)``, or ``(const double *x, const double *theta, double *y)`` for a circuit
    with parameters; ``double _Complex`` where the circuit has complex numbers. It returns 0, or 1 where there is no
    memory. ``x`` and ``y`` may not overlap. Nothing but the standard headers is needed, and there is no state, so it
    can be called from several threads.

    Up to 20000 operands there is one statement for each gate; a larger circuit becomes tables and a loop over them,
    with as many temporary values as are alive at once.

    Args:
        circuit: any.
        name: of the function, an identifier.

    Raises:
        CircuitError: the name is no identifier of C.
    """
    if not name.isidentifier() or not name.isascii() or name in _RESERVED:
        raise CircuitError(f"{name!r} is no name of a C function. Use letters, digits and underscores.")
    circuit = prune(circuit)
    is_complex = any(a.dtype.kind == "c" for a in (circuit.weight, circuit.values))
    number = "double _Complex" if is_complex else "double"
    theta = f"const {number} *theta, " if circuit.parameters else ""
    head = [
        f"/* {circuit.in_features} inputs, {circuit.out_features} outputs, {circuit.parameters} parameters; "
        f"{circuit.gates} gates, depth {circuit.depth}, {circuit.multiplications} multiplications, "
        f"{circuit.additions} additions, {circuit.counts.divisions} divisions. */",
        *(["#include <complex.h>"] if is_complex else []),
        "#include <stdlib.h>",
        "",
    ]
    signature = f"int {name}(const {number} *x, {theta}{number} *y)"
    small = len(circuit.operand) <= MOST_STATEMENTS
    body = _statements(circuit, number) if small else _tables(circuit, number)
    return "\n".join([*head, signature, "{", *(f"    {line}" for line in body), "    return 0;", "}", ""])


def _literal(value: object) -> str:
    exact = complex(value)  # type: ignore[call-overload]
    if isinstance(value, complex | np.complexfloating):
        return f"CMPLX({exact.real!r}, {exact.imag!r})"
    return repr(float(exact.real))


def _statements(circuit: Circuit, number: str) -> list[str]:
    """One statement for each gate."""
    kinds, start = circuit.kind.tolist(), circuit.start.tolist()
    operand, parameter = circuit.operand.tolist(), circuit.parameter.tolist()
    weight = circuit.weight.tolist()
    value = [f"x[{node}]" for node in range(circuit.in_features)]
    lines = []
    for node in range(circuit.in_features, circuit.nodes):
        edges = range(start[node], start[node + 1])
        match Kind(kinds[node]):
            case Kind.PRODUCT:
                text = " * ".join(value[operand[e]] for e in edges)
            case Kind.QUOTIENT:
                text = " / ".join(value[operand[e]] for e in edges)
            case _:
                text = _sum(
                    [_term(weight[e], parameter[e], value[operand[e]] if operand[e] >= 0 else "") for e in edges]
                )
        lines.append(f"const {number} t{node} = {text};")
        value.append(f"t{node}")
    lines += [f"y[{place}] = {value[node]};" for place, node in enumerate(circuit.outputs.tolist())]
    read = {*operand, *circuit.outputs.tolist()}
    unread = [] if read & set(range(circuit.in_features)) else ["(void)x;"]
    if circuit.parameters and max(parameter, default=-1) < 0:
        unread.append("(void)theta;")
    return [*unread, *lines]


def _term(weight: object, parameter: int, value: str) -> tuple[str, str]:
    """Sign and text of one term of a sum."""
    factors = [f"theta[{parameter}]"] if parameter >= 0 else []
    sign = "-" if weight == -1 else "+"
    if weight not in (1, -1):
        factors.insert(0, _literal(weight))
    if value:
        factors.append(value)
    return sign, " * ".join(factors) or "1.0"


def _sum(terms: list[tuple[str, str]]) -> str:
    if not terms:
        return "0.0"
    (sign, first), *rest = terms
    return ("-" if sign == "-" else "") + first + "".join(f" {s} {t}" for s, t in rest)


def _tables(circuit: Circuit, number: str) -> list[str]:
    """Arrays of kinds, operands and weights, and a loop over the gates in an order of few values alive."""
    slot, slots = _slots(circuit)
    gates = np.arange(circuit.in_features, circuit.nodes)
    own = owners(circuit.start)
    reads = np.where(circuit.operand >= 0, slot[circuit.operand], -1)
    assert np.all(own >= circuit.in_features), "inputs have no edges"
    tables = [
        _table("unsigned char", "kind", circuit.kind[gates].tolist()),
        _table("int", "end", circuit.start[gates + 1].tolist()),
        _table("int", "place", slot[gates].tolist()),
        _table("int", "operand", reads.tolist()),
        _table(number, "weight", (_literal(w) for w in circuit.weight.tolist())),
        _table("int", "input_place", slot[: circuit.in_features].tolist()),
        _table("int", "output_place", slot[circuit.outputs].tolist()),
    ]
    factor = "weight[e]"
    if circuit.parameters:
        tables.append(_table("int", "parameter", circuit.parameter.tolist()))
        factor = "(parameter[e] < 0 ? weight[e] : weight[e] * theta[parameter[e]])"
    body = [
        f"{number} *v = malloc({max(1, slots)} * sizeof *v);",
        "if (!v)",
        "    return 1;",
        f"for (int i = 0; i < {circuit.in_features}; i++)",
        "    v[input_place[i]] = x[i];",
        f"for (int g = 0, e = 0; g < {len(gates)}; g++) {{",
        f"    {number} t;",
        f"    if (kind[g] == {int(Kind.PRODUCT)}) {{",
        "        for (t = v[operand[e++]]; e < end[g]; e++)",
        "            t *= v[operand[e]];",
        f"    }} else if (kind[g] == {int(Kind.QUOTIENT)}) {{",
        "        t = v[operand[e]] / v[operand[e + 1]];",
        "        e += 2;",
        "    } else {",
        "        for (t = 0.0; e < end[g]; e++)",
        f"            t += operand[e] < 0 ? {factor} : {factor} * v[operand[e]];",
        "    }",
        "    v[place[g]] = t;",
        "}",
        f"for (int i = 0; i < {circuit.out_features}; i++)",
        "    y[i] = v[output_place[i]];",
        "free(v);",
    ]
    return [*tables, *body]


def _table(kind: str, name: str, values: Iterable[object]) -> str:
    texts = [str(v) for v in values] or ["0"]
    rows = [", ".join(texts[i : i + 16]) for i in range(0, len(texts), 16)]
    return f"static const {kind} {name}[] = {{\n" + ",\n".join(rows) + "\n};"


def _slots(circuit: Circuit) -> tuple[np.ndarray, int]:
    """A place for each value, used again once its last reader is done; a loop over the gates."""
    last = np.arange(circuit.nodes)
    read = circuit.operand >= 0
    np.maximum.at(last, circuit.operand[read], owners(circuit.start)[read])
    last[circuit.outputs] = circuit.nodes
    ends, start, operand = last.tolist(), circuit.start.tolist(), circuit.operand.tolist()
    slot = list(range(circuit.in_features))
    free: list[int] = []
    used = circuit.in_features
    for node in range(circuit.in_features, circuit.nodes):
        # A gate may write where an operand was that it reads last: it reads first.
        free.extend({slot[u] for u in operand[start[node] : start[node + 1]] if u >= 0 and ends[u] == node})
        if free:
            slot.append(free.pop())
        else:
            slot.append(used)
            used += 1
    return np.array(slot, dtype=np.int64), used

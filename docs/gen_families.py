"""The table of families in Markdown, generated from the code: ``python docs/gen_families.py`` prints it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

import torch

import structmat as sm
from structmat.errors import StructmatError
from structmat.structure import Shape, Structure, count_stored

SHAPE: Shape = (256, 512)
"""Where numbers are counted: a power of two, so that no family pads."""

HEADER = ("family", "what it is", f"stored numbers of a {SHAPE[0]} x {SHAPE[1]} matrix", "projection")


def table() -> str:
    """One row for each family, third parties' included."""
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [_row(name, family) for name, family in sorted(sm.families().items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(name: str, family: type[Structure]) -> tuple[str, ...]:
    example = _example(family, SHAPE)
    numbers = projection = "-"
    if example is not None:
        count = count_stored(example, SHAPE)
        numbers = f"{count:,} ({count / (SHAPE[0] * SHAPE[1]):.1%}) for `{example}`"
        projection = _certificate(example)
    what = f"{_first_sentence(family)}. {_arguments(family)}"
    return (f"`{name}`", what, numbers, projection)


def _example(family: type[Structure], shape: Shape) -> Structure | None:
    """The first that the family proposes for a quarter of the dense parameters, else for as many as it needs."""
    dense = shape[0] * shape[1]
    for budget in (dense // 4, dense // 2, dense):
        for candidate in family.configurations(shape, budget):
            return candidate
    return None


def _certificate(structure: Structure) -> str:
    """What the projection of a random matrix knows of its optimality: without and with weights for the inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (32, 64)  # the certificate does not depend on the size, the time does
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * shape[1], shape[1], generator=generator, dtype=torch.float64)
    small = _example(type(structure), shape)
    if small is None:
        return "-"
    try:
        plain = sm.project(weight, small, sweeps=1).certificate.value
        weighted = sm.project(weight, small, second_moment=inputs.T @ inputs, sweeps=1).certificate.value
    except StructmatError as error:
        return f"refused: {error}"
    return plain if plain == weighted else f"{plain}; weighted: {weighted}"


def _arguments(family: type[Structure]) -> str:
    shown = []
    for field in dataclasses.fields(family):  # type: ignore[arg-type]
        given = field.default is not dataclasses.MISSING
        shown.append(f"`{field.name}={field.default!r}`" if given else f"`{field.name}`")
    return f"Arguments: {', '.join(shown)}" if shown else "No arguments"


def _first_sentence(family: type[Structure]) -> str:
    text = inspect.cleandoc(family.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"(?<=[.:])\s", text)[0].rstrip(":.")
    return sentence.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(table())

"""What a layer could become: candidates with their sizes and losses, as values that read and write JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from structmat.compression.layers import Members, layer_named, layers
from structmat.compression.scan import Site
from structmat.errors import FormatError, StructureError
from structmat.structure import Shape, Structure
from structmat.structure import to_json as structure_to_json
from structmat.structures import everything, families
from structmat.structures import from_json as structure_from_json
from structmat.structures.dense import Dense
from structmat.structures.sum_of import Sum

Choice = str | type[Structure] | Structure
"""A family by name or class (tried at several sizes), or one structure with its sizes."""

Variant = tuple[str, ...]
"""What is judged together: a family, or a sum of certain families."""

EXPECTED = ", expected with sweeps"
"""Marks the method of a candidate that was fitted without sweeps, with an error and a loss scaled by what sweeps gained
at another size."""


@dataclass(frozen=True)
class Candidate:
    """One structure that a layer could have.

    Args:
        structure: resolved for the layer's shape; ``Dense()`` means that the layer is kept as it is.
        parameters: stored numbers: learned ones, and one for every index.
        flops: operations of one product with a vector.
        error: relative, in the norm that was used for the layer (see :attr:`LayerScreen.norm`).
        lower_bound: no member of the structure has a smaller relative error; 0 if nothing is known.
        certificate: ``"optimal"``, ``"bound"`` or ``"none"``.
        method: how it was fitted.
        loss: predicted rise of the model's loss; see :mod:`structmat.compression.score`.
        cost: in the unit of the budget.
        form: of a kernel or the like that the structure is, where only one kind of layer has it; "" for a family.
    """

    structure: Structure
    parameters: int
    flops: int
    error: float
    lower_bound: float
    certificate: str
    method: str
    loss: float
    cost: float
    form: str = ""

    @property
    def variant(self) -> Variant:
        """What it is judged together with."""
        return variant_of(self.structure, self.form)


@dataclass(frozen=True)
class Kind:
    """What is tried as one: a family, or a form that one kind of layer has.

    Args:
        name: of the family or of the form.
        form: the same for a form; "" for a family.
        members: with at most so many stored numbers.
    """

    name: str
    form: str
    members: Members


@dataclass(frozen=True)
class LayerScreen:
    """All candidates of one layer, "keep" among them, by rising cost.

    Args:
        name: of the site.
        shape: ``(out_features, in_features)``.
        norm: in which errors are measured: ``"weights"``, ``"inputs"`` or ``"inputs and outputs"``.
        candidates: by rising cost.
        refused: how many were refused, by reason.
        parts: screens of the parts of its rows, where these may get structures of their own; their losses add up to
            what is expected of the layer.
    """

    name: str
    shape: Shape
    norm: str
    candidates: tuple[Candidate, ...]
    refused: Mapping[str, int]
    parts: tuple[LayerScreen, ...] = ()

    @property
    def keep(self) -> Candidate:
        """The candidate that keeps the layer as it is."""
        return next(c for c in self.candidates if isinstance(c.structure, Dense))


Screening = Mapping[str, LayerScreen]


def expecting(candidate: Candidate, gain: float) -> Candidate:
    """The candidate with the error and the loss that are expected of it where sweeps changed a like one's loss by the
    factor ``gain``."""
    return replace(
        candidate,
        error=candidate.error * gain**0.5,
        loss=candidate.loss * gain,
        method=candidate.method.removesuffix(EXPECTED) + EXPECTED,
    )


def variant_of(structure: Structure, form: str = "") -> Variant:
    """What a structure is judged together with."""
    if form:
        return (form,)
    return (
        tuple(type(part).__name__ for part in structure.parts)
        if isinstance(structure, Sum)
        else (type(structure).__name__,)
    )


def check_choices(structures: Sequence[Choice] | None) -> None:
    """Raise unless every item is a structure, a family, or a name of one or of a form of any kind of layer.

    Raises:
        StructureError: it is none of these.
    """
    if structures is None:
        return
    if isinstance(structures, str | type | Structure) or not isinstance(structures, Sequence):
        raise StructureError(f"structures= is a list of families, such as ['LowRank', 'Monarch']; got {structures!r}.")
    forms = {name for adapter in layers() for name in adapter.form_names}
    for choice in structures:
        if not isinstance(choice, Structure) and choice not in forms:
            _family(choice)


def families_of(structures: Sequence[Choice] | None) -> list[type[Structure]]:
    """The families that a choice names; for None all that are tried by default.

    Raises:
        StructureError: a name is no family.
    """
    check_choices(structures)
    known = families()
    if structures is None:
        return [known[name] for name in sorted(known) if known[name].by_default]
    return [_family(choice) for choice in structures if not isinstance(choice, Structure)]


def kinds_of(structures: Sequence[Choice] | None, site: Site) -> list[Kind]:
    """What a choice lets a layer try: families, and forms that only layers of its kind have; for None the usual
    families and all its forms.

    Raises:
        StructureError: a name is neither a family nor a form of any kind of layer.
    """
    forms = layer_named(site.kind).forms(site)
    of_others = {name for adapter in layers() for name in adapter.form_names} - set(forms)
    wanted: list[str | type[Structure]] = [*families_of(None), *sorted(forms)]
    if structures is not None:
        wanted = [choice for choice in structures if not isinstance(choice, Structure)]
    found = []
    for choice in wanted:
        name = family_name(choice)
        if name in forms:
            found.append(Kind(name, name, forms[name]))
        elif name not in of_others and name != Dense.__name__:
            found.append(Kind(name, "", partial(_family(choice).configurations, site.shape)))
    return found


def _family(choice: object) -> type[Structure]:
    """The family of a class, which need not be installed, or of a name. Raises what :func:`families_of` does."""
    if not (isinstance(choice, str) or (isinstance(choice, type) and issubclass(choice, Structure))):
        raise StructureError(
            f"structures holds families, by class or by name, and single structures; got {choice!r}. "
            "Give such as structures=[structmat.LowRank, 'Monarch', structmat.BLAST(blocks=4, rank=8)]."
        )
    name, known = family_name(choice), everything()
    if isinstance(choice, type) and known.get(name, choice) is choice:
        return choice
    if name not in known:
        alike = {k.lower(): k for k in known}
        near = [alike[k] for k in difflib.get_close_matches(name.lower(), alike, 1)]
        meant = f"Did you mean {near[0]!r}? " if near else ""
        raise StructureError(f"Unknown family {name!r}. {meant}Known are {', '.join(sorted(known))}.")
    return known[name]


def family_name(choice: Choice) -> str:
    """Of the family that a choice names."""
    return choice if isinstance(choice, str) else choice.__name__ if isinstance(choice, type) else type(choice).__name__


# ---------------------------------------------------------------------------------------------------------- JSON


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    """Plain JSON values of a candidate."""
    return {**candidate.__dict__, "structure": structure_to_json(candidate.structure)}


def candidate_from_json(data: Mapping[str, Any]) -> Candidate:
    """Read what :func:`candidate_to_json` wrote."""
    return Candidate(**{**data, "structure": structure_from_json(data["structure"])})


def layer_to_json(layer: LayerScreen) -> dict[str, Any]:
    """Plain values; :func:`layer_from_json` reads them."""
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "norm": layer.norm,
        "candidates": [candidate_to_json(c) for c in layer.candidates],
        "refused": dict(layer.refused),
        "parts": [layer_to_json(part) for part in layer.parts],
    }


def layer_from_json(data: Mapping[str, Any]) -> LayerScreen:
    """Read what :func:`layer_to_json` wrote. Raises :class:`~structmat.errors.FormatError`."""
    try:
        candidates = tuple(candidate_from_json(c) for c in data["candidates"])
        shape = (int(data["shape"][0]), int(data["shape"][1]))
        parts = tuple(layer_from_json(part) for part in data.get("parts", ()))
        return LayerScreen(data["name"], shape, data["norm"], candidates, dict(data["refused"]), parts)
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"The screen of a layer is damaged: {error!r} is missing or wrong.") from error


def with_losses(layer: LayerScreen, losses: Sequence[float]) -> LayerScreen:
    """The same candidates with other losses, in the order of :attr:`LayerScreen.candidates`."""
    pairs = zip(layer.candidates, losses, strict=True)
    return replace(layer, candidates=tuple(replace(c, loss=loss) for c, loss in pairs))

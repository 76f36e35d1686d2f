"""Structured matrices one above the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Pad, Program, Shuffle, Sum, build, rename
from structmat.projection.project import fit
from structmat.projection.refine_outputs import refine_outputs
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import (
    ParameterSpec,
    Shape,
    Structure,
    check_count,
    count_stored,
    largest_fitting,
    resolve,
    specs,
)
from structmat.structures.low_rank import LowRank
from structmat.structures.parts import prefixed


@final
@dataclass(frozen=True)
class Stacked(Structure):
    """Rows of different structures, ``W = [W0; W1; ...]``: a fused projection of queries, keys and values, or the gates
    of a recurrent layer, each with a structure and a size of its own.

    Tensors are those of the parts, named ``part0_left``, ``part1_weight``, ...; parameters add up. A fraction in a part
    is of the dense parameter count of that part. Projection: each part for itself, in the norm of the inputs that all
    share; optimal if all parts are and outputs weigh the same or apart. A moment that couples outputs of different
    parts gets descent in all tensors together, without a certificate.

    Args:
        parts: the structure of each part.
        rows: of each part, in one group; equal numbers if None.
        groups: how often this repeats from top to bottom: where the queries, keys and values of each group of heads lie
            together, a part holds those of all groups, ``groups * rows[i]`` rows.
    """

    by_default: ClassVar[bool] = False
    weighs_outputs: ClassVar[bool] = True

    parts: tuple[Structure, ...]
    rows: tuple[int, ...] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        given: tuple[object, ...] = self.parts
        wrong = [part for part in given if not isinstance(part, Structure)]
        if wrong or not self.parts:
            raise StructureError(
                f"Stacked has at least one part, all of them structures; got {wrong or 'none'}. "
                "Use, for example, Stacked((LowRank(8), LowRank(8), Dense()))."
            )
        check_count(self, "groups", self.groups)
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(self.rows))
            for size in self.rows:
                check_count(self, "rows", size)
            if len(self.rows) != len(self.parts):
                raise StructureError(
                    f"Stacked has {len(self.parts)} parts and rows={self.rows} of {len(self.rows)}. Give as many."
                )

    def resolve(self, shape: Shape) -> Stacked:
        count = len(self.parts) * self.groups
        rows = self.rows
        if rows is None and shape[0] % count == 0:
            rows = (shape[0] // count,) * len(self.parts)
        if rows is None or self.groups * sum(rows) != shape[0]:
            return replace(self, rows=rows)  # which is refused
        sized = (resolve(part, (self.groups * own, shape[1])) for part, own in zip(self.parts, rows, strict=True))
        return replace(self, parts=tuple(sized), rows=rows)

    def restriction(self, shape: Shape) -> str | None:
        if self.rows is None:
            return (
                f"its {shape[0]} rows are not {len(self.parts) * self.groups} equal parts. Give the rows of each part."
            )
        total = self.groups * sum(self.rows)
        if total != shape[0]:
            times = f"{self.groups} groups of " if self.groups > 1 else ""
            return f"{times}{self.rows} rows are {total} in all. Give rows that are {shape[0]} in all."
        reasons = (part.restriction(own) for part, own in zip(self.parts, self._shapes(shape), strict=True))
        return next((reason for reason in reasons if reason is not None), None)

    def _shapes(self, shape: Shape) -> list[Shape]:
        return [(self.groups * own, shape[1]) for own in self._rows()]

    def _rows(self) -> tuple[int, ...]:
        assert self.rows is not None, "not resolved"
        return self.rows

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {
            prefixed(_part(index), name): spec
            for index, (part, own) in enumerate(zip(self.parts, self._shapes(shape), strict=True))
            for name, spec in specs(part, own).items()
        }

    def program(self, shape: Shape) -> Program:
        found, before, together = [], 0, sum(self._rows())
        for index, (part, rows) in enumerate(zip(self.parts, self._rows(), strict=True)):
            own = rename(
                build(part, (self.groups * rows, shape[1])),
                lambda name, index=index: prefixed(_part(index), name),  # type: ignore[misc]
            )
            # (group, row) becomes (row, group), so that each part is one window of the whole.
            order = (Shuffle((self.groups, rows), (1, 0)),) if self.groups > 1 else ()
            place = () if rows == together else (Pad(self.groups * rows, shape[0], self.groups * before),)
            steps = (own, *order, *place)
            found.append(Chain(steps) if len(steps) > 1 else own)
            before += rows
        whole = Sum(tuple(found)) if len(found) > 1 else found[0]
        return Chain((whole, Shuffle((together, self.groups), (1, 0)))) if self.groups > 1 else whole

    def places(self) -> list[Tensor]:
        """The rows of the whole matrix that each part has."""
        starts = torch.arange(self.groups)[:, None] * sum(self._rows())
        found, before = [], 0
        for rows in self._rows():
            found.append((starts + torch.arange(before, before + rows)).flatten())
            before += rows
        return found

    def project(self, target: Target) -> Fit:
        places = self.places()
        fits = []
        for part, index in zip(self.parts, places, strict=True):
            own = target.of_rows(index)
            # Many stacks have a part in common.
            fits.append(own.weight_fact(("fit", part, own.sweeps), lambda part=part, own=own: fit(part, own)))  # type: ignore[misc]
        tensors = {
            prefixed(_part(index), name): tensor
            for index, found in enumerate(fits)
            for name, tensor in found.tensors.items()
        }
        methods = ", ".join(dict.fromkeys(found.method for found in fits))
        bound = math.hypot(*(found.lower_bound for found in fits))
        optimal = all(found.certificate is Certificate.OPTIMAL for found in fits)
        certificate = Certificate.OPTIMAL if optimal else Certificate.BOUND if bound > 0 else Certificate.NONE
        found = Fit(tensors, certificate, bound, f"part by part: {methods}")
        moment = target.output_moment
        if moment is None or not target.output_fact(
            ("coupled", self.rows, self.groups), lambda: _couples(moment, places)
        ):
            return found
        found = Fit(tensors, Certificate.NONE, 0.0, found.method)
        if all(part.closed_under_scaling for part in self.parts):
            found = refine_outputs(self, found, target)
        return found

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        parts: list[Structure] = []
        made: dict[str, Tensor] = {}
        for index, own, held in self._held(shape, tensors):
            part, hard = self.parts[index].harden(own, held)
            parts.append(part)
            made |= {prefixed(_part(index), name): tensor for name, tensor in hard.items()}
        return replace(self, parts=tuple(parts)), made

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor | None:
        terms = [self.parts[index].penalty(own, held) for index, own, held in self._held(shape, tensors)]
        known = [term for term in terms if term is not None]
        return torch.stack(known).sum() if known else None

    def _held(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, Shape, dict[str, Tensor]]]:
        """Each part's number, shape and tensors under its own names."""
        for index, (part, own) in enumerate(zip(self.parts, self._shapes(shape), strict=True)):
            yield index, own, {name: tensors[prefixed(_part(index), name)] for name in specs(part, own)}

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Low rank apart for the upper and the lower half."""
        half = shape[0] // 2
        rows = (shape[0] - half, half) if half else (1,)
        most = min(*rows, shape[1])

        def member(rank: int) -> Self:
            return cls((LowRank(rank),) * len(rows), rows)

        rank = largest_fitting(lambda r: count_stored(member(r), shape), budget, most)
        if rank:
            yield member(rank)


def _couples(moment: Tensor, places: list[Tensor]) -> bool:
    """Whether a moment has entries for outputs of two different parts."""
    rest = moment.clone()
    for index in places:
        rest[index[:, None], index] = 0
    return bool(rest.any())


def _part(index: int) -> str:
    return f"part{index}"

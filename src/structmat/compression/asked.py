"""What is asked for, checked before any work begins, and what follows from it for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from structmat.compression.budget import Parameters
from structmat.compression.evaluate import Evaluate
from structmat.compression.goals import Goal, Goals, read_goals
from structmat.compression.limits import matching_sites
from structmat.compression.parts import Split
from structmat.compression.plan import Plan
from structmat.compression.running import check_loader
from structmat.compression.scan import Scan, is_meta, matching, scan
from structmat.errors import BudgetError, DataError, ModelError, StructureError
from structmat.structure import Structure, count_stored, resolve
from structmat.structures.dense import Dense

if TYPE_CHECKING:
    from structmat.compression.recover import Distill


@dataclass(frozen=True)
class Asked:
    """The layers of a model, and what is asked of them.

    Args:
        found: the layers.
        goals: what limits their sizes; where a plan is given, the numbers that it holds.
        fixed: structures that are not chosen, by the sites' names.
    """

    found: Scan
    goals: Goals
    fixed: Mapping[str, Structure]


def asked_of(
    model: nn.Module,
    goals: Goals | None,
    plan: Plan | None,
    overrides: Mapping[str, Structure],
    include: Sequence[str],
    exclude: Sequence[str],
    split: Mapping[str, Split] | None = None,
) -> Asked:
    """The layers that take part, and what is fixed of them.

    Raises:
        ModelError: a pattern matches nothing, that of a group too, or the plan is of another model.
    """
    overrides = {"*": Dense(), **plan.layers} if plan is not None else overrides
    asked = [pattern for pattern, s in overrides.items() if not isinstance(s, Dense)]
    if plan is not None:  # dense ones too, which must be sites; a wrong name is found out below, and called the plan's
        present = dict(model.named_modules())
        asked = [name for name in plan.layers if name in present]
    found = scan(model, include, exclude, [p for p in asked if not any(c in p for c in "*?[")], split)
    if plan is not None:
        _check_plan(plan, found)
    fixed = _fixed(found, overrides)
    for pattern in {pattern for _, pattern in goals.limits if pattern} if goals is not None else ():
        matching_sites(pattern, found.sites)
    if plan is not None:
        numbers = {s.name: max(s.copies * count_stored(fixed[s.name], s.shape), s.numbers) for s in found.sites}
        goals = read_goals(Parameters(sum(numbers.values())))
    assert goals is not None, "either a budget or a plan is given"
    return Asked(found, goals, fixed)


def goals_of(
    budget: Goal | None,
    plan: Plan | None,
    overrides: Mapping[str, Structure] | None,
    split: Mapping[str, Split] | None,
    evaluate: Evaluate | None,
    recover: Distill | None,
    frontier: Sequence[float],
    rounds: int,
    calibration: Iterable[Any] | None,
) -> Goals | None:
    """What is asked for, checked; None where a plan says it.

    Raises:
        BudgetError: options contradict each other, or one has no legal value.
        DataError: there is no calibration data for what needs them.
    """
    if (budget is None) == (plan is None):
        raise BudgetError("A model is compressed under a budget or by a plan. Give budget= or plan=, and not both.")
    if plan is not None and overrides:
        raise BudgetError("A plan says what every layer becomes; leave out overrides, or edit the plan.")
    if plan is not None and split:
        raise BudgetError("A plan says what every layer becomes, parts of it too; leave out split, or edit the plan.")
    for share in frontier:
        given: object = share
        if not isinstance(given, float) or not 0 < share <= 1:
            raise BudgetError(f"frontier={tuple(frontier)!r}: each is a share above 0 and up to 1, as a float.")
    if frontier and evaluate is None:
        raise BudgetError("The models of frontier= are measured by evaluate=, which is missing.")
    if recover is not None and recover.data is None and calibration is None:
        raise DataError("Recovery needs data. Pass calibration=..., or Distill(data=...).")
    if rounds and calibration is None:
        raise DataError("rounds= measures layers in the compressed model, on calibration data. Pass calibration=....")
    goals = None if budget is None else read_goals(budget)
    if goals is not None and goals.quality is not None:
        if evaluate is None:
            raise BudgetError("Quality is what evaluate= measures, which is missing. Pass evaluate=....")
        if recover is not None and recover.windows:
            raise BudgetError(
                "Quality and Distill(windows=True) can't be had together: the size would move. Choose one."
            )
    return goals


def check_given(
    model: nn.Module,
    original: nn.Module | None,
    calibration: Iterable[Any] | None,
    overrides: Mapping[str, Structure] | None,
) -> None:
    """Raise if what is given can't be worked with, as :func:`structmat.compress_` says."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"compress takes a torch.nn.Module; got {type(model).__name__}.")
    if original is model:
        raise ModelError("The original is the model that is compressed in place. Pass a copy of it, or nothing.")
    if is_meta(model):
        raise ModelError("The model is on the meta device: its weights have no values. Load them first.")
    if calibration is not None:
        check_loader(calibration)
    for pattern, structure in (overrides or {}).items():
        if not isinstance(structure, Structure):
            raise StructureError(f"overrides[{pattern!r}] is a structure such as LowRank(rank=64); got {structure!r}.")


def _check_plan(plan: Plan, found: Scan) -> None:
    """Raise :class:`~structmat.errors.ModelError` if a layer of a plan is missing or has another shape."""
    shapes = {site.name: site.shape for site in found.sites}
    for name, shape in plan.shapes.items():
        if name not in shapes:
            raise ModelError(f"The plan names the layer {name}, which is none that can be compressed in this model.")
        if shapes[name] != shape:
            raise ModelError(f"The plan's layer {name} has the shape {shape}; the model's has {shapes[name]}.")


def _fixed(found: Scan, overrides: Mapping[str, Structure]) -> dict[str, Structure]:
    """The structures of overridden sites, resolved."""
    fixed: dict[str, Structure] = {}
    shapes = {site.name: site.shape for site in found.sites}
    for pattern, structure in overrides.items():
        names = matching(pattern, found.sites)
        if not names and not isinstance(structure, Dense):
            raise ModelError(
                f"The pattern {pattern!r} in overrides matches none of the {len(found.sites)} layers that are "
                f"compressed, such as {found.sites[0].name}. Name a kept layer exactly, without wildcards."
            )
        fixed |= {name: resolve(structure, shapes[name]) for name in names}
    return fixed

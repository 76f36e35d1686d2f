"""The contract can fail: a family that breaks one rule is caught by the check of that rule.

Each broken family is the low-rank or the diagonal one with one fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import structmat as sm
from structmat.program import Call, Chain, Contraction, Program
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure
from structmat.testing import CHECKS, Case, check_structure, counts, fits, gradients, graphs, saving, values

SHAPE = (9, 8)


@dataclass(frozen=True)
class Rank(Structure):
    """A right low-rank family: what the broken ones depart from."""

    rank: int = 2

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return {
            "left": ParameterSpec((shape[0], self.rank), Normal((DENSE_GAIN / self.rank) ** 0.5)),
            "right": ParameterSpec((self.rank, shape[1]), Normal(shape[1] ** -0.5)),
        }

    def program(self, shape: Shape) -> Program:
        return Chain((Contraction("right", 1, self.rank, shape[1], 1), Contraction("left", 1, shape[0], self.rank, 1)))

    def project(self, target: Target) -> Fit:
        found = sm.LowRank(self.rank).project(target)
        return dataclasses.replace(found, tensors=dict(found.tensors))

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Rank]:  # type: ignore[override]
        if sum(shape) <= budget:
            yield cls(1)


def test_the_unbroken_family_passes() -> None:
    report = check_structure(Rank(), SHAPE, groups=[g for g in CHECKS if g not in ("inductor", "onnx", "export")])
    assert "check_dense" in report.passed


def run_through(function_name: str) -> Program:
    function = globals()[function_name]
    return Call(function, (("left", 18), ("right", 16)), 9, 8, 34, 34 - 2 - 9, 5)


def affine(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x @ right.T @ left.T + 1.0


def quadratic(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (x * x) @ right.T @ left.T


def detached(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x @ right.T.detach() @ left.T


def reversed_batch(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.reshape(-1, 8).flip(0) @ right.T @ left.T


def changing_input(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.detach().mul_(1.5) @ right.T @ left.T


def double_always(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.double() @ right.T.double() @ left.T.double()


def imprecise(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.float().to(x.dtype) @ right.T @ left.T


def breaking_the_graph(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x @ right.T @ left.T * (1.0 if float(left.detach().sum()) < 1e9 else 2.0)


@dataclass(frozen=True)
class Function(Rank):
    """Runs through a function of this module."""

    function: str = ""

    def program(self, shape: Shape) -> Program:
        return run_through(self.function)


@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("affine", values.check_linearity),
        ("quadratic", values.check_linearity),
        ("detached", gradients.check_gradients),
        ("reversed_batch", values.check_batch_shapes),
        ("changing_input", values.check_non_contiguous),
        ("double_always", values.check_dtypes),
        ("imprecise", values.check_dense),
        ("breaking_the_graph", graphs.check_compile),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_function_is_caught(function: str, check: object) -> None:
    assert callable(check)
    with pytest.raises(Exception, match=r"."):
        check(Case(Function(function=function), SHAPE))


class Wrong:
    """The broken families, one fault each."""

    @dataclass(frozen=True)
    class ExtraParameter(Rank):
        def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
            return {**super().parameters(shape), "unused": ParameterSpec((3,), Normal(1.0))}

    @dataclass(frozen=True)
    class Variance(Rank):
        def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
            specs = dict(super().parameters(shape))
            return {**specs, "right": ParameterSpec(specs["right"].shape, Normal(1.2 * shape[1] ** -0.5))}

    @dataclass(frozen=True)
    class OverBudget(Rank):
        @classmethod
        def configurations(cls, shape: Shape, budget: int) -> Iterator[Rank]:  # type: ignore[override]
            if budget >= 2:
                yield cls(1)

    @dataclass(frozen=True)
    class EmptyAtTheCheapest(Rank):
        @classmethod
        def configurations(cls, shape: Shape, budget: int) -> Iterator[Rank]:  # type: ignore[override]
            if sum(shape) < budget:
                yield cls(1)

    @dataclass(frozen=True)
    class NothingEver(Rank):
        @classmethod
        def configurations(cls, shape: Shape, budget: int) -> Iterator[Rank]:  # type: ignore[override]
            yield from ()

    @dataclass(frozen=True)
    class Boastful(Rank):
        """Calls the zero matrix optimal."""

        def project(self, target: Target) -> Fit:
            found = super().project(target)
            zeros = {name: torch.zeros_like(t) for name, t in found.tensors.items()}
            return Fit(zeros, Certificate.OPTIMAL, target.norm(), "zero")

    @dataclass(frozen=True)
    class Suboptimal(Rank):
        """Calls a matrix optimal that is a little off."""

        def project(self, target: Target) -> Fit:
            found = super().project(target)
            tensors = {**found.tensors, "left": 0.99 * found.tensors["left"]}
            return Fit(tensors, Certificate.OPTIMAL, found.lower_bound, "off")

    @dataclass(frozen=True)
    class WorseThanZero(Rank):
        def project(self, target: Target) -> Fit:
            found = super().project(target)
            tensors = {**found.tensors, "left": -found.tensors["left"]}
            return Fit(tensors, Certificate.NONE, 0.0, "negative")

    @dataclass(frozen=True)
    class FalseBound(Rank):
        def project(self, target: Target) -> Fit:
            found = super().project(target)
            return Fit(found.tensors, Certificate.BOUND, 0.5 * target.norm(), "a bound that does not hold")

    @dataclass(frozen=True)
    class RisingWithSweeps(Rank):
        def project(self, target: Target) -> Fit:
            found = super().project(target)
            tensors = {**found.tensors, "left": found.tensors["left"] * 0.9**target.sweeps}
            return Fit(tensors, Certificate.NONE, 0.0, "shrinking")

    @dataclass(frozen=True)
    class Random(Rank):
        def project(self, target: Target) -> Fit:
            found = super().project(target)
            tensors = {**found.tensors, "left": found.tensors["left"] * (1 + 0.01 * torch.rand(()).double())}
            return Fit(tensors, Certificate.NONE, 0.0, "random")

    @dataclass(frozen=True)
    class BlindToInputs(Rank):
        """Ignores the second moment, yet claims to be optimal."""

        def project(self, target: Target) -> Fit:
            found = super().project(target.unweighted())
            return Fit(found.tensors, Certificate.OPTIMAL, found.lower_bound, "unweighted")

    @dataclass(frozen=True)
    class NotSaved(Rank):
        """Equal to nothing but itself."""

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return id(self)


@pytest.mark.parametrize(
    ("family", "check", "words"),
    [
        (Wrong.ExtraParameter, counts.check_parameter_counts, "numbers of parameters differ"),
        (Wrong.ExtraParameter, gradients.check_gradients, "unused gets no gradient"),
        (Wrong.Variance, fits.check_initialisation, "initial output variance is 0.4"),
        (Wrong.OverBudget, fits.check_configurations, "more than the budget"),
        (Wrong.EmptyAtTheCheapest, fits.check_configurations, "is empty, though"),
        (Wrong.NothingEver, fits.check_configurations, "propose nothing"),
        (Wrong.Boastful, fits.check_projection_of_members, "with the error 1"),
        (Wrong.Suboptimal, fits.check_projection, "would lower the error|called optimal"),
        (Wrong.WorseThanZero, fits.check_projection, "worse than the zero matrix"),
        (Wrong.FalseBound, fits.check_projection_of_members, "claims that no member"),
        (Wrong.RisingWithSweeps, fits.check_projection, "the error of project rises"),
        (Wrong.Random, fits.check_projection, "rises|two results"),
        (Wrong.BlindToInputs, fits.check_weighted_projection, "called optimal"),
        (Wrong.NotSaved, saving.check_json, "comes back from JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_family_is_caught(family: type[Structure], check: object, words: str) -> None:
    assert callable(check)
    with pytest.raises(AssertionError, match=words) as caught:
        check(Case(family(), SHAPE))
    assert f"{family.__name__}(" in str(caught.value)
    assert str(SHAPE) in str(caught.value)


def test_all_failures_are_reported_together() -> None:
    broken = Wrong.EmptyAtTheCheapest()
    with pytest.raises(ExceptionGroup, match=r"fails 1 of \d+ checks") as caught:
        check_structure(broken, SHAPE, groups=("configurations", "counts"))
    (error,) = caught.value.exceptions
    assert "in check_configurations of" in error.__notes__[0]
    with pytest.raises(ExceptionGroup) as both:
        check_structure(Wrong.ExtraParameter(), SHAPE, groups=("counts", "gradients"))
    assert len(both.value.exceptions) >= 2


def test_a_refused_shape_and_an_unknown_group_are_errors_of_their_own() -> None:
    with pytest.raises(sm.StructmatError, match="does not fit"):
        check_structure(sm.LowRank(200), (64, 100))
    with pytest.raises(KeyError, match="valuse"):
        check_structure(sm.Dense(), (2, 2), groups=("valuse",))

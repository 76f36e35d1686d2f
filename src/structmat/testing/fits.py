"""Checks of projection, of the sizes that a family proposes, and of its initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.matrix import StructuredMatrix
from structmat.projection.project import Projection, fit, make_target, project
from structmat.projection.target import Certificate, Target
from structmat.structure import DENSE_GAIN, allows_complex, count_parameters, count_stored, keeps_variance, resolve
from structmat.testing.case import Case, SkippedCheckError

EPS = torch.finfo(torch.float64).eps
SWEEPS = (0, 1, 3)


def _exact(case: Case) -> float:
    """Relative error that rounding leaves of an exact factorisation: backward stability of an SVD or least squares."""
    return 16 * EPS * math.sqrt(case.shape[0] * case.shape[1]) * max(1.0, math.log2(max(case.shape)))


def _moment(case: Case, size: int) -> Tensor:
    """Of correlated vectors some entries of which are always zero: positive semidefinite, singular from size 2 on."""
    seen = max(1, (2 * size) // 3)
    x = case.gaussian(max(1, size // 2), seen, dtype=torch.float64, draw=5 + size)
    x = x + x.roll(1, 1) if seen > 1 else x
    moment = torch.zeros(size, size, dtype=torch.float64)
    moment[:seen, :seen] = x.T @ x / x.shape[0]
    return moment


@dataclass(frozen=True)
class _Norm:
    """``||B^(1/2) A C^(1/2)||``; None for the identity."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def squared(self, matrix: Tensor) -> Tensor:
        """The definition ``tr(B A C A^H)``, sharing no code with the projection."""
        weighted = matrix if self.inputs is None else matrix @ self.inputs.to(matrix.dtype)
        weighted = weighted if self.outputs is None else self.outputs.to(matrix.dtype) @ weighted
        return (matrix.conj() * weighted).sum().real.clamp(min=0.0)

    def relative_error(self, weight: Tensor, found: StructuredMatrix) -> float:
        size = float(self.squared(weight))
        return math.sqrt(float(self.squared(weight - found.to_dense())) / size) if size > 0 else 0.0


def _check_outcome(case: Case, what: str, weight: Tensor, norm: _Norm, found: Projection) -> None:
    slack = math.sqrt(EPS)  # the definition squares, which halves the digits of small errors
    truth = norm.relative_error(weight, found.matrix)
    case.require(
        abs(truth - found.error) <= slack * max(1.0, truth),
        f"{what} reports the error {found.error!r}; its matrix has {truth!r}.",
    )
    case.require(
        0 <= found.lower_bound <= found.error * (1 + 8 * EPS),
        f"{what} has the lower bound {found.lower_bound!r} above its error {found.error!r}.",
    )
    if found.certificate is Certificate.OPTIMAL:
        case.require(
            found.error - found.lower_bound <= slack,
            f"{what} is called optimal with the error {found.error!r}, but its lower bound is {found.lower_bound!r}.",
        )
        _check_stationary(case, what, weight, norm, found.matrix)
    if type(case.structure).closed_under_scaling:
        case.require(
            found.error <= 1 + _exact(case), f"{what} has the error {found.error!r}: worse than the zero matrix."
        )
    for name, tensor in found.matrix.tensors.items():
        case.require(tensor.is_contiguous(), f"{what}: the tensor {name} is not contiguous.")
        case.require(not tensor.requires_grad, f"{what}: the tensor {name} requires a gradient.")
        case.require(bool(torch.isfinite(tensor).all()), f"{what}: the tensor {name} has NaN or infinite entries.")


def _check_bound(case: Case, what: str, target: Target) -> None:
    """A proved bound is not above the error of the member that was found, before project trims rounding from it."""
    found = fit(case.resolved, target)
    error = target.error(StructuredMatrix(case.resolved, case.shape, found.tensors).to_dense())
    case.require(
        found.lower_bound <= error + _exact(case) * target.norm(),
        f"{what} claims that no member has an error below {found.lower_bound!r}, and has itself {error!r}.",
    )


def _check_stationary(case: Case, what: str, weight: Tensor, norm: _Norm, matrix: StructuredMatrix) -> None:
    """No direction descends from an optimum: the gradient of the squared error vanishes in every learned tensor."""
    if not type(case.structure).closed_under_scaling:
        return  # the tensors are constrained: not every direction stays in the family
    tensors = {
        n: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) for n, t in matrix.tensors.items()
    }
    energy = norm.squared(weight - StructuredMatrix(matrix.structure, case.shape, tensors).to_dense())
    learned = [t for t in tensors.values() if t.requires_grad]
    scale = float(norm.squared(weight))
    for (name, tensor), slope in zip(
        [(n, t) for n, t in tensors.items() if t.requires_grad],
        torch.autograd.grad(energy, learned, materialize_grads=True),
        strict=True,
    ):
        # Moving by the tensor's own length changes the error by at most this share of the whole.
        change = float(torch.linalg.norm(slope) * torch.linalg.norm(tensor.detach()))
        case.require(
            change <= math.sqrt(EPS) * max(scale, EPS),
            f"{what} is called optimal, but moving {name} would lower the error: its slope is {change:.3g}.",
        )


def check_projection(case: Case) -> None:
    """On a random matrix: honest error and bounds, never worse than zero, no worse with more sweeps, deterministic."""
    weight = case.gaussian(*case.shape, dtype=torch.float64, draw=3)
    before = weight.clone()
    fits = [project(weight, case.structure, sweeps=sweeps) for sweeps in SWEEPS]
    for sweeps, found in zip(SWEEPS, fits, strict=True):
        _check_outcome(case, f"project with {sweeps} sweeps", weight, _Norm(), found)
    _check_bound(case, "the fit of a random matrix", make_target(weight, sweeps=SWEEPS[-1]))
    for index in range(1, len(SWEEPS)):
        before_error, after_error = fits[index - 1].error, fits[index].error
        case.require(
            after_error <= before_error + _exact(case),
            f"the error of project rises from {before_error!r} with {SWEEPS[index - 1]} sweeps to {after_error!r} "
            f"with {SWEEPS[index]}.",
        )
    again = project(weight, case.structure, sweeps=SWEEPS[-1])
    same = all(torch.equal(again.matrix.tensors[n], t) for n, t in fits[-1].matrix.tensors.items())
    case.require(same, "projecting the same matrix twice gives two results.")
    case.require(torch.equal(weight, before), "project changes the given matrix.")


def check_projection_of_members(case: Case) -> None:
    """A random member is recovered exactly where the certificate says optimal; zero and single precision work."""
    # The seed of the member is not that of the fit: a fit must not find it by drawing the same numbers.
    weight = case.member(torch.float64, draw=7).to_dense().clone()
    found = project(weight, case.structure)
    _check_outcome(case, "project of a member", weight, _Norm(), found)
    if found.certificate is Certificate.OPTIMAL:
        case.require(found.error <= _exact(case), f"a member is projected with the error {found.error:.3g}.")
    _check_bound(case, "the fit of a member", make_target(weight))
    if type(case.structure).closed_under_scaling:
        nothing = project(torch.zeros(case.shape, dtype=torch.float64), case.structure)
        case.require(nothing.error == 0, f"the zero matrix is projected with the error {nothing.error!r}.")
    for dtype in (torch.float32, torch.bfloat16):
        narrow = project(weight.to(dtype), case.structure, sweeps=1)
        for name, tensor in narrow.matrix.tensors.items():
            case.require(
                tensor.dtype == dtype or not tensor.is_floating_point(),
                f"projecting a matrix of {dtype} gives the tensor {name} of {tensor.dtype}.",
            )


def check_weighted_projection(case: Case) -> None:
    """In a weighted norm, with singular moments of inputs and outputs: no worse than the unweighted projection."""
    weight = case.gaussian(*case.shape, dtype=torch.float64, draw=3)
    inputs, outputs = _moment(case, case.shape[1]), _moment(case, case.shape[0])
    plain = project(weight, case.structure, sweeps=2)
    for what, norm in (
        ("the projection weighted by inputs", _Norm(inputs)),
        ("the projection weighted by outputs", _Norm(None, outputs)),
        ("the projection weighted on both sides", _Norm(inputs, outputs)),
    ):
        found, again = (
            project(weight, case.structure, second_moment=norm.inputs, output_moment=norm.outputs, sweeps=2)
            for _ in range(2)
        )
        _check_outcome(case, what, weight, norm, found)
        unaware = norm.relative_error(weight, plain.matrix)
        case.require(
            found.error <= unaware + math.sqrt(EPS),
            f"{what} has the error {found.error!r} in its own norm, the unweighted one {unaware!r}.",
        )
        same = all(torch.equal(again.matrix.tensors[n], t) for n, t in found.matrix.tensors.items())
        case.require(same, f"{what} gives two results for the same matrix.")
    eye = torch.eye(case.shape[1], dtype=torch.float64)
    identity = project(weight, case.structure, second_moment=eye, sweeps=2)
    if plain.certificate is Certificate.OPTIMAL and identity.certificate is Certificate.OPTIMAL:
        case.require(
            abs(identity.error - plain.error) <= _exact(case),
            f"with the identity as second moment the error is {identity.error!r}, without one {plain.error!r}.",
        )


def check_complex_projection(case: Case) -> None:
    """Complex matrices are projected on complex members, by the same rules."""
    if not allows_complex(case.structure):
        return
    weight = case.gaussian(*case.shape, dtype=torch.complex128, draw=3)
    _check_outcome(case, "the complex projection", weight, _Norm(), project(weight, case.structure, sweeps=2))


def check_configurations(case: Case) -> None:
    """What a family proposes is legal, resolved, within budget, and something whenever the cheapest fits."""
    family = type(case.structure)
    dense = case.shape[0] * case.shape[1]
    cheapest: int | None = None
    for budget in [dense // 20, dense // 10, dense // 4, dense // 2, dense, 4 * dense]:
        proposed = list(family.configurations(case.shape, budget))
        case.require(
            proposed == list(family.configurations(case.shape, budget)),
            f"configurations(budget={budget}) differ when asked twice.",
        )
        case.require(
            len(set(proposed)) == len(proposed), f"configurations(budget={budget}) repeats itself: {proposed}."
        )
        for candidate in proposed:
            case.require(type(candidate) is family, f"configurations propose a {type(candidate).__name__}.")
            case.require(
                resolve(candidate, case.shape) == candidate,
                f"configurations propose {candidate}, which is not resolved: {resolve(candidate, case.shape)}.",
            )
            amount = count_stored(candidate, case.shape)
            case.require(amount <= budget, f"{candidate} stores {amount} numbers, more than the budget {budget}.")
            cheapest = amount if cheapest is None else min(cheapest, amount)
        case.require(
            bool(proposed) or cheapest is None or cheapest > budget,
            f"configurations(budget={budget}) is empty, though a member that stores {cheapest} numbers was proposed.",
        )
    if cheapest is not None:
        exact = list(family.configurations(case.shape, cheapest))
        case.require(
            bool(exact), f"configurations(budget={cheapest}) is empty, though a member stores as many numbers."
        )
    elif min(case.shape) >= 8:
        case.require(False, "configurations propose nothing at any budget, though both sizes are at least 8.")


def check_initialisation(case: Case) -> None:
    """The output variance of a fresh matrix is that of a dense layer (1 where a family is not closed under scaling).

    For independent inputs of unit variance the mean output variance of a matrix is ``||S||_F^2 / out``; its mean over
    draws must be within 10 %. Draws are added until the standard error of that mean is a quarter of this; where they
    stay too noisy, four standard errors are allowed.
    """
    if not keeps_variance(case.structure):
        raise SkippedCheckError(f"{case.structure} declares that it averages")
    if count_parameters(case.structure, case.shape) == 0:
        raise SkippedCheckError(f"{case.structure} has nothing to learn at shape {case.shape}")
    wanted = DENSE_GAIN if type(case.structure).closed_under_scaling else 1.0
    generator = case.generator()
    gains: list[float] = []
    deviation = math.inf
    while len(gains) < 1000 and deviation > 0.025:
        for _ in range(25):
            member = StructuredMatrix.random(case.structure, case.shape, generator=generator, dtype=torch.float64)
            gains.append(float(member.to_dense().square().sum()) / case.shape[0] / wanted)
        sample = torch.tensor(gains, dtype=torch.float64)
        deviation = float(sample.std()) / math.sqrt(len(gains))
    mean = sum(gains) / len(gains)
    case.require(
        abs(mean - 1) <= max(0.1, 4 * deviation),
        f"the initial output variance is {mean * wanted:.4f} per unit input instead of {wanted:.4f} "
        f"(mean of {len(gains)} draws, standard error {deviation * wanted:.4f}).",
    )
    first, second = case.member(torch.float64), case.member(torch.float64)
    same = all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    case.require(same, "two draws with the same seed differ.")

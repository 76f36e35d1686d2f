"""Projection of a given matrix on a family: validation, padding, float64 inside, honest certificates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.errors import DataError, ShapeError
from structmat.matrix import StructuredMatrix
from structmat.projection.refine_outputs import refine_outputs
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import Shape, Structure, check_shape, resolve

DEFAULT_SWEEPS = 20
"""Sweeps that an iterative fit may spend by default."""


@dataclass(frozen=True)
class Projection:
    """The outcome of :func:`project`.

    Args:
        matrix: the member that was found, in the dtype of the given matrix.
        error: ``||(W - S) C^(1/2)||_F / ||W C^(1/2)||_F``, computed from the matrix itself (0 where both are 0).
        lower_bound: no member of the family has a smaller relative error; 0 if nothing is known.
        certificate: what is known about optimality.
        method: how it was found, in a few words.
    """

    matrix: StructuredMatrix
    error: float
    lower_bound: float
    certificate: Certificate
    method: str


def project(
    matrix: Tensor,
    structure: Structure,
    *,
    second_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    sweeps: int = DEFAULT_SWEEPS,
    seed: int = 0,
) -> Projection:
    """The member of ``structure`` nearest to ``matrix``, in closed form or by a fit that never gets worse.

    Args:
        matrix: (out_features, in_features), real or complex, of any floating dtype. Computed with in float64.
        structure: the family with its sizes; fractions are resolved for this shape.
        second_moment: (in_features, in_features), ``E[x x^H]`` of the inputs, positive semidefinite (singular is
            handled exactly). The error is then that of the outputs on such inputs.
        output_moment: (out_features, out_features), how much errors in the outputs count, positive semidefinite, such
            as ``E[g g^H]`` of a loss's gradients in them; the norm is then ``||B^(1/2) (W - S) C^(1/2)||_F``.
        sweeps: how many sweeps an iterative fit may spend; closed forms ignore it.
        seed: for fits with random starts.

    Returns:
        The matrix with its relative error, lower bound and certificate. "Optimal" is only claimed where it is a
        theorem. Never worse than the zero matrix for families that contain it.

    Raises:
        ShapeError: the structure refuses the shape, or the second moment has another one.
        DataError: an entry is NaN or infinite, or the second moment is not positive semidefinite.
    """
    target = make_target(matrix, second_moment, output_moment=output_moment, sweeps=sweeps, seed=seed)
    return project_target(target, structure, dtype=matrix.dtype, device=matrix.device)


def make_target(
    matrix: Tensor,
    second_moment: Tensor | None = None,
    *,
    output_moment: Tensor | None = None,
    sweeps: int = DEFAULT_SWEEPS,
    seed: int = 0,
) -> Target:
    """Validate a matrix and its weights and bring them to float64 on the CPU."""
    if matrix.dim() != 2:
        raise ShapeError(f"A matrix has two axes (out_features, in_features); got shape {tuple(matrix.shape)}.")
    check_shape(tuple(matrix.shape))
    if not (matrix.is_floating_point() or matrix.is_complex()):
        raise DataError(f"A matrix of dtype {matrix.dtype} can't be projected; use a floating or complex dtype.")
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    weight = matrix.detach().to(device="cpu", dtype=wide)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise DataError(f"The matrix of shape {tuple(matrix.shape)} has {bad} entries that are NaN or infinite.")
    shape = (weight.shape[0], weight.shape[1])
    inputs = None if second_moment is None else _moment(second_moment, shape, 1, wide)
    outputs = None if output_moment is None else _moment(output_moment, shape, 0, wide)
    return Target(weight, inputs, shape, sweeps, seed, outputs)


def _moment(moment: Tensor, shape: Shape, axis: int, dtype: torch.dtype) -> Tensor:
    """The checked moment of the inputs (axis 1) or the outputs (axis 0) of a matrix."""
    what = ("second moment of the outputs", "second moment of the inputs")[axis]
    if tuple(moment.shape) != (shape[axis], shape[axis]):
        raise ShapeError(
            f"The {what} of a matrix of shape {shape} has shape {(shape[axis], shape[axis])}; "
            f"got {tuple(moment.shape)}."
        )
    moment = moment.detach().to(device="cpu", dtype=dtype)
    if not bool(torch.isfinite(moment).all()):
        raise DataError(f"The {what} has entries that are NaN or infinite: look at the calibration data.")
    moment = (moment + moment.mH) / 2
    smallest, largest = (float(v) for v in torch.linalg.eigvalsh(moment)[[0, -1]])
    if smallest < -1e-6 * max(largest, 0.0) or largest < 0:
        raise DataError(
            f"The {what} is not positive semidefinite: its eigenvalues are {smallest:.3g} to {largest:.3g}."
        )
    return moment


def project_target(target: Target, structure: Structure, *, dtype: torch.dtype, device: torch.device) -> Projection:
    """Project a prepared target. Fits of one target share what they compute of it."""
    structure = resolve(structure, target.shape)
    found = fit(structure, target)
    wide = StructuredMatrix(structure, target.shape, found.tensors, dtype=target.weight.dtype)
    error, size = target.error(wide.to_dense()) if found.error is None else found.error, target.norm()
    scale = 1.0 / size if size > 0 else 0.0
    return Projection(
        matrix=wide.to(dtype=dtype, device=device),
        error=error * scale if size > 0 else float(error > 0),
        lower_bound=min(found.lower_bound, error) * scale,
        certificate=found.certificate,
        method=found.method,
    )


def fit(structure: Structure, target: Target) -> Fit:
    """Fit a resolved structure to a target of any shape, padding where the family needs it.

    In a weighted norm a fit that is not optimal is held against the unweighted one (where sweeps may be spent), so
    that knowing the inputs is never worse than not knowing them. An output moment is given to families that weigh
    outputs; the fit of another is refined from outside.
    """
    if target.output_moment is not None and not structure.weighs_outputs:
        return refine_outputs(structure, fit(structure, target.without_output_moment()), target)
    padded = target.padded(structure.native_shape(target.shape))
    found = structure.project(padded)
    weighted = padded.second_moment is not None or padded.output_moment is not None
    if weighted and padded.sweeps > 0 and found.certificate is not Certificate.OPTIMAL:
        plain = structure.project(padded.unweighted())
        if _error(structure, plain, target) < _error(structure, found, target):
            found = Fit(plain.tensors, found.certificate, found.lower_bound, plain.method)
    if padded.is_padded and found.certificate is Certificate.OPTIMAL:
        found = Fit(found.tensors, Certificate.BOUND, found.lower_bound, found.method)
    tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
    error = None if padded.is_padded or weighted else found.error
    return Fit(tensors, found.certificate, found.lower_bound, found.method, error)


def _error(structure: Structure, found: Fit, target: Target) -> float:
    member = StructuredMatrix(structure, target.shape, found.tensors, dtype=target.weight.dtype)
    return target.error(member.to_dense())

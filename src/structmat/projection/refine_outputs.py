"""Fits in a norm that weighs outputs, for families that can't: descent from their best fit that does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structmat.matrix import StructuredMatrix
from structmat.program import apply, build
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import Structure, specs

STEPS_PER_SWEEP = 4
"""Quasi-Newton steps that count as one sweep: each costs one product with the roots, forward and backward."""


def refine_outputs(structure: Structure, start: Fit, target: Target) -> Fit:
    """Descend from ``start`` to lower ``||B^(1/2) (W - S) C^(1/2)||``; never worse than the start.

    L-BFGS (Liu and Nocedal 1989) on all learned tensors together, with a line search by the strong Wolfe conditions,
    ``STEPS_PER_SWEEP`` steps a sweep. Each step costs one product of the member with ``in`` vectors, forward and
    backward, and one with ``B^(1/2)``. Families that are not closed under scaling keep their start: their tensors obey
    constraints that free descent would break.

    Returns:
        A fit without a certificate: optimality in the norm of the start says nothing in this one.
    """
    learned = [n for n, spec in specs(structure, target.shape).items() if spec.learned and math.prod(spec.shape) > 0]
    plain = Fit(start.tensors, Certificate.NONE, 0.0, start.method)
    if target.sweeps == 0 or not structure.closed_under_scaling or not learned:
        return plain
    before = _error(structure, start, target)
    if before == 0.0:
        return plain
    program = build(structure, target.shape)
    tensors = {n: t.detach().clone().requires_grad_(n in learned) for n, t in start.tensors.items()}
    rows, columns = target.shape
    vectors = _cropped(target.root, columns, target.weight)
    outputs = _cropped(target.output_root, rows, target.weight)
    wanted = (target.weight[:rows, :columns] @ vectors).mT  # rows of the wanted outputs, (in, out)
    optimizer = torch.optim.LBFGS(
        [tensors[n] for n in learned],
        max_iter=STEPS_PER_SWEEP * target.sweeps,
        history_size=10,
        tolerance_grad=0.0,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        difference = (wanted - apply(program, tensors, vectors.mT)) @ outputs.mT
        loss = (difference.abs() / before).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    fitted = {name: tensor.detach() for name, tensor in tensors.items()}
    if not all(bool(torch.isfinite(t).all()) for t in fitted.values() if t.is_floating_point() or t.is_complex()):
        return plain
    found = Fit(fitted, Certificate.NONE, 0.0, f"{start.method}, then descent in the weighted norm")
    return found if _error(structure, found, target) < before else plain


def _cropped(root: Tensor | None, size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype) if root is None else root[:size, :size]


def _error(structure: Structure, found: Fit, target: Target) -> float:
    return target.error(StructuredMatrix(structure, target.shape, found.tensors).to_dense())

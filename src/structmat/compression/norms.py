"""In which norm candidates for a layer are fitted, and by which loss they are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.compression.calibrate import Moments
from structmat.compression.scan import Site
from structmat.errors import DataError
from structmat.projection.target import Target

INPUT_DAMPING = 1e-3
"""Share of the mean input energy that is added to every input: calibration data never shows all that a layer may read
(a rare character, for one), and what a structure does there must not be free."""

OUTPUT_DAMPING = 0.1
"""Share of the mean gradient energy that is added to every output: the quadratic model is not to be trusted where it
says that an output does not matter at all."""


def layer_targets(
    site: Site, weights: Tensor, moments: Moments | None, *, sweeps: int, seed: int
) -> tuple[Target, ...]:
    """What a layer's structure is fitted to: each of its matrices, in the best norm that the moments allow.

    Args:
        weights: (copies, out, in).

    Raises:
        DataError: a weight is NaN or infinite; the message names the layer.
    """
    check_weight(site, weights)
    found = []
    for copy, weight in enumerate(weights.detach().to(device="cpu", dtype=torch.float64)):
        second = outputs = None
        if moments is not None:  # sums of squares: positive semidefinite by their making
            second = damped(moments.inputs(copy), INPUT_DAMPING)
            gradients = moments.gradients(copy)
            if gradients is not None and gradients.dim() and _energy(gradients) > 0:
                outputs = damped(gradients, OUTPUT_DAMPING)
        found.append(Target(weight, second, site.shape, sweeps, seed, outputs))
    return tuple(found)


def damped(moment: Tensor, share: float) -> Tensor:
    """``moment + share * mean(diag(moment)) * I``."""
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def check_weight(site: Site, weight: Tensor) -> None:
    """Raise :class:`~structmat.errors.DataError` if a weight is NaN or infinite somewhere; names the layer."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise DataError(
            f"The weight of {site.name} has {bad} entries that are NaN or infinite. Repair the model, or exclude it."
        )


def _energy(gradients: Tensor | None) -> float:
    """The mean square of a gradient's entry."""
    if gradients is None:
        return 0.0
    return float(gradients.diagonal().mean() if gradients.dim() else gradients)


def norm_name(target: Target) -> str:
    """Which errors the target's norm weighs, for reports."""
    if target.second_moment is None:
        return "weights"
    return "inputs" if target.output_moment is None else "inputs and outputs"


class Assessor:
    """Errors and predicted losses of candidates for one matrix.

    The predicted rise of the loss a term of it, if the weight changes by ``D``, is ``1/2 tr(G D C D^T)`` with the
    second moments ``C`` of the inputs and ``G`` of the gradients of the summed loss in the outputs, times the layer's
    rows a term: the Kronecker-factored quadratic model (Martens and Grosse 2015). Without gradients it is the squared
    relative error. Both cost two products in float32. A candidate that is as near to the weight as the layer's dtype
    can tell loses nothing: exact ones are not ranked by their rounding.
    """

    def __init__(self, target: Target, gradients: Tensor | None, terms: float, dtype: torch.dtype) -> None:
        self.target, self.terms = target, terms
        self.norm = target.norm()
        self.rounding = 0.5 * torch.finfo(dtype).eps * float(torch.linalg.norm(target.weight))
        self.inputs = None if target.second_moment is None else target.second_moment.float()
        self.outputs = None if target.output_moment is None or gradients is None else gradients.float()
        self.damping = OUTPUT_DAMPING * _energy(gradients)
        self.level = None if gradients is None or gradients.dim() else float(gradients)

    @property
    def weighs(self) -> bool:
        """Whether losses are predicted, and not only relative errors."""
        return self.outputs is not None or self.level is not None

    def __call__(self, dense: Tensor) -> tuple[float, float]:
        """The relative error in the target's norm and the predicted loss of a candidate written out (out, in)."""
        wide = self.target.weight - dense
        size = float(wide.abs().max())
        if size == 0.0:
            return 0.0, 0.0
        difference = (wide / size).float()  # so that squares neither overflow nor vanish
        right = difference if self.inputs is None else difference @ self.inputs
        is_exact = float(torch.linalg.norm(difference)) * size <= self.rounding
        if self.outputs is None:
            error = max(0.0, float((difference * right).sum(dtype=torch.float64))) ** 0.5 * size
            relative = error / self.norm if self.norm > 0 else 0.0
            loss = relative**2 if self.level is None else 0.5 * self.terms * self.level * error**2
            return relative, 0.0 if is_exact else loss
        form = max(0.0, float(((self.outputs @ difference) * right).sum(dtype=torch.float64)))
        plain = max(0.0, float((difference * right).sum(dtype=torch.float64)))
        error = (form + self.damping * plain) ** 0.5 * size
        loss = 0.0 if is_exact else 0.5 * self.terms * form * size**2
        return error / self.norm if self.norm > 0 else 0.0, loss

"""SOAP: Adam along the axes in which gradients are uncorrelated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from structmat.errors import ModelError
from structmat.learn.layouts import Layout, plain_layout

LARGEST = 512
"""Longest side of a matrix that gets axes of its own."""

FEWEST = 4
"""Shortest such side: the four blocks of a butterfly, 2 x 2 each, are thousands of tiny matrices."""

REFRESHED = 20
"""Steps between two looks for the axes."""


class SOAP(Optimizer):
    """Adam in the eigenbases of the gradients' covariances, with decoupled weight decay as in AdamW.

    A matrix's gradients ``G`` have the running covariances ``G G^T`` of their rows and ``G^T G`` of their columns.
    Adam's second moments are kept along the eigenvectors of these, where entries are least correlated, and so its steps
    fit the curvature better than along single entries: fewer steps lead as far. Every few steps the eigenvectors follow
    the covariances by one step of the power method and a QR decomposition.

    Tensors of structured layers are seen as the matrices that they are (``layouts``): each block of a block diagonal by
    itself, the entries of a sparse matrix at their places, where the step is the part of the matrix's step that the
    places hold. Vectors, and matrices without a side of 4 to ``largest``, take Adam's own steps.

    The first gradient of a tensor only finds its axes. Moments of tensors in half precision are kept in float32.

    Cost of a step for an m x n matrix with axes on both sides: ``3 m n (m + n)`` multiply-adds beside Adam's, and
    ``2 (m^3 + n^3)`` more every ``refreshed`` steps; memory ``2 m^2 + 2 n^2`` numbers beside Adam's.

    Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: improving and stabilizing Shampoo
    using Adam" (2024), algorithm 3; what the places of a sparse matrix do with it is ours.

    Args:
        params: tensors or parameter groups, such as :func:`structmat.parameter_groups` makes.
        lr: as for Adam.
        betas: decay of the first and second moments.
        shampoo_beta: decay of the covariances.
        eps: added to the root of the second moment.
        weight_decay: of every tensor, where a group has none of its own.
        layouts: of tensors, see :func:`structmat.learn.layouts.layouts`; without one a tensor's first axis are rows and
            all others columns.
        largest: longest side that gets axes.
        refreshed: steps between two looks for the axes.

    Raises:
        ModelError: a number is out of its range, or a tensor is complex.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        layouts: Mapping[Tensor, Layout] | None = None,
        largest: int = LARGEST,
        refreshed: int = REFRESHED,
    ) -> None:
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("shampoo_beta", shampoo_beta)):
            if not 0 <= value < 1:
                raise ModelError(f"SOAP({name}={value!r}): it is at least 0 and below 1.")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ModelError(f"SOAP({name}={value!r}): it is at least 0 and finite.")
        for name, count in (("largest", largest), ("refreshed", refreshed)):
            if count < 1:
                raise ModelError(f"SOAP({name}={count!r}): it is an integer of at least 1.")
        self._layouts = dict(layouts or {})
        self._largest, self._refreshed = largest, refreshed
        defaults = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise ModelError(
                        f"SOAP takes real tensors; one of shape {tuple(parameter.shape)} is {parameter.dtype}. Hold it "
                        "as pairs of real numbers (torch.view_as_real), as structured layers do."
                    )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step with the gradients that the tensors have.

        Args:
            closure: computes the gradients again and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        layout = self._layouts.get(parameter) or plain_layout(parameter)
        sides = () if layout is None else self._sides(layout)
        g = layout.matrices(gradient) if layout is not None and sides else gradient
        if g.dtype in (torch.float16, torch.bfloat16):
            g = g.float()
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
            for side in sides:
                state[f"covariance_{side}"] = _covariance(g, side)
                state[f"axes_{side}"] = torch.linalg.eigh(state[f"covariance_{side}"])[1].contiguous()
            if sides:
                return
        (beta1, beta2), mixed = group["betas"], 1 - group["shampoo_beta"]
        for side in sides:
            state[f"covariance_{side}"].lerp_(_covariance(g, side), mixed)
        turned = _turned(g, state, sides)
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(turned, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        update = state["exp_avg"] / scale
        if layout is not None and sides:
            update = layout.tensor(_turned_back(update, state, sides), parameter)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.to(parameter.dtype), alpha=group["lr"] / (1 - beta1**count))
        if sides and int(count) % self._refreshed == 0:
            self._refresh(state, sides)

    def _sides(self, layout: Layout) -> tuple[str, ...]:
        _, rows, columns = layout.shape
        return tuple(s for s, size in (("rows", rows), ("columns", columns)) if FEWEST <= size <= self._largest)

    def _refresh(self, state: dict[str, Tensor], sides: tuple[str, ...]) -> None:
        """New axes; the mean gradient is turned with them, and their second moments are those of the old ones."""
        mean = _turned_back(state["exp_avg"], state, sides)
        for side in sides:
            axes = f"axes_{side}"
            # Contiguous, as it is read from a file: a product's last digit depends on how its factors lie in memory.
            state[axes] = torch.linalg.qr(state[f"covariance_{side}"] @ state[axes])[0].contiguous()
        state["exp_avg"] = _turned(mean, state, sides).contiguous()


def _covariance(g: Tensor, side: str) -> Tensor:
    return g @ g.mT if side == "rows" else g.mT @ g


def _turned(g: Tensor, state: Mapping[str, Tensor], sides: tuple[str, ...]) -> Tensor:
    if "rows" in sides:
        g = state["axes_rows"].mT @ g
    return g @ state["axes_columns"] if "columns" in sides else g


def _turned_back(g: Tensor, state: Mapping[str, Tensor], sides: tuple[str, ...]) -> Tensor:
    if "rows" in sides:
        g = state["axes_rows"] @ g
    return g @ state["axes_columns"].mT if "columns" in sides else g

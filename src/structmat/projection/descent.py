"""Descent over all tensors of a program at once, for families whose matrices are no linear function of some of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from structmat.program import Program, apply, stages
from structmat.projection.target import Target

_STEPS_A_SWEEP = 2


def descend(program: Program, tensors: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Lower the error of a member by L-BFGS over all learned tensors; never increases it.

    Args:
        program: of the target's native shape.
        tensors: the start.
        target: its ``sweeps`` say how many steps may be made, two each.

    Cost: a step multiplies the program with ``in`` vectors a few times, forward and backward.
    """
    names = list(dict.fromkeys(name for stage in stages(program) for name in stage.weights))
    if target.sweeps == 0 or not names:
        return dict(tensors)
    rows, columns = target.shape
    weight = target.weight[:rows, :columns]
    root = torch.eye(columns, dtype=weight.dtype) if target.root is None else target.root[:columns, :columns]
    goal = (weight @ root).T
    inputs = torch.nn.functional.pad(root.T, (0, target.native[1] - columns))
    scale = float((goal.abs() ** 2).sum())
    if not scale > 0:
        return dict(tensors)
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    best, lowest = dict(tensors), float("inf")
    optimizer = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=_STEPS_A_SWEEP * target.sweeps,
        max_eval=20 * _STEPS_A_SWEEP * target.sweeps,
        history_size=20,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        nonlocal best, lowest
        optimizer.zero_grad()
        rest = goal - apply(program, {**tensors, **leaves}, inputs)[:, :rows]
        loss = (rest.abs() ** 2).sum() / scale
        loss.backward()
        if float(loss.detach()) < lowest:
            lowest = float(loss.detach())
            best = {**tensors, **{name: leaf.detach().clone() for name, leaf in leaves.items()}}
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return best

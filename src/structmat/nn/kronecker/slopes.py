"""Blocks on their way between linear and nonlinear: slopes that are learned or annealed, terms that are dropped."""

from __future__ import annotations

import torch
from torch import nn

from structmat.errors import StructureError
from structmat.nn.kronecker.block import SAME, KroneckerBlock, keep_
from structmat.nn.kronecker.shape import Bias


@torch.no_grad()
def set_slopes(model: nn.Module, slope: float) -> int:
    """Set the slopes of all Kronecker blocks whose activation is :class:`Slopes`; how many blocks there are.

    With ``Slopes(learned=False)`` the way from the identity to the rectifier is a schedule: in training,
    ``set_slopes(model, max(0.0, 1 - step / steps))`` before each step.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, KroneckerBlock):
            held = list(module.slopes())
            for tensor in held:
                tensor.fill_(slope)
            count += bool(held)
    return count


def absorb_(model: nn.Module, tolerance: float = SAME) -> tuple[str, ...]:
    """Replace blocks that are linear, or nearly so, by the linear layers that they equal, in place.

    A block whose slopes all stayed within ``tolerance`` of 1 gained nothing from its activation; as a
    :class:`StructuredLinear` it runs in one pass. Blocks with an outer activation stay.

    Returns:
        The names of the replaced blocks.

    Raises:
        StructureError: the model itself is such a block: call its ``to_structured``.
    """
    if isinstance(model, KroneckerBlock):
        raise StructureError(
            "The model is a single block, which can't be replaced in place. Use block.to_structured()."
        )
    found = []
    for name, module in list(model.named_modules()):
        if isinstance(module, KroneckerBlock) and module.outer is None and module.is_linear(tolerance):
            model.set_submodule(name, module.to_structured(tolerance))
            found.append(name)
    return tuple(found)


@torch.no_grad()
def pruned(block: KroneckerBlock, tolerance: float) -> KroneckerBlock:
    """The block without the terms whose Kronecker product is small, at least the largest one kept.

    l2 decay of the factors is decay of the nuclear norm of the rearranged sum: it drives whole terms to 0. What a
    dropped term adds to every sample (its inner bias, activated) goes into the outer bias.

    Args:
        block: of any number of factors.
        tolerance: terms with a smaller share of the largest term's norm are dropped.
    """
    norms = block.term_norms()
    kept = norms >= tolerance * norms.max()
    shape = block.shape
    orders = [order for order, count in shape.groups for _ in range(count)]  # as the chains hold the terms
    made = KroneckerBlock(
        shape.in_features,
        shape.out_features,
        int(kept.sum()),
        in_shape=shape.inputs,
        out_shape=shape.outputs,
        order=[order for order, keep in zip(orders, kept.tolist(), strict=True) if keep],
        inner=block.inner,
        outer=block.outer,
        bias=shape.bias,
        activated=shape.activated,
        initialize=keep_,
        input_gain=block.input_gain,
        device=norms.device,
        dtype=norms.dtype,
    )
    start = 0
    held = {chain.layout.order: chain for chain in made.chains}
    for chain in block.chains:
        own = kept[start : start + chain.layout.terms]
        start += chain.layout.terms
        if not bool(own.any()):
            continue
        target = held[chain.layout.order]
        target.set_factors([f[own] for f in chain.factors()])
        for old, new in zip(chain.layout.active, target.layout.active, strict=True):
            for kind in ("bias", "slope"):
                name = f"{kind}{old.place}"
                source, goal = getattr(chain, name, None), getattr(target, name, None)
                if source is not None and goal is not None:
                    goal.copy_(new.from_natural(old.to_natural(source)[own]))
    if shape.bias is not Bias.NONE:
        assert made.bias is not None
        assert block.bias is not None
        zero = norms.new_zeros(shape.in_features)
        made.bias.zero_()
        made.bias.copy_(block.linear(zero) - made.linear(zero))
    return made.train(block.training)

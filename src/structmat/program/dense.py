"""The matrix of a program written out, by multiplying factors where that is cheaper than multiplying the identity."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program
from structmat.program.derived import derive
from structmat.program.fixed import Reorder, index_of
from structmat.program.fuse import chainable, full_weight, merge, merged_pattern
from structmat.program.reference import apply
from structmat.program.stage import Stage
from structmat.program.stages import Contraction, Permute
from structmat.program.transpose import transpose

Tensors = Mapping[str, Tensor]


def dense(program: Program, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (out, in) of a program, differentiable in its tensors.

    A chain of contractions whose product is one again, as of a butterfly, is multiplied factor by factor: the products
    grow from the smallest to the whole, which takes little more than writing it. Anything else multiplies the smaller
    identity.

    Args:
        program: with plain or derived weights.
        tensors: by name.
        dtype: of the values that enter.
        device: of the tensors.
    """
    program, tensors = derive(program, tensors)
    steps = program.steps if isinstance(program, Chain) else (program,)
    before, core, after = _orders(steps)
    if len(core) > 1 and all(isinstance(s, Contraction) for s in core) and dtype not in _NARROW:
        product = _product([s for s in core if isinstance(s, Contraction)], tensors)
        if product is not None:
            for stage in before:
                product = product.index_select(1, _index(transpose(stage), tensors))
            for stage in after:
                product = product.index_select(0, _index(stage, tensors))
            return product
    out_features, in_features = program.out_features, program.in_features
    if in_features <= out_features:
        return apply(program, tensors, torch.eye(in_features, dtype=dtype, device=device)).T
    return apply(transpose(program), tensors, torch.eye(out_features, dtype=dtype, device=device))


_NARROW = (torch.bfloat16, torch.float16)
"""Products of factors round once for each; in half precision the definition, stage by stage, is kept."""


def _orders(steps: tuple[Program, ...]) -> tuple[list[Stage], tuple[Program, ...], list[Stage]]:
    """Permutations at both ends (those before from the inside out) and what lies between."""
    first, last = 0, len(steps)
    while first < last and isinstance(steps[first], Permute | Reorder):
        first += 1
    while last > first and isinstance(steps[last - 1], Permute | Reorder):
        last -= 1
    before = [s for s in reversed(steps[:first]) if isinstance(s, Stage)]
    return before, steps[first:last], [s for s in steps[last:] if isinstance(s, Stage)]


def _index(stage: Program, tensors: Tensors) -> Tensor:
    """``p`` with ``y[i] = x[p[i]]``."""
    if isinstance(stage, Reorder):
        return index_of(stage)
    assert isinstance(stage, Permute), stage
    index = tensors[stage.index]
    return torch.argsort(index) if stage.inverse else index


def _product(factors: list[Contraction], tensors: Tensors) -> Tensor | None:
    """The product of contractions as a matrix, or None where it is not worth it or no contraction."""
    made = {f"{i}": full_weight(factor, tensors) for i, factor in enumerate(factors)}
    held = [Contraction(f"{i}", *factor.pattern) for i, factor in enumerate(factors)]
    while len(held) > 1:
        pairs = [(merged_pattern(a, b), i) for i, (a, b) in enumerate(pairwise(held)) if chainable(a, b)]
        if not pairs:
            return None
        pattern, i = min(pairs, key=lambda pair: (pair[0][0] * pair[0][1] * pair[0][2] * pair[0][3], pair[1]))
        weight = merge(held[i], held[i + 1], made)
        held[i : i + 2] = [Contraction(held[i].weight, *pattern)]
        made[held[i].weight] = weight
    a, b, c, d = held[0].pattern
    if a * d != 1:
        return None
    return made[held[0].weight].reshape(b, c)

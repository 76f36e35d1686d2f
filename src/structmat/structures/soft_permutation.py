"""Permutations that can be learned by gradient: doubly stochastic matrices that harden to permutations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.circuit.kaleidoscope import permutation
from structmat.program import Chain, Contraction, Derived, Program, apply
from structmat.program.derived import Sinkhorn, Switches
from structmat.projection.assignment import assigned, assignment
from structmat.projection.kaleidoscope import kaleidoscope_patterns
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern, is_power_of_two
from structmat.structure import Normal, ParameterSpec, Shape, Structure, check_count
from structmat.structures.permutation import Permutation, square_only

_CERTAIN = 40.0
"""The logit of what is certain: probabilities are then 0 and 1 in float64, gradients not quite zero."""


@final
@dataclass(frozen=True)
class SoftPermutation(Structure):
    """A doubly stochastic matrix in place of a permutation, with gradients; ``harden`` makes it a :class:`Permutation`.

    Two relaxations. By Sinkhorn iterations: ``logits`` (n, n), exponentiated, rows and columns normalised in turn; any
    square size, n^2 numbers, a dense product. By switches (``iterations=None``): a Benes network in which every
    exchange of two values happens with a probability, the sigmoid of a logit; n / 2 numbers for each of 2 log2 n - 1
    levels, O(n log n) products, rows and columns sum to 1 exactly, every permutation is a corner. A power of two.

    :func:`structmat.learn.choices.choice_penalty` measures how far it is from hard. Projection: the nearest
    permutation, with logits of certainty; among all doubly stochastic matrices it need not be optimal.
    Source: Mena et al. (ICLR 2018); Dao et al. (ICLR 2020), soft butterfly permutations.

    Args:
        iterations: of Sinkhorn's normalisation; None for switches.
    """

    closed_under_scaling: ClassVar[bool] = False
    supports_complex: ClassVar[bool] = False
    keeps_variance: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None:
            check_count(self, "iterations", self.iterations)

    def restriction(self, shape: Shape) -> str | None:
        if self.iterations is None and shape[0] == shape[1] and shape[0] & (shape[0] - 1):
            return "switches need a power of two. Use iterations=20 (Sinkhorn) for other sizes."
        return square_only(self, shape)

    def _patterns(self, shape: Shape) -> tuple[Pattern, ...]:
        return kaleidoscope_patterns(shape[0], 1) if shape[0] > 1 else ()

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        if self.iterations is not None or shape[0] == 1:
            return {"logits": ParameterSpec(shape, Normal(1.0))}
        return {
            f"logits{i}": ParameterSpec((a, d), Normal(1.0)) for i, (a, _, _, d) in enumerate(self._patterns(shape))
        }

    def program(self, shape: Shape) -> Program:
        if self.iterations is not None or shape[0] == 1:
            return Derived(Contraction("logits", 1, shape[0], shape[0], 1), Sinkhorn(self.iterations or 1))
        stages = [Derived(Contraction(f"logits{i}", *p), Switches()) for i, p in enumerate(self._patterns(shape))]
        return Chain(tuple(stages))

    def project(self, target: Target) -> Fit:
        order, dtype = assigned(target), target.weight.dtype
        size = len(order)
        if self.iterations is not None or size == 1:
            logits = torch.zeros(size, size, dtype=dtype)
            logits[torch.arange(size), order] = _CERTAIN + math.log(max(1, size))
            return Fit({"logits": logits}, Certificate.NONE, 0.0, "linear assignment")
        return Fit(_switch_logits(order, dtype), Certificate.NONE, 0.0, "linear assignment, routed by switches")

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        """The permutation with the largest sum of probabilities."""
        logits = {name: tensor.detach().to(torch.float64) for name, tensor in tensors.items()}
        soft = apply(self.program(shape), logits, torch.eye(shape[1], dtype=torch.float64)).T
        return Permutation(), {"order": assignment(soft)}

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
        """How far the matrix is from a permutation: ``1 - ||S||^2 / n``, 0 for permutations alone."""
        like = next(iter(tensors.values()))
        eye = torch.eye(shape[1], dtype=like.dtype, device=like.device)
        return 1 - apply(self.program(shape), tensors, eye).square().sum() / shape[0]

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        size = shape[0]
        if size != shape[1]:
            return
        levels = size.bit_length() - 1
        if is_power_of_two(size) and (2 * levels - 1) * (size // 2) <= budget and size > 1:
            yield cls()
        elif size * size <= budget:
            yield cls(20)


def _switch_logits(order: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of certainty for the switches that route a permutation; the two of stride 1 in the middle are one."""
    routed = permutation(order.numpy()).stages
    levels = len(routed) // 2
    crossed = [torch.from_numpy(stage.weight[:, 0, 1] != 0) for stage in routed]
    merged = [*crossed[: levels - 1], crossed[levels - 1] ^ crossed[levels], *crossed[levels + 1 :]]
    return {f"logits{i}": torch.where(c, _CERTAIN, -_CERTAIN).to(dtype) for i, c in enumerate(merged)}

"""Parameter groups for optimizers: a learning rate for each stage of a structured layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from structmat.errors import ModelError
from structmat.nn.convolution import (
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
)
from structmat.nn.embedding import StructuredEmbedding
from structmat.nn.kronecker import KroneckerBlock, rate_multipliers
from structmat.nn.linear import StructuredLinear
from structmat.nn.windows import WindowedLinear
from structmat.program import Chain, Diagonal, Program, Stage, Windowed, build
from structmat.structure import Shape, Structure, resolve

_CONVOLUTIONS = (StructuredConv1d, StructuredConv2d, StructuredConvTranspose1d, StructuredConvTranspose2d)


@lru_cache(maxsize=4096)
def learning_rate_multipliers(structure: Structure, shape: Shape) -> Mapping[str, float]:
    """By which factor each learned tensor's learning rate under Adam exceeds that of a dense layer of this shape.

    A stage that sums ``d`` inputs for one output gets ``(in_features / d) / g``, where ``g`` is the number of learned
    stages between input and output; a diagonal gets 1. One Adam step then changes the output of a freshly initialised
    layer about as much as it would that of a dense one, at any width and in any family.

    Source: Qiu, Potapczynski, Finzi, Goldblum, Wilson, "Compute better spent: replacing dense layers with structured
    matrices" (2024), section 4.
    """
    structure = resolve(structure, shape)
    found: dict[str, float] = {}
    _collect(build(structure, shape), shape[1], 0, found)
    return found


def _collect(program: Program, in_features: int, outside: int, found: dict[str, float]) -> None:
    """``outside``: learned stages before and after the program on every path through it."""
    if isinstance(program, Chain):
        lengths = [_length(step) for step in program.steps]
        for step, length in zip(program.steps, lengths, strict=True):
            _collect(step, in_features, outside + sum(lengths) - length, found)
    elif isinstance(program, Windowed):
        # Two learned factors in one stage: a term sums over its window of the inputs, an output over its terms.
        inner = max(1.0, program.right_size / max(1, program.terms))
        outer = max(1.0, program.left_size / program.height)
        if program.transposed:
            inner, outer = (
                max(1.0, program.left_size / max(1, program.terms)),
                max(1.0, program.right_size / program.width),
            )
        first, second = (program.left, program.right) if program.transposed else (program.right, program.left)
        for name, fan_in in ((first, inner), (second, outer)):
            factor = in_features / fan_in / (outside + 2)
            found[name] = min(factor, found.get(name, factor))
    elif isinstance(program, Stage):
        if program.weights:
            fan_in = max(1.0, program.multiplications / program.out_features)
            factor = 1.0 if isinstance(program, Diagonal) else in_features / fan_in / (outside + 1)
            for name in program.weights:
                found[name] = min(factor, found.get(name, factor))
    else:
        for part in program.parts:
            _collect(part, in_features, outside, found)


def _length(program: Program) -> int:
    """Learned stages on the longest path."""
    if isinstance(program, Windowed):
        return 2
    if isinstance(program, Stage):
        return 1 if program.weights else 0
    if isinstance(program, Chain):
        return sum(_length(step) for step in program.steps)
    return max(_length(part) for part in program.parts)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, decay_structured: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.AdamW`` (or Adam): ``AdamW(sm.parameter_groups(model, lr=1e-3))``.

    Structured tensors get ``lr`` times their :func:`learning_rate_multipliers` and no weight decay: decaying each of
    ``K`` factors would decay their product ``K`` times over. So do Kronecker blocks, by their own
    :func:`structmat.nn.kronecker.rate_multipliers`; their biases, which are large arrays, do not decay. Of all others,
    those with at least two axes decay and vectors and scalars do not. Each group says in ``"role"`` what it is.
    Parameters that don't require a gradient are left out; every other one is in exactly one group.

    Args:
        model: any module; its structured layers are found.
        lr: the learning rate that a dense layer would have.
        weight_decay: for the unstructured matrices.
        decay_structured: let structured tensors decay too, scaled such that the product of a layer's tensors decays as
            fast as a dense matrix would: by ``weight_decay`` over the multiple of the rate and the number of tensors.

    Raises:
        ModelError: the rate or the decay is negative or not finite.
    """
    return _grouped(model, lr, weight_decay, scaled=True, decays=decay_structured)


def recovery_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """As :func:`parameter_groups`, for factors that were fitted to a trained matrix.

    Fitted factors are balanced: the entries of all of a layer's tensors are alike in size, unlike fresh ones, and a
    large multiple on one of them undoes the fit. So each layer has one: the geometric mean of the multiples of its
    tensors, and 1 for a single tensor, whose entries are those of a dense matrix; and so do Kronecker blocks, which are
    converted with balanced factors.
    """
    return _grouped(model, lr, weight_decay, scaled=False)


def _grouped(
    model: nn.Module, lr: float, weight_decay: float, *, scaled: bool, decays: bool = False
) -> list[dict[str, Any]]:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ModelError(f"{name}={value!r}: it is at least 0 and finite.")
    roles: dict[int, tuple[str, float, float]] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear | WindowedLinear):
            factors = (
                learning_rate_multipliers(module.structure, (module.out_features, module.in_features))
                if isinstance(module, StructuredLinear)
                else module.learning_rate_multipliers()
            )
            roles |= _roles(module, factors, lr, weight_decay, scaled, decays)
        elif isinstance(module, StructuredEmbedding):
            factors = learning_rate_multipliers(module.structure, (module.num_embeddings, module.embedding_dim))
            roles |= _roles(module, factors, lr, weight_decay, scaled, decays)
        elif isinstance(module, _CONVOLUTIONS):
            factors = learning_rate_multipliers(module.structure, module.unfolded_shape)
            roles |= _roles(module, factors, lr, weight_decay, scaled, decays)
        elif isinstance(module, KroneckerBlock):
            held = dict(module.named_parameters())
            for name, factor in rate_multipliers(module, lr).items():
                factor = factor if scaled else 1.0
                roles[id(held[name])] = (f"Kronecker, {factor:.4g} times", lr * factor, 0.0)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            other = ("matrices", lr, weight_decay) if parameter.dim() >= 2 else ("vectors", lr, 0.0)
            groups.setdefault(roles.get(id(parameter), other), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay, "role": role}
        for (role, rate, decay), members in groups.items()
    ]


def _roles(
    module: nn.Module, factors: Mapping[str, float], lr: float, weight_decay: float, scaled: bool, decays: bool
) -> dict[int, tuple[str, float, float]]:
    """Role, rate and decay of a structured layer's tensors, by identity."""
    found = {}
    for name, factor in factors.items():
        if not scaled:
            factor = math.prod(factors.values()) ** (1 / len(factors)) if len(factors) > 1 else 1.0
        decay = weight_decay / (factor * len(factors)) if decays else 0.0
        found[id(getattr(module, name))] = (f"structured, {factor:.4g} times", lr * factor, decay)
    return found

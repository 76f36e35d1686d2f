"""Weights that are functions of parameters: orthogonal blocks, mixing probabilities, doubly stochastic matrices.

A :class:`Derived` stage is another stage that reads ``form(tensor)`` in place of a tensor. :func:`derive` computes
these once, so that what runs afterwards is made of plain stages, on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from structmat.program.combinators import Chain, Program, Sum
from structmat.program.pairs import Pairs
from structmat.program.stage import Stage

Tensors = Mapping[str, Tensor]


@runtime_checkable
class Form(Protocol):
    """A differentiable function from a tensor to the weight of a stage. Implementations are frozen dataclasses."""

    @property
    def roundings(self) -> int:
        """How many roundings a value passes in it."""
        ...

    def stored(self, numel: int) -> int:
        """Entries of the tensor behind a weight of ``numel`` entries."""
        ...

    def __call__(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Derived(Stage):
    """``stage`` with the weight ``form(tensor)``; the tensor has the name that the stage gives to its weight."""

    stage: Stage
    form: Form

    def __post_init__(self) -> None:
        assert len(self.stage.weights) == 1, self

    @property
    def name(self) -> str:
        return next(iter(self.stage.weights))

    @property
    def in_features(self) -> int:
        return self.stage.in_features

    @property
    def out_features(self) -> int:
        return self.stage.out_features

    def transpose(self) -> Derived:
        return replace(self, stage=self.stage.transpose())

    @property
    def weights(self) -> Mapping[str, int]:
        return {name: self.form.stored(size) for name, size in self.stage.weights.items()}

    @property
    def indices(self) -> tuple[str, ...]:
        return self.stage.indices

    def rename(self, name: Callable[[str], str]) -> Derived:
        return replace(self, stage=self.stage.rename(name))

    @property
    def multiplications(self) -> int:
        return self.stage.multiplications

    @property
    def additions(self) -> int:
        return self.stage.additions

    @property
    def depth(self) -> int:
        return self.stage.depth

    def __str__(self) -> str:
        return f"{self.stage} of {self.form}"


def has_derived(program: Program) -> bool:
    """Whether a weight of the program is a function of a tensor."""
    if isinstance(program, Chain | Sum):
        return any(map(has_derived, program.steps if isinstance(program, Chain) else program.parts))
    return isinstance(program, Derived) or (isinstance(program, Pairs) and isinstance(program.stage, Derived))


def derive(program: Program, tensors: Tensors) -> tuple[Program, dict[str, Tensor]]:
    """The same program made of plain stages, and the tensors that it reads; differentiable in the given ones."""
    made = dict(tensors)
    plain = underived(program)
    for name, (source, form) in derived_functions(program).items():
        made[name] = form(tensors[source])
    return plain, made


def underived(program: Program) -> Program:
    """The program made of plain stages; a derived weight has a name of its own for each form."""
    if isinstance(program, Chain):
        return Chain(tuple(map(underived, program.steps)))
    if isinstance(program, Sum):
        return Sum(tuple(map(underived, program.parts)))
    if isinstance(program, Derived):
        return program.stage.rename(lambda name: _derived_name(name, program.form))
    if isinstance(program, Pairs) and isinstance(program.stage, Derived):
        inner = underived(program.stage)
        assert isinstance(inner, Stage)
        return replace(program, stage=inner)
    return program


def derived_functions(program: Program) -> dict[str, tuple[str, Form]]:
    """By the name of a derived weight: the tensor and the function that it comes from."""
    if isinstance(program, Chain | Sum):
        found: dict[str, tuple[str, Form]] = {}
        for part in program.steps if isinstance(program, Chain) else program.parts:
            found.update(derived_functions(part))
        return found
    if isinstance(program, Pairs):
        return derived_functions(program.stage)
    if isinstance(program, Derived):
        return {_derived_name(program.name, program.form): (program.name, program.form)}
    return {}


def _derived_name(name: str, form: Form) -> str:
    return f"{name}:{form}"


# --------------------------------------------------------------------------------------------------------- the forms


@dataclass(frozen=True)
class Rotations:
    """2 x 2 rotations (a, 2, 2, d) from pairs (a, 2, d) of any length: ``[[c, -s], [s, c]] / sqrt(c^2 + s^2)``.

    For complex pairs ``[[c, -conj s], [s, conj c]]`` of the same norm: the special unitary ones.
    """

    @property
    def roundings(self) -> int:
        return 8

    def stored(self, numel: int) -> int:
        return numel // 2

    def __call__(self, tensor: Tensor) -> Tensor:
        c, s = tensor[:, 0], tensor[:, 1]
        size = (_squared(c) + _squared(s)).sqrt()
        c, s = c / size, s / size
        above = -s.conj() if s.is_complex() else -s
        below = c.conj() if c.is_complex() else c
        return torch.stack([torch.stack([c, above], 1), torch.stack([s, below], 1)], 1)

    def __str__(self) -> str:
        return "rotations"


@dataclass(frozen=True)
class Phases:
    """Numbers of modulus 1 from numbers of any but 0; signs of real ones, which no gradient moves."""

    @property
    def roundings(self) -> int:
        return 6

    def stored(self, numel: int) -> int:
        return numel

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor / _squared(tensor).sqrt()
        return tensor.sgn().detach() + 0 * tensor

    def __str__(self) -> str:
        return "phases"


@dataclass(frozen=True)
class Mixing:
    """A probability ``p = sigmoid(logit)``, or ``1 - p``, as a factor; of complex logits the real part counts.

    Args:
        other: ``1 - p``.
        entry: which of the tensor's logits.
        entries: how many there are.
    """

    other: bool = False
    entry: int = 0
    entries: int = 1

    @property
    def roundings(self) -> int:
        return 8

    def stored(self, numel: int) -> int:
        return self.entries

    def __call__(self, tensor: Tensor) -> Tensor:
        logit = (tensor.real if tensor.is_complex() else tensor).reshape(-1)[self.entry].reshape(1, 1, 1, 1)
        return torch.sigmoid(-logit if self.other else logit).to(tensor.dtype)

    def __str__(self) -> str:
        return f"{'1 - ' * self.other}p{self.entry}"


@dataclass(frozen=True)
class Switches:
    """Doubly stochastic 2 x 2 blocks (a, 2, 2, d) from logits (a, d): ``[[1 - p, p], [p, 1 - p]]``."""

    @property
    def roundings(self) -> int:
        return 8

    def stored(self, numel: int) -> int:
        return numel // 4

    def __call__(self, tensor: Tensor) -> Tensor:
        crossed, straight = torch.sigmoid(tensor), torch.sigmoid(-tensor)
        return torch.stack([torch.stack([straight, crossed], 1), torch.stack([crossed, straight], 1)], 1)

    def __str__(self) -> str:
        return "switches"


@dataclass(frozen=True)
class Sinkhorn:
    """A nearly doubly stochastic matrix from logits (n, n): rows and columns of ``exp`` normalised in turn.

    Columns come last and sum to 1 exactly; rows do in the limit of many iterations.
    Source: Mena et al., "Learning latent permutations with Gumbel-Sinkhorn networks" (ICLR 2018).
    """

    iterations: int

    @property
    def roundings(self) -> int:
        return 16 * (self.iterations + 1)

    def stored(self, numel: int) -> int:
        return numel

    def __call__(self, tensor: Tensor) -> Tensor:
        logs = tensor
        for _ in range(self.iterations):
            logs = logs - torch.logsumexp(logs, 1, keepdim=True)
            logs = logs - torch.logsumexp(logs, 0, keepdim=True)
        return torch.exp(logs)

    def __str__(self) -> str:
        return f"{self.iterations} Sinkhorn iterations"


def _squared(x: Tensor) -> Tensor:
    return (x.real.square() + x.imag.square()) if x.is_complex() else x.square()

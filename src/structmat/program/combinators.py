"""Programs: stages, and the two ways of putting programs together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from structmat.program.stage import Remembering, Stage


@dataclass(frozen=True)
class Chain(Remembering):
    """Programs one after the other, first applied first. Never empty: the identity is a chain of one ``Crop``."""

    steps: tuple[Program, ...]

    def __post_init__(self) -> None:
        assert self.steps, "a chain has at least one step"
        for first, second in zip(self.steps, self.steps[1:], strict=False):
            assert first.out_features == second.in_features, f"{first} does not feed {second}"

    @property
    def in_features(self) -> int:
        """Of the first step."""
        return self.steps[0].in_features

    @property
    def out_features(self) -> int:
        """Of the last step."""
        return self.steps[-1].out_features

    def __str__(self) -> str:
        from structmat.program.table import table

        return table(self)


@dataclass(frozen=True)
class Sum(Remembering):
    """Programs of the same shape side by side, their outputs added."""

    parts: tuple[Program, ...]

    def __post_init__(self) -> None:
        assert self.parts, "a sum has at least one part"
        assert len({(p.in_features, p.out_features) for p in self.parts}) == 1, self.parts

    @property
    def in_features(self) -> int:
        """Of every part."""
        return self.parts[0].in_features

    @property
    def out_features(self) -> int:
        """Of every part."""
        return self.parts[0].out_features

    def __str__(self) -> str:
        from structmat.program.table import table

        return table(self)


Program = Stage | Chain | Sum


def stages(program: Program) -> tuple[Stage, ...]:
    """All stages of a program, in order of application."""
    if isinstance(program, Stage):
        return (program,)
    inner = program.steps if isinstance(program, Chain) else program.parts
    return tuple(stage for part in inner for stage in stages(part))


def rename(program: Program, name: Callable[[str], str]) -> Program:
    """The same program reading its tensors under other names."""
    if isinstance(program, Stage):
        return program.rename(name)
    if isinstance(program, Chain):
        return Chain(tuple(rename(step, name) for step in program.steps))
    return Sum(tuple(rename(part, name) for part in program.parts))


def tensor_sizes(program: Program) -> dict[str, int]:
    """Number of entries of every learned tensor that the program reads, each once."""
    sizes: dict[str, int] = {}
    for stage in stages(program):
        for name, size in stage.weights.items():
            assert sizes.setdefault(name, size) == size, f"{name} is read with two sizes"
    return sizes

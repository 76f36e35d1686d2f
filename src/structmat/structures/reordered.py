"""A structure whose columns come in another order of the axes that they run over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Program, Shuffle, build
from structmat.projection.project import fit
from structmat.projection.target import Fit, Target
from structmat.structure import ParameterSpec, Shape, Structure, check_count, resolve, specs
from structmat.structures.block_diagonal import BlockDiagonal


@final
@dataclass(frozen=True)
class Reordered(Structure):
    """``W[:, order]`` is a member of ``structure``, where ``order`` are the columns, viewed as an array of ``sizes``,
    with its axes permuted.

    The tensors are the structure's own; nothing is stored for the order and nothing is computed for it. The unfolded
    kernel of a convolution runs over (channels, height, width): with ``axes=(1, 2, 0)`` blocks of columns are taps, so
    that a tensor train of three cores is the Tucker-2 form of the kernel. Projection: that of the structure, of the
    reordered matrix in the reordered norm, with its certificate.

    Args:
        structure: the family of the reordered matrix.
        sizes: of the axes of the columns, the last one running fastest; their product is the number of columns.
        axes: a permutation of them, as of ``torch.permute``.
    """

    by_default: ClassVar[bool] = False
    weighs_outputs: ClassVar[bool] = True

    structure: Structure
    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        given: object = self.structure
        if not isinstance(given, Structure):
            raise StructureError(f"Reordered(structure={given!r}): give a structure, such as LowRank(rank=8).")
        for size in self.sizes:
            check_count(self, "sizes", size)
        if sorted(self.axes) != list(range(len(self.sizes))):
            raise StructureError(
                f"Reordered(axes={self.axes!r}) is no permutation of the {len(self.sizes)} axes of {self.sizes!r}. "
                f"Use each number from 0 to {len(self.sizes) - 1} once."
            )

    def resolve(self, shape: Shape) -> Reordered:
        return replace(self, structure=resolve(self.structure, shape))

    def restriction(self, shape: Shape) -> str | None:
        if math.prod(self.sizes) != shape[1]:
            return (
                f"its sizes {self.sizes} are those of {math.prod(self.sizes)} columns. Give sizes whose product is "
                f"{shape[1]}."
            )
        return self.structure.restriction(shape)

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return specs(self.structure, shape)

    def program(self, shape: Shape) -> Program:
        return Chain((Shuffle(self.sizes, self.axes), build(self.structure, shape)))

    def project(self, target: Target) -> Fit:
        return fit(self.structure, self._arranged(target))

    def _arranged(self, target: Target) -> Target:
        """The problem of the structure; what is computed of it is kept with the target."""
        order = torch.arange(target.native[1]).reshape(self.sizes).permute(self.axes).flatten()

        def make() -> Target:
            second = target.second_moment
            moment = None if second is None else second[order][:, order]
            return Target(
                target.weight[:, order], moment, target.shape, target.sweeps, target.seed, target.output_moment
            )

        found = target.weight_fact(("reordered", self.sizes, self.axes), make)
        return found.replace_sweeps(target.sweeps)

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        structure, made = self.structure.harden(shape, tensors)
        return replace(self, structure=structure), made

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.structure.penalty(shape, tensors)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Block-diagonal matrices of interleaved columns."""
        for structure in BlockDiagonal.configurations(shape, budget):
            blocks = structure.blocks
            if blocks > 1 and shape[1] % blocks == 0:
                yield cls(structure, (shape[1] // blocks, blocks), (1, 0))
                return
        for structure in BlockDiagonal.configurations(shape, budget):
            yield cls(structure, (shape[1],), (0,))
            return

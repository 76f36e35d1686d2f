"""Block butterfly plus low rank: the factors of a butterfly summed instead of multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program, Reorder, Sum
from structmat.program.fixed import Exchanged
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import is_power_of_two, round_up
from structmat.structure import (
    DENSE_GAIN,
    Normal,
    ParameterSpec,
    Shape,
    Structure,
    check_count,
    check_size,
    largest_fitting,
    whole,
)

_STEPS = 3
"""Steps of subspace iteration for the low rank part of the start."""


@final
@dataclass(frozen=True)
class Pixelfly(Structure):
    """``W = S + left @ right``: dense blocks where the factors of a butterfly of blocks have them, plus low rank.

    On a grid of ``blocks`` x ``blocks`` (a power of two) the block (i, j) is there if i = j, ``diagonal`` (blocks, p,
    q), or if i and j differ in one of the lowest ``strides`` binary digits, ``stride0``, ``stride1``, ...: the sum of
    the butterfly's factors in place of their product, to first order the same. ``out * in * (1 + strides) / blocks +
    rank * (out + in)`` parameters and multiply-adds; sizes that the blocks do not divide are padded, and a rectangle
    has rectangular blocks.

    Projection: blocks and low rank part in turn, each its exact optimum, then alternating least squares in a weighted
    norm; monotone, no certificate.
    Source: Chen, Dao et al., "Pixelated butterfly" (ICLR 2022).

    Args:
        blocks: of a side, a power of two of at least 2.
        strides: how many, at most ``log2(blocks)``; all if None.
        rank: of the low rank part, or a fraction of the dense parameter count for all together.
    """

    by_default: ClassVar[bool] = False

    blocks: int = 8
    strides: int | None = None
    rank: int | float = 1

    def __post_init__(self) -> None:
        check_count(self, "blocks", self.blocks, minimum=2)
        check_size(self, "rank", self.rank)
        levels = self.blocks.bit_length() - 1
        if not is_power_of_two(self.blocks):
            raise StructureError(
                f"Pixelfly(blocks={self.blocks}): a butterfly grid has a power of two of blocks. "
                f"Use blocks={1 << levels} or {2 << levels}."
            )
        if self.strides is not None:
            check_count(self, "strides", self.strides, minimum=0)
            if self.strides > levels:
                raise StructureError(
                    f"Pixelfly(blocks={self.blocks}, strides={self.strides}): there are {levels} strides. "
                    f"Use strides={levels} or fewer."
                )

    def resolve(self, shape: Shape) -> Pixelfly:
        levels = self.blocks.bit_length() - 1
        return Pixelfly(self.blocks, levels if self.strides is None else self.strides, self.rank)

    def restriction(self, shape: Shape) -> str | None:
        if self.blocks > max(shape):
            return (
                f"there is nothing to put into so many blocks. Use blocks={1 << (max(shape).bit_length() - 1)} or less."
            )
        if isinstance(self.rank, int) and self.rank > min(shape):
            return f"its low rank part has a rank of at most {min(shape)}. Use rank={min(shape)} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        return round_up(shape[0], self.blocks), round_up(shape[1], self.blocks)

    def _names(self) -> list[str]:
        return ["diagonal", *(f"stride{level}" for level in range(whole(self.strides)))]

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        rank, names = whole(self.rank), self._names()
        p, q = shape[0] // self.blocks, shape[1] // self.blocks
        std = (DENSE_GAIN / 2 / (q * len(names))) ** 0.5
        found = {name: ParameterSpec((self.blocks, p, q), Normal(std)) for name in names}
        found["left"] = ParameterSpec((shape[0], rank), Normal((DENSE_GAIN / 2 / rank) ** 0.5))
        found["right"] = ParameterSpec((rank, shape[1]), Normal(shape[1] ** -0.5))
        return found

    def program(self, shape: Shape) -> Program:
        rank, blocks = whole(self.rank), self.blocks
        p, q = shape[0] // blocks, shape[1] // blocks
        parts: list[Program] = [Contraction("diagonal", blocks, p, q, 1)]
        for level in range(whole(self.strides)):
            order = Exchanged(shape[1], q, 1 << level)
            parts.append(Chain((Reorder(order), Contraction(f"stride{level}", blocks, p, q, 1))))
        parts.append(Chain((Contraction("right", 1, rank, shape[1], 1), Contraction("left", 1, shape[0], rank, 1))))
        return Sum(tuple(parts))

    def project(self, target: Target) -> Fit:
        rank = whole(self.rank)
        u, s, vh = target.unweighted().whitened_svd
        kept = min(rank, len(s))
        left = target.weight.new_zeros(target.native[0], rank)
        right = target.weight.new_zeros(rank, target.native[1])
        left[:, :kept], right[:kept] = u[:, :kept] * s[:kept].sqrt(), s[:kept].sqrt()[:, None] * vh[:kept]
        # One start for each part first; the better one goes on.
        trials = []
        for blocks_first in (True, False):
            low = torch.zeros_like(target.weight) if blocks_first else left @ right
            tensors = self._blocks(target.weight - low)
            a, b = _subspace(target.weight - self._dense(tensors, target.native), right, _STEPS)
            trials.append({**tensors, "left": a, "right": b})
        tensors = min(trials, key=lambda t: self._size(target, t))
        squared = self._size(target, tensors)
        for _ in range(target.sweeps):
            other = self._blocks(target.weight - tensors["left"] @ tensors["right"])
            a, b = _subspace(target.weight - self._dense(other, target.native), tensors["right"], 1)
            other |= {"left": a, "right": b}
            before, reached = squared, self._size(target, other)
            if not reached < squared:
                break
            tensors, squared = other, reached
            if before - squared <= _PROGRESS * before:
                break
        if target.second_moment is not None or target.output_moment is not None:
            tensors = refine(self.program(target.native), tensors, target, target.sweeps)
        tensors = self._scaled(target, tensors)
        return Fit(tensors, Certificate.NONE, 0.0, "blocks and low rank in turn")

    def _scaled(self, target: Target, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Never worse than zero in the target's norm: the low rank part and all blocks times one number."""
        plain = Contraction("whole", 1, *target.native, 1)
        whole_ = self._dense(tensors, target.native) + tensors["left"] @ tensors["right"]
        scaled = rescale(plain, {"whole": whole_}, "whole", target)["whole"]
        size = torch.linalg.norm(whole_)
        factor = float((scaled * whole_.conj()).real.sum() / size**2) if size > 0 else 1.0
        return {name: t if name == "right" else t * factor for name, t in tensors.items()}

    def _size(self, target: Target, tensors: Mapping[str, Tensor]) -> float:
        rest = target.weight - self._dense(tensors, target.native) - tensors["left"] @ tensors["right"]
        return float(torch.linalg.norm(rest)) ** 2

    def _blocks(self, matrix: Tensor) -> dict[str, Tensor]:
        """The entries of a matrix where the blocks are."""
        p, q = matrix.shape[0] // self.blocks, matrix.shape[1] // self.blocks
        grid = matrix.reshape(self.blocks, p, self.blocks, q)
        rows = torch.arange(self.blocks)
        found = {"diagonal": grid[rows, :, rows]}
        for level in range(whole(self.strides)):
            found[f"stride{level}"] = grid[rows, :, rows ^ (1 << level)]
        return {name: blocks.contiguous() for name, blocks in found.items()}

    def _dense(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The block sparse part written out."""
        p, q = shape[0] // self.blocks, shape[1] // self.blocks
        grid = tensors["diagonal"].new_zeros(self.blocks, p, self.blocks, q)
        rows = torch.arange(self.blocks)
        grid[rows, :, rows] = tensors["diagonal"]
        for level in range(whole(self.strides)):
            grid[rows, :, rows ^ (1 << level)] = tensors[f"stride{level}"]
        return grid.reshape(shape)

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Blocks on a grid of 2 to 64 with the neighbours of one stride, two thirds of the budget at most."""
        found = False
        for blocks in (64, 32, 16, 8, 4, 2):
            if blocks > max(shape) or (blocks > 16 and 16 * blocks > max(shape)):
                continue
            native = cls(blocks).native_shape(shape)
            held = 2 * native[0] * native[1] // blocks
            rank = largest_fitting(lambda r, n=native: r * sum(n), budget - held, min(shape)) if held < budget else 0
            if rank and (not found or 3 * held <= 2 * budget):
                found = True
                yield cls(blocks, 1, rank)


_PROGRESS = 1e-4


def _subspace(matrix: Tensor, right: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Left and right factors near a matrix by subspace iteration from a row space; no step is worse."""
    rank, left = right.shape[0], matrix[:, :0]
    for _ in range(steps):
        left = torch.linalg.qr(matrix @ right.mH).Q
        right = left.mH @ matrix
    return left[:, :rank].contiguous(), right.contiguous()

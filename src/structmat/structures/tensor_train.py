"""Tensor trains: matrices whose entries are products of small matrices, one for each digit of the row and column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import even_factors
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


@final
@dataclass(frozen=True)
class TensorTrain(Structure):
    """Matrix in tensor-train format: with row digits ``i_k < m_k`` and column digits ``j_k < n_k``,
    ``W[i, j] = core0[:, i_0, j_0, :] core1[:, i_1, j_1, :] ...``.

    Core k is (r_k, m_k, n_k, r_(k+1)), with the inner ranks at most ``rank`` (less where the sizes allow no more) and 1
    at both ends: ``sum of r_k m_k n_k r_(k+1)`` parameters. Each core is one contraction that reads the same weights in
    all groups, from the last to the first, and no axes are ever permuted. The parameters are few, the multiply-adds
    many: a high rank costs more operations than a dense matrix. Two cores are a sum of ``rank`` Kronecker products.

    Projection: with two cores and no padding one truncated SVD, optimal; otherwise successive truncated SVDs, within
    ``sqrt(cores - 1)`` of the best (Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 2011), followed by
    alternating least squares. The lower bound is the largest tail of an unfolding.

    Args:
        rank: at most, of every interface; an integer of at least 1, or a fraction of the dense parameter count. Or a
            tuple, one an interface.
        cores: how many, at least 2.
        out_factors: (m_0, m_1, ...); chosen as even as possible where not given.
        in_factors: (n_0, n_1, ...); likewise.
    """

    weighs_outputs: ClassVar[bool] = True

    rank: int | float | tuple[int, ...] = 4
    cores: int = 3
    out_factors: tuple[int, ...] | None = None
    in_factors: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_count(self, "cores", self.cores, minimum=2)
        if isinstance(self.rank, tuple):
            if len(self.rank) != self.cores - 1:
                raise StructureError(
                    f"TensorTrain(rank={self.rank!r}): {self.cores} cores have {self.cores - 1} interfaces. Give one "
                    "rank an interface, or one for all."
                )
            for rank in self.rank:
                check_count(self, "rank", rank)
        else:
            check_size(self, "rank", self.rank)
        for name, factors in (("out_factors", self.out_factors), ("in_factors", self.in_factors)):
            if factors is None:
                continue
            if len(factors) != self.cores:
                raise StructureError(
                    f"TensorTrain({name}={factors!r}): these are {len(factors)} factors for {self.cores} cores. "
                    "Give one factor a core."
                )
            for factor in factors:
                check_count(self, name, factor)

    def resolve(self, shape: Shape) -> Self:
        rows, columns = self.out_factors, self.in_factors
        if rows is None:
            rows = even_factors(shape[0], self.cores)
        if columns is None:
            columns = even_factors(shape[1], self.cores)
        return replace(self, out_factors=rows, in_factors=columns)

    def restriction(self, shape: Shape) -> str | None:
        rows, columns = self._factors
        if math.prod(rows) < shape[0] or math.prod(columns) < shape[1]:
            return (
                f"its factors make a matrix of shape {(math.prod(rows), math.prod(columns))}. "
                "Use larger factors, or leave them out."
            )
        largest = max(_limits(rows, columns))
        if isinstance(self.rank, tuple):
            limits = tuple(_limits(rows, columns))
            if any(rank > limit for rank, limit in zip(self.rank, limits, strict=True)):
                return f"the ranks of its interfaces are at most {limits}. Use these or lower ones."
        elif isinstance(self.rank, int) and self.rank > largest:
            return f"the ranks of its interfaces are at most {largest}. Use rank={largest} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        rows, columns = self._factors
        return math.prod(rows), math.prod(columns)

    @property
    def _factors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert self.out_factors is not None, f"unresolved {self}"
        assert self.in_factors is not None, f"unresolved {self}"
        return self.out_factors, self.in_factors

    @property
    def _shapes(self) -> list[tuple[int, int, int, int]]:
        rows, columns = self._factors
        limits = _limits(rows, columns)
        own = self.rank if isinstance(self.rank, tuple) else [whole(self.rank)] * len(limits)
        ranks = [1, *(min(rank, limit) for rank, limit in zip(own, limits, strict=True)), 1]
        return [(ranks[k], rows[k], columns[k], ranks[k + 1]) for k in range(self.cores)]

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        specs = {}
        for k, core in enumerate(self._shapes):
            gain = DENSE_GAIN if k == 0 else 1.0
            specs[f"core{k}"] = ParameterSpec(core, Normal((gain / (core[2] * core[3])) ** 0.5))
        return specs

    def program(self, shape: Shape) -> Program:
        rows, columns = self._factors
        stages = []
        for k in reversed(range(self.cores)):
            left, m, n, right = self._shapes[k]
            # what comes in is (j_0 .. j_(k-1); j_k, rank; i_(k+1) ..), what goes out (j_0 .. j_(k-1); rank, i_k; ..)
            before, after = math.prod(columns[:k]), math.prod(rows[k + 1 :])
            stages.append(Contraction(f"core{k}", before, left * m, n * right, after, before > 1, after > 1))
        return Chain(tuple(stages))

    def project(self, target: Target) -> Fit:
        rows, columns = self._factors
        ranks = [core[3] for core in self._shapes[:-1]]
        cores = _truncate(_digits(target.weight, rows, columns), ranks)
        tensors = {
            f"core{k}": core.reshape(shape) for k, (core, shape) in enumerate(zip(cores, self._shapes, strict=True))
        }
        bound = _lower_bound(target, rows, columns, ranks)
        weighted = target.second_moment is not None or target.output_moment is not None
        if self.cores == 2 and not weighted and not target.is_padded:
            return Fit(tensors, Certificate.OPTIMAL, bound, "truncated SVD of the rearranged matrix")
        program = self.program(target.native)
        tensors = refine(program, rescale(program, tensors, "core0", target), target, target.sweeps)
        certificate = Certificate.BOUND if bound > 0 or not weighted else Certificate.NONE
        return Fit(tensors, certificate, bound, "successive truncated SVDs, alternating least squares")

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        """Three cores with the largest rank that fits; two are among the sums of Kronecker products."""
        smallest = cls(1).resolve(shape)
        most = max(_limits(*smallest._factors))

        def size(rank: int) -> int:
            return sum(math.prod(core) for core in replace(smallest, rank=rank)._shapes)

        rank = largest_fitting(size, budget, most)
        if rank:
            yield cls(rank).resolve(shape)


def _limits(rows: tuple[int, ...], columns: tuple[int, ...]) -> list[int]:
    """The largest rank that each inner interface can have."""
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def _digits(matrix: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """A matrix as a tensor with one axis a core, of size ``m_k * n_k``."""
    count = len(rows)
    order = [axis for k in range(count) for axis in (k, count + k)]
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    return matrix.reshape(*rows, *columns).permute(order).reshape(sizes)


def _truncate(tensor: Tensor, ranks: list[int]) -> list[Tensor]:
    """Successive truncated SVDs from the first core to the last: (r_k, size, r_(k+1)) each."""
    cores, rest, left = [], tensor, 1
    for k, rank in enumerate(ranks):
        u, s, vh = torch.linalg.svd(rest.reshape(left * tensor.shape[k], -1), full_matrices=False)
        kept = min(rank, s.shape[0])
        core, rest = u[:, :kept], s[:kept, None] * vh[:kept]
        if kept < rank:
            core = torch.nn.functional.pad(core, (0, rank - kept))
            rest = torch.nn.functional.pad(rest, (0, 0, 0, rank - kept))
        cores.append(core.reshape(left, tensor.shape[k], rank))
        left = rank
    return [*cores, rest.reshape(left, tensor.shape[-1], 1)]


def _lower_bound(target: Target, rows: tuple[int, ...], columns: tuple[int, ...], ranks: list[int]) -> float:
    """No member is nearer than the largest tail of an unfolding.

    Under padding the unfoldings are those of the largest leading part that is made of whole digits (elsewhere what a
    member does in the padding may lower its rank). In a weighted norm the error is at least the root of the smallest
    eigenvalue of each moment times the plain one.
    """
    inner_rows, inner_columns = math.prod(rows[1:]), math.prod(columns[1:])
    top, left = target.shape[0] // inner_rows, target.shape[1] // inner_columns
    if top == 0 or left == 0:
        return 0.0
    box = target.weight[: top * inner_rows, : left * inner_columns]
    tensor = _digits(box, (top, *rows[1:]), (left, *columns[1:]))
    worst = 0.0
    for k, rank in enumerate(ranks, 1):
        values = torch.linalg.svdvals(tensor.reshape(math.prod(tensor.shape[:k]), -1))
        worst = max(worst, float(torch.linalg.norm(values[rank:])))
    height, width = target.shape
    if (inputs := target.second_moment) is not None:
        worst *= target.input_fact(("smallest", width), lambda: _smallest(inputs[:width, :width])) ** 0.5
    if (outputs := target.output_moment) is not None:
        worst *= target.output_fact(("smallest", height), lambda: _smallest(outputs[:height, :height])) ** 0.5
    return worst


def _smallest(moment: Tensor) -> float:
    """The smallest eigenvalue, less its rounding."""
    values = torch.linalg.eigvalsh(moment)
    return max(0.0, float(values[0] - 1e-12 * values[-1]))

"""Butterfly matrices whose permutation is learned too: the BP models of the study of fast algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.chains import OrthogonalBlocks
from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Derived, Permute, Program, Reorder, Sum
from structmat.program.derived import Mixing
from structmat.program.fixed import EvensFirst, HalfReversed, Order, index_of
from structmat.projection.chain import fit_chain
from structmat.projection.kaleidoscope import kaleidoscope_patterns
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern, power_of_two, smallest_chain, smooth_size
from structmat.structure import DENSE_GAIN, Normal, ParameterSpec, Shape, Structure, check_count
from structmat.structures.permuted_butterfly import PermutedButterfly
from structmat.structures.product import Product

_CERTAIN = 40.0


@final
@dataclass(frozen=True)
class RelaxedButterfly(Structure):
    """``(B P)^depth``: butterflies, each after a permutation that is learned by gradient.

    The permutation is relaxed: in blocks of n, n / 2, ..., 4 three steps are taken with a probability each, the sigmoid
    of a logit: evens before odds, the first half backwards, the second half backwards. ``logits0`` (levels, 3), or
    (1, 3) where levels share them, and ``factor0_0``, ``factor0_1``, ... belong to the first pair, which is applied
    first. :meth:`harden` rounds the probabilities and leaves a :class:`PermutedButterfly` (a product of them for more
    depth); :meth:`penalty` is the sum of ``p (1 - p)``. In complex dtypes the factors are complex and the logits' real
    parts count; ``RealPart(RelaxedButterfly())`` has complex factors in a real layer, as for cosine transforms.

    Projection: the best of the usual permutations for depth 1 (see :class:`PermutedButterfly`), with logits of
    certainty; then alternating least squares for the factors. Monotone, no certificate.
    Source: Dao et al., "Learning fast algorithms for linear transforms using butterfly factorizations" (ICML 2019).

    Args:
        depth: how many pairs: 1 for BP (Fourier, Hadamard), 2 for BPBP (convolutions).
        shared: the levels share their three logits, which is enough for the bit reversal.
        twice: the level of the whole vector comes twice (BPP), which cosine and sine transforms need; not with
            ``shared``.
    """

    keeps_variance: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    depth: int = 1
    shared: bool = False
    twice: bool = False

    def __post_init__(self) -> None:
        check_count(self, "depth", self.depth)
        if self.shared and self.twice:
            raise StructureError("RelaxedButterfly(shared=True, twice=True): shared levels have no second first one.")

    def native_shape(self, shape: Shape) -> Shape:
        size = power_of_two(max(shape))
        return size, size

    def _patterns(self, size: int) -> tuple[Pattern, ...]:
        patterns = kaleidoscope_patterns(size, 1)
        return patterns[len(patterns) // 2 :]

    def _blocks(self, size: int) -> list[int]:
        """The size of the blocks of each level."""
        blocks = [size >> level for level in range(size.bit_length() - 2)]
        return blocks[:1] * self.twice + blocks

    def _levels(self, size: int) -> int:
        return len(self._blocks(size))

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        size, found = shape[0], {}
        patterns, levels = self._patterns(size), self._levels(size)
        gain = DENSE_GAIN ** (0.5 / (len(patterns) * self.depth))
        for pair in range(self.depth):
            if levels:
                found[f"logits{pair}"] = ParameterSpec((1 if self.shared else levels, 3), Normal(1.0))
            for i, pattern in enumerate(patterns):
                found[f"factor{pair}_{i}"] = ParameterSpec(pattern, OrthogonalBlocks(gain))
        return found

    def program(self, shape: Shape) -> Program:
        size, steps = shape[0], []
        for pair in range(self.depth):
            steps += self._relaxed(size, f"logits{pair}")
            steps += [Contraction(f"factor{pair}_{i}", *p) for i, p in enumerate(self._patterns(size))]
        return Chain(tuple(steps))

    def _relaxed(self, size: int, name: str) -> list[Program]:
        steps: list[Program] = []
        entries = 3 if self.shared else 3 * self._levels(size)
        for level, block in enumerate(self._blocks(size)):
            for number, order in enumerate(_generators(size, block)):
                entry = number if self.shared else 3 * level + number
                keep, move = (
                    Derived(Contraction(name, size, 1, 1, 1, shared_a=True), Mixing(other, entry, entries))
                    for other in (True, False)
                )
                steps.append(Sum((Chain((Reorder(order), move)), keep)))
        return steps

    def _decided(self, size: int, logits: Tensor | None) -> Tensor:
        """The permutation (n,) of the rounded probabilities."""
        found = torch.arange(size)
        for level, block in enumerate(self._blocks(size)):
            assert logits is not None, "there are logits from 4 on"
            row = logits[0 if self.shared else level]
            for number, order in enumerate(_generators(size, block)):
                value = row[number]
                if float(value.real if value.is_complex() else value) > 0:
                    found = found[index_of(Reorder(order))]
        return found

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        """Butterflies after the permutations of the rounded probabilities."""
        native = self.native_shape(shape)
        size = native[0]
        patterns = self._patterns(size)
        usual = (smooth_size(shape[0]), smooth_size(shape[1])) == native and smallest_chain(native) == patterns
        hard: Structure = PermutedButterfly(None if usual and self.depth == 1 else patterns)
        pairs = []
        for pair in range(self.depth):
            held = {f"factor{i}": tensors[f"factor{pair}_{i}"] for i in range(len(patterns))}
            order = self._decided(size, tensors.get(f"logits{pair}"))
            pairs.append({**held, "rows": torch.arange(size), "columns": order})
        found, structure = pairs[0], hard
        for after in pairs[1:]:
            structure = Product(hard, structure, size)
            left = {f"left_{name}": tensor for name, tensor in after.items()}
            found = {**left, **{f"right_{name}": tensor for name, tensor in found.items()}}
        return structure, found

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum of ``p (1 - p)`` over all choices: 0 where all are made."""
        logits = [tensors[name] for name in tensors if name.startswith("logits")]
        if not logits:
            return next(iter(tensors.values())).real.sum() * 0
        values = torch.cat([(t.real if t.is_complex() else t).reshape(-1) for t in logits])
        return (torch.sigmoid(values) * torch.sigmoid(-values)).sum()

    def project(self, target: Target) -> Fit:
        size, dtype = target.native[0], target.weight.dtype
        levels = self._levels(size)
        tensors: dict[str, Tensor] = {}
        for pair in range(self.depth):
            if levels:
                off = torch.full((1 if self.shared else levels, 3), -_CERTAIN, dtype=dtype)
                tensors[f"logits{pair}"] = off
            for i, (a, b, c, d) in enumerate(self._patterns(size)):
                eye = torch.eye(b, c, dtype=dtype)[None, :, :, None]
                tensors[f"factor{pair}_{i}"] = eye.expand(a, b, c, d).contiguous()
        last = self.depth - 1
        fit = PermutedButterfly(self._patterns(size)).project(target)
        order = fit.tensors["columns"]
        plain = torch.equal(fit.tensors["rows"], torch.arange(size))
        logits = self._logits_of(order, dtype) if plain else None
        if logits is None:  # no order of this kind: none at all
            fit = fit_chain(target, self._patterns(size))
        elif levels:
            tensors[f"logits{last}"] = logits
        tensors.update({f"factor{last}_{i}": fit.tensors[f"factor{i}"] for i in range(len(self._patterns(size)))})
        # With the choices made the permutations are fixed, and the factors are all that is left to fit.
        orders = {f"order{p}": self._decided(size, tensors.get(f"logits{p}")) for p in range(self.depth)}
        decided = Chain(
            tuple(
                step
                for p in range(self.depth)
                for step in (
                    Permute(f"order{p}", size),
                    *(Contraction(f"factor{p}_{i}", *pattern) for i, pattern in enumerate(self._patterns(size))),
                )
            )
        )
        held = {**{name: t for name, t in tensors.items() if name.startswith("factor")}, **orders}
        held = rescale(decided, held, f"factor{last}_0", target)
        if self.depth > 1 or target.second_moment is not None or target.output_moment is not None:
            held = refine(decided, held, target, target.sweeps)
        tensors |= {name: t for name, t in held.items() if name.startswith("factor")}
        return Fit(tensors, Certificate.NONE, 0.0, f"{fit.method}; alternating least squares")

    def _logits_of(self, order: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Certain logits, the same at all levels, whose permutation is the given one."""
        size = len(order)
        for number in range(8):
            signs = torch.tensor([[1.0 if number & bit else -1.0 for bit in (4, 2, 1)]], dtype=dtype) * _CERTAIN
            logits = signs if self.shared else signs.repeat(self._levels(size), 1)
            if self.twice:
                logits[:1] = -_CERTAIN
            if torch.equal(self._decided(size, logits), order):
                return logits
        return None

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        candidate = cls()
        if sum(spec.numel for spec in candidate.parameters(candidate.native_shape(shape)).values()) <= budget:
            yield candidate


def _generators(size: int, block: int) -> tuple[Order, Order, Order]:
    return EvensFirst(size, block), HalfReversed(size, block), HalfReversed(size, block, second=True)

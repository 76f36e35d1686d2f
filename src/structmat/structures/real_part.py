"""The real part of a complex structured matrix: real transforms by complex algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.matrix import StructuredMatrix
from structmat.program import Chain, Crop, Pad, Permute, Program, Reorder, build, simplify
from structmat.program.pairs import is_supported, on_pairs
from structmat.projection.project import fit
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import Init, ParameterSpec, Shape, Structure, allows_complex, count_stored, resolve
from structmat.structures.parts import scaled_specs
from structmat.structures.permuted_butterfly import PermutedButterfly


@dataclass(frozen=True)
class _Split:
    """A complex tensor as a real one with a last axis of 2."""

    init: Init

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        drawn = self.init.draw(shape[:-1], generator=generator, dtype=wide, device=device)
        return torch.view_as_real(drawn.resolve_conj()).to(dtype)


@final
@dataclass(frozen=True)
class RealPart(Structure):
    """``W = Re(S)`` for a complex member ``S`` of another structure, in real arithmetic throughout.

    Cosine, sine and Hartley transforms of every size are ``RealPart(PermutedButterfly(...))``, convolutions
    ``RealPart(Kaleidoscope(...))``. The tensors are those of the structure, each with a last axis of 2 (real and
    imaginary part): twice its parameters, 4 real products and 2 sums for one complex product. Layers are real.

    Projection: the imaginary part is free, so that of the present member is taken, and the complex matrix projected, in
    turn; then alternating least squares. Monotone, no certificate.

    Args:
        structure: one whose program has contractions, diagonals and permutations, and allows complex tensors.
    """

    supports_complex: ClassVar[bool] = False
    by_default: ClassVar[bool] = False

    structure: Structure

    def __post_init__(self) -> None:
        given: object = self.structure
        if not isinstance(given, Structure):
            raise StructureError(f"RealPart({given!r}): give a structure, for example RealPart(Butterfly()).")
        if not allows_complex(self.structure):
            raise StructureError(f"{self}: the tensors of {self.structure} are real already. Use it by itself.")

    def resolve(self, shape: Shape) -> RealPart:
        return RealPart(resolve(self.structure, shape))

    def restriction(self, shape: Shape) -> str | None:
        reason = self.structure.restriction(shape)
        if reason is None and not is_supported(build(self.structure, shape)):
            return f"{self.structure} has a stage without a complex form. Use a chain of contractions and diagonals."
        return reason

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        found = {}
        # The real part has half of the variance of a complex member.
        for name, spec in scaled_specs(self.structure, shape, 2**0.5).items():
            found[name] = ParameterSpec((*spec.shape, 2), _Split(spec.init)) if spec.learned else spec
        return found

    def program(self, shape: Shape) -> Program:
        core = build(self.structure, shape)
        steps = core.steps if isinstance(core, Chain) else (core,)
        first, last = 0, len(steps)
        while first < last - 1 and isinstance(steps[first], Permute | Reorder):  # of real values
            first += 1
        while last > first + 1 and isinstance(steps[last - 1], Permute | Reorder):
            last -= 1
        inner = simplify(on_pairs(Chain(steps[first:last])))
        into, out = steps[first].in_features, steps[last - 1].out_features
        return Chain((*steps[:first], Pad(into, 2 * into), inner, Crop(2 * out, out), *steps[last:]))

    def project(self, target: Target) -> Fit:
        wide = target.weight.to(torch.complex128)
        moments = [None if m is None else m.to(torch.complex128) for m in (target.second_moment, target.output_moment)]
        inner = Target(wide, moments[0], target.shape, target.sweeps, target.seed, moments[1])
        best = fit(self.structure, inner)
        best_error, member = self._error(target, best)
        for _ in range(target.sweeps if not any(m is not None for m in moments) else 0):
            other = fit(self.structure, inner.replace_weight(torch.complex(target.weight, member.imag)))
            error, moved = self._error(target, other)
            if not error < best_error * (1 - _PROGRESS):
                break
            best, best_error, member = other, error, moved
        program = self.program(target.native)
        tensors = {n: torch.view_as_real(t).clone() if t.is_complex() else t for n, t in best.tensors.items()}
        if type(self.structure).closed_under_scaling:
            scaled = next(name for name, tensor in best.tensors.items() if tensor.is_complex())
            tensors = rescale(program, tensors, scaled, target)
        tensors = refine(program, tensors, target, target.sweeps)
        return Fit(tensors, Certificate.NONE, 0.0, "complex projections with a free imaginary part, least squares")

    def _error(self, target: Target, found: Fit) -> tuple[float, Tensor]:
        member = StructuredMatrix(self.structure, target.native, found.tensors).to_dense()
        return target.error(member.real), member

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        candidate = cls(PermutedButterfly())
        if count_stored(candidate, shape) <= budget:
            yield candidate


_PROGRESS = 1e-4
"""The projections end when one lowers the error by less than this share."""

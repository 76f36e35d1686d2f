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
from structmat.program.pairs import is_supported, on_pairs, real_tensors
from structmat.program.scaling import scaling_cut
from structmat.projection.project import fit
from structmat.projection.refine import refine, rescale
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import Init, ParameterSpec, Shape, Structure, allows_complex, count_stored, resolve, specs
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
        found, real = {}, real_tensors(build(self.structure, shape))
        # The real part has half of the variance of a complex member.
        for name, spec in scaled_specs(self.structure, shape, 2**0.5).items():
            is_split = spec.learned and name not in real
            found[name] = ParameterSpec((*spec.shape, 2), _Split(spec.init)) if is_split else spec
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
        best, quick = fit(self.structure, inner), inner.replace_sweeps(min(1, target.sweeps))
        best_error, member = self._error(target, best)
        for _ in range(target.sweeps if not any(m is not None for m in moments) else 0):
            other = fit(self.structure, quick.replace_weight(torch.complex(target.weight, member.imag)))
            error, moved = self._error(target, other)
            if not error < best_error * (1 - _PROGRESS):
                break
            best, best_error, member = other, error, moved
        program = self.program(target.native)
        tensors = self._split(target.native, best.tensors)
        if type(self.structure).closed_under_scaling:
            scaled = scaling_cut(program)
            if scaled is not None and len(scaled) == 1:
                tensors = rescale(program, tensors, next(iter(scaled)), target)
        tensors = refine(program, tensors, target, target.sweeps)
        return Fit(tensors, Certificate.NONE, 0.0, "complex projections with a free imaginary part, least squares")

    def _split(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a complex member as this structure has them."""
        real = real_tensors(build(self.structure, shape))
        found = {}
        for name, tensor in tensors.items():
            if tensor.is_complex():
                tensor = tensor.real.clone() if name in real else torch.view_as_real(tensor.resolve_conj()).clone()
            found[name] = tensor
        return found

    def _joined(self, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """The tensors of the complex member."""
        known = specs(self.structure, shape)
        return {
            name: torch.view_as_complex(t.contiguous())
            if t.is_floating_point() and t.dim() > len(known[name].shape)
            else t
            for name, t in tensors.items()
        }

    def harden(self, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Structure, Mapping[str, Tensor]]:
        """The real part of the complex member that is hardened."""
        inner, found = self.structure.harden(shape, self._joined(tensors, shape))
        other = RealPart(inner)
        return other, other._split(inner.native_shape(shape), found)

    def penalty(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.structure.penalty(shape, self._joined(tensors, shape))

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

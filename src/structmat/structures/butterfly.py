"""Butterfly matrices: chains of the smallest factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from structmat.chains import chain_parameters, chain_program, chain_size
from structmat.program import Program
from structmat.projection.chain import fit_chain
from structmat.projection.target import Fit, Target
from structmat.sizes import smallest_chain, smooth_size
from structmat.structure import ParameterSpec, Shape, Structure


@final
@dataclass(frozen=True)
class Butterfly(Structure):
    """The butterfly matrix of a shape: the chain with the fewest parameters, no size between two factors outside the
    range from in to out.

    A square power of two has ``log2 n`` factors of 2 x 2 blocks in order of increasing stride 1, 2, .., n / 2: the
    class B of Dao et al., ``2 n log2 n`` parameters and multiply-adds. Other sizes get mixed radices (768 = 3 * 2^8),
    after padding to a number without prime factors above 5. ``factor0`` is applied first. The initial factors are
    orthogonal, so that products of many are well conditioned.

    Projection: hierarchical factorization, then block coordinate descent, with a lower bound; exact for members.
    Source: Dao et al., "Learning fast algorithms for linear transforms using butterfly factorizations" (ICML 2019);
    Zheng et al., "Butterfly factorization with error guarantees" (SIMAX 2025).
    """

    weighs_outputs: ClassVar[bool] = True

    def native_shape(self, shape: Shape) -> Shape:
        return smooth_size(shape[0]), smooth_size(shape[1])

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        return chain_parameters(smallest_chain(shape))

    def program(self, shape: Shape) -> Program:
        return chain_program(smallest_chain(shape))

    def project(self, target: Target) -> Fit:
        return fit_chain(target, smallest_chain(target.native))

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        if chain_size(smallest_chain(cls().native_shape(shape))) <= budget:
            yield cls()

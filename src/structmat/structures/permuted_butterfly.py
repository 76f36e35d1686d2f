"""Butterfly matrices between two fixed permutations: the form of the classical fast transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch

from structmat.chains import chain_parameters, chain_program, chain_shape, chain_size
from structmat.program import Chain as ChainProgram
from structmat.program import Permute, Program
from structmat.projection.chain import EXACTLY, fit_chain
from structmat.projection.hierarchical import dense_product
from structmat.projection.orders import Orders, find_orders
from structmat.projection.target import Certificate, Fit, Target
from structmat.sizes import Pattern, smallest_chain, smooth_size
from structmat.structure import Arange, ParameterSpec, Shape, Structure
from structmat.structures.chain import Chain


@final
@dataclass(frozen=True)
class PermutedButterfly(Structure):
    """``W = P B Q``: a butterfly matrix ``B`` between permutations of outputs and inputs.

    The discrete Fourier transform of any size is one (its inputs in the order of reversed digits), and so are the
    Hadamard matrix in every usual order and the Haar wavelet. ``factor0``, ``factor1``, ... as of :class:`Butterfly`;
    ``rows`` (out,) and ``columns`` (in,) are fixed integers: output ``i`` is output ``rows[i]`` of the butterfly, whose
    input ``i`` is input ``columns[i]``. Files hold them: ``out + in`` numbers more than a butterfly.

    Projection: the usual permutations are tried on samples of the matrix (see :mod:`structmat.projection.orders`), and
    the most promising ones fitted as :class:`Butterfly` is. No certificate: there are too many permutations.
    Source: Dao et al. (ICML 2019); Le, Zheng, Riccietti, Gribonval (ICASSP 2022).

    Args:
        patterns: of the factors, in order of application, as of :class:`Chain`; those of :class:`Butterfly` if None.
    """

    by_default: ClassVar[bool] = False
    weighs_outputs: ClassVar[bool] = True

    patterns: tuple[Pattern, ...] | None = None

    def __post_init__(self) -> None:
        Chain(self.patterns)  # refuses what is no chain

    def _chain(self, shape: Shape) -> tuple[Pattern, ...]:
        return smallest_chain(shape) if self.patterns is None else self.patterns

    def restriction(self, shape: Shape) -> str | None:
        return None if self.patterns is None else Chain(self.patterns).restriction(shape)

    def native_shape(self, shape: Shape) -> Shape:
        if self.patterns is not None:
            return chain_shape(self.patterns)
        return smooth_size(shape[0]), smooth_size(shape[1])

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        found = dict(chain_parameters(self._chain(shape)))
        found["rows"] = ParameterSpec((shape[0],), Arange(), learned=False, dtype=torch.int64)
        found["columns"] = ParameterSpec((shape[1],), Arange(), learned=False, dtype=torch.int64)
        return found

    def program(self, shape: Shape) -> Program:
        inner = chain_program(self._chain(shape))
        return ChainProgram((Permute("columns", shape[1]), inner, Permute("rows", shape[0])))

    def project(self, target: Target) -> Fit:
        patterns = self._chain(target.native)
        candidates = find_orders(target.weight, patterns, seed=target.seed)
        if target.is_padded:  # after a permutation padding would lie anywhere
            candidates = [orders for orders in candidates if orders.is_plain]
        found = [(orders, fit_chain(_arranged(target, orders), patterns)) for orders in candidates[:1]]
        if found[0][1].method != EXACTLY:
            found += [(orders, fit_chain(_arranged(target, orders), patterns)) for orders in candidates[1:]]
        orders, fit = (
            min(found, key=lambda pair: self._error(target, pair[0], pair[1], patterns)) if len(found) > 1 else found[0]
        )
        # W[rows][:, columns] is the butterfly, so that its row i is row rows[i] of W.
        tensors = {**fit.tensors, "rows": torch.argsort(orders.rows), "columns": orders.columns}
        method = f"{fit.method}; rows in {orders.row_name}, columns in {orders.column_name} order"
        return Fit(tensors, Certificate.NONE, 0.0, method, fit.error)

    def _error(self, target: Target, orders: Orders, fit: Fit, patterns: tuple[Pattern, ...]) -> float:
        factors = [fit.tensors[f"factor{i}"] for i in range(len(patterns))]
        return _arranged(target, orders).error(dense_product(factors, patterns))

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        native = cls().native_shape(shape)
        if chain_size(smallest_chain(native)) + sum(native) <= budget:
            yield cls()


def _arranged(target: Target, orders: Orders) -> Target:
    """The problem of the butterfly between two permutations."""
    if orders.is_plain:
        return target
    moments = (target.second_moment, orders.columns), (target.output_moment, orders.rows)
    inputs, outputs = (None if moment is None else moment[order][:, order] for moment, order in moments)
    weight = target.weight[orders.rows[:, None], orders.columns]
    return Target(weight, inputs, target.native, target.sweeps, target.seed, outputs)

"""Sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor

from structmat.errors import StructureError
from structmat.program import Chain, Contraction, Program, Shuffle
from structmat.projection import canonical
from structmat.projection.kronecker import (
    Pairs,
    application_order,
    balanced_pairs,
    degrees_of_freedom,
    factor_pairs,
    fill_padding,
    is_affordable,
    nearest_terms,
    observed,
    padded_factors,
    rearrange,
    restore,
    separable_start,
    unfolding_bound,
    weighted_descent,
)
from structmat.projection.target import Certificate, Fit, Target
from structmat.structure import (
    DENSE_GAIN,
    ParameterSpec,
    Shape,
    Structure,
    check_size,
    largest_fitting,
    whole,
)


@dataclass(frozen=True)
class Orthogonal:
    """Semi-orthogonal matrices that keep the mean square of a random vector, times ``gain``.

    The tensor holds one matrix (rows, columns) a term; ``axes`` are the positions of term, row and column. Norms are
    kept exactly by tall and square matrices, on average by wide ones, so products scatter less than Gaussian ones.
    """

    gain: float
    axes: tuple[int, int, int]

    def draw(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        terms, rows, columns = (shape[axis] for axis in self.axes)
        wide = torch.promote_types(dtype, torch.float32)
        q, r = torch.linalg.qr(
            torch.randn(terms, max(rows, columns), min(rows, columns), generator=generator, dtype=wide)
        )
        q = q * r.diagonal(dim1=-2, dim2=-1).sgn()[:, None]  # makes the distribution uniform (Mezzadri 2007)
        matrices = (q if rows >= columns else q.mT) * (self.gain * max(1.0, rows / columns) ** 0.5)
        where = [self.axes.index(i) for i in range(3)]
        result: Tensor = matrices.permute(where).contiguous().to(dtype=dtype, device=device)
        return result


@final
@dataclass(frozen=True)
class Kronecker(Structure):
    """``W = sum over t of A0_t (x) A1_t (x) ...``, vectors flattened row-major.

    Tensors ``factor0``, ``factor1``, ... hold the factors ``(m_i, n_i)`` of all terms with a term axis, in the layout
    of the stages (:func:`factor_matrices` gives them as (terms, m_i, n_i)). ``terms * sum(m_i n_i)`` parameters. The
    factors are applied one axis at a time, in the order with the fewest operations; no Kronecker product is formed.
    Sizes without even factors, such as primes, are padded. Projection: for two factors the truncated SVD of the
    rearranged matrix, optimal (Van Loan and Pitsianis 1993); in an activation-weighted norm alternating least squares
    from the separable solution; for more factors greedy deflation and alternating least squares.

    Args:
        terms: how many products are added: an integer of at least 1, or a fraction of the dense parameter count.
        factors: how many factors each has, their sizes chosen for the shape; or the sizes as pairs ``(m_i, n_i)``.
    """

    terms: int | float = 2
    factors: int | tuple[tuple[int, int], ...] = 2

    def __post_init__(self) -> None:
        check_size(self, "terms", self.terms)
        given: object = self.factors
        if isinstance(given, int) and not isinstance(given, bool) and given >= 2:
            return
        pairs = given if isinstance(given, tuple) else ()
        fine = len(pairs) >= 2 and all(
            isinstance(p, tuple) and len(p) == 2 and all(isinstance(n, int) and n >= 1 for n in p) for p in pairs
        )
        if not fine:
            raise StructureError(
                f"Kronecker(factors={given!r}): factors is a number of at least 2, or a tuple of at least two pairs "
                "(m, n), such as factors=((16, 32), (32, 16))."
            )

    def resolve(self, shape: Shape) -> Kronecker:
        if isinstance(self.factors, int):
            return replace(self, factors=balanced_pairs(shape, self.factors))
        return self

    @property
    def pairs(self) -> Pairs:
        """Sizes of the factors of a resolved structure."""
        assert isinstance(self.factors, tuple), f"unresolved factors {self.factors}"
        return self.factors

    def restriction(self, shape: Shape) -> str | None:
        if isinstance(self.factors, int):
            return None
        outputs, inputs = math.prod(m for m, _ in self.factors), math.prod(n for _, n in self.factors)
        if outputs < shape[0] or inputs < shape[1]:
            return (
                f"its factors {self.factors} multiply to {outputs} x {inputs}. "
                "Use factors whose sizes multiply to at least the shape, or factors=2 to have them chosen."
            )
        sizes = [m * n for m, n in self.factors]
        most = math.prod(sizes) // max(sizes)
        if isinstance(self.terms, int) and self.terms > most:
            return f"{most} terms already give every matrix. Use terms={most} or less."
        return None

    def native_shape(self, shape: Shape) -> Shape:
        return (math.prod(m for m, _ in self.pairs), math.prod(n for _, n in self.pairs))

    def parameters(self, shape: Shape) -> Mapping[str, ParameterSpec]:
        terms, count = whole(self.terms), len(self.pairs)
        gain = (DENSE_GAIN / terms) ** (0.5 / count)
        specs = {}
        for index, (m, n) in enumerate(self.pairs):
            axes = _layout(self, index)
            sizes = [0, 0, 0]
            for axis, size in zip(axes, (terms, m, n), strict=True):
                sizes[axis] = size
            specs[f"factor{index}"] = ParameterSpec((sizes[0], sizes[1], sizes[2]), Orthogonal(gain, axes))
        return specs

    def program(self, shape: Shape) -> Program:
        return lowered(whole(self.terms), self.pairs, application_order(self.pairs))

    def project(self, target: Target) -> Fit:
        if len(self.pairs) > 2:
            return self._project_many(target)
        terms, pairs = whole(self.terms), self.pairs
        if target.second_moment is None:
            a, b, tail = nearest_terms(target.weight, pairs, terms)
            if not target.is_padded:
                return Fit(self._tensors([a, b]), Certificate.OPTIMAL, tail, "SVD of the rearranged matrix")
            a, b = fill_padding(target, pairs, a, b, target.sweeps)
            return self._bounded([a, b], unfolding_bound(target, pairs, terms), "SVD with free padding")
        a, b, bound = separable_start(target, pairs, terms)
        other = nearest_terms(target.weight, pairs, terms)[:2]
        starts = [(a, b), other]
        if target.sweeps == 0:
            best = min(starts, key=lambda ab: target.error(restore(ab[0].T @ ab[1], pairs)))
            return self._bounded(list(best), bound, "separable weight")
        if not is_affordable(pairs, terms):
            best = min(starts, key=lambda ab: target.error(restore(ab[0].T @ ab[1], pairs)))
            factors = canonical.descend(
                rearrange(target.weight, pairs), list(best), _norm(target, pairs), target.sweeps
            )
            return self._bounded(factors, bound, "alternating conjugate gradients")
        quick = max(1, target.sweeps // 4)
        trials = [weighted_descent(target, pairs, *start, quick) for start in starts]
        a, b, _ = min(trials, key=lambda trial: trial[2])
        a, b, _ = weighted_descent(target, pairs, a, b, target.sweeps - quick)
        return self._bounded([a, b], bound, "weighted alternating least squares")

    def _project_many(self, target: Target) -> Fit:
        terms, pairs = whole(self.terms), self.pairs
        tensor = rearrange(target.weight, pairs)
        deflation = target.weight_fact(("deflation", pairs), lambda: canonical.Deflation(tensor))
        factors = canonical.decompose(tensor, terms, target.sweeps, target.generator(), deflation)
        if target.second_moment is not None or target.is_padded:
            factors = canonical.descend(tensor, factors, _norm(target, pairs), target.sweeps)
        bound = unfolding_bound(target, pairs, terms)
        if target.second_moment is not None:
            bound *= _smallest_eigenvalue(target) ** 0.5
        return self._bounded(factors, bound, "greedy deflation, alternating least squares")

    def _bounded(self, factors: list[Tensor], bound: float, method: str) -> Fit:
        certificate = Certificate.BOUND if bound > 0 else Certificate.NONE
        return Fit(self._tensors(factors), certificate, bound, method)

    def _tensors(self, factors: list[Tensor]) -> dict[str, Tensor]:
        """From stacked flattened factors (terms, m_i n_i) to the stored layout, balanced."""
        tensors = {}
        for index, factor in enumerate(canonical.balance(factors)):
            axes = _layout(self, index)
            canonical_form = factor.reshape(-1, *self.pairs[index])
            tensors[f"factor{index}"] = canonical_form.permute([axes.index(i) for i in range(3)]).contiguous()
        return tensors

    @classmethod
    def configurations(cls, shape: Shape, budget: int) -> Iterator[Self]:
        options: dict[Pairs, int] = {}
        for pairs in _pair_choices(shape):
            terms = _most_terms(pairs, budget)
            if terms:
                options[pairs] = terms
        even = [p for p in options if min(n for pair in p for n in pair) > 1 and _unevenness(p) <= _MOST_UNEVEN]
        ranked = sorted(even or options, key=lambda p: (-degrees_of_freedom(p, options[p]), _unevenness(p)))
        chosen = list(dict.fromkeys([*(p for p in [balanced_pairs(shape, 2)] if p in options), *ranked[:1]]))
        for pairs in chosen:
            yield cls(options[pairs], pairs)
        if min(shape) >= 64:
            pairs = balanced_pairs(shape, 3)
            terms = _most_terms(pairs, budget)
            if 0 < terms <= 16:  # many terms of three factors take long to fit and never came out best
                yield cls(terms, pairs)


def factor_matrices(structure: Kronecker, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The factors of a resolved :class:`Kronecker` as matrices (terms, m_i, n_i), views of its tensors.

    ``W = sum over t of kron(factors[0][t], factors[1][t], ...)``.
    """
    return tuple(tensors[f"factor{i}"].permute(_layout(structure, i)) for i in range(len(structure.pairs)))


def _layout(structure: Kronecker, index: int) -> tuple[int, int, int]:
    return stored_axes(whole(structure.terms), application_order(structure.pairs), index)


def stored_axes(terms: int, order: tuple[int, ...], index: int) -> tuple[int, int, int]:
    """Positions of the axes (term, row, column) in a stored factor: such that every stage reads a plain view.

    Args:
        terms: how many products are added.
        order: in which the factors are applied.
        index: of the factor.
    """
    if len(order) > 2:  # stages (terms, m, n, ..), the last one (1, m, terms n, ..)
        return (1, 0, 2) if terms != 1 and index == order[-1] else (0, 1, 2)
    if order == (0, 1):  # (1, m k, n, p) and (m, q, k p, 1)
        return (1, 0, 2)
    return (2, 0, 1) if index == 0 else (0, 1, 2)  # (n, k q, p, 1), then (1, m, n k, q)


def lowered(terms: int, pairs: Pairs, order: tuple[int, ...]) -> Chain:
    """The stages that apply a sum of products, one contraction a factor, in the given order.

    Tensors are called ``factor0``, ``factor1``, ... and stored as :func:`stored_axes` says.
    """
    if len(pairs) == 2:
        return _two_factors(terms, pairs, order)
    return _one_term(pairs, order) if terms == 1 else _many_terms(terms, pairs, order)


def _two_factors(terms: int, pairs: Pairs, order: tuple[int, ...]) -> Chain:
    (m, n), (q, p) = pairs
    if order == (0, 1):
        return Chain(
            (
                Contraction("factor0", 1, m * terms, n, p, shared_d=True),
                Contraction("factor1", m, q, terms * p, 1, shared_a=True),
            )
        )
    return Chain(
        (
            Contraction("factor1", n, terms * q, p, 1, shared_a=True),
            Contraction("factor0", 1, m, n * terms, q, shared_d=True),
        )
    )


def _one_term(pairs: Pairs, order: tuple[int, ...]) -> Chain:
    sizes = [n for _, n in pairs]
    steps = []
    for i in order:
        m, n = pairs[i]
        before, after = math.prod(sizes[:i]), math.prod(sizes[i + 1 :])
        steps.append(Contraction(f"factor{i}", before, m, n, after, shared_a=True, shared_d=True))
        sizes[i] = m
    return Chain(tuple(steps))


def _many_terms(terms: int, pairs: Pairs, order: tuple[int, ...]) -> Chain:
    """The contracted axis stays in front, beside the axis of the terms; what was made moves to the end."""
    count = len(pairs)
    steps: list[Program] = [Shuffle(tuple(n for _, n in pairs), order)]
    waiting = [pairs[i][1] for i in order]
    done: list[int] = []
    for place, i in enumerate(order):
        m, n = pairs[i]
        rest = math.prod(waiting[1:]) * math.prod(done)
        name = f"factor{i}"
        if place == 0:
            steps.append(Contraction(name, 1, terms * m, n, rest, shared_d=True))
        elif place < count - 1:
            steps.append(Contraction(name, terms, m, n, rest, shared_d=True))
        else:
            steps.append(Contraction(name, 1, m, terms * n, rest, shared_d=True))
            break
        steps.append(Shuffle((terms, m, rest), (0, 2, 1)))
        waiting.pop(0)
        done.append(m)
    # Now (m of the last, m of the first, m of the second, ...).
    made = [order[-1], *order[:-1]]
    steps.append(Shuffle(tuple(pairs[i][0] for i in made), tuple(made.index(i) for i in range(count))))
    return Chain(tuple(steps))


def _norm(target: Target, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    mask = observed(target)

    def norm(tensor: Tensor) -> Tensor:
        matrix = restore(tensor, pairs)
        if mask is not None:
            matrix = matrix * mask
        return rearrange(matrix if target.second_moment is None else matrix @ target.second_moment, pairs)

    return norm


def _smallest_eigenvalue(target: Target) -> float:
    assert target.second_moment is not None
    used = target.second_moment[: target.shape[1], : target.shape[1]]
    values = torch.linalg.eigvalsh(used)
    return max(0.0, float(values[0]) - 1e-13 * len(values) * float(values[-1]))


def _pair_choices(shape: Shape) -> list[Pairs]:
    """Two-factor sizes worth considering: all factorings of the (padded) sizes."""
    outputs, inputs = (math.prod(padded_factors(size, 2)) for size in shape)
    return [((m, n), (q, p)) for m, q in factor_pairs(outputs) for n, p in factor_pairs(inputs)]


def _most_terms(pairs: Pairs, budget: int) -> int:
    sizes = [m * n for m, n in pairs]
    return largest_fitting(lambda k: k * sum(sizes), budget, math.prod(sizes) // max(sizes))


_MOST_UNEVEN = 16
"""Proposed factors have sizes of at most this ratio: more uneven ones come near low rank, and take long to fit."""


def _unevenness(pairs: Pairs) -> float:
    sizes = [n for pair in pairs for n in pair]
    return max(sizes) / min(sizes)

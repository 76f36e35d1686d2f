"""Norms that weigh outputs: low rank exactly, other families by descent."""

from __future__ import annotations

import itertools

import pytest
import torch

import structmat as sm
from structmat.projection.project import make_target
from structmat.projection.target import Certificate

SHAPE = (12, 18)


def problem(rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, a second moment of inputs and one of outputs (of a given rank)."""
    generator = torch.Generator().manual_seed(0)
    weight, x, g = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in (SHAPE, (18, 40), (12, rank or 40))
    )
    x *= torch.linspace(0.1, 2.0, 18)[:, None]
    return weight, x @ x.T / 40, g @ g.T / 40


def error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """Straight from the definition."""
    d = weight - found
    size = torch.trace(outputs @ weight @ inputs @ weight.T)
    return float((torch.trace(outputs @ d @ inputs @ d.T) / size).clamp(min=0) ** 0.5)


@pytest.mark.parametrize("kind", [sm.LowRank, sm.PivotedLowRank])
@pytest.mark.parametrize("singular", [None, 5])
def test_low_rank_is_optimal_in_both_norms_at_once(kind: type, singular: int | None) -> None:
    weight, inputs, outputs = problem(singular)
    found = sm.project(weight, kind(3), second_moment=inputs, output_moment=outputs)
    assert found.certificate is Certificate.OPTIMAL
    target = make_target(weight, inputs, output_moment=outputs)
    values = torch.linalg.svdvals(target.whitened)
    best = float(values[3:].square().sum().sqrt() / values.square().sum().sqrt())
    assert found.error == pytest.approx(best, rel=1e-6)
    assert error(weight, found.matrix.to_dense(), inputs, outputs) == pytest.approx(best, rel=1e-6)
    one_sided = sm.project(weight, kind(3), second_moment=inputs).matrix.to_dense()
    assert best < error(weight, one_sided, inputs, outputs)


@pytest.mark.parametrize("structure", [sm.BlockDiagonal(3), sm.BlockDiagonal(5), sm.BLAST(2, 2)], ids=str)
def test_descent_never_ends_worse_and_more_sweeps_help(structure: sm.Structure) -> None:
    weight, inputs, outputs = problem()
    found = [
        sm.project(weight, structure, second_moment=inputs, output_moment=outputs, sweeps=sweeps)
        for sweeps in (0, 1, 20)
    ]
    for projection in found:
        dense = projection.matrix.to_dense()
        assert projection.error == pytest.approx(error(weight, dense, inputs, outputs), rel=1e-6)
    assert found[0].error >= found[1].error >= found[2].error
    assert found[2].error < found[0].error
    assert found[2].certificate is not Certificate.OPTIMAL


def test_block_diagonal_descent_reaches_the_least_squares_solution() -> None:
    weight, inputs, outputs = problem()
    found = sm.project(weight, sm.BlockDiagonal(3), second_moment=inputs, output_moment=outputs, sweeps=100)
    support = torch.block_diag(*(torch.ones(4, 6, dtype=torch.float64) for _ in range(3))).reshape(-1).bool()
    system = torch.kron(outputs, inputs)[support][:, support]
    wanted = (outputs @ weight @ inputs).reshape(-1)[support]
    exact = torch.zeros(12 * 18, dtype=torch.float64)
    exact[support] = torch.linalg.solve(system, wanted)
    best = error(weight, exact.reshape(SHAPE), inputs, outputs)
    assert found.error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("singular", [None, 5])
def test_sparse_fits_weigh_outputs(singular: int | None) -> None:
    """Values are those of least squares on the support, whose choice is no worse than one that ignores outputs."""
    weight, inputs, outputs = problem(singular)
    found = sm.project(weight, sm.Sparse(nonzeros=60), second_moment=inputs, output_moment=outputs)
    places = found.matrix.tensors["places"]
    system = torch.kron(outputs, inputs)[places][:, places]
    wanted = (outputs @ weight @ inputs).reshape(-1)[places]
    exact = torch.zeros(12 * 18, dtype=torch.float64)
    exact[places] = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0]
    best = error(weight, exact.reshape(SHAPE), inputs, outputs)
    assert best * (1 - 1e-6) <= found.error <= best * 1.01
    one_sided = sm.project(weight, sm.Sparse(nonzeros=60), second_moment=inputs).matrix.to_dense()
    assert found.error < error(weight, one_sided, inputs, outputs)


def test_sparse_bounds_hold_where_outputs_weigh() -> None:
    """Against the best of all supports of two entries."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        weight, x, g = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 3), (3, 9), (2, 7)))
        inputs, outputs = x @ x.T / 9, g @ g.T / 7
        system, wanted = torch.kron(outputs, inputs), (outputs @ weight @ inputs).reshape(-1)
        errors = []
        for places in itertools.combinations(range(6), 2):
            chosen = torch.tensor(places)
            member = torch.zeros(6, dtype=torch.float64)
            member[chosen] = torch.linalg.solve(system[chosen][:, chosen], wanted[chosen])
            errors.append(error(weight, member.reshape(2, 3), inputs, outputs))
        found = sm.project(weight, sm.Sparse(nonzeros=2), second_moment=inputs, output_moment=outputs)
        assert 0 < found.lower_bound <= min(errors) * (1 + 1e-9) <= found.error * (1 + 2e-9)
        assert found.certificate is Certificate.BOUND

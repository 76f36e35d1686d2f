"""Close contenders are fitted in earnest before the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from compression_models import candidate, labelled, mlp

import structmat as sm
from structmat.compression import contest as module
from structmat.compression.allocate import allocate
from structmat.compression.calibrate import calibrate
from structmat.compression.candidates import EXPECTED, Candidate, LayerScreen
from structmat.compression.contest import MOST, NEAR, Outcome, contenders, contest, improved
from structmat.compression.norms import damped
from structmat.compression.scan import scan
from structmat.compression.screen import screen
from structmat.compression.workfolder import WorkFolder

FAMILIES = ("PivotedLowRank", "BLAST", "Sparse")


def layer(*others: Candidate) -> LayerScreen:
    low = [candidate(sm.LowRank(r), 100.0 * r, 1.0 / r**2, "optimal") for r in range(1, 9)]
    keep = candidate(sm.Dense(), 1000.0, 0.0, "optimal")
    return LayerScreen("x", (20, 50), "weights", tuple(sorted((*low, *others, keep), key=lambda c: c.cost)), {})


def test_contenders_are_near_in_loss_and_in_cost() -> None:
    reached = 1.0 / 16  # of low rank at a cost of 400
    close = candidate(sm.BLAST(2, 3), 400.0, 1.3 * reached)
    closer = candidate(sm.BLAST(4, 3), 420.0, 1.1 * reached)
    worse = candidate(sm.Monarch(2, 2), 400.0, 1.4 * reached)
    small = candidate(sm.Sparse(nonzeros=20), 40.0, 1.0)
    found = layer(close, closer, worse, small)
    chosen = next(c for c in found.candidates if c.structure == sm.LowRank(4))
    assert contenders(found, chosen) == [closer]  # of each family the nearest
    many = [candidate(s, 400.0, reached) for s in (sm.BLAST(2, 3), sm.Monarch(2, 2), sm.Butterfly(), sm.TensorTrain(2))]
    assert len(contenders(layer(*many), chosen)) == MOST


def test_what_was_gained_is_expected_of_like_candidates() -> None:
    fought, like, far, other = (
        candidate(sm.BLAST(2, 3), 300.0, 0.2),
        candidate(sm.BLAST(4, 3), 300.0 * NEAR, 0.1),
        candidate(sm.BLAST(4, 9), 300.0 * NEAR + 1, 0.05),
        candidate(sm.Monarch(2, 2), 300.0, 0.3),
    )
    after = candidate(sm.BLAST(2, 3), 300.0, 0.1)
    found = improved(layer(fought, like, far, other), [Outcome(fought, after, 0.4)])
    losses = {c.structure: c.loss for c in found.candidates}
    assert losses[fought.structure] == 0.1
    assert losses[like.structure] == pytest.approx(0.05)
    assert (losses[far.structure], losses[other.structure]) == (0.05, 0.3)
    marked = [c.structure for c in found.candidates if c.method.endswith(EXPECTED)]
    assert marked == [like.structure]
    assert [c.cost for c in found.candidates] == sorted(c.cost for c in found.candidates)


def test_losses_become_those_of_final_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp(), labelled()
    sites = scan(model).sites
    seen = calibrate(model, sites, data)
    budget = sm.Parameters(0.2)
    screening = screen(model, sites, budget, calibration=seen, structures=FAMILIES)
    fixed = {"2": next(c.structure for c in screening["2"].candidates if isinstance(c.structure, sm.BLAST))}
    allocation = allocate(screening, budget, fixed=fixed)
    options = {"calibration": seen, "fixed": fixed, "folder": WorkFolder(tmp_path)}
    better, outcomes = contest(model, sites, screening, allocation, budget, **options)
    assert outcomes["0"]
    assert "2" not in outcomes
    assert better["2"].candidates == screening["2"].candidates
    for name, fought in outcomes.items():
        weight = model.get_submodule(name).weight.detach().double()
        moments = seen.moments[name]
        assert moments.gradient_moment is not None
        inputs, outputs = damped(moments.second_moment, 1e-3), damped(moments.gradient_moment, 0.1)
        for outcome in fought:
            found = sm.project(weight, outcome.after.structure, second_moment=inputs, output_moment=outputs)
            assert outcome.after.error == pytest.approx(found.error, rel=1e-3)
            assert outcome.after.loss <= outcome.before.loss * 1.001 or outcome.before.method.endswith(EXPECTED)
            assert outcome.after in better[name].candidates

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(module, "layer_worker", refuse)
    assert contest(model, sites, screening, allocation, budget, **options) == (better, outcomes)

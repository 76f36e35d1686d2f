"""What sweeps gain at one size says at which other sizes they are worth their time."""

from __future__ import annotations

import dataclasses

import pytest
from compression_models import candidate, mlp

import structmat as sm
from structmat.compression.candidates import Candidate
from structmat.compression.scan import scan
from structmat.compression.screen import DOMINATED, LayerWorker, layer_worker


def worker(monkeypatch: pytest.MonkeyPatch, gain: float, improved: list[Candidate]) -> LayerWorker:
    """Of a layer whose fits gain so much by sweeps; those that are improved are noted."""
    model = mlp()
    made = layer_worker(model, scan(model).sites[0], sm.Parameters(0.5), None, sweeps=1, seed=0)

    def improve(before: Candidate) -> Candidate:
        improved.append(before)
        after = dataclasses.replace(before, loss=gain * before.loss)
        made.found[made.found.index(before)] = after
        return after

    monkeypatch.setattr(made, "improve", improve)
    return made


@pytest.mark.parametrize(("gain", "tried"), [(0.2, True), (0.95, False)])
def test_a_gain_at_a_larger_share_brings_a_family_into_reach(
    gain: float, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    improved: list[Candidate] = []
    made = worker(monkeypatch, gain, improved)
    low = {share: candidate(sm.LowRank(rank), 1000 * share, 1.0, "optimal") for share, rank in ((0.5, 9), (0.2, 4))}
    near = candidate(sm.Sparse(nonzeros=400), 500, 1.2)
    far = candidate(sm.Sparse(nonzeros=160), 200, 1.6 * DOMINATED)
    made.found += [*low.values(), near, far]
    made.contenders(0.5, [low[0.5], near], False)
    found = made.contenders(0.2, [low[0.2], far], False)
    assert improved == ([near, far] if tried else [near])
    assert set(found) == ({far.variant} if tried else set())

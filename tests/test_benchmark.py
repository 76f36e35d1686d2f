"""The benchmark of kernels: what is timed is what is said, and the figures follow from the times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import structmat as sm
from structmat import benchmark
from structmat.benchmark import (
    Setting,
    Work,
    every_member,
    every_setting,
    in_turns,
    members_within,
    ratios,
    read_result,
    run_setting,
    run_settings,
    telling_settings,
    typical_members,
)
from structmat.errors import FormatError, StructureError
from structmat.kernels import tuning
from structmat.structure import count_stored


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "ROW_SECONDS", 1e-5)
    yield
    torch.set_num_threads(threads)
    tuning.forget()


@pytest.mark.parametrize("work", Work)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_setting(work: Work, dtype: str) -> None:
    setting = Setting((64, 48), 5, dtype, work, 1)
    structures = [sm.LowRank(8), sm.Sparse(density=0.1), sm.Diagonal()]
    result = run_setting(setting, structures, 0.0)
    assert Setting.from_json(result["setting"]) == setting
    for row, structure in zip(result["layers"], structures, strict=True):
        assert row["family"] == type(structure).__name__
        expected = {"dense", "auto"} if work is Work.TUNED else {"dense", "auto", "reference", "native"}
        assert row["microseconds"].keys() >= expected - {"native"}
        assert row["dense_by"]["dense"] == row["dense_by_first"]["dense"] == 1
        floor, times = row["floor"], row["microseconds"]
        least = max(floor["memory"], floor["operations"]) + floor["call"]
        assert row["efficiency"] == pytest.approx(least / times["auto"])
        passes = 1 / row["operations_ratio"]
        assert floor["operations"] == pytest.approx(passes * times["dense"])
    low = result["layers"][0]
    assert low["stored"] == 8 * (64 + 48)
    assert low["operations_ratio"] == pytest.approx(2 * 64 * 48 / (2 * 8 * (64 + 48)), rel=0.1)


@pytest.mark.parametrize("work", Work)
def test_both_layers_compute_what_is_said(work: Work) -> None:
    """The structured layer gives the product of its dense matrix, and as many gradients as it has parameters."""
    setting, generator = Setting((24, 16), 5, "float32", work, 1), torch.Generator().manual_seed(0)
    layer = sm.nn.StructuredLinear(16, 24, False, structure=sm.LowRank(3), generator=generator)
    x, weight = torch.randn(5, 16), layer.matrix.to_dense().detach().clone()
    dense, structured = benchmark._works(setting, layer, weight, x, generator)
    if work is Work.TRAINING:
        assert [g.shape for g in dense()] == [x.shape, weight.shape]
        own = structured()
        assert [g.shape for g in own] == [x.shape, *(p.shape for p in layer.parameters())]
        torch.testing.assert_close(own[0], dense()[0])
        return
    one, two = dense(), structured()
    torch.testing.assert_close(one if one.shape == (5, 24) else one.T, x @ weight.T)
    torch.testing.assert_close(two if two.shape == (5, 24) else two.T, x @ weight.T)
    if work is Work.REUSED:
        assert dense().data_ptr() == structured().data_ptr(), "both write to the same memory"


def test_what_is_slow_takes_part_in_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, dict.fromkeys(("dense", "slow", "quick"), 0)

    def working(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            calls[name] += 1
            now += seconds

        return run

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now))
    runs = {"dense": working("dense", 0.002), "slow": working("slow", 0.02), "quick": working("quick", 0.001)}
    firsts, times = in_turns(runs, 0.05)
    assert {name: len(found) for name, found in times.items()} == {"dense": 7, "slow": 3, "quick": 7}
    assert {name: len(found) for name, found in firsts.items()} == {"dense": 7, "slow": 3, "quick": 7}
    assert calls["slow"] == 2 + 3 * 2
    assert ratios(times) == pytest.approx({"dense": 1, "slow": 0.1, "quick": 2})
    assert len(in_turns(runs, 1.0)[1]["dense"]) > 7, "turns go on for so many seconds"


def test_results_are_kept_and_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [Setting((8, 8), batch, "float32", Work.FORWARD, 1) for batch in (1, 2, 3)]
    ran: list[int] = []

    def alone(setting: Setting, structures: object, seconds: float) -> dict[str, object]:
        if setting.batch == 2 and len(ran) < 2:
            ran.append(0)
            raise KeyboardInterrupt
        ran.append(setting.batch)
        return {"setting": setting.to_json(), "layers": []}

    monkeypatch.setattr(benchmark, "_alone", alone)

    def run(again: bool = False) -> list[int]:
        found = run_settings(settings, typical_members, folder=tmp_path / "new", again=again)
        return [result["setting"]["batch"] for result in found]

    with pytest.raises(KeyboardInterrupt):
        run()
    assert run() == [1, 2, 3]
    assert ran == [1, 0, 2, 3]
    assert run(again=True) == [1, 2, 3]
    assert ran == [1, 0, 2, 3, 1, 2, 3]
    (tmp_path / "bad.json").write_text('{"setting": {}}')
    with pytest.raises(FormatError, match="no result"):
        read_result(tmp_path / "bad.json")


def test_the_settings_are_those_that_must_be_measured() -> None:
    everything = every_setting()
    assert len(everything) == len(set(everything)) == len({setting.key for setting in everything})
    assert everything[: len(telling_settings())] == telling_settings()
    shapes = [(n, n) for n in (512, 1024, 2048, 4096, 8192)] + [(768, 3072), (3072, 768), (4096, 11008), (11008, 4096)]
    axes = (shapes, (1, 16, 64, 256, 2048), ("float32", "bfloat16"), (Work.FORWARD, Work.TRAINING))
    for shape, batch, dtype, work in itertools.product(*axes):
        for threads in benchmark.all_threads():
            assert Setting(shape, batch, dtype, work, threads) in everything
    assert {s.work for s in telling_settings()} == set(Work)


def test_every_family_is_measured() -> None:
    for shape in ((1024, 1024), (768, 3072)):
        names = {type(member).__name__ for member in every_member(shape)}
        square = {"OrthogonalButterfly", "Permutation", "SoftPermutation"}  # which know no rectangles
        assert names == sm.families().keys() - {"Dense"} - (square if shape[0] != shape[1] else set())
        assert every_member(shape)[: len(typical_members(shape))] == typical_members(shape)
    assert {type(member) for member in members_within((64, 64), 0.2, ["LowRank", "Monarch"])} == {
        sm.LowRank,
        sm.Monarch,
    }
    for member in members_within((64, 64), 0.2):
        assert count_stored(member, (64, 64)) <= 0.2 * 64 * 64
    with pytest.raises(StructureError, match="Magic"):
        members_within((64, 64), 0.2, ["Magic"])

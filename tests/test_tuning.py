"""Choosing backends by measurement: what is measured, kept, found again and used."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compression import sweeps
from structmat.errors import ModelError
from structmat.kernels import native, tuning
from structmat.kernels.choice import native_rows

needs_native = pytest.mark.skipif(not native().available, reason="there is no native library")
Way = tuning.Way


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of its own for each test, and nothing known at its begin or left at its end."""
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path / "cache"))
    tuning._table.cache_clear()
    tuning.generation += 1
    yield tmp_path / "cache" / "tuned.json"
    tuning._table.cache_clear()
    tuning.generation += 1


def times_of(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[int]:
    """Let measurements find these times, in the order reference, native, dense; returns how many layers each had."""
    tried: list[int] = []

    def found(
        runs: Mapping[Way, Sequence[Callable[[], object]]],
        _: float,
        prepare: Callable[[Way], None],
        rest: torch.Tensor,
        own: tuple[float, ...] = seconds,
    ) -> dict[Way, list[list[float]]]:
        for way, calls in runs.items():
            tried.append(len(calls))
            prepare(way)
            for call in calls:
                call()
        return {way: [[t]] * len(calls) for (way, calls), t in zip(runs.items(), own, strict=False)}

    monkeypatch.setattr(sweeps, "timed", found)
    return tried


def net(bias: bool = True) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    structures = (sm.Monarch(4, rank=2), sm.Monarch(4, rank=2), sm.Sparse(density=0.1))
    layers = [sm.nn.StructuredLinear(64, 64, bias, structure=s, generator=generator) for s in structures]
    return nn.Sequential(*layers)


@needs_native
def test_the_measured_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    program = model[0].program
    assert 32 in native_rows(program, torch.float32)
    tried = times_of(monkeypatch, 1e-6, 2e-6)
    found = sm.tune(model, [32])
    assert tried == [3, 3], "all layers, in every way"
    assert [(layer.name, layer.chosen) for layer in found.layers] == [(n, Way.REFERENCE) for n in "012"]
    assert found.layers[0].microseconds == {Way.REFERENCE: pytest.approx(1.0), Way.NATIVE: pytest.approx(2.0)}
    assert found.dense_bytes == 0
    assert "reference" in str(found)
    assert 32 not in native_rows(program, torch.float32)
    assert 50 not in native_rows(program, torch.float32), "within a factor of 2"
    assert 100 in native_rows(program, torch.float32), "beyond, the cost model decides"
    assert 32 in native_rows(program, torch.float64)
    with torch.no_grad():
        slow = model(x)
        times_of(monkeypatch, 2e-6, 1e-6)
        sm.tune(model, [32], again=True)
        assert 32 in native_rows(program, torch.float32)
        torch.testing.assert_close(model(x), slow)


@needs_native
def test_a_layer_really_takes_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = importlib.import_module("structmat.kernels.quick")

    layer, x = net()[0], torch.randn(32, 64)
    calls: list[int] = []
    run = quick.run_rows
    monkeypatch.setattr(quick, "run_rows", lambda *given: calls.append(1) or run(*given))
    for faster, expected in (("reference", 0), ("native", 1)):
        times_of(monkeypatch, *((1e-6, 2e-6) if faster == "reference" else (2e-6, 1e-6)))
        sm.tune(layer, [32], again=True)
        calls.clear()
        with torch.no_grad():
            layer(x)
        assert len(calls) == expected


@needs_native
def test_every_way_is_really_run_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = importlib.import_module("structmat.kernels.quick")

    layer = sm.freeze(net())[0]
    calls: list[int] = []
    run = quick.run_rows
    monkeypatch.setattr(quick, "run_rows", lambda *given: calls.append(1) or run(*given))
    counts = []

    def found(
        runs: Mapping[Way, Sequence[Callable[[], object]]], _: float, prepare: Callable[[Way], None], rest: torch.Tensor
    ) -> dict[Way, list[list[float]]]:
        for way, (run,) in runs.items():
            prepare(way)
            calls.clear()
            run()
            counts.append(len(calls))
        return {way: [[1e-6]] for way in runs}

    monkeypatch.setattr(sweeps, "timed", found)
    sm.tune(layer, [16], allow_dense=True)
    assert counts == [0, 1, 0]


@needs_native
def test_measurements_are_kept_in_a_file_and_found_again(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    tried = times_of(monkeypatch, 1e-6, 2e-6)
    sm.tune(net(), [1, 32])
    assert len(tried) == 4
    data = json.loads(own_file.read_text())
    assert data["format"] == tuning.FORMAT
    assert list(data["machines"]) == [tuning.machine()]
    assert not [f for f in own_file.parent.iterdir() if f != own_file], "no draft is left"
    tuning._table.cache_clear()  # as another process would begin
    tuning.generation += 1
    assert 32 not in native_rows(net()[0].program, torch.float32)
    sm.tune(net(), [1, 32])
    assert len(tried) == 4, "what is known is not measured again"
    sm.tune(net(), [1, 32], again=True)
    assert len(tried) == 8
    tuning.forget()
    assert 32 in native_rows(net()[0].program, torch.float32)
    assert json.loads(own_file.read_text())["machines"] == {tuning.machine(): {}}


@needs_native
def test_other_machines_and_thread_counts_do_not_count(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    times_of(monkeypatch, 1e-6, 2e-6)
    sm.tune(net(), [32])
    data = json.loads(own_file.read_text())
    data["machines"]["another"] = data["machines"].pop(tuning.machine())
    own_file.write_text(json.dumps(data))
    tuning._table.cache_clear()
    tuning.generation += 1
    program = net()[0].program
    assert 32 in native_rows(program, torch.float32)
    sm.tune(net(), [32])
    assert set(json.loads(own_file.read_text())["machines"]) == {"another", tuning.machine()}
    assert 32 not in native_rows(program, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert 32 in native_rows(program, torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "machines": []}'])
def test_a_file_that_can_not_be_read_is_as_good_as_none(own_file: Path, content: str) -> None:
    own_file.parent.mkdir(parents=True)
    own_file.write_text(content)
    tuning._table.cache_clear()
    assert tuning.known() == {}
    tuning.note("p float32", {1: {Way.NATIVE: 1.0, Way.REFERENCE: 2.0}})
    assert tuning.machine() in json.loads(own_file.read_text())["machines"]


def test_a_bad_entry_does_not_spoil_the_others(own_file: Path) -> None:
    tuning.note("good", {1: {Way.NATIVE: 1.0, Way.REFERENCE: 2.0}})
    data = json.loads(own_file.read_text())
    data["machines"][tuning.machine()]["bad"] = {"2": {"1": {"abacus": 1.0}}}
    own_file.write_text(json.dumps(data))
    tuning._table.cache_clear()
    assert {name for name, _ in tuning.known()} == {"good"}


def test_a_folder_that_can_not_be_written_is_a_warning(own_file: Path) -> None:
    own_file.parent.write_text("a file in the way")
    with pytest.warns(UserWarning, match="can't be kept"):
        tuning.note("p float32", {1: {Way.NATIVE: 1.0, Way.REFERENCE: 2.0}})
    assert tuning.best("p float32", 1, tuple(Way)) is Way.NATIVE


@needs_native
def test_frozen_layers_hold_the_dense_matrix_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sm.freeze(net())
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    before = model(x)
    names = set(model.state_dict())
    times_of(monkeypatch, 3e-6, 2e-6, 1e-6)
    found = sm.tune(model, [32], allow_dense=True)
    assert [layer.chosen for layer in found.layers] == [Way.DENSE] * 3
    assert found.dense_bytes == 3 * 64 * 64 * 4
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model(x[:1]), before[:1])
    frozen = model[0]
    frozen.dense.zero_()
    assert torch.equal(frozen(x), frozen.bias.expand(32, 64)), "32 rows multiply the dense matrix"
    assert not torch.equal(frozen(x[:1]), frozen.bias.expand(1, 64)), "one row does not"
    times_of(monkeypatch, 3e-6, 1e-6, 2e-6)
    found = sm.tune(model, [32], allow_dense=True, again=True)
    assert [layer.chosen for layer in found.layers] == [Way.NATIVE] * 3
    assert found.dense_bytes == 0
    assert all(layer.dense is None for layer in model)


@needs_native
def test_the_states_of_recurrent_layers_are_timed_for_the_sequences_of_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            structure = sm.LowRank(4)
            self.lstm = sm.nn.StructuredLSTM(16, 16, 2, batch_first=True, structure=structure)
            self.out = sm.nn.StructuredLinear(16, 16, structure=structure)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(x)[0])

    model = sm.freeze(Last())
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x)
    times_of(monkeypatch, 3e-6, 2e-6, 1e-6)
    found = sm.tune(model, [60], allow_dense=True, example=x)
    rows = {layer.name: layer.rows for layer in found.layers}
    assert rows == {"lstm.ih_l0": 60, "lstm.hh_l0": 3, "lstm.ih_l1": 60, "lstm.hh_l1": 3, "out": 60}
    states = [layer for layer in found.layers if ".hh_" in layer.name]
    assert all(Way.REFERENCE not in layer.microseconds for layer in states), "all times are one native call"
    assert all(layer.chosen is Way.DENSE for layer in found.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
        model.lstm.hh_l0.dense.zero_()
        assert not torch.allclose(model(x), before), "three sequences multiply the dense matrix"
        apart = torch.cat([model(x[:1].repeat(9, 1, 1))[:1], model(x[1:2].repeat(9, 1, 1))[:1]])
    torch.testing.assert_close(apart, before[:2], msg="nine do not")
    times_of(monkeypatch, 1e-6, 2e-6, 3e-6)
    found = sm.tune(model, [60], allow_dense=True, example=x, again=True)
    assert all((layer.chosen is Way.NATIVE) == (".hh_" in layer.name) for layer in found.layers)
    assert found.dense_bytes == 0


def test_dense_is_not_used_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    times_of(monkeypatch, 3e-6, 2e-6, 1e-6)
    sm.tune(sm.freeze(net()), [32], allow_dense=True)
    model = sm.freeze(net())
    found = sm.tune(model, [32])
    assert all(layer.chosen is not Way.DENSE for layer in found.layers)
    assert all(layer.dense is None for layer in model)


def test_real_measurements_choose_the_fastest() -> None:
    model = sm.freeze(net())
    found = sm.tune(model, [1, 8], allow_dense=True, seconds=0.01)
    assert len(found.layers) == 6
    for layer in found.layers:
        assert all(t > 0 for t in layer.microseconds.values())
        assert layer.chosen is tuning.fastest(layer.microseconds)
    x = torch.randn(8, 64)
    torch.testing.assert_close(model(x), sm.to_dense(net())(x), atol=1e-5, rtol=1e-5)


def test_bad_requests_say_what_is_wrong() -> None:
    with pytest.raises(ModelError, match="at least 1"):
        sm.tune(net(), [0, 4])
    with pytest.raises(ModelError, match="at least 1"):
        sm.tune(net(), [])
    with pytest.raises(ModelError, match="no structured layer"):
        sm.tune(nn.Linear(3, 3), [1])
    with pytest.raises(ModelError, match="freeze"):
        sm.tune(net(), [1], allow_dense=True)


def test_the_dense_matrix_must_be_clearly_faster() -> None:
    reference, native_, dense = tuning.Way.REFERENCE, tuning.Way.NATIVE, tuning.Way.DENSE
    assert tuning.fastest({reference: 3.0, native_: 2.0}) is native_
    assert tuning.fastest({reference: 3.0, native_: 2.0, dense: 1.95}) is native_
    assert tuning.fastest({reference: 3.0, native_: 2.0, dense: 1.8}) is dense
    assert tuning.fastest({dense: 1.0}) is dense

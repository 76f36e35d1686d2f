"""The studies of ``benchmarks``: every one can be started, and their tables can be written before anything has run."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import types
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from structmat.compression.recover import Optimizer, recover

benchmarks = pytest.importorskip("benchmarks", reason="the folder benchmarks/ is not part of an installed package")
MODULES = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_a_study_can_be_started(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    study = getattr(module, "STUDY", None)
    if hasattr(study, "cells"):
        keys = [cell.key for cell in study.cells]
        assert len(set(keys)) == len(keys)
        assert all(isinstance(line, str) for line in study.tables({}))


def test_every_cell_of_the_trained_models_can_be_built() -> None:
    """All six models with all methods that are for them, at both budgets; and a narrower network of every kind."""
    study = importlib.import_module("benchmarks.compress_real")
    methods = importlib.import_module("benchmarks.compress_methods")
    cells = study.cells(3)
    assert len({cell.key for cell in cells}) == len(cells)
    kinds = {(c.model, c.method, c.budget) for c in cells if c.seed == 0}
    for name, real in study.MODELS.items():
        assert real.minutes <= 5 or real.includes_fitting
        assert real.batches == (1, 64)
        for method in methods.METHODS:
            budgets = {b for m, own, b in kinds if (m, own) == (name, method)}
            expected = {0.5} if method == methods.DENSE else {0.5, 0.25} if methods.applies(method, real) else set()
            assert budgets == expected
            assert len(methods.rates(method, real)) == 3
        assert {c.seed for c in cells if (c.model, c.method) == (name, methods.OURS)} == {0, 1, 2}
    assert set(study.MODELS) == {"novel-lm", "mnist-mlp", "resnet-20", "resnet-56", "g2p-gru", "char-lstm"}


def test_tables_mark_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = importlib.import_module("benchmarks.compress_cells")
    monkeypatch.setattr(cells, "STUDY_FOLDER", tmp_path / "compress_real")
    tables = importlib.import_module("benchmarks.tables")
    tables.write_tables(tmp_path / "compress_real", cells.cells(3))
    text = (tmp_path / "compress_real.md").read_text()
    assert text.count("| not run |") >= 6 * 2 * 8
    assert "Target after recovery: 91.2 %." in text
    data = json.loads((tmp_path / "compress_real.json").read_text())
    assert data["cells"] == {}
    assert len(data["not_run"]) == len(cells.cells(3))


def test_a_study_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models too: never those of a shorter run among the study's own. Processes of cells are told the same."""
    cells = importlib.import_module("benchmarks.compress_cells")
    figures, work = cells.STUDY_FOLDER, cells.WORK
    monkeypatch.setattr(cells, "STUDY_FOLDER", figures)
    monkeypatch.setattr(cells, "WORK", work)
    places = []
    for told in ((None, tmp_path / "models"), (tmp_path, None), (tmp_path, tmp_path / "models")):
        cells.place(*told)
        places.append((cells.STUDY_FOLDER, cells.WORK))
    own = tmp_path / figures.name
    assert places == [(figures, tmp_path / "models"), (own, tmp_path / "work"), (own, tmp_path / "models")]
    assert cells.placed() == ("--results", str(tmp_path), "--work", str(tmp_path / "models"))


@pytest.mark.parametrize(
    "method",
    [
        "SVD, uniform",
        "Monarch, uniform",
        "Tucker-2, uniform",
        "magnitude pruning",
        "magnitude pruning, places counted",
    ],
)
@pytest.mark.parametrize("kind", ["convolutional", "recurrent"])
def test_baselines_have_their_share(method: str, kind: str, tmp_path: Path) -> None:
    """Of networks of the studies' kinds with fresh weights, small enough for a test."""
    methods = importlib.import_module("benchmarks.compress_methods")
    nets = importlib.import_module("benchmarks.real_nets")
    torch.manual_seed(0)
    if kind == "convolutional":
        model, data = nets.ResNet(1, 8).eval(), [torch.randn(2, 3, 32, 32)]
    else:
        model, data = nets.CharLSTM(32).eval(), [torch.randint(0, 65, (2, 5))]
    real = types.SimpleNamespace(
        load=lambda: copy.deepcopy(model), calibration=lambda seed: data, forward=None, width=8
    )
    made = methods.make(method, 0.5, 0, real, tmp_path).model
    measure = importlib.import_module("benchmarks.compress_measure")
    stored = measure.deployed(method, made)
    compressible = measure.sizes(method, real, model, stored)["compressible"]
    share = compressible["compressed"]["parameters"] / compressible["original"]["parameters"]
    if "pruning" in method:  # what is stored of the places as well, if they are counted
        assert share == pytest.approx(0.5, abs=0.003)
    else:
        assert 0.3 < share <= 0.6
    with torch.no_grad():
        assert torch.isfinite(nets.logits(stored(data[0]))).all()
    if "pruning" in method:
        torch.testing.assert_close(nets.logits(stored(data[0])), nets.logits(made(data[0])), rtol=1e-3, atol=1e-4)


def test_pruned_weights_stay_zero_in_recovery() -> None:
    methods = importlib.import_module("benchmarks.compress_methods")
    nets = importlib.import_module("benchmarks.real_nets")
    torch.manual_seed(0)
    original = nets.CharLSTM(16).eval()
    real = types.SimpleNamespace(load=lambda: copy.deepcopy(original))
    pruned = methods._pruned(0.5, real, counted=False).model
    made = methods.as_sparse(pruned)
    data = [(torch.randint(0, 65, (4, 6)), torch.randint(0, 65, (4, 6))) for _ in range(2)]
    with methods.compressible(pruned) as weights:
        zeros = {name: weight == 0 for name, weight in weights.items()}

    def dense() -> dict[str, torch.Tensor]:
        return {name: made.get_submodule(name).matrix.to_dense().detach() for name in zeros}

    before = dense()
    recover(made, original, data, sm.Distill(steps=4, optimizer=Optimizer.SOAP), show=False)
    for name, weight in dense().items():
        assert not weight[zeros[name]].any()
        assert not torch.equal(weight, before[name])


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_the_narrower_network_is_the_widest_that_fits(budget: float) -> None:
    methods = importlib.import_module("benchmarks.compress_methods")
    nets = importlib.import_module("benchmarks.real_nets")
    real = types.SimpleNamespace(load=lambda: nets.CharLSTM(64), narrow=nets.CharLSTM, width=64)
    width = methods.narrow_width(real, budget)
    most = budget * methods.numbers(nets.CharLSTM(64))
    assert methods.numbers(nets.CharLSTM(width)) <= most < methods.numbers(nets.CharLSTM(width + 1))


def test_equal_networks_of_a_study_are_trained_once() -> None:
    """A family's smallest member serves several sizes; a sweep may end at the published rate; nothing else is equal."""
    study = importlib.import_module("benchmarks.kronecker_study")
    tasks = {task.name: task for task in study.TASKS}
    methods = {method.key: method for method in study.METHODS}

    def twins(task: str, method: str) -> set[tuple[str, str]]:
        return {(other.name, twin.key) for other, twin in study.twins(tasks[task], methods[method], 1)}

    assert twins("mnist swept", "Kronecker k=2") == {("mnist", "Kronecker k=2")}
    assert twins("function", "Kronecker k=2") == set()
    sizes = {("function", f"block tensor-train k={k}") for k in (1, 2, 4)}
    for size in sizes:
        assert twins(*size) == sizes - {size}


@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4))
def test_axes_are_marked_by_three_to_nine_round_numbers(low: float, width: float) -> None:
    study = importlib.import_module("benchmarks.study")
    high = low + width
    marks = study._even_numbers(low, high)
    assert 3 <= len(marks) <= 9
    slack = 1e-9 * (abs(low) + width)
    assert all(low - slack <= mark <= high + slack for mark in marks)


def test_a_model_writes_what_it_thinks_likely() -> None:
    """One that is sure of the next letter of the alphabet writes that; one that is not, each as often as it says."""
    from benchmarks.real_recurrent import FORGOTTEN, written

    class Alphabet(nn.Module):
        def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            seen = x if state is None else torch.cat([state, x], 1)
            return 100.0 * F.one_hot((x + 1) % 7, 7), seen

    rows = written(Alphabet(), torch.arange(7), 5, torch.Generator().manual_seed(0))
    assert rows.tolist() == [[(first + FORGOTTEN + 1 + i) % 7 for i in range(5)] for first in range(7)]

    class Dice(nn.Module):
        def forward(self, x: Tensor, _: None) -> tuple[Tensor, None]:
            return torch.tensor([0.1, 0.2, 0.7]).log().expand(*x.shape, 3), None

    drawn = written(Dice(), torch.zeros(2000, dtype=torch.int64), 5, torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount().double() / drawn.numel()
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), rtol=0, atol=0.02)


def test_every_other_batch_of_text_is_written_by_the_original(real_data: Path) -> None:
    from benchmarks.real_nets import char_lstm
    from benchmarks.real_recurrent import CHAR_LSTM, FORGOTTEN

    first, again = (list(islice(iter(CHAR_LSTM.training(0)), 4)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    _, text = char_lstm(real_data)
    whole = "".join(map(chr, text.tolist()))
    for number, (x, y) in enumerate(first):
        assert x.shape == (32, 128)
        assert torch.equal(x[:, FORGOTTEN + 1 :], y[:, :-1])
        found = sum("".join(map(chr, row)) in whole for row in x.tolist())
        assert found == 32 if number % 2 == 0 else found < 4


def test_words_come_once_a_pass_and_those_of_a_batch_are_alike(real_data: Path) -> None:
    from benchmarks.real_recurrent import G2P_GRU, SORTED, WORDS, _words

    lessons = list(islice(iter(G2P_GRU.training(0)), 3 * SORTED))
    assert all(len(words) == WORDS for words, _ in lessons)
    pairs = [
        (word, tuple(row[row >= 0].tolist())) for words, ids in lessons for word, row in zip(words, ids, strict=True)
    ]
    known = {(word, tuple(ids)) for word, ids in _words()[0]}
    assert set(pairs) <= known
    assert len(set(pairs)) == len(pairs)
    spread = [max(map(len, words)) - min(map(len, words)) for words, _ in lessons]
    everywhere = [len(word) for word, _ in pairs]
    assert sum(spread) / len(spread) < 0.7 * (max(everywhere) - min(everywhere))

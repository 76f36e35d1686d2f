"""Models that stand still at a layer while it is replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat.compression.running import inputs_at
from structmat.compression.sequential import Prefixes
from structmat.compression.walking import Walks


class Held(nn.Module):
    """Its forward has taken its layers before it calls any, and works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers):
            x = self.drop(layer(x).relu_().add_(x))
        return x


class Twice(nn.Module):
    """One of its layers is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(self.b(self.a(self.b(x))))
        return found


MODELS = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4)),
    "held": Held,
    "twice": Twice,
}


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def halved(layer: nn.Module) -> nn.Module:
    """Another layer in its place."""
    assert isinstance(layer, nn.Linear)
    other = nn.Linear(4, 4)
    with torch.no_grad():
        other.weight.copy_(layer.weight / 2)
    return other


def put(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, halved(getattr(owner, child)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_reads_what_a_run_from_the_beginning_gives_it(kind: str) -> None:
    model = MODELS[kind]().train()
    modes = [m.training for m in model.modules()]
    names = ["b", "a", "c"] if kind == "twice" else linears(model)
    batches = [torch.randn(5, 4) for _ in range(3)]
    before = threading.active_count()
    with Prefixes(MODELS[kind](), model, names, batches) as prefixes:
        for name in names:
            calls = 2 if name == "b" else 1
            reads = torch.cat([x for batch in batches for x in inputs_at(model.eval(), name, calls, batch, None)])
            model.train()
            found = prefixes.moments(name, calls)
            assert found is not None
            torch.testing.assert_close(
                found.second_moment[0], (reads.mT.double() @ reads.double() / len(reads)), rtol=1e-5, atol=1e-6
            )
            assert [m.training for m in model.modules()] == modes
            put(model, name)
            prefixes.replaced(name)
    assert threading.active_count() == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_each_batch_passes_once() -> None:
    """Also behind many layers, whatever is replaced meanwhile."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    names = linears(model)
    with Walks(model, names) as walks:
        walk = walks.start(torch.randn(2, 4))
        for name in names[1:]:
            assert walk.reaches(name)
            walk.inputs(name, 1)
            put(model, name)
            walks.replaced.add(name)
        assert not walk.reaches("0")
        assert not walk.passed & walks.replaced
    assert len(called) == 1


def test_walks_begin_again_behind_what_was_replaced() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with Walks(model, linears(model)) as walks:
        walk = walks.start(torch.randn(2, 4))
        walk.inputs("2", 1)
        walks.replaced.add("1")
        assert not walk.reaches("2")


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if len(x) == 3:
            raise ValueError("three rows")
        found: Tensor = self.b(x)
        return found


def test_errors_of_the_model_are_the_callers() -> None:
    model = Breaks()
    before = threading.active_count()
    with Walks(model, ["a", "b"]) as walks:
        walk = walks.start(torch.randn(3, 4))
        assert len(walk.inputs("a", 1)) == 1
        with pytest.raises(ValueError, match="three rows"):
            walk.inputs("b", 1)
        assert not walk.reaches("b")
    assert threading.active_count() == before


def test_a_layer_that_is_not_called() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with Walks(model, ["a", "b"], forward=lambda m, x: m.get_submodule("a")(x)) as walks:
        assert walks.start(torch.randn(2, 4)).inputs("b", 1) == []


def test_modes_of_the_callers_thread() -> None:
    seen: list[Any] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))
            seen.append(torch.zeros(1).device.type)
            found: Tensor = self.a(x)
            return found

    model = Looks()
    with Walks(model, ["a"]) as walks:
        with torch.autocast("cpu", torch.float16):
            walks.start(torch.randn(2, 4)).inputs("a", 1)
        walks.start(torch.randn(2, 4)).inputs("a", 1)
        with torch.device("meta"):
            walk = walks.start(torch.randn(2, 4, device="cpu"))
            walk.inputs("a", 1)
    assert seen[0] == (True, torch.float16, False)
    assert seen[2][0] is False
    assert [seen[1], seen[3], seen[5]] == ["cpu", "cpu", "meta"]


def test_more_batches_than_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structmat.compression.sequential._KEPT", 2)
    model, batches = Held(), [torch.randn(5, 4) for _ in range(6)]
    with Prefixes(Held(), model, linears(model), batches) as prefixes:
        most = 0
        for name in linears(model):
            found = prefixes.moments(name)
            assert found is not None
            most = max(most, len(prefixes._pairs))
            reads = torch.cat([x for batch in batches for x in inputs_at(model.eval(), name, 1, batch, None)]).double()
            torch.testing.assert_close(found.second_moment[0], reads.mT @ reads / len(reads), rtol=1e-5, atol=1e-6)
            put(model, name)
            prefixes.replaced(name)
    assert most == 2


def test_interrupted_work_leaves_no_thread() -> None:
    def loader() -> Iterator[Tensor]:
        yield torch.randn(5, 4)
        raise KeyboardInterrupt

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return loader()

    before = threading.active_count()
    model = Held()
    with pytest.raises(KeyboardInterrupt), Prefixes(Held(), model, linears(model), Loader()) as prefixes:
        prefixes.moments("layers.1")
    assert threading.active_count() == before

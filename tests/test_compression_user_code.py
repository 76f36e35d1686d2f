"""Models whose own code reads and calls their layers in other ways than by one positional input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import structmat as sm

FAMILIES = ["LowRank"]


def series(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(i)) for i in range(count)]


class Series(nn.Module):
    """A convolution, a recurrent net and a head, all called by name and asked for what they were made with."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 12, 3, padding=1)
        self.rnn = kind(12, 16, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert (self.conv.kernel_size, self.conv.stride, self.conv.padding) == ((3,), (1,), (1,))
        assert (self.rnn.hidden_size, self.rnn.num_layers, self.rnn.batch_first) == (16, 1, True)
        self.rnn.flatten_parameters()
        y = self.rnn(input=self.conv(input=x).mT)[0]
        logits: Tensor = self.head(input=torch.tanh(y))
        return logits


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_are_called_by_name_and_asked_for_their_options(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    result = sm.compress(
        Series(kind),
        budget=sm.Parameters(0.95),
        calibration=series(),
        overrides={"*": sm.LowRank(rank=4)},
        recover=sm.Distill(steps=2, anneal=0.5),
    )
    assert result.report.timings
    assert set(result.plan.changed) == {"conv", "rnn.ih_l0", "rnn.hh_l0", "head"}
    (x,) = series(1)
    torch.testing.assert_close(sm.freeze(result.model)(x), result.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_embedding_is_called_by_name() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(input=self.table(input=x).mean(1))
            return logits

    torch.manual_seed(0)
    data = [torch.randint(0, 40, (16, 5)) for _ in range(3)]
    result = sm.compress(
        Bag(), budget=sm.Parameters(0.5), calibration=data, structures=FAMILIES, include=("*", "table")
    )
    assert "table" in result.plan.changed
    assert torch.isfinite(sm.freeze(result.model)(data[0])).all()


class Reads(nn.Module):
    """Reads weights of its layers in other ways than as ``self.layer.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.ls = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.by_name = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
        self.looped = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.values = nn.ModuleDict({"a": nn.Linear(16, 16)})
        self.held = nn.Linear(16, 16)
        self.stack = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.rnn, self.other = nn.GRU(16, 16), nn.GRU(16, 16)
        self.attn, self.out = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
        self.plain = nn.MultiheadAttention(16, 2)
        self.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0)

    @property
    def dtype(self) -> torch.dtype:
        return self.stack[-1].weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.ls[0].weight.dtype).to(self.by_name["a"].weight).to(self.dtype)
        for _, own in enumerate(self.looped):
            x = own(x.to(own.weight.dtype))
        for own in self.values.values():
            x = own(x.to(own.weight.dtype))
        held = self.held
        x = held(x.to(held.weight.dtype))
        for layer in (*self.ls, *self.by_name.values(), *self.stack):
            x = torch.tanh(layer(x))
        x = self.rnn(x, self.rnn.weight_hh_l0.new_zeros(1, x.shape[1], 16))[0]
        x = x.to(self.attn.in_proj_weight.dtype).to(self.out.out_proj.weight.dtype)
        for attention in (self.attn, self.out, self.plain):
            x = attention(x, x, x)[0]
        y: Tensor = self.block(self.other(x)[0])
        return y


def test_layers_whose_weights_a_model_reads_are_kept_with_the_reason() -> None:
    torch.manual_seed(0)
    data = [torch.randn(5, 4, 16) for _ in range(2)]
    result = sm.compress(Reads(), budget=sm.Parameters(0.95), calibration=data, overrides={"*": sm.LowRank(rank=2)})
    reasons = {skipped["name"]: skipped["reason"] for skipped in result.report.skipped}
    read = ["ls.0", "by_name.a", "looped.0", "looped.1", "values.a", "held", "stack.0", "stack.1"]
    for name in read:  # which of a stack -1 is, is not looked for
        assert reasons[name] == "Reads reads its weight"
    assert reasons["rnn"] == "Reads reads its weight_hh_l0"
    assert reasons["attn"] == "Reads reads its in_proj_weight"
    assert reasons["out"] == "Reads reads its out_proj.weight"
    changed = {name.removesuffix("." + name.split(".")[-1]) for name in result.plan.changed}
    assert changed == {"ls", "by_name", "other", "plain", "block", "block.self_attn"}
    frozen = sm.freeze(result.model)
    torch.testing.assert_close(frozen(data[0]), result.model.eval()(data[0]), rtol=1e-4, atol=1e-5)

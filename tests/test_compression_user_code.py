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

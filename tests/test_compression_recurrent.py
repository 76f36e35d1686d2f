"""Compression and recovery of models with recurrent nets: tuples, states, packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.recover import recover
from structmat.compression.scan import scan
from structmat.compression.split import split_apart
from structmat.nn.recurrent import Recurrent


def seeded(index: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(index)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tagger(nn.Module):
    """Takes pairs of tokens and a state, and returns a tuple, as recurrent models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 9)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embedding(tokens), state)
        return self.head(y), state


@pytest.mark.parametrize("layerwise", [0, 5])
def test_models_that_return_tuples_recover(layerwise: int) -> None:
    model = Tagger()
    data = [(torch.randint(0, 9, (8, 7), generator=seeded(i)), torch.randint(0, 9, (8, 7))) for i in range(3)]
    result = sm.compress(model, budget=sm.Parameters(0.4), calibration=data, structures=["LowRank"])
    assert isinstance(result.model.lstm, sm.nn.StructuredLSTM)
    settings_ = sm.Distill(steps=25, layerwise=layerwise, learning_rate=3e-3, held_out=data, check_every=5)
    done = recover(result.model, model, data, settings_, show=False)
    assert done.objective == "divergence of the logits"
    assert done.held_out[-1][1] < 0.9 * done.held_out[0][1]
    assert isinstance(model.lstm, nn.LSTM)


def test_batches_of_several_inputs_and_packed_sequences_go_through_forward() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(6, 10, bidirectional=True), nn.Linear(20, 3)

        def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
            y, _ = self.gru(x)
            return self.head(y.data)

    model = Packed()
    data = [nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (5, 2, 4)], False) for _ in range(3)]
    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=data,
        structures=["LowRank"],
        forward=lambda m, batch: m(batch),
        recover=sm.Distill(steps=3),
    )
    assert isinstance(result.model.gru, sm.nn.StructuredGRU)
    assert result.model(data[0]).shape == (11, 3)
    found = calibrate(model, scan(model).sites, data, forward=lambda m, batch: m(batch))
    assert found.moments["gru.ih_l0"].rows == 33
    assert found.moments["gru.hh_l0_reverse"].rows == 33


def test_matrices_of_states_are_not_fitted_behind_what_they_do_themselves() -> None:
    model = Tagger()
    data = [torch.randint(0, 9, (8, 7), generator=seeded(i)) for i in range(2)]
    result = sm.compress(
        model, budget=sm.Parameters(0.5), calibration=data, overrides={"*": sm.LowRank(3)}, structures=["LowRank"]
    )
    behind = {layer.name for layer in result.report.layers if layer.norm.endswith("behind the layers before")}
    assert behind == {"head"}  # the inputs' matrix is the first


def test_split_apart_gives_the_model_back_whatever_happens() -> None:
    model = Tagger()
    lstm = model.lstm

    def fail() -> None:
        with split_apart(model):
            assert isinstance(model.lstm, Recurrent)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.lstm is lstm

"""Small models and data for the tests of recovery."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import structmat as sm
from structmat.compression.recover import distance
from structmat.compression.running import Outcome


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(self.drop(torch.relu(self.first(x))))))


def classifier() -> Classifier:
    """With random weights."""
    torch.manual_seed(0)
    return Classifier()


def student_of(original: Classifier) -> Classifier:
    """The same with two structured layers."""
    model = copy.deepcopy(original)
    model.first = sm.nn.StructuredLinear.from_linear(model.first, sm.LowRank(rank=3))
    model.second = sm.nn.StructuredLinear.from_linear(model.second, sm.BlockDiagonal(blocks=4))
    return model


def batches(count: int = 6, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 10, generator=generator), torch.arange(16) % 4) for _ in range(count)]


def far(model: nn.Module, original: nn.Module) -> float:
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(9))
    model.eval(), original.eval()
    with torch.no_grad():
        return float(distance(Outcome(model(x), True), Outcome(original(x), True), 1.0, None))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def shuffled() -> DataLoader[Any]:
    columns = (torch.cat(column) for column in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(*columns), 8, shuffle=True)


class KilledError(Exception):
    pass

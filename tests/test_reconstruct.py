"""Layer-wise reconstruction in closed form: on what the compressed prefix puts in, for what the original puts out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.last_factor import last_factors
from structmat.compression.reconstruct import reconstruct
from structmat.errors import DataError
from structmat.nn.convolution import Tucker


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, size: int = 8) -> list[Tensor]:
    return [torch.randn(size, 4, 10, 10, generator=seeded(i)) for i in range(count)]


def convolutional(groups: int = 1, bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """Two convolutions and a head; in the second model the first layer, or both, are compressed."""
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=groups, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()
    return original, copy.deepcopy(original)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(64, 4, 10, 10, generator=seeded(99)))


@pytest.mark.parametrize("structure", [sm.LowRank(rank=3), Tucker(0.3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_s_last_factor_is_that_of_least_squares(structure: sm.Structure | Tucker, bias: bool) -> None:
    """The part on the outputs' side: its patches behind the compressed prefix, in one system."""
    original, model = convolutional(bias=bias)
    model[0] = sm.nn.StructuredConv2d.from_conv(model[0], sm.LowRank(rank=4))
    model[2] = sm.nn.StructuredConv2d.from_conv(model[2], structure)
    data = images(1, 48) * 3  # what judges is what is fitted: then the least ridge is right
    done = {found.name: found for found in reconstruct(model, original, data)}
    assert done["2"].after < done["2"].before
    # Nothing else that is linear in the last factor comes nearer on the data that it was solved with.
    with torch.no_grad():
        read, wanted = model[:2](data[0]), original[:3](data[0])
    layer = copy.deepcopy(model[2]).double()
    error = (layer(read.double()) - wanted.double()).square().sum()
    error.backward()
    (factor,) = last_factors(layer.program)
    last = layer.get_parameter(factor.contraction.weight)
    assert last.grad is not None
    assert float((last.grad * last.detach()).abs().sum()) < 1e-3 * float(error.detach())
    if bias:
        assert float(layer.bias.grad.abs().sum()) < 1e-3 * float(error.detach())


def test_groups_are_solved_each() -> None:
    original, model = convolutional(groups=2)
    model[2] = sm.nn.StructuredConv2d.from_conv(model[2], sm.LowRank(rank=2))
    with torch.no_grad():
        model[2].left.mul_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
    (found, *_) = reconstruct(model, original, images())
    assert found.name == "2"
    assert found.after < 0.7 * found.before


def test_dense_layers_behind_compressed_ones_are_solved_and_those_before_are_not() -> None:
    original, model = convolutional()
    model[2] = sm.nn.StructuredConv2d.from_conv(model[2], sm.LowRank(rank=2))
    first, head = model[0].weight.clone(), model[5].weight.clone()
    before = float((outputs(model) - outputs(original)).square().mean())
    names = [found.name for found in reconstruct(model, original, images(12, 64))]
    assert float((outputs(model) - outputs(original)).square().mean()) < 0.95 * before
    assert "0" not in names
    assert torch.equal(model[0].weight, first)
    assert names[-1] == "5"
    assert not torch.equal(model[5].weight, head)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), convolutional()[0].parameters(), strict=True))


def test_an_exact_model_stays_as_it_is() -> None:
    original, model = convolutional()
    model[2] = sm.nn.StructuredConv2d.from_conv(model[2], sm.LowRank(rank=8))
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = reconstruct(model, original, images())
    assert all(found.before < 1e-10 for found in done)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, held[name], rtol=1e-3, atol=1e-4)


def test_matrices_of_states_frozen_and_shared_layers_are_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(8, 9)
            self.down = nn.Linear(12, 8)
            self.head.weight = self.embedding.weight  # tied

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.down(self.lstm(self.embedding(x))[0]))

    torch.manual_seed(0)
    original = Net().eval()
    data = [torch.randint(0, 9, (16, 12), generator=seeded(i)) for i in range(40)]
    model = sm.compress(
        original,
        budget=sm.Parameters(0.5),
        calibration=data,
        overrides={"lstm*": sm.LowRank(3)},
        structures=["LowRank"],
    ).model
    model.down.requires_grad_(False)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = {found.name for found in reconstruct(model, original, data)}
    assert done <= {"lstm.ih_l0"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[name]) or name.startswith("lstm.ih_l0"), name
    assert isinstance(original.lstm, nn.LSTM)


def test_one_batch_is_too_few() -> None:
    original, model = convolutional()
    with pytest.raises(DataError, match="at least 2"):
        reconstruct(model, original, images(1))

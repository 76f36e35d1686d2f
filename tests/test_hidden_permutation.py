"""A permutation from few noisy pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

import structmat as sm
from structmat.errors import DataError, ShapeError
from structmat.projection.hidden_permutation import recover_permutation

F64 = torch.float64


def pairs(
    size: int, count: int, noise: float, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    x = torch.randn(count, size, generator=generator, dtype=dtype)
    return x, x[:, order] + noise * torch.randn(count, size, generator=generator, dtype=dtype), order


@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_recovered_from_a_quarter_of_the_pairs(size: int, noise: float) -> None:
    x, y, order = pairs(size, size // 4, noise)
    found = recover_permutation(x, y)
    assert torch.equal(found.order, order)
    assert found.doubt < 0.01
    assert found.noise == pytest.approx(noise, rel=0.1)
    assert isinstance(found.matrix.structure, sm.Permutation)
    assert torch.equal(found.matrix @ x[0].double(), x[0, order].double())


def test_it_is_the_optimum_over_all_permutations() -> None:
    for seed in range(5):
        x, y, _ = pairs(6, 2, 1.0, seed)
        best = min(itertools.permutations(range(6)), key=lambda p: float(torch.linalg.norm(y - x[:, torch.tensor(p)])))
        assert recover_permutation(x, y).order.tolist() == list(best)


def test_doubt_tells_when_it_is_wrong() -> None:
    x, y, order = pairs(128, 4, 1.0)
    found = recover_permutation(x, y)
    assert not torch.equal(found.order, order)
    assert found.doubt > 1
    same = torch.ones(8, 4, dtype=F64)  # all inputs alike: any order fits
    assert recover_permutation(same, same).doubt >= 1


def test_complex_pairs_and_bad_input() -> None:
    x, y, order = pairs(64, 16, 0.2, dtype=torch.complex128)
    assert torch.equal(recover_permutation(x, y).order, order)
    with pytest.raises(ShapeError, match="of one shape"):
        recover_permutation(torch.zeros(4, 8), torch.zeros(4, 9))
    with pytest.raises(DataError, match="0 pairs"):
        recover_permutation(torch.zeros(0, 8), torch.zeros(0, 8))

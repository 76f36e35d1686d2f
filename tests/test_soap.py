"""SOAP: Adam in other axes, the axes of structured layers' own matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.errors import ModelError
from structmat.learn.layouts import layouts, plain_layout
from structmat.learn.soap import SOAP


def moved(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def every_layer() -> Iterator[nn.Module]:
    for family in sm.families().values():
        for structure in family.configurations((24, 32), 24 * 32 // 2):
            yield sm.nn.StructuredLinear(32, 24, structure=structure)
    for structure in (sm.LowRank(rank=4), sm.Sparse(density=0.3), sm.BlockDiagonal(blocks=2)):
        yield sm.nn.StructuredConv2d(8, 12, 3, groups=2, structure=structure)
        yield sm.nn.StructuredEmbedding(20, 12, structure=structure)


# ------------------------------------------------------------------------------------------------------------ layouts


def test_a_layout_loses_nothing_and_every_matrix_has_one() -> None:
    for layer in every_layer():
        found = layouts(layer)
        for name, p in layer.named_parameters():
            assert p in found or (p.dim() < 2 and not name.endswith("values")), (layer, name)
            if p in found:
                stack = found[p].matrices(p.detach())
                assert stack.shape == found[p].shape
                assert torch.equal(found[p].tensor(stack, p), p), (layer, name)
                assert stack.square().sum() == pytest.approx(float(p.detach().square().sum()), rel=1e-5)


def test_a_sparse_matrix_is_seen_as_it_is() -> None:
    layer = sm.nn.StructuredLinear(10, 7, structure=sm.Sparse(density=0.4))
    assert torch.equal(layouts(layer)[layer.values].matrices(layer.values.detach())[0], layer.matrix.to_dense())


def test_blocks_are_seen_one_by_one() -> None:
    layer = sm.nn.StructuredLinear(12, 8, structure=sm.BlockDiagonal(blocks=4))
    blocks = layouts(layer)[layer.weight].matrices(layer.weight.detach())
    assert torch.equal(torch.block_diag(*blocks), layer.matrix.to_dense())


def test_groups_of_a_convolution_are_seen_one_by_one() -> None:
    layer = sm.nn.StructuredConv2d(8, 12, 3, groups=2, structure=sm.Sparse(density=0.3))
    found = layouts(layer)[layer.values].matrices(layer.values.detach())
    assert torch.equal(found, torch.stack([matrix.to_dense() for matrix in layer.matrices]))


def test_vectors_and_empty_tensors_have_no_layout() -> None:
    assert plain_layout(torch.zeros(3)) is None
    assert plain_layout(torch.zeros(0, 3)) is None
    assert plain_layout(torch.zeros(4, 3, 5, 5)).shape == (1, 4, 75)


# -------------------------------------------------------------------------------------------------------------- steps


def test_without_axes_it_is_adam() -> None:
    goal = torch.randn(6, 5, dtype=torch.float64)
    one, other = parameter(6, 5), parameter(6, 5)
    moved(SOAP([one], lr=0.1, weight_decay=0.01, largest=1), lambda: (one - goal).pow(4).sum(), 30)
    moved(
        torch.optim.AdamW([other], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01),
        lambda: (other - goal).pow(4).sum(),
        30,
    )
    assert torch.allclose(one, other, rtol=1e-10)


def test_it_does_not_ask_in_which_axes_a_matrix_is_written() -> None:
    """Turning rows and columns turns the whole path, which it does not for Adam."""
    a, b, left, right = (torch.linalg.qr(parameter(7, 7, seed=n).detach())[0] for n in range(1, 5))
    goal = parameter(7, 7, seed=5).detach()

    def loss(w: Tensor) -> Tensor:
        return ((a @ (w - goal) @ b).pow(2) + 1).sqrt().sum()

    def ends(make: Callable[..., torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
        plain = parameter(7, 7)
        turned = nn.Parameter(left @ plain.detach() @ right)
        moved(make([plain]), lambda: loss(plain), 12)
        moved(make([turned]), lambda: loss(left.mT @ turned @ right.mT), 12)
        return left @ plain.detach() @ right, turned.detach()

    assert torch.allclose(*ends(lambda p: SOAP(p, lr=0.01, refreshed=5)), atol=1e-6)
    assert not torch.allclose(*ends(lambda p: torch.optim.AdamW(p, lr=0.01)), atol=1e-3)


def test_it_needs_fewer_steps_where_curvature_is_not_along_the_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator))[0]
    curvature = turn * torch.logspace(0, -3, 32, dtype=torch.float64) @ turn.mT
    goal = parameter(16, 32, seed=5).detach()

    def reached(make: Callable[..., torch.optim.Optimizer]) -> float:
        w = nn.Parameter(torch.zeros(16, 32, dtype=torch.float64))

        def loss() -> Tensor:
            return (((w - goal) @ curvature) * (w - goal)).sum()

        optimizer = make([w], lr=0.03)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
            moved(optimizer, loss, 1)
        return float(loss().detach())

    assert reached(SOAP) < 0.2 * reached(torch.optim.AdamW)


def test_a_list_of_all_entries_moves_as_the_dense_matrix() -> None:
    sparse = sm.nn.StructuredLinear(8, 6, False, structure=sm.Sparse(nonzeros=48))
    dense = nn.Parameter(sparse.matrix.to_dense().detach().clone())
    x, y = torch.randn(50, 8), torch.randn(50, 6)
    moved(SOAP(sparse.parameters(), lr=0.01, layouts=layouts(sparse)), lambda: (sparse(x) - y).pow(2).mean(), 40)
    moved(SOAP([dense], lr=0.01), lambda: (x @ dense.mT - y).pow(2).mean(), 40)
    assert torch.allclose(sparse.matrix.to_dense(), dense, atol=1e-4)


def test_blocks_move_apart_from_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    structure = sm.BlockDiagonal(blocks=2)
    layer = sm.nn.StructuredLinear(10, 10, False, structure=structure, dtype=torch.float64, generator=generator)
    alone = nn.Parameter(layer.weight.detach().reshape(2, 5, 5)[1].clone())
    optimizers = SOAP(layer.parameters(), lr=0.01, layouts=layouts(layer)), SOAP([alone], lr=0.01)
    for seed in range(12):  # other data at each step: in the axes of equal gradients all but the diagonal is rounding
        x, y = parameter(50, 10, seed=seed).detach(), parameter(50, 10, seed=-1 - seed).detach()
        moved(optimizers[0], lambda x=x, y=y: (layer(x) - y).pow(2).sum(), 1)  # type: ignore[misc]
        moved(optimizers[1], lambda x=x, y=y: (x[:, 5:] @ alone.mT - y[:, 5:]).pow(2).sum(), 1)  # type: ignore[misc]
    assert torch.allclose(layer.weight.detach().reshape(2, 5, 5)[1], alone, atol=1e-9)


def test_a_tensor_without_a_gradient_stays() -> None:
    one, other = parameter(5, 5), parameter(5, 5)
    before = other.detach().clone()
    moved(SOAP([one, other], lr=0.1), lambda: one.pow(2).sum(), 3)
    assert torch.equal(other, before)


def test_half_precision_has_moments_in_float32() -> None:
    w = nn.Parameter(parameter(8, 8).detach().bfloat16())
    before = float((w.float() - 1).pow(2).sum().detach())
    optimizer = SOAP([w], lr=0.05)
    moved(optimizer, lambda: (w.float() - 1).pow(2).sum(), 100)
    assert w.dtype == torch.bfloat16
    assert {t.dtype for t in optimizer.state[w].values()} == {torch.float32}
    assert float((w.float() - 1).pow(2).sum().detach()) < 0.02 * before


def test_complex_tensors_are_refused() -> None:
    with pytest.raises(ModelError, match=r"real tensors.*complex64.*view_as_real"):
        SOAP([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


def test_its_state_is_saved_and_loaded() -> None:
    def run(steps: list[int]) -> Tensor:
        w, state = parameter(6, 7), None
        for count in steps:
            optimizer = SOAP([w], lr=0.05, refreshed=3)
            if state is not None:
                optimizer.load_state_dict(state)
            moved(optimizer, lambda: (w - 1).pow(4).sum(), count)
            state = optimizer.state_dict()
        return w.detach()

    assert torch.equal(run([20]), run([7, 13]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0.*below 1"),
        ({"shampoo_beta": -0.1}, "shampoo_beta=-0.1"),
        ({"lr": float("inf")}, "lr=inf.*finite"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"refreshed": 0}, "refreshed=0.*at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        SOAP([parameter(3, 3)], **options)

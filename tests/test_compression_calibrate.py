"""Second moments, streamed."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from compression_models import Encoder, gpt2, labelled, llama, mlp, tokens
from torch import Tensor, nn

from structmat.compression.calibrate import calibrate, from_tensors, to_tensors
from structmat.compression.running import check_loader
from structmat.compression.scan import scan, site_of
from structmat.errors import DataError


def test_moments_are_those_of_the_inputs() -> None:
    model, data = mlp(), labelled()
    found = calibrate(model, scan(model).sites, data)
    x = torch.cat([x for x, _ in data]).double()
    hidden = torch.relu(x.float() @ model[0].weight.T + model[0].bias).detach().double()
    for name, inputs in (("0", x), ("2", hidden)):
        moments = found.moments[name]
        torch.testing.assert_close(moments.second_moment, inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-6)
        assert (moments.rows, moments.calls) == (128, 4)
    assert (found.batches, found.samples, found.terms) == (4, 128, 128)
    assert found.kind == "labels sampled from the model"
    assert found.loss == pytest.approx(
        sum(nn.functional.cross_entropy(model(x), y).item() for x, y in data) / 4, rel=1e-5
    )


def test_gradient_moments_approach_the_fisher_information_of_the_softmax() -> None:
    model = mlp(sizes=(8, 12, 5))
    data = labelled(count=20, size=400, features=8, classes=5)
    found = calibrate(model, scan(model).sites, data)
    p = torch.softmax(torch.cat([model(x) for x, _ in data]), -1).detach().double()
    fisher = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(found.moments["2"].gradient_moment, fisher, rtol=0.2, atol=0.01)


def test_squared_errors_give_the_gauss_newton_matrix() -> None:
    model = mlp(sizes=(8, 12, 5))
    data = [x for x, _ in labelled(count=20, size=400, features=8)]
    found = calibrate(model, scan(model).sites, data)
    assert found.kind == "squared error of the output"
    torch.testing.assert_close(
        found.moments["2"].gradient_moment, torch.eye(5, dtype=torch.float64), rtol=0.1, atol=0.06
    )


def test_a_given_forward_and_loss_are_honoured() -> None:
    model, calls = mlp(sizes=(8, 12, 5)), []

    def forward(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(batch["x"]))
        return net(batch["x"])

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (output[:, 0] * batch["w"]).mean()

    data = [{"x": x, "w": torch.full((32,), 2.0)} for x, _ in labelled(features=8)]
    found = calibrate(model, scan(model).sites, data, forward=forward, loss=loss)
    assert calls == [32] * 4
    assert found.kind == "given loss"
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[0, 0] = 4.0  # the gradient of the sum over samples is 2 in the first output, for each sample
    torch.testing.assert_close(found.moments["2"].gradient_moment, expected)


def test_labels_that_are_not_one_to_one_with_the_logits_make_no_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    labels = torch.tensor([0, 1, -100, 2])

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"logits": net(batch[0])[batch[1] >= 0]}

    found = calibrate(model, (site_of("0", model[0]),), [(torch.randn(4, 6), labels)], forward=forward)
    assert (found.terms, found.loss) == (3, None)


def test_seeds_decide_and_nothing_is_left_behind() -> None:
    model, data = mlp().train(), labelled()
    model[0].weight.requires_grad_(False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    first, again, other = (calibrate(model, scan(model).sites, data, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.moments["2"].gradient_moment, again.moments["2"].gradient_moment)
    assert not torch.equal(first.moments["2"].gradient_moment, other.moments["2"].gradient_moment)
    assert model.training
    assert all(m.training for m in model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_memory_is_independent_of_the_number_of_batches() -> None:
    """No input is kept: what is alive after a batch is the moments, whatever came before."""
    import gc
    import weakref

    model, alive = mlp(), []

    def batches(count: int):  # type: ignore[no-untyped-def]
        for _ in range(count):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            x = torch.randn(8, 32)
            alive.append(weakref.ref(x))
            yield x

    calibrate(model, scan(model).sites, batches(5))
    assert len(alive) == 5


def test_layers_that_read_the_same_input_share_its_moment() -> None:
    model = llama()
    found = calibrate(model, scan(model).sites, tokens())
    part = "model.layers.0.self_attn."
    assert found.moments[f"{part}q_proj"].second_moment is found.moments[f"{part}v_proj"].second_moment
    assert found.moments[f"{part}q_proj"].second_moment is not found.moments[f"{part}o_proj"].second_moment
    assert found.terms == 3 * 4 * 12
    assert found.rows_per_sample(f"{part}q_proj") == 12


def test_conv1d_and_bfloat16() -> None:
    model = gpt2().to(torch.bfloat16)
    found = calibrate(model, scan(model).sites, tokens())
    assert all(m.second_moment.dtype == torch.float64 for m in found.moments.values())
    assert all(m.gradient_moment is not None for m in found.moments.values())


def test_an_encoder_layer_is_seen_in_spite_of_its_fast_path() -> None:
    model = Encoder().eval()
    sites = scan(model, include=("*", "block.linear1")).sites
    found = calibrate(model, sites, [torch.randn(3, 5, 8)])
    assert found.moments["block.linear1"].rows == 15


def test_a_layer_that_is_never_called_is_missing() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    assert set(calibrate(model, scan(model).sites, [torch.randn(4, 8)]).moments) == {"used"}


def test_an_empty_loader_is_an_error() -> None:
    model = mlp()
    with pytest.raises(DataError, match="not one batch"):
        calibrate(model, scan(model).sites, [])
    spent = iter([1])
    next(spent)
    with pytest.raises(DataError, match="read once is empty"):
        calibrate(model, scan(model).sites, spent)


def test_generators_are_detected() -> None:
    with pytest.raises(DataError, match="read only once"):
        check_loader(x for x in [torch.zeros(1)])
    check_loader([torch.zeros(1)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_are_named_by_layer(bad: float) -> None:
    model, data = mlp(), labelled()
    with torch.no_grad():
        model[0].bias[3] = bad
    with pytest.raises(DataError, match="inputs of 2 are NaN or infinite"):
        calibrate(model, scan(model).sites, data)


def test_a_batch_that_can_not_be_run_says_what_to_do() -> None:
    model = mlp()
    with pytest.raises(DataError, match="tuple of 3 items"):
        calibrate(model, scan(model).sites, [(torch.zeros(1, 32), 1, 2)])


def test_disk_round_trip() -> None:
    model = llama()
    found = calibrate(model, scan(model).sites, tokens())
    again = from_tensors(*to_tensors(found))
    assert list(again.moments) == list(found.moments)
    for name, moments in found.moments.items():
        assert torch.equal(again.moments[name].second_moment, moments.second_moment)
        assert torch.equal(again.moments[name].gradient_moment, moments.gradient_moment)
    assert (again.loss, again.terms, again.kind) == (found.loss, found.terms, found.kind)


def live_bytes() -> int:
    """Of all tensors that anything still refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Watched:
    """Batches made when they are asked for; the bytes that are alive then are noted."""

    def __init__(self, count: int, rows: int) -> None:
        self.count, self.rows = count, rows
        self.alive: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            self.alive.append(live_bytes())
            yield torch.randn(self.rows, 64)


def test_memory_is_the_moments_and_one_batch() -> None:
    model = mlp(sizes=(64, 96, 80, 16))
    # A float64 sum for each moment, and the float32 product of the batch that is being added.
    moments = 12 * sum(m.in_features**2 + m.out_features**2 for m in model if isinstance(m, nn.Linear))
    data, before = Watched(12, rows=512), live_bytes()
    found = calibrate(model, scan(model).sites, data)
    assert found.batches == 12
    batch = 4 * 512 * 64
    # Between two batches nothing of the earlier ones is left, however many there were.
    assert max(data.alive[-12:]) - before <= moments + 2 * batch
    assert data.alive[-1] <= data.alive[-10] + batch

"""Compression of mixtures of experts: each expert fitted for the tokens that are sent to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compression.calibrate import calibrate
from structmat.compression.scan import scan

EXPERTS, WIDTH = 4, 12


class Expert(nn.Module):
    """A gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Mixture(nn.Module):
    """The two best of several experts for each token; an expert may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = torch.softmax(self.router(rows), -1).topk(2, -1)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                y = y.index_add(0, token, expert(rows[token]) * weights[token, place, None])
        return x + y.reshape(x.shape)


def mixture() -> Mixture:
    """The last expert is never chosen."""
    torch.manual_seed(0)
    model = Mixture()
    with torch.no_grad():
        model.router.weight[-1] = 0
        model.router.weight[:-1, 0] = 8  # of every token, since the first number is large
    return model.eval()


def data() -> list[Tensor]:
    found = [torch.randn(6, 10, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for x in found:
        x[..., 0] = 2
    return found


def test_moments_are_those_of_the_tokens_that_are_sent() -> None:
    model, batches = mixture(), data()
    seen = calibrate(model, scan(model).sites, batches)
    rows = torch.cat(batches).reshape(-1, WIDTH)
    chosen = model.router(rows).topk(2, -1).indices
    for number in range(EXPERTS - 1):
        own = rows[(chosen == number).any(-1)].double()
        found = seen.moments[f"experts.{number}.up"]
        assert found.rows == len(own) > 0
        torch.testing.assert_close(found.second_moment, own.T @ own / len(own), rtol=1e-4, atol=1e-5)
    assert f"experts.{EXPERTS - 1}.up" not in seen.moments


def test_each_expert_is_compressed_for_itself() -> None:
    model = mixture()
    overrides = {"router": sm.Dense()}
    result = sm.compress(
        model, budget=sm.Parameters(0.6), calibration=data(), structures=["LowRank"], overrides=overrides
    )
    named = dict(result.model.named_modules())
    made = [name for name, module in named.items() if isinstance(module, sm.nn.StructuredLinear)]
    assert {name.split(".")[1] for name in made} == {"0", "1", "2"}
    assert isinstance(named["router"], nn.Linear)
    idle = {s["name"]: s["reason"] for s in result.report.skipped}
    assert idle[f"experts.{EXPERTS - 1}.down"] == "never called on calibration data"
    x = data()[0]
    blind = sm.compress(
        model,
        budget=sm.Parameters(0.6),
        structures=["LowRank"],
        overrides=overrides,
        exclude=(f"experts.{EXPERTS - 1}.*",),
    )
    error, other = (torch.linalg.norm(made.model(x) - model(x)) for made in (result, blind))
    assert error < other, "fits know what is sent to each expert"
    # A fit for all tokens alike, instead of those that are sent, is farther from the experts' outputs.
    name = "experts.0.up"
    site = next(s for s in scan(model).sites if s.name == name)
    rows = torch.cat(data()).reshape(-1, WIDTH)
    own = rows[(model.router(rows).topk(2, -1).indices == 0).any(-1)]
    weight = model.get_submodule(name).weight
    losses = []
    for seen in (own, rows):
        fit = sm.project(weight, sm.LowRank(4), second_moment=(seen.mT @ seen).double())
        losses.append(torch.linalg.norm(own @ (fit.matrix.to_dense() - weight).float().T).item())
    assert losses[0] <= losses[1]
    assert site.shape == (2 * WIDTH, WIDTH)

"""A training step of the published Kronecker network, beside plain PyTorch forms and the fully connected network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.nn import KroneckerBlock, KroneckerNetwork


def best_time(call: Callable[[], Any], runs: int) -> float:
    """Seconds of the fastest of several calls, after two to warm up."""
    call(), call()
    best = math.inf
    for _ in range(runs):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


class Plain(nn.Module):
    """A Kronecker block of one order in plain PyTorch operations, left first: the best form, and that of the source.

    Args:
        block: whose parameters it has.
        form: "broadcast" multiplies matrices by batches and then has one product; "transposed" is that of the published
            code, which transposes twice; "einsum".
    """

    def __init__(self, block: KroneckerBlock, form: str) -> None:
        super().__init__()
        self.form, self.activated = form, block.outer is not None
        left, turned = (f.detach().clone() for f in block.factors())
        (m, n), (q, p) = block.shape.pairs
        self.sizes, self.terms = (m, n, p, q), block.shape.terms
        self.left, self.right = nn.Parameter(left), nn.Parameter(turned.mT.contiguous())
        self.inner = nn.Parameter(torch.zeros(self.terms, m, p))
        self.outer = nn.Parameter(torch.zeros(m, q))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        m, n, p, q = self.sizes
        x = x.view(-1, n, p)
        if self.form == "einsum":
            z = torch.tanh(torch.einsum("tmn,bnp->btmp", self.left, x) + self.inner)
            y = torch.einsum("btmp,tpq->bmq", z, self.right) + self.outer
        elif self.form == "transposed":
            parts = []
            for t in range(self.terms):
                z = torch.tanh((x.transpose(1, 2) @ self.left[t].T).transpose(1, 2) + self.inner[t])
                parts.append(z @ self.right[t])
            y = torch.stack(parts).sum(0) + self.outer if self.terms > 1 else parts[0] + self.outer
        else:
            stacked = self.left.permute(1, 0, 2).reshape(m * self.terms, n)
            shift = self.inner.permute(1, 0, 2).reshape(m * self.terms, p)
            z = torch.tanh(stacked @ x + shift)
            y = z.view(-1, m, self.terms * p) @ self.right.reshape(self.terms * p, q) + self.outer
        return (torch.tanh(y) if self.activated else y).reshape(len(x), m * q)


SPEED_ROUNDS = 12

FORMS = ("ours", "ours, nothing recomputed", "broadcast", "transposed", "einsum", "fully connected")


def speed_cell(width: int, terms: int, batch: int, seed: int) -> dict[str, Any]:
    """Milliseconds of a training step of the published network, every form in turn, and peak numbers kept."""
    torch.manual_seed(seed)
    side = math.isqrt(width)
    sizes = [(side, side)] * 3 + [(2, 5)]
    forms: dict[str, nn.Module] = {
        "ours": KroneckerNetwork(sizes, terms, inner=torch.tanh, order="left"),
        "ours, nothing recomputed": KroneckerNetwork(sizes, terms, inner=torch.tanh, order="left", recompute=False),
        "fully connected": nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        ),
    }
    network = forms["ours"]
    assert isinstance(network, KroneckerNetwork)
    for form in ("broadcast", "transposed", "einsum"):
        forms[form] = nn.Sequential(*(Plain(block, form) for block in network.layers()))
    x, y = torch.rand(batch, width), torch.randint(0, 10, (batch,))
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in forms.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        F.cross_entropy(forms[name](x), y).backward()
        optimizers[name].step()

    for block in network.layers():
        if block.fallback:
            print(f"not one native pass: {block.fallback}")
    best = dict.fromkeys(forms, math.inf)
    for _ in range(SPEED_ROUNDS):
        for name in forms:
            best[name] = min(best[name], best_time(partial(step, name), 5))
    return {
        "milliseconds": {name: 1000 * value for name, value in best.items()},
        "kept": {name: kept_numbers(model, x) for name, model in forms.items()},
        "threads": torch.get_num_threads(),
        "fallback": sorted({block.fallback for block in network.layers()} - {""}),
        "floor": 1000 * step_floor(network, y),
        "macs": network.counts.macs,
        "dense_macs": network.counts.dense_macs,
    }


def step_floor(network: nn.Module, y: Tensor) -> float:
    """Seconds of a step without the network: the loss of outputs at hand, its gradient, and gradient descent."""
    outputs = torch.rand(len(y), 10, requires_grad=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        F.cross_entropy(outputs, y).backward()
        optimizer.step()

    return best_time(step, 200)


def kept_numbers(model: nn.Module, x: Tensor) -> int:
    """Numbers that the graph of one forward pass keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = max(seen.get(place, 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(seen.values())


SPEEDS = [(784, 1, 128), (784, 1, 1024), (784, 2, 128), (784, 4, 128), (4096, 1, 128)]

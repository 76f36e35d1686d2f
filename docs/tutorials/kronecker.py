"""From a perceptron to a Kronecker network, in thirty lines.

    python docs/tutorials/kronecker.py [folder]

Trains a small perceptron on handwritten digits, converts its wide layer, fine-tunes, and trains a Kronecker network
from scratch beside it. Writes ``kronecker_extended.svg`` into the folder (default: here). Seconds on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(sm.parameter_groups(model, lr=lr))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def main(folder: Path) -> dict[str, float]:
    """Accuracies in % on images that were not trained on."""
    torch.manual_seed(0)
    x, y = digits()
    known, new = slice(0, 1400), slice(1400, None)
    perceptron = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    train(perceptron, x[known], y[known], 500, 1e-3)

    # The wide layer as a sum of Kronecker products, an activation between the factors that starts as the identity.
    found = sm.to_kronecker(perceptron, calibration=x[known].split(200), terms=6, include=["0"])
    print(found)
    accuracy = {"perceptron": right(perceptron, x[new], y[new]), "converted": right(found.model, x[new], y[new])}
    train(found.model, x[known], y[known], 500, 1e-3)
    accuracy["fine-tuned"] = right(found.model, x[new], y[new])

    # The same from scratch: matrices in, matrices between, and 10 = 2 x 5 outputs.
    network = sm.nn.KroneckerNetwork([(8, 8), (16, 16), (2, 5)], terms=4)
    train(network, x[known], y[known], 500, 3e-3)
    accuracy["from scratch"] = right(network, x[new].unflatten(1, (8, 8)), y[new])
    for name, value in accuracy.items():
        print(f"{name:<12} {value:.1f} %")
    counts = network.counts
    print(f"{counts.parameters:,} parameters, {counts.biases:,} of them biases, not {counts.dense_parameters:,}.")

    block = sm.nn.KroneckerBlock(16, 12, in_shape=(4, 4), out_shape=(3, 4), order="left")
    (folder / "kronecker_extended.svg").write_text(block.extended().draw(), encoding="utf-8")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())

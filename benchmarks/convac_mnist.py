"""Discriminative ConvACs on MNIST, shallow and deep, beside a ConvNet of about as many parameters.

python -m benchmarks.convac_mnist               five epochs, one seed
python -m benchmarks.convac_mnist --all         three seeds, and the starts that fail
python -m benchmarks.convac_mnist table
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks import convac_models as models
from benchmarks.convac_data import mnist
from benchmarks.study import NOT_RUN, Cell, Study, markdown, of_name, spread
from structmat.nn.convac import normal_

EPOCHS = 5
SPECIFIED = {
    "deep, shared": "98.4 (5 epochs)",
    "deep, unshared": "97.9 (20,000 images, 3 epochs)",
    "CP, unshared": "59.2 (20,000 images, 3 epochs)",
    "CP, shared": "11.4 (20,000 images, 3 epochs)",
    "ReLU and maximum, shape of deep, shared": "92.1 (20,000 images, 3 epochs)",
    "ConvNet, 5 x 5 kernels": "99.3 (5 epochs)",
    "deep, shared, zero-mean start": "11.2 (20,000 images, 3 epochs)",
}
"""Single runs of an independent implementation, for comparison."""


def train_and_test(name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    train, test = mnist("train"), mnist("test")
    steps = models.epochs(train, EPOCHS)
    if name.startswith("ConvNet"):
        model: nn.Module = models.convnet()
        prepare = nn.Identity()
    elif name.startswith("ReLU"):
        model, prepare = models.rectifier_classifier(train, seed)
    else:
        circuit, prepare = models.circuit_classifier(train, name.removesuffix(", zero-mean start"), seed)
        if name.endswith("zero-mean start"):
            circuit.network.initialize(normal_)
        model = circuit
    losses = models.train_classifier(model, prepare, train, steps, seed)
    return {
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "last_loss": losses[-1],
        "accuracy": models.accuracy(model, prepare, test),
    }


def _cells() -> list[Cell]:
    return [
        Cell(name, lambda seed, name=name: train_and_test(name, seed), seed, extra=seed > 0 or name.endswith("start"))
        for seed in range(3)
        for name in SPECIFIED
    ]


def tables(done: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, elsewhere in SPECIFIED.items():
        found = of_name(done, CELLS, name)
        parameters = f"{found[0]['parameters']:,}" if found else NOT_RUN
        seconds = f"{found[0]['seconds']:.0f}" if found else NOT_RUN
        rows.append((name, parameters, spread([f["accuracy"] for f in found]), elsewhere, seconds))
    note = "16 x 16 patches of 4 x 4 pixels, 32 Gaussians, all training images, batches of 128, test accuracy in %."
    head = ("network", "parameters", "accuracy", "the same, elsewhere", "seconds")
    return [note, "", *markdown(head, rows)]


CELLS = _cells()
STUDY = Study("convac_mnist", "Discriminative ConvACs on MNIST", CELLS, tables)

if __name__ == "__main__":
    STUDY.main()

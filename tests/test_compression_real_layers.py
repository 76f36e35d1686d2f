"""Slow: trained convolutional and recurrent nets at half of their size, without any retraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import structmat as sm

real_layers = pytest.importorskip("benchmarks.real_nets", reason="the folder benchmarks/ is not part of a package")

pytestmark = pytest.mark.slow


def test_resnet_20_at_half_of_its_size(real_data: Path) -> None:
    model = real_layers.resnet(real_data)
    x = real_layers.pictures(real_data, "calib", 512)
    test = real_layers.pictures(real_data, "test", 1000)
    labels = torch.from_numpy(np.load(real_data / "cifar10/labels.npz")["y_test"])[:1000]

    @torch.no_grad()
    def accuracy(net: torch.nn.Module) -> float:
        return float((net(test).argmax(-1) == labels).float().mean())

    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=[(part,) for part in x.split(64)],
        structures=["LowRank", "Tucker"],
        evaluate=accuracy,
    )
    assert result.report.parameters.after <= 0.5 * result.report.parameters.before
    assert result.report.quality["before"]["quality"] > 0.9
    assert result.report.quality["after"]["quality"] > 0.86  # 0.143 for truncated SVD of every layer


def test_char_lstm_at_half_of_its_size(real_data: Path) -> None:
    model, text = real_layers.char_lstm(real_data)
    starts = torch.randint(0, int(0.9 * len(text)) - 129, (128,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([text[s : s + 129] for s in starts])
    test = text[-16 * 900 - 1 :]
    inputs, outputs = test[:-1].view(16, 900), test[1:].view(16, 900)

    @torch.no_grad()
    def bits(net: torch.nn.Module) -> float:
        return float(F.cross_entropy(net(inputs)[0].flatten(0, 1), outputs.flatten())) / float(np.log(2))

    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=[(part[:, :-1], part[:, 1:]) for part in windows.split(16)],
        structures=["LowRank", "PivotedLowRank", "Sparse"],
        evaluate=bits,
    )
    quality = result.report.quality
    assert quality["after"]["quality"] < quality["before"]["quality"] + 0.05  # 0.7 for truncated SVD of every matrix


def test_g2p_gru_at_half_of_its_size(real_data: Path) -> None:
    model = real_layers.G2P(real_data).eval()
    words = real_layers.spellings(real_data)[:1000]
    result = sm.compress(
        model,
        budget=sm.Parameters(0.5),
        calibration=real_layers.lessons(real_data, model, 24, 64, seed=0),
        forward=lambda net, batch: net.teach(batch),
        structures=["LowRank", "PivotedLowRank", "Sparse"],
        evaluate=lambda net: real_layers.phoneme_errors(net, words),
    )
    quality = result.report.quality
    assert quality["after"]["quality"] < quality["before"]["quality"] + 1.0  # 5.3 for truncated SVD of every matrix


def test_training_images_are_moved_as_those_of_the_original_were(real_data: Path) -> None:
    """Its own batch statistics, estimated again on them, serve it as well; with grey edges they cost three points."""
    from itertools import islice

    from benchmarks.real_pictures import RESNET_20

    model = RESNET_20.load()
    before = RESNET_20.evaluate(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for images, _ in islice(iter(RESNET_20.training(0)), 16):
            model(images)
    assert RESNET_20.evaluate(model.eval()) > before - 1

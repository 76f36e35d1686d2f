"""Kronecker sums in models: conversion, slopes, bounds, convolutions, spectra, learning rates."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structmat as sm
from structmat.compression.to_kronecker import Start, activate_, to_kronecker
from structmat.errors import DataError, ModelError, ShapeError, StructureError
from structmat.nn import KroneckerBlock, StructuredLinear
from structmat.nn.kronecker import (
    KernelSizes,
    KroneckerConv2d,
    Slopes,
    absorb_,
    kernel_sizes,
    nearest_kernel,
    perturbation,
    pruned,
    rate_multipliers,
    set_slopes,
    source_,
)
from structmat.nn.kronecker.convolution import kernel_of
from structmat.projection.kronecker_spectrum import kronecker_spectrum, rank_shapes
from structmat.projection.target import Certificate
from structmat.structures import Kronecker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks' data

F64 = torch.float64


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def batches(features: int, count: int = 3, rows: int = 64) -> list[Tensor]:
    mix = torch.randn(features, features) * torch.linspace(0.05, 1, features)
    return [torch.randn(rows, features) @ mix.T for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("start", ["slopes", "annealed", "shift"])
@pytest.mark.parametrize("structure", [Kronecker(3), Kronecker(2, 3)])
def test_kronecker_23_conversion_starts_as_the_linear_projection(start: str, structure: Kronecker) -> None:
    model, data = perceptron(60, 48, 10).double(), [b.double() for b in batches(60)]
    linear = to_kronecker(model, calibration=data, structure=structure, start="linear")
    assert all(isinstance(linear.model.get_submodule(name), StructuredLinear) for name in linear.layers)
    found = to_kronecker(model, calibration=data, structure=structure, start=start)
    blocks = [m for m in found.model.modules() if isinstance(m, KroneckerBlock)]
    assert len(blocks) == len(found.layers) == len(linear.layers) > 0
    for batch in data:
        torch.testing.assert_close(found.model(batch), linear.model(batch), rtol=1e-9, atol=1e-10)
    elsewhere = 30 * torch.randn(50, 60, dtype=F64)
    same = torch.allclose(found.model(elsewhere), linear.model(elsewhere), rtol=1e-9)
    assert same == (start != "shift" or not any(b.shape.activated.count(True) for b in blocks))
    assert found.error == pytest.approx(linear.error, rel=1e-6)


def test_kronecker_23_in_single_precision() -> None:
    model, data = perceptron(60, 48, 10), batches(60)
    linear = to_kronecker(model, calibration=data, terms=3, start="linear").model
    for start in ("slopes", "shift"):
        found = to_kronecker(model, calibration=data, terms=3, start=start).model
        for batch in data:
            error = (found(batch) - linear(batch)).norm() / linear(batch).norm()
            assert float(error.detach()) < 1e-4


def test_conversion_reports_its_bound() -> None:
    model, data = perceptron(60, 48, 32, 10, activation=nn.Tanh), batches(60)
    found = to_kronecker(model, calibration=data, terms=0.5)
    assert 0 < found.error <= (found.bound or 0) < math.inf
    measured = torch.cat([found.model(b) - model(b) for b in data]).norm() / torch.cat([model(b) for b in data]).norm()
    assert found.error == pytest.approx(float(measured.detach()), rel=1e-3)
    text = str(found)
    assert "by the theorem" in text
    assert all(name in text for name in found.layers)
    for name, layer in found.layers.items():
        assert layer.after == sum(p.numel() for p in found.model.get_submodule(name).parameters())
        assert layer.after < layer.before
    # More terms are nearer; all of them are the model.
    errors = [to_kronecker(model, calibration=data, terms=t).error for t in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert to_kronecker(model, calibration=data, terms=0.5, start="relu").bound is None
    assert to_kronecker(nn.Sequential(*model, nn.Softmax(1)), calibration=data, terms=0.5).bound is None


def test_conversion_of_chosen_layers() -> None:
    model, data = perceptron(60, 48, 10), batches(60)
    before = copy.deepcopy(model.state_dict())
    found = to_kronecker(model, calibration=data, terms=2, include=["0"])
    assert list(found.layers) == ["0"]
    assert isinstance(found.model[2], nn.Linear)
    kept = to_kronecker(model, calibration=data, terms=2, overrides={"0": Kronecker(1, ((6, 10), (8, 6)))})
    assert kept.layers["0"].fit.structure == Kronecker(1, ((6, 10), (8, 6)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the model is not modified"
    with pytest.raises(ModelError, match="overrides names"):
        to_kronecker(model, calibration=data, overrides={"7": Kronecker(1)})
    with pytest.raises(StructureError, match="knows Kronecker and Dense"):
        to_kronecker(model, calibration=data, overrides={"0": sm.LowRank(2)})
    with pytest.raises(DataError, match="no calibration data"):
        to_kronecker(model, calibration=[])


def test_conversion_of_a_compressed_model() -> None:
    model, data = perceptron(60, 48, 10), batches(60)
    result = sm.compress(model, budget=sm.Parameters(0.4), calibration=data, structures=["Kronecker"], measure=False)
    wanted = [result.model(b) for b in data]
    names = activate_(result.model)
    assert names
    for batch, y in zip(data, wanted, strict=True):
        torch.testing.assert_close(result.model(batch), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="no layer that is a sum"):
        activate_(perceptron(6, 4))
    other = sm.compress(model, budget=sm.Parameters(0.4), calibration=data, structures=["Kronecker"], measure=False)
    with pytest.raises(DataError, match="needs calibration data"):
        activate_(other.model, Start.SHIFT)


def test_slopes_are_set_learned_and_absorbed() -> None:
    model, data = perceptron(60, 48, 10), batches(60)
    annealed = to_kronecker(model, calibration=data, terms=2, start=Start.ANNEALED).model
    before = annealed(data[0])
    assert set_slopes(annealed, 0.0) == 2
    assert not torch.allclose(annealed(data[0]), before)
    assert all(not s.requires_grad for b in annealed.modules() if isinstance(b, KroneckerBlock) for s in b.slopes())
    assert set_slopes(annealed, 1.0) == 2
    torch.testing.assert_close(annealed(data[0]), before)

    learned = to_kronecker(model, calibration=data, terms=2).model
    learned(data[0]).square().sum().backward()
    slopes = [s for b in learned.modules() if isinstance(b, KroneckerBlock) for s in b.slopes()]
    assert all(s.requires_grad for s in slopes)
    with torch.no_grad():
        slopes[0].add_(0.01)
        slopes[1].add_(0.5)
    y = learned(data[0]).detach()
    assert absorb_(learned) == ("0",)
    assert isinstance(learned[0], StructuredLinear)
    assert isinstance(learned[2], KroneckerBlock)
    assert float((learned(data[0]).detach() - y).norm() / y.norm()) < 0.02
    with pytest.raises(StructureError, match="single block"):
        absorb_(KroneckerBlock(6, 6, inner=Slopes()))


def test_terms_that_are_nearly_zero_are_dropped() -> None:
    block = KroneckerBlock(15, 8, 6, order=["left", "right"] * 3, inner=torch.tanh, outer=torch.tanh, dtype=F64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        for chain, terms in zip(block.chains, ((1,), (0, 1, 2)), strict=True):
            for factor in chain.factors():
                factor[list(terms)] *= 1e-9
    x = torch.randn(9, 15, dtype=F64)
    small = pruned(block, 1e-6)
    assert small.shape.terms == 2
    torch.testing.assert_close(small(x), block(x), rtol=1e-6, atol=1e-6)
    assert pruned(block, 0.0).shape.terms == 6
    torch.testing.assert_close(pruned(block, 0.0)(x), block(x))


# ------------------------------------------------------------------------------------------------------------ bound


def test_kronecker_14_perturbation_bound_holds() -> None:
    worst = 0.0
    for seed in range(100):
        torch.manual_seed(seed)
        activation = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU)[seed % 4]
        model = perceptron(12, 16, 8, 4, activation=activation)
        other = nn.Sequential(
            *(
                StructuredLinear.from_linear(m, Kronecker(1 + seed % 3)) if isinstance(m, nn.Linear) else m
                for m in model
            )
        )
        x = torch.randn(30, 12)
        for frobenius in (False, True):
            found = perturbation(model, other, x, frobenius=frobenius)
            assert bool((found.measured <= found.bound * (1 + 1e-9)).all())
            assert found.error <= found.bound_error
            worst = max(worst, float((found.measured / found.bound).max()))
        with torch.no_grad():
            torch.testing.assert_close(found.measured, (model(x) - other(x)).norm(dim=1).double(), rtol=1e-3, atol=1e-4)
        exact = perturbation(model, model, x)
        assert float(exact.bound.max()) == 0
    assert worst > 0.02, "a bound that says something"
    with pytest.raises(ModelError, match="Softmax"):
        perturbation(nn.Sequential(nn.Softmax(1)), nn.Sequential(nn.Softmax(1)), x)
    with pytest.raises(ModelError, match="different numbers"):
        perturbation(nn.Sequential(nn.ReLU()), nn.Sequential(), x)
    block = KroneckerBlock(12, 4, inner=torch.tanh)
    with pytest.raises(ModelError, match="not a linear layer"):
        perturbation(nn.Sequential(nn.Linear(12, 4)), nn.Sequential(block), x)


def test_the_bound_is_that_of_the_nearest_sums() -> None:
    """With Frobenius norms: the tail of the singular values of the rearranged matrix."""
    linear = nn.Linear(12, 16, dtype=F64)
    spectrum = kronecker_spectrum(linear.weight, ((4, 3), (4, 4)))
    other = StructuredLinear.from_matrix(spectrum.matrix(2), linear.bias)
    x = torch.randn(5, 12, dtype=F64)
    found = perturbation(nn.Sequential(linear), nn.Sequential(other), x, frobenius=True)
    torch.testing.assert_close(found.bound, spectrum.values[2:].norm() * x.norm(dim=1))


# --------------------------------------------------------------------------------------------------- linear relatives


def test_one_decomposition_gives_every_number_of_terms() -> None:
    matrix, pairs = torch.randn(15, 8, dtype=F64), ((3, 4), (5, 2))
    spectrum = kronecker_spectrum(matrix, pairs)
    errors = spectrum.errors()
    assert spectrum.most == 10
    assert spectrum.certificate is Certificate.OPTIMAL
    assert float(errors[0]) == 1
    assert float(errors[-1]) == 0
    for terms in range(1, 11):
        assert sm.project(matrix, Kronecker(terms, pairs)).error == pytest.approx(float(errors[terms]), abs=1e-12)
        made = spectrum.matrix(terms)
        assert float((matrix - made.to_dense()).norm() / matrix.norm()) == pytest.approx(
            float(errors[terms]), abs=1e-12
        )
        assert made.num_parameters == spectrum.parameters(terms)
    for error in (0.9, 0.5, 0.1):
        terms = spectrum.terms_within(error)
        assert float(errors[terms]) <= error < float(errors[terms - 1])
    padded = kronecker_spectrum(torch.randn(13, 13), ((4, 4), (4, 4)))
    assert padded.certificate is Certificate.NONE
    assert padded.matrix(3).shape == (13, 13)
    with pytest.raises(ShapeError, match="1 to 10 terms"):
        spectrum.matrix(11)
    with pytest.raises(ShapeError, match="at least 15 x 8"):
        kronecker_spectrum(matrix, ((3, 4), (4, 2)))


def test_shapes_are_ranked_by_their_error() -> None:
    planted = torch.kron(torch.randn(3, 2, dtype=F64), torch.randn(4, 6, dtype=F64))
    best = rank_shapes(planted, parameters=40)[0]
    assert best.structure.pairs == ((3, 2), (4, 6))
    assert best.error < 1e-12
    found = rank_shapes(torch.randn(12, 12, dtype=F64), parameters=60)
    assert [f.error for f in found] == sorted(f.error for f in found)
    assert all(f.parameters <= 60 for f in found)
    assert ((12, 1), (1, 12)) in [f.structure.pairs for f in found]


# ---------------------------------------------------------------------------------------------------- convolutions

KERNELS = {
    "1 x 1": KernelSizes((2, 3, 1, 1), (2, 2, 1, 1)),
    "3 x 3, a point wise": KernelSizes((2, 2, 1, 1), (3, 2, 3, 3)),
    "3 x 3, mixed": KernelSizes((2, 2, 3, 1), (2, 3, 1, 3)),
    "2 x 3": KernelSizes((2, 2, 2, 1), (2, 1, 1, 3)),
    "6 x 6": KernelSizes((2, 1, 2, 3), (1, 2, 3, 2)),
}


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("name", KERNELS)
def test_kronecker_12_two_convolutions_are_one(name: str, first: str) -> None:
    sizes = KERNELS[name]
    f, c, h, w = sizes.kernel
    for terms in range(1, min(3, sizes.most) + 1):
        for stride, padding, dilation in ((1, 0, 1), (2, 1, 1), ((1, 2), (0, 2), 1), (1, 2, 2)):
            conv = KroneckerConv2d(
                c,
                f,
                (h, w),
                terms,
                stride=stride,
                padding=padding,
                dilation=dilation,
                sizes=sizes,
                first=first,
                dtype=F64,
            )
            assert conv.bias is not None
            nn.init.normal_(conv.bias)
            x = torch.randn(2, c, 13, 14, dtype=F64)
            wanted = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
            torch.testing.assert_close(conv(x), wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(conv(x[0]), wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_kronecker_12_projection_of_kernels(name: str) -> None:
    sizes = KERNELS[name]
    weight = torch.randn(sizes.kernel, dtype=F64)
    _, c, h, w = sizes.kernel
    split = weight.reshape(*(n for pair in zip(sizes.a, sizes.b, strict=True) for n in pair))
    values = torch.linalg.svdvals(split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(math.prod(sizes.a), -1))
    for terms in (1, 2, sizes.most):
        a, b, found = nearest_kernel(weight, sizes, terms)
        assert found.certificate is Certificate.OPTIMAL
        error = float((weight - kernel_of(a, b)).square().sum())
        assert error == pytest.approx(float(values[terms:].square().sum()), rel=1e-10, abs=1e-18)
    # In the norm of the patches: the error of the outputs.
    x = torch.randn(4, c, 9, 9, dtype=F64) * torch.rand(c, 1, 1, dtype=F64)
    patches = F.unfold(x, (h, w)).transpose(1, 2).reshape(-1, c * h * w)
    moment = patches.T @ patches / len(patches)
    errors = []
    for given in (None, moment):
        a, b, found = nearest_kernel(weight, sizes, 2, second_moment=given, sweeps=50)
        difference = F.conv2d(x, weight - kernel_of(a, b))
        errors.append(float(difference.norm() / F.conv2d(x, weight).norm()))
    assert errors[1] == pytest.approx(found.error, rel=1e-6)
    assert errors[1] <= errors[0] + 1e-12


def test_convolutions_are_converted() -> None:
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    x = torch.randn(2, 8, 11, 11)
    sizes = kernel_sizes((12, 8, 3, 3))
    assert sizes.kernel == (12, 8, 3, 3)
    exact = KroneckerConv2d.from_conv(conv, sizes.most)
    torch.testing.assert_close(exact(x), conv(x), rtol=1e-4, atol=1e-5)
    nearest = KroneckerConv2d.from_conv(conv, 2)
    assert sum(p.numel() for p in nearest.parameters()) == 2 * sizes.parameters + 12
    for wrong in (nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(8, 12, 3, padding="same")):
        with pytest.raises(StructureError, match="one group"):
            KroneckerConv2d.from_conv(wrong, 1)
    with pytest.raises(StructureError, match="terms"):
        KroneckerConv2d(8, 12, 3, 10_000)
    with pytest.raises(ShapeError, match="make"):
        nearest_kernel(conv.weight, KernelSizes((2, 2, 1, 1), (2, 2, 1, 1)), 1)
    nonlinear = KroneckerConv2d(8, 12, 3, 2, inner=torch.relu)
    assert not torch.allclose(nonlinear(-x), -nonlinear(x))
    nonlinear(x).sum().backward()
    assert all(p.grad is not None for p in nonlinear.parameters())
    for first in ("a", "b"):
        layer = KroneckerConv2d(8, 12, 3, sizes=sizes, first=first)
        assert sizes.macs(first) > 0
        assert f"{first} first" in repr(layer)


# --------------------------------------------------------------------------------------------------------- training


def test_learning_rates_of_blocks() -> None:
    block = KroneckerBlock(784, 784, 2)
    found = rate_multipliers(block, 1e-3)
    by_kind = {name.rpartition(".")[2]: factor for name, factor in found.items()}
    assert by_kind["factor0"] == pytest.approx(math.sqrt(28))
    assert by_kind["factor1"] == pytest.approx(math.sqrt(14))
    assert by_kind["bias"] == by_kind["bias0"] == 1
    assert max(rate_multipliers(block, 5e-3).values()) == 2, "no rate above 0.01"
    assert set(found) == {name for name, _ in block.named_parameters()}

    model = nn.Sequential(nn.Linear(10, 784), block, nn.Linear(784, 3))
    groups = sm.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {g["role"].split(",")[0] for g in groups} == {"matrices", "vectors", "Kronecker"}
    assert all(g["weight_decay"] == 0 for g in groups if g["role"].startswith("Kronecker"))
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()


def test_a_step_moves_every_factor_by_the_same_share() -> None:
    """What the multipliers are for: Adam moves each entry by its rate, so the share is rate by size of the entries."""
    for shape in ((784, 784), (256, 1024)):
        block = KroneckerBlock(*shape, 4, inner=None, bias="none")
        rates = rate_multipliers(block, 1e-4)
        shares = [rates[name] / float(p.detach().square().mean().sqrt()) for name, p in block.named_parameters()]
        dense = shape[0] ** 0.5
        for share in shares:
            assert share == pytest.approx(dense, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "epochs", "least"), [(1, 1, 78.0), (1, 3, 91.0), (2, 1, 90.5)])
def test_kronecker_22_mnist(real_data: object, terms: int, epochs: int, least: float) -> None:
    from benchmarks.kronecker_data import mnist

    train, test = mnist("train"), mnist("test")
    network = sm.nn.KroneckerNetwork(
        [(28, 28), (28, 28), (28, 28), (2, 5)],
        terms,
        inner=torch.tanh,
        initialize=source_,
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train.x), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(train.x[chosen]), train.y[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = 100 * float((network(test.x).argmax(1) == test.y).float().mean())
    assert accuracy > least

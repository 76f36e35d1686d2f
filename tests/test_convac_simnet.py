"""Representations, their starts, similarity layers and MEX."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from structmat.errors import DataError, ShapeError, StructureError
from structmat.nn import ConvAC, ModeTree
from structmat.nn.convac.initialize import fit_mixture, kmeans
from structmat.nn.convac.representation import (
    GaussianRepresentation,
    NeuronRepresentation,
    OneHot,
    Patches,
    Representation,
    templates,
)
from structmat.nn.convac.semiring import Log
from structmat.nn.convac.simnet import MEX, Similarity, mex
from structmat.nn.convac.training import Classifier, classifier, discriminative_optimizer, fit

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_convac_14_limits_of_mex() -> None:
    c = normal(7, 3)
    assert torch.allclose(mex(c, 1e3), c.amax(0), rtol=0, atol=1e-2)
    assert torch.allclose(mex(c, -1e3), c.amin(0), rtol=0, atol=1e-2)
    assert torch.allclose(mex(c, 1e-6), c.mean(0), rtol=0, atol=1e-6)
    assert torch.equal(mex(c, math.inf), c.amax(0))
    assert torch.equal(mex(c, -math.inf), c.amin(0))
    assert torch.allclose(mex(c, 0.0), c.mean(0), rtol=0, atol=1e-15)
    values = torch.stack([mex(c, beta) for beta in (-50.0, -3.0, -1e-3, 0.0, 1e-6, 1e-4, 1e-2, 1.0, 30.0)])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    assert torch.allclose(mex(c + 5, 2.0), mex(c, 2.0) + 5, rtol=0, atol=1e-12)
    with pytest.raises(StructureError, match="beta=0"):
        mex(c, 0.0, softmax=True)


@pytest.mark.parametrize("beta", [-2.0, 0.5, 3.0])
def test_convac_14_mex_collapses(beta: float) -> None:
    c = normal(4, 6)
    assert float((mex(mex(c, beta), beta) - mex(c.flatten(), beta)).abs()) <= 1e-12
    parts = torch.stack([mex(c[:, :2].flatten(), beta, softmax=True), mex(c[:, 2:].flatten(), beta, softmax=True)])
    assert float((mex(parts, beta, softmax=True) - mex(c.flatten(), beta, softmax=True)).abs()) <= 1e-12


@pytest.mark.parametrize(
    ("beta", "softmax"),
    [(-1.5, False), (1e-5, False), (0.0, False), (0.7, False), (4.0, False), (-1.5, True), (0.7, True), (4.0, True)],
)
def test_convac_14_gradients_of_mex(beta: float, softmax: bool) -> None:
    c = normal(5, 2).requires_grad_()
    parameter = torch.tensor(beta, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: mex(v, beta, softmax=softmax), (c,))
    # Across the switch to the series the difference quotient is that of two formulas: a wider step for tiny beta.
    step = 1e-6 if abs(beta) > 1e-2 else 1e-5
    mex(c.detach(), parameter, softmax=softmax).sum().backward()
    high, low = (mex(c.detach(), beta + sign * step, softmax=softmax).sum() for sign in (1, -1))
    assert parameter.grad is not None
    assert float(parameter.grad) == pytest.approx(float(high - low) / (2 * step), rel=1e-4, abs=1e-6)
    if beta == 0.0:
        assert float(parameter.grad) == pytest.approx(float(c.detach().var(0, correction=0).sum() / 2), rel=1e-9)


def test_convac_14_beta_is_learned() -> None:
    """A layer finds the beta of another one from its outputs."""
    teacher, student = (MEX((2, 3), beta, learned_beta=True, dtype=F64) for beta in (3.0, 0.5))
    student.offsets.data = teacher.offsets.data.clone()
    x = normal(3, 40, 5)
    optimizer = torch.optim.Adam([student.beta], lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        (student(x) - teacher(x).detach()).square().sum().backward()
        optimizer.step()
    assert float(student.beta.detach()) == pytest.approx(3.0, abs=0.05)


def test_convac_14_infinite_entries() -> None:
    c = torch.tensor([-torch.inf, 1.0, -torch.inf], dtype=F64, requires_grad=True)
    value = mex(c, 1.0, softmax=True)
    value.backward()
    assert float(value.detach()) == 1.0
    assert c.grad is not None
    assert c.grad.tolist() == [0.0, 1.0, 0.0]
    assert float(mex(torch.full((3,), -torch.inf), 1.0)) == -math.inf
    layer = MEX((2, 3), math.inf)
    assert layer(torch.zeros(3, 4, 1)).shape == (2, 4, 1)
    with pytest.raises(StructureError, match="limit"):
        MEX((2, 3), math.inf, learned_beta=True)
    with pytest.raises(ShapeError, match="3 channels"):
        layer(torch.zeros(4, 4, 1))


@pytest.mark.parametrize("constraint", ["positive", "simplex"])
def test_convac_14_a_network_in_log_space_is_a_simnet(constraint: str) -> None:
    net = ConvAC(None, ModeTree.sequence(8), 3, 2, channels=4, semiring=Log(), constraint=constraint, dtype=F64)
    x = torch.rand(5, 4, 8, dtype=F64) + 0.1
    state = x.log().permute(1, 2, 0)
    layers = [net.layers[0][0], net.layers[1][0], net.layers[2][0], net.output]
    for number, edge_map in enumerate(layers):
        weights = edge_map.weights
        layer = MEX(weights.shape, 1.0, softmax=True, normalized=constraint == "simplex", dtype=F64)
        layer.offsets.data = weights.weight.detach()[0].clone()
        state = layer(state)
        assert layer.beta.requires_grad is False
        if number < 3:
            state = state[:, ::2] + state[:, 1::2]
    assert torch.allclose(state[:, 0].T, net(x), rtol=0, atol=1e-12)


def test_convac_14_similarity_is_a_gaussian_density() -> None:
    layer = Similarity(3, 4, normalized=True, fudge=0.0).double()
    layer.log_weights.data = normal(4, 3, seed=1)
    gaussian = GaussianRepresentation(3, 4).double()
    gaussian.means.data, gaussian.log_precisions.data = layer.templates.data, layer.log_weights.data
    x = normal(2, 3, 5, seed=2)
    precision, mean = layer.log_weights.detach().exp(), layer.templates.detach()
    expected = torch.distributions.Normal(mean[:, :, None], precision.rsqrt()[:, :, None]).log_prob(x[:, None])
    assert torch.allclose(layer(x), expected.sum(2), rtol=0, atol=1e-12)
    assert torch.allclose(gaussian(x), expected.sum(2), rtol=0, atol=1e-12)
    x[0, 1, 2] = math.nan
    marginal = expected[0, :, :, 2].sum(1) - expected[0, :, 1, 2]
    for module in (layer, gaussian):
        module.zero_grad()
        got = module(x)
        assert torch.allclose(got[0, :, 2], marginal, rtol=0, atol=1e-12)
        got.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["linear", "l1", "l2"])
def test_similarities_by_hand(kind: str) -> None:
    layer = Similarity(2, 3, kind).double()
    layer.log_weights.data = normal(3, 2, seed=3)
    x = normal(1, 2, 1, seed=4)
    u, z = layer.log_weights.detach().exp(), layer.templates.detach()
    terms = {"linear": u * x[0, :, 0] * z, "l1": -u * (x[0, :, 0] - z).abs(), "l2": -u * (x[0, :, 0] - z) ** 2}[kind]
    assert torch.allclose(layer(x)[0, :, 0], terms.sum(1), rtol=0, atol=1e-12)
    x[0, 1, 0] = math.nan
    assert torch.allclose(layer(x)[0, :, 0], terms[:, 0], rtol=0, atol=1e-12)
    with pytest.raises(StructureError, match="density"):
        Similarity(2, 3, "l1", normalized=True)
    with pytest.raises(ShapeError, match="Patches"):
        layer(torch.zeros(1, 3, 1, dtype=F64))


def test_patches_and_missing_padding() -> None:
    images = torch.arange(2 * 1 * 4 * 4.0).reshape(2, 1, 4, 4)
    patches = Patches(2)(images)
    assert patches.shape == (2, 4, 4)
    assert patches[0, :, 1].tolist() == [2.0, 3.0, 6.0, 7.0]
    padded = Patches(2, padding=1)(images)
    assert padded.shape == (2, 4, 9)
    assert padded[0, :, 0].isnan().tolist() == [True, True, True, False]
    for cut in (Patches(2), Patches(2, padding=1)):
        assert torch.equal(cut.assemble(cut(images), 4, 4), images)
    with pytest.raises(ShapeError, match="stride = size"):
        Patches(3, 1).assemble(patches, 4, 4)
    assert Patches(3, 1)(images).shape == (2, 9, 4)
    with pytest.raises(ShapeError, match="cover"):
        Patches(3)(images)
    with pytest.raises(ShapeError, match="Images"):
        Patches(2)(images[0])
    with pytest.raises(ShapeError, match="at least 1"):
        Patches(0)


def test_representations_and_templates() -> None:
    data = normal(200, 2, seed=5)
    neurons = NeuronRepresentation(2, 4).double()
    values = neurons(data.T[None])
    assert values.shape == (1, 4, 200)
    assert bool((values[:, 0] == 1).all())
    found = templates(neurons, data, condition=1e12)
    assert found.shape == (2, 4)
    twice = Representation(nn.Sequential(Doubled()), 2)
    with pytest.raises(DataError, match="condition number"):
        templates(twice, data)
    with pytest.raises(ShapeError, match="constant"):
        NeuronRepresentation(2, 1)
    symbols = OneHot(3)
    assert symbols(torch.tensor([[0, -1, 2]]))[0].tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]
    with pytest.raises(ShapeError, match="integers"):
        symbols(torch.zeros(1, 3))


class Doubled(nn.Module):
    """Two functions that are multiples of each other."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.sum(1, keepdim=True)
        return torch.cat([first, 2 * first], 1)


def blobs(count: int = 300) -> Tensor:
    centers = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]], dtype=F64)
    return centers.repeat(count // 3, 1) + 0.3 * normal(count, 2, seed=6)


def test_kmeans_and_mixtures_find_blobs() -> None:
    data = blobs()
    found = kmeans(data, 3)
    assert sorted([round(float(v)) for v in row] for row in found) == [[0, 0], [0, 5], [5, 0]]
    mixture = fit_mixture(data, 3)
    assert torch.allclose(mixture.weights, torch.full((3,), 1 / 3, dtype=F64), atol=0.02)
    assert torch.allclose(mixture.variances, torch.full((3, 2), 0.09, dtype=F64), atol=0.04)
    likelihood = [
        float(fit_mixture(data, 3, steps=s, floor=0.0).log_density(data).logsumexp(1).mean()) for s in (0, 1, 5, 15)
    ]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(likelihood))
    made = GaussianRepresentation.from_mixture(mixture)
    dense = mixture.log_density(data) - mixture.weights.log()
    assert torch.allclose(made(data.T[None])[0].T, dense, rtol=1e-12, atol=1e-9)
    with pytest.raises(DataError, match="distinct"):
        kmeans(torch.ones(5, 2), 3)
    with pytest.raises(DataError, match="finite"):
        kmeans(torch.full((5, 2), math.nan), 2)
    with pytest.raises(DataError, match="centroids"):
        kmeans(torch.ones(2, 2), 3)


def test_the_default_classifier_learns_an_interaction() -> None:
    """Two of four patches must agree: no linear function of the representation tells."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (512, 4), generator=generator) * 2 - 1
    x = signs[:, None].float() + 0.1 * torch.randn(512, 1, 4, generator=generator)
    labels = (signs[:, 0] * signs[:, 1] > 0).long()
    model = classifier(
        x.permute(0, 2, 1).reshape(-1, 1),
        ModeTree.sequence(4),
        8,
        2,
        channels=4,
        sharing="unshared",
        generator=generator,
    )
    assert isinstance(model, Classifier)
    optimizer, schedule = discriminative_optimizer(model, 150)
    losses = fit(model, lambda b: nn.functional.cross_entropy(model(x), labels), range(150), optimizer, schedule)
    assert losses[-1] < 0.2 < losses[0]
    assert float((model(x).argmax(1) == labels).float().mean()) > 0.95
    with pytest.raises(DataError, match="vary"):
        classifier(torch.zeros(10, 4), ModeTree.sequence(4), 8, 2)
    with pytest.raises(DataError, match="loss of step 0"):
        fit(model, lambda b: torch.tensor(math.nan), range(1), optimizer, schedule)


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
@pytest.mark.parametrize("seed", range(3))
def test_a_shallow_network_over_many_patches_learns(sharing: str, seed: int) -> None:
    """Products of 256 factors: with the start and the rates of small windows one channel is soon all that is left."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 2, 256, generator=generator)
    labels = torch.randint(0, 2, (256,), generator=generator)
    x[:, 0] += 0.3 * (2 * labels - 1)[:, None]
    model = classifier(
        x.transpose(1, 2).reshape(-1, 2)[:4000],
        ModeTree.sequence(256).truncated(1),
        16,
        2,
        channels=8,
        sharing=sharing,
        generator=generator,
    )
    optimizer, schedule = discriminative_optimizer(model, 100)
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    filters = {id(p) for p in model.network.layers.parameters()}
    for parameter in model.parameters():
        assert math.isclose(rates[id(parameter)], 3e-3 * (2 / 16 if id(parameter) in filters else 1))
    losses = fit(model, lambda b: nn.functional.cross_entropy(model(x), labels), range(100), optimizer, schedule)
    assert losses[-1] < 0.1

"""Tensorial mixtures: exact inference against brute force over all inputs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import structmat as sm
from structmat.errors import DataError, ShapeError
from structmat.nn import ModeTree, TensorialMixture
from structmat.nn.convac.representation import GaussianRepresentation, OneHot
from structmat.nn.convac.training import fit, generative_optimizer, marginalize

F64 = torch.float64
TREES = [ModeTree.sequence(4), ModeTree.chain(4), ModeTree.mirror(2, 2), ModeTree.sequence(3)]


def symbols(tree: ModeTree = TREES[0], classes: int = 2, channels: int = 3, **options: object) -> TensorialMixture:
    generator = torch.Generator().manual_seed(0)
    return TensorialMixture(
        OneHot(channels, dtype=F64),
        tree,
        4,
        classes,
        dtype=F64,
        generator=generator,
        **options,  # type: ignore[arg-type]
    )


def everything(model: TensorialMixture) -> Tensor:
    digits = itertools.product(range(model.network.channels), repeat=model.network.tree.modes)
    return torch.tensor(list(digits))


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.modes))
@pytest.mark.parametrize("family", [None, sm.LowRank(2)], ids=["dense", "low rank"])
def test_convac_20_it_is_a_distribution(tree: ModeTree, family: sm.Structure | None) -> None:
    model = symbols(tree, weights=family)
    inputs = everything(model)
    assert torch.allclose(model(inputs).exp().sum(0), torch.ones(2, dtype=F64), rtol=0, atol=1e-12)
    nothing = torch.full((1, tree.modes), -1)
    assert float(model(nothing).detach().abs().max()) <= 1e-12
    assert torch.allclose(model.class_posterior(nothing), torch.full((1, 2), 0.5, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.modes))
def test_convac_20_marginals_are_sums(tree: ModeTree) -> None:
    model = symbols(tree)
    inputs = everything(model)
    full = model(inputs).detach().exp().reshape(*(3,) * tree.modes, 2)
    for size in range(tree.modes + 1):
        for observed in itertools.combinations(range(tree.modes), size):
            point = torch.full((tree.modes,), -1)
            index: list[int | slice] = [slice(None)] * tree.modes
            for mode in observed:
                point[mode], index[mode] = (mode + 1) % 3, (mode + 1) % 3
            expected = full[tuple(index)].reshape(-1, 2).sum(0)
            assert torch.allclose(model(point[None])[0].exp(), expected, rtol=0, atol=1e-12)


def joint(model: TensorialMixture) -> Tensor:
    """P(x) over all inputs."""
    return model.log_prob(everything(model)).detach().exp()


def test_convac_20_posterior_is_the_explicit_one() -> None:
    model = symbols()
    inputs, probabilities = everything(model), joint(model)
    point = torch.tensor([[1, -1, -1, 2]])
    match = (inputs[:, 0] == 1) & (inputs[:, 3] == 2)
    weights = torch.where(match, probabilities, 0.0)
    expected = torch.stack([weights @ (inputs == d).to(F64) for d in range(3)]) / weights.sum()
    assert torch.allclose(model.posterior(point)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tree", [TREES[0], TREES[1]], ids=["pairs", "chain"])
def test_convac_20_conditional_samples(tree: ModeTree) -> None:
    model = symbols(tree)
    inputs, probabilities = everything(model), joint(model)
    point = torch.tensor([[1, -1, -1, -1]])
    drawn = model.sample(10_000, given=point, generator=torch.Generator().manual_seed(1)).values
    assert bool((drawn[:, 0] == 1).all())
    code = drawn[:, 1] * 9 + drawn[:, 2] * 3 + drawn[:, 3]
    chosen = probabilities[inputs[:, 0] == 1]
    expected = (chosen / chosen.sum()).numpy() * 10_000
    assert chisquare(torch.bincount(code, minlength=27).numpy(), expected).pvalue > 1e-3


@pytest.mark.parametrize("tree", TREES[:3], ids=["pairs", "chain", "mirror"])
def test_convac_21_samples_follow_the_joint(tree: ModeTree) -> None:
    model = symbols(tree)
    drawn = model.sample(20_000, generator=torch.Generator().manual_seed(2))
    code = (drawn.values * torch.tensor([27, 9, 3, 1])).sum(1)
    expected = joint(model).numpy() * 20_000
    assert chisquare(torch.bincount(code, minlength=81).numpy(), expected * 20_000 / expected.sum()).pvalue > 1e-3
    of_class = model.sample(
        20_000, classes=torch.ones(20_000, dtype=torch.int64), generator=torch.Generator().manual_seed(3)
    )
    expected = model(everything(model))[:, 1].detach().exp().numpy()
    code = (of_class.values * torch.tensor([27, 9, 3, 1])).sum(1)
    assert chisquare(torch.bincount(code, minlength=81).numpy(), expected / expected.sum() * 20_000).pvalue > 1e-3


def test_convac_20_the_most_probable_explanation_is_brute_force() -> None:
    """Over the class and all hidden channels of all nodes, for a tree of two levels."""
    model = symbols()
    net = model.network
    matrices = [net.edge_matrices(level) for level in range(2)]
    top = net.output_matrix()
    point = torch.tensor([[-1, 2, -1, 0]])
    best, found = -1.0, (0, (0,))
    for y, root in itertools.product(range(2), range(4)):
        value, labels = float(top[y, root].detach()), list[int]()
        for window in range(2):
            # Maxima of independent subtrees multiply.
            options = []
            for channel in range(4):
                product, picked = float(matrices[1][0, window][root, channel].detach()), list[int]()
                for position in range(2):
                    row = matrices[0][window, position][channel].detach().clone()
                    seen = int(point[0, 2 * window + position])
                    row = row if seen < 0 else torch.where(torch.arange(3) == seen, row, 0.0)
                    product, picked = product * float(row.max()), [*picked, int(row.argmax())]
                options.append((product, picked))
            value, labels = value * max(options)[0], labels + max(options)[1]
        if value > best:
            best, found = value, (y, tuple(labels))
    got = model.explain(point)
    assert (int(got.classes[0]), tuple(got.components[0].tolist())) == found
    assert got.values[0, 1] == 2
    assert got.values[0, 3] == 0


@pytest.mark.parametrize("labelled", [False, True])
def test_convac_20_expectation_maximisation_never_lowers_the_likelihood(labelled: bool) -> None:
    truth = symbols(ModeTree.sequence(6), classes=2)
    drawn = truth.sample(300, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model = TensorialMixture(
            OneHot(3, dtype=F64), ModeTree.sequence(6), 4, 2, dtype=F64, generator=torch.Generator().manual_seed(5)
        )
    data: list[Tensor | tuple[Tensor, Tensor]] = [drawn.values[:200], drawn.values[200:]]
    if labelled:
        data = [(drawn.values, drawn.classes)]
    values = [model.em_step(data) for _ in range(12)]
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] + 0.1
    assert torch.allclose(model(everything(model)).exp().sum(0), torch.ones(2, dtype=F64), rtol=0, atol=1e-10)


def gaussians(classes: int = 2, size: int = 2) -> TensorialMixture:
    representation = GaussianRepresentation(size, 3).double()
    generator = torch.Generator().manual_seed(6)
    representation.means.data = torch.randn(3, size, dtype=F64, generator=generator)
    representation.log_precisions.data = torch.randn(3, size, dtype=F64, generator=generator)
    return TensorialMixture(representation, ModeTree.sequence(3), 4, classes, dtype=F64, generator=generator)


def brute_density(model: TensorialMixture, x: Tensor) -> Tensor:
    """P(observed part of x | y) by summing over all hidden labels."""
    representation = model.representation
    assert isinstance(representation, GaussianRepresentation)
    total = torch.zeros(len(x), model.classes, dtype=F64)
    for y in range(model.classes):
        prior = model.network.coefficient_tensor(y).detach()
        for labels in itertools.product(range(3), repeat=3):
            density = prior[labels].expand(len(x)).clone()
            for mode, d in enumerate(labels):
                for k in range(2):
                    mean, precision = (
                        representation.means[d, k].detach(),
                        representation.log_precisions[d, k].detach().exp(),
                    )
                    value = (precision / (2 * math.pi)).sqrt() * (-precision * (x[:, k, mode] - mean) ** 2 / 2).exp()
                    density = density * torch.where(x[:, k, mode].isnan(), 1.0, value)
            total[:, y] += density
    return total


def test_convac_20_densities_with_missing_pixels_are_marginals() -> None:
    model = gaussians()
    x = torch.randn(6, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(7))
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(8)) < 0.6
    mask[0] = False
    hidden = torch.where(mask, x, math.nan)
    assert torch.allclose(model(x, mask).exp(), brute_density(model, hidden), rtol=1e-10)
    patches = torch.tensor([[True, False, True]]).expand(6, 3)
    expected = torch.where(patches[:, None], x, math.nan)
    assert torch.equal(model(x, patches), model(expected))
    # Sample 0 has nothing observed: a tie.
    assert bool((model.classify(x, mask) == brute_density(model, hidden).argmax(1))[1:].all())


def test_imputation_is_the_conditional_mean() -> None:
    model = gaussians()
    x = torch.randn(1, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(9))
    x[0, 1, 1] = math.nan
    grid = torch.linspace(-60, 60, 48_001, dtype=F64)
    points = x.expand(len(grid), 2, 3).clone()
    points[:, 1, 1] = grid
    weights = model.log_prob(points).detach().exp()
    expected = float((weights * grid).sum() / weights.sum())
    got = model.impute(x)
    assert float(got[0, 1, 1]) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.where(x.isnan(), 0.0, got), torch.where(x.isnan(), 0.0, x))
    drawn = model.sample(4000, given=x, generator=torch.Generator().manual_seed(1)).values
    assert torch.equal(drawn[:, :, 0], x[:, :, 0].expand(4000, 2))
    spread = float(drawn[:, 1, 1].std()) / math.sqrt(4000)
    assert abs(float(drawn[:, 1, 1].mean()) - expected) < 4 * spread
    explained = model.explain(x)
    assert explained.values.shape == x.shape
    assert bool(explained.values.isfinite().all())


def test_gradient_training_and_random_marginalisation() -> None:
    truth = gaussians()
    drawn = truth.sample(512, generator=torch.Generator().manual_seed(2))
    model = TensorialMixture(
        truth.representation, ModeTree.sequence(3), 4, 2, dtype=F64, hidden_marginalization=(0.3,),
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    before = float(model.eval().log_prob(drawn.values).detach().mean())
    optimizer, schedule = generative_optimizer(model, 60)
    generator = torch.Generator().manual_seed(3)
    hidden = [marginalize(drawn.values, 0.3, generator=generator) for _ in range(60)]
    fit(model, lambda x: model.loss(x, drawn.classes, generative=1.0), hidden, optimizer, schedule)
    model.eval()
    assert float(model.log_prob(drawn.values).detach().mean()) > before
    assert abs(float(hidden[0].isnan().double().mean()) - 0.3) < 0.05
    scores = model(drawn.values)
    model.train()
    assert not torch.equal(model(drawn.values), scores), "hidden locations are marginalised in training only"


def test_mixtures_refuse_what_they_cannot_take() -> None:
    with pytest.raises(ShapeError, match="overlapping"):
        symbols(ModeTree.overlapping(8, (3,)))
    with pytest.raises(ShapeError, match="hidden_marginalization"):
        symbols(hidden_marginalization=(0.1, 0.1, 0.1))
    model = symbols()
    with pytest.raises(DataError, match="boolean"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4))
    with pytest.raises(ShapeError, match="mask"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(DataError, match="Symbols"):
        model(torch.full((1, 4), 7))
    with pytest.raises(DataError, match="no mean"):
        model.impute(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(DataError, match="one by one"):
        symbols(weights=sm.LowRank(2)).em_step([torch.zeros(1, 4, dtype=torch.int64)])
    with pytest.raises(DataError, match="no data"):
        model.em_step([])
    assert np.isfinite(model.em_step([torch.zeros(1, 4, dtype=torch.int64)]))

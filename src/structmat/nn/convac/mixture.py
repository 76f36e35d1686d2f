"""Tensorial mixture models: generative networks whose every marginal is exact.

P(x_1..x_N | y) = sum_d A^y[d_1..d_N] prod_i P(x_i | d_i), with all rows of weights distributions, so that the
coefficient tensor is a distribution over hidden labels d and each channel of each node one over its receptive field's
labels. A missing input is integrated out by giving it the value one: likelihood, marginals and classification under
missing data take one pass, sampling and explanations one pass up and one down. Source: Sharir, Tamari, Cohen and
Shashua, arXiv 1610.04167.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.errors import DataError, ShapeError
from structmat.nn.convac import descent
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.semiring import Log, MaxProduct, State
from structmat.nn.convac.tree import ModeTree
from structmat.nn.convac.weights import Constraint, Sharing, Weights
from structmat.structure import Structure


class Sample(NamedTuple):
    """What was drawn, or what explains an input best.

    Args:
        values: inputs, as the representation takes them.
        components: hidden labels d (batch, N).
        classes: (batch,).
    """

    values: Tensor
    components: Tensor
    classes: Tensor


class TensorialMixture(nn.Module):
    """A convolutional arithmetic circuit with rows of weights on the simplex, in log space.

    Inputs are those of the representation; missing ones are NaN (-1 for symbols), or given by ``mask``, True where an
    input is observed, of shape (batch, N) for whole patches or of the input's own shape. Right for data missing at
    random, with one model for all patterns of missing inputs.

    Args:
        representation: densities of the M components: :class:`GaussianRepresentation` or :class:`OneHot`, or a module
            with ``channels``, ``logarithm``, and ``sample`` and ``mean`` for those queries.
        tree: without overlaps.
        widths: of the levels.
        classes: outputs Y, with a uniform prior.
        sharing: by default periodic on level 0 and unshared above: the published setting for images. The first level
            has most edges and sees small patches that look alike everywhere; what lies above is specific to its place.
        weights: a family, or ``None`` for dense.
        hidden_marginalization: for each level, the probability that a pooled location is marginalised in training; the
            published MNIST model uses 0.5 after level 0.
        generator: of the Dirichlet(1, ..., 1) rows.

    Raises:
        ShapeError: the tree has overlapping windows, so that patches would be counted twice.
    """

    def __init__(
        self,
        representation: nn.Module,
        tree: ModeTree,
        widths: int | Sequence[int],
        classes: int = 1,
        *,
        sharing: Sharing | str | Sequence[Sharing | str] | None = None,
        weights: Structure | None = None,
        hidden_marginalization: Sequence[float] = (),
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if tree.overlaps:
            raise ShapeError(
                "A mixture needs a tree: overlapping windows would count patches twice. Use sequence(), ..."
            )
        depth = len(tree.levels)
        sharing = (Sharing.WINDOW, *(Sharing.UNSHARED,) * (depth - 1)) if sharing is None else sharing
        if len(hidden_marginalization) > depth or not all(0 <= p < 1 for p in hidden_marginalization):
            raise ShapeError(
                f"hidden_marginalization holds at most {depth} probabilities of 0 to below 1, one a level; got "
                f"{tuple(hidden_marginalization)}."
            )
        self.hidden_marginalization = tuple(hidden_marginalization)
        self.network = ConvAC(
            representation, tree, widths, classes, sharing=sharing, weights=weights, constraint=Constraint.SIMPLEX,
            semiring=Log(), dtype=dtype, generator=generator,
        )  # fmt: skip

    @property
    def classes(self) -> int:
        """Number of classes Y."""
        return self.network.outputs

    @property
    def representation(self) -> nn.Module:
        """The densities."""
        assert self.network.representation is not None
        return self.network.representation

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :meth:`forward`."""
        result: Tensor = super().__call__(x, mask)
        return result

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log P(observed part | y)``, (batch, Y)."""
        leaves = self.network.lift(hide(x, mask))
        return self.network.semiring.scores(self.network.evaluate(leaves, self._marginalize)).squeeze(1).T

    def _marginalize(self, level: int, state: State) -> State:
        if not self.training or level >= len(self.hidden_marginalization):
            return state
        probability = self.hidden_marginalization[level]
        dropped = torch.rand(state.value.shape[1:], device=state.value.device) < probability
        return State(torch.where(dropped, 0.0, state.value))

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log P(observed part)``, (batch,), classes equally likely; 0 if nothing is observed."""
        return self(x, mask).logsumexp(1) - math.log(self.classes)

    def classify(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The most probable class given what is observed, (batch,)."""
        return self(x, mask).argmax(1)

    def class_posterior(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``P(y | observed part)``, (batch, Y)."""
        return self(x, mask).softmax(1)

    def loss(self, x: Tensor, labels: Tensor, mask: Tensor | None = None, *, generative: float = 0.01) -> Tensor:
        """Mean cross-entropy plus ``generative`` times the mean of ``-log P(x)``.

        The factor looks tiny, but the second term is hundreds of nats for images and regularises the first.
        """
        scores = self(x, mask)
        likelihood = scores.logsumexp(1) - math.log(self.classes)
        return F.cross_entropy(scores, labels) - generative * likelihood.mean()

    def posterior(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``P(d_i = d | observed part)``, (batch, M, N): the gradient of log P with respect to the log densities."""
        with torch.enable_grad():
            leaves = self.network.lift(hide(x, mask)).value.detach().requires_grad_()
            total = self.network.evaluate(State(leaves)).value.squeeze(1).logsumexp(0)
            (gradient,) = torch.autograd.grad(total.sum(), leaves)
        order: Tensor = self.network.get_buffer("order")
        return gradient[:, order.argsort()].permute(2, 0, 1)

    def impute(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Inputs with missing numbers replaced by their expectation given the observed ones, of the shape of ``x``.

        Raises:
            DataError: the inputs are symbols, which have no mean; see :meth:`posterior` and :meth:`sample`.
        """
        hidden = hide(x, mask)
        if not hidden.is_floating_point():
            raise DataError("Symbols have no mean. Use posterior() for their probabilities, or sample(given=x).")
        with torch.no_grad():
            expected: Tensor = self.representation.mean(self.posterior(hidden))  # type: ignore[operator]
        return torch.where(hidden.isnan(), expected, hidden)

    @torch.no_grad()
    def sample(
        self,
        count: int = 1,
        *,
        given: Tensor | None = None,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Sample:
        """Draw inputs, or the missing part of given ones.

        Args:
            count: how many; with ``given``, how many for each of its rows (repeated one after the other).
            given: inputs with missing parts; what is observed stays as it is.
            mask: see the class.
            classes: (count,) or, with ``given``, (batch,); by default drawn, given what is observed.
            generator: source of randomness.
        """
        draw = descent.Draw(generator)
        hidden = None if given is None else hide(given, mask).repeat_interleave(count, 0)
        if hidden is None:
            states, scores = None, torch.zeros(self.classes, count)
        else:
            states, scores = descent.ascend(self.network, hidden)
            classes = None if classes is None else classes.repeat_interleave(count, 0)
        chosen = draw(scores.T) if classes is None else classes
        components = descent.descend(self.network, chosen, states, draw)
        values: Tensor = self.representation.sample(components, generator=generator)  # type: ignore[operator]
        return Sample(values if hidden is None else fill(hidden, values), components, chosen)

    @torch.no_grad()
    def explain(self, x: Tensor, mask: Tensor | None = None) -> Sample:
        """The most probable explanation: class and hidden labels that maximise their joint probability with the input.

        Missing numbers are set to the means of their components (symbols to the symbols): a maximum over labels and
        inputs together, not over inputs alone.
        """
        hidden = hide(x, mask)
        states, scores = descent.ascend(self.network, hidden, MaxProduct())
        classes = scores.argmax(0)
        components = descent.descend(self.network, classes, states, descent.largest)
        one_hot = F.one_hot(components, self.network.channels).transpose(1, 2)
        if hidden.is_floating_point():
            means: Tensor = self.representation.mean(one_hot.to(hidden.dtype))  # type: ignore[operator]
            return Sample(fill(hidden, means), components, classes)
        return Sample(fill(hidden, components), components, classes)

    def em_step(self, batches: Iterable[Tensor | tuple[Tensor, Tensor]], *, prior: float = 0.0) -> float:
        """One step of expectation-maximisation of all rows of weights; the likelihood never falls (without ``prior``).

        The expected counts are the gradients of log P with respect to the logarithms of the weights.

        Args:
            batches: inputs, or pairs of inputs and labels (then of ``log P(x, y)``).
            prior: added to every count.

        Returns:
            The mean log-likelihood before the step.

        Raises:
            DataError: the weights are structured, whose rows are not free, or there is no data.
        """
        if self.network.structure is not None:
            raise DataError(f"Rows of {self.network.structure} can't be set one by one. Train them by gradient.")
        self.network.zero_grad()
        total, count = 0.0, 0
        with log_weights(self.network) as weights:
            for batch in batches:
                x, labels = batch if isinstance(batch, tuple) else (batch, None)
                scores = self.network(x) - math.log(self.classes)
                each = scores.logsumexp(1) if labels is None else scores.gather(1, labels[:, None]).squeeze(1)
                each.sum().backward()
                total, count = total + float(each.detach().sum()), count + len(x)
            if not count:
                raise DataError("Expectation-maximisation got no data.")
            with torch.no_grad():
                for weight in weights:
                    assert weight.weight.grad is not None
                    counts = weight.weight.grad.clamp(min=0) + prior
                    rows = counts.sum(-1, keepdim=True)
                    floor = torch.finfo(counts.dtype).tiny
                    new = (counts / rows.clamp(min=floor)).clamp(min=floor).log()
                    # A row that no data reached stays as it was.
                    weight.weight.copy_(torch.where(rows > 0, new, weight.weight))
        self.network.zero_grad()
        return total / count


@contextmanager
def log_weights(network: ConvAC) -> Iterator[list[Weights]]:
    """Within it, parameters are the logarithms of the weights, free of the softmax; rows must sum to one at its end."""
    found = [m for m in network.modules() if isinstance(m, Weights)]
    with torch.no_grad():
        for weights in found:
            weights.weight.copy_(weights.log_dense())
            weights.constraint = Constraint.POSITIVE
    try:
        yield found
    finally:
        for weights in found:
            weights.constraint = Constraint.SIMPLEX


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs with the unobserved ones marked missing.

    Raises:
        ShapeError: the mask has neither the shape of the input nor (batch, N).
    """
    if mask is None:
        return x
    if mask.dtype != torch.bool:
        raise DataError(f"A mask is boolean, True where an input is observed; got {mask.dtype}.")
    if mask.shape != x.shape:
        if x.dim() != 3 or mask.shape != (x.shape[0], x.shape[2]):
            raise ShapeError(
                f"A mask has the shape {tuple(x.shape)} of the input, or (batch, N); got {tuple(mask.shape)}."
            )
        mask = mask.unsqueeze(1)
    return torch.where(mask, x, math.nan if x.is_floating_point() else -1)


def fill(hidden: Tensor, values: Tensor) -> Tensor:
    """Missing entries from ``values``."""
    missing = hidden.isnan() if hidden.is_floating_point() else hidden < 0
    return torch.where(missing, values.to(hidden.dtype), hidden)


__all__ = ["Sample", "TensorialMixture", "fill", "hide", "log_weights"]

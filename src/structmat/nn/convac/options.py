"""The options of a network, and which of them go together."""

from __future__ import annotations

import enum

from structmat.errors import StructureError
from structmat.nn.convac.semiring import Plain, Semiring
from structmat.nn.convac.weights import Constraint


class Pooling(enum.StrEnum):
    """What a window does with its values, per channel."""

    PRODUCT = "product"
    MAX = "max"
    AVERAGE = "average"
    """The sum: its factor 1 / w is absorbed by the next weights."""


class Activation(enum.StrEnum):
    """What follows a convolution."""

    NONE = "none"
    RELU = "relu"


class RankMethod(enum.StrEnum):
    """How the rank of a matricisation is found."""

    GENERIC = "generic"
    """That of almost all weights: random ones in a finite field, without tolerances."""
    EXACT = "exact"
    """That of the network's own weights, as the rational numbers that the floats are."""
    SKETCH = "sketch"
    """Of its own weights in float64: the network on random functionals of both sides, and a tolerance."""
    SPECTRUM = "spectrum"
    """Of its own weights in float64: singular values above rounding, for partitions of few tiles."""


UNSUPPORTED = (
    "a logarithmic semiring with unconstrained weights: Log() and MaxProduct() hold numbers of at least 0",
    "ReLU or pooling by maximum or average in any semiring but Plain(): they are not multilinear",
    "product pooling with ReLU, or max and average pooling without: no model of the literature, no theorem",
    "complex or Fourier families under a constraint: their entries have both signs; nor can families be constrained "
    "that have fixed negative entries or rows without entries",
    "overlapping windows in a TensorialMixture, a coefficient tensor or a minimum cut: inputs would be counted twice",
    "other semirings than Plain() and Scaled() in RecurrentConvAC and MixedConvAC: signed cores, and a sum of two "
    "scores",
)
"""The combinations that raise, each with its reason."""


def check_options(semiring: Semiring, constraint: Constraint, activation: Activation, pooling: Pooling) -> None:
    """Refuse what ``UNSUPPORTED`` lists.

    Raises:
        StructureError: such a combination.
    """
    if not semiring.allows_negative and constraint is Constraint.NONE:
        raise StructureError(
            f"The semiring {semiring} holds numbers of at least 0, and the weights are unconstrained. Use "
            "constraint='positive' or 'simplex', or the semiring Scaled() or SignedLog()."
        )
    relu, product = activation is Activation.RELU, pooling is Pooling.PRODUCT
    if relu == product:
        raise StructureError(
            f"activation={activation.value!r} with pooling={pooling.value!r} is not supported. Use "
            "ReLU with 'max' or 'average', and 'product' without activation."
        )
    if relu and semiring != Plain():
        raise StructureError(
            f"A rectifier network does not run in {semiring}: its layers are not multilinear. Use Plain()."
        )

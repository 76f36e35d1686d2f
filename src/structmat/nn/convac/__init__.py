"""Convolutional arithmetic circuits: networks whose expressive power can be computed.

A network is a tensor decomposition of its coefficient tensor; a mode tree says which. Cohen, Sharir and Shashua, "On
the Expressive Power of Deep Learning: A Tensor Analysis", COLT 2016, and its follow-ups.
"""

from structmat.nn.convac.convert import from_cp, from_ht, from_tensor_train, to_cp, to_ht, to_tensor_train
from structmat.nn.convac.cpfit import fit_cp
from structmat.nn.convac.htsvd import ht_round, ht_svd
from structmat.nn.convac.initialize import fit_mixture, kmeans
from structmat.nn.convac.mixed import MixedConvAC
from structmat.nn.convac.mixture import TensorialMixture
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.options import UNSUPPORTED
from structmat.nn.convac.recurrent import RecurrentConvAC
from structmat.nn.convac.representation import (
    GaussianRepresentation,
    NeuronRepresentation,
    OneHot,
    Patches,
    Representation,
    templates,
)
from structmat.nn.convac.semiring import Log, MaxProduct, Plain, RootMeanSquare, Scaled, SignedLog
from structmat.nn.convac.simnet import MEX, Similarity, mex
from structmat.nn.convac.training import (
    classifier,
    discriminative_optimizer,
    fit,
    generative_optimizer,
    marginalize,
)
from structmat.nn.convac.tree import ModeTree
from structmat.nn.convac.weights import averaging_, averaging_spread, dirichlet_, normal_, orthogonal_

__all__ = [
    "MEX",
    "UNSUPPORTED",
    "ConvAC",
    "GaussianRepresentation",
    "Log",
    "MaxProduct",
    "MixedConvAC",
    "ModeTree",
    "NeuronRepresentation",
    "OneHot",
    "Patches",
    "Plain",
    "RecurrentConvAC",
    "Representation",
    "RootMeanSquare",
    "Scaled",
    "SignedLog",
    "Similarity",
    "TensorialMixture",
    "averaging_",
    "averaging_spread",
    "classifier",
    "dirichlet_",
    "discriminative_optimizer",
    "fit",
    "fit_cp",
    "fit_mixture",
    "from_cp",
    "from_ht",
    "from_tensor_train",
    "generative_optimizer",
    "ht_round",
    "ht_svd",
    "kmeans",
    "marginalize",
    "mex",
    "normal_",
    "orthogonal_",
    "templates",
    "to_cp",
    "to_ht",
    "to_tensor_train",
]

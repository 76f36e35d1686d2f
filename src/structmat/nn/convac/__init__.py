"""Convolutional arithmetic circuits: networks whose expressive power can be computed.

A network is a tensor decomposition of its coefficient tensor; a mode tree says which. Cohen, Sharir and Shashua, "On
the Expressive Power of Deep Learning: A Tensor Analysis", COLT 2016, and its follow-ups.
"""

from structmat.nn.convac.mixture import TensorialMixture
from structmat.nn.convac.network import ConvAC
from structmat.nn.convac.tree import ModeTree

__all__ = ["ConvAC", "ModeTree", "TensorialMixture"]

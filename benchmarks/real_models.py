"""The trained models that the studies use."""

from __future__ import annotations

from benchmarks.real_data import DATA, Draws, RealModel, require_data
from benchmarks.real_language import LANGUAGE_MODEL, WINDOW, bits_per_character
from benchmarks.real_perceptron import PERCEPTRON
from benchmarks.real_pictures import RESNET_20, RESNET_56
from benchmarks.real_recurrent import CHAR_LSTM, G2P_GRU

__all__ = ["DATA", "MODELS", "WINDOW", "Draws", "RealModel", "bits_per_character", "require_data"]

MODELS = {real.name: real for real in (LANGUAGE_MODEL, PERCEPTRON, RESNET_20, RESNET_56, G2P_GRU, CHAR_LSTM)}

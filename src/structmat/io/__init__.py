"""Saving and loading: safetensors and one JSON file, never pickle, never a dense copy.

The format is specified in :mod:`structmat.file_format`.
"""

from structmat.io.loading import load
from structmat.io.saving import save
from structmat.io.sizes import StoredSize, size_on_disk

__all__ = ["StoredSize", "load", "save", "size_on_disk"]

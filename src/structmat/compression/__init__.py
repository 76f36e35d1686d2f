"""Compression of trained models, one module a step; :func:`structmat.compress` is the whole way."""

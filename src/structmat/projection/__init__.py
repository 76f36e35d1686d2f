"""Approximating a given matrix: targets and certificates, and algorithms that several families share."""

"""What combinations of structures share: names and initialisation of their parts' tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from structmat.program import build
from structmat.program.scaling import scaling_cut
from structmat.structure import ParameterSpec, Scaled, Shape, Structure, specs


def prefixed(part: str, name: str) -> str:
    """The name of a part's tensor in the whole. Without dots, which PyTorch does not allow in parameters."""
    return f"{part}_{name}"


def scaled_specs(part: Structure, shape: Shape, factor: float) -> Mapping[str, ParameterSpec]:
    """The tensors of a part, its initial matrix multiplied by ``factor``.

    A part whose program is an opaque function of its tensors keeps its own scale.
    """
    own = specs(part, shape)
    cut = scaling_cut(build(part, shape)) or frozenset()
    return {
        name: replace(spec, init=Scaled(spec.init, factor)) if name in cut and factor != 1.0 else spec
        for name, spec in own.items()
    }

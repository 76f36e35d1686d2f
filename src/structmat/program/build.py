"""From a structure and a shape to its program, padded and cropped where the family needs it."""

from __future__ import annotations

from functools import lru_cache

from structmat.program.combinators import Chain, Program
from structmat.program.simplify import simplify
from structmat.program.stages import Crop, Pad
from structmat.structure import Shape, Structure, resolve


@lru_cache(maxsize=4096)
def build(structure: Structure, shape: Shape) -> Program:
    """The simplified program that multiplies by a member of ``structure`` of shape ``(out, in)``; cached.

    Raises:
        ShapeError: the structure refuses the shape.
    """
    structure = resolve(structure, shape)
    out_features, in_features = shape
    native_out, native_in = structure.native_shape(shape)
    core = structure.program((native_out, native_in))
    assert (core.out_features, core.in_features) == (native_out, native_in), f"{structure}: {core}"
    return simplify(Chain((Pad(in_features, native_in), core, Crop(native_out, out_features))))

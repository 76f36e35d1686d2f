"""A plan in words."""

from __future__ import annotations

from structmat.nn.convolution.geometry import Geometry
from structmat.nn.convolution.plan import Add, Convolve, Plan, Rows, Scale, Spread, Step, channels
from structmat.program import stages


def lines(plan: Plan, geometry: Geometry, groups: int) -> list[str]:
    """One numbered line a step; the parts of a sum are indented."""
    return [f"{number}. {line}" if number else line for number, line in _numbered(plan, geometry, groups)]


def _numbered(plan: Plan, geometry: Geometry, groups: int) -> list[tuple[int, str]]:
    made: list[tuple[int, str]] = []
    for number, step in enumerate(plan, 1):
        made.append((number, _line(step, geometry, groups)))
        if isinstance(step, Add):
            for part in step.parts:
                made += [(0, f"   {line}") for line in lines(part, geometry, groups)]
    return made


def _line(step: Step, geometry: Geometry, groups: int) -> str:
    match step:
        case Convolve():
            return f"{step.stage}: {_convolution(step, geometry, groups)}"
        case Scale():
            return f"{step.stage}: a number for each channel"
        case Spread():
            return "taps that index outputs: maps moved and put side by side"
        case Rows():
            names = "; ".join(map(str, stages(step.program)))
            where = "patches, written out for a few images at a time" if step.taps else "the channels of each place"
            return f"{names}: on {where}"
        case Add():
            return f"the sum of {len(step.parts)} outcomes"
        case _:
            return "channels moved, added or left out"


def _convolution(step: Convolve, geometry: Geometry, groups: int) -> str:
    stage = step.stage
    a = 1 if stage.shared_a else channels(step.a)
    d = 1 if stage.shared_d else channels(step.d)
    count = groups * a * d
    inside = {axis.tap for axis in step.c}
    kernel = [size if axis in inside else 1 for axis, size in enumerate(geometry.kernel)]
    kind = "transposed convolution" if geometry.transposed else "convolution"
    text = f"{kind} {' x '.join(map(str, kernel))}, {count * channels(step.c)} -> {count * stage.b} channels"
    if count > 1:
        text += f" in {count} groups"
    strides = [geometry.stride[axis] if axis in step.along else 1 for axis in range(geometry.dims)]
    if max(strides) > 1:
        text += f", stride {' x '.join(map(str, strides))}"
    repeats = channels((*step.a, *step.d)) // (a * d)
    if repeats > 1:
        text += f", the same for {repeats} parts of the channels"
    if step.each:
        taps = 1
        for axis in (*step.a, *step.d):
            taps *= axis.size if axis.tap in step.each else 1
        text += f", one for each of {taps} taps"
    return text

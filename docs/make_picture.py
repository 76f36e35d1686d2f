"""The picture of the README: ``python docs/make_picture.py`` draws members of several families beside their stages.

Every number of every matrix is drawn: positive ones blue, negative ones orange, the larger the stronger; zeros are
left open. Colours and greys are such that the picture reads on light and on dark pages.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import structmat as sm
from structmat.program import Call, Contraction, Program, apply, stages
from structmat.program import Sum as SumProgram
from structmat.structure import Shape, Structure, count_stored

SHAPE: Shape = (64, 64)
SHOWN: tuple[tuple[Structure, Structure], ...] = (
    (sm.LowRank(rank=8), sm.BLAST(blocks=4, rank=8)),
    (sm.Monarch(blocks=8, rank=1), sm.Butterfly()),
    (sm.Kronecker(terms=1), sm.Product(sm.BlockDiagonal(blocks=8), sm.Kronecker(terms=1))),
    (sm.Sparse(density=0.06), sm.Sum(sm.LowRank(rank=4), sm.BlockDiagonal(blocks=8))),
)
"""Row by row; the second column has room for more stages."""

GREY = "#808080"
BLUE, ORANGE = (0.16, 0.50, 0.90), (0.93, 0.47, 0.10)
WIDTHS, HEIGHT, MARGIN = (262.0, 492.0), 116.0, 12.0
"""Of the fields of one family, in points."""

GAP, MEMBER, STAGE = 17.0, 1.2, 0.8
"""Space for a sign, and points for an entry of a member and of a stage."""


def draw(axes: Axes, matrix: torch.Tensor, x: float, y: float, scale: float, caption: str) -> float:
    """A matrix with its left edge at x and its middle at y; where its right edge is."""
    rows, columns = matrix.shape
    strength = (matrix.abs() / matrix.abs().quantile(0.97)).clamp(max=1.0)
    strength = torch.where(matrix == 0, 0.0, 0.15 + 0.85 * strength)
    colours = np.where(matrix.numpy()[..., None] > 0, BLUE, ORANGE)
    levels = (strength * 12).round() / 12  # fewer levels make a smaller file
    box = (x, x + columns * scale, y + rows * scale / 2, y - rows * scale / 2)
    axes.imshow(np.dstack([colours, levels.numpy()]), extent=box, interpolation="none", zorder=1)
    axes.add_patch(
        Rectangle((x, box[3]), columns * scale, rows * scale, fill=False, edgecolor=GREY, linewidth=0.5, zorder=2)
    )
    axes.text((box[0] + box[1]) / 2, box[2] + 3, caption, ha="center", va="top", fontsize=6, color=GREY)
    return box[1]


def sign(axes: Axes, text: str, x: float, y: float) -> float:
    axes.text(x + GAP / 2, y, text, ha="center", va="center", fontsize=9, color=GREY)
    return x + GAP


def terms(program: Program) -> list[Program]:
    return list(program.parts) if isinstance(program, SumProgram) else [program]


def name(structure: Structure) -> str:
    """As one writes it."""
    if isinstance(structure, sm.Sum):
        return f"Sum({', '.join(map(name, structure.parts))})"
    if isinstance(structure, sm.Product):
        return f"Product({name(structure.left)}, {name(structure.right)})"
    given = [f.name for f in dataclasses.fields(structure) if getattr(structure, f.name) is not None]  # type: ignore[arg-type]
    return f"{type(structure).__name__}({', '.join(f'{field}={getattr(structure, field)}' for field in given)})"


def family(axes: Axes, structure: Structure, x: float, y: float) -> None:
    """One family: its name, its share, a member, and the member as a product of stages."""
    generator = torch.Generator().manual_seed(3)
    member = sm.StructuredMatrix.random(structure, SHAPE, generator=generator)
    share = count_stored(structure, SHAPE) / (SHAPE[0] * SHAPE[1])
    title = axes.text(x, y, name(structure), fontsize=8.5, color=GREY, weight="bold", va="center")
    axes.annotate(
        f"  {share:.0%} of the numbers",
        (1.0, 0.5),
        xycoords=title,
        fontsize=7.5,
        color=GREY,
        va="center",
        annotation_clip=False,
    )
    middle = y + 52
    x = draw(axes, member.to_dense(), x, middle, MEMBER, "")
    for number, part in enumerate(terms(member.program)):
        x = sign(axes, "+" if number else "=", x, middle)
        # The stage that is applied last is the left factor.
        for place, stage in enumerate(reversed(stages(part))):
            x = sign(axes, "·", x - 4, middle) - 4 if place else x
            assert not isinstance(stage, Call)
            matrix = apply(stage, member.tensors, torch.eye(stage.in_features)).T
            caption = ", ".join(map(str, stage.pattern)) if isinstance(stage, Contraction) else str(stage).split()[0]
            x = draw(axes, matrix, x, middle, STAGE, caption)


def picture(path: Path) -> None:
    """Draw all of :data:`SHOWN` in two columns."""
    options = {"svg.hashsalt": "structmat", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with plt.rc_context(options):
        size = (sum(WIDTHS), len(SHOWN) * HEIGHT)
        figure = plt.figure(figsize=(size[0] / 72, size[1] / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        for row, pair in enumerate(SHOWN):
            for structure, start in zip(pair, (0.0, WIDTHS[0]), strict=True):
                family(axes, structure, start + MARGIN, row * HEIGHT + 12)
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="equal")
        axes.axis("off")
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    picture(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("picture.svg"))

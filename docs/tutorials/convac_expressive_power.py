"""The expressive power of convolutional arithmetic circuits, in pictures.

    python docs/tutorials/convac_expressive_power.py [folder]

Writes ``convac_cut.svg``, ``convac_square.svg`` and ``convac_mirror.svg`` into the folder (default: here), and prints
what they show. Seconds on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import structmat as sm
from structmat.nn.convac import fit_cp, orthogonal_
from structmat.nn.convac.bounds import shallow_width

PART = (0, 1, 2, 3, 8, 9, 10, 11)
"""Blocks of four of 16 modes, in turn on one side and the other."""


def cut_picture() -> str:
    """A deep network of 16 modes, and the cheapest way to cut one side of a partition from the other."""
    net = sm.nn.ConvAC(None, sm.nn.ModeTree.sequence(16), (3, 3, 2, 2), channels=3, sharing="unshared")
    cut = net.mincut(PART)
    print(f"1. The minimum cut of blocks of four severs {len(cut.nodes)} pooling nodes: rank {cut.value}.")
    assert net.rank(PART) == cut.value
    return net.draw(PART)


def pooling_pictures() -> dict[str, str]:
    """One partition, two pooling geometries: what is cheap for one is dear for the other."""
    left = [i for i in range(16) if i % 4 < 2]
    pictures = {}
    for name, tree in (("square", sm.nn.ModeTree.square(4, 4)), ("mirror", sm.nn.ModeTree.mirror(4, 4))):
        net = sm.nn.ConvAC(None, tree, (2, 2), channels=2, sharing="unshared")
        print(f"2. {name} windows, left | right half of a 4 x 4 image: rank {net.rank(left)}.")
        pictures[name] = net.draw(left)
    return pictures


def what_depth_buys() -> None:
    """The best shallow approximation of a deep network, width by width, and the bound that none can beat."""
    torch.manual_seed(0)
    for modes in (4, 8):
        tree = sm.nn.ModeTree.sequence(modes)
        deep = sm.nn.ConvAC(None, tree, 2, channels=2, sharing="unshared", initialize=orthogonal_, dtype=torch.float64)
        tensor, exact = deep.coefficient_tensor().detach(), shallow_width(2, deep.widths, modes)
        print(f"3. N = {modes}: a deep network of {deep.num_parameters} parameters needs a shallow width of {exact}.")
        for terms in (1, exact // 2, exact):
            found = fit_cp(tensor, terms, sweeps=60, starts=2)
            print(f"   width {terms:2}: relative error {found.error:.3f}, at least {found.lower:.3f}")
            assert found.lower <= found.error + 1e-9


def main(folder: Path) -> None:
    """Write the pictures."""
    (folder / "convac_cut.svg").write_text(cut_picture() + "\n", encoding="utf-8")
    for name, picture in pooling_pictures().items():
        (folder / f"convac_{name}.svg").write_text(picture + "\n", encoding="utf-8")
    what_depth_buys()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())

"""Mode trees: which inputs a network multiplies together, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from structmat.errors import ShapeError
from structmat.nn.convac import geometry

Windows = tuple[tuple[int, ...], ...]
"""The windows of a level; each is a tuple of nodes, or -1 for a position that contributes the factor one."""


class Edge(NamedTuple):
    """A child in a window: it has a 1 x 1 convolution of its own.

    Args:
        level: of the window, 0 for the lowest.
        window: its number in the level.
        position: the child's place in the window.
        node: the child.
    """

    level: int
    window: int
    position: int
    node: int


@dataclass(frozen=True)
class ModeTree:
    """A network's tree: the leaves are the N inputs, an interior node multiplies its children.

    Nodes are numbered: the leaves 0..N-1 in tree order, then the windows of level 0, level 1, ... The last level has
    one window, the root. A window may have fewer children than its neighbors (-1 fills it up): the missing child
    contributes the factor one, as a marginalised patch does, so that any number of patches fits.

    Args:
        leaves: the mode of each leaf in tree order, a permutation of 0..N-1.
        levels: the windows of each level.

    Raises:
        ShapeError: the leaves are no permutation, a window reads a node that is not below it, a node is not read at
            all, or the last level has not exactly one window.
    """

    leaves: tuple[int, ...]
    levels: tuple[Windows, ...]

    def __post_init__(self) -> None:
        modes = len(self.leaves)
        if sorted(self.leaves) != list(range(modes)) or modes == 0:
            raise ShapeError(f"The leaves must be a permutation of 0..{modes - 1}; got {self.leaves[:8]}...")
        if not self.levels or len(self.levels[-1]) != 1:
            count = len(self.levels[-1]) if self.levels else 0
            raise ShapeError(f"The last level has {count} windows; it must have exactly one, the root.")
        below, used = modes, set[int]()
        for number, windows in enumerate(self.levels):
            if not windows or len({len(w) for w in windows}) != 1:
                raise ShapeError(
                    f"Level {number} must have windows of one length (fill up with -1); got {windows[:4]}."
                )
            for window in windows:
                children = [c for c in window if c != geometry.NOTHING]
                if not children or min(children) < 0 or max(children) >= below:
                    raise ShapeError(
                        f"A window of level {number} reads the nodes {window}; it must read at least one of the nodes "
                        f"0..{below - 1}, which are below it."
                    )
                used.update(children)
            below += len(windows)
        if len(used) != below - 1:
            lost = sorted(set(range(below - 1)) - used)
            raise ShapeError(f"The nodes {lost[:8]} are read by no window. Every node but the root needs a parent.")

    @classmethod
    def sequence(cls, modes: int, window: int = 2) -> ModeTree:
        """Neighbors together, ``window`` at a time; any number of modes."""
        return cls(*geometry.sequence(modes, window))

    @classmethod
    def square(cls, height: int, width: int) -> ModeTree:
        """2 x 2 windows of neighboring patches of an image; mode ``i * width + j`` is row i, column j."""
        return cls(*geometry.square(height, width))

    @classmethod
    def mirror(cls, height: int, width: int) -> ModeTree:
        """A node with its horizontal, vertical and double reflection (Cohen and Shashua, ICLR 2017)."""
        return cls(*geometry.mirror(height, width))

    @classmethod
    def alternating(cls, height: int, width: int, *, rows_first: bool = True) -> ModeTree:
        """Windows of two, first along one axis of the image, then along the other, and so on: a binary tree.

        ``rows_first``: the first windows lie within a row.
        """
        return cls(*geometry.alternating(height, width, rows_first))

    @classmethod
    def nested(cls, tree: Any) -> ModeTree:
        """Any tree, as nested sequences of modes: ``ModeTree.nested(((0, 1), (2, (3, 4))))``."""
        return cls(*geometry.nested(tree))

    @classmethod
    def chain(cls, modes: int) -> ModeTree:
        """The tree of recurrence and of tensor-train: one mode joins at each level."""
        return cls(*geometry.chain(modes))

    @classmethod
    def dilated(cls, order: Sequence[int]) -> ModeTree:
        """The binary tree of 2^L modes in which level l joins the modes that differ in bit ``order[l]``.

        ``order = 0, 1, 2, ...`` is :meth:`sequence`; other orders are those of mixed dilated convolutions
        (Cohen, Tamari and Shashua, ICLR 2018).
        """
        return cls(*geometry.dilated(order))

    @classmethod
    def overlapping(
        cls, shape: int | Sequence[int], kernels: Sequence[int], strides: Sequence[int] | None = None
    ) -> ModeTree:
        """Layers of windows that overlap, then one global product: generalised convolutions (Sharir and Shashua 2018).

        Args:
            shape: number of modes, or (height, width).
            kernels: window size of each layer.
            strides: step of each layer, by default 1.
        """
        return cls(*geometry.overlapping(shape, kernels, strides))

    def truncated(self, levels: int) -> ModeTree:
        """The tree with that many levels: the last one multiplies all that is left. ``truncated(1)`` is the CP tree.

        Raises:
            ShapeError: not 1 <= levels <= the number of levels.
        """
        if not 1 <= levels <= len(self.levels):
            raise ShapeError(
                f"The tree has {len(self.levels)} levels; truncated({levels}) needs one of 1 to that many."
            )
        kept = self.levels[: levels - 1]
        used = {c for windows in kept for window in windows for c in window}
        end = len(self.leaves) + sum(map(len, kept))
        # Leaves that join higher up join at the root; with overlaps all of the last level does.
        return ModeTree(self.leaves, (*kept, (tuple(n for n in range(end) if n not in used),)))

    @property
    def modes(self) -> int:
        """Number of inputs N."""
        return len(self.leaves)

    @property
    def nodes(self) -> int:
        """Leaves and windows."""
        return len(self.leaves) + sum(map(len, self.levels))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first node of each level."""
        starts = [len(self.leaves)]
        for windows in self.levels[:-1]:
            starts.append(starts[-1] + len(windows))
        return tuple(starts)

    def level_of(self, node: int) -> int:
        """-1 for a leaf."""
        return sum(start <= node for start in self.starts) - 1

    @cached_property
    def overlaps(self) -> bool:
        """Whether a node is read by more than one window: then scores are no multilinear function of the inputs."""
        children = [c for windows in self.levels for window in windows for c in window if c != geometry.NOTHING]
        return len(children) != len(set(children))

    def children(self, node: int) -> tuple[int, ...]:
        """The nodes that a node multiplies; none for a leaf."""
        level = self.level_of(node)
        if level < 0:
            return ()
        return tuple(c for c in self.levels[level][node - self.starts[level]] if c != geometry.NOTHING)

    def edges(self, level: int) -> Iterator[Edge]:
        """The children of a level's windows, window by window."""
        for number, window in enumerate(self.levels[level]):
            for position, node in enumerate(window):
                if node != geometry.NOTHING:
                    yield Edge(level, number, position, node)

    @cached_property
    def masks(self) -> tuple[int, ...]:
        """The modes below each node, as bits of an integer."""
        masks = [1 << mode for mode in self.leaves]
        for windows in self.levels:
            for window in windows:
                masks.append(0)
                for child in window:
                    if child != geometry.NOTHING:
                        masks[-1] |= masks[child]
        return tuple(masks)

    def modes_below(self, node: int) -> tuple[int, ...]:
        """The modes below a node, ascending."""
        return tuple(m for m in range(self.modes) if self.masks[node] >> m & 1)


def check_partition(modes: int, part: Sequence[int]) -> frozenset[int]:
    """One side of a partition of ``modes`` inputs.

    Raises:
        ShapeError: a mode is named twice or does not exist.
    """
    chosen = frozenset(part)
    if len(chosen) != len(tuple(part)) or not chosen <= set(range(modes)):
        raise ShapeError(
            f"A partition of {modes} modes lists some of 0..{modes - 1} once each; got {tuple(part)[:12]}."
        )
    return chosen

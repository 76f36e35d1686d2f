"""Writing a small network's tensors out: the coefficient tensor and the grid tensor.

Indexing: the tensor has one axis for each mode, in the modes' own order (not tree order); a matricisation has the
modes of ``part`` as rows in increasing order, C order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from structmat.errors import ShapeError
from structmat.nn.convac.tree import ModeTree, check_partition

if TYPE_CHECKING:
    from structmat.nn.convac.network import ConvAC

LARGEST = 2**26
"""Entries of a tensor that is written out; beyond it the request is a mistake."""

T = TypeVar("T")


def fold(
    tree: ModeTree, leaf: Callable[[int], T], edge: Callable[[int, int, int, T], T], multiply: Callable[[list[T]], T]
) -> T:
    """Walk a tree from the leaves to the root.

    Args:
        tree: any tree, with overlaps too.
        leaf: the value of a mode.
        edge: ``(level, window, position, child's value)`` to what the convolution of that edge makes of it.
        multiply: the values of a window to that of its node.
    """
    values: list[T] = [leaf(mode) for mode in tree.leaves]
    for level, windows in enumerate(tree.levels):
        for number, window in enumerate(windows):
            parts = [edge(level, number, position, values[c]) for position, c in enumerate(window) if c >= 0]
            values.append(multiply(parts))
    return values[-1]


def check_multilinear(network: ConvAC) -> None:
    """A network whose scores are multilinear in the representation, so that it has a coefficient tensor.

    Raises:
        ShapeError: it has overlapping windows or a rectifier.
    """
    if network.tree.overlaps or network.pooling.value != "product":
        reason = "overlapping windows" if network.tree.overlaps else "rectifiers"
        raise ShapeError(f"A network with {reason} has no coefficient tensor. Use grid_tensor(templates).")


def coefficient_tensor(network: ConvAC, output: int = 0) -> Tensor:
    """The tensor ``A^y``, (M,) * N; gradients flow to the weights. Memory ``M^N r``.

    Raises:
        ShapeError: the network has none, it has more than 2^26 entries, or there is no such output.
    """
    check_multilinear(network)
    modes, size = network.tree.modes, network.channels
    _check_size(size, modes)
    if not 0 <= output < network.outputs:
        raise ShapeError(f"The network has {network.outputs} outputs, 0..{network.outputs - 1}; got output={output}.")
    matrices = [network.edge_matrices(level) for level in range(len(network.tree.levels))]
    eye = torch.eye(size, dtype=network.output_matrix().dtype)

    def product(parts: list[Tensor]) -> Tensor:
        result = parts[0]
        for part in parts[1:]:
            result = (result[:, None, :] * part[None, :, :]).flatten(0, 1)
        return result

    root = fold(network.tree, lambda mode: eye, lambda l, j, p, x: x @ matrices[l][j, p].T, product)
    tensor = (root @ network.output_matrix()[output]).reshape((size,) * modes)
    return tensor.permute(*_places(visited(network.tree)))


def visited(tree: ModeTree) -> list[int]:
    """The modes in the order in which a walk meets them (with leaves at several heights not the tree order)."""
    return fold(tree, lambda mode: [mode], lambda l, j, p, x: x, lambda parts: list(itertools.chain(*parts)))


def _places(order: Sequence[int]) -> list[int]:
    return [order.index(mode) for mode in range(len(order))]


def grid_tensor(network: ConvAC, templates: Tensor, output: int = 0, *, batch: int = 4096) -> Tensor:
    """Scores on all N-tuples of templates: ``G[i_1..i_N] = h_y(z_{i_1}, .., z_{i_N})``.

    It needs function values only, so that it also stands for networks that are not multilinear. For those that are, it
    is the coefficient tensor multiplied by ``F[i, d] = f_d(z_i)`` in every mode, and has the same ranks if F is
    invertible.

    Args:
        network: any.
        templates: (size, count) patches; without a representation, (M, count) vectors of representation values.
        output: which score.
        batch: tuples that are evaluated at a time.

    Raises:
        ShapeError: more than 2^26 entries.
    """
    count, modes = templates.shape[-1], network.tree.modes
    _check_size(count, modes)
    values = template_values(network, templates)  # (M, count)
    total, parts = count**modes, []
    for start in range(0, total, batch):
        number = torch.arange(start, min(start + batch, total))
        digits = torch.stack([number // count ** (modes - 1 - i) % count for i in network.tree.leaves])
        leaves = network.semiring.lift(values[:, digits], logarithm=False)
        parts.append(network.semiring.values(network.evaluate(leaves))[output, 0])
    return torch.cat(parts).reshape((count,) * modes)


def template_values(network: ConvAC, templates: Tensor) -> Tensor:
    """The representation of templates, (M, count), plain numbers: the transpose of F."""
    if network.representation is None:
        return templates
    shown: Tensor = network.representation(templates.unsqueeze(0))[0]
    return shown.exp() if getattr(network.representation, "logarithm", False) else shown


def matricize(tensor: Tensor, part: Sequence[int]) -> Tensor:
    """Rows: the modes of ``part`` in increasing order; columns: the others. C order, as TensorLy's ``unfold``."""
    chosen = sorted(check_partition(tensor.dim(), part))
    rest = [mode for mode in range(tensor.dim()) if mode not in chosen]
    rows = 1
    for mode in chosen:
        rows *= tensor.shape[mode]
    return tensor.permute(*chosen, *rest).reshape(rows, -1)


def _check_size(size: int, modes: int) -> None:
    if size**modes > LARGEST:
        raise ShapeError(
            f"A tensor with {modes} modes of size {size} has {size}^{modes} entries, more than 2^26. Write out a "
            "smaller network, or ask for ranks and spectra, which need no tensor."
        )

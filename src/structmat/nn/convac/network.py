"""Convolutional arithmetic circuits: networks of 1 x 1 convolutions and products on a mode tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.convac import native
from structmat.nn.convac.options import Activation, Pooling, RankMethod, check_options
from structmat.nn.convac.semiring import Scaled, Semiring, Signed, State, concatenate, select
from structmat.nn.convac.tree import Edge, ModeTree
from structmat.nn.convac.weights import (
    Constraint,
    EdgeMap,
    Sharing,
    Slot,
    Weights,
    averaging_,
    averaging_spread,
    dirichlet_,
    normal_,
)
from structmat.nn.convac.windows import window_product
from structmat.structure import Structure

if TYPE_CHECKING:
    from structmat.circuit import Circuit
    from structmat.nn.convac.inductive_bias import InductiveBias, RankBounds
    from structmat.nn.convac.mincut import Cut
    from structmat.nn.convac.spectrum import Spectrum


Initialize = Callable[[Weights], None]


class ConvAC(nn.Module):
    """Scores ``h_y(x_1..x_N) = sum A^y[d_1..d_N] prod_i f_{d_i}(x_i)`` with a decomposed coefficient tensor.

    Level l convolves (1 x 1, no bias) and multiplies over the windows of ``tree.levels[l]``; a last convolution gives
    the outputs. One level is a CP decomposition (the shallow network), a binary tree a hierarchical Tucker one (the
    deep network), a chain a tensor-train. Source: Cohen, Sharir and Shashua, COLT 2016, sections 3 to 5.

    Parameters with sharing "unshared": ``sum_l edges_l r_{l-1} r_l + Y r_{L-1}``; the multiply-adds are as many for any
    sharing. With ``activation`` ReLU and pooling "max" or "average" it is the convolutional rectifier network of the
    same shape (Cohen and Shashua, ICML 2016).

    Args:
        representation: a module (batch, size, N) to (batch, M, N) with an attribute ``channels`` (M) and, if it returns
            logarithms, ``logarithm = True``; ``None``: the input is the representation (batch, M, N) itself.
        tree: which inputs are multiplied, and when.
        widths: channels of each level, or one number for all.
        outputs: number of scores Y.
        channels: M, if there is no representation.
        sharing: of filters, one value or one for each level; "recurrent" ties the levels of equal widths.
        weights: a family for the convolutions, or ``None`` for dense; the output layer is dense.
        constraint: of all weights, the outputs' too.
        semiring: how numbers are carried.
        activation, pooling: of the rectifier variants.
        initialize: called with each :class:`Weights`; by default :func:`averaging_` with :func:`averaging_spread`, for
            simplex weights :func:`dirichlet_`.
        generator: source of randomness of the default initialisation.

    Raises:
        ShapeError: widths do not fit the tree.
        StructureError: options that contradict each other; :data:`structmat.nn.convac.options.UNSUPPORTED` lists them.
    """

    def __init__(
        self,
        representation: nn.Module | None,
        tree: ModeTree,
        widths: int | Sequence[int],
        outputs: int = 1,
        *,
        channels: int | None = None,
        sharing: Sharing | str | Sequence[Sharing | str] = Sharing.SHARED,
        weights: Structure | None = None,
        constraint: Constraint | str = Constraint.NONE,
        semiring: Semiring = Scaled(),  # noqa: B008 - a frozen value
        activation: Activation | str = Activation.NONE,
        pooling: Pooling | str = Pooling.PRODUCT,
        initialize: Initialize | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        depth = len(tree.levels)
        self.representation, self.tree, self.outputs = representation, tree, outputs
        self.widths = (widths,) * depth if isinstance(widths, int) else tuple(widths)
        if len(self.widths) != depth or min(self.widths) < 1 or outputs < 1:
            raise ShapeError(
                f"The tree has {depth} levels; got widths {self.widths} and {outputs} outputs. Give one width of at "
                "least 1 for each level."
            )
        self.channels = self._channels(representation, channels)
        given = [sharing] * depth if isinstance(sharing, str) else list(sharing)
        if len(given) != depth:
            raise ShapeError(f"The tree has {depth} levels; got {len(given)} values of sharing.")
        self.sharing = tuple(Sharing(s) for s in given)
        self.constraint, self.semiring = Constraint(constraint), semiring
        self.activation, self.pooling = Activation(activation), Pooling(pooling)
        self.structure = weights
        check_options(self.semiring, self.constraint, self.activation, self.pooling)
        self.register_buffer("order", torch.tensor(tree.leaves), persistent=False)
        self._ordered = tree.leaves == tuple(range(tree.modes))
        self._tied: dict[tuple[int, int, int], Weights] = {}
        self.layers = nn.ModuleList()
        for level in range(depth):
            self.layers.append(nn.ModuleList(self._level(level, dtype, generator)))
        self.output = EdgeMap(
            Weights(1, (outputs, self.widths[-1]), None, self.constraint, dtype=dtype, generator=generator),
            Slot(1, (0,)), [0], 1,
        )  # fmt: skip
        self._prepare_windows()
        self._way = native.way_of(self)
        self.initialize(initialize, generator=generator)

    @staticmethod
    def _channels(representation: nn.Module | None, channels: int | None) -> int:
        found = getattr(representation, "channels", None) if representation is not None else channels
        if not isinstance(found, int) or found < 1:
            raise ShapeError(
                f"The number of representation channels must be an integer of at least 1; got {found!r}. Give "
                "channels=M, or a representation with an attribute `channels`."
            )
        return found

    def _level(self, level: int, dtype: torch.dtype | None, generator: torch.Generator | None) -> Iterator[EdgeMap]:
        """One edge map for each level that this one reads from."""
        groups: dict[int, list[Edge]] = {}
        for edge in self.tree.edges(level):
            groups.setdefault(self.tree.level_of(edge.node), []).append(edge)
        for source_level in sorted(groups):
            edges = groups[source_level]
            fan_in = self.channels if source_level < 0 else self.widths[source_level]
            start = 0 if source_level < 0 else self.tree.starts[source_level]
            count = self.tree.modes if source_level < 0 else len(self.tree.levels[source_level])
            slot = Slot.of(self.sharing[level], [e.position for e in edges])
            # A chain's first window holds two inputs: its first position has no counterpart higher up.
            key = (self.widths[level], fan_in, min(source_level, 0) * 1000 - slot.copies)
            tied = self.sharing[level] is Sharing.RECURRENT and key in self._tied
            shape = (self.widths[level], fan_in)
            weights = (
                self._tied[key]
                if tied
                else Weights(slot.copies, shape, self.structure, self.constraint, dtype=dtype, generator=generator)
            )
            self._tied[key] = weights
            yield EdgeMap(weights, slot, [e.node - start for e in edges], count)

    def _prepare_windows(self) -> None:
        """For each level, where the factors of the windows are found among the edges of its groups."""
        self._sources: list[list[int]] = []
        self._fill: list[bool] = []
        for level, windows in enumerate(self.tree.levels):
            edges = list(self.tree.edges(level))
            sources = [self.tree.level_of(e.node) for e in edges]
            found = sorted(set(sources))
            computed = [e for s in found for e, of in zip(edges, sources, strict=True) if of == s]
            place = {(e.window, e.position): i for i, e in enumerate(computed)}
            wide = len(windows[0])
            order = [place.get((w, p), len(computed)) for w in range(len(windows)) for p in range(wide)]
            self._sources.append(found)
            self._fill.append(len(computed) in order)
            straight = order == list(range(len(computed)))
            self.register_buffer(
                f"windows{level}", None if straight else torch.tensor(order, dtype=torch.int64), persistent=False
            )

    def window(self, level: int) -> int:
        """Factors of a product of this level."""
        return len(self.tree.levels[level][0])

    def initialize(self, how: Initialize | None = None, *, generator: torch.Generator | None = None) -> None:
        """Draw all weights again; ``how`` as in the constructor."""
        for level, maps in enumerate(self.layers):
            assert isinstance(maps, nn.ModuleList)
            for edge_map in maps:
                assert isinstance(edge_map, EdgeMap)
                self._draw(edge_map.weights, how, averaging_spread(self.window(level)), generator)
        self._draw(self.output.weights, how, 1.0, generator)

    def _draw(self, weights: Weights, how: Initialize | None, spread: float, generator: torch.Generator | None) -> None:
        if how is not None:
            how(weights)
        elif self.constraint is Constraint.SIMPLEX:
            dirichlet_(weights, generator=generator)
        elif self.activation is Activation.RELU and self.constraint is Constraint.NONE:
            normal_(weights, generator=generator)
        else:
            averaging_(weights, spread, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch, Y); logarithms of them if the semiring is `Log` or `MaxProduct`."""
        top = self._top(x)
        made = native.run(self._native().output, self.output, top, lowers=True)
        scores = self.semiring.scores(self._outputs(top)) if made is None else made.value
        return scores.squeeze(1).T

    def signed_log(self, x: Tensor) -> Signed:
        """Sign and logarithm of the absolute score, (batch, Y) each: defined where the score is no float any more."""
        sign, log = self.semiring.lower(self.root(x))
        return Signed(sign.squeeze(1).T, log.squeeze(1).T)

    def root(self, x: Tensor) -> State:
        """The state of the output layer, value (Y, 1, batch)."""
        return self._outputs(self._top(x))

    def _top(self, x: Tensor) -> State:
        """The pooled state of the last level."""
        leaves, logarithm = self._leaves(x)
        if not logarithm and native.takes_plain(self._native(), leaves):
            return self._climb(State(leaves), lifts=True)
        return self._climb(self.semiring.lift(leaves, logarithm=logarithm))

    def _outputs(self, top: State) -> State:
        return self.semiring.linear(self.output, top, self.output.gather)

    def lift(self, x: Tensor) -> State:
        """The representation of a batch as a state, leaves in tree order."""
        leaves, logarithm = self._leaves(x)
        return self.semiring.lift(leaves, logarithm=logarithm)

    def _leaves(self, x: Tensor) -> tuple[Tensor, bool]:
        """Representation values (channels, locations, batch) in tree order, and whether they are logarithms."""
        values = x if self.representation is None else self.representation(x)
        if values.dim() != 3 or values.shape[1:] != (self.channels, self.tree.modes):
            raise ShapeError(
                f"The representation has shape {tuple(values.shape)}; the network reads (batch, {self.channels}, "
                f"{self.tree.modes}): channels, then patches."
            )
        leaves = values.permute(1, 2, 0)
        if not self._ordered:
            leaves = leaves[:, self.get_buffer("order")]
        return leaves, bool(getattr(self.representation, "logarithm", False))

    def evaluate(self, leaves: State, visit: Callable[[int, State], State] | None = None) -> State:
        """Run on leaves in tree order; ``visit(level, pooled state)`` may look at or replace each level's result."""
        return self._outputs(self._climb(leaves, visit))

    def _climb(
        self, leaves: State, visit: Callable[[int, State], State] | None = None, *, lifts: bool = False
    ) -> State:
        """The pooled state of the last level; ``lifts``: the leaves are plain numbers, for a native first level."""
        states = {-1: leaves}
        for level, layer in enumerate(self._native().levels):
            edge_map: EdgeMap = self.layers[level][0]  # type: ignore[index]
            made = native.run(layer, edge_map, states[level - 1], lifts=lifts and level == 0)
            if made is None:
                if lifts and level == 0:
                    states[-1] = self.semiring.lift(leaves.value, logarithm=False)
                made = self.pool(level, self.convolve(level, states))
            states[level] = made if visit is None else visit(level, made)
        return states[len(self.tree.levels) - 1]

    def _native(self) -> native.Way:
        """How levels run natively in the semiring of now."""
        if self._way.semiring != self.semiring:
            self._way = native.way_of(self)
        return self._way

    @property
    def fallback(self) -> str:
        """Why a part of the network is not one native pass a level, or an empty string."""
        weight = next(iter(self.layers.parameters()))
        return self._native().reason or native.obstacle(weight.detach()) or ""

    def convolve(self, level: int, states: dict[int, State]) -> State:
        """The convolutions of a level, window by window, (channels, windows * window, batch)."""
        maps = self.layers[level]
        assert isinstance(maps, nn.ModuleList)
        results = []
        for source, edge_map in zip(self._sources[level], maps, strict=True):
            assert isinstance(edge_map, EdgeMap)
            results.append(self.semiring.linear(edge_map, states[source], edge_map.gather))
        if self._fill[level]:
            results.append(self._filler(results[0]))
        state = concatenate(results)
        if self.activation is Activation.RELU:
            state = State(state.value.relu())
        order: Tensor | None = getattr(self, f"windows{level}")
        return state if order is None else select(state, order)

    def _filler(self, like: State) -> State:
        if self.pooling is Pooling.PRODUCT:
            return self.semiring.unit(like, 1)
        # ReLU outputs are at least 0, the unit of maximum and sum there.
        return State(torch.zeros_like(like.value[:, :1]))

    def pool(self, level: int, state: State) -> State:
        """Windows of a level: (channels, windows, batch)."""
        window = self.window(level)
        if self.pooling is Pooling.PRODUCT:
            return window_product(self.semiring, state, window)
        split = state.value.unflatten(1, (-1, window))
        return State(split.amax(2) if self.pooling is Pooling.MAX else split.sum(2))

    def edge_matrices(self, level: int) -> dict[tuple[int, int], Tensor]:
        """The dense matrices (out, in) of a level's edges, by (window, position)."""
        found: dict[tuple[int, int], Tensor] = {}
        edges = list(self.tree.edges(level))
        maps = self.layers[level]
        assert isinstance(maps, nn.ModuleList)
        for source, edge_map in zip(self._sources[level], maps, strict=True):
            assert isinstance(edge_map, EdgeMap)
            mine = [e for e in edges if self.tree.level_of(e.node) == source]
            for edge, matrix in zip(mine, edge_map.edge_matrices(), strict=True):
                found[edge.window, edge.position] = matrix
        return found

    def output_matrix(self) -> Tensor:
        """The weights of the output layer (Y, r)."""
        return self.output.weights.dense()[0]

    @property
    def num_parameters(self) -> int:
        """Learned numbers of the convolutions and the output layer, without the representation's."""
        return sum(p.numel() for p in (*self.layers.parameters(), *self.output.parameters()))

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions for one instance, dense weights counted."""
        total = self.outputs * self.widths[-1]
        for level in range(len(self.tree.levels)):
            for edge in self.tree.edges(level):
                total += self.widths[level] * self._fan_in(edge)
        return total

    @property
    def products(self) -> int:
        """Multiplications of the pooling for one instance."""
        total = 0
        for level, windows in enumerate(self.tree.levels):
            total += self.widths[level] * sum(sum(c >= 0 for c in window) - 1 for window in windows)
        return total

    def _fan_in(self, edge: Edge) -> int:
        level = self.tree.level_of(edge.node)
        return self.channels if level < 0 else self.widths[level]

    def rank(self, part: Sequence[int], *, method: RankMethod | str = RankMethod.GENERIC, output: int = 0) -> int:
        """Rank of the matricisation of the coefficient tensor: modes ``part`` | the rest.

        It is the separation rank of the scores if the representation functions are linearly independent. By default the
        generic rank of the architecture; the other methods take the weights as they are, of one output. All work for
        thousands of patches as long as the minimum cut is small. See :class:`RankMethod`.
        """
        from structmat.nn.convac import modular
        from structmat.nn.convac.sketch import sketched_rank

        match RankMethod(method):
            case RankMethod.GENERIC:
                return modular.generic_rank(self, part)
            case RankMethod.EXACT:
                return modular.weights_rank(self, part, output=output)
            case RankMethod.SKETCH:
                return sketched_rank(self, part, output=output)
            case RankMethod.SPECTRUM:
                return self.separation_spectrum(part, output).rank()

    def bounds(self, part: Sequence[int]) -> RankBounds:
        """What the theorems say about the rank: lower and upper bound."""
        from structmat.nn.convac.inductive_bias import rank_bounds

        return rank_bounds(self, part)

    def mincut(self, part: Sequence[int]) -> Cut:
        """The minimum cut that separates the modes ``part`` from the rest: an upper bound of the rank, mostly sharp."""
        from structmat.nn.convac.mincut import minimum_cut

        return minimum_cut(self.tree, self.channels, self.widths, part)

    def coefficient_tensor(self, output: int = 0) -> Tensor:
        """``A^y``, (M,) * N with the modes in their own order. For small networks: M^N entries."""
        from structmat.nn.convac.expand import coefficient_tensor

        return coefficient_tensor(self, output)

    def grid_tensor(self, templates: Tensor, output: int = 0) -> Tensor:
        """Scores on all N-tuples of templates (size, M'): a tensor (M',) * N. For small networks."""
        from structmat.nn.convac.expand import grid_tensor

        return grid_tensor(self, templates, output)

    def separation_spectrum(self, part: Sequence[int], output: int = 0) -> Spectrum:
        """Singular values of the matricisation, for a thousand patches too; its entropy and distances."""
        from structmat.nn.convac.spectrum import separation_spectrum

        return separation_spectrum(self, part, output)

    def circuit(self) -> Circuit:
        """Weighted sums and products of the N M representation values, gate by gate; one output for each score.

        See :func:`structmat.nn.convac.circuit.scalar_circuit`.
        """
        from structmat.nn.convac.circuit import scalar_circuit

        return scalar_circuit(self)

    def draw(self, part: Sequence[int] = ()) -> str:
        """The tree as SVG, with the minimum cut between the modes ``part`` and the rest, if any are given."""
        from structmat.nn.convac.picture import draw_cut

        return draw_cut(self.tree, part, self.mincut(part) if part else None)

    def inductive_bias(self, shape: int | tuple[int, int] | None = None) -> InductiveBias:
        """Bounds of the ranks over standard partitions (halves, even | odd, checkerboards, mirror), as a table."""
        from structmat.nn.convac.inductive_bias import inductive_bias

        return inductive_bias(self, shape)

    @classmethod
    def cp(cls, representation: nn.Module | None, modes: int, terms: int, outputs: int = 1, **options: Any) -> ConvAC:
        """The shallow network: one level of width ``terms`` and a global product."""
        return cls(representation, ModeTree.sequence(modes, max(modes, 2)), terms, outputs, **options)

    def extra_repr(self) -> str:
        return (
            f"modes={self.tree.modes}, channels={self.channels}, widths={self.widths}, outputs={self.outputs}, "
            f"sharing={[s.value for s in self.sharing]}, semiring={self.semiring}, pooling={self.pooling.value}"
        )

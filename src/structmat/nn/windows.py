"""The linear layer whose windows are learned: a sum of rank-one terms with trained positions and widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError, StructureError
from structmat.kernels import apply
from structmat.nn.linear import StructuredLinear
from structmat.program import Windowed
from structmat.projection.masks import INFINITE, edge_kernel, edge_reach
from structmat.projection.project import make_target
from structmat.projection.windows import Terms, unpack, window_places, windowed
from structmat.structure import DENSE_GAIN
from structmat.windows import from_terms

ROWS, COLUMNS = 0, 1
"""The two sides of a window: first axis of :attr:`WindowedLinear.widths` and ``locations``."""


class _Masked(torch.autograd.Function):
    """Contents times the boxcar of rounded windows; backwards also the widths' and locations' derivatives.

    ``content`` is flat: that of arc after arc, cyclic intervals that hold the windows. The gradient by a window's edge
    is a sum over the few places that the blurred edge reaches; no mask is kept but one boolean an entry.
    """

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, width: Tensor, location: Tensor, arcs: _Arcs, size: int, sigma: float
    ) -> Tensor:
        inside = arcs.inside(width, location)
        ctx.save_for_backward(content, inside, width, location)
        ctx.arcs, ctx.size, ctx.sigma = arcs, size, sigma
        return torch.where(inside, content, content.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        content, inside, width, location = ctx.saved_tensors
        arcs, size, sigma = ctx.arcs, ctx.size, ctx.sigma
        grad = grads[0]
        kept = torch.where(inside, grad, grad.new_zeros(()))
        if not any(ctx.needs_input_grad[1:3]):
            return kept, None, None, None, None, None
        reach = edge_reach(size, sigma)
        steps = torch.arange(size, device=grad.device) if 2 * reach >= size else torch.arange(-reach, reach)
        kernel = edge_kernel(size, sigma).to(width)[steps % size]
        sums = []
        for edge in (location, location + width):
            places = (edge.long()[:, None] + steps) % size
            found, held = arcs.find(places)
            flow = grad.flatten()[found] * content.flatten()[found]
            sums.append(torch.where(held, flow, flow.new_zeros(())).to(width.dtype) @ kernel)
        return kept, sums[1], sums[1] - sums[0], None, None, None


class _Arcs:
    """Cyclic intervals of places, one a term, whose contents lie one after the other in a flat tensor."""

    def __init__(self, start: Tensor, length: Tensor, size: int) -> None:
        self.start, self.length, self.size = start, length, size
        self.full = bool((length == size).all())
        self.first = torch.cumsum(length, 0) - length
        self.total = int(length.sum())
        if not self.full:
            self.term, self.place = window_places(start, length, size)

    def inside(self, width: Tensor, location: Tensor) -> Tensor:
        """Which entries the windows cover; (terms, size) where the arcs are full, else flat."""
        if self.full:
            places = torch.arange(self.size, device=width.device, dtype=width.dtype)
            offset, end = places - location[:, None], width[:, None]
            # The location lies in 0 .. size - 1, so an offset is that of the circle or smaller by the size.
            covered: Tensor = ((offset >= 0) & (offset < end)) | (offset < end - self.size)
            return covered
        # A running sum of where windows begin and end in their arcs, also those that pass the end of the circle.
        begin = (location.long() - self.start) % self.size
        end = begin + width.long()
        edges = [begin, end, torch.zeros_like(end), (end - self.size).clamp(min=0)]
        marks = torch.zeros(self.total + 1, dtype=torch.int8, device=width.device)
        for edge, mark in zip(edges, (1, -1, 1, -1), strict=True):
            places = self.first + torch.minimum(edge, self.length)
            marks.index_add_(0, places, torch.full((), mark, dtype=torch.int8, device=width.device).expand(len(places)))
        return marks[:-1].cumsum(0, dtype=torch.int8).bool()

    def find(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the flat contents the places (terms, any) of each term lie, and whether its arc holds them."""
        offset = (places - self.start[:, None]) % self.size
        held = offset < self.length[:, None]
        return self.first[:, None] + torch.where(held, offset, torch.zeros_like(offset)), held


class WindowedLinear(nn.Module):
    """``y = sum_k u_k (v_k . x) + b`` with ``u_k`` and ``v_k`` on windows whose positions and widths are learned.

    Forwards with the rounded windows, so what is trained is what is deployed; backwards widths and locations get the
    derivative of a window whose edges are blurred (:func:`structmat.projection.masks.quantized_mask`). The contents
    are parameters for any optimizer. Widths and locations are buffers, so that no optimizer, weight decay or clipping
    of the user touches them: :class:`structmat.learn.windows.WindowLearner` moves them.

    For ``B`` rows a pass takes ``B`` times the sizes of the contents, or those of the dense matrix after making that,
    whichever is less. Contents hold whole sides at first; :meth:`compact` keeps what lies near the windows.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bias: whether to add a learned vector.
        terms: rank-one terms; half of the smaller side if None, which at full windows costs as much as a square dense
            matrix.
        width: of all windows at the start, as a share of each side.
        device, dtype, generator: of the contents, drawn with the output variance of a dense layer. Locations are drawn
            uniformly.

    Raises:
        StructureError: there is no term, or a width outside of 0 to 1.
    """

    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None
    widths: Tensor
    locations: Tensor
    arcs: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        terms: int | None = None,
        width: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        terms = max(1, min(in_features, out_features) // 2) if terms is None else terms
        if terms < 1 or not 0 < width <= 1:
            raise StructureError(
                f"WindowedLinear(terms={terms}, width={width}): there is at least one term, and the width is a share "
                "of the side, above 0 and at most 1."
            )
        self.in_features, self.out_features = in_features, out_features
        dtype = dtype or torch.get_default_dtype()
        inner = max(1.0, width * in_features)
        std = math.sqrt(DENSE_GAIN / (terms * max(width, 1.0 / out_features)))
        wide = torch.promote_types(dtype, torch.float32)
        left = torch.randn(terms * out_features, generator=generator, dtype=wide) * std
        right = torch.randn(terms * in_features, generator=generator, dtype=wide) * inner**-0.5
        places = torch.rand(2, terms, generator=generator)
        self.left = nn.Parameter(left.to(device=device, dtype=dtype))
        self.right = nn.Parameter(right.to(device=device, dtype=dtype))
        self.register_buffer("widths", torch.full((2, terms), width, device=device))
        self.register_buffer("locations", places.to(device))
        self.register_buffer("arcs", self._full_arcs(terms).to(device))
        if bias:
            bound = in_features**-0.5
            values = torch.empty(out_features, dtype=wide).uniform_(-bound, bound, generator=generator)
            self.bias = nn.Parameter(values.to(device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.sigmas = (INFINITE, INFINITE)
        """Blur of the rows' and the columns' edges in the gradient, as widths in frequency."""
        self.movable = True
        """Whether widths and locations collect gradients."""
        self._arcs: tuple[_Arcs, _Arcs] | None = None
        self._arcs_key = (0, 0)

    def _full_arcs(self, terms: int) -> Tensor:
        return torch.tensor([[0, self.out_features, 0, self.in_features]]).expand(terms, 4).clone()

    @classmethod
    def from_terms(cls, terms: Terms, bias: Tensor | None = None) -> Self:
        """The layer with these windows and contents (also outside of the windows), and a copy of the bias."""
        out_features, in_features = terms.left.shape[1], terms.right.shape[1]
        layer = cls(in_features, out_features, bias is not None, terms=max(1, terms.count), dtype=terms.left.dtype)
        with torch.no_grad():
            layer.left.zero_()
            layer.right.zero_()
            layer.left[: terms.left.numel()] = terms.left.flatten()
            layer.right[: terms.right.numel()] = terms.right.flatten()
            layer.widths.zero_()
            sizes = torch.tensor([out_features, in_features])
            layer.widths[:, : terms.count] = (terms.windows[:, [1, 3]] / sizes).T
            layer.locations[:, : terms.count] = (terms.windows[:, [0, 2]] / sizes).T
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias.detach())
        return layer.to(terms.left.device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        terms: int | None = None,
        budget: float | None = None,
        second_moment: Tensor | None = None,
        sweeps: int = 8,
        generator: torch.Generator | None = None,
    ) -> Self:
        """The layer that begins as a dense one.

        With ``budget=None`` as published: contents by the singular value decomposition, all windows full, locations
        random; exact where ``terms`` is the smaller side. Else the projection on windows that hold that share of the
        dense numbers, by windowed alternating least squares, in the norm of ``second_moment`` if given; empty terms
        begin with one place on one side, so that training can revive them.

        Args:
            linear: weight and bias are copied.
            terms: half of the smaller side if None.
            budget: share of the dense numbers at which the windows begin.
            second_moment: (in, in) of the inputs.
            sweeps: of the projection.
            generator: of the locations.
        """
        weight = linear.weight.detach()
        m, n = weight.shape
        count = max(1, min(m, n) // 2) if terms is None else terms
        target = make_target(weight, second_moment, sweeps=sweeps)
        if budget is None:
            u, s, vh = torch.linalg.svd(target.weight, full_matrices=False)
            rank = min(count, len(s))
            root = s[:rank].sqrt()
            places = torch.rand(rank, 2, generator=generator)
            windows = torch.tensor([[0, m, 0, n]]).repeat(rank, 1)
            windows[:, 0], windows[:, 2] = (places[:, 0] * m).long(), (places[:, 1] * n).long()
            found = Terms((u[:, :rank] * root).T, root[:, None] * vh[:rank], windows).with_count(count)
        else:
            numbers = min(budget * m * n, float(count * (m + n)))
            rows = min(count * m, round(numbers * m / (m + n)))
            found = windowed(target, count, rows, min(count * n, round(numbers) - rows))
        found = _revivable(found, generator)
        dtype = weight.dtype
        moved = Terms(found.left.to(weight.device, dtype), found.right.to(weight.device, dtype), found.windows)
        return cls.from_terms(moved, linear.bias)

    # ------------------------------------------------------------------------------------------------- windows

    @property
    def terms(self) -> int:
        """Rank-one terms, empty ones included."""
        return int(self.widths.shape[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """Places of each side: outputs, inputs."""
        return self.out_features, self.in_features

    def windows(self) -> Tensor:
        """Rounded windows (terms, 4): row location, row width, column location, column width."""
        table = []
        for side, size in enumerate(self.sizes):
            table.append((self.locations[side].detach() * size).round().long() % size)
            table.append((self.widths[side].detach() * size).round().long().clamp(0, size))
        return torch.stack(table, 1)

    @property
    def cost(self) -> int:
        """Numbers that the hardened layer will hold: widths of the terms that have both."""
        windows = self.windows()
        alive = (windows[:, 1] > 0) & (windows[:, 3] > 0)
        return int(windows[alive][:, [1, 3]].sum())

    @property
    def matrix(self) -> Tensor:
        """The matrix as it is now, (out_features, in_features), without gradients."""
        return self.to_terms().cropped().dense()

    def to_terms(self) -> Terms:
        """Windows, and contents as far as they are kept."""
        whole = unpack(self.left.detach(), self.right.detach(), self.arcs, self.sizes)
        return Terms(whole.left, whole.right, self.windows())

    def harden(self) -> StructuredLinear:
        """The compact layer: windows as they are, terms without one of their widths dropped."""
        bias = None if self.bias is None else self.bias.detach()
        return StructuredLinear.from_matrix(from_terms(self.to_terms()), bias).train(self.training)

    def compact(self, margin: int = 16, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Drop empty terms, and contents farther than ``margin`` places from their window, in place.

        The parameters stay the same objects, with fewer entries; so do their moments in ``optimizer``. What is dropped
        can't come back; a window that moves on finds zeros.
        """
        windows = self.windows()
        alive = torch.nonzero((windows[:, 1] > 0) & (windows[:, 3] > 0))[:, 0]
        if len(alive) == 0:
            alive = torch.arange(min(1, self.terms))
        kept = windows[alive]
        arcs = kept.clone()
        for at, size in ((0, self.out_features), (2, self.in_features)):
            arcs[:, at + 1] = (kept[:, at + 1] + 2 * margin).clamp(max=size)
            arcs[:, at] = torch.where(arcs[:, at + 1] < size, (kept[:, at] - margin) % size, 0)
        before = self._held()
        for parameter, side, size in (
            (self.left, ROWS, self.out_features),
            (self.right, COLUMNS, self.in_features),
        ):
            term, place = window_places(arcs[:, 2 * side], arcs[:, 2 * side + 1], size)
            offset = (place - before[side].start[alive[term]]) % size
            held = offset < before[side].length[alive[term]]
            index = before[side].first[alive[term]] + torch.where(held, offset, 0)

            def taken(t: Tensor, index: Tensor = index, held: Tensor = held) -> Tensor:
                return torch.where(held, t.detach()[index], 0)

            state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
            moments = {k: taken(v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
            parameter.grad = None
            parameter.data = taken(parameter)
            state.update(moments)
        self._resize(alive, arcs)

    def _resize(self, alive: Tensor, arcs: Tensor) -> None:
        self.widths = self.widths.detach()[:, alive].clone()
        self.locations = self.locations.detach()[:, alive].clone()
        self.arcs = arcs
        self._arcs = None

    def resize_like(self, arcs: Tensor) -> None:
        """Give all tensors the sizes that a checkpoint with these arcs (terms, 4) has; their values are lost."""
        totals = arcs[:, 1].sum(), arcs[:, 3].sum()
        for parameter, total in zip((self.left, self.right), totals, strict=True):
            parameter.grad = None
            parameter.data = parameter.new_zeros(int(total))
        self._resize(torch.zeros(len(arcs), dtype=torch.int64), arcs.clone())

    # --------------------------------------------------------------------------------------------------- running

    def _held(self) -> tuple[_Arcs, _Arcs]:
        # Made again after arcs were loaded: the tensor then has another version.
        key = (id(self.arcs), self.arcs._version)
        if self._arcs is None or self._arcs_key != key:
            self._arcs = (
                _Arcs(self.arcs[:, 0], self.arcs[:, 1], self.out_features),
                _Arcs(self.arcs[:, 2], self.arcs[:, 3], self.in_features),
            )
            self._arcs_key = key
        return self._arcs

    def _structure(self) -> tuple[Tensor, Tensor]:
        """Widths and locations as leaves that collect gradients."""
        if not self.movable:
            return self.widths.detach(), self.locations.detach()
        if torch.is_grad_enabled():
            for name in ("widths", "locations"):
                value = getattr(self, name)
                if not value.is_leaf:  # a module that was moved or cast
                    setattr(self, name, value.detach())
                getattr(self, name).requires_grad_()
        return self.widths, self.locations

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., in_features) to (..., out_features)."""
        if input.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"The input has shape {tuple(input.shape)}; its last axis must hold in_features={self.in_features} "
                "numbers."
            )
        widths, locations = self._structure()
        held, masked = self._held(), []
        for side, (content, arcs) in enumerate(zip((self.left, self.right), held, strict=True)):
            size = self.sizes[side]
            width = _rounded(widths[side] * size).clamp(0, size)
            location = _rounded(locations[side] * size)
            location = location - (location.detach() / size).floor() * size
            shaped = content.view(-1, size) if arcs.full else content
            sigma = self.sigmas[side]
            masked.append(_Masked.apply(shaped, width, location, arcs, size, sigma))  # type: ignore[no-untyped-call]
        y = self._multiply(masked[0], masked[1], input)
        return y if self.bias is None else y + self.bias

    def _multiply(self, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        held = self._held()
        m, n = self.sizes
        contents = held[0].total + held[1].total
        if rows * (contents - m * n) > self.terms * m * n:  # then making the matrix pays
            return nn.functional.linear(x, self._full(left, 0).T @ self._full(right, 1))
        if held[0].full and held[1].full:
            return (x @ right.T) @ left
        stage = Windowed("left", "right", "arcs", m, n, self.terms, held[0].total, held[1].total)
        return apply(stage, {"left": left.flatten(), "right": right.flatten(), "arcs": self.arcs}, x)

    def _full(self, content: Tensor, side: int) -> Tensor:
        arcs = self._held()[side]
        if arcs.full:
            return content
        whole = content.new_zeros(self.terms * arcs.size)
        return whole.index_add(0, arcs.term * arcs.size + arcs.place, content).view(self.terms, arcs.size)

    def learning_rate_multipliers(self) -> Mapping[str, float]:
        """Factors of a dense layer's learning rate, by the mean widths now; see
        :func:`structmat.learn.groups.learning_rate_multipliers`."""
        rows, columns = (float(self.widths[side].detach().mean()) for side in (ROWS, COLUMNS))
        inner = max(1.0, self.terms * rows)
        return {
            "left": self.in_features / inner / 2,
            "right": 1.0 / max(columns, 1.0 / self.in_features) / 2,
        }

    def extra_repr(self) -> str:
        share = self.cost / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"terms={self.terms}, {share:.1%} of dense"
        )


def _rounded(values: Tensor) -> Tensor:
    """Rounded forwards, the identity backwards."""
    return values + (values.round() - values).detach()


def _revivable(terms: Terms, generator: torch.Generator | None) -> Terms:
    """Give empty terms one place on one side, by turns, and small contents: a term without both widths is dead."""
    windows = terms.windows.clone()
    left, right = terms.left.clone(), terms.right.clone()
    empty = torch.nonzero(~terms.alive)[:, 0]
    if len(empty) == 0:
        return terms
    scale = float(left.square().mean().sqrt() + right.square().mean().sqrt()) / 2
    for number, k in enumerate(empty.tolist()):
        side = number % 2
        windows[k, 1], windows[k, 3] = int(side == 0), int(side == 1)
        for at, content in ((0, left), (2, right)):
            size = content.shape[1]
            windows[k, at] = int(torch.randint(0, size, (1,), generator=generator))
            content[k] = torch.randn(size, generator=generator, dtype=content.dtype) * scale
    return Terms(left, right, windows)

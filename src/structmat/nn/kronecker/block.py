"""The Kronecker block: two thin layers, or more, with activations between, in place of a dense layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError, StructureError
from structmat.modes import is_compiling
from structmat.nn.kronecker.activation import Activation, Slopes, name_of
from structmat.nn.kronecker.chain import TERM, KroneckerChain, Layout
from structmat.nn.kronecker.choose import choose
from structmat.nn.kronecker.initialize import Initialize, balanced_
from structmat.nn.kronecker.native import fused, obstacle, run, watched
from structmat.nn.kronecker.shape import AUTO, Bias, BlockShape, block_shape
from structmat.nn.linear import StructuredLinear
from structmat.structures.kronecker import Kronecker, factor_matrices

if TYPE_CHECKING:
    from structmat.nn.kronecker.extended import Convention, Extended

IDENTITY = Slopes()
"""A rectifier that is learned from the identity."""

SAME = 0.02
"""A slope nearer to 1 than this counts as the identity."""


class KroneckerBlock(nn.Module):
    """``Y = psi(sum over t of phi(L_t X + C_t) R_t + D)``: a Kronecker dual layer, called as ``nn.Linear``.

    X is the input as an n x p matrix, row-major, Y an m x q one. Without phi the block multiplies by the sum of
    Kronecker products ``L_t (x) R_t^T`` (row-major vectors: ``vec(L X R) = (L (x) R^T) vec(X)``), which is never
    formed; with phi each product is two layers, the first of width m p. A term may also begin at the right: ``L_t
    phi(X R_t + C_t)``. With more than two factors X is an array of as many axes, each contracted by one factor, one
    after the other.

    Hogue, Kirby and Narayan, "Weight matrix dimensionality reduction in deep learning via Kronecker multi-layer
    architectures" (2022). Cost for one sample, left first: ``k m p (n + q)`` multiply-adds; ``k (m n + p q)`` weights
    and, with full biases, ``k m p + m q`` more numbers. Only X is kept for the backward pass; what is between is made
    again.

    Args:
        in_features, out_features: any sizes; where they do not factor well they are padded.
        terms: products that are added, k.
        in_shape, out_shape: (n, p) and (m, q), or more axes; chosen as even as possible if not given.
        factors: how many axes, if no shape is given.
        order: "left", "right", "auto" (fewest operations), a permutation of the axes, or one of these for each term.
        inner: the activation phi between stages, or None; :class:`Slopes` is a rectifier learned from the identity.
        outer: the activation psi of the outcome, or None.
        bias: "full" (as published), "axis", "outer" or "none", see :class:`Bias`.
        activated: of more than two factors, after which stages but the last phi comes; by default not after
            contractions of a length below 8, which would kill the signal.
        initialize: called with the block and a generator; :func:`balanced_` keeps the variance, :func:`source_` is the
            published start.
        input_gain: the :func:`gain` of the activation whose outputs are the block's inputs.
        recompute: False keeps what is between for the backward pass: more memory, fewer operations.

    On the CPU, in float32 and float64, products, biases and activations run as one native pass in each direction if the
    activations are among ReLU, tanh, sigmoid, SiLU, GELU, :class:`Slopes` and ``nn.PReLU`` of one slope (functions or
    modules); :attr:`fallback` says why not.

    Raises:
        ShapeError: shapes that do not hold the features.
        StructureError: too many terms, an order that is none, or :class:`Slopes` as the outer activation.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        terms: int = 1,
        *,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        factors: int = 2,
        order: str | Sequence[object] = AUTO,
        inner: Activation | None = torch.relu,
        outer: Activation | None = None,
        bias: Bias | str = Bias.FULL,
        activated: Sequence[bool] | None = None,
        initialize: Initialize = balanced_,
        input_gain: float = 1.0,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(outer, Slopes):
            raise StructureError(
                "Slopes are learned between the factors, one a term. Give outer=nn.PReLU(), or a function."
            )
        self.shape = block_shape(
            in_features,
            out_features,
            terms,
            in_shape=in_shape,
            out_shape=out_shape,
            factors=factors,
            order=order,
            bias=bias,
            activated=activated,
        )
        self.inner, self.outer, self.input_gain = inner, outer, input_gain
        layouts = [Layout(self.shape, order, count) for order, count in self.shape.groups]
        made = [KroneckerChain(lay, inner, recompute=recompute, device=device, dtype=dtype) for lay in layouts]
        self._chains = nn.ModuleList(made)
        if self.shape.bias is Bias.NONE:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self._way = fused((self,))
        if not self.factors()[0].is_meta:
            initialize(self, generator)

    @classmethod
    def of(cls, shape: BlockShape, **options: object) -> Self:
        """The block of given sizes; ``options`` are the other arguments of the constructor."""
        return cls(
            shape.in_features,
            shape.out_features,
            shape.terms,
            in_shape=shape.inputs,
            out_shape=shape.outputs,
            order=shape.orders,
            bias=shape.bias,
            activated=shape.activated,
            **options,  # type: ignore[arg-type]
        )

    @classmethod
    def for_budget(
        cls,
        in_features: int,
        out_features: int,
        *,
        parameters: int | None = None,
        macs: int | None = None,
        bias: Bias | str = Bias.FULL,
        **options: object,
    ) -> Self:
        """The block with the most degrees of freedom, and of these the most even one, within a budget.

        Args:
            in_features, out_features: of the layer.
            parameters: at most so many learned numbers, biases counted; or
            macs: at most so many multiply-adds a sample.
            bias, options: as for the constructor, without what is chosen: shapes, terms and order.

        Raises:
            StructureError: no block fits; the message names the smallest.
        """
        found = choose(in_features, out_features, parameters=parameters, macs=macs, bias=bias)[0]
        return cls.of(found, **options)

    # --------------------------------------------------------------------------------------------------- running

    @property
    def chains(self) -> tuple[KroneckerChain, ...]:
        """The terms, grouped by order."""
        return tuple(chain for chain in self._chains if isinstance(chain, KroneckerChain))

    @property
    def in_features(self) -> int:
        """Size of the last axis of the input."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """Size of the last axis of the output."""
        return self.shape.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Vectors (..., in_features) to (..., out_features), or matrices (..., n, p) to (..., m, q).

        What is flattened row-major is a view: nothing is copied between blocks. Where the last axis has in_features
        numbers, it is taken for vectors.

        Raises:
            ShapeError: the input is neither.
        """
        count = len(self.shape.inputs)
        is_vectors = self.holds_vectors(input)
        y = self._natively(input if is_vectors else input.flatten(-count))
        if y is None:
            y = self.linear(input)
            if self.outer is not None:
                y = self.outer(y)
        return y if is_vectors else y.reshape(*input.shape[:-count], *self.shape.outputs)

    def _natively(self, rows: Tensor) -> Tensor | None:
        """All of the block in one pass, where that serves."""
        if not self._way.serves((self,)):
            if is_compiling():
                return None
            self._way = fused((self,))
        return run((self,), self._way, rows)

    @property
    def fallback(self) -> str:
        """Why the block does not run as one native pass with its biases and activations; empty if it does.

        On the CPU, in float32 and float64, without autocast and transforms of torch.func.
        """
        if not self._way.serves((self,)):
            self._way = fused((self,))
        if self._way.reason:
            return self._way.reason
        held = obstacle(self.factors()[0])
        if held is None and watched(self):
            held = "a part of it has hooks"
        return held or ""

    def linear(self, x: Tensor) -> Tensor:
        """The outcome before the outer activation, as vectors (..., out_features)."""
        rows = x if self.holds_vectors(x) else x.flatten(-len(self.shape.inputs))
        first, *others = self.chains
        y: Tensor = first(rows, self.bias)
        for chain in others:
            y = y + chain(rows)
        return y

    def holds_vectors(self, x: Tensor) -> bool:
        """Whether an input is taken for vectors (True) or for matrices.

        Raises:
            ShapeError: it is neither.
        """
        shape, count = self.shape, len(self.shape.inputs)
        if x.dim() > 0 and x.shape[-1] == shape.in_features:
            return True
        full = (math.prod(shape.inputs), shape.outer_array) == (shape.in_features, shape.out_features)
        if full and tuple(x.shape[-count:]) == shape.inputs:
            return False
        as_matrix = f", or the last {count} axes of the shape {shape.inputs}" if full else " (its shapes are padded)"
        raise ShapeError(
            f"The input has shape {tuple(x.shape)}; its last axis must hold in_features={shape.in_features} numbers"
            f"{as_matrix}."
        )

    def factors(self) -> tuple[Tensor, ...]:
        """The factors A_i of all terms as matrices (terms, m_i, n_i), in the order of the chains.

        For two factors ``L_t`` and ``R_t^T``: ``W = sum over t of kron(factors[0][t], factors[1][t])``.
        """
        held = [chain.factors() for chain in self.chains]
        if len(held) == 1:
            return held[0]
        return tuple(torch.cat([one[i] for one in held]) for i in range(len(self.shape.inputs)))

    # --------------------------------------------------------------------------------------------- linear relatives

    @property
    def structure(self) -> Kronecker:
        """The family of the linear part."""
        return Kronecker(self.shape.terms, self.shape.pairs)

    @classmethod
    def from_structured(
        cls, layer: StructuredLinear, *, inner: Activation | None = IDENTITY, bias: Bias | str = Bias.OUTER
    ) -> Self:
        """A block that starts as a given linear sum of Kronecker products: the same function if ``inner`` is.

        Args:
            layer: of the family :class:`Kronecker`, such as :meth:`StructuredLinear.from_linear` makes.
            inner: the activation between the stages; the default equals the identity at the start.
            bias: inner biases start at 0, the outer one at the layer's.

        Raises:
            StructureError: the layer is of another family, or complex.
        """
        family = layer.structure
        if not isinstance(family, Kronecker):
            raise StructureError(
                f"A Kronecker block starts from a sum of Kronecker products; the layer is {family}. Project it first: "
                "StructuredLinear.from_linear(linear, sm.Kronecker(terms))."
            )
        if layer.matrix.dtype.is_complex:
            raise StructureError("Kronecker blocks are real; the layer is complex.")
        factors = factor_matrices(family, layer.tensors())
        block = cls(
            layer.in_features,
            layer.out_features,
            factors[0].shape[0],
            in_shape=[n for _, n in family.pairs],
            out_shape=[m for m, _ in family.pairs],
            inner=inner,
            bias=Bias.OUTER if layer.bias is not None and Bias(bias) is Bias.NONE else bias,
            initialize=keep_,
            device=factors[0].device,
            dtype=factors[0].dtype,
        )
        block.chains[0].set_factors([f.detach() for f in factors])
        if layer.bias is not None and block.bias is not None:
            with torch.no_grad():
                block.bias.copy_(layer.bias)
        return block.train(layer.training)

    def to_structured(self, tolerance: float = SAME) -> StructuredLinear:
        """The linear layer that the block equals, or nearly equals: inner biases go into the outer one.

        Args:
            tolerance: slopes this near to 1 count as the identity.

        Raises:
            StructureError: the inner activation is none that is nearly the identity.
        """
        if not self.is_linear(tolerance):
            raise StructureError(
                f"The block is not linear: its inner activation is {name_of(self.inner)}. Only None, and Slopes within "
                f"{tolerance} of 1, can be absorbed."
            )
        family = self.structure
        layer = StructuredLinear(
            self.in_features,
            self.out_features,
            self.shape.bias is not Bias.NONE,
            structure=family,
            device=self.factors()[0].device,
            dtype=self.factors()[0].dtype,
        )
        with torch.no_grad():
            for own, given in zip(factor_matrices(family, layer.tensors()), self.factors(), strict=True):
                own.copy_(given)
            if layer.bias is not None:
                layer.bias.copy_(self.linear(self.factors()[0].new_zeros(self.in_features)))
        return layer.train(self.training)

    def is_linear(self, tolerance: float = SAME) -> bool:
        """Whether the inner activation is the identity, or rectifiers with all slopes this near to 1."""
        if self.inner is None:
            return True
        if not isinstance(self.inner, Slopes):
            return False
        return all(bool(((slope - 1).abs() <= tolerance).all()) for slope in self.slopes())

    def slopes(self) -> Iterator[Tensor]:
        """The slopes of rectifiers that are :class:`Slopes`, a tensor (terms,) for each activation of each chain."""
        for chain in self.chains:
            for gap in chain.layout.active:
                held = chain.slopes(gap)
                if held is not None:
                    yield held

    @torch.no_grad()
    def balance_(self) -> None:
        """Give all factors of a term the same norm, by scales that leave the block as it is.

        Inner biases and slopes are moved along. Exact for no inner activation and for positively homogeneous ones
        (rectifiers); others are left alone, as these scales would change the function.
        """
        if not (self.inner is None or isinstance(self.inner, Slopes) or self.inner in (torch.relu, nn.functional.relu)):
            return
        for chain in self.chains:
            old = chain.factors()
            norms = torch.stack([f.flatten(1).norm(dim=1) for f in old])
            alive = (norms > 0).all(0)  # a term that is 0 has no scales
            mean = norms.clamp(min=torch.finfo(norms.dtype).tiny).log().mean(0).exp()
            ratios = [torch.where(alive, mean / n, torch.ones_like(n)) for n in norms]
            chain.set_factors([o * r[:, None, None] for o, r in zip(old, ratios, strict=True)])
            scale = torch.ones_like(ratios[0])
            for place, axis in enumerate(chain.layout.order[:-1]):
                scale = scale * ratios[axis]
                held = getattr(chain, f"bias{place}", None)
                if held is not None:
                    held.mul_(scale.reshape(chain.layout.gaps[place].along(TERM)))

    @torch.no_grad()
    def term_norms(self) -> Tensor:
        """The Frobenius norm of each term's Kronecker product, (terms,): the product of the norms of its factors.

        The most that a term can contribute; see :func:`structmat.nn.kronecker.pruned`.
        """
        norms = [f.flatten(1).norm(dim=1) for f in self.factors()]
        return torch.stack(norms).prod(0)

    # ------------------------------------------------------------------------------------------------- explanations

    def extended(self, convention: Convention | str = "row") -> Extended:
        """The block as the fully connected network that it is: sparse matrices with tied entries, written out.

        Args:
            convention: "row" flattens arrays row-major, as everywhere in this library, "column" column-major, as in the
                paper.
        """
        from structmat.nn.kronecker.extended import Convention, extend

        return extend(self, Convention(convention))

    def explain(self, batch: int = 1) -> str:
        """What runs for ``batch`` samples: the linear parts, where, and the counts."""
        from structmat.nn.kronecker.extended import explain

        return explain(self, batch)

    @property
    def num_parameters(self) -> int:
        """Learned numbers, slopes too."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def extra_repr(self) -> str:
        shape = self.shape
        orders = sorted(set(shape.orders))
        fallback = "" if not self._way.reason else f", not one native pass: {self._way.reason}"
        return (
            f"{shape.inputs} -> {shape.outputs}, in_features={shape.in_features}, out_features={shape.out_features}, "
            f"terms={shape.terms}, order={orders[0] if len(orders) == 1 else shape.orders}, "
            f"inner={name_of(self.inner)}, outer={name_of(self.outer)}, bias={shape.bias.value}, "
            f"{shape.parameters} parameters, {shape.macs} multiply-adds{fallback}"
        )


def keep_(block: KroneckerBlock, generator: torch.Generator | None) -> None:
    """Draws nothing: the tensors are set afterwards."""

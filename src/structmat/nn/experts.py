"""Experts whose weights are one tensor: a layer that holds it, and the same with a layer for each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from structmat.errors import ShapeError
from structmat.nn.linear import StructuredLinear


class ExpertsLinear(nn.Module):
    """A linear layer for each expert, their weights in one tensor: what to hold in place of a parameter of three axes.

    A mixture that multiplies by a parameter of its own can't be compressed, since nobody else knows how it reads it.
    With this layer in the parameter's place, called instead of read, it can: :func:`structmat.compress` takes it apart
    into a layer for each expert, with the tokens that are sent to it (:class:`SplitExperts`).

    Args:
        experts: how many.
        in_features, out_features: of each.
        bias: whether each adds a learned vector.
        device, dtype: of the parameters, which are drawn as those of ``nn.Linear``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        bound = in_features**-0.5
        shape = (experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype).uniform_(-bound, bound))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """The layer on the memory of a weight (experts, out, in) and a bias (experts, out). Of a weight (experts, in,
        out) give ``weight.mT``.

        Raises:
            ShapeError: the weight has not three axes, or the bias another shape.
        """
        if weight.dim() != 3 or (bias is not None and bias.shape != weight.shape[:2]):
            given = tuple(weight.shape), None if bias is None else tuple(bias.shape)
            raise ShapeError(
                f"Experts have a weight (experts, out, in) and a bias (experts, out) or none; got shapes {given}."
            )
        experts, out, inputs = weight.shape
        made = cls(experts, inputs, out, device="meta", dtype=weight.dtype)
        made.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return made

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """Rows of each expert (experts, rows, in_features) to (experts, rows, out_features); or, where it is said which
        expert each row is for, rows (rows, in_features) to (rows, out_features).

        Args:
            x: the rows.
            experts: (rows,), integers below the number of experts, in any order.

        Raises:
            ShapeError: the axes are others.
        """
        check_rows(x, experts, self.experts, self.in_features)
        if experts is None:
            y = x @ self.weight.mT
            return y if self.bias is None else y + self.bias.unsqueeze(1)
        weights, biases = self.weight.unbind(), None if self.bias is None else self.bias.unbind()

        def one(expert: int, rows: Tensor) -> Tensor:
            return nn.functional.linear(rows, weights[expert], None if biases is None else biases[expert])

        return dispatched(x, experts, self.experts, self.out_features, one)

    def extra_repr(self) -> str:
        return f"{self.experts}, {self.in_features}, {self.out_features}, bias={self.bias is not None}"


class SplitExperts(nn.Module):
    """:class:`ExpertsLinear` with a layer of its own for each expert, ``"0"``, ``"1"`` and so on, of any kind.

    Only the layers of experts that get rows are called.

    Args:
        layers: from the same ``in_features`` to the same ``out_features``.

    Raises:
        ShapeError: there are none, or their sizes differ.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        sizes = {(layer.in_features, layer.out_features) for layer in layers}
        if len(sizes) != 1:
            raise ShapeError(f"Experts have one size in common, (in, out); got {sorted(map(str, sizes)) or 'none'}.")
        self.experts = len(layers)
        self.in_features, self.out_features = _sizes(layers[0])
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    @classmethod
    def from_experts(cls, experts: ExpertsLinear) -> Self:
        """The same experts; their layers are ``nn.Linear`` that share the memory of the given weight."""
        biases: Sequence[Tensor | None] = [None] * experts.experts if experts.bias is None else experts.bias.unbind()
        layers = []
        for weight, bias in zip(experts.weight.unbind(), biases, strict=True):
            layer = nn.Linear(
                experts.in_features, experts.out_features, bias is not None, device="meta", dtype=weight.dtype
            )
            layer.weight = nn.Parameter(weight.detach(), requires_grad=experts.weight.requires_grad)
            if bias is not None and experts.bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=experts.bias.requires_grad)
            layers.append(layer)
        return cls(layers).train(experts.training)

    def to_experts(self) -> ExpertsLinear:
        """The :class:`ExpertsLinear` with the same outputs: weights written out."""
        layers = [layer.to_linear() if isinstance(layer, StructuredLinear) else layer for layer in self.layers()]
        weights, biases = [], []
        for layer in layers:
            assert isinstance(layer, nn.Linear), f"a {type(layer).__name__} can't be written out"
            weights.append(layer.weight.detach())
            biases += [bias.detach() for bias in [layer._parameters["bias"]] if bias is not None]
        trained = any(p.requires_grad for p in self.parameters())
        made = ExpertsLinear.from_weight(torch.stack(weights), torch.stack(biases) if biases else None)
        return made.requires_grad_(trained).train(self.training)

    def layers(self) -> list[nn.Module]:
        """Of the experts, in their order."""
        return list(self.children())

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """As :meth:`ExpertsLinear.forward`."""
        check_rows(x, experts, self.experts, self.in_features)
        layers = self.layers()
        if experts is None:
            return torch.stack([layer(rows) for layer, rows in zip(layers, x, strict=True)])
        return dispatched(x, experts, self.experts, self.out_features, lambda expert, rows: layers[expert](rows))


def dispatched(x: Tensor, experts: Tensor, count: int, out: int, one: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Every row multiplied by the matrix of its expert, those of one expert together.

    Args:
        x: (rows, in).
        experts: (rows,).
        count: of experts.
        out: numbers that each row becomes.
        one: rows of one expert to their outputs; called for experts that have rows only.
    """
    if not len(x):
        return x.new_zeros(0, out)
    order = torch.argsort(experts, stable=True)
    sizes = torch.bincount(experts, minlength=count).tolist()
    parts = [one(expert, rows) for expert, rows in enumerate(x[order].split(sizes)) if len(rows)]
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy(0, order, together)


def check_rows(x: Tensor, experts: Tensor | None, count: int, inputs: int) -> None:
    """Raise :class:`~structmat.errors.ShapeError` unless rows and experts have the axes that are multiplied."""
    fits = x.dim() == 3 and x.shape[0] == count if experts is None else x.dim() == 2 and experts.shape == x.shape[:1]
    if not fits or x.shape[-1] != inputs:
        given = "without experts" if experts is None else f"with experts of shape {tuple(experts.shape)}"
        raise ShapeError(
            f"The input has shape {tuple(x.shape)} {given}; {count} experts take ({count}, rows, {inputs}), or "
            f"(rows, {inputs}) with the expert of each row (rows,)."
        )


def _sizes(layer: nn.Module) -> tuple[int, int]:
    inputs, out = layer.in_features, layer.out_features
    assert isinstance(inputs, int) and isinstance(out, int)  # noqa: PT018
    return inputs, out

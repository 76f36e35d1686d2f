"""Sparse layers that begin with every entry of the original and lose entries while they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from structmat.compression.layers import layer_of, structured_layer_of
from structmat.compression.objectives import structured_names
from structmat.compression.replace import structured
from structmat.compression.scan import parent_and_child
from structmat.errors import StructureError
from structmat.matrix import StructuredMatrix
from structmat.projection.sparse import entries
from structmat.projection.supports import largest
from structmat.structure import Shape
from structmat.structures.dense import Dense
from structmat.structures.sparse import Sparse

_TIMES = 40
"""How often entries are dropped, at even distances."""

_FORGETTING = 0.05
"""Share of each look in the running mean of sensitivities."""

LOOK_EVERY = 4
"""Steps from one look at the sensitivities to the next."""


@dataclass(frozen=True)
class _Thinned:
    """A layer that loses entries.

    Args:
        paths: the layer's names in the model.
        structure, shape: of each of its matrices in the end.
        weight: (copies * out * in,) or any view of it, the parameter of the layer that learns.
        full: the original's matrices, (copies, out, in).
    """

    paths: tuple[str, ...]
    structure: Sparse
    shape: Shape
    weight: nn.Parameter
    full: Tensor

    @property
    def matrices(self) -> Tensor:
        """(copies, out, in), a view."""
        return self.weight.detach().view(self.full.shape)


class Thinning:
    """The sparse layers of a model, which choose their entries while they learn.

    Each is replaced in place by a dense one. :meth:`begin` gives it the original's matrix; from then on those entries
    are dropped, for good, that are missed least: the smallest ``weight^2 * sensitivity``, with a running mean of what
    :meth:`look` is told. Their number follows a cubic schedule (Zhu and Gupta 2017, To prune, or not to prune, equation
    1) down to the layer's nonzeros, at ``share`` of the distillation. :meth:`harden` makes sparse layers of what is
    left.

    A layer takes part if it is linear or a convolution of a ``Sparse`` structure that learns, alone or as a part of a
    recurrent net or of attention. It takes as much time and memory as the original's until it is sparse again.

    Source: the criterion is that of Theis, Korshunova, Tejani, Huszar 2018 (Faster gaze prediction with dense networks
    and Fisher pruning), for entries in place of channels and with the Fisher information itself (see
    :meth:`structmat.compression.teaching.Teaching.sensitivities`): gradients of the distance are zero where nothing is
    amiss yet.

    Args:
        model: changed in place.
        original: with its modules taken apart as the model's are.
        share: of the distillation, above 0 and below 1.

    Raises:
        StructureError: no layer takes part.
    """

    def __init__(self, model: nn.Module, original: nn.Module, share: float) -> None:
        self._model, self._share = model, share
        self._layers = {name: made for name in structured_names(model) if (made := _opened(model, original, name))}
        if not self._layers:
            raise StructureError(
                "Distill(thin=...) needs layers of the structure Sparse that learn, and the model has none. Plan some, "
                "or leave it."
            )
        self._sensitivities = {name: torch.zeros_like(layer.full) for name, layer in self._layers.items()}
        self._masks = {name: layer.matrices != 0 for name, layer in self._layers.items()}
        self._dropped = 0  # how often

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What loses entries."""
        return [layer.weight for layer in self._layers.values()]

    def begin(self) -> None:
        """Every layer has the original's matrix."""
        with torch.no_grad():
            for name, layer in self._layers.items():
                layer.matrices.copy_(layer.full)
                self._masks[name] = torch.ones_like(self._masks[name])

    @property
    def is_over(self) -> bool:
        """Whether all layers have the number of entries that they shall have."""
        return self._dropped == _TIMES

    def look(self, sensitivities: Sequence[Tensor]) -> None:
        """Every :data:`LOOK_EVERY` steps while entries are dropped: how much each number of :attr:`weights` matters."""
        for (name, layer), found in zip(self._layers.items(), sensitivities, strict=True):
            held = self._sensitivities[name]
            held.lerp_(found.view(layer.full.shape).to(held.dtype), _FORGETTING)

    def step(self, values: Sequence[Tensor], share: float) -> None:
        """After a step of the optimizer.

        Args:
            values: of :attr:`weights` in the precision in which they learn; entries that were dropped become zero
                again.
            share: of the distillation that is over after the step.
        """
        due = min(_TIMES, int(_TIMES * share / self._share + 1e-9))
        with torch.no_grad():
            for (name, layer), value in zip(self._layers.items(), values, strict=True):
                matrices = value.view(layer.full.shape)
                if due > self._dropped:
                    self._drop(name, matrices, due / _TIMES)
                matrices.mul_(self._masks[name])
        self._dropped = due

    def _drop(self, name: str, matrices: Tensor, progress: float) -> None:
        """The entries of each of a layer's matrices that are missed least."""
        layer = self._layers[name]
        count, whole = cast(int, layer.structure.nonzeros), layer.shape[0] * layer.shape[1]
        kept = count + round((whole - count) * (1 - progress) ** 3)
        scores = torch.where(self._masks[name], matrices.square() * self._sensitivities[name], -1.0)
        self._masks[name] = torch.stack([largest(one, kept) for one in scores.cpu()]).to(scores.device)

    def follow(self, values: Sequence[Tensor]) -> None:
        """Other states were written to the weights: their zeros are what is dropped. Only once this is over."""
        for (name, layer), value in zip(self._layers.items(), values, strict=True):
            self._masks[name] = value.detach().view(layer.full.shape) != 0

    def harden(self) -> None:
        """Sparse layers in the places of the dense ones; what is beyond their number, if anything is, is left out."""
        for layer in self._layers.values():
            matrices = []
            for dense in layer.matrices.cpu():
                mask = largest(torch.where(dense != 0, dense.abs(), -1.0), cast(int, layer.structure.nonzeros))
                matrices.append(StructuredMatrix(layer.structure, layer.shape, entries(dense, mask)))
            _put(self._model, layer.paths, matrices)

    # -------------------------------------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, beside :attr:`dropped`."""
        held = {f"{name}.sensitivity": tensor for name, tensor in self._sensitivities.items()}
        return held | {f"{name}.mask": tensor for name, tensor in self._masks.items()}

    @property
    def dropped(self) -> int:
        """How often entries were dropped."""
        return self._dropped

    def load(self, dropped: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint of the same model, exactly."""
        self._dropped = dropped
        for name, layer in self._layers.items():
            self._sensitivities[name] = tensors[f"{name}.sensitivity"].to(layer.full.device)
            self._masks[name] = tensors[f"{name}.mask"].to(layer.full.device)


def _opened(model: nn.Module, original: nn.Module, name: str) -> _Thinned | None:
    """A sparse layer replaced by a dense one of the same matrices, if it may lose entries."""
    layer = model.get_submodule(name)
    adapter = structured_layer_of(layer)
    if not name or adapter is None or adapter.looks_up:
        return None
    content = adapter.content(layer)
    present = dict(original.named_modules())
    source = layer_of(present[name]) if name in present else None
    if source is None or not isinstance(content.structure, Sparse) or content.dtype.is_complex:
        return None
    if not all(p.requires_grad for n, p in layer.named_parameters() if n != "bias"):
        return None
    paths = tuple(n for n, m in model.named_modules(remove_duplicate=False) if m is layer)
    written = adapter.to_dense(layer)
    own = layer_of(written)
    assert own is not None, f"{type(written).__name__} is dense"
    dense = own.matrices(written)
    made = _put(model, paths, [StructuredMatrix(Dense(), content.shape, {"weight": matrix}) for matrix in dense])
    weight = next(p for n, p in made.named_parameters() if n != "bias")
    full = source.matrices(present[name]).detach().to(dtype=torch.promote_types(weight.dtype, torch.float32))
    return _Thinned(paths, content.structure, content.shape, weight, full)


def _put(model: nn.Module, paths: Sequence[str], matrices: Sequence[StructuredMatrix]) -> nn.Module:
    """A layer of other matrices in the place of a structured one, with its bias."""
    layer = model.get_submodule(paths[0])
    adapter = structured_layer_of(layer)
    assert adapter is not None, f"{paths[0]} is structured"
    made = structured(adapter.to_dense(layer), matrices)
    for path in paths:
        parent, child = parent_and_child(model, path)
        setattr(parent, child, made)
    return made

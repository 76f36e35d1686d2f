"""What the recurrent layers share: their matrices, and the way from and to PyTorch's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.errors import ModelError, StructureError
from structmat.matrix import StructuredMatrix
from structmat.nn.linear import FrozenLinear, StructuredLinear
from structmat.nn.recurrent.as_torch import OPTIONS, AsTorch
from structmat.nn.recurrent.cells import Cell
from structmat.nn.recurrent.frozen import FrozenRecurrent, as_returned
from structmat.nn.recurrent.gates import GateLinear
from structmat.nn.recurrent.options import Options
from structmat.nn.recurrent.run import run_layers
from structmat.nn.recurrent.sequences import Given
from structmat.program.scaling import scaling_cut
from structmat.projection.project import DEFAULT_SWEEPS, project
from structmat.structure import Shape, Structure
from structmat.structures.dense import Dense


class Recurrent(AsTorch):
    """What :class:`StructuredLSTM`, :class:`StructuredGRU` and :class:`StructuredRNN` share; not made by itself.

    The matrices are layers of their own: ``ih_l0`` for PyTorch's ``weight_ih_l0`` and ``bias_ih_l0``, and so on. With a
    structure a gate they are a :class:`GateLinear` that holds a :class:`StructuredLinear` a gate, else one
    :class:`StructuredLinear`; a layer that was split (:func:`structmat.nn.recurrent.split`) has ``nn.Linear`` until
    these are replaced.
    """

    torch_class: ClassVar[type[nn.RNNBase]]
    """The layer of PyTorch with this interface."""

    def __init__(
        self,
        cell: Cell,
        options: Options,
        *,
        structure: Structure,
        input_structure: Structure | None,
        projection_structure: Structure | None,
        per_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise StructureError(f"Recurrent layers are real; got dtype={dtype}. Use a floating dtype.")
        self.cell, self.options = cell, options
        self.structure = structure
        self.input_structure = structure if input_structure is None else input_structure
        self.projection_structure = structure if projection_structure is None else projection_structure
        self.per_gate = per_gate
        bound = options.hidden_size**-0.5
        for name, shape, bias in options.shapes(len(cell.gates)):
            layer = self._matrix(name, shape, bias, device=device, dtype=dtype, generator=generator)
            self.add_module(name, layer)
            if layer.bias is not None and layer.bias.device.type != "meta":
                drawn = torch.empty(layer.bias.shape).uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    layer.bias.copy_(drawn)

    def _matrix(
        self,
        name: str,
        shape: Shape,
        bias: bool,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> StructuredLinear | GateLinear:
        structure = self.structure_of(name)
        out, inputs = shape
        # PyTorch draws all weights with the variance that fits the gates, whatever is multiplied.
        factor = (inputs / self.options.hidden_size) ** 0.5

        def made(rows: int, with_bias: bool) -> StructuredLinear:
            layer = StructuredLinear(
                inputs, rows, with_bias, structure=structure, device=device, dtype=dtype, generator=generator
            )
            with torch.no_grad():
                for key in scaling_cut(layer.program) or ():
                    layer.get_parameter(key).mul_(factor)
            return layer

        if not self._is_by_gates(name):
            return made(out, bias)
        gates = self.cell.gates
        return GateLinear({gate: made(out // len(gates), False) for gate in gates}, bias)

    def _is_by_gates(self, name: str) -> bool:
        return self.per_gate and not name.startswith("hr") and len(self.cell.gates) > 1

    def structure_of(self, name: str) -> Structure:
        """The structure of a matrix by its name here, such as ``"ih_l0"``, before fractions are resolved."""
        return {"ih": self.input_structure, "hh": self.structure, "hr": self.projection_structure}[name[:2]]

    def forward(
        self, input: Tensor | PackedSequence, hx: Given = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Outputs and last states, as PyTorch's layer returns them.

        Args:
            input: (time, batch, inputs), (batch, time, inputs) if ``batch_first``, (time, inputs), or packed
                sequences.
            hx: initial states (layers * directions, batch, size), without the batch for two axes; zero if None.

        Raises:
            ShapeError: an axis of the input or of a state has another size.
            DataError: a state has another dtype than the input.
        """
        y, state = run_layers(self, self.cell, self.options, input, hx)
        return y, as_returned(state)

    # ------------------------------------------------------------------------------------------- PyTorch's layers

    def torch_names(self) -> dict[str, str]:
        """The matrix of this layer, such as ``"ih_l0"``, that stands for each of PyTorch's tensors, in its order.

        ``weight_ih_l0`` is the matrix of ``ih_l0``, written out; ``bias_ih_l0`` is ``ih_l0.bias``.
        """
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * self.options.bias
        kinds += ["weight_hr"] * bool(self.options.proj_size)
        return {kind + suffix: kind[-2:] + suffix for _, suffix in self.options.runs() for kind in kinds}

    def torch_state_dict(self) -> dict[str, Tensor]:
        """The state dict of PyTorch's layer with the same outputs: copies, matrices written out."""
        with torch.no_grad():
            found = {}
            for torch_name, name in self.torch_names().items():
                layer = self.get_submodule(name)
                found[torch_name] = _written(layer) if torch_name.startswith("weight") else _bias(layer).clone()
        return found

    def load_torch_state_dict(
        self,
        state: Mapping[str, Tensor],
        *,
        second_moments: Mapping[str, Tensor] | None = None,
        sweeps: int = DEFAULT_SWEEPS,
        seed: int = 0,
    ) -> None:
        """Take over what PyTorch's layer holds: matrices by projection on their structures, vectors as they are.

        Args:
            state: by PyTorch's names; a prefix must have been cut off.
            second_moments: of what is multiplied by a matrix, (in, in), by the matrix' name here or there, such as
                ``{"hh_l0": C}``; see :func:`structmat.nn.recurrent.second_moments`. Matrices without are fitted in the
                Frobenius norm.
            sweeps, seed: as of :func:`structmat.project`.

        Raises:
            ModelError: names are missing or unknown, or a tensor has another shape.
        """
        shapes = {f"weight_{name}": shape for name, shape, _ in self.options.shapes(len(self.cell.gates))}
        _check_names("The state dict", state, self.torch_names())
        moments = {name.removeprefix("weight_"): moment for name, moment in (second_moments or {}).items()}
        unknown = sorted(set(moments) - set(self.torch_names().values()))
        if unknown:
            raise ModelError(
                f"Second moments are given for {', '.join(unknown)}. The matrices of this layer are "
                f"{', '.join(sorted(set(self.torch_names().values())))}."
            )
        for name, tensor in state.items():
            wanted = shapes.get(name, (shapes[f"weight_{self.torch_names()[name]}"][0],))
            if tuple(tensor.shape) != wanted:
                raise ModelError(
                    f"{name} has shape {tuple(tensor.shape)} in the state dict and {wanted} in this layer."
                )
        for torch_name, name in self.torch_names().items():
            layer = self.get_submodule(name)
            with torch.no_grad():
                if torch_name.startswith("bias"):
                    _bias(layer).copy_(state[torch_name])
                    continue
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(state[torch_name])
                    continue
                parts = list(layer.gates().values()) if isinstance(layer, GateLinear) else [layer]
                for part, rows in zip(parts, state[torch_name].chunk(len(parts)), strict=True):
                    assert isinstance(part, StructuredLinear), f"{name} is a {type(part).__name__}"
                    found = project(rows, part.structure, second_moment=moments.get(name), sweeps=sweeps, seed=seed)
                    for key, tensor in found.matrix.tensors.items():
                        getattr(part, key).copy_(tensor)

    @classmethod
    def _from_torch(
        cls,
        layer: nn.RNNBase,
        structure: Structure,
        *,
        input_structure: Structure | None,
        per_gate: bool,
        second_moments: Mapping[str, Tensor] | None,
        sweeps: int,
        seed: int,
        **more: Any,
    ) -> Self:
        if not isinstance(layer, cls.torch_class):
            raise ModelError(
                f"{cls.__name__} takes the place of an nn.{cls.torch_class.__name__}; got a {type(layer).__name__}."
            )
        options = {name: getattr(layer, name) for name in OPTIONS if name != "proj_size"}
        weight = next(layer.parameters())
        made = cls(
            **options,
            **more,
            structure=structure,
            input_structure=input_structure,
            per_gate=per_gate,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.load_torch_state_dict(
            dict(layer.named_parameters()), second_moments=second_moments, sweeps=sweeps, seed=seed
        )
        return made.train(layer.training)

    def _to_torch(self, **more: Any) -> nn.RNNBase:
        state = self.torch_state_dict()
        options = {name: getattr(self.options, name) for name in OPTIONS if name != "proj_size"}
        like = next(iter(state.values()))
        layer = self.torch_class(**options, **more, device=like.device, dtype=like.dtype)
        layer.load_state_dict(state)
        return layer.train(self.training)

    # ------------------------------------------------------------------------------------------------- deployment

    def freeze(self, rows: int | None = None) -> FrozenRecurrent:
        """The layer for deployment, in evaluation mode: fixed tensors, put together where that runs faster.

        Args:
            rows: of a typical call at one time, the batch. Many by default. The matrices of the input are frozen for
                many rows, as all times are multiplied at once, unless ``rows`` is 1: then for one.
        """
        made: dict[str, FrozenLinear] = {}
        for name in dict.fromkeys(self.torch_names().values()):
            layer = self.get_submodule(name)
            here = None if name.startswith("ih") and rows != 1 else rows
            made[name] = _frozen(layer, here)
        if self.cell.adds_biases and self.options.bias:
            for name, layer in made.items():
                if name.startswith("ih"):
                    other = made["hh" + name[2:]]
                    layer.bias, other.bias = _bias(layer) + _bias(other), None
        return FrozenRecurrent(self.cell, self.options, made)

    def extra_repr(self) -> str:
        shown = [f"{self.options.input_size}, {self.options.hidden_size}"]
        defaults = Options(1, 2)
        for name in OPTIONS[2:]:
            value = getattr(self.options, name)
            if value != getattr(defaults, name):
                shown.append(f"{name}={value}")
        if any(isinstance(layer, nn.Linear) for layer in self.children()):
            return ", ".join(shown)  # each matrix shows what it is
        shown.append(f"structure={self.structure}")
        if self.input_structure != self.structure:
            shown.append(f"input_structure={self.input_structure}")
        if self.options.proj_size and self.projection_structure != self.structure:
            shown.append(f"projection_structure={self.projection_structure}")
        return ", ".join([*shown, f"per_gate={self.per_gate}"])


def _bias(layer: nn.Module) -> Tensor:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return bias


def _written(layer: nn.Module) -> Tensor:
    """The matrix of a layer written out, (out, in), in memory of its own."""
    if isinstance(layer, GateLinear):
        return torch.cat([_written(gate) for gate in layer.gates().values()])
    if isinstance(layer, StructuredLinear):
        return layer.matrix.to_dense().contiguous().clone()
    assert isinstance(layer, nn.Linear), f"a {type(layer).__name__} can't be written out"
    return layer.weight.detach().clone()


def _frozen(layer: nn.Module, rows: int | None) -> FrozenLinear:
    if isinstance(layer, StructuredLinear):
        return layer.freeze(rows)
    if isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
        matrix = StructuredMatrix(Dense(), shape, {"weight": layer.weight.detach()})
        return StructuredLinear.from_matrix(matrix, layer.bias).freeze(rows)
    assert isinstance(layer, GateLinear), f"a {type(layer).__name__} can't be frozen"
    return layer.freeze(rows)


def _check_names(what: str, given: Mapping[str, Tensor], wanted: Mapping[str, str]) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        faults = [f"{len(n)} {t} ({', '.join(n[:4])})" for t, n in (("missing", missing), ("unknown", unknown)) if n]
        raise ModelError(f"{what} does not fit this layer: names {' and '.join(faults)}. Give the state of its twin.")

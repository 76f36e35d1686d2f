"""A matrix for each gate, run as one product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from structmat.errors import ModelError
from structmat.kernels import quick, writing_for
from structmat.modes import is_compiling
from structmat.nn.linear import FrozenLinear, StructuredLinear, multiply
from structmat.nn.recurrent.hooks import is_hooked
from structmat.program import Chain, Pad, Program, Sum, fuse, rename


class GateLinear(nn.Module):
    """Layers of one input, their outputs one after the other: ``y = [S_1 x; ...; S_k x] + b``.

    The layers keep their tensors, and run as one program: the sum of theirs, each padded to the rows of the whole.

    Args:
        gates: by name, layers without bias and of the same input.
        bias: whether to add a vector, zero at first.
    """

    bias: nn.Parameter | None

    def __init__(self, gates: Mapping[str, nn.Module], bias: bool) -> None:
        super().__init__()
        for name, gate in gates.items():
            self.add_module(name, gate)
        like = next(
            t for gate in gates.values() for t in (*gate.parameters(), *gate.buffers()) if t.is_floating_point()
        )
        sizes = [(_size(gate, "out_features"), _size(gate, "in_features")) for gate in gates.values()]
        self.in_features, self.out_features = sizes[0][1], sum(out for out, _ in sizes)
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=like.dtype, device=like.device))
        else:
            self.register_parameter("bias", None)
        self._parts: tuple[Program, ...] = ()
        self._program: Program | None = None

    def gates(self) -> dict[str, nn.Module]:
        """The layers by name, in the order of their outputs."""
        return {name: gate for name, gate in self._modules.items() if gate is not None}

    @property
    def program(self) -> Program | None:
        """What the whole multiplies by, or None where a gate is another kind of layer or has hooks to be called."""
        gates = self.gates()
        parts = []
        for gate in gates.values():
            if not isinstance(gate, StructuredLinear | FrozenLinear) or is_hooked(gate):
                return None
            if isinstance(gate, FrozenLinear) and gate.dense is not None:
                return None
            parts.append(gate.program)
        # Programs are compared as objects: comparing what they hold takes longer than a small product.
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._parts, self._program = tuple(parts), stacked(gates, parts)
        return self._program

    def tensors(self) -> dict[str, Tensor]:
        """What :attr:`program` reads, by name."""
        found = {}
        for name, gate in self._modules.items():
            assert isinstance(gate, StructuredLinear | FrozenLinear)
            for key, tensor in gate.tensors().items():
                found[f"{name}_{key}"] = tensor
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., in_features) to (..., sum of the gates' outputs)."""
        program = self.program
        if program is None:
            y = torch.cat([gate(x) for gate in self.gates().values()], -1)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        tensors = self.tensors()
        if not is_compiling():
            found = quick(program)(x, self._parameters, tensors)
            if found is not None:
                return found
        return multiply(program, tensors, x, self.bias)

    def freeze(self, rows: int | None = None) -> FrozenLinear:
        """One layer with fixed tensors, put together where that runs faster for so many rows (many by default).

        Raises:
            ModelError: a gate is another kind of layer.
        """
        program = self.program
        if program is None:
            kinds = ", ".join(type(gate).__name__ for gate in self.gates().values())
            raise ModelError(f"Gates that are {kinds} are not all structured, or have hooks: they can't be frozen.")
        with torch.no_grad():
            tensors = self.tensors()
            program, made = fuse(program, tensors, writing_for(program, tensors, rows))
            bias = None if self.bias is None else self.bias.detach().clone()
        return FrozenLinear(program, {name: t.detach().clone() for name, t in made.items()}, bias)


def stacked(names: Iterable[str], programs: Iterable[Program]) -> Program:
    """Programs of one input, their outputs one after the other; tensors are named ``name_tensor``."""
    programs = list(programs)
    total, parts, before = sum(p.out_features for p in programs), [], 0
    for name, program in zip(names, programs, strict=True):
        own = rename(program, lambda tensor, name=name: f"{name}_{tensor}")  # type: ignore[misc]
        parts.append(Chain((own, Pad(program.out_features, total, before))))
        before += program.out_features
    return Sum(tuple(parts))


def _size(layer: nn.Module, name: str) -> int:
    size = getattr(layer, name)
    assert isinstance(size, int), f"{name} of {type(layer).__name__}"
    return size

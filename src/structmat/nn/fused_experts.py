"""The expert modules of transformers, whose weights are parameters of three axes, with layers in the place of these."""

from __future__ import annotations

import copy
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from structmat.errors import ModelError
from structmat.nn.experts import ExpertsLinear, SplitExperts

_UNROUTED = ("Llama4TextExperts",)
"""Classes whose forward takes the rows of all experts, one after the other and equally many, and nothing else."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether it is a module of transformers that :class:`SplitFusedExperts` can take the place of: one of those that
    share the interface of experts (``use_experts_implementation``), not spread over devices, or ``Llama4TextExperts``.
    """
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return False
    weights = [module._parameters.get(name) for name in (_up(module), "down_proj")]
    if not all(w is not None and w.dim() == 3 and w.is_floating_point() and type(w) is nn.Parameter for w in weights):
        return False
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    shares = all(hasattr(module, flag) for flag in flags) and not getattr(module, "_is_expert_parallel", False)
    known = {_up(module), "down_proj", f"{_up(module)}_bias", "down_proj_bias"}
    return (shares or kind.__name__ in _UNROUTED) and set(module._parameters) <= known


class SplitFusedExperts(nn.Module):
    """An expert module of transformers with a layer for each expert: ``gate_up_proj`` (or ``up_proj``) and
    ``down_proj`` are :class:`~structmat.nn.experts.SplitExperts`.

    Called as that one; whichever implementation of experts is configured, this runs expert by expert.

    Args:
        shell: the module without its weights: knows its activation, and what it is.
        up, down: experts before and behind the activation.
    """

    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, shell: nn.Module, up: SplitExperts, down: SplitExperts) -> None:
        super().__init__()
        self._shell = (shell,)  # not a submodule: it has no weights
        self.num_experts = up.experts
        self.add_module(_up(shell), up)
        self.down_proj = down
        for name, child in shell.named_children():
            self.add_module(name, child)

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """The same experts, on the memory of the given ones.

        Raises:
            ModelError: it is no such module.
        """
        if not is_fused_experts(module):
            raise ModelError(f"A {type(module).__name__} is no known expert module of transformers.")
        shell = copy.copy(module)
        shell._parameters = dict.fromkeys(module._parameters)
        shell._modules = dict(module._modules)
        made = cls(shell, *(SplitExperts.from_experts(_held(module, name)) for name in (_up(module), "down_proj")))
        return made.train(module.training)

    def to_module(self) -> nn.Module:
        """The module of transformers with the same outputs: weights written out."""
        shell = self._shell[0]
        made = copy.copy(shell)
        made._parameters = {}
        made._modules = {name: self._modules[name] for name in shell._modules}
        for name in (_up(shell), "down_proj"):
            experts = cast(SplitExperts, self.get_submodule(name)).to_experts()
            weight = experts.weight.mT.contiguous() if _is_transposed(shell) else experts.weight
            required = experts.weight.requires_grad
            made.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=required))
            if f"{name}_bias" in shell._parameters:
                made.register_parameter(f"{name}_bias", experts.bias)
        made._parameters = {name: made._parameters[name] for name in shell._parameters}
        return made.train(self.training)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Tokens (tokens, hidden) to (tokens, hidden): the weighted sum of what the experts of each put out.

        Args:
            hidden_states: the tokens; without an index, equally many rows for each expert, one after the other.
            top_k_index: (tokens, k), the experts of each token; the number of experts stands for none.
            top_k_weights: (tokens, k).
        """
        shell: Any = self._shell[0]
        up, down = cast(SplitExperts, self.get_submodule(_up(shell))), self.down_proj
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(self.num_experts, -1, up.in_features)
            gate, y = up(rows).chunk(2, -1)
            unrouted: Tensor = down(y * self.act_fn(gate)).view(-1, down.out_features)
            return unrouted
        token, place = (top_k_index < self.num_experts).nonzero(as_tuple=True)
        experts = top_k_index[token, place]
        y = up(hidden_states[token], experts)
        y = shell._apply_gate(y) if shell.has_gate else self.act_fn(y)
        y = down(y, experts)
        if shell.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = (y * top_k_weights[token, place, None]).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token, y)


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", True))  # Llama 4 does not say that it is


def _held(module: nn.Module, name: str) -> ExpertsLinear:
    """A weight of a module and its bias as a layer."""
    weight = module.get_parameter(name)
    bias = module._parameters.get(f"{name}_bias")
    held = weight.detach().mT if _is_transposed(module) else weight.detach()
    made = ExpertsLinear.from_weight(held, None if bias is None else bias.detach())
    made.weight.requires_grad_(weight.requires_grad)
    if bias is not None and made.bias is not None:
        made.bias.requires_grad_(bias.requires_grad)
    return made

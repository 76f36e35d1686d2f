"""Whether a module must be called as such."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_hooked(layer: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``: hooks of its own or of all modules."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )

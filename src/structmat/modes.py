"""Who follows PyTorch's operations while they run: compilers, tracers, and the transforms of torch.func.

What decides by values, keeps something between calls, writes in place or calls a kernel of ours asks here first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_compiling() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or the exporter of ONNX makes a graph of what is called.

    They fuse PyTorch's operations, know nothing of ours, and follow no decision that depends on values.
    """
    return torch.compiler.is_compiling()


def is_traced() -> bool:
    """Whether these or ``torch.jit.trace`` make a graph of what is called."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_quiet() -> bool:
    """Whether no transform of torch.func, no differentiation forwards and no ``torch.jit.trace`` is at work.

    Compilers are not asked for: where this is asked at every call, :func:`is_compiling` has been before.
    """
    if torch._C._is_tracing():  # sizes are tensors then, and a graph would hold a choice made for one of them
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def is_followed() -> bool:
    """Whether anybody follows: a compiler, or one of those that :func:`is_quiet` asks for."""
    return torch.compiler.is_compiling() or not is_quiet()


def is_usual_backward(grad: Tensor) -> bool:
    """Whether a backward pass is the usual one: of one gradient at a time, which nobody differentiates or transforms.

    Many at a time come with ``is_grads_batched`` and ``jacobian(vectorize=True)``, and under ``torch.func.vmap``.

    Args:
        grad: what the pass starts from; a subclass of tensors is not usual.
    """
    if torch.is_grad_enabled() or type(grad) is not Tensor:
        return False
    return is_quiet() and not torch._C._functorch.is_legacy_batchedtensor(grad)

"""The two doors of an op: a plain eager call goes straight to the launcher, a watched one through the registered op.

The dispatcher and a registered gradient cost tens of microseconds per call, which pay only when somebody looks:
torch.compile, fake tensors, dispatch and function modes (FLOP counters, selective checkpointing), tensor subclasses.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def watched(*tensors: Tensor) -> bool:
    """Whether this call must go through the registered op, so that whoever watches sees it."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 (half the time of any(), on every eager call)
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return True
    return False


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records this call."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def needs_registered_op(*tensors: Tensor) -> bool:
    """The same question for an op whose gradient is known to the registered op alone."""
    return watched(*tensors) or needs_grad(*tensors)


def savable(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of it if it was made in inference mode: autograd refuses to save such a tensor."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What products of ``tensor`` are cast to, or None where autocast is off (it knows no tensors without data)."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)

"""A Linear and what follows it.

On a CPU without gradients oneDNN computes ``activation(x Wᵀ + b)``, ``(x Wᵀ + b) * times`` and ``(x Wᵀ + b) + plus``
while it writes the product: one pass over memory where PyTorch takes two or three, and in float32 a product that is
faster than MKL's on AMD. Half precision on a CPU without instructions for it is computed in float32, weights cast on
the way: PyTorch's own loop takes six times as long. Everywhere else, and for any module that is not a plain
``nn.Linear`` (PEFT's, a quantised one, one with hooks), the module is called and the rest follows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from mtllm_fast.core.dispatch import needs_grad, watched

# Names that oneDNN gives to what may follow a product.
_ONEDNN_ACTIVATIONS = {nn.SiLU: "swish", SiLUActivation: "swish", nn.ReLU: "relu"}


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for the module to be called: a hook, or accelerate, which fetches offloaded weights."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or hasattr(module, "_hf_hook")


def linear(
    module: nn.Module,
    x: Tensor,
    *,
    activation: nn.Module | None = None,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """``activation(module(x)) * times + plus``, at most one of the three: x ``[T, K]`` -> ``[T, N]``."""
    assert (activation is not None) + (times is not None) + (plus is not None) <= 1
    if _onednn_serves(module, x) and (activation is None or type(activation) in _ONEDNN_ACTIVATIONS):
        return _onednn(module, x, activation, times, plus)
    y = module(x)
    if activation is not None:
        return activation(y)
    if times is not None:
        return y * times
    return y if plus is None else y + plus


def _onednn(
    module: nn.Module, x: Tensor, activation: nn.Module | None, times: Tensor | None, plus: Tensor | None
) -> Tensor:
    dtype = _onednn_dtype(x.dtype)
    x_c, weight, bias, times, plus = (
        None if t is None else t.to(dtype) for t in (x, module.weight, module.bias, times, plus)
    )
    onednn = torch.ops.mkldnn._linear_pointwise
    if plus is not None:
        y = onednn.binary(x_c, plus, weight, bias, "add")
    elif times is not None:
        y = onednn.binary(x_c, times, weight, bias, "mul")
    else:
        y = onednn(x_c, weight, bias, "none" if activation is None else _ONEDNN_ACTIVATIONS[type(activation)], [], None)
    return y.to(x.dtype)


def _onednn_serves(module: nn.Module, x: Tensor) -> bool:
    if x.device.type != "cpu" or type(module) is not nn.Linear or is_hooked(module):
        return False
    weights = (module.weight,) if module.bias is None else (module.weight, module.bias)
    if watched(x, *weights) or needs_grad(x, *weights) or torch.is_autocast_enabled("cpu"):
        return False
    return _onednn_dtype(x.dtype) is not None and all(w.dtype == x.dtype and w.device == x.device for w in weights)


@cache
def _onednn_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which oneDNN multiplies tensors of ``dtype`` on this CPU; None if it does not."""
    if not torch.backends.mkldnn.is_available():
        return None
    native = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in native:
        return None
    return dtype if native[dtype]() else torch.float32

"""A Linear and what follows it.

On a CPU without gradients oneDNN computes both in one pass (``core/onednn.py``). Everywhere else, and for any module
that is not a plain ``nn.Linear`` (PEFT's, a quantised one, one with hooks), the module is called and the rest follows.
A module with a twin in 8 bits (``precision.py``) is not called: the twin is.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import SiLUActivation

from mtllm_fast.core import onednn
from mtllm_fast.core.dispatch import needs_grad, watched

TWIN = "_twin"  # in the ``__dict__`` of an nn.Linear: what multiplies in its stead while nothing needs a gradient

# Names that oneDNN gives to what may follow a product.
_ONEDNN_ACTIVATIONS: dict[type | None, str] = {
    None: "none",
    nn.SiLU: "swish",
    SiLUActivation: "swish",
}


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for the module to be called: a hook, or accelerate, which fetches offloaded weights."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "_hf_hook" in module.__dict__


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
    kind = None if activation is None else type(activation)
    twin = module.__dict__.get(TWIN)
    if twin is not None and not needs_grad(x, module.weight):
        return _followed(twin(x), activation, times, plus)
    if kind is nn.ReLU and _onednn_serves(module, x):
        return onednn.linear(x, module.weight, module.bias).relu_()  # oneDNN's own makes 0 of NaN
    if kind in _ONEDNN_ACTIVATIONS and _onednn_serves(module, x):
        name = _ONEDNN_ACTIVATIONS[kind]
        return onednn.linear(x, module.weight, module.bias, activation=name, times=times, plus=plus)
    return _followed(module(x), activation, times, plus)


def _followed(y: Tensor, activation: nn.Module | None, times: Tensor | None, plus: Tensor | None) -> Tensor:
    if activation is not None:
        return activation(y)
    if times is not None:
        return y * times
    return y if plus is None else y + plus


def _onednn_serves(module: nn.Module, x: Tensor) -> bool:
    if x.device.type != "cpu" or type(module) is not nn.Linear or is_hooked(module):
        return False
    weights = (module.weight,) if module.bias is None else (module.weight, module.bias)
    return not (watched(x, *weights) or needs_grad(x, *weights)) and onednn.serves(x, *weights)

"""Linears and what follows them, in the fewest passes and launches that the device has.

On a CPU without gradients oneDNN computes, in half precision, a product and what follows in one pass
(``core/onednn.py``). Elsewhere projections of the same input are one product where their weights lie merged
(``merging.py``). Any module that is not a plain ``nn.Linear`` (PEFT's, a quantised one, one with hooks) is called and
the rest follows. A module with a twin in 8 bits (``precision.py``) is not called: the twin is.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation

from mtllm_fast.core import buffers, onednn
from mtllm_fast.core.dispatch import autocast_dtype, needs_grad, watched
from mtllm_fast.models.lora import base_linear, idle_base, is_lora, lora_group
from mtllm_fast.models.merging import merged
from mtllm_fast.models.plain import TWIN, Rows8, is_hooked, is_linear
from mtllm_fast.ops.bias_relu import bias_relu
from mtllm_fast.ops.lora_linear import Gated, RmsNormed
from mtllm_fast.ops.quantize_rows import MAX_FUSED_WIDTH, quantize_rows
from mtllm_fast.ops.swiglu import swiglu

# Names that oneDNN gives to what may follow a product.
_ONEDNN_ACTIVATIONS: dict[type | None, str] = {
    None: "none",
    nn.SiLU: "swish",
    SiLUActivation: "swish",
}


def linear(
    module: nn.Module,
    x: Tensor | Rows8,
    *,
    activation: nn.Module | None = None,
    times: Tensor | None = None,
    plus: Tensor | None = None,
    source: Gated | None = None,
) -> Tensor:
    """``activation(module(x)) * times + plus``, at most one of the three: x ``[T, K]`` -> ``[T, N]``.

    ``source``: what x was computed from, which a LoRA group keeps for the backward in its place.
    """
    assert (activation is not None) + (times is not None) + (plus is not None) <= 1
    module = idle_base(module)
    if isinstance(x, Rows8):
        assert activation is times is None
        y = module.__dict__[TWIN](x)
        return y if plus is None else y + plus
    kind = None if activation is None else nn.Module if is_hooked(activation) else type(activation)
    if onednn_serves(module, x):
        if kind is nn.ReLU:
            return onednn.linear(x, module.weight, module.bias).relu_()  # oneDNN's own makes 0 of NaN
        if kind in _ONEDNN_ACTIVATIONS:
            name = _ONEDNN_ACTIVATIONS[kind]
            return onednn.linear(x, module.weight, module.bias, activation=name, times=times, plus=plus)
    twin = module.__dict__.get(TWIN)
    if twin is not None and not needs_grad(x, module.weight):
        y = twin(x)
    elif kind is nn.ReLU and not x.is_cpu and is_linear(module):
        return bias_relu(F.linear(x, module.weight), module.bias)
    elif _writes_into_buffers(module, x):
        y = _product(module, x)
        if kind is nn.ReLU:
            return y.relu_()
    else:
        group = lora_group((module,), x, source=source) if is_lora(module) else None
        y = module(x) if group is None else group[0]
    if activation is not None:
        return activation(y)
    if times is not None:
        return y * times
    return y if plus is None else y + plus


def _writes_into_buffers(module: nn.Module, x: Tensor) -> bool:
    """Whether ``_product`` serves: on a CPU, within ``buffers.reused()``, and nobody waits for the module's call."""
    if torch.compiler.is_compiling() or not (buffers.is_active() and x.is_cpu and x.dim() == 2):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    return accumulates(module, x) and not watched(x, *parameters) and not _has_any_global_hook()


def _product(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in memory that is used again."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    y = buffers.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    return torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)


def joint_product(modules: Sequence[nn.Module], x: Tensor | Rows8, source: RmsNormed | None = None) -> Tensor | None:
    """``module(x)`` of all side by side, ``[T, Σ N_i]``, where one product computes them; else None.

    One product: of weights that lie merged, of their twins that do, or of a LoRA group. A consumer that takes it whole
    gives it a gradient in one piece.
    """
    modules = [idle_base(module) for module in modules]
    twin = _joint_twin(modules)
    if isinstance(x, Rows8):
        return twin(x)
    if twin is not None and not needs_grad(x, *(module.weight for module in modules)):
        return twin(x)
    adapted = any(map(is_lora, modules))
    whole = merged([base_linear(module) for module in modules] if adapted else modules)
    if adapted:
        group = lora_group(tuple(modules), x, None if whole is None else whole.weight, source, split=False)
        return None if group is None else group[0]
    if whole is None:
        return None
    product = onednn.linear if onednn_serves(modules[0], x) else F.linear
    return product(x, whole.weight, whole.bias)


def _joint_twin(modules: Sequence[nn.Module]) -> Any:
    """The twin in 8 bits of all modules together, or None."""
    twins = tuple(module.__dict__.get(TWIN) for module in modules)
    if len(twins) == 1:
        return twins[0]
    joint = getattr(twins[0], "joint", None)
    return joint[0] if joint is not None and all(map(is_, joint[1], twins)) and len(joint[1]) == len(twins) else None


def reads_rows8(modules: Sequence[nn.Module], width: int, *made_of: Tensor) -> bool:
    """Whether one product in 8-bit floats reads x ``[T, width]`` for all modules, and no gradient is needed.

    Then whatever computes x from ``made_of`` may round it in the same pass and hand on ``Rows8``.
    """
    modules = [idle_base(module) for module in modules]
    if not modules or not getattr(_joint_twin(modules), "reads_rows8", False) or width > MAX_FUSED_WIDTH:
        return False
    return not needs_grad(*made_of, *(module.weight for module in modules))


def project(modules: Sequence[nn.Module], x: Tensor | Rows8, source: RmsNormed | None = None) -> Sequence[Tensor]:
    """``module(x)`` of each, ``[T, N_i]``: views of one product where there is one."""
    whole = joint_product(modules, x, source)
    if whole is None:
        return [linear(module, x) for module in modules]
    return whole.split([base_linear(module).out_features for module in modules], -1)


def gated(
    gate: nn.Module, up: nn.Module, down: nn.Module, activation: nn.Module, x: Tensor | Rows8,
    source: RmsNormed | None = None,
) -> tuple[Tensor | Rows8, Gated | None]:  # fmt: skip
    """``activation(gate(x)) * up(x)``, ``[T, F]``, and what a LoRA group may keep in its place for the backward.

    In 8 bits if that is how ``down`` reads it.
    """
    if not is_silu(activation) or onednn_serves(idle_base(up), x):
        return linear(up, x, times=linear(gate, x, activation=activation)), None
    whole = joint_product((gate, up), x, source)
    if whole is None:
        parts = linear(gate, x), linear(up, x)
        return swiglu(*parts), Gated(*parts)
    if reads_rows8((down,), whole.shape[1] // 2, whole):
        return Rows8(*quantize_rows(whole, gated=True), whole.dtype), None
    return swiglu(whole), Gated(*whole.chunk(2, dim=-1))


def is_silu(activation: nn.Module) -> bool:
    return type(activation) in (nn.SiLU, SiLUActivation) and not is_hooked(activation)


def accumulates(module: nn.Module, x: Tensor | Rows8, *others: Tensor) -> bool:
    """Whether ``accumulate`` serves: a product that the device adds onto what is there, without a pass of its own.

    Not where autograd records x, the module or one of ``others``, what the sum is made of.
    """
    if isinstance(x, Rows8) or torch.compiler.is_compiling():
        return False
    if not is_linear(module) or autocast_dtype(x) is not None or onednn_serves(module, x):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]  # nn.Module's own look-ups are slow
    return module.weight.dtype == x.dtype and not needs_grad(x, *parameters, *others)


def accumulate(module: nn.Module, x: Tensor, onto: Tensor) -> Tensor:
    """``onto + x Wᵀ``, written over ``onto``; the module's bias is left to the caller. Ask ``accumulates`` first."""
    return onto.addmm_(x, module.weight.t())


def onednn_serves(module: nn.Module, x: Tensor | Rows8) -> bool:
    """Whether oneDNN computes ``module(x)`` and what follows it in one pass."""
    if isinstance(x, Rows8) or torch.compiler.is_compiling() or not x.is_cpu or not onednn.takes(x.dtype):
        return False
    if not is_linear(module):
        return False
    weights = (module.weight,) if module.bias is None else (module.weight, module.bias)
    return not (watched(x, *weights) or needs_grad(x, *weights)) and onednn.serves(x, *weights)

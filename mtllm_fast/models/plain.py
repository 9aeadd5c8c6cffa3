"""Which modules may be read as their parameters instead of called: the families' own, that nothing has changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

TWIN = "_twin"  # in the ``__dict__`` of an nn.Linear: what multiplies in its stead while nothing needs a gradient


class Rows8(NamedTuple):
    """States ``[T, K]`` in 8 bits with a scale per row, by ``quantize_rows``, where nothing but twins reads them."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype
    """Of the states."""


_RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for the module to be called: a hook, a ``forward`` of its own, or accelerate, which
    fetches offloaded weights."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def has_twin(module: nn.Module) -> bool:
    return module.__dict__.get(TWIN) is not None  # a pickled one is None


def why_not_linear(module: nn.Module) -> str | None:
    """Why a module may not be read as the weight and bias of an ``nn.Linear`` at all times, or None if it may."""
    kind = type(module)
    if kind is not nn.Linear:
        return f"is a {kind.__name__} of {kind.__module__.partition('.')[0]}"
    if is_hooked(module):
        return "is hooked"
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.shape != (module.out_features, module.in_features):
        return "is sharded or quantised"
    kinds = {type(parameter) for parameter in module._parameters.values() if parameter is not None}
    return None if kinds == {nn.Parameter} else "is sharded or quantised"


def is_linear(module: nn.Module) -> bool:
    """A Linear with a weight of its own, neither hooked nor with a twin in 8 bits: as much of ``why_not_linear``
    as every product has the time to ask."""
    if type(module) is not nn.Linear or has_twin(module) or is_hooked(module):
        return False
    return type(module._parameters.get("weight")) is nn.Parameter


def is_rms_norm(module: nn.Module) -> bool:
    """A family's own RMSNorm."""
    return type(module) in _RMS_NORMS and not is_hooked(module)


def is_layer_norm(module: nn.Module) -> bool:
    """torch's own LayerNorm over one axis, with gain and bias."""
    return (
        type(module) is nn.LayerNorm
        and len(module.normalized_shape) == 1
        and module.bias is not None
        and not is_hooked(module)
    )

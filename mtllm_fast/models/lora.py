"""PEFT's plain LoRA modules, recognised, and projections of one x that have them, computed together.

Everything else that PEFT can put there (variants such as DoRA, several adapters at once, mixed batches, quantised
bases) stays with the modules themselves: ``lora_group`` returns None and ``why_not_lora_group`` says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtllm_fast.core.dispatch import autocast_dtype
from mtllm_fast.models.plain import has_twin, is_hooked, why_not_linear
from mtllm_fast.ops.lora_linear import Adapter, Gated, RmsNormed, lora_linear


def is_lora(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.lora.layer")  # no PEFT module without PEFT
    return peft is not None and type(module) is peft.Linear


def base_linear(module: Any) -> nn.Linear:
    return module.base_layer if is_lora(module) else module


def idle_base(module: Any) -> Any:
    """The Linear under a LoRA module whose adapters add nothing now; any other module as it is."""
    if not is_lora(module) or module.merged or is_hooked(module):
        return module
    return module.base_layer if module.disable_adapters or not active_adapters(module) else module


def why_not_simple_lora(module: Any) -> str | None:
    """Why PEFT's module is no plain LoRA: merged, switched off, or a sum of B A dropout(x)."""
    if module.merged:
        return "has a merged adapter that is switched off" if module.disable_adapters else None
    if any(name in getattr(module, "lora_variant", {}) for name in active_adapters(module)):
        return "has a variant of LoRA"
    return "has a variant of LoRA" if getattr(module, "fan_in_fan_out", False) else None


def active_adapters(module: Any) -> list[str]:
    """The names of those that add to the module's output, unless they are merged or switched off."""
    return [name for name in module.active_adapters if name in module.lora_A]


def lora_group(
    modules: tuple[nn.Module, ...],
    x: Tensor,
    merged_weight: Tensor | None = None,
    source: RmsNormed | Gated | None = None,
    split: bool = True,
) -> tuple[Tensor, ...] | None:
    """What each module makes of x ``[T, K]``, by one ``lora_linear`` with the modules' live parameters.

    Args:
        modules: projections of x, at least one with an active LoRA; the others may be plain ``nn.Linear``.
        merged_weight: the base weights below one another, if somebody keeps them so: ``[Σ N, K]``.
        source: what x was computed from, to be kept for the backward in its place; see ``lora_linear``.
        split: False for one matrix ``[T, Σ N]``.

    Returns:
        ``[T, N]`` for each, or None where the modules must be called: ``why_not_lora_group`` says why.
    """
    group = _read_group(modules, x)
    if isinstance(group, str):
        return None
    dtype = group[0].weight.dtype
    if x.dtype != dtype:  # autocast casts it too
        x, source = x.to(dtype), None
    if x.is_cuda and autocast_dtype(x) is not None:  # and the adapters: in float32 the kernels take 3 times as long
        group = [projection.cast(dtype) for projection in group]
    return lora_linear(
        x,
        [projection.weight for projection in group] if merged_weight is None else merged_weight,
        [projection.adapter for projection in group],
        sizes=[projection.weight.shape[0] for projection in group],
        bias=_merged_bias(group),
        dropout=next(projection.dropout for projection in group if projection.adapter is not None),
        source=source,
        split=split,
    )


def why_not_lora_group(modules: Sequence[nn.Module], x: Tensor) -> str | None:
    """Why ``lora_group`` cannot serve these modules now, or None if it can."""
    group = _read_group(modules, x)
    return group if isinstance(group, str) else None


class _Projection(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None  # that adds to the output now
    dropout: float
    casts: bool  # x to the adapter's dtype

    def cast(self, dtype: torch.dtype) -> _Projection:
        if self.adapter is None:
            return self
        return self._replace(adapter=self.adapter._replace(a=self.adapter.a.to(dtype), b=self.adapter.b.to(dtype)))


def _read_group(modules: Sequence[nn.Module], x: Tensor) -> list[_Projection] | str:
    """The modules' parameters, or why they must be called."""
    group = []
    for module in modules:
        projection = _read(module)
        if isinstance(projection, str):
            return f"a {type(module).__name__} {projection}"
        group.append(projection)
    adapted = [(p.adapter, p.dropout, p.casts) for p in group if p.adapter is not None]
    if not adapted:
        return "no adapter is active"
    adapter_dtype = adapted[0][0].a.dtype
    if any(dropout != adapted[0][1] for _, dropout, _ in adapted):
        return "the adapters differ in their dropout"
    if any(adapter.a.dtype != adapter_dtype or adapter.b.dtype != adapter_dtype for adapter, _, _ in adapted):
        return "the adapters differ in their dtype"
    dtype = autocast_dtype(x) or x.dtype
    if torch.is_grad_enabled() and any(p.weight.requires_grad or _trained(p.bias) for p in group):
        return "a base is trained"
    if any(projection.weight.dtype != dtype for projection in group):
        return f"the products are in {dtype} and a base weight is in another dtype"
    if adapter_dtype != dtype and not all(casts for _, _, casts in adapted):
        return "the adapters have another dtype than x, and PEFT was told not to cast x"
    return group if x.dim() == 2 else f"x must be [T, K], got {list(x.shape)}"


def _read(module: Any) -> _Projection | str:
    """Each attribute is looked up once: a module's are slow, and this runs in every call of every layer."""
    if not is_lora(module):
        return _why_not_plain(module) or _Projection(module.weight, module.bias, None, 0.0, True)
    base = module.base_layer
    reason = why_not_simple_lora(module) or _why_not_plain(base) or ("is hooked" if is_hooked(module) else None)
    if reason is not None:
        return reason
    names = active_adapters(module)
    if module.merged or module.disable_adapters or not names:
        return _Projection(base.weight, base.bias, None, 0.0, True)
    if len(names) > 1:
        return "has several active adapters"
    name = names[0]
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or is_hooked(dropout):
        return "has a dropout that is not the usual one"
    if reason := _why_not_plain(a) or _why_not_plain(b):
        return f"has an adapter that {reason}"
    if a.bias is not None or b.bias is not None:
        return "has an adapter with a bias"
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    casts = getattr(module, "cast_input_dtype_enabled", True)
    return _Projection(base.weight, base.bias, Adapter(a.weight, b.weight, module.scaling[name]), p, casts)


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _why_not_plain(linear: nn.Module) -> str | None:
    return why_not_linear(linear) or ("has a twin in 8 bits" if has_twin(linear) else None)


def _merged_bias(group: Sequence[_Projection]) -> Tensor | None:
    if all(projection.bias is None for projection in group):
        return None
    return torch.cat([p.weight.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias for p in group])

"""PEFT's plain LoRA modules, recognised, and projections of one x that have them, computed together.

Everything else that PEFT can put there (variants such as DoRA, several adapters at once, mixed batches, quantised
bases) stays with the modules themselves: ``lora_group`` returns None and ``why_not_lora_group`` says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtllm_fast.models.linear import is_hooked
from mtllm_fast.ops.lora_linear import Adapter, Gated, RmsNormed, lora_linear


def is_lora(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.lora.layer")  # no PEFT module without PEFT
    return peft is not None and type(module) is peft.Linear


def base_linear(module: Any) -> nn.Linear:
    return module.base_layer if is_lora(module) else module


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
) -> tuple[Tensor, ...] | None:
    """What each module makes of x ``[T, K]``, by one ``lora_linear`` with the modules' live parameters.

    Args:
        modules: projections of x, at least one with an active LoRA; the others may be plain ``nn.Linear``.
        merged_weight: the base weights below one another, if somebody keeps them so: ``[Σ N, K]``.
        source: what x was computed from, to be kept for the backward in its place; see ``lora_linear``.

    Returns:
        ``[T, N]`` for each, or None where the modules must be called: ``why_not_lora_group`` says why.
    """
    if why_not_lora_group(modules, x) is not None:
        return None
    bases, branches = [base_linear(module) for module in modules], [_branch(module) for module in modules]
    dtype = bases[0].weight.dtype
    if x.dtype != dtype:  # autocast casts it too
        x, source = x.to(dtype), None
    return lora_linear(
        x,
        [base.weight for base in bases] if merged_weight is None else merged_weight,
        [None if branch is None else branch[0] for branch in branches],
        sizes=[base.out_features for base in bases],
        bias=_merged_bias(bases),
        dropout=next(branch[1] for branch in branches if branch is not None),
        source=source,
    )


def why_not_lora_group(modules: Sequence[nn.Module], x: Tensor) -> str | None:
    """Why ``lora_group`` cannot serve these modules now, or None if it can."""
    for module in modules:
        if reason := _why_not_plain(module):
            return f"a {type(module).__name__} {reason}"
    branches = [branch for module in modules if (branch := _branch(module)) is not None]
    if not branches:
        return "no adapter is active"
    if len({dropout for _, dropout in branches}) > 1:
        return "the adapters differ in their dropout"
    if len({weight.dtype for adapter, _ in branches for weight in (adapter.a, adapter.b)}) > 1:
        return "the adapters differ in their dtype"
    bases = {base_linear(module).weight.dtype for module in modules}
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if bases != {dtype}:
        return f"the products are in {dtype} and a base weight is in another dtype"
    casts = all(getattr(module, "cast_input_dtype_enabled", True) for module in modules)
    if not casts and branches[0][0].a.dtype != dtype:
        return "the adapters have another dtype than x, and PEFT was told not to cast x"
    return None if x.dim() == 2 else f"x must be [T, K], got {list(x.shape)}"


def _why_not_plain(module: Any) -> str | None:
    base = base_linear(module)
    parts: list[nn.Module] = [base]
    if is_lora(module):
        if reason := why_not_simple_lora(module):
            return reason
        names = active_adapters(module)
        if len(names) > 1:
            return "has several active adapters"
        for name in names:
            parts += [module.lora_A[name], module.lora_B[name]]
            dropout = module.lora_dropout[name]
            if type(dropout) not in (nn.Dropout, nn.Identity) or is_hooked(dropout):
                return "has a dropout that is not the usual one"
        if any(part.bias is not None for part in parts[1:]):
            return "has an adapter with a bias"
    if any(type(part) is not nn.Linear for part in parts):
        return "is no plain nn.Linear inside"
    if is_hooked(module) or any(map(is_hooked, parts)):
        return "is hooked"
    sharded = (type(p.weight) is not nn.Parameter or p.weight.shape != (p.out_features, p.in_features) for p in parts)
    if any(sharded):
        return "is sharded"
    trained = any(parameter.requires_grad for parameter in base.parameters())
    return "trains its base" if trained and torch.is_grad_enabled() else None


def _branch(module: Any) -> tuple[Adapter, float] | None:
    """The adapter that adds to the output of a plain module, and its dropout now."""
    if not is_lora(module) or module.merged or module.disable_adapters:
        return None
    for name in active_adapters(module):
        dropout = module.lora_dropout[name]
        adapter = Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
        return adapter, dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    return None


def _merged_bias(bases: Sequence[nn.Linear]) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    return torch.cat([base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases])

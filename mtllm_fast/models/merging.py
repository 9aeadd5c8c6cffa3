"""Projections of the same input laid back to back in memory, so that one product computes q, k and v, or gate and up.

``merge_projections`` moves the parameters; they stay the same ``nn.Parameter`` objects under the same names, only their
memory is now a part of one storage. Whoever loads, trains, casts, moves, wraps or copies a model needs to know nothing
of it: what keeps the memory keeps the merge, what replaces it ends the merge. So nothing is remembered and nothing can
go stale: ``merged`` looks at where the parameters lie whenever it is called.

Floor: the product reads the same weights and writes the same outputs as its parts; it reads x once instead of three
times (twice) and is one launch. The gain on a GPU is not yet measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtllm_fast.models.plain import has_twin, is_hooked, why_not_linear

# Children of one module that are given the same input, in the order in which they are laid out.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Merged(NamedTuple):
    """Several Linears as one."""

    weight: Tensor
    """``[ΣN, K]``, a view of the live parameters."""
    bias: Tensor | None
    """``[ΣN]`` or None."""
    sizes: list[int]
    """Each Linear's N, to split the product by."""


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_projections`` found; ``print`` it.

    Attributes:
        merged: how many groups lie in one storage now.
        skipped: for every other group, by name, why it was left as it was.
    """

    merged: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.merged} groups of projections merged"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.skipped.items()])


def merged(modules: Sequence[nn.Module]) -> Merged | None:
    """The modules as one Linear, without a copy, or None: then they must be called one by one.

    ``F.linear(x, *merged[:2]).split(merged.sizes, -1)`` is ``[module(x) for module in modules]``, rounding apart.

    None where a view would not be what the modules are: parameters that lie elsewhere, that autograd records (a view
    would take no gradients to them), that are quantised or sharded, modules that PEFT has wrapped or something has
    hooked. Also where it would cost more: autocast keeps its casts of parameters, not those of views, and a compiled
    graph would have to check the memory on every call.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> attention = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("q_proj", "k_proj", "v_proj")})
        >>> merge_projections(attention).merged
        1
        >>> with torch.no_grad():
        ...     whole = merged([*attention.values()])
        >>> whole.weight.shape, whole.sizes
        (torch.Size([12, 8]), [4, 4, 4])
    """
    if torch.compiler.is_compiling():
        return None
    weights, biases, has_bias = [], [], False
    for module in modules:
        if type(module) is not nn.Linear or has_twin(module) or is_hooked(module):
            return None
        parameters = module._parameters  # nn.Module's own look-up takes as long as half of this function
        weights.append(parameters.get("weight"))
        biases.append(parameters.get("bias"))
        has_bias = has_bias or biases[-1] is not None
    weight, sizes = _joined(weights)
    bias = _joined(biases)[0] if has_bias else None
    if weight is None or (has_bias and bias is None):
        return None
    if torch.is_grad_enabled() or (weight.dtype is torch.float32 and torch._C._is_any_autocast_enabled()):
        for parameter in weights + biases:
            if parameter is not None and parameter.requires_grad:
                return None
    return Merged(weight, bias, sizes)


def merge_projections(root: nn.Module) -> MergeReport:
    """Lay q, k and v of every attention, and gate and up of every gated MLP under ``root``, back to back in memory.

    In place: the parameters keep their identity, values, gradients and names. Groups that are merged already are not
    touched. At most one group is in memory twice at any time (at 8B in bfloat16 gate and up, 235 MB). Nothing may use
    the model meanwhile. Base weights under PEFT's adapters are merged too.

    A state dict's tensors share the parameters' memory as always, but each is given a storage of its own, since
    safetensors and transformers refuse or copy tensors that share one. (Such a storage begins inside of an allocation,
    which CUDA's sharing between processes does not take: send the parameters.)
    """
    count, skipped = 0, {}
    with torch.inference_mode(False), torch.no_grad():
        for name, modules in _groups(root):
            if reason := _why_not(modules):
                skipped[name] = reason
                continue
            for parts in _parameters(modules):
                if not _is_joined(parts):
                    _lay_out(parts)
            for module in modules:
                if _state_dict_hook not in module._state_dict_hooks.values():
                    module.register_state_dict_post_hook(_state_dict_hook)
            count += 1
    return MergeReport(count, skipped)


def split_projections(root: nn.Module) -> None:
    """Undo ``merge_projections``: every parameter gets a storage of its own. At most one group is in memory twice."""
    with torch.inference_mode(False), torch.no_grad():
        for _, modules in _groups(root):
            if _why_not(modules) is None:
                for parts in _parameters(modules):
                    for part in parts:
                        if part.untyped_storage().nbytes() > part.nbytes:
                            part.data = part.data.clone()


def is_merged(root: nn.Module) -> bool:
    """Whether there is something to merge under ``root`` and ``merge_projections`` would move nothing."""
    found = [modules for _, modules in _groups(root) if _why_not(modules) is None]
    return bool(found) and all(_is_joined(parts) for modules in found for parts in _parameters(modules))


def _joined(parts: Sequence[Any]) -> tuple[Tensor | None, list[int]]:
    """Plain parameters ``[N_i, ...]`` as one tensor ``[ΣN, ...]`` if they lie back to back in one storage, and each N.

    Addresses would not tell: allocators place separate tensors side by side too.
    """
    sizes: list[int] = []
    first = parts[0]
    if type(first) is not nn.Parameter:
        return None, sizes
    storage, end, dtype = first.untyped_storage()._cdata, first.storage_offset(), first.dtype
    _, *columns = first.shape
    for part in parts:
        if type(part) is not nn.Parameter or part.untyped_storage()._cdata != storage or part.storage_offset() != end:
            return None, sizes
        rows, *others = part.shape
        if others != columns or part.dtype is not dtype or not part.is_contiguous():
            return None, sizes
        end += part.numel()
        sizes.append(rows)
    return first.detach().as_strided((sum(sizes), *columns), (*columns, 1)), sizes


def _is_joined(parts: Sequence[nn.Parameter]) -> bool:
    return _joined(parts)[0] is not None


def _lay_out(parts: Sequence[nn.Parameter]) -> None:
    whole = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    if not whole.is_meta:  # a slice of a storage cannot be resized, which makes slices of it safe: see _state_dict_hook
        whole.set_(whole.untyped_storage()[:], 0, whole.shape, whole.stride())
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        place.copy_(part)
        part.data = place  # frees what it was


def _groups(root: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Name and modules of each group, PEFT's wrappers removed."""
    for owner_name, owner in root.named_modules():
        for names in _GROUPS:
            children = [owner._modules.get(name) for name in names]
            if None not in children:
                prefix = f"{owner_name}." if owner_name else ""
                yield prefix + "/".join(names), [getattr(child, "base_layer", child) for child in children]


def _parameters(modules: Sequence[Any]) -> list[list[nn.Parameter]]:
    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    return [weights] if biases[0] is None else [weights, biases]


def _why_not(modules: Sequence[nn.Module]) -> str | None:
    """Why a group's parameters must stay where they are, or None if they may be moved."""
    for module in modules:
        if reason := why_not_linear(module):
            return f"one {reason}"
    if len({module.bias is None for module in modules}) > 1:
        return "some have a bias and some have none"
    for parts in _parameters(modules):
        if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
            return "they differ in dtype, device or width"
        if len({id(part) for part in parts}) < len(parts):
            return "they are tied to each other"
        if any(part.device.type == "cpu" and part.is_shared() for part in parts):
            return "they are shared with other processes"
        total = sum(part.nbytes for part in parts)
        if any(part.untyped_storage().nbytes() > total for part in parts):  # FSDP's flat parameters, say
            return "they are views of something larger"
    return None


def _state_dict_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Give each merged tensor of a state dict a storage that is no longer than itself, over the same memory.

    Else safetensors' ``save_model`` refuses the model, ``save_pretrained`` copies it whole first, and ``torch.save`` of
    one tensor writes its group. A slice of a storage is such a storage; safetensors loads its files so. It keeps the
    memory alive, unless the whole can be resized: FSDP frees its flat parameters so, and they are not touched.
    """
    for name in module._parameters:
        tensor = state_dict.get(prefix + name)
        if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_contiguous():
            continue
        storage = tensor.untyped_storage()
        if storage.resizable() or storage.nbytes() == tensor.nbytes or (tensor.is_cpu and tensor.is_shared()):
            continue
        start = tensor.storage_offset() * tensor.element_size()
        memory = storage[start : start + tensor.nbytes]
        # Through .data it stays the detached parameter, whose writes show in the parameter's version.
        alone = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = alone.set_(memory, 0, tensor.shape, tensor.stride())
